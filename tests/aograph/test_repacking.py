import json
import operator

import pytest
import torch
from aograph.kernels.prune24 import prune24
from torch import nn

import aograph
from aograph import ArtifactError, InputError
from aograph.expression import Expression, Literal
from aograph.repacking import function, new_weights, originals_as_data, packs_as_data, read, written
from tests.small_models import MLP, Tied

CPU = torch.device("cpu")
aten = torch.ops.aten


def about_of(model, recipe, *inputs):
    """The part of an artifact's metadata that updates need, and the constants of the graph."""
    fast = aograph.optimize(model, recipe, inputs, compile=False)
    _, captured, _ = next(iter(fast._captures.values()))
    constants = captured.program.graph_module.state_dict()
    about = {
        "packs": packs_as_data({"forward": captured.program.packs}),
        "constants": {"forward": [name for name in constants if name in captured.program.weights]},
        "originals": originals_as_data(model.state_dict().items()),
        "aliases": captured.program.aliases,
    }
    return json.loads(json.dumps(about)), constants


class Merged(nn.Module):
    """Two linears that read the same input, with biases: their weights are packed together."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(64, 96), nn.Linear(64, 32), nn.Linear(2, 2)

    def forward(self, x):
        return self.a(x), self.b(x)


@pytest.mark.parametrize(
    "make, inputs",
    [(MLP, (torch.randn(3, 64),)), (Merged, (torch.randn(3, 64),)), (Tied, (torch.arange(12).view(2, 6),))],
)
@pytest.mark.parametrize(
    "recipe",
    [
        "int8wo",
        "int8wo(group_size=32)",
        "int4wo(group_size=32)",
        "int8dq(mapping=asymmetric)",
        "float8wo",
        "float8dq",
        "sparse24",
        "int8dq-sparse24",
    ],
)
def test_new_weights_become_what_packing_the_new_model_gives(make, inputs, recipe):
    torch.manual_seed(1)
    new = make()
    about, _ = about_of(make(), recipe, *inputs)
    _, expected = about_of(new, recipe, *inputs)
    made, packs = new_weights(about, new.state_dict(), CPU)
    assert packs == len(about["packs"]) and {name for _, name in made} == set(about["constants"]["forward"])
    for (_, name), tensor in made.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_a_bias_that_was_folded_needs_its_siblings():
    about, _ = about_of(Merged(), "int8wo", torch.randn(3, 64))
    with pytest.raises(InputError, match=r"a\.bias is packed together with b\.bias"):
        new_weights(about, {"a.bias": torch.ones(96)}, CPU)
    made, _ = new_weights(about, {"a.bias": torch.ones(96), "b.bias": torch.zeros(32)}, CPU)
    assert [t.sum().item() for t in made.values()] == [96]


def test_weights_that_no_graph_uses_are_taken():
    about, _ = about_of(Merged(), "int8wo", torch.randn(3, 64))
    assert new_weights(about, {"unused.weight": torch.ones(2, 2)}, CPU) == ({}, 0)


def test_tied_weights_under_either_name():
    about, _ = about_of(Tied(), "int8wo", torch.arange(12).view(2, 6))
    value = torch.randn(96, 64)
    by_first, _ = new_weights(about, {"embedding.weight": value}, CPU)
    by_second, _ = new_weights(about, {"head.weight": value}, CPU)
    assert by_first.keys() == by_second.keys() and len(by_first) == 3  # the table, and the head's q and scale
    with pytest.raises(InputError, match="tied"):
        new_weights(about, {"embedding.weight": value, "head.weight": value + 1}, CPU)


def test_the_caller_may_change_the_tensors_afterwards():
    about, _ = about_of(MLP(), "down:int8wo", torch.randn(3, 64))
    weight = torch.ones(128, 64)
    made, _ = new_weights(about, {"up.weight": weight}, CPU)
    weight.zero_()
    assert made["forward", "up.weight"].sum() == 128 * 64


def test_expressions_go_through_json():
    a, b = Expression("a"), Expression("b")
    cat = Expression(aten.cat.default, ([a, b], 0))
    split = Expression(operator.getitem, (Expression(aten.split_with_sizes.default, (cat, [1, 4])), 1))
    cast = Expression(aten.to.dtype, (split, torch.float64))
    tensors = {"a": torch.randn(2, 3), "b": torch.randn(3, 3)}
    kept = Expression(prune24, (Expression("c"), Literal(torch.rand(8))))
    tensors["c"] = torch.randn(3, 8)
    for each in (cast, kept):
        found = read(json.loads(json.dumps(written(each))), tensors.__getitem__)
        torch.testing.assert_close(found, each.evaluate(tensors.__getitem__), rtol=0, atol=0)


@pytest.mark.parametrize(
    "name",
    [
        "aten.add_.Tensor",
        "os.system",
        "prims.add.default",
        "aten.nothing.default",
        "aten.__class__.mro",
        "aograph.int8_linear.default",
        "",
    ],
)
def test_only_pure_operators_of_aten_are_read(name):
    with pytest.raises(ArtifactError, match="no pure operator"):
        function(name)


@pytest.mark.parametrize("data", [{"unreadable": "cpu"}, {"call": "aten.cat.default"}, {"dtype": "load"}, object()])
def test_what_cannot_be_read(data):
    with pytest.raises(ArtifactError, match="cannot be computed again"):
        read(data, lambda name: torch.ones(1))
