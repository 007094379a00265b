"""Linears under the rule become `aograph::int4_linear`."""

import pytest
import torch
import torch.nn.functional as F
from aograph.kernels import int4_linear
from aograph.passes import Stage
from torch import nn

from aograph import Int4WeightOnly
from aograph.weights import WeightStore
from tests.programs import apply, operators, outputs, program_of, up_to

X, W = torch.randn(3, 128), torch.randn(48, 128)


def rewritten(model, *inputs, recipe, dynamic=False, **weights):
    program = program_of(model, *inputs, dynamic=dynamic, **weights)
    apply(program, *up_to(Stage.QUANTIZE), "eliminate_dead_code", recipe=recipe)
    return program


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("algorithm", ["minmax", "mse"])
@pytest.mark.parametrize("bias", [False, True])
def test_group_sizes(group_size, algorithm, bias, dynamic):
    b = torch.randn(48) if bias else None
    weights = {"w": W} | ({"b": b} if bias else {})
    program = rewritten(
        lambda m, x: F.linear(x, m.w, m.b if bias else None), X,
        recipe=Int4WeightOnly(group_size, algorithm), dynamic=dynamic, **weights,
    )  # fmt: skip
    assert operators(program) == {"aograph.int4_linear": 1}
    (row,) = program.rows
    padded = 64  # 48 channels fill one panel
    assert row.bytes_after == padded * 128 // 2 + 128 // group_size * padded * 2 * 4
    WeightStore(nn.Module(), torch.device("cpu"), hand_over=False).materialize(program)
    program.graph_module.recompile()
    unpacked = int4_linear.unpack(*int4_linear.pack(W, group_size, algorithm), group_size, 48)
    torch.testing.assert_close(outputs(program, X)[0], F.linear(X, unpacked, b), rtol=1e-4, atol=1e-4)


def test_the_kernel_of_the_report_is_chosen_for_the_linear_not_its_panels(monkeypatch):
    asked = []
    monkeypatch.setattr(int4_linear.int4_linear, "plan", lambda case, lo, hi: asked.append(case) or "any")
    program = rewritten(lambda m, x: F.linear(x, m.w), X, recipe=Int4WeightOnly(64), w=W)
    assert program.rows[0].kernel == "any"
    assert [(case.N, case.K, case.group_size) for case in asked] == [(48, 128, 64)]


@pytest.mark.parametrize(
    "K, group_size, note",
    [
        (96, 64, "K = 96 is not divisible by the group size 64 (32 would be)"),
        (192, 128, "K = 192 is not divisible by the group size 128 (64 would be)"),
        (40, 32, "K = 40 is not divisible by the group size 32"),
    ],
)
def test_a_group_size_that_does_not_divide(K, group_size, note):
    x = torch.randn(3, K)
    program = program_of(lambda m, x: F.linear(x, m.w), x, w=torch.randn(48, K))
    apply(program, *up_to(Stage.FUSE), recipe=Int4WeightOnly(group_size))
    before = program.text()
    assert apply(program, "int4_weight_only", recipe=Int4WeightOnly(group_size)) == [0]
    assert program.text() == before and not program.packs
    (row,) = program.rows
    assert row.outcome == "near miss" and row.notes == [note] and row.bytes_after == row.bytes_before


def test_merged_siblings_share_one_pack():
    program = rewritten(
        lambda m, x: (F.linear(x, m.a), F.linear(x, m.b)), X, recipe="int4wo", a=W, b=torch.randn(80, 128)
    )
    assert operators(program)["aograph.int4_linear"] == 1
    (pack,) = program.packs.values()
    assert pack.names == ("a_b_q", "a_b_scale_zero") and [row.name for row in pack.rows] == ["a", "b"]


def test_both_schemes_in_one_program():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(128, 64), nn.Linear(64, 128)

        def forward(self, x):
            return self.b(self.a(x))

    program = rewritten(Two(), X, recipe="int4wo + b:int8wo")
    assert operators(program) == {"aograph.int4_linear": 1, "aograph.int8_linear": 1}
    assert [row.scheme for row in program.rows] == ["int4wo", "int8wo"]
