"""Times int8 and int4 linear layers on the CPU against torch's own bf16 and fp32 ones.

    python -m bench.cpu_linear --n 4096 --k 4096 --m 1 16 64 256 --json OUT

Every round times each contender once, so that whatever else the machine does hits all of them alike, and each call
reads another copy of the weights, more of them than the last-level cache holds, as a model's layers would be. What
is reported is the median over the rounds, for one layer of the LAYERS that are timed together. Where x is quantized too
(int8dq), these are one compiled graph, as in a model, and quantization is in the time.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from aograph.kernels import int4_linear as int4
from aograph.kernels import int8_linear as int8
from aograph.kernels import int8_scaled_linear as int8dq
from aograph.kernels.op import Case
from aograph.kernels.quantized_activation import int8_per_token, int8_per_token_asymmetric
from tabulate import tabulate
from torch import Tensor

Contender = tuple[torch.dtype, Callable[[list[Tensor], int], object]]

DYNAMIC = {"int8dq": int8_per_token, "int8dq asymmetric": int8_per_token_asymmetric}
LAYERS = 4
CACHE_BYTES = 64 << 20  # of copies of each weight, where the machine does not say how much it caches


def machine() -> dict[str, object]:
    """What the figures hang on: the processor, its instruction set, the threads, torch, the load before."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    flags = next((line.split() for line in lines if line.startswith(("flags", "Features"))), [])
    extras = [flag for flag in ("avx512_bf16", "avx512_vnni", "amx_bf16", "bf16", "i8mm") if flag in flags]
    return {
        "cpu": model or platform.machine(),
        "isa": " + ".join([torch.backends.cpu.get_cpu_capability(), *extras]),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 2),
    }


def cache_bytes() -> int:
    """Of the largest cache of the first processor."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max([int(size[:-1]) * units[size[-1]] for size in sizes if size[-1] in units], default=CACHE_BYTES)


def copies(tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """The tensors, and as many copies as it takes to fill the last-level cache twice, two at least."""
    size = sum(tensor.nbytes for tensor in tensors)
    return [tensors, *(tuple(t.clone() for t in tensors) for _ in range(max(1, 2 * cache_bytes() // size)))]


def contenders(n: int, k: int, group_size: int, dtype: torch.dtype) -> dict[str, Contender]:
    """By name: the dtype of x [M, k], and a function of an x for each layer, and of the round, which picks weights."""
    weight = torch.randn(n, k, dtype=dtype) / k**0.5
    found = {}
    for plain in (torch.bfloat16, torch.float32):
        layers = copies((weight.to(plain),))
        found[f"{str(plain)[6:]} F.linear"] = plain, each(F.linear, layers)
    layers8 = copies(int8.pack(weight))
    layers4 = copies(int4.pack(weight, group_size))
    found["int8wo"] = dtype, each(lambda x, *w: int8.int8_linear(x, *w, None), layers8)
    found["int4wo"] = dtype, each(lambda x, *w: int4.int4_linear(x, *w, group_size, n, None), layers4)
    for name, quantize in DYNAMIC.items():
        layers = copies(int8dq.pack(weight, sums="asymmetric" in name))
        together = torch.compile(partial(dynamic, quantize), dynamic=True)
        found[name] = dtype, lambda xs, i, call=together, layers=layers: call(xs, taken(layers, i))
    return found


def taken(layers: list[tuple[Tensor, ...]], i: int) -> list[tuple[Tensor, ...]]:
    """The weights of round i."""
    return [layers[(i * LAYERS + j) % len(layers)] for j in range(LAYERS)]


def each(linear: Callable[..., Tensor], layers: list[tuple[Tensor, ...]]) -> Callable[[list[Tensor], int], object]:
    return lambda xs, i: [linear(x, *weights) for x, weights in zip(xs, taken(layers, i), strict=True)]


def dynamic(quantize: Callable[[Tensor], tuple], xs: list[Tensor], weights: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """y of each x, which is quantized first."""
    found = []
    for x, (q, scale, *sums) in zip(xs, weights, strict=True):
        found.append(int8dq.int8_scaled_linear(*quantize(x), q, scale, *(sums or [None]), None, x.dtype))
    return found


def chosen(name: str, m: int, x: Tensor, n: int, k: int, group_size: int) -> str:
    """Which implementation an op runs for x; torch's own for what is no op."""
    of_x = dict.fromkeys(DYNAMIC, int8dq.int8_scaled_linear)
    op = {"int8wo": int8.int8_linear, "int4wo": int4.int4_linear, **of_x}.get(name)
    if op is None:
        return "torch"
    group = group_size if name == "int4wo" else None
    return op.choose(Case("cpu", x.dtype, m, n, k, group)).name


def measure(found: dict[str, Contender], xs: list[Tensor], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of a layer, by contender, at each round; rounds go on for `seconds`, 5 of them at least."""
    times: dict[str, list[float]] = {name: [] for name in found}
    runs = {name: partial(function, [x.to(dtype) for x in xs]) for name, (dtype, function) in found.items()}
    for run in runs.values():  # a compiler or a cache may be behind the first call
        run(0)
    i, end = 0, time.perf_counter() + seconds
    while i < 5 or time.perf_counter() < end:
        i += 1
        for name, run in runs.items():
            start = time.perf_counter()
            run(i)
            times[name].append((time.perf_counter() - start) * 1e3 / LAYERS)
    return times


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu_linear", description=__doc__.partition("\n")[0])
    parser.add_argument("--n", type=int, default=4096, help="out features")
    parser.add_argument("--k", type=int, default=4096, help="in features")
    parser.add_argument("--m", type=int, nargs="+", default=[1, 16, 64, 256], help="rows of x")
    parser.add_argument("--group-size", type=int, default=64, help="weights that share a scale, int4wo")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="of x, as packed"
    )
    parser.add_argument("--seconds", type=float, default=8, help="of rounds for each M")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the figures there")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    found = contenders(options.n, options.k, options.group_size, dtype)
    rows, about = [], machine()
    for m in options.m:
        xs = [torch.randn(m, options.k, dtype=dtype) for _ in range(LAYERS)]
        times = measure(found, xs, options.seconds)
        medians = {name: statistics.median(all_times) for name, all_times in times.items()}
        for name, median in medians.items():
            rows.append(
                {
                    "M": m,
                    "what": name,
                    "ms": round(median, 3),
                    "least ms": round(min(times[name]), 3),
                    "x bf16": round(medians["bfloat16 F.linear"] / median, 2),
                    "runs": chosen(name, m, xs[0], options.n, options.k, options.group_size),
                    "rounds": len(times[name]),
                }
            )
    about |= {"N": options.n, "K": options.k, "group size": options.group_size, "x": options.dtype}
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(tabulate(rows, headers="keys"))
    if options.json:
        options.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
