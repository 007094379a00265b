"""The CUDA C++ kernel of kv_attention on a CPU, its threads in turn (run.cpp), against the reference."""

import ctypes
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from aograph.kernels import nvrtc
from aograph.kernels.cuda_kv_attention import MANY, UNIT, Sizes, blocks_of
from aograph.kernels.kv_attention import kv_attention
from aograph.kernels.kv_cache import FP8, INT4, INT4_CHANNEL, INT8, KVFormat

EMULATION = Path(__file__).parent
SOURCES = ("kv_attention.cu", "kv_units.cuh", "kv_products.cuh")
FORMATS = [INT8, FP8, INT4, KVFormat("int4", 4, 64), INT4_CHANNEL]  # of keys
TOLERANCE = 1e-2  # of the norm: both products are of bf16
COMPILER = os.environ.get("CXX") or shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")
each = pytest.mark.parametrize("form", FORMATS, ids=lambda form: f"{form.name}-{form.block or form.group_size}")


@cache
def compiled(**defines):
    """The kernel for these defines."""
    with TemporaryDirectory() as folder:
        for source in SOURCES:  # beside which there is no ptx.cuh, so that the emulation's is included
            shutil.copy(nvrtc.FOLDER / source, folder)
        library = Path(folder) / "kernel.so"
        command = [COMPILER, "-std=c++20", "-O2", "-w", "-shared", "-fPIC", f"-I{folder}", f"-I{EMULATION}"]
        flags = [f"-D{name}={value}" for name, value in defines.items()]
        subprocess.run([*command, *flags, str(EMULATION / "run.cpp"), "-o", str(library)], check=True)
        run = ctypes.CDLL(str(library)).attention
    run.restype = ctypes.c_char_p
    return run


def emulated(
    q, k, k_scales, v, v_scales, positions, start, mask, scale, cap, window, k_window, held, sinks, late, blocks
):
    B, heads, T, D = q.shape
    H, S = v.shape[1:3]
    rows = heads // H * T
    form, _ = kv_attention.fit(k, k_scales, k_window, held)
    values, _ = kv_attention.fit(v, v_scales)
    dtypes = [None if each is None else each.dtype for each in (k_window, mask, sinks)]
    sizes = Sizes(D, -(-rows // 8), form, values, dtypes[0], blocks * UNIT * MANY <= S)
    y = torch.empty_like(q)
    sums, tops = torch.full((B * H, blocks, rows, D), torch.nan), torch.full((B * H, blocks, rows, 2), torch.nan)
    strides = [0, 0, 0] if mask is None else [mask.stride(i) if mask.shape[i] > 1 else 0 for i in range(3)]
    arguments = [
        q, k, k[0, 0, 0].nbytes, sizes.segments(form)[1], k.shape[2], k_scales, v, v[0, 0, 0].nbytes,
        sizes.segments(values)[1], v_scales, k_window, held, positions.clone(), late, start, mask, sinks, y, sums, tops,
        float(scale), float(cap), window, blocks, B, H, rows, T, S, *strides, sizes.shared,
    ]  # fmt: skip
    wrong = compiled(**sizes.defines(q.dtype, *dtypes[1:]))(*map(word, arguments))
    assert wrong is None, wrong.decode()
    return y


def word(argument):
    if argument is None or isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument if argument is None else argument.data_ptr())
    return (ctypes.c_float if isinstance(argument, float) else ctypes.c_int)(argument)


def packed(form, k, v, window=torch.bfloat16):
    """k, its scales, v, its scales; by channel also a window and which block of each row is in it."""
    k, k_scales, *rest = form.pack(k)
    if rest:
        rest = [rest[0].to(window), rest[1]]
    return [each.contiguous() for each in (k, k_scales, *(INT4 if form.block else form).pack(v), *rest)]


def check(q, cache, positions, start=None, mask=None, cap=0.0, window=0, sinks=None, late=None, blocks=None):
    B, H, S = cache[2].shape[:3]
    rest = start, mask, q.shape[3] ** -0.5, cap, window, *(cache[4:] or (None, None)), sinks
    y = emulated(q, *cache[:4], positions, *rest, late, blocks or blocks_of(B * H, S, 132))
    now = positions if late is None else late
    expected = kv_attention.run(q.float(), *cache[:4], now, *rest, implementation="reference").double()
    assert y.isnan().equal(expected.isnan())
    y, expected = y.double().nan_to_num(), expected.nan_to_num()
    assert (y - expected).norm() <= TOLERANCE * expected.norm()


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def caches(form, B, H, S, D, window=torch.bfloat16):
    return packed(form, random(B, H, S, D), random(B, H, S, D + 1)[..., :D], window)


@each
@pytest.mark.parametrize("D, G, T", [(64, 4, 1), (64, 1, 3), (128, 4, 3)])
def test_ragged_lengths(form, D, G, T):
    """One token, few, many and a full cache; a row of which nothing is seen."""
    ends = torch.tensor([-1, T - 1, 200, 555, 699])
    positions = ends[:, None] - torch.arange(T).flip(0)
    check(random(5, G, T, D).bfloat16(), caches(form, 5, 1, 700, D), positions)


@pytest.mark.parametrize("form, D", [(INT8, 16), (FP8, 80), (INT8, 256), (INT4, 96), (INT4, 256), (INT4_CHANNEL, 32)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_head_sizes(form, D, dtype):
    check(random(2, 4, 1, D).to(dtype), caches(form, 2, 1, 400, D, dtype), torch.tensor([[20], [399]]))


@each
def test_positions_that_are_written_at_the_last_moment(form):
    before = torch.tensor([-1, 599, 590, 3, 300, 0, 500])[:, None]
    late = torch.tensor([500, -1, 3, 599, 300, 1 << 40, 430])[:, None]
    check(random(7, 4, 1, 64).bfloat16(), caches(form, 7, 1, 600, 64), before, late=late)


@each
@pytest.mark.parametrize("window, cap", [(1, 0.0), (37, 2.0), (0, 30.0)])
def test_padding_windows_and_softcap(form, window, cap):
    start = torch.tensor([0, 170, 301])
    positions = torch.tensor([[3, 4, 5], [180, 250, 200], [397, 500, 599]])
    check(random(3, 4, 3, 64).bfloat16() * 3, caches(form, 3, 1, 600, 64), positions, start, cap=cap, window=window)


@each
@pytest.mark.parametrize("S", [96, 600])
def test_sinks(form, S):
    """Of a cache that one block reads, and of one that several do."""
    sinks = torch.tensor([0.5, 3.0, 200.0, -200.0, -torch.inf, 0.0, torch.nan, 7.0])
    positions = torch.tensor([[-1, -1], [3, 4], [S - 2, S - 1]])
    check(random(3, 8, 2, 64).bfloat16() * 3, caches(form, 3, 2, S, 64), positions, sinks=sinks)


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32], ids=str)
def test_masks(dtype):
    mask = random(2, 4, 3, 400) > -0.5
    mask[:, :, 1] = False
    if dtype is not torch.bool:
        mask = random(2, 4, 3, 400).masked_fill(~mask, -torch.inf).to(dtype)
    positions = torch.tensor([[0, 1, 2], [390, 398, 399]])
    check(random(2, 4, 3, 128).bfloat16(), caches(INT8, 2, 1, 400, 128), positions, mask=mask)


@each
def test_blocks(form):
    """More than one round of the second kernel, and one block that takes many units."""
    q, cache = random(1, 4, 1, 64).bfloat16(), caches(form, 1, 1, 3200, 64)
    assert UNIT * MANY <= 3200
    for blocks in (1, 2, 40):
        check(q, cache, torch.tensor([[3123]]), blocks=blocks)


@each
def test_values_of_all_sizes(form):
    k, v, q = random(2, 1, 300, 64), random(2, 1, 300, 65)[..., :64], random(2, 4, 1, 64)
    positions = torch.tensor([[299], [150]])
    for by_q, by_k, by_v in ((1e-2, 1e2, 1e20), (1e3, 1e-3, 1e-20), (1e-10, 1, 1), (1, 1e-20, 1), (0, 1, 1)):
        check((q * by_q).bfloat16(), packed(form, k * by_k, v * by_v), positions)
    check(q.bfloat16(), packed(form, torch.full_like(k, 2), torch.full_like(v, -3)), positions)
    q[0, 1, 0, 5] = torch.nan
    check(q.bfloat16(), packed(form, k, v), positions)


@each
def test_channels_that_stand_out(form):
    k, v, q = random(1, 1, 300, 64), random(1, 1, 300, 65)[..., :64], random(1, 4, 1, 64)
    k[..., ::7] += 20
    k[..., 3] *= 20
    check(q.bfloat16(), packed(form, k, v), torch.tensor([[299]]))
