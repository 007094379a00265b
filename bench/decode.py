"""Times one decode step of a model of the shape of Llama-3-8B with random weights, under CUDA graphs.

    python -m bench.decode [--batch 1 4 16 64] [--contenders bf16 int8wo int4wo torchao-int8 torchao-int4] [--json OUT]

A step takes one token for each row, writes it to a static cache of --window tokens and attends to all of them: the
window is full and rolls, the token at position p goes to slot p % window. It gives the logits and the tokens with the
largest, which are the next step's. Every contender is the same module:

    bf16             torch.compile in mode "reduce-overhead"
    int8wo, int4wo   the same with backend="aograph"; int4wo in groups of 64, rounded by minmax, which packs faster
    torchao-int8, torchao-int4
                     quantize_, then compiled with CUDA graphs under the settings that quantize_ sets; int4 in groups
                     of 64 in its tile-packed format, the one that needs no further package
    int4wo + kv8, …  a recipe with a rule for caches, which become buffers of the module, by `aograph.optimize`, which
                     it is handed over to, with CUDA graphs too

Each is a process of its own, as are its memory and its settings. All compile at the same time, or one after another
with --in-turn, which `compile s` (up to the third step, packing included) and what they tune by timing are better for.
Then each runs its steps while the others wait. Time is the median of the steps, from start to end on the device, and
tokens/s are rows over that. `bandwidth` is the share of the read bandwidth, measured first, that the packed weights of
the linear layers and the cache, packed or not, would take, each read once; `peak GB` that of torch's allocator after
the first step. With a long --window, such as 131072, compile --in-turn: each needs the model in bf16 meanwhile.
`error` is the distance of the logits to those of the eager bf16 model on the same weights, ‖a − b‖ / ‖b‖, in the first
step. A contender that is over 12 times as slow as bf16 is not run at larger batches.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

import aograph
from aograph.recipe import Recipe
from aograph.schemes import CACHE

from . import contest
from .decode_step import HEAD, Cache, llama
from .device import Ceilings
from .worker import CONFIGS, Worker, distance

CACHES = ("kv8", "kvfp8", "kv4", "kv4(keys=token)")
FIRST = 1000  # position of the first step
INT4 = "int4wo(group_size=64, algorithm=minmax)"
RECIPES = {"int8wo": "int8wo", "int4wo": INT4} | {f"int4wo + {kv}": f"{INT4} + {kv}" for kv in CACHES}
COLUMNS = ("batch", "what", "tokens/s", "ms", "x bf16", "bandwidth", "peak GB", "compile s", "error", "CUDA graph",
           "steps")  # fmt: skip


class Resident(nn.Module):
    """A model with a cache of its own, in buffers."""

    def __init__(self, model: nn.Module, cache: Cache):
        super().__init__()
        self.model = model
        for i, pair in enumerate(cache):
            for name, tensor in zip(("key", "value"), pair, strict=True):
                self.register_buffer(f"{name}_{i}", tensor)
        self.layers = len(cache)

    def forward(self, ids: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        cache = [(getattr(self, f"key_{i}"), getattr(self, f"value_{i}")) for i in range(self.layers)]
        return self.model(ids, position, cache)


class DecodeWorker(Worker):
    """A contender; a case is a number of rows."""

    recipes = RECIPES

    def __init__(self, name: str, options: argparse.Namespace):
        super().__init__(name, options)
        self.model = llama(options.width, options.layers, self.device)
        self.expected = self.model(*self.inputs(1))[0]
        known = name == "bf16" or name in CONFIGS
        rules = () if known else Recipe.of(RECIPES.get(name, name)).rules
        self.packs_caches = any(rule.scheme.kind == CACHE for rule in rules)
        self.step = None if self.packs_caches else self.compiled(self.model)
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

    def compile(self, batch: int) -> dict[str, Any]:
        self.state = None  # the cache of the last batch
        self.collect()
        self.state = self.inputs(batch)
        if self.packs_caches:
            self.state = self.own_cache(*self.state)
            self.collect()
        found = self.first(partial(self.advance, self.state), lambda y: distance(y, self.expected.expand_as(y)))
        return found | {"attention": self.attention()}

    def own_cache(self, ids: Tensor, position: Tensor, cache: Cache) -> tuple[Tensor, Tensor, Cache]:
        """Makes the step of a module that has the cache in it; what is left of the state."""
        if any(weight.is_meta for weight in self.model.parameters()):  # an earlier batch's step has its weights
            torch.manual_seed(0)
            self.model = llama(self.options.width, self.options.layers, self.device)
        fast = self.optimized(Resident(self.model, cache), (ids, position))
        self.reported(fast.report)
        self.step = lambda ids, position, cache: fast(ids, position)
        return ids, position, []

    def optimized(self, model: Resident, inputs: tuple[Tensor, Tensor]) -> aograph.OptimizedModule:
        options = {"dynamic": False} | ({"mode": "reduce-overhead"} if self.cuda else {})
        return aograph.optimize(model, RECIPES.get(self.name, self.name), inputs, dynamic_shapes=({}, {}),
                                hand_over=True, progress=False, compile_options=options)  # fmt: skip

    def attention(self) -> str:
        """The implementation of attention that torch chooses, or that of packed caches."""
        assert self.state is not None
        if self.packs_caches:
            return "kv_attention"
        keys, values = self.state[2][0]
        q = keys.new_empty(len(keys), self.model.layers[0].attention.heads, 1, HEAD)
        return SDPBackend(torch._fused_sdp_choice(q, keys, values, enable_gqa=True)).name

    def advance(self, state: tuple[Tensor, Tensor, Cache]) -> Tensor:
        """One step and its logits; ids and position are those of the next one afterwards."""
        ids, position, cache = state
        torch.compiler.cudagraph_mark_step_begin()
        logits, following = self.step(ids, position, cache)
        ids.copy_(following)
        position.add_(1)
        return logits

    def measure(self, limits: Ceilings) -> dict[str, Any]:
        assert self.state is not None
        seconds, steps = self.median(partial(self.advance, self.state))
        ids, _, cache = self.state
        size = self.linear_bytes + sum(keys.nbytes + values.nbytes for keys, values in cache)
        return {
            "ms": round(seconds * 1e3, 4),
            "tokens/s": round(len(ids) / seconds, 1),
            "bandwidth": round(size / seconds / limits.read, 4),
            "peak GB": self.peak(),
            "read GB": round(size / 1e9, 3),
            "steps": steps,
        }


def main(arguments: list[str] | None = None) -> None:
    parser = contest.parser(
        "python -m bench.decode", __doc__, ["bf16", "int8wo", "int4wo", "torchao-int8", "torchao-int4"]
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 64], help="rows, one token each")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096, help="hidden size, a multiple of 512; all sizes go with it")
    parser.add_argument("--window", type=int, default=1024, help="tokens in the cache")
    options = parser.parse_args(arguments)
    about = {"layers": options.layers, "width": options.width, "window": options.window}
    contest.run(DecodeWorker, options, "batch", sorted(options.batch), COLUMNS, about)


if __name__ == "__main__":
    main()
