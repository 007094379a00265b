import torch
import torch.nn.functional as F
from aograph.passes import Stage
from torch import nn

from tests.programs import apply, operators, program_of, up_to
from tests.small_models import MLP, Counting, Tied

X = torch.randn(3, 64)


def test_packed_originals_leave_the_graph():
    program = program_of(MLP(), X)
    apply(program, *up_to(Stage.QUANTIZE))
    assert "up.weight" in program.weights
    (erased,) = apply(program, "eliminate_dead_code")
    assert erased == 2
    assert "up.weight" not in program.weights and "up.weight_q" in program.weights
    assert all(not row.notes for row in program.rows)
    assert apply(program, "eliminate_dead_code") == [0]


def test_merged_views_leave_the_graph():
    program = program_of(lambda m, x: (F.linear(x, m.w[:64]), F.linear(x, m.w[64:])), X, w=torch.randn(128, 64))
    apply(program, *up_to(Stage.CLEANUP))
    assert not {"aten.slice", "aten.cat"} & operators(program).keys()
    assert list(program.weights) == ["w_q", "w_scale"]


def test_writes_stay():
    program = program_of(Counting(), X)
    apply(program, *up_to(Stage.CLEANUP))
    assert operators(program)["aten.add_"] == 1 and "calls" in program.weights


def test_a_copy_that_is_kept_is_noted():
    program = program_of(Tied(), torch.arange(3)[None])
    apply(program, *up_to(Stage.CLEANUP))
    middle, head = program.rows
    assert not middle.notes
    assert head.notes == ["embedding.weight keeps its full-precision copy for the embedding in embedding"]
    assert {"embedding.weight", "embedding.weight_q"} <= program.weights.keys()


def test_a_copy_that_a_plain_linear_keeps_is_noted():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x).relu())

    program = program_of(Shared(), X)
    apply(program, *up_to(Stage.CLEANUP), recipe="int8wo+b:none")
    a, b = program.rows
    assert a.notes == ["a.weight keeps its full-precision copy for the linear in b"]
    assert b.outcome == "excluded"
