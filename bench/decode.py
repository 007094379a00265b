"""Times one decode step of a model of the shape of Llama-3-8B with random weights, under CUDA graphs.

    python -m bench.decode [--batch 1 4 16 64] [--contenders bf16 int8wo int4wo torchao-int8 torchao-int4] [--json OUT]

A step takes one token for each row, writes it to a static cache of --window tokens and attends to all of them: the
window is full and rolls, the token at position p goes to slot p % window. It gives the logits and the tokens with the
largest, which are the next step's. Every contender is the same module:

    bf16             torch.compile(mode="reduce-overhead")
    int8wo, int4wo   the same with backend="aograph"; int4wo in groups of 64, rounded by minmax, which packs faster
    torchao-int8, torchao-int4
                     quantize_, then compiled with CUDA graphs under the settings that quantize_ sets; int4 in groups
                     of 64 in its tile-packed format, the one that needs no further package

Each is a process of its own, as are its memory and its settings. All compile at the same time, or one after another
with --in-turn, which `compile s` (up to the third step, packing included) and what they tune by timing are better for.
Then each runs its steps while the others wait. Time is the median of the steps, from start to end on the device, and
tokens/s are rows over that. `bandwidth` is the share of the read bandwidth, measured first, that the packed weights of
the linear layers and the cache would take, each read once; `peak GB` that of torch's allocator after the first step.
`error` is the distance of the logits to those of the eager bf16 model on the same weights, ‖a − b‖ / ‖b‖, in the first
step. A contender that is over 12 times as slow as bf16 is not run at larger batches.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gc
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from .contenders import TORCHAO
from .decode_step import HEAD, Cache, llama
from .device import Ceilings, ceilings, machine, timed, write

HOPELESS = 12  # times bf16
STEPS = (10, 100)  # the fewest and the most that are timed,
SECONDS = 3.0  # and for how long about
FIRST = 1000  # position of the first step
RECIPES = {"int8wo": "int8wo", "int4wo": "int4wo(group_size=64, algorithm=minmax)"}


class Worker:
    """One contender: its model, packed; `compile` and `measure` for one batch at a time."""

    def __init__(self, name: str, options: argparse.Namespace):
        self.name, self.options, self.device = name, options, torch.device(options.device)
        self.kernels: collections.Counter[str] = collections.Counter()
        torch.manual_seed(0)
        self.model = llama(options.width, options.layers, self.device)
        self.linear_bytes = sum(m.weight.nbytes for m in self.model.modules() if isinstance(m, nn.Linear))
        self.expected = self.model(*self.inputs(1))[0].float()
        self.step = self.compiled()
        self.state: tuple[Tensor, Tensor, Cache] | None = None
        self.collect()

    def inputs(self, batch: int) -> tuple[Tensor, Tensor, Cache]:
        """Ids, position and a full cache of `batch` rows, all alike."""
        random = torch.Generator(self.device).manual_seed(1)
        heads = self.model.layers[0].attention.kv_heads

        def entry() -> Tensor:
            row = torch.empty(1, heads, self.options.window, HEAD, dtype=torch.bfloat16, device=self.device)
            full = row.normal_(generator=random).repeat(batch, 1, 1, 1)
            torch._dynamo.mark_static_address(full)  # so that CUDA graphs write to it where it is
            return full

        ids = torch.full((batch, 1), 7, device=self.device)
        position = torch.full((1,), FIRST, device=self.device)
        return ids, position, [(entry(), entry()) for _ in range(self.options.layers)]

    def compiled(self) -> Callable[..., tuple[Tensor, Tensor]]:
        cuda = self.device.type == "cuda"
        compiled = partial(torch.compile, self.model, fullgraph=True, dynamic=False)
        if self.name in RECIPES:
            settings = {"recipe": RECIPES[self.name], "report": self.reported, "model": self.model}
            graphs = {"mode": "reduce-overhead", "release": True}
            return compiled(backend="aograph", options=settings | (graphs if cuda else {}))
        if self.name == "bf16":
            return compiled(mode="reduce-overhead" if cuda else "default")
        self.quantize_torchao()
        return compiled(options=TORCHAO | {"triton.cudagraphs": cuda})

    def quantize_torchao(self) -> None:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

        tiles = {"group_size": 64, "int4_packing_format": "tile_packed_to_4d"}
        config = Int8WeightOnlyConfig() if self.name == "torchao-int8" else Int4WeightOnlyConfig(**tiles)
        quantize_(self.model, config)
        weights = [module.weight for module in self.model.modules() if isinstance(module, nn.Linear)]
        self.linear_bytes = sum(getattr(w, name).nbytes for w in weights for name in w.__tensor_flatten__()[0])

    def reported(self, report: Any) -> None:
        self.linear_bytes = sum(row.bytes_after for row in report.rows)
        self.kernels = collections.Counter(row.kernel or row.outcome for row in report.rows)

    def collect(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def compile(self, batch: int) -> dict[str, Any]:
        """The first three steps: CUDA graphs are recorded in the second, and replayed from the third on."""
        self.state = None  # the cache of the last batch
        self.collect()
        self.state = self.inputs(batch)
        skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
        start = time.perf_counter()
        logits, _ = self.advance(self.state)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # packing is over
        error = float((logits.float() - self.expected).norm() / self.expected.norm() / batch**0.5)
        for _ in range(2):
            self.advance(self.state)
        self.wait()
        return {
            "compile s": round(time.perf_counter() - start, 1),
            "error": round(error, 4),
            "CUDA graph": self.device.type == "cuda"
            and torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == skips,
            "kernels": dict(self.kernels),
            "attention": self.attention(),
        }

    def attention(self) -> str:
        """The implementation of attention that torch chooses."""
        assert self.state is not None
        keys, values = self.state[2][0]
        q = keys.new_empty(len(keys), self.model.layers[0].attention.heads, 1, HEAD)
        return SDPBackend(torch._fused_sdp_choice(q, keys, values, enable_gqa=True)).name

    def advance(self, state: tuple[Tensor, Tensor, Cache]) -> tuple[Tensor, Tensor]:
        """One step; ids and position are those of the next one afterwards."""
        ids, position, cache = state
        torch.compiler.cudagraph_mark_step_begin()
        logits, following = self.step(ids, position, cache)
        ids.copy_(following)
        position.add_(1)
        return logits, following

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def measure(self, limits: Ceilings) -> dict[str, Any]:
        assert self.state is not None
        run = partial(self.advance, self.state)
        once = statistics.median(timed(run, self.device)() for _ in range(3))
        fewest, most = STEPS
        steps = [timed(run, self.device) for _ in range(max(fewest, min(most, int(SECONDS / once))))]
        seconds = statistics.median(step() for step in steps)
        ids, _, cache = self.state
        size = self.linear_bytes + sum(keys.nbytes + values.nbytes for keys, values in cache)
        cuda = self.device.type == "cuda"
        return {
            "ms": round(seconds * 1e3, 4),
            "tokens/s": round(len(ids) / seconds, 1),
            "bandwidth": round(size / seconds / limits.read, 4),
            "peak GB": round(torch.cuda.max_memory_allocated() / 1e9, 2) if cuda else None,
            "read GB": round(size / 1e9, 3),
            "steps": len(steps),
        }


def serve(name: str, options: argparse.Namespace, caches: str, pipe: Connection) -> None:
    """The process of a contender: answers each order (method, arguments) with a dict, or with the text of an error.

    caches: a folder for what Inductor and Triton compile, empty at first.
    """
    for variable, kind in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        os.environ[variable] = str(Path(caches, name, kind))
    worker: Worker | None = None
    with torch.no_grad():
        while True:
            method, *rest = pipe.recv()
            try:
                worker = worker or Worker(name, options)
                pipe.send(getattr(worker, method)(*rest))
            except Exception as error:
                traceback.print_exc()
                pipe.send(f"{type(error).__name__}: {str(error).strip()[:300]}")


class Contender:
    """The parent's end of a contender's process. One that has failed stays failed."""

    def __init__(self, name: str, options: argparse.Namespace, caches: str, processes: Any):
        self.name, self.failure = name, ""
        self.pipe, other = processes.Pipe()
        self.process = processes.Process(target=serve, args=(name, options, caches, other), daemon=True)
        self.process.start()
        other.close()  # so that the end of the process is the end of the pipe

    def order(self, *order: Any) -> None:
        if not self.failure:
            with contextlib.suppress(BrokenPipeError):  # the answer will say so
                self.pipe.send(order)

    def answer(self, until: float = float("inf")) -> dict[str, Any]:
        """What the last order gave; nothing after a failure, which it is not to answer until that time."""
        if self.failure:
            return {}
        found: Any = "no answer in time"
        try:
            if self.pipe.poll(max(until - time.monotonic(), 0) if until < float("inf") else None):
                found = self.pipe.recv()
        except EOFError:
            self.process.join()
            found = f"the process ended with {self.process.exitcode}"
        if isinstance(found, dict):
            return found
        self.failure = found
        print(f"{self.name}: error: {found}", file=sys.stderr, flush=True)
        self.end()  # and what it holds
        return {}

    def end(self) -> None:
        if self.process.is_alive():
            self.process.terminate()


def compiled(contenders: Sequence[Contender], batch: int, in_turn: bool, patience: float) -> list[dict[str, Any]]:
    """What each contender says of its compilation for a batch."""
    if in_turn:
        return [found for each in contenders for found in compiled([each], batch, False, patience)]
    for each in contenders:
        each.order("compile", batch)
    until = time.monotonic() + patience
    return [each.answer(until) for each in contenders]


def compare(
    contenders: Sequence[Contender],
    batch: int,
    in_turn: bool,
    patience: float,
    limits: Ceilings,
    base: dict[int, float],
) -> Iterator[dict[str, Any]]:
    """A row of each contender at a batch: all compile, then each measures. `base` gets the times of bf16."""
    for each, first in zip(contenders, compiled(contenders, batch, in_turn, patience), strict=True):
        each.order("measure", limits)
        row = {"batch": batch, "what": each.name, **first, **each.answer()}
        if each.failure:
            yield row | {"failure": each.failure}
            continue
        if each.name == "bf16":
            base[batch] = row["ms"]
        if batch in base:
            row["x bf16"] = round(base[batch] / row["ms"], 3)
            if row["ms"] > HOPELESS * base[batch]:
                each.failure = f"skipped: over {HOPELESS} times bf16 at batch {batch}"
        yield row


def table(rows: Sequence[dict[str, Any]]) -> str:
    columns = ["batch", "what", "tokens/s", "ms", "x bf16", "bandwidth", "peak GB", "compile s", "error", "CUDA graph",
               "steps"]  # fmt: skip
    lines = []
    for row in rows:
        share = {"bandwidth": f"{row['bandwidth']:.0%}"} if "bandwidth" in row else {}
        ran = ", ".join(f"{kernel} × {count}" for kernel, count in row.get("kernels", {}).items())
        lines.append([*((row | share).get(column, "") for column in columns), row.get("failure", ran)])
    return tabulate(lines, [*columns, "kernels"], disable_numparse=True, maxcolwidths=[*[None] * len(columns), 60])


def main(arguments: list[str] | None = None) -> None:
    names = ["bf16", *RECIPES, "torchao-int8", "torchao-int4"]
    parser = argparse.ArgumentParser(
        prog="python -m bench.decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 64], help="rows, one token each")
    parser.add_argument("--contenders", nargs="+", choices=names, default=names)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096, help="hidden size, a multiple of 512; all sizes go with it")
    parser.add_argument("--window", type=int, default=1024, help="tokens in the cache")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--in-turn", action="store_true", help="compile one contender after another")
    parser.add_argument("--patience", type=float, default=600, help="seconds for a contender to compile for a batch")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the figures there")
    options = parser.parse_args(arguments)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # contenders are ended, and the table is printed
    # Contenders share the cores; each would start as many compilers as there are.
    threads = max(1, (os.cpu_count() or 1) // (1 if options.in_turn else len(options.contenders)))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))
    device = torch.device(options.device)
    about, limits = machine(device), ceilings(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    about |= {"layers": options.layers, "width": options.width, "window": options.window}
    print(json.dumps(about))
    print(f"ceilings: {limits}", flush=True)
    processes = multiprocessing.get_context("spawn")
    caches = tempfile.mkdtemp(prefix="aograph-decode-")  # `compile s` is from nothing
    contenders = [Contender(name, options, caches, processes) for name in dict.fromkeys(options.contenders)]
    rows: list[dict[str, Any]] = []
    base: dict[int, float] = {}
    try:
        for batch in sorted(options.batch):
            for row in compare(contenders, batch, options.in_turn, options.patience, limits, base):
                rows.append(row)
                print(json.dumps(row), flush=True)
                write(options.json, about, limits, rows)
    finally:
        for each in contenders:
            each.end()
        shutil.rmtree(caches, ignore_errors=True)
        print(table(rows))


if __name__ == "__main__":
    main()
