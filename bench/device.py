"""What the GPU benches share: what figures hang on, the two ceilings of a device, and how calls are timed.

All of it runs on the CPU too, where a recorded sequence of calls is simply made again and the clock is the host's: for
trying a bench, not for its figures.
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

REPLAYS = 11  # of each recorded sequence,
FEWEST = 3  # fewer where they take long, but never fewer than this:
SLOW = 0.02  # seconds of a replay
CACHE_BYTES = 64 << 20  # where the device does not say how much it caches


@dataclass(frozen=True)
class Ceilings:
    """The rates that a device reached: bytes read per second, operations per second of a bf16 matrix product."""

    read: float
    matmul: float

    def seconds(self, size: float, operations: float) -> float:
        """The least time to move `size` bytes and to do `operations` (a multiply-add counts as two)."""
        return max(size / self.read, operations / self.matmul)

    def __str__(self) -> str:
        return f"read {self.read / 1e12:.3g} TB/s, bf16 product {self.matmul / 1e12:.3g} TFLOP/s"


def machine(device: torch.device) -> dict[str, Any]:
    """The device, the versions of what runs on it, the date."""
    about: dict[str, Any] = {"device": platform.processor() or platform.machine()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about = {"device": properties.name, "multiprocessors": properties.multi_processor_count,
                 "cache bytes": cache_bytes(device), "cuda": torch.version.cuda}  # fmt: skip
    about["python"] = platform.python_version()
    for package in ("torch", "triton", "torchao", "gemlite", "aograph"):
        about[package] = installed(package)
    return about | {"date": datetime.datetime.now(datetime.UTC).date().isoformat()}


def installed(package: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cache_bytes(device: torch.device) -> int:
    """Of the last cache before the device's memory."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else CACHE_BYTES


def ceilings(device: torch.device) -> Ceilings:
    """Both measured: reading several GB, and a product of random bf16 matrices; on the CPU smaller ones.

    The bandwidth is the best of torch's sum and, on a GPU, a kernel that only reads, in blocks of several sizes.
    """
    size, side = (4 << 30, 8192) if device.type == "cuda" else (256 << 20, 1024)
    source = torch.empty(size // 4, dtype=torch.int32, device=device).random_()
    runs: dict[str, Callable[[], Any]] = {"sum": lambda: source.view(torch.float32).sum()}
    if device.type == "cuda":
        from .read_kernel import read

        for block in (2048, 4096, 8192, 16384):
            sums = torch.empty(source.numel() // block, dtype=torch.int32, device=device)
            runs[f"blocks of {block}"] = lambda sums=sums: read(source, sums)
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    runs["product"] = lambda: a @ b
    for run in runs.values():  # compiles, loads
        run()
    found = medians(runs, device)
    return Ceilings(size / min(seconds for name, seconds in found.items() if name != "product"),
                    2 * side**3 / found["product"])  # fmt: skip


def record(calls: Sequence[Callable[[], Any]], device: torch.device) -> Callable[[], Any]:
    """The calls as one CUDA graph; each must have run before, and its tensors must stay. On the CPU they run again."""
    if device.type != "cuda":
        return lambda: [call() for call in calls]
    graph = torch.cuda.CUDAGraph()
    here = torch.cuda.stream(torch.cuda.current_stream())  # a capture that fails leaves its own stream behind
    with here, torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def timed(run: Callable[[], Any], device: torch.device) -> Callable[[], float]:
    """Starts `run`; what comes back waits for its end and gives the seconds that it took."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()

        def seconds() -> float:
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        return seconds
    begin = time.perf_counter()
    run()
    taken = time.perf_counter() - begin
    return lambda: taken


def medians(runs: Mapping[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """Seconds of each run: the median over rounds in which each has one turn, so that clocks change for all alike.

    Each must have run before. A first round, not counted, says how many rounds each can have.
    """
    first = {name: timed(run, device)() for name, run in runs.items()}
    rounds = {name: max(FEWEST, min(REPLAYS, int(REPLAYS * SLOW / max(t, 1e-9)))) for name, t in first.items()}
    found: dict[str, list[Callable[[], float]]] = {name: [] for name in runs}
    for i in range(max(rounds.values(), default=0)):
        for name, run in runs.items():
            if i < rounds[name]:
                found[name].append(timed(run, device))
    return {name: statistics.median(seconds() for seconds in all_seconds) for name, all_seconds in found.items()}


def write(path: Path | None, about: Mapping[str, Any], limits: Ceilings, rows: Sequence[Mapping[str, Any]]) -> None:
    """All figures so far, as JSON: called after each of them, so that an interrupted run leaves what it has."""
    if path is not None:
        path.write_text(json.dumps({"machine": about, "ceilings": asdict(limits), "rows": rows}, indent=1) + "\n")
