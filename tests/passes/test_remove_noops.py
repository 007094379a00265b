import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.programs import apply, operators, outputs, program_of

X, W = torch.randn(3, 8), torch.randn(8, 8)


def plus(function):
    """Between two operators, so that neither an input nor an output is touched."""
    return lambda m, x: function(x + 1) * 2


REMOVED = {
    "detach": plus(lambda x: x.detach()),
    "alias": plus(torch.ops.aten.alias),
    "clone": plus(lambda x: x.clone()),
    "contiguous": plus(torch.ops.aten.contiguous),
    "cast to the same dtype": plus(lambda x: x.to(torch.float32)),
    "cast that copies": plus(lambda x: x.to(torch.float32, copy=True)),
    "to the same device": plus(lambda x: x.to("cpu", torch.float32)),
    "to another's": plus(lambda x: x.to(x)),
    "float of a float": plus(lambda x: x.float()),
    "a slice of all": plus(lambda x: torch.ops.aten.slice(x, 0, 0, 2**63 - 1)),
    "dropout": plus(lambda x: F.dropout(x, 0.3, training=False)),
    "feature dropout": plus(lambda x: torch.feature_dropout(x, 0.3, False)),
    "several": plus(lambda x: F.dropout(x.clone().detach().float(), 0.1, False).contiguous()),
}


@pytest.mark.parametrize("function", REMOVED.values(), ids=REMOVED.keys())
@pytest.mark.parametrize("dynamic", [False, True])
def test_removed(function, dynamic):
    program = program_of(function, X, dynamic=dynamic)
    expected = outputs(program, X)
    (matches,) = apply(program, "remove_noops")
    assert matches >= 1
    assert operators(program) == {"aten.add": 1, "aten.mul": 1}
    assert torch.equal(outputs(program, X)[0], expected[0])
    before = program.text()
    assert apply(program, "remove_noops") == [0] and program.text() == before


KEPT = {
    "a slice of some": (plus(lambda x: x[1:]), "aten.slice"),
    "a slice in steps": (plus(lambda x: x[:, ::2]), "aten.slice"),
    "a cast": (plus(lambda x: x.double()), "aten.to"),
    "a change of layout": (plus(lambda x: x.t().contiguous()), "aten.contiguous"),
    "a clone in another layout": (
        plus(lambda x: x[None, :, :, None].clone(memory_format=torch.channels_last)), "aten.clone"),
    "active dropout": (plus(lambda x: F.dropout(x, 0.3, training=True)), "aten.dropout"),
    "a clone that is written": (plus(lambda x: x.clone().add_(x)), "aten.clone"),
    "a clone of what is written": (lambda m, x: clone_then_write(x + 1), "aten.clone"),
    "a clone of an input": (lambda m, x: x.clone(), "aten.clone"),
    "a clone that is an output": (lambda m, x: (y := x + 1, y.clone()), "aten.clone"),
}  # fmt: skip


def clone_then_write(y):
    kept = y.clone()
    y.add_(1)
    return kept * y


@pytest.mark.parametrize("function, operator", KEPT.values(), ids=KEPT.keys())
def test_kept(function, operator):
    program = program_of(function, X)
    torch.manual_seed(1)
    expected = outputs(program, X)
    apply(program, "remove_noops")
    assert operators(program)[operator] == 1
    torch.manual_seed(1)
    torch.testing.assert_close(outputs(program, X), expected, rtol=0, atol=0)


def test_asserts_are_removed():
    def forward(m, x):
        torch._assert_async((x > -100).all(), "far too small")
        return x + 1

    program = program_of(forward, X)
    assert any("assert" in name for name in operators(program))
    apply(program, "remove_noops")
    assert operators(program) == {"aten.add": 1}


def test_dead_calls_and_weights_go_and_writes_stay():
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            self.linear(x)
            self.calls.add_(1)
            return x * 2

    program = program_of(Dead(), X)
    apply(program, "remove_noops")
    assert operators(program) == {"aten.add_": 1, "aten.mul": 1}
    assert list(program.weights) == ["calls"]
