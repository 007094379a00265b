import argparse

import pytest
import torch

from bench import decode
from bench import worker as worker_module
from bench.decode_step import HEAD
from bench.device import Ceilings

OPTIONS = argparse.Namespace(device="cpu", autotune=[], width=512, layers=1, window=8)
LIMITS = Ceilings(read=1e9, matmul=1e12)


@pytest.fixture(scope="module")
def worker():
    """A worker that runs the module as it is, as the doors to compile it are tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(decode.DecodeWorker, "compiled", lambda self, model: model)
        found = decode.DecodeWorker("bf16", OPTIONS)
        found.linear_bytes = 10**6
        yield found


@torch.no_grad()
def test_a_rule_for_caches_packs_them_in_a_module_of_their_own(monkeypatch):
    monkeypatch.setattr(worker_module, "STEPS", (2, 3))
    optimize = decode.aograph.optimize
    monkeypatch.setattr(
        decode.aograph,
        "optimize",
        lambda *args, compile_options, **rest: optimize(*args, compile=False, **rest),
    )
    found = decode.DecodeWorker("int4wo + kv4(keys=token)", OPTIONS)
    for batch in (1, 3):  # the second builds the model anew
        first = found.compile(batch)
        assert 0 < first["error"] < 0.3
        row = found.measure(LIMITS)
        assert found.kernels["blocks"] == 2
        linears = sum(p.numel() for n, p in found.model.named_parameters() if p.ndim > 1 and "embedding" not in n)
        assert row["read GB"] == round((linears * 5 / 8 + 2 * batch * 8 * (HEAD // 2 + 16)) / 1e9, 3)


@torch.no_grad()
def test_a_batch_is_compiled_and_measured(worker, monkeypatch):
    monkeypatch.setattr(worker_module, "STEPS", (2, 3))
    found = worker.compile(3)
    assert found["error"] < 0.02
    row = worker.measure(LIMITS)
    cache = 2 * 3 * 1 * 8 * HEAD * 2
    assert row["read GB"] == round((10**6 + cache) / 1e9, 3)
    assert row["tokens/s"] == pytest.approx(3e3 / row["ms"], rel=1e-2)
    assert worker.state[1].item() == decode.FIRST + 3 + 3 + row["steps"]
