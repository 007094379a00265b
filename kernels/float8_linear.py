"""float8_linear: y = x @ (q * scale).T + bias, with 8-bit floating-point weights and x in its own precision.

x [..., K] float; q [N, K] float8_e4m3fn (4 bits of exponent, 3 of mantissa, ±448, no infinity); scale [N] in x's dtype,
one for each output channel; bias [N] in x's dtype, or None -> y [..., N] in x's dtype. Sums are kept at least as
precisely as x's own linear keeps them.
"""

import torch.nn.functional as F
from torch import Tensor

from . import float8, linear
from .float8 import FLOAT8
from .linear import LinearOp
from .op import Case

float8_linear = LinearOp("float8_linear(Tensor x, Tensor q, Tensor scale, Tensor? bias=None) -> Tensor")
float8_linear.fake(float8_linear.like)


@float8_linear.case
def _(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Case:
    N, K = q.shape
    expected = ("q", q, FLOAT8, (N, K)), ("scale", scale, x.dtype, (N,)), ("bias", bias, x.dtype, (N,))
    return float8_linear.fit(x, N, K, None, *expected)


@float8_linear.packing
def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K] float -> q [N, K] float8_e4m3fn and scale [N] in the weight's dtype; no channel is clipped."""
    q, scale = float8.pack(weight, (1, weight.shape[1]), weight.dtype)
    return q, scale.squeeze(1)


@float8_linear.weight
def unpack(q: Tensor, scale: Tensor) -> Tensor:
    """The weight [N, K] that q and scale stand for, in the dtype of scale."""
    return float8.widen(q, scale.dtype) * scale[:, None]


@float8_linear.reference
def _(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, unpack(q, scale), bias)


@float8_linear.implementation("triton", supports=linear.triton, standalone=True)
def _(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    from . import triton_linear

    return triton_linear.float8_linear(x, q, scale, bias)


@float8_linear.implementation("dequantize", supports=lambda case: True, standalone=True)
def _(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear.matmul_by_channel(x, q, scale, bias)
