"""Measures which plan of a CUDA kernel is fastest for a shape, and whether what stands against it is faster.

Every candidate is first checked against a product with the weight as it is, then timed in a CUDA graph that reads
another copy of the packed weight with each call, so that none is in the L2. Its time is the mean of two: of calls that
may start before the one ahead has ended, as behind another of our kernels, and of calls that may not, as behind any
other kernel. The least wins; a kernel that is wrong is an error, not a slow one. The GPU is torch's current one.

What is measured here are linears on weights of 4 or 8 bits, against dequantizing; those of `scaled_linear.cu` are in
scaled_tuning.py.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cuda, cuda_linear, cuda_scaled_linear, int4_linear, int8_linear, plans
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


def takes(bits: int, N: int, K: int, group_size: int | None = None) -> bool | str:
    """True where the kernels take a weight [N, K] of so many bits, else why not."""
    whole = K % (group_size or 1) == 0, f"K is not a multiple of the group size {group_size}"
    return need(*cuda_linear.sizes(N, K), whole)


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
    group_size: int | None = None,
    tokens: Sequence[int] = MEASURED,
    each: Callable = print,
    device: str = "cuda",
) -> list[Plan | None]:
    """The plan for each of TOKENS, measured at `tokens`; None where dequantizing is faster.

    group_size: None for one scale for each channel. each: as for `times`. device: where the tensors are.

    Raises:
        RuntimeError: a kernel is wrong, or does not compile or run; the message names the plan where it is wrong.
    """
    weight = torch.randn(N, K, device=device, dtype=torch.bfloat16) / K**0.5
    if bits == 4:
        op, packed = int4_linear.int4_linear, int4_linear.pack(weight, group_size)
        dense, layout = int4_linear.unpack(*packed, group_size, N), (group_size, N)
    else:
        op, packed = int8_linear.int8_linear, int8_linear.pack(weight, group_size=group_size)
        dense, layout = int8_linear.unpack(*packed), ()
    del weight
    copies = cold(packed)

    def dequantize(x: Tensor, q: Tensor, scales: Tensor) -> Tensor:
        return op.run(x, q, scales, *layout, None, implementation="dequantize")

    def run(plan: Plan, x: Tensor, q: Tensor, scales: Tensor, dependent: bool = True) -> Tensor:
        return cuda_linear.run(plan, x, q, scales, None, N, group_size, dependent=dependent)

    chosen: list[Plan | None] = []
    for M, most in zip(tokens, TOKENS, strict=True):
        x = torch.randn(M, K, device=device, dtype=torch.bfloat16)
        fitting = [plan for plan in candidates(bits, most) if plan.fits(N, K, bits, group_size)]
        tried = [plan for plan in fitting if worthwhile(plan, N, K, M)]
        compile_all(
            (f"{plan.kernel}_linear.cu", f"int{bits}_{plan.kernel}", plan.defines(bits, group_size) | {"HALF": 0})
            for plan in tried
        )
        ways = [
            Way(None, partial(dequantize, x), copies),
            *(Way(plan, partial(run, plan, x), copies) for plan in tried),
        ]
        chosen.append(least(times(ways, x, (x @ dense.T).float(), each)))
    return chosen


def worthwhile(plan: Plan, N: int, K: int, M: int) -> bool:
    """Whether the plan gives each multiprocessor something to do, and no block next to nothing."""
    tiles = -(-N // plan.channels) * -(-M // plan.tokens)
    multiprocessors = torch.cuda.get_device_properties("cuda").multi_processor_count
    many = plan.blocks == 1 or tiles * plan.blocks <= 8 * multiprocessors
    return many and tiles * plan.blocks >= multiprocessors // 3 and K // STEP // plan.blocks >= 4


def compile_all(kernels: Iterable[tuple[str, str, Mapping[str, int]]]) -> None:
    """Fills the cache of compiled kernels, each a file, a name in it and defines, on all cores."""
    device = torch.device("cuda", torch.cuda.current_device())
    distinct = {(file, name, tuple(defines.items())) for file, name, defines in kernels}
    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(cuda.kernel, file, name, device, **dict(each)) for file, name, each in distinct]:
            done.result()


class Way(NamedTuple):
    """A way to multiply: `call(*copy)` is y for each copy of the packed weight.

    plan: of the kernel, whose calls also take `dependent`; None for what stands against them.
    """

    plan: Any | None
    call: Callable[..., Tensor]
    copies: Sequence[Sequence[Tensor | None]]


def times(
    ways: Iterable[Way], x: Tensor, expected: Tensor, each: Callable[[int, float, float, Any | None], Any]
) -> list[tuple[float, Any | None]]:
    """Microseconds of each way, and its plan; all are measured forth and back, as a GPU slows down when it gets warm.

    expected: y [M, N] in fp32. each: told (M, µs, error in the norm, plan) of all that is measured.
    Raises RuntimeError for a plan that is wrong.
    """
    ways = list(ways)
    errors = [((call(*copies[0]).float() - expected).norm() / expected.norm()).item() for _, call, copies in ways]
    for way, error in zip(ways, errors, strict=True):
        if way.plan and not error < TOLERANCE:
            of = f"{x.dtype} x {list(x.shape)} and y {list(expected.shape)}"
            raise RuntimeError(f"{way.plan!r} is wrong by {error:.1e} for {of}")
    measured: list[list[float]] = [[] for _ in ways]
    for i in (*range(len(ways)), *reversed(range(len(ways)))):
        plan, call, copies = ways[i]
        starts: list[dict[str, bool]] = [{"dependent": True}, {"dependent": False}] if plan else [{}]
        measured[i] += [time_calls([partial(call, *copy, **how) for copy in copies]) for how in starts]
    found = [(statistics.mean(each), way.plan) for each, way in zip(measured, ways, strict=True)]
    for (microseconds, plan), error in zip(found, errors, strict=True):
        each(len(x), microseconds, error, plan)
    return found


def least(found: Sequence[tuple[float, Any | None]]) -> Any | None:
    """The plan of the least time, the first of such."""
    return min(found, key=lambda each: each[0])[1]


def keep(path: Path, kind: str, shape: tuple[int, int], found: Sequence[Any | None], about: Mapping[str, str]) -> None:
    """`plans.add`; calls in this process go by what is added at once."""
    plans.add(path, kind, shape, found, about)
    for choice in (plans.table, cuda_linear.plan, cuda_scaled_linear.plan, *(op.choose for op in OPS.values())):
        choice.cache_clear()


def cold(packed: Sequence[Tensor | None]) -> list[Sequence[Tensor | None]]:
    """The packed weight, and as many copies as it takes that a round over them finds none in the L2."""
    cache = torch.cuda.get_device_properties("cuda").L2_cache_size
    nbytes = sum(part.nbytes for part in packed if part is not None)
    more = max(1, -(-3 * cache // nbytes) - 1)
    return [packed, *([None if part is None else part.clone() for part in packed] for _ in range(more))]


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
