"""int4_linear: y = x @ W.T + bias, with W = (code - 8) * scale + zero in 4-bit codes and x in its own precision.

x [..., K] float -> y [..., N] in x's dtype; `group_size` g (32, 64, 128 or 256) weights along K share a scale and a
zero point; `out_features` is N; bias [N] in x's dtype, or None.

The packed layout, the same for every implementation, is made of panels of 64 output channels, the last one filled
up with zeros; P = ceil(N / 64):
    q          [P, K, 32] uint8: byte [p, k, j] = code[64p + j, k] | code[64p + 32 + j, k] << 4
    scale_zero [K/g, 64P, 2] in x's dtype: (scale, zero), both 0 past N
It is also the layout of ATen's CPU kernel under AVX-512, which reads it without a copy.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu_native, cuda_linear, linear, rounding
from .linear import LinearOp
from .op import Case
from .rounding import GROUP_SIZES

PANEL = 64  # output channels
ATEN_TOKENS = 64  # where, on a CPU with AVX-512, dequantizing and a bf16 matrix product overtake ATen's kernel

int4_linear = LinearOp(
    "int4_linear(Tensor x, Tensor q, Tensor scale_zero, int group_size, int out_features, Tensor? bias=None) -> Tensor",
    usual_group_size=64,
)
int4_linear.fake(int4_linear.like)


@int4_linear.case
def _(x: Tensor, q: Tensor, scale_zero: Tensor, group_size: int, out_features: int, bias: Tensor | None = None) -> Case:
    P, K, N = -(-out_features // PANEL), q.shape[1], out_features
    if group_size not in GROUP_SIZES or K % group_size:
        raise ValueError(f"int4_linear: group_size is {group_size}; expected one of {GROUP_SIZES} that divides K = {K}")
    expected = (
        ("q", q, torch.uint8, (P, K, PANEL // 2)),
        ("scale_zero", scale_zero, x.dtype, (K // group_size, P * PANEL, 2)),
        ("bias", bias, x.dtype, (N,)),
    )
    return int4_linear.fit(x, N, K, group_size, *expected)


@int4_linear.packing
def pack(weight: Tensor, group_size: int = 64, algorithm: str = "minmax") -> tuple[Tensor, Tensor]:
    """weight [N, K] float -> q [P, K, 32] uint8 and scale_zero [K/g, 64P, 2] in the weight's dtype.

    algorithm: a name in `rounding.ALGORITHMS`. ValueError for any other, for a group size that there is not, and
    where K is not a multiple of it.
    """
    N, K = weight.shape
    if group_size not in GROUP_SIZES:
        raise ValueError(f"int4 groups are of {GROUP_SIZES} weights, not {group_size}")
    quantize = rounding.algorithm(algorithm)
    spec = rounding.Spec(bits=4, group_size=group_size, symmetric=False)
    P = -(-N // PANEL)
    q = weight.new_zeros(P, K, PANEL // 2, dtype=torch.uint8)
    scale_zero = weight.new_zeros(K // group_size, P * PANEL, 2)
    for rows in rounding.chunks(weight, PANEL):
        packed = quantize(weight[rows], spec)
        assert packed.zero is not None  # as the spec is asymmetric
        panels = slice(rows.start // PANEL, -(-rows.stop // PANEL))
        missing = panels.stop * PANEL - rows.stop
        codes = F.pad(packed.q, (0, 0, 0, missing)).view(-1, 2, PANEL // 2, K)
        q[panels] = (codes[:, 0] | codes[:, 1] << 4).transpose(1, 2)
        scale_zero[:, rows] = torch.stack([packed.scale, packed.zero], 2).transpose(0, 1)
    return q, scale_zero


@int4_linear.weight
def unpack(q: Tensor, scale_zero: Tensor, group_size: int, out_features: int) -> Tensor:
    """The weight [N, K] that q and scale_zero stand for, in the dtype of scale_zero, each weight rounded once."""
    return _transposed(q, scale_zero, group_size).T[:out_features].contiguous()


def _transposed(q: Tensor, scale_zero: Tensor, group_size: int) -> Tensor:
    """W.T [K, 64P] of the panels q [P, K, 32] with their scale_zero [K/g, 64P, 2]."""
    P, K, _ = q.shape
    q = q.transpose(0, 1)
    codes = torch.stack([q & 15, q >> 4], dim=2).view(torch.int8).sub_(8)
    codes = codes.view(K // group_size, group_size, P * PANEL).to(scale_zero.dtype)
    scale, zero = scale_zero.unsqueeze(1).movedim(3, 0).contiguous()
    return torch.addcmul(zero, codes, scale).view(K, P * PANEL)


@int4_linear.reference
def _(x, q, scale_zero, group_size, out_features, bias=None):
    return F.linear(x, unpack(q, scale_zero, group_size, out_features), bias)


@int4_linear.implementation("native", supports=linear.native)
def _(x, q, scale_zero, group_size, out_features, bias=None):
    return cpu_native.int4_linear(x, q, scale_zero, group_size, out_features, bias)


def aten(case: Case) -> bool | str:
    if case.device == "cpu" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "ATen reads this layout under AVX-512 only"
    return linear.aten(case, ATEN_TOKENS)


@int4_linear.implementation("aten", supports=aten)  # not standalone: Inductor gives it a constant of its own
def _(x, q, scale_zero, group_size, out_features, bias=None):
    P, K, _ = q.shape
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, q.view(P * PANEL, K // 2), group_size, scale_zero)
    y = y[:, :out_features]
    return y.contiguous() if bias is None else y + bias


@int4_linear.implementation("cuda", supports=lambda case: cuda_linear.supports(case, 4))
def _(x, q, scale_zero, group_size, out_features, bias=None):
    return cuda_linear.linear(x, q, scale_zero, bias, out_features, group_size)


@int4_linear.implementation("triton", supports=linear.triton, standalone=True)
def _(x, q, scale_zero, group_size, out_features, bias=None):
    from . import triton_linear

    return triton_linear.int4_linear(x, q, scale_zero, group_size, out_features, bias)


@int4_linear.implementation("dequantize", supports=lambda case: True, standalone=True)
def dequantize(x, q, scale_zero, group_size, out_features, bias=None):
    if linear.slow_half(x):
        return linear.in_fp32(dequantize, x, q, scale_zero, group_size, out_features, bias)
    transposed = _transposed
    if x.is_cuda and linear.TRITON and x.dtype is not torch.float64:
        from .triton_linear import int4_transposed as transposed

    def weight(rows: slice) -> Tensor:
        panels = slice(rows.start // PANEL, -(-rows.stop // PANEL))
        padded = slice(panels.start * PANEL, panels.stop * PANEL)
        return transposed(q[panels], scale_zero[:, padded], group_size)[:, : rows.stop - rows.start]

    return linear.matmul_by_blocks(x, out_features, weight, bias, PANEL)
