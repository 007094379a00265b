import pytest
import torch
from torch import nn

from tests.programs import apply, operators, outputs, program_of

X, W = torch.randn(3, 8), torch.randn(8, 8)


def no_grad(m, x):
    with torch.no_grad():
        y = x @ m.w
    return y * 2


def several_outputs(m, x):
    with torch.no_grad():
        a, b = x @ m.w, x + 1
    return a * b


def nested(m, x):
    with torch.no_grad():
        y = x + 1
        with torch.enable_grad():
            y = y @ m.w
    return y


def autocast_off(m, x):
    with torch.autocast("cpu", enabled=False):
        y = x @ m.w
    return y.relu()


def autocast_on(m, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = x @ m.w
    return y.relu()


class InASubmodule(nn.Module):
    """Inference without gradients in a submodule, as vision towers of multimodal models do."""

    def __init__(self):
        super().__init__()
        self.tower = nn.Linear(8, 8)

    def forward(self, x):
        with torch.no_grad():
            return self.tower(x)


def wrapped(program):
    return sum(count for name, count in operators(program).items() if name.startswith("wrap_with"))


@pytest.mark.parametrize("function", [no_grad, several_outputs, nested, autocast_off])
@pytest.mark.parametrize("dynamic", [False, True])
def test_inlined(function, dynamic):
    with torch.enable_grad():
        program = program_of(function, X, dynamic=dynamic, w=W)
    expected = outputs(program, X)
    wrappers = wrapped(program)
    (matches,) = apply(program, "inline_subgraphs")
    assert wrapped(program) == 0 and matches >= wrappers
    assert operators(program)["aten.matmul"] == 1
    assert all("val" in n.meta for n in program.graph.nodes if n.op == "call_function")
    assert not any(n.op == "get_attr" and n.target not in program.weights for n in program.graph.nodes)
    torch.testing.assert_close(outputs(program, X), expected, rtol=0, atol=0)
    before = program.text()
    assert apply(program, "inline_subgraphs") == [0] and program.text() == before


def test_a_set_grad_region_is_wrapped_at_all():
    """That capture wraps what these tests are about."""

    def forward(m, x):
        with torch.enable_grad():
            y = x @ m.w
        return y * 2

    program = program_of(forward, X, w=W)
    assert wrapped(program) == 1
    assert apply(program, "inline_subgraphs") == [1]
    assert operators(program) == {"aten.matmul": 1, "aten.mul": 1}


def test_an_autocast_region_stays_and_is_a_near_miss():
    program = program_of(autocast_on, X, w=W)
    expected = outputs(program, X)
    before = program.text()
    assert apply(program, "inline_subgraphs") == [0] and program.text() == before
    apply(program, "remove_noops", "to_linear", "find_sites")
    (row,) = program.rows
    assert row.outcome == "near miss" and "which passes do not enter" in row.notes[0]
    torch.testing.assert_close(outputs(program, X), expected, rtol=0, atol=0)


def test_provenance_is_kept():
    program = program_of(InASubmodule(), X)
    apply(program, "inline_subgraphs", "remove_noops", "to_linear", "find_sites")
    (site,) = program.sites
    assert site.rows[0].name == "tower" and site.rows[0].module == "torch.nn.modules.linear.Linear"
