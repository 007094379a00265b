"""Measures which plan of `scaled_linear.cu` is fastest for a shape, and whether what stands against it is faster.

As tuning.py does: every candidate is checked, then timed in a CUDA graph whose calls read other copies of the weight.
The products alone are timed, of quantized activations. Against them stand cuBLASLt for float8; the plain linear for
sparse half precision; for other sparse weights the dense product of the same codes.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cuda_scaled_linear, sparse24
from .cuda_linear import SHARED
from .cuda_scaled_linear import TOKENS, ScaledPlan
from .tuning import cold, time_calls

MEASURED = (1, 16, 32, 64, 128, 256, 512, 1024, 2048)  # tokens, for each of TOKENS
TOLERANCE = 1e-2  # of the error in the norm, in bf16
STAGES = 8  # at most
Each = Callable[[int, float, float, ScaledPlan | None], Any]


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
    """What may be fastest for M up to `tokens`, for some shape; each with as many stages as there is room for."""
    for channels, warps, boxes in product((64, 128, 256), (4, 8), (1, 2)):
        if channels // warps // 16 not in (1, 2):
            continue
        for width in {min(tokens, 256), min(tokens, 128)}:
            if channels * width > 4096 * warps or (tokens >= 256 and channels < 128):
                continue
            clusters = ((1, 1), (1, 2)) if tokens >= 256 else ((1, 1), (2, 1), (4, 1), (8, 1))
            for share, neighbours in clusters:
                for stages in range(STAGES, 2, -1):
                    plan = ScaledPlan(share, neighbours, stages, boxes, channels, width, warps)
                    if plan.shared(codes.itemsize, sparse) <= SHARED and not (sparse and stages % 2):
                        yield plan
                        break


def worthwhile(plan: ScaledPlan, N: int, K: int, M: int, itemsize: int) -> bool:
    """Whether the plan gives each multiprocessor something to do, and no block next to nothing."""
    blocks = -(-N // plan.channels) * -(-M // plan.tokens) * plan.share
    multiprocessors = torch.cuda.get_device_properties("cuda").multi_processor_count
    many = plan.share == 1 or blocks <= 4 * multiprocessors
    return many and blocks >= multiprocessors // 3 and K // plan.step(itemsize) // plan.share >= 4


def rival(codes: torch.dtype, sparse: bool, made: Codes) -> Callable[..., Tensor] | None:
    """What else multiplies, as a function of the packed parts q, indices and scale; None where that is far slower."""
    x, x_scale = made.x, made.x_scale
    if codes is torch.float8_e4m3fn and not sparse:
        scaled_mm = partial(torch._scaled_mm, out_dtype=torch.bfloat16, use_fast_accum=True)
        return lambda q, indices, scale: scaled_mm(x, q.T, x_scale, scale[None])
    return (lambda q, indices, scale: F.linear(x, q)) if codes.itemsize == 2 else None


def fastest(
    codes: torch.dtype, sparse: bool, N: int, K: int, tokens: Sequence[int | None] = MEASURED, each: Each = print
) -> list[ScaledPlan | None]:
    """The plan for each of TOKENS, measured at `tokens` (None: not); None where something else is faster.

    each: told (M, µs, error, plan) of all that is measured, of what stands against the kernel (None) too.

    Raises:
        RuntimeError: a kernel is wrong, or does not compile or run; the message names the plan where it is wrong.
    """
    chosen: list[ScaledPlan | None] = []
    for M, most in zip(tokens, TOKENS, strict=True):
        if M is None:
            chosen.append(None)
            continue
        made = draw(codes, sparse, M, N, K)
        y = expected(made)
        fitting = [plan for plan in candidates(codes, sparse, most) if plan.fits(N, K, codes.itemsize, sparse)]
        tried = [plan for plan in fitting if worthwhile(plan, N, K, M, codes.itemsize)]
        compile_all(tried, codes, sparse, made)
        found = enumerate(measured(codes, sparse, made, y, tried, each))
        times = [(microseconds, i, plan) for i, (microseconds, plan) in found]
        chosen.append(min(times)[2])
    return chosen


def measured(
    codes: torch.dtype, sparse: bool, made: Codes, y: Tensor, tried: Sequence[ScaledPlan], each: Each
) -> Iterator[tuple[float, ScaledPlan | None]]:
    """Microseconds of each plan, and of what stands against them."""
    x, x_scale, *packed, weight = made

    def call(plan: ScaledPlan, q: Tensor, indices: Tensor | None, scale: Tensor | None) -> Tensor:
        return cuda_scaled_linear.run(plan, x, x_scale, None, q, indices, scale, None, None, torch.bfloat16)

    ways: list[tuple[ScaledPlan | None, Callable, list]] = [(plan, partial(call, plan), packed) for plan in tried]
    other = rival(codes, sparse, made)
    if sparse and codes.itemsize == 1:
        dense = cuda_scaled_linear.plan(codes, False, len(x), *weight.shape)
        if isinstance(dense, ScaledPlan):
            ways.append((None, partial(call, dense), [weight, None, made.scale]))
    elif other is not None:
        ways.append((None, other, [weight, None, made.scale]))
    rounds: dict[int, list[list]] = {}
    for plan, way, parts in ways:
        out = way(*parts)
        error = ((out.float() - y).norm() / y.norm()).item()
        if plan and not error < TOLERANCE:
            raise RuntimeError(
                f"{plan} is wrong by {error:.1e} for x {list(x.shape)} and a weight {list(weight.shape)}"
            )
        if id(parts[0]) not in rounds:
            more = cold([part for part in parts if part is not None]) - 1
            copies = [[None if part is None else part.clone() for part in parts] for _ in range(more)]
            rounds = {id(parts[0]): [parts, *copies]}
        microseconds = time_calls([partial(way, *copy) for copy in rounds[id(parts[0])]])
        each(len(x), microseconds, error, plan)
        yield microseconds, plan


def compile_all(tried: Sequence[ScaledPlan], codes: torch.dtype, sparse: bool, made: Codes) -> None:
    """Fills the cache of compiled kernels, on all cores."""
    scales = torch.float32 if made.scale is None else made.scale.dtype
    with ThreadPoolExecutor() as pool:
        compiled = [
            pool.submit(cuda_scaled_linear.kernel, plan, codes, sparse, scales, torch.bfloat16, made.x.device)
            for plan in tried
        ]
        for each in compiled:
            each.result()
