"""What a contender of a contest does in its own process: a model compiled as its name says, and timed."""

from __future__ import annotations

import argparse
import collections
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .contenders import TORCHAO, stored_bytes
from .device import timed

STEPS = (10, 100)  # the fewest and the most that are timed,
SECONDS = 3.0  # and for how long about

# The configurations of torchao's quantize_, by contender; each is made of the module torchao.quantization.
CONFIGS: dict[str, Callable[[Any], Any]] = {
    "torchao-int8": lambda ao: ao.Int8WeightOnlyConfig(),
    "torchao-int4": lambda ao: ao.Int4WeightOnlyConfig(group_size=64, int4_packing_format="tile_packed_to_4d"),
    "torchao-int8dq": lambda ao: ao.Int8DynamicActivationInt8WeightConfig(),
    "torchao-float8dq": lambda ao: ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow()),
}


class Worker:
    """One contender: "bf16", one of `CONFIGS`, or else a recipe behind backend="aograph".

    A bench adds `compile(case)` and `measure(limits)`. recipes: those that have another name. settings: Inductor's, of
    all contenders.
    """

    recipes: ClassVar[Mapping[str, str]] = {}
    settings: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, name: str, options: argparse.Namespace):
        self.name, self.options, self.device = name, options, torch.device(options.device)
        self.cuda = self.device.type == "cuda"
        self.kernels: collections.Counter[str] = collections.Counter()
        self.linear_bytes = 0
        torch.manual_seed(0)

    def compiled(self, model: nn.Module) -> Callable[..., Any]:
        """The model under torch.compile, in CUDA graphs, with the settings that its users give it."""
        self.linear_bytes = sum(stored_bytes(weight) for weight in linear_weights(model))
        mode = "max-autotune" if self.name in self.options.autotune else "reduce-overhead"
        graphs = {**self.settings, **torch._inductor.list_mode_options(mode)} if self.cuda else {}
        compiled = partial(torch.compile, model, fullgraph=True, dynamic=False)
        if self.name == "bf16":
            return compiled(options=graphs)
        if self.name in CONFIGS:
            self.quantize(model)
            return compiled(options=TORCHAO | graphs)
        own = {"recipe": self.recipes.get(self.name, self.name), "report": self.reported, "model": model}
        return compiled(backend="aograph", options=own | graphs | ({"release": True} if self.cuda else {}))

    def quantize(self, model: nn.Module) -> None:
        import torchao.quantization as ao

        ao.quantize_(model, CONFIGS[self.name](ao))
        weights = linear_weights(model)
        self.linear_bytes = sum(map(stored_bytes, weights))
        self.kernels = collections.Counter(type(weight).__name__ for weight in weights)

    def reported(self, report: Any) -> None:
        self.linear_bytes = sum(row.bytes_after for row in report.rows)
        self.kernels = collections.Counter(row.kernel or row.outcome for row in report.rows)

    def first(self, run: Callable[[], Tensor], error: Callable[[Tensor], float]) -> dict[str, Any]:
        """The first three runs: CUDA graphs are recorded in the second, and replayed from the third on.

        error: of what the first one gave.
        """
        skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
        start = time.perf_counter()
        found = error(run())
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()  # packing is over
        for _ in range(2):
            run()
        self.wait()
        return {
            "compile s": round(time.perf_counter() - start, 1),
            "error": round(found, 4),
            "CUDA graph": self.cuda and torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == skips,
            "kernels": dict(self.kernels),
        }

    def median(self, run: Callable[[], Any]) -> tuple[float, int]:
        """Seconds of a run, from start to end on the device: the median, and of how many."""
        once = statistics.median(timed(run, self.device)() for _ in range(3))
        fewest, most = STEPS
        steps = [timed(run, self.device) for _ in range(max(fewest, min(most, int(SECONDS / once))))]
        return statistics.median(step() for step in steps), len(steps)

    def peak(self) -> float | None:
        """GB of torch's allocator at the most since the first run."""
        return round(torch.cuda.max_memory_allocated() / 1e9, 2) if self.cuda else None

    def collect(self) -> None:
        """Frees what nothing holds any more."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def linear_weights(model: nn.Module) -> list[Tensor]:
    return [module.weight for module in model.modules() if isinstance(module, nn.Linear)]


def distance(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖, in fp32."""
    expected = expected.float()
    return float((found.float() - expected).norm() / expected.norm())
