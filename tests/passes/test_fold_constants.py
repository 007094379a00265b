import pytest
import torch
from aograph.passes import Stage
from torch import nn

from aograph import optimize

from ..programs import Function, apply, find, operators, outputs, program_of, up_to

X = torch.randn(3, 64)


class Siblings(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, x):
        return self.a(x), self.b(x)


def test_the_joint_bias_of_merged_linears_is_computed_once():
    program = program_of(Siblings(), X)
    apply(program, *up_to(Stage.QUANTIZE))
    assert operators(program)["aten.cat"] >= 1
    apply(program, "fold_constants", "eliminate_dead_code")
    assert operators(program)["aten.cat"] == 0
    (folded,) = [pack for pack in program.packs.values() if pack.op is None]
    assert folded.weight.leaves == ["a.bias", "b.bias"]
    bias = find(program, "aograph.int8_linear").args[3]
    assert bias.target == folded.names[0] and bias.meta["val"].shape == (96,)


def test_what_it_leaves():
    """Views cost nothing, large results cost memory, and what depends on x is no constant."""
    large = torch.randn(1024, 1024)
    program = program_of(
        Function(lambda m, x: (x + m.w.t()[:1], x.sum() + m.large.exp(), x * 2), w=torch.randn(64, 3), large=large), X
    )
    assert apply(program, "fold_constants") == [0]


def test_values_and_a_second_run():
    model = Function(lambda m, x: x + m.w.exp(), w=torch.randn(64))
    program = program_of(model, X)
    before = outputs(program, X)[0]
    assert apply(program, "fold_constants") == [1]
    assert apply(program, "fold_constants") == [0]
    (pack,) = program.packs.values()
    with torch.no_grad():
        (value,) = pack.function(pack.weight.evaluate(lambda name: model.get_parameter(name)))
    assert torch.equal(X + value, before)


class WithBuffer(nn.Module):
    def __init__(self, function, buffer):
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.function = function
        self.register_buffer("buffer", buffer)

    def forward(self, x):
        return self.function(self.buffer, self.linear(x))


VALUES = {
    "a mask of -inf": (lambda b, y: (y + b.triu(1)).softmax(-1), torch.full((3, 64), -torch.inf).triu(2)),
    "nan": (lambda b, y: torch.where(b.isnan(), y, 0), torch.full((3, 64), torch.nan)),
    "booleans": (lambda b, y: y.masked_fill(~b, 0), torch.ones(3, 64, dtype=torch.bool)),
    "complex": (lambda b, y: y * (b * b).real, torch.full((3, 64), 1 + 2j)),
    "nothing": (lambda b, y: y + (b * 2).sum(), torch.ones(0, 64)),
}


@pytest.mark.parametrize("function, buffer", VALUES.values(), ids=VALUES.keys())
def test_any_value_may_be_folded(function, buffer):
    model = WithBuffer(function, buffer).eval()
    y = optimize(model, "int8wo", X, compile=False)(X)
    torch.testing.assert_close(y, model(X).detach(), rtol=0.1, atol=0.1)


def test_a_joint_bias_with_nan_is_the_users_own():
    model = Siblings().eval()
    model.a.bias.data[0] = torch.nan
    a, b = optimize(model, "int8wo", X, compile=False)(X)
    assert a[:, 0].isnan().all() and a[:, 1:].isfinite().all() and b.isfinite().all()


@pytest.mark.parametrize("function", [lambda b, y: (y, b.exp()), lambda b, y: (y, b.exp().t())], ids=["whole", "view"])
def test_what_is_returned_is_fresh_each_time(function):
    model = WithBuffer(function, torch.ones(3, 64)).eval()
    optimized = optimize(model, "int8wo", X, compile=False)
    first = optimized(X)[1]
    kept = first.clone()
    first.mul_(2)
    assert torch.equal(optimized(X)[1], kept)
