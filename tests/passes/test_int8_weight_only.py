"""Linears under the rule become `aograph::int8_linear`."""

import pytest
import torch
import torch.nn.functional as F
from aograph.kernels import int8_linear
from aograph.passes import Stage

from aograph import Int8WeightOnly
from aograph.weights import WeightStore
from tests.programs import apply, find, operators, outputs, program_of, up_to
from tests.small_models import MLP

X, W = torch.randn(3, 64), torch.randn(48, 64)


def rewritten(model, *inputs, recipe="int8wo", dynamic=False, **weights):
    program = program_of(model, *inputs, dynamic=dynamic, **weights)
    program.matches = apply(program, *up_to(Stage.QUANTIZE), "eliminate_dead_code", recipe=recipe)
    return program


def materialized(program, model=None):
    store = WeightStore(model or torch.nn.Module(), torch.device("cpu"), hand_over=False)
    store.materialize(program)
    program.graph_module.recompile()
    return program


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 5, 64)])
@pytest.mark.parametrize("bias", [False, True])
def test_every_shape_of_x(shape, bias, dynamic):
    def forward(m, x):
        return F.linear(x, m.w, m.b if bias else None)

    x, b = torch.randn(shape), torch.randn(48)
    program = materialized(rewritten(forward, x, dynamic=dynamic, w=W, b=b))
    assert operators(program) == {"aograph.int8_linear": 1}
    expected = F.linear(x, int8_linear.unpack(*int8_linear.pack(W)), b if bias else None)
    torch.testing.assert_close(outputs(program, x)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("algorithm", ["minmax", "mse"])
def test_the_algorithm_reaches_the_packing(algorithm):
    program = materialized(rewritten(lambda m, x: F.linear(x, m.w), X, recipe=Int8WeightOnly(algorithm=algorithm), w=W))
    q, scale = int8_linear.pack(W, algorithm)
    state = dict(program.graph_module.named_buffers())
    assert torch.equal(state["w_q"], q) and torch.equal(state["w_scale"], scale)


@pytest.mark.parametrize("group_size", [32, 64])
def test_groups_reach_packing_and_row(group_size):
    recipe = f"int8wo(group_size={group_size})"
    program = materialized(rewritten(lambda m, x: F.linear(x, m.w), X, recipe=recipe, w=W))
    (row,) = program.rows
    assert row.outcome == "rewritten" and row.scheme == recipe and row.kernel and not row.notes
    assert row.bytes_after == 48 * 64 + 48 * 64 // group_size * 4
    q, scale = int8_linear.pack(W, "minmax", group_size)
    state = dict(program.graph_module.named_buffers())
    assert torch.equal(state["w_q"], q) and torch.equal(state["w_scale"], scale)
    expected = F.linear(X, int8_linear.unpack(q, scale))
    torch.testing.assert_close(outputs(program, X)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("K, hint", [(96, " (32 would be)"), (33, "")])
def test_a_group_size_that_does_not_divide(K, hint):
    x = torch.randn(3, K)
    program = rewritten(lambda m, x: F.linear(x, m.w), x, recipe="int8wo(group_size=64)", w=torch.randn(48, K))
    assert operators(program) == {"aten.linear": 1} and not program.packs
    (row,) = program.rows
    assert row.outcome == "near miss" and row.bytes_after == row.bytes_before
    assert row.notes == [f"K = {K} is not divisible by the group size 64{hint}"]


def test_merged_siblings_share_one_pack_in_groups():
    v = torch.randn(80, 64)
    both = rewritten(lambda m, x: (F.linear(x, m.w), F.linear(x, m.v)), X, recipe="int8wo(group_size=32)", w=W, v=v)
    assert operators(both)["aograph.int8_linear"] == 1
    (pack,) = both.packs.values()
    assert pack.names == ("w_v_q", "w_v_scale") and [row.name for row in both.rows] == ["w", "v"]
    for y, weight in zip(outputs(materialized(both), X), (W, v), strict=True):
        expected = F.linear(X, int8_linear.unpack(*int8_linear.pack(weight, group_size=32)))
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_the_row():
    program = rewritten(MLP(), X)
    for row, (N, K) in zip(program.rows, [(128, 64), (64, 128)], strict=True):
        assert row.outcome == "rewritten" and row.scheme == "int8wo" and row.kernel and not row.notes
        assert row.bytes_after == N * K + 4 * N and row.bytes_before == 4 * N * K


def test_fake_weights_are_all_that_a_pass_needs():
    program = rewritten(MLP(), X)
    call = next(n for n in program.graph.nodes if "int8_linear" in str(n.target))
    q, scale = call.args[1:3]
    assert q.meta["val"].shape == (128, 64) and q.meta["val"].dtype == torch.int8
    assert q.target == "up.weight_q" and scale.target == "up.weight_scale"
    assert program.graph_module.get_buffer("up.weight_q").is_meta  # packed by the store


def test_provenance_is_kept():
    program = rewritten(lambda m, x: F.linear(x, m.w), X, w=W)
    assert find(program, "aograph.int8_linear").meta["operator"] == "linear"


def test_a_rule_for_another_scheme_is_left_alone():
    program = program_of(MLP(), X)
    apply(program, *up_to(Stage.FUSE), recipe="int4wo")
    before = program.text()
    assert apply(program, "int8_weight_only", recipe="int4wo") == [0] and program.text() == before


def test_one_weight_at_two_places_is_one_pack():
    program = rewritten(lambda m, x: F.linear(F.linear(x, m.w).relu() @ m.v, m.w), X, w=W, v=torch.randn(48, 64))
    assert operators(program)["aograph.int8_linear"] == 3 and len(program.packs) == 2
    assert sorted(len(pack.rows) for pack in program.packs.values()) == [1, 2]


def test_one_weight_under_two_schemes_is_two_packs():
    class Shared(MLP):
        def __init__(self):
            super().__init__()
            self.other = torch.nn.Linear(64, 128)
            self.other.weight = self.up.weight

        def forward(self, x):
            return super().forward(x) + self.down(self.other(x.relu()))

    program = materialized(rewritten(Shared(), X, recipe="int8wo+other:int8wo(algorithm=mse)"))
    assert len(program.packs) == 3
    names = [name for pack in program.packs.values() for name in pack.names]
    assert len(set(names)) == len(names) == 6
