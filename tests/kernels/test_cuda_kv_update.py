"""The CUDA C++ kernel of kv_update against the reference; what is chosen needs no GPU."""

import itertools
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from aograph.kernels import cuda, cuda_kv_update, nvrtc
from aograph.kernels.cuda_linear import CAPABILITIES
from aograph.kernels.kv_cache import FP8, INT4, INT4_CHANNEL, INT8, CacheCase, KVFormat
from aograph.kernels.kv_update import kv_update

FORMATS = [INT8, FP8, INT4, KVFormat("int4", 4, 64), KVFormat("int8", 8, 32)]
CASE = CacheCase("cuda", torch.bfloat16, 1, 128, 128, None, (9, 0))
PAST_THE_END = """
import torch
from aograph.kernels.kv_cache import INT8
from aograph.kernels.kv_update import kv_update
cache = INT8.empty(1, 1, 8, 64, "cuda")
kv_update.run(*cache, torch.ones(1, 1, 1, 64, device="cuda"), torch.tensor([8], device="cuda"), implementation="cuda")
torch.cuda.synchronize()
"""


@pytest.fixture
def gpu():
    if torch.cuda.get_device_capability() not in CAPABILITIES:
        pytest.skip("the kernel is for another architecture")


@pytest.mark.cuda
@pytest.mark.parametrize("form", [*FORMATS, KVFormat("int8", 8, 32)], ids=lambda form: f"{form.name}-{form.group_size}")
@pytest.mark.parametrize("dtype", cuda_kv_update.INPUTS)
def test_updates(form, dtype, gpu):
    for D, T in itertools.product((64, 80, 256), (1, 7)):
        if D % (form.group_size or 1):
            continue
        new = torch.randn(2, T, 3, D, device="cuda", dtype=dtype).transpose(1, 2)
        new[0, 0, 0], new[1, 2, 0, 5] = 0, torch.nan
        positions = torch.stack([torch.randperm(20, device="cuda")[:T] for _ in range(2)])
        for where in (positions, positions[0]):
            found, expected = form.empty(2, 3, 20, D, "cuda"), form.empty(2, 3, 20, D, "cuda")
            kv_update.run(*found, new, where, implementation="cuda")
            kv_update.run(*expected, new, where, implementation="reference")
            values = [form.dequantize(*packed, torch.float64) for packed in (found, expected)]
            torch.testing.assert_close(*values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.cuda
def test_past_the_end_stops_the_device(gpu):
    done = subprocess.run([sys.executable, "-c", PAST_THE_END], capture_output=True, text=True)
    assert done.returncode and "a position is outside of the KV cache" in done.stdout + done.stderr


@pytest.mark.cuda
def test_a_cache_may_be_part_of_another(gpu):
    whole = INT8.empty(2, 20, 6, 64, "cuda")
    part, plain = [each.transpose(1, 2)[:, ::2] for each in whole], INT8.empty(2, 3, 20, 64, "cuda")
    new, positions = torch.randn(2, 3, 4, 64, device="cuda"), torch.tensor([3, 1, 19, 0], device="cuda")
    for cache in (part, plain):
        kv_update.run(*cache, new, positions, implementation="cuda")
    assert all(a.equal(b) for a, b in zip(part, plain, strict=True))


def test_what_is_not_supported_has_a_reason(monkeypatch):
    monkeypatch.setattr(cuda, "available", lambda capability=None: True)
    assert cuda_kv_update.supports(CASE) is True
    for change, reason in [
        ({"keys": KVFormat("int8", 8, 16)}, "groups"),
        ({"keys": INT4_CHANNEL}, "no keys by channel"),
        ({"device": "cpu"}, "CUDA only"),
        ({"capability": (8, 0)}, "compute capability 9.0"),
        ({"K": 2048}, "head size"),
    ]:
        assert reason in cuda_kv_update.supports(replace(CASE, **change))


@pytest.mark.skipif(isinstance(nvrtc.version(), str), reason=str(nvrtc.version()))
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: f"{form.name}-{form.group_size}")
def test_it_compiles(form):
    source = (nvrtc.FOLDER / "kv_update.cu").read_text(encoding="utf-8")
    for dtype in cuda_kv_update.INPUTS:
        cubin = nvrtc.compile(source, "kv_update.cu", "sm_90a", cuda_kv_update.defines(form, 64, dtype))
        assert b".text.kv_store\0" in cubin
