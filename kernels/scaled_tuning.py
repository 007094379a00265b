"""Measures which plan of `scaled_linear.cu` is fastest for a shape, by the means of tuning.py.

The products alone are timed, of quantized activations. Against them stand cuBLASLt for float8; the plain linear for
sparse half precision; for other sparse weights the dense product of the same codes. A linear whose weight is sparse
cannot take a dense product at run time, nor can an activation function be part of another's: there is a plan all the
same, which then says that it is behind.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cuda_scaled_linear, sparse24
from .cuda_linear import SHARED
from .cuda_scaled_linear import TOKENS, ScaledPlan
from .float8_scaled_linear import float8_scaled_linear
from .op import need
from .tuning import Way, cold, compile_all, least, times

MEASURED = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 16384)  # tokens, for each of TOKENS
STAGES = 8  # at most
HALF = torch.bfloat16  # what y is of


class Codes(NamedTuple):
    """A product of random codes: x [M, K], the weight as its packed parts, and the weight [N, K] as it is."""

    x: Tensor
    x_scale: Tensor | None
    q: Tensor
    indices: Tensor | None
    scale: Tensor | None
    weight: Tensor


def draw(codes: torch.dtype, sparse: bool, M: int, N: int, K: int, device: str = "cuda") -> Codes:
    """Normal numbers, as they are after quantization: the largest of some thousand is the largest code."""
    spread = {torch.int8: 32.0, torch.float8_e4m3fn: 112.0}.get(codes, 1.0)
    x, weight = (torch.randn(rows, K, device=device).mul_(spread) for rows in (M, N))
    if codes.itemsize == 1:
        largest = 127 if codes is torch.int8 else torch.finfo(codes).max
        x, weight = (each.clamp_(-largest, largest) for each in (x, weight))
    if codes is torch.int8:
        x, weight = x.round_(), weight.round_()
    x, weight = x.to(codes), weight.to(codes)
    scaled = codes.itemsize == 1
    wide = torch.float32 if codes is torch.float8_e4m3fn else torch.bfloat16
    x_scale = torch.rand(M, 1, device=device) + 0.5 if scaled else None
    scale = (torch.rand(N, device=device) + 0.5).to(wide) if scaled else None
    if not sparse:
        return Codes(x, x_scale, weight, None, scale, weight)
    keep = torch.arange(4, device=device) < 2
    weight = torch.where(keep.repeat(K // 4), weight.float(), 0).to(codes)
    return Codes(x, x_scale, *sparse24.compress(weight), scale, weight)


def expected(made: Codes) -> Tensor:
    """y [M, N] in fp32."""
    y = made.x.float() @ made.weight.float().T
    return y if made.scale is None else y * made.x_scale * made.scale.float()


def candidates(codes: torch.dtype, sparse: bool, tokens: int) -> Iterator[ScaledPlan]:
    """What may be fastest for M up to `tokens`, for some shape; each with as many stages as there is room for, and with
    as many as leave room for all of y."""
    for channels, warps, boxes in product((64, 128, 256), (4, 8), (1, 2)):
        if channels // warps // 16 not in (1, 2):
            continue
        for width in {min(tokens, 256), min(tokens, 128)}:
            if channels * width > 4096 * warps or (tokens >= 256 and channels < 128):
                continue
            clusters = ((1, 1), (1, 2), (1, 4)) if tokens >= 256 else ((1, 1), (2, 1), (4, 1), (8, 1))
            for share, neighbours in clusters:
                sizes = [
                    ScaledPlan(share, neighbours, stages, boxes, channels, width, warps)
                    for stages in range(STAGES, 2, -1)
                    if not (sparse and stages % 2)
                ]
                fitting = [plan for plan in sizes if plan.shared(codes.itemsize, sparse) <= SHARED]
                whole = [plan for plan in fitting if share == 1 and plan.away(codes.itemsize, sparse) == width]
                yield from dict.fromkeys(fitting[:1] + whole[:1])


def worthwhile(plan: ScaledPlan, N: int, K: int, M: int, itemsize: int) -> bool:
    """Whether the plan gives each multiprocessor something to do, and no block next to nothing."""
    blocks = -(-N // plan.channels) * -(-M // plan.tokens) * plan.share
    multiprocessors = torch.cuda.get_device_properties("cuda").multi_processor_count
    many = plan.share == 1 or blocks <= 4 * multiprocessors
    return many and blocks >= multiprocessors // 3 and K // plan.step(itemsize) // plan.share >= 4


def takes(codes: torch.dtype, sparse: bool, N: int, K: int, group_size: int | None = None) -> bool | str:
    """True where the kernel takes a weight [N, K] of such codes, else why not. group_size: codes that share a scale."""
    return need((group_size is None, "there are no scales of blocks"), *cuda_scaled_linear.sizes(codes, sparse, N, K))


def fastest(
    codes: torch.dtype,
    sparse: bool,
    N: int,
    K: int,
    tokens: Sequence[int | None] = MEASURED,
    each: Callable = print,
    device: str = "cuda",
) -> list[ScaledPlan | None]:
    """The plan for each of TOKENS, measured at `tokens` (None: not).

    each: as for `tuning.times`. device: where the tensors are.

    Raises:
        RuntimeError: a kernel is wrong, or does not compile or run; the message names the plan where it is wrong.
    """
    chosen: list[ScaledPlan | None] = []
    for M, most in zip(tokens, TOKENS, strict=True):
        if M is None:
            chosen.append(None)
            continue
        made = draw(codes, sparse, M, N, K, device)
        fitting = [plan for plan in candidates(codes, sparse, most) if plan.fits(N, K, codes.itemsize, sparse)]
        tried = [plan for plan in fitting if worthwhile(plan, N, K, M, codes.itemsize)] or fitting
        scales = torch.float32 if made.scale is None else made.scale.dtype
        compile_all(("scaled_linear.cu", "scaled_linear", plan.defines(codes, sparse, scales, HALF)) for plan in tried)
        copies = cold([made.q, made.indices, made.scale])
        ways = [Way(plan, partial(multiply, plan, made), copies) for plan in tried]
        if (other := rival(codes, sparse, made)) is not None:
            ways.insert(0, Way(None, other, cold([made.weight, None, made.scale])))
        found = times(ways, made.x, expected(made), each)
        best = least(found)
        if best is None:
            best = replace(least([(us, plan) for us, plan in found if plan]), behind=True)
        chosen.append(best)
    return chosen


def multiply(
    plan: ScaledPlan, made: Codes, q: Tensor, indices: Tensor | None, scale: Tensor | None, dependent: bool = True
) -> Tensor:
    """y by a plan, of x and a copy of the packed weight."""
    x, x_scale = made.x, made.x_scale
    return cuda_scaled_linear.run(plan, x, x_scale, None, q, indices, scale, None, None, HALF, dependent=dependent)


def rival(codes: torch.dtype, sparse: bool, made: Codes) -> Callable[..., Tensor] | None:
    """What else multiplies, of a copy of the weight as it is, no indices, and scales; None where that is far slower."""
    x, x_scale, weight, scale = made.x, made.x_scale, made.weight, made.scale
    if codes.itemsize == 2:
        return lambda weight, *_: F.linear(x, weight)
    dense = cuda_scaled_linear.plan(codes, False, len(x), *weight.shape) if sparse else None
    if isinstance(dense, ScaledPlan):
        return partial(multiply, dense, made)
    if codes is not torch.float8_e4m3fn:
        return None
    case, cublaslt = (
        float8_scaled_linear.case_of(x, x_scale, weight, scale, None, HALF),
        float8_scaled_linear["cublaslt"],
    )
    if cublaslt.supports(case) is not True:
        return None
    return lambda weight, _, scale: cublaslt.function(x, x_scale, weight, scale, None, HALF)
