"""What a linear costs, in the graph's own symbols, and the time that a device cannot beat for it.

Costs are sympy expressions of the number of tokens M, itself an expression of the graph's symbols (batch,
sequence). The roofline model (Williams, Waterman, Patterson, 2009) takes the larger of the time to move the bytes
and the time to do the operations.
"""

from __future__ import annotations

import functools
import re
import time
from dataclasses import dataclass

import sympy
import torch

# Peak rates by device name: bytes/s of memory and multiply-add operations/s (counted as two) by dtype. H200: measured
# on one device with torch 2.11 (read of 8 GB; 8192³ matrix product); the others: the vendors' data sheets, dense.
HALF = (torch.bfloat16, torch.float16)
KNOWN = {
    "H200": (4.35e12, 780e12, 60e12),
    "H100": (3.35e12, 989e12, 67e12),
    "B200": (8.0e12, 2250e12, 80e12),
    "A100": (2.0e12, 312e12, 19.5e12),
    "L40S": (0.864e12, 362e12, 91e12),
    "L4": (0.3e12, 121e12, 30e12),
    "RTX 4090": (1.008e12, 165e12, 82e12),
}


@dataclass(frozen=True)
class Cost:
    """Bytes moved (each input read once, each output written once) and operations done."""

    bytes: sympy.Expr
    operations: sympy.Expr


def linear_cost(M: sympy.Expr, N: int, K: int, weight_bytes: int, itemsize: int) -> Cost:
    """y [M, N] = x [M, K] @ w.T with activations of `itemsize` bytes and weights of `weight_bytes` in all."""
    return Cost(sympy.expand(M * (N + K) * itemsize + weight_bytes), sympy.expand(2 * M * N * K))


@dataclass(frozen=True)
class Roofline:
    """The rates of a device: bytes/s, and operations/s in half precision and in fp32."""

    name: str
    bandwidth: float
    half: float
    single: float

    def seconds(self, cost: Cost, dtype: torch.dtype) -> sympy.Expr:
        """The least time for a cost, as an expression."""
        return sympy.Max(cost.bytes / self.bandwidth, cost.operations / (self.half if dtype in HALF else self.single))

    def break_even(self, N: int, K: int, weight_bytes: int, dtype: torch.dtype) -> int | None:
        """The number of tokens from which the plain linear is bound by arithmetic, so that smaller weights no longer
        pay; None if that never happens."""
        M = sympy.Symbol("M", positive=True)
        cost = linear_cost(M, N, K, weight_bytes, dtype.itemsize)
        rate = self.half if dtype in HALF else self.single
        found = sympy.solve(cost.bytes / self.bandwidth - cost.operations / rate, M)
        return int(sympy.ceiling(found[0])) if found and found[0] > 0 else None


@functools.cache
def roofline(device: str) -> Roofline:
    """The roofline of a device: known GPUs from a table, other GPUs from their clocks, a CPU by a short measurement."""
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        for key, rates in KNOWN.items():
            if re.search(rf"\b{key}\b", properties.name):
                return Roofline(properties.name, *rates)
        bandwidth = 2 * properties.memory_clock_rate * 1e3 * properties.memory_bus_width / 8
        cores = properties.multi_processor_count * properties.clock_rate * 1e3
        return Roofline(properties.name, bandwidth, cores * 1024, cores * 256)
    return Roofline(f"this CPU ({torch.get_num_threads()} threads)", *measure_cpu())


def measure_cpu() -> tuple[float, float, float]:
    """Read bandwidth and matrix rates of this CPU, in about a tenth of a second."""

    def best(function, repeats: int = 3) -> float:
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return min(times[1:])

    stream = torch.ones(16 << 20)
    rates = [stream.nbytes / best(stream.sum)]
    for dtype in (torch.bfloat16, torch.float32):
        a, b = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        rates.append(2 * 256 * 1024 * 1024 / best(lambda a=a, b=b: a @ b))
    return rates[0], rates[1], rates[2]
