"""The CUDA C++ kernel of kv_update against the reference; what is chosen needs no GPU."""

import itertools
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from aograph.kernels import cuda, cuda_kv_update, nvrtc
from aograph.kernels.cuda_linear import CAPABILITIES
from aograph.kernels.kv_attention import Keys
from aograph.kernels.kv_cache import FLOATS, FP8, INT4, INT4_CHANNEL, INT8, CacheCase, KVFormat
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
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: f"{form.name}-{form.group_size}")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_updates(form, dtype, gpu):
    """Bit for bit as the reference on the CPU: on a GPU torch divides by numbers by their reciprocals."""
    for D, T in itertools.product((64, 80, 256), (1, 7)):
        if D % (form.group_size or 1):
            continue
        new = torch.randn(2, T, 3, D, device="cuda", dtype=dtype).transpose(1, 2)
        new[0, 0, 0], new[1, 2, 0, 5] = 0, torch.nan
        positions = torch.stack([torch.randperm(20, device="cuda")[:T] for _ in range(2)])
        for where in (positions, positions[0]):
            found, expected = form.empty(2, 3, 20, D, "cuda"), form.empty(2, 3, 20, D)
            kv_update.run(*found, new, where, implementation="cuda")
            kv_update.run(*expected, new.cpu(), where.cpu(), implementation="reference")
            values = [form.dequantize(*packed, torch.float64).cpu() for packed in (found, expected)]
            torch.testing.assert_close(*values, rtol=0, atol=0, equal_nan=True)


def whole(codes, scales, window, held):
    return Keys(codes, scales, window, held).dequantize(slice(0, codes.shape[2]), torch.float64).cpu()


@pytest.mark.cuda
@pytest.mark.parametrize("of_window", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_row_by_channel_goes_from_block_to_block(dtype, of_window, gpu):
    for D, H in ((32, 3), (80, 20), (128, 8)):
        expected = INT4_CHANNEL.pack(torch.randn(2, H, 250, D).to(of_window))
        found = [each.cuda() for each in expected]
        for at in ([3, 5], [64, 6], [65, 63], [66, 64], [255, 64], [10, 100], [64, 127], [0, 128], [128, 0]):
            positions = torch.tensor(at)[:, None]
            new = torch.randn(2, 1, H, D).to(dtype).transpose(1, 2)
            new[0, 0, 0], new[1, 2, 0, 5] = 0, torch.nan if at[1] == 64 else 1
            given = [(codes, scales, tensor, positions.to(codes.device), *window)
                     for (codes, scales, *window), tensor in ((found, new.cuda()), (expected, new))]  # fmt: skip
            kv_update.run(*given[0], implementation="cuda")
            kv_update.run(*given[1], implementation="reference")
            torch.testing.assert_close(whole(*found), whole(*expected), rtol=0, atol=0, equal_nan=True)
            assert found[3].tolist() == expected[3].tolist() == [at[0] // 64, at[1] // 64]


@pytest.mark.cuda
def test_past_the_end_stops_the_device(gpu):
    done = subprocess.run([sys.executable, "-c", PAST_THE_END], capture_output=True, text=True)
    assert done.returncode and "a position is outside of the KV cache" in done.stdout + done.stderr


@pytest.mark.cuda
def test_a_cache_that_is_part_of_another_takes_the_reference(gpu):
    whole = INT8.empty(2, 20, 6, 64, "cuda")
    part, plain = [each.transpose(1, 2)[:, ::2] for each in whole], INT8.empty(2, 3, 20, 64, "cuda")
    new, positions = torch.randn(2, 3, 4, 64, device="cuda"), torch.tensor([3, 1, 19, 0], device="cuda")
    kv_update.run(*part, new, positions, implementation="cuda")
    kv_update.run(*plain, new, positions, implementation="reference")
    assert plain[0].any() and all(a.equal(b) for a, b in zip(part, plain, strict=True))


def test_what_is_not_supported_has_a_reason(monkeypatch):
    monkeypatch.setattr(cuda, "available", lambda capability=None: True)
    for case in (CASE, replace(CASE, keys=INT4_CHANNEL)):
        assert cuda_kv_update.supports(case) is True
    for change, reason in [
        ({"keys": KVFormat("int8", 8, 16)}, "groups"),
        ({"keys": INT4_CHANNEL, "M": 2}, "one token by channel"),
        ({"device": "cpu"}, "CUDA only"),
        ({"capability": (8, 0)}, "compute capability 9.0"),
        ({"K": 2048}, "head size"),
    ]:
        assert reason in cuda_kv_update.supports(replace(CASE, **change))


@pytest.mark.skipif(isinstance(nvrtc.version(), str), reason=str(nvrtc.version()))
@pytest.mark.parametrize("form", [*FORMATS, INT4_CHANNEL], ids=lambda form: f"{form.name}-{form.group_size}")
def test_it_compiles(form):
    source = (nvrtc.FOLDER / "kv_update.cu").read_text(encoding="utf-8")
    for dtype in FLOATS:
        window = dtype if form.block else None
        cubin = nvrtc.compile(source, "kv_update.cu", "sm_90a", cuda_kv_update.defines(form, 64, dtype, window))
        assert (b".text.kv_step\0" if form.block else b".text.kv_store\0") in cubin
