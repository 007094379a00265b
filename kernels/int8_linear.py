"""int8_linear: y = x @ (q * scale).T + bias, with 8-bit weights and x in its own precision.

x [..., K] float; q [N, K] int8 in [-127, 127]; scale in x's dtype, [N], one for each output channel, or [N, K/g],
one for each group of g (32, 64, 128 or 256) weights along K; bias [N] in x's dtype, or None -> y [..., N] in x's dtype.
Sums are kept at least as precisely as x's own linear keeps them.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu_native, cuda_linear, linear, rounding
from .linear import LinearOp
from .op import Case
from .rounding import GROUP_SIZES

ATEN_TOKENS = 12  # where, on a CPU with AVX-512, dequantizing and a bf16 matrix product overtake ATen's kernel

int8_linear = LinearOp("int8_linear(Tensor x, Tensor q, Tensor scale, Tensor? bias=None) -> Tensor")
int8_linear.fake(int8_linear.like)


@int8_linear.case
def _(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Case:
    N, K = q.shape
    scales = [(N,)] if scale.dim() == 1 else [(N,), *((N, K // g) for g in GROUP_SIZES if K % g == 0)]
    expected = ("q", q, torch.int8, (N, K)), ("scale", scale, x.dtype, *scales), ("bias", bias, x.dtype, (N,))
    case = int8_linear.fit(x, N, K, None, *expected)
    return case if scale.dim() == 1 else replace(case, group_size=K // scale.shape[1])


@int8_linear.packing
def pack(weight: Tensor, algorithm: str = "minmax", group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """weight [N, K] float -> q [N, K] int8 and scale in the weight's dtype, [N], or [N, K/g] for groups of g.

    algorithm: a name in `rounding.ALGORITHMS`. ValueError for any other, for a group size that there is not, and
    where K is not a multiple of it.
    """
    if group_size not in (None, *GROUP_SIZES):
        raise ValueError(f"int8 groups are of {GROUP_SIZES} weights, not {group_size}")
    spec = rounding.Spec(bits=8, group_size=group_size, symmetric=True)
    packed = rounding.algorithm(algorithm)(weight, spec)
    return packed.q, packed.scale.squeeze(1) if group_size is None else packed.scale


@int8_linear.weight
def unpack(q: Tensor, scale: Tensor) -> Tensor:
    """The weight [N, K] that q and scale stand for, in the dtype of scale."""
    if scale.dim() == 1:
        return q * scale[:, None]
    return (q.unflatten(1, (scale.shape[1], -1)) * scale[:, :, None]).flatten(1)


@int8_linear.reference
def _(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, unpack(q, scale), bias)


@int8_linear.implementation("native", supports=linear.native)
def _(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return cpu_native.int8_linear(x, q, scale, bias)


def aten(case: Case) -> bool | str:
    return linear.aten(case, ATEN_TOKENS) if case.group_size is None else "takes one scale for each channel only"


@int8_linear.implementation("aten", supports=aten, standalone=True)
def _(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    y = torch.ops.aten._weight_int8pack_mm(x, q, scale)
    return y if bias is None else y.add_(bias)


@int8_linear.implementation("cuda", supports=lambda case: cuda_linear.supports(case, 8))
def _(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    group_size = None if scale.dim() == 1 else q.shape[1] // scale.shape[1]
    return cuda_linear.linear(x, q, scale, bias, q.shape[0], group_size)


@int8_linear.implementation("triton", supports=linear.triton, standalone=True)
def _(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    from . import triton_linear

    return triton_linear.int8_linear(x, q, scale, bias)


@int8_linear.implementation("dequantize", supports=lambda case: True, standalone=True)
def dequantize(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    if scale.dim() == 1:
        return linear.matmul_by_channel(x, q, scale, bias)
    if linear.slow_half(x):
        return linear.in_fp32(dequantize, x, q, scale, bias)
    return linear.matmul_by_blocks(x, len(q), lambda rows: unpack(q[rows], scale[rows]).T, bias)
