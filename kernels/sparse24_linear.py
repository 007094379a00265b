"""sparse24_linear: y = x @ W.T + bias, where of each 4 consecutive weights along K two at most are not zero.

x [..., K] float; values [N, K/2] in x's dtype and indices [N, ceil(K/8)] uint8, in the format of `sparse24.py`;
bias [N] in x's dtype, or None -> y [..., N] in x's dtype. Sparse tensor cores do half the operations of a dense
product. NaN and inf in x reach the outputs whose weights at that input were kept; others of their row, they may.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cuda_scaled_linear, cusparselt, linear, sparse24
from .cuda_scaled_linear import ScaledPlan
from .cusparselt import FROM_TOKENS
from .linear import LinearOp
from .op import Case, Op
from .scaled_linear import ScaledLinearOp
from .sparse24 import decompress

sparse24_linear = LinearOp("sparse24_linear(Tensor x, Tensor values, Tensor indices, Tensor? bias=None) -> Tensor")
sparse24_linear.fake(sparse24_linear.like)
sparse24_linear.weight(decompress)


@sparse24_linear.case
def _(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None = None) -> Case:
    N, K = values.shape[0], 2 * values.shape[1]
    expected = (
        ("values", values, x.dtype, (N, K // 2)),
        ("indices", indices, torch.uint8, (N, -(-K // 8))),
        ("bias", bias, x.dtype, (N,)),
    )
    return sparse24_linear.fit(x, N, K, None, *expected)


@sparse24_linear.packing
def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K] float, 2:4 -> values [N, K/2] and indices [N, ceil(K/8)]. ValueError for one that is not 2:4."""
    return sparse24.compress(weight)


@sparse24_linear.preparation
def _(values: Tensor, indices: Tensor) -> None:
    cusparselt.prepare(sparse24_linear, values, indices)


@partial(sparse24_linear.reference, standalone=False)  # slower than the dense product, as is "dequantize"
def _(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, decompress(values, indices), bias)


@sparse24_linear.implementation(
    "cuda", supports=lambda case: cuda_scaled_linear.supports(case, case.dtype, sparse=True)
)
def _(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None = None) -> Tensor:
    return cuda_scaled_linear.linear(x, values, None, bias, x.dtype, indices=indices)


@sparse24_linear.implementation("cusparselt", supports=lambda case: cusparselt.supports(case, case.dtype))
def _(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None = None) -> Tensor:
    return cusparselt.product(x, values, indices, bias)


@sparse24_linear.implementation("dequantize", supports=lambda case: True)
def dequantize(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None = None) -> Tensor:
    if linear.slow_half(x):
        return linear.in_fp32(dequantize, x, values, indices, bias)
    return linear.matmul_by_blocks(x, values.shape[0], lambda rows: decompress(values[rows], indices[rows]).T, bias)


def pays(case: Case, op: Op = sparse24_linear) -> bool | str:
    """Whether a sparse product by one of the ops on 2:4 weights is faster than a dense one for M tokens, or why not."""
    sparse = [each for each in op if each.name not in ("dequantize", "reference")]
    answers = [each.supports(case) for each in sparse]
    if True not in answers:
        return answers[-1]
    if op["cuda"].supports(case) is True:
        codes = op.takes[0] if isinstance(op, ScaledLinearOp) else case.dtype
        plan = cuda_scaled_linear.plan(codes, True, case.M or 1, case.N, case.K)
        return not (isinstance(plan, ScaledPlan) and plan.behind) or f"slower than dense at M = {case.M}"
    return (case.M or 0) >= FROM_TOKENS or f"slower than dense below M = {FROM_TOKENS}"
