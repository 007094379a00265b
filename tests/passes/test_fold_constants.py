import torch
from aograph.passes import Stage
from torch import nn

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
