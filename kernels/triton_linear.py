"""Linear layers on packed weights for CUDA, in Triton: few tokens, where reading the weight is what costs.

Each program computes a tile of y.T = W @ x.T. The weight is the left operand, so that its codes, exact in x's
dtype, go to the tensor cores from registers, and few tokens waste little of a tile. Sums are fp32; scales enter
there. Where the tiles alone would leave multiprocessors idle, K is split: each part goes to a workspace
[parts, M, N] in fp32, and a second kernel adds the parts in their order. There are no atomics: two runs give the
same bits. Nothing is tuned at run time.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .op import capability

PANEL = 64  # output channels of a panel of int4_linear's layout

# Tiles by M: the first row whose M is not exceeded. m: tokens, n: output channels, k: step along K.
#              M    m   n   k  warps stages
INT8_TILES = (16, 16, 64, 128, 4, 4), (32, 32, 64, 128, 4, 4), (1 << 30, 64, 64, 128, 4, 3)
INT4_TILES = (16, 16, 64, 128, 4, 4), (32, 32, 128, 64, 4, 4), (1 << 30, 64, 128, 64, 8, 3)


@triton.jit
def store_tile(acc, bias, y, part, m, n, M, N, PARTS: tl.constexpr):
    """Write acc [n, m] fp32 to y [M, N], with its bias, or to its part of y [PARTS, M, N] without."""
    here = (n < N)[:, None] & (m < M)[None, :]
    if PARTS == 1 and bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[:, None]
    row = (part * M + m).to(tl.int64) * N
    tl.store(y + row[None, :] + n[:, None], acc.to(y.dtype.element_ty), mask=here)


@triton.jit
def float8_bits(bits, dtype: tl.constexpr):
    """The values of e4m3 codes, loaded as int8, in bf16 or fp16: exponent and mantissa are moved to where dtype has
    them, and a product makes up for its other bias."""
    shift: tl.constexpr = 7 if dtype == tl.float16 else 4
    bias: tl.constexpr = 2.0**8 if dtype == tl.float16 else 2.0**120
    wide = bits.to(tl.int16)  # the sign is where it belongs
    moved = (wide & -0x8000) | ((wide & 0x7F) << shift)
    return (moved.to(dtype, bitcast=True) * bias).to(dtype)


@triton.jit
def int8_kernel(
    x, q, scale, bias, y, M, N, K, k_per_part,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
    FLOAT8_BITS: tl.constexpr,
):  # fmt: skip
    """x [M, K], q [N, K] int8 or e4m3, scale [N] (GROUP 0) or [N, K/GROUP], bias [N] or None -> y.

    BK divides GROUP, and GROUP K; grid (N / BN, M / BM, PARTS). FLOAT8_BITS: q is e4m3, given as int8.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    q_rows = q + n.to(tl.int64)[:, None] * K
    x_rows = x + m.to(tl.int64)[None, :] * K
    acc = tl.zeros([BN, BM], tl.float32)
    for start in range(part * k_per_part, min((part + 1) * k_per_part, K), BK):
        k = start + tl.arange(0, BK)
        w = tl.load(q_rows + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
        a = tl.load(x_rows + k[:, None], mask=(m < M)[None, :] & (k < K)[:, None], other=0)
        codes = float8_bits(w, a.dtype) if FLOAT8_BITS else w.to(a.dtype)
        if GROUP == 0:
            acc = tl.dot(codes, a, acc)
        else:
            of_group = tl.load(scale + n.to(tl.int64) * (K // GROUP) + start // GROUP, mask=n < N, other=0)
            acc += tl.dot(codes, a) * of_group.to(tl.float32)[:, None]
    if GROUP == 0:
        acc *= tl.load(scale + n, mask=n < N, other=0).to(tl.float32)[:, None]
    store_tile(acc, bias, y, part, m, n, M, N, PARTS)


@triton.jit
def scale_and_zero(scale_zero, n, here):
    """The pairs of the channels n of one group, as two fp32 columns [n, 1]."""
    scale = tl.load(scale_zero + 2 * n, mask=here, other=0).to(tl.float32)
    zero = tl.load(scale_zero + 2 * n + 1, mask=here, other=0).to(tl.float32)
    return scale[:, None], zero[:, None]


@triton.jit
def int4_kernel(
    x, q, scale_zero, bias, y, M, N, K, k_per_part,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """x [M, K], q [P, K, 32] uint8, scale_zero [K/GROUP, 64P, 2], bias [N] or None -> y.

    BK divides GROUP; grid (64P / BN, M / BM, PARTS). A byte holds channels j and j + 32 of a panel: a tile of bytes
    is two tiles of codes. The zero points meet the sum over x of their group, once, instead of every weight.
    """
    j = tl.arange(0, BN // 2)
    panel = tl.program_id(0) * (BN // 64) + j // 32
    low = panel * 64 + j % 32
    high = low + 32
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    padded = (N + 63) // 64 * 64
    here = low < padded
    q_rows = q + (panel.to(tl.int64) * K * 32 + j % 32)[:, None]
    x_rows = x + m.to(tl.int64)[None, :] * K
    acc_low = tl.zeros([BN // 2, BM], tl.float32)
    acc_high = tl.zeros([BN // 2, BM], tl.float32)
    for start in range(part * k_per_part, min((part + 1) * k_per_part, K), BK):
        k = start + tl.arange(0, BK)
        codes = tl.load(q_rows + k[None, :] * 32, mask=here[:, None], other=0)
        a = tl.load(x_rows + k[:, None], mask=(m < M)[None, :], other=0)
        total = tl.sum(a.to(tl.float32), axis=0)[None, :]
        pairs = scale_zero + (start // GROUP) * (padded * 2)
        scale, zero = scale_and_zero(pairs, low, here)
        acc_low += tl.dot(((codes & 15).to(tl.int8) - 8).to(a.dtype), a) * scale + total * zero
        scale, zero = scale_and_zero(pairs, high, here)
        acc_high += tl.dot(((codes >> 4).to(tl.int8) - 8).to(a.dtype), a) * scale + total * zero
    store_tile(acc_low, bias, y, part, m, low, M, N, PARTS)
    store_tile(acc_high, bias, y, part, m, high, M, N, PARTS)


@triton.jit
def add_parts_kernel(parts, bias, y, N, total, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """y [M, N] = the parts [PARTS, M, N] added in order, and bias [N] or None; total = M · N; grid total / BLOCK."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = i < total
    acc = tl.zeros([BLOCK], tl.float32)
    at = parts + i
    for _ in tl.static_range(PARTS):
        acc += tl.load(at, mask=here, other=0)
        at += total
    if bias is not None:
        acc += tl.load(bias + i % N, mask=here, other=0).to(tl.float32)
    tl.store(y + i, acc.to(y.dtype.element_ty), mask=here)


@triton.jit
def int4_transposed_kernel(q, scale_zero, w, K, sz_stride, GROUP: tl.constexpr, BK: tl.constexpr):
    """q [P, K, 32], scale_zero [K/GROUP, ≥ 64P, 2] -> w [K, 64P]; BK divides GROUP; grid (K / BK, P)."""
    start, panel, panels = tl.program_id(0) * BK, tl.program_id(1), tl.num_programs(1)
    k = (start + tl.arange(0, BK)).to(tl.int64)[:, None]
    j = tl.arange(0, 32)
    codes = tl.load(q + (panel.to(tl.int64) * K + k) * 32 + j[None, :])
    pairs = scale_zero + (start // GROUP) * sz_stride
    for half in tl.static_range(2):
        n = panel * 64 + half * 32 + j
        scale = tl.load(pairs + 2 * n).to(tl.float32)[None, :]
        zero = tl.load(pairs + 2 * n + 1).to(tl.float32)[None, :]
        code = ((codes >> (4 * half)) & 15).to(tl.float32) - 8
        tl.store(w + k * (panels * 64) + n[None, :], (code * scale + zero).to(w.dtype.element_ty))


def int8_linear(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, K] bf16 or fp16, contiguous, M ≥ 1; the weight as `int8_linear` packs it -> y [M, N] in x's dtype."""
    group_size = 0 if scale.dim() == 1 else q.shape[1] // scale.shape[1]
    return _linear(int8_kernel, INT8_TILES, x, q, scale, bias, q.shape[0], group_size, FLOAT8_BITS=False)


def float8_linear(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, K] bf16 or fp16, contiguous, M ≥ 1; the weight as `float8_linear` packs it -> y [M, N] in x's dtype.

    GPUs below compute capability 8.9 do not convert e4m3: there the kernel does it by arithmetic on the bits.
    """
    by_bits = (capability(x.device) or (8, 0)) < (8, 9)
    codes = q.view(torch.int8) if by_bits else q
    return _linear(int8_kernel, INT8_TILES, x, codes, scale, bias, q.shape[0], 0, FLOAT8_BITS=by_bits)


def int4_linear(
    x: Tensor, q: Tensor, scale_zero: Tensor, group_size: int, out_features: int, bias: Tensor | None
) -> Tensor:
    """x [M, K] bf16 or fp16, contiguous, M ≥ 1; the weight as `int4_linear` packs it -> y [M, N] in x's dtype."""
    return _linear(int4_kernel, INT4_TILES, x, q, scale_zero, bias, out_features, group_size)


def int4_transposed(q: Tensor, scale_zero: Tensor, group_size: int) -> Tensor:
    """q [P, K, 32] uint8, scale_zero [K/g, 64P, 2] with its last two dimensions dense -> W.T [K, 64P]."""
    P, K, _ = q.shape
    w = scale_zero.new_empty(K, P * PANEL)
    with torch.cuda.device_of(q):
        launch(int4_transposed_kernel)[K // 32, P](q, scale_zero, w, K, scale_zero.stride(0), GROUP=group_size, BK=32)
    return w


def launch(kernel):
    """The kernel, to be launched; while a graph is exported, what makes the launch a part of the graph."""
    return torch.library.wrap_triton(kernel) if torch.compiler.is_exporting() else kernel


def largest(size: int | torch.SymInt) -> int:
    """The size itself, or the upper bound of a dynamic one: choices by it hold for all that it can be."""
    return size if isinstance(size, int) else int(size.node.shape_env.bound_sympy(size.node.expr).upper)


def _linear(
    kernel, tiles, x: Tensor, q: Tensor, scales: Tensor, bias: Tensor | None, N: int, group_size: int, **constants: bool
) -> Tensor:
    """group_size: 0 for one scale for each channel. constants: more of the kernel's."""
    M, K = x.shape
    most = largest(M)
    _, BM, BN, BK, warps, stages = next(tile for tile in tiles if tile[0] >= most)
    BK = min(BK, group_size or BK)
    grid = triton.cdiv(N, BN), triton.cdiv(M, BM)
    parts = _parts(grid[0] * triton.cdiv(most, BM), triton.cdiv(K, BK), _multiprocessors(x.device))
    k_per_part = triton.cdiv(triton.cdiv(K, BK), parts) * BK
    y = x.new_empty(M, N)
    into = y if parts == 1 else x.new_empty(parts, M, N, dtype=torch.float32)
    with torch.cuda.device_of(x):
        launch(kernel)[*grid, parts](
            x, q, scales, bias, into, M, N, K, k_per_part,
            GROUP=group_size, BM=BM, BN=BN, BK=BK, PARTS=parts, **constants, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if parts > 1:
            launch(add_parts_kernel)[triton.cdiv(M * N, 512),](into, bias, y, N, M * N, PARTS=parts, BLOCK=512)
    return y


def _parts(tiles: int, steps: int, multiprocessors: int) -> int:
    """Into how many parts to split K: a power of two, two tiles for each multiprocessor, four steps for each part."""
    parts = 1
    while parts < 16 and 2 * parts * tiles <= 2 * multiprocessors and 2 * parts * 4 <= steps:
        parts *= 2
    return parts


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
