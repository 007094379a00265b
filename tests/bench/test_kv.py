import argparse

import pytest
import torch
from torch.nn.attention import SDPBackend

from bench import kv
from bench.device import Ceilings
from bench.kv import HEAD, HEADS, SHARED, Case, KVWorker

OPTIONS = argparse.Namespace(device="cpu")
LIMITS = Ceilings(read=1e9, matmul=1e12)


@pytest.fixture
def worker(monkeypatch):
    """Makes workers over caches that are few, and calls that are short."""
    monkeypatch.setattr(kv, "cache_bytes", lambda device: 1)
    monkeypatch.setattr(kv, "BUSY", 0)
    monkeypatch.setattr(kv, "STEPS", 3)
    flash = kv.TORCH["flash grouped"]
    monkeypatch.setattr(kv, "TORCH", {"flash grouped": flash, "cuDNN": kv.TORCH["cuDNN grouped"]})
    return lambda name: KVWorker(name, OPTIONS)


@pytest.mark.parametrize("name", kv.CONTENDERS)
def test_attention_is_that_of_the_cache_and_reads_it_once(name, worker):
    found = worker(name)
    first = found.compile(Case("attention", 2, 128))
    assert 0 < first["error"] < 5e-3
    row = found.measure(LIMITS)
    token = {"bf16": 2 * HEAD, "kv8": HEAD + 4, "kvfp8": HEAD + 4, "kv4(keys=token)": HEAD // 2 + 16}.get(name)
    if token:
        assert found.bytes == 2 * 2 * HEADS * 128 * token
    assert row["bandwidth"] == pytest.approx(found.bytes / 1e9 / (row["ms"] / 1e3), rel=1e-2)
    assert len(found.copies) == 2 and list(row["kernels"].values()) == [2]


def test_a_way_that_fails_is_named_and_the_rest_are_timed(worker, capsys):
    found = worker("bf16")
    found.compile(Case("attention", 1, 8))
    row = found.measure(LIMITS)
    assert row["us"]["cuDNN"] == "error" and "bf16, cuDNN: RuntimeError" in capsys.readouterr().err
    assert row["kernels"] == {"flash grouped": 2}


def test_where_no_way_works_the_contender_has_failed(worker, monkeypatch):
    monkeypatch.setattr(kv, "TORCH", {"cuDNN": kv.TORCH["cuDNN"]})
    with pytest.raises(RuntimeError):
        worker("bf16").compile(Case("attention", 1, 8))


@pytest.mark.parametrize("name", ["bf16", "kv8", "kv4"])
def test_an_update_goes_through_positions(name, worker):
    found = worker(name)
    found.compile(Case("update", 2, 64))
    row = found.measure(LIMITS)
    assert list(row["kernels"].values()) == [3 * kv.FEW] and "bandwidth" not in row
    for packed in found.copies[0]:
        tensor = packed[0] if len(packed) < 3 else packed[2]  # by channel it is in the window
        assert tensor[:, :, :3].unique(dim=2).shape[2] == 1


def test_grouped_queries_are_the_tokens_of_their_kv_head():
    q = torch.randn(2, HEADS * SHARED, 1, HEAD)
    keys, values = ((torch.randn(2, HEADS, 8, HEAD),) for _ in range(2))
    found = [kv.attention_of(SDPBackend.MATH, grouped, q, keys, values) for grouped in (False, True)]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["int4wo", "kv8 + int4wo"])
def test_what_is_no_recipe_for_caches_is_an_error(name):
    with pytest.raises(ValueError, match="one rule for caches"):
        kv.formats_of(name)
