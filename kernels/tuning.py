"""Measures which plan of the CUDA kernels, or dequantizing, is fastest for a shape: what `aograph tune` does.

Every candidate is first checked against a product with the dequantized weight, then timed in a CUDA graph that reads
another copy of the weight with each call, so that none is in the L2. Its time is the mean of two: of calls that may
start before the one ahead has ended, as behind another of our kernels, and of calls that may not, as behind any other
kernel. The least wins; a kernel that is wrong is an error, not a slow one. The GPU is torch's current one.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import cuda, cuda_linear, int4_linear, int8_linear
from .cuda_linear import CAPABILITIES, STEP, TOKENS, Plan
from .op import OPS, capability, need

MEASURED = (1, 4, 16, 32, 64, 128, 256, 512, 2048)  # tokens, for each of TOKENS
TOLERANCE = 1e-2  # of the error in the norm, in bf16


def available(device: torch.device) -> bool | str:
    """True where plans can be measured, else why not."""
    count = torch.cuda.device_count()
    here = need(
        (device.type == "cuda", "the kernels run on CUDA only"),
        (torch.cuda.is_available(), "torch sees no CUDA GPU here"),
        ((device.index or 0) < count, f"torch sees {count} CUDA GPUs here, counted from 0"),
    )
    if here is not True:
        return here
    found = capability(device)
    return cuda.available(found) if found in CAPABILITIES else "the kernels are written for compute capability 9.0"


def takes(bits: int, N: int, K: int, group_size: int | None) -> bool | str:
    """True where the kernels take a weight [N, K] of so many bits, else why not. group_size: None for int8."""
    return need(
        *cuda_linear.sizes(N, K),
        (bits == 8 or K % (group_size or 1) == 0, f"K is not a multiple of the group size {group_size}"),
    )


def candidates(bits: int, tokens: int) -> Iterator[Plan]:
    """What may be fastest for M up to `tokens`, for some shape."""
    if tokens <= 16:
        channels = (64, 128) if bits == 4 else (16, 32, 64)
        for warps, stages, wide, blocks in product((4, 8), (2, 3), channels, (1, 2, 4, 8)):
            yield Plan("small", blocks, stages, wide, tokens, warps)
    if tokens >= 16:
        shapes = (64, 4), (128, 4), (128, 8), (192, 12), (256, 8), (256, 16)  # channels, warps
        for width, (wide, warps), stages, blocks, batch in product((128, 256), shapes, (4, 6), (1, 2, 4, 8), (1, 2)):
            width = min(width, tokens if width == 256 else tokens // 2)
            if width >= 16 and wide * width <= (4096 if warps <= 8 else 2048) * warps:  # registers
                yield Plan("wide", blocks, stages, wide, width, warps, batch)


def fastest(
    bits: int,
    N: int,
    K: int,
    group_size: int | None,
    tokens: Sequence[int] = MEASURED,
    each: Callable = print,
    device: str = "cuda",
) -> list[Plan | None]:
    """The plan for each of TOKENS, measured at `tokens`; None where dequantizing is faster.

    each: told (M, µs, error, plan) of all that is measured, of dequantizing (None) too. device: where the tensors are.

    Raises:
        RuntimeError: a kernel is wrong, or does not compile or run; the message names the plan where it is wrong.
    """
    weight = torch.randn(N, K, device=device, dtype=torch.bfloat16) / K**0.5
    if bits == 4:
        op, packed = int4_linear.int4_linear, int4_linear.pack(weight, group_size)
        dense, layout = int4_linear.unpack(*packed, group_size, N), (group_size, N)
    else:
        op, packed = int8_linear.int8_linear, int8_linear.pack(weight)
        dense, layout = int8_linear.unpack(*packed), ()
    del weight
    copies = [packed, *(tuple(part.clone() for part in packed) for _ in range(cold(packed) - 1))]
    chosen: list[Plan | None] = []
    for M, most in zip(tokens, TOKENS, strict=True):
        x = torch.randn(M, K, device=device, dtype=torch.bfloat16)
        expected = (x @ dense.T).float()
        ways: list[tuple[Plan | None, Callable]] = [
            (None, lambda q, s, x=x, **_: op.run(x, q, s, *layout, None, implementation="dequantize"))
        ]
        plans = [
            plan for plan in candidates(bits, most) if plan.fits(N, K, bits, group_size) and worthwhile(plan, N, K, M)
        ]
        compile_all(plans, bits, group_size)
        for plan in plans:
            run = partial(cuda_linear.run, plan)
            ways.append((plan, lambda q, s, x=x, run=run, **how: run(x, q, s, None, N, group_size, **how)))
        times: list[tuple[float, int, Plan | None]] = []
        for i, (plan, way) in enumerate(ways):
            y = way(*copies[0])
            error = ((y.float() - expected).norm() / expected.norm()).item()
            if not error < TOLERANCE:
                raise RuntimeError(f"{plan} is wrong by {error:.1e} for x [{M}, {K}] and int{bits} weights [{N}, {K}]")
            microseconds = statistics.mean(
                time_calls([partial(way, *copy, dependent=dependent) for copy in copies])
                for dependent in ((True, False) if plan else (True,))
            )
            times.append((microseconds, i, plan))
            each(M, microseconds, error, plan)
        chosen.append(min(times)[2])
    return chosen


def worthwhile(plan: Plan, N: int, K: int, M: int) -> bool:
    """Whether the plan gives each multiprocessor something to do, and no block next to nothing."""
    tiles = -(-N // plan.channels) * -(-M // plan.tokens)
    multiprocessors = torch.cuda.get_device_properties("cuda").multi_processor_count
    many = plan.blocks == 1 or tiles * plan.blocks <= 8 * multiprocessors
    return many and tiles * plan.blocks >= multiprocessors // 3 and K // STEP // plan.blocks >= 4


def compile_all(plans: Sequence[Plan], bits: int, group_size: int | None) -> None:
    """Fills the cache of compiled kernels, on all cores."""
    device = torch.device("cuda", torch.cuda.current_device())
    defines = {tuple((plan.defines(bits, group_size) | {"HALF": 0}).items()): plan.kernel for plan in plans}
    with ThreadPoolExecutor() as pool:
        for done in [
            pool.submit(cuda.kernel, f"{kernel}_linear.cu", f"int{bits}_{kernel}", device, **dict(each))
            for each, kernel in defines.items()
        ]:
            done.result()


def keep(path: Path, bits: int, shape: tuple[int, int], plans: list[Plan | None], about: dict[str, str]) -> None:
    """Adds the plans of a shape (N, K) to a file, in place of older ones; calls in this process go by them at once.

    about: where and when they were measured. Raises OSError, and what `cuda_linear.read` does of a file that is none.
    """
    kept = cuda_linear.read(path) if path.exists() else {}
    cuda_linear.write(path, kept | {bits: kept.get(bits, {}) | {shape: plans}}, about)
    for choice in (cuda_linear.table, cuda_linear.plan, *(op.choose for op in OPS.values())):
        choice.cache_clear()


def words(plan: Plan | None) -> str:
    """A plan for a reader: "small, 64 channels × 8 tokens, 2 blocks share K"."""
    if plan is None:
        return "dequantize"
    size = f"{plan.kernel}, {plan.channels} channels × {plan.tokens} token{'s' * (plan.tokens > 1)}"
    return f"{size}, {plan.blocks} blocks share K" if plan.blocks > 1 else size


def cold(tensors: Sequence[Tensor]) -> int:
    """How many copies of the tensors it takes that a round over them finds none in the L2."""
    cache = torch.cuda.get_device_properties("cuda").L2_cache_size
    return max(2, -(-3 * cache // sum(tensor.nbytes for tensor in tensors)))


def time_calls(calls: Sequence[Callable[[], Any]], replays: int = 7, least: float = 200) -> float:
    """Microseconds of a call: the median over replays of a CUDA graph that makes all the calls, in turn.

    least: microseconds that a graph should take, so that its own launch does not count.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    rounds, graph = 1, None
    while True:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(rounds):
                for call in calls:
                    call()
        graph.replay()
        times = []
        for _ in range(replays):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        if (median := statistics.median(times)) >= least or rounds >= 8:
            return median / rounds / len(calls)
        rounds = min(8, max(rounds * 2, int(rounds * least / median) + 1))
