import argparse

import pytest
import torch
from torch import nn

from bench import forward, worker
from bench.device import Ceilings
from bench.forward import ForwardWorker

OPTIONS = argparse.Namespace(device="cpu", autotune=[])
LIMITS = Ceilings(read=1e9, matmul=1e12)


class Squares(ForwardWorker[int]):
    """A case is the width of a square linear."""

    def made(self, case):
        return nn.Linear(case, case, bias=False), (torch.randn(2, case),)

    def rates(self, case, seconds):
        return {"rows/s": case / seconds}

    def compiled(self, model):
        self.linear_bytes = model.weight.nbytes
        return lambda x: model(x) * (1.25 if self.name == "wrong" else 1)


@torch.no_grad()
def test_each_case_has_a_model_of_its_own(monkeypatch):
    monkeypatch.setattr(worker, "STEPS", (2, 3))
    monkeypatch.setattr(forward.torch.compiler, "reset", lambda: None)
    right, wrong = Squares("bf16", OPTIONS), Squares("wrong", OPTIONS)
    for case in (4096, 8):
        assert right.compile(case)["error"] == 0
        assert wrong.compile(case)["error"] == pytest.approx(0.25)
        row = right.measure(LIMITS)
        assert row["rows/s"] == pytest.approx(case / row["ms"] * 1e3, rel=0.05)
        assert row["linear GB"] == round(4 * case * case / 1e9, 3)
        assert row["steps"] in (2, 3)
