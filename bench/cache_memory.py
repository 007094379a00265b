"""Peak memory and speed of `generate` at long contexts: a Llama of the shape of Llama-3-8B with random weights.

    python -m bench.cache_memory [--contexts 4096 … 131072] [--contenders bf16 "int4wo + kv8" …] [--new 8] [--compile]
                                 [--patience 600] [--json OUT] [--plot OUT.png]

One row. A prompt of --contexts less --new tokens is taken in, then --new tokens are made, greedily, in a static cache
of the context's length. Contenders, each in a process of its own, one after another:

    bf16             `generate` of transformers as it is: no mask, as nothing is padded, and the prompt at once
    bf16 masked      the same with one token of padding, for which transformers makes a mask of tokens by positions
    bf16 in chunks   as bf16, with prefill_chunk_size
    int4wo + kv8, …  any recipe with a rule for caches, by `aograph.optimize`: int4wo in groups of 64, rounded by
                     minmax, which packs faster; chunks, and no mask

`prefill tokens/s` are those of the prompt over the time until the first new token, `decode ms` the mean of the others;
`peak GB` is of torch's allocator through both, `weights GB` and `cache GB` what stays, none of them known on the CPU.
All run eagerly, a recipe with --compile behind Inductor, which compiles two graphs for each context. Graphs are made,
and weights packed, on a prompt of four tokens before. A contender that fails is not run at longer contexts; one that
has not answered after --patience seconds for a context has failed.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

import aograph

from .contest import Contender
from .device import machine
from .llama import llama_8b

CONTEXTS = [4096, 8192, 16384, 32768, 65536, 131072]
INT4 = "int4wo(group_size=64, algorithm=minmax)"
RECIPES = {f"int4wo + {kv}": f"{INT4} + {kv}" for kv in ("kv8", "kvfp8", "kv4", "kv4(keys=token)")}
PLAIN = {"bf16": {}, "bf16 masked": {}, "bf16 in chunks": {"prefill_chunk_size": 2048}}  # options of generate
COLUMNS = ("context", "what", "peak GB", "weights GB", "cache GB", "prefill tokens/s", "prefill s", "decode ms")


class Clock:
    """A streamer of `generate`: when the prompt went in, and when each token came out."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Tensor) -> None:  # on the CPU, so that the device has been waited for
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class MemoryWorker:
    """A contender in its process."""

    def __init__(self, name: str, options: argparse.Namespace):
        self.name, self.options, self.cuda = name, options, torch.device(options.device).type == "cuda"
        torch.manual_seed(0)
        self.model: Any = llama_8b(options.device, options.layers, options.width)
        if name not in PLAIN:
            self.model = aograph.optimize(
                self.model, RECIPES.get(name, name), hand_over=True, compile=options.compile, progress=False
            )

    def measure(self, context: int) -> dict[str, Any]:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
        cache = self.cache(context)
        self.generate(4, 2, cache)
        cache.reset()
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        clock, new = Clock(), self.options.new
        kept = torch.cuda.memory_allocated() if self.cuda else 0
        self.generate(context - new, new, cache, clock)
        begin, first, *_, last = clock.times
        size = cache_bytes(cache)
        found = {
            "prefill tokens/s": round((context - new) / (first - begin), 1),
            "prefill s": round(first - begin, 3),
            "decode ms": round((last - first) / (new - 1) * 1e3, 2),
            "cache GB": round(size / 1e9, 3),
        }
        if self.cuda:
            found |= {"peak GB": in_gb(torch.cuda.max_memory_allocated()), "weights GB": in_gb(kept - size)}
        return found

    def cache(self, context: int) -> Any:
        if self.name not in PLAIN:
            return aograph.PackedCache(self.model, batch_size=1, max_cache_len=context)
        from transformers import StaticCache

        return StaticCache(self.model.config, max_cache_len=context)

    def generate(self, length: int, new: int, cache: Any, clock: Clock | None = None) -> None:
        ids = (torch.arange(length) * 7919 % self.model.config.vocab_size)[None].to(self.options.device)
        mask = torch.ones_like(ids)
        if self.name == "bf16 masked":
            mask[0, 0] = 0
        self.model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=new, do_sample=False, eos_token_id=None,
            pad_token_id=0, disable_compile=True, streamer=clock, **PLAIN.get(self.name, {}),
        )  # fmt: skip


def cache_bytes(cache: Any) -> int:
    """Of keys and values; of packed ones with scales and windows."""
    pairs = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    return sum(each.nbytes for part in pairs for each in (part if isinstance(part, tuple) else [part]))


def in_gb(size: int) -> float:
    return round(size / 1e9, 2)


def rows(options: argparse.Namespace, caches: str) -> Iterator[dict[str, Any]]:
    """A row of each contender at each context, as they come."""
    for i, name in enumerate(options.contenders):
        contender = Contender.start(MemoryWorker, name, options, str(Path(caches, str(i))), 8)
        try:
            for context in sorted(options.contexts):
                contender.order("measure", context)
                found = contender.answer(time.monotonic() + options.patience)
                yield {"context": context, "what": name, **(found or {"failure": contender.failure})}
        finally:
            contender.end()


def plot(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Peak memory against the context, a line for each contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5))
    for name in dict.fromkeys(row["what"] for row in found):
        points = [(row["context"], row["peak GB"]) for row in found if row["what"] == name and "peak GB" in row]
        if points:
            axis.plot(*zip(*points, strict=True), "o-", label=name)
    contexts = sorted({row["context"] for row in found})
    axis.set(xlabel="tokens of context", ylabel="peak memory, GB", xscale="log")
    axis.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cache_memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ["bf16", "bf16 masked", "bf16 in chunks", "int4wo + kv8", "int4wo + kv4"]
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="tokens, the new ones among them")
    parser.add_argument("--contenders", nargs="+", default=names, metavar="NAME", help="of those above, or any recipe")
    parser.add_argument("--new", type=int, default=8, help="tokens to make, two at least")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096, help="hidden size, a multiple of 512; all sizes go with it")
    parser.add_argument("--compile", action="store_true", help="recipes behind Inductor")
    parser.add_argument("--patience", type=float, default=600, help="seconds for a contender at a context")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the figures there")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="of the peak memory, with matplotlib")
    options = parser.parse_args(arguments)
    about = machine(torch.device(options.device)) | {"layers": options.layers, "width": options.width}
    print(json.dumps(about), flush=True)
    found: list[dict[str, Any]] = []
    caches = tempfile.mkdtemp(prefix="aograph-bench-")
    try:
        for row in rows(options, caches):
            found.append(row)
            print(json.dumps(row), flush=True)
            if options.json:
                options.json.write_text(json.dumps({"machine": about, "rows": found}, indent=1) + "\n")
    finally:
        shutil.rmtree(caches, ignore_errors=True)
        columns = [*COLUMNS, "failure"]
        table = sorted(found, key=lambda row: row["context"])
        print(tabulate([[row.get(each, "") for each in columns] for row in table], columns, disable_numparse=True))
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
