"""The pass; its rules are in tests/patterns/test_linear.py."""

import pytest
import torch
import torch.nn.functional as F
from aograph.passes import Stage

from tests.models.zoo import build
from tests.programs import apply, operators, outputs, program_of, up_to

X, W = torch.randn(2, 3, 8), torch.randn(8, 8)


def test_all_in_one_graph():
    def forward(m, x):
        y = F.linear(torch.einsum("bsd,dn->bsn", x @ m.w, m.w), m.w)
        return torch.addmm(y[0, 0], y[0], m.w)

    program = program_of(forward, X, w=W)
    expected = outputs(program, X)
    assert apply(program, "to_linear") == [3]
    assert operators(program)["aten.linear"] == 4
    torch.testing.assert_close(outputs(program, X), expected)


def test_the_nearest_miss_stays_with_its_node():
    program = program_of(lambda m, x: torch.einsum("bsd,nd", x, m.w), X, w=W)
    assert apply(program, "to_linear") == [0]
    (miss,) = (n.meta["miss"] for n in program.graph.nodes if "miss" in n.meta)
    assert "implicit" in miss


def test_nothing_dead_is_left():
    program = program_of(lambda m, x: x @ m.w.T, X, w=W)
    apply(program, "to_linear")
    assert operators(program) == {"aten.linear": 1}


@pytest.mark.parametrize("name", ["functional", "convnet", "transformer_encoder"])
def test_normalizing_twice_changes_nothing(name):
    model, inputs = build(name)
    program = program_of(model, *inputs.values(), dynamic=True)
    expected = outputs(program, *inputs.values())
    assert sum(apply(program, *up_to(Stage.NORMALIZE))) > 0
    torch.testing.assert_close(outputs(program, *inputs.values()), expected, rtol=1e-4, atol=1e-4)
    before = program.text()
    assert not any(apply(program, *up_to(Stage.NORMALIZE))) and program.text() == before
