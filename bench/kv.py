"""Times attention of one new token over packed caches of keys and values on a GPU, against bf16.

    python -m bench.kv [--batch 1 8] [--context 1024 4096 32768 131072] [--contenders bf16 kv8 kvfp8 kv4 …] [--update]
                       [--patience 60] [--json OUT]

The shape is that of a layer of Llama-3-8B: 32 query heads, 8 KV heads, heads of 128. A case is a number of rows and of
tokens that each row's token sees, all that the cache holds. Every contender is a process of its own, so that one that
fails, or stops the device, is a row that says so:

    bf16           the fastest of torch's attentions over a bf16 cache: flash, cuDNN and "efficient", each told of
                   grouped queries ("gqa"), and with the query heads of a KV head given as tokens of it ("grouped"),
                   which any kernel takes, and reads the cache once for; `us` of its row has them all
    kv8, kvfp8, …  any recipe for caches: `kv_attention` over what the recipe makes of keys and values

Calls are recorded in a CUDA graph, go round copies of the cache that together are at least three times the L2, two at
least, and take half a millisecond at the least; `ms` and `us` are the median over replays, divided by the calls. Ours
may begin while the call before ends, as in a model. `bandwidth` is the share of the read bandwidth, measured first,
that reading the cache once takes; `error` the distance of the first row to attention in fp64 over the same cache,
‖a − b‖ / ‖b‖. With --update also what storing a token's key and value takes, the mean of 64 positions that count up,
over few caches: `index_copy_` is what bf16 is. A contender that is over 12 times as slow as bf16 is not run again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from aograph.kernels.kv_attention import kv_attention
from aograph.kernels.kv_update import kv_update
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from aograph.recipe import Recipe
from aograph.schemes import KVCache

from . import contest
from .device import Ceilings, cache_bytes, medians, record
from .worker import distance

HEADS, SHARED, HEAD = 8, 4, 128  # KV heads, query heads of each, size of a head
CONTENDERS = ("bf16", "kv8", "kvfp8", "kv4(keys=token)", "kv4")
COLUMNS = ("case", "what", "ms", "x bf16", "bandwidth", "MB", "error")
BUSY = 5e-4  # seconds that a graph takes at the least
STEPS, FEW = 64, 4  # positions that updates go through, and caches
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}

Cache = tuple[Tensor, ...]  # of keys or of values
Call = Callable[[Tensor, Cache, Cache], Tensor]


class Case(NamedTuple):
    """What is timed: "attention" or "update", of so many rows and tokens of context."""

    op: str
    batch: int
    context: int

    def __str__(self) -> str:
        return f"{self.op}, {self.batch} × {self.context}"


def attention_of(backend: SDPBackend, grouped: bool, q: Tensor, keys: Cache, values: Cache) -> Tensor:
    with sdpa_kernel(backend):
        if grouped:
            y = F.scaled_dot_product_attention(q.view(-1, HEADS, SHARED, HEAD), *keys, *values)
            return y.reshape(q.shape)
        return F.scaled_dot_product_attention(q, *keys, *values, enable_gqa=True)


TORCH: dict[str, Call] = {
    f"{name} {'grouped' if grouped else 'gqa'}": partial(attention_of, backend, grouped)
    for name, backend in BACKENDS.items()
    for grouped in (False, True)
}


class KVWorker:
    """A contender: bf16, or a recipe of one rule, for caches."""

    def __init__(self, name: str, options: argparse.Namespace):
        self.name, self.device = name, torch.device(options.device)
        self.formats = formats_of(name)
        self.runs: dict[str, list[Callable[[], Any]]] = {}  # the calls of each way to do it
        self.failed: dict[str, str] = {}

    def compile(self, case: Case) -> dict[str, Any]:
        """Makes the caches, and does it once in each way."""
        self.case, self.runs, self.failed = Case(*case), {}, {}
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # of the last case
        op, batch, context = self.case
        random = torch.Generator(self.device).manual_seed(1)
        row = [self.packed(HEADS, context, random, keys) for keys in (True, False)]
        self.bytes = batch * sum(tensor.nbytes for packed in row for tensor in packed)
        count = FEW if op == "update" else max(2, -(-3 * cache_bytes(self.device) // self.bytes))
        self.copies = [[tuple(each.repeat(batch, *[1] * (each.dim() - 1)) for each in packed) for packed in row]
                       for _ in range(count)]  # fmt: skip
        if op == "update":
            new = self.random(batch, HEADS, 1, random=random)
            ways = {self.update_name(): self.updates(new)}
            return {"MB": round(self.bytes / 1e6, 2)} | self.tried(ways)
        q = self.random(batch, HEADS * SHARED, 1, random=random)
        ways = {name: [partial(call, q, *caches) for caches in self.copies] for name, call in self.calls().items()}
        return {"MB": round(self.bytes / 1e6, 2)} | self.tried(ways, self.expected(q[:1], *row))

    def random(self, *shape: int, random: torch.Generator) -> Tensor:
        return torch.randn(*shape, HEAD, generator=random, device=self.device, dtype=torch.bfloat16)

    def packed(self, heads: int, length: int, random: torch.Generator, keys: bool) -> Cache:
        """One row of random keys or values, as the contender keeps them."""
        x = self.random(1, heads, length, random=random)
        return self.formats[keys].pack(x) if self.formats else (x,)

    def calls(self) -> dict[str, Call]:
        """The ways to attend to caches."""
        if self.formats is None:
            return TORCH
        batch, length = self.case[1:]
        positions = torch.full((batch, 1), length - 1, device=self.device)

        def arguments(q: Tensor, keys: Cache, values: Cache) -> tuple:
            return q, *keys[:2], *values, positions, None, None, HEAD**-0.5, 0.0, 0, *keys[2:]

        q = torch.empty(batch, HEADS * SHARED, 1, HEAD, dtype=torch.bfloat16, device=self.device)
        kernel = kv_attention.choose(kv_attention.case_of(*arguments(q, *self.copies[0]))).name
        return {kernel: lambda q, keys, values: kv_attention(*arguments(q, keys, values))}

    def expected(self, q: Tensor, keys: Cache, values: Cache) -> Tensor:
        """Attention in fp64 of one row."""
        if self.formats is None:
            return attention_of(SDPBackend.MATH, True, q.double(), (keys[0].double(),), (values[0].double(),))
        positions = torch.full((1, 1), self.case.context - 1, device=self.device)
        seen = positions, None, None, HEAD**-0.5, 0.0, 0
        return kv_attention.run(q.double(), *keys[:2], *values, *seen, *keys[2:], implementation="reference")

    def update_name(self) -> str:
        if self.formats is None:
            return "index_copy_"
        new = torch.empty(self.case.batch, HEADS, 1, HEAD, dtype=torch.bfloat16, device=self.device)
        position = torch.zeros(1, dtype=torch.int64, device=self.device)
        found = {kv_update.choose(kv_update.case_of(*packed[:2], new, position, *packed[2:])).name
                 for packed in self.copies[0]}  # fmt: skip
        return " and ".join(sorted(found))

    def updates(self, new: Tensor) -> list[Callable[[], Any]]:
        """One call for each position and cache."""
        positions = torch.arange(STEPS, device=self.device)[:, None]

        def store(caches: Sequence[Cache], position: Tensor) -> None:
            for packed in caches:
                if self.formats is None:
                    packed[0].index_copy_(2, position, new)
                else:
                    kv_update(*packed[:2], new, position, *packed[2:])

        return [partial(store, caches, position) for position in positions for caches in self.copies]

    def tried(self, ways: dict[str, list[Callable[[], Any]]], expected: Tensor | None = None) -> dict[str, Any]:
        """Does it once in each way, all of its calls, and keeps those that can; the largest error."""
        errors, last = [0.0], None
        for name, calls in ways.items():
            try:
                for call in calls:
                    y = call()
                if expected is not None:
                    errors.append(distance(y[:1], expected))
                self.runs[name] = calls
            except Exception as error:
                last = error
                self.failed[name] = "error"
                print(f"{self.name}, {name}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr, flush=True)
        if last is not None and not self.runs:
            raise last
        return {"error": float(f"{max(errors):.2e}")} if expected is not None else {}

    def measure(self, limits: Ceilings) -> dict[str, Any]:
        recorded, counts = {}, {}
        for name, calls in self.runs.items():
            rounds = max(1, round(BUSY * limits.read / (self.bytes * len(calls)))) if self.case.op == "attention" else 1
            recorded[name], counts[name] = record(calls * rounds, self.device), len(calls) * rounds
        seconds = {name: taken / counts[name] for name, taken in medians(recorded, self.device).items()}
        best = min(seconds, key=lambda name: seconds[name])
        found = {
            "ms": round(seconds[best] * 1e3, 6),
            "us": {name: round(taken * 1e6, 3) for name, taken in seconds.items()} | self.failed,
            "kernels": {best: counts[best]},
        }
        if self.case.op == "attention":
            found["bandwidth"] = round(self.bytes / seconds[best] / limits.read, 4)
        return found


def formats_of(name: str) -> dict[bool, Any] | None:
    """The formats of keys (True) and of values; None: bf16. ValueError for what is no recipe of one rule for caches."""
    if name == "bf16":
        return None
    schemes = [rule.scheme for rule in Recipe.of(name).rules]
    if len(schemes) != 1 or not isinstance(schemes[0], KVCache):
        raise ValueError(f"{name!r} is no recipe of one rule for caches: give kv8, kvfp8, kv4 …")
    return {keys: schemes[0].packed_format(keys) for keys in (True, False)}


def main(arguments: list[str] | None = None) -> None:
    parser = contest.parser("python -m bench.kv", __doc__, CONTENDERS)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="rows")
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 4096, 32768, 131072], help="tokens")
    parser.add_argument("--update", action="store_true", help="also time storing a token, in the shortest context")
    options = parser.parse_args(arguments)
    cases = [Case("attention", batch, context) for batch in options.batch for context in options.context]
    if options.update:
        cases += [Case("update", batch, max(min(options.context), STEPS)) for batch in options.batch]
    about = {"KV heads": HEADS, "query heads": HEADS * SHARED, "head": HEAD}
    contest.run(KVWorker, options, "case", cases, COLUMNS, about)


if __name__ == "__main__":
    main()
