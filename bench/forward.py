"""What the benches of whole forwards share: one call of a compiled model, by each contender, case by case."""

from __future__ import annotations

from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from .device import Ceilings
from .worker import Worker, distance

Case = TypeVar("Case")

COLUMNS = ("what", "ms", "x bf16", "peak GB", "linear GB", "compile s", "error", "CUDA graph", "steps")


class ForwardWorker(Worker, Generic[Case]):
    """A contender on a model of its own for each case. A bench says what `made` is, and what to add to a row."""

    settings: ClassVar = {"max_autotune_pointwise": True}  # which our passes that quantize activations set anyway

    def made(self, case: Case) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The model of a case and its inputs, the same for all contenders. Its forward gives one tensor."""
        raise NotImplementedError

    def rates(self, case: Case, seconds: float) -> dict[str, Any]:
        """What else a row says of the time of a forward."""
        return {}

    def compile(self, case: Case) -> dict[str, Any]:
        self.case, self.run = case, None
        torch.compiler.reset()  # with the last case go its model, its code and its CUDA graphs
        self.collect()
        torch.manual_seed(0)
        model, inputs = self.made(case)
        expected = [model(*inputs)]
        forward = self.compiled(model)

        def run() -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            return forward(*inputs)

        self.run = run
        return self.first(run, lambda y: distance(y, expected.pop()))

    def measure(self, limits: Ceilings) -> dict[str, Any]:
        assert self.run is not None
        seconds, steps = self.median(self.run)
        row = {"ms": round(seconds * 1e3, 4), **self.rates(self.case, seconds)}
        return row | {"peak GB": self.peak(), "linear GB": round(self.linear_bytes / 1e9, 3), "steps": steps}
