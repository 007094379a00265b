import functools

import pytest
import torch
from aograph.passes import Stage
from torch import nn

from aograph.capture import capture, no_fast_paths
from aograph.dynamo import from_dynamo
from tests.models.zoo import build
from tests.programs import apply, up_to
from tests.small_models import MLP

X = torch.randn(3, 64)


def through_dynamo(model, inputs):
    """The program of the graph that torch.compile hands to a backend."""
    seen = []

    def backend(graph_module, example_inputs):
        seen.append(from_dynamo(graph_module, example_inputs).program)
        return graph_module.forward

    with torch.no_grad(), no_fast_paths():
        torch.compile(model, backend=backend, dynamic=False, fullgraph=True)(**inputs)
    (program,) = seen
    return program


def static(model, inputs):
    return capture(model, (), inputs, dict.fromkeys(inputs)).program


@pytest.mark.parametrize("name", ["mlp", "llama", "bert", "transformer_encoder", "convnet", "mixture", "functional"])
def test_both_doors_give_the_same_graph(name, fresh_compiler):
    model, inputs = (MLP().eval(), {"x": X}) if name == "mlp" else build(name)
    exported, compiled = static(model, inputs), through_dynamo(model, inputs)
    for program in (exported, compiled):
        apply(program, *up_to(Stage.NORMALIZE))
    assert exported.canonical() == compiled.canonical()
    assert exported.constants.keys() == compiled.constants.keys()
    for key, tensor in exported.constants.items():
        assert compiled.constants[key].data_ptr() == tensor.data_ptr(), key


def decorated(forward):
    @functools.wraps(forward)
    def wrapped(*args, **kwargs):
        return forward(*args, **kwargs)

    return wrapped


class Decorated(MLP):
    forward = decorated(MLP.forward)


def test_a_decorated_forward_leaves_names_as_they_are(fresh_compiler):
    program = through_dynamo(Decorated().eval(), {"x": X})
    assert program.constants.keys() == static(MLP().eval(), {"x": X}).constants.keys()


def test_dynamo_finds_the_same_sites(fresh_compiler):
    rows = []
    for program in (static(MLP().eval(), {"x": X}), through_dynamo(MLP().eval(), {"x": X})):
        apply(program, *up_to(Stage.CLEANUP))
        rows.append([row.as_dict() for row in program.rows])
    assert rows[0] == rows[1]


class Mapped(nn.Module):
    """One linear inside of torch.vmap, one behind it; a bitwise `and`, which torch refuses outside of its level."""

    def __init__(self):
        super().__init__()
        self.inside, self.outside = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.outside(torch.vmap(lambda each: self.inside(each).where((each > 0) & (each < 1), 0))(x))


def test_what_is_inside_of_vmap_stays(fresh_compiler):
    model = Mapped()
    for program in (static(model, {"x": X}), through_dynamo(model, {"x": X})):
        apply(program, *up_to(Stage.CLEANUP))
        assert [(row.name, row.outcome, row.notes) for row in program.rows] == [
            ("inside", "near miss", ["it is inside of torch.vmap"]), ("outside", "rewritten", []),
        ]  # fmt: skip
    fast = torch.compile(model, backend="aograph", options={"recipe": "int8wo", "compile": False})
    with torch.no_grad():
        assert 0 < (fast(X) - model(X)).norm() / model(X).norm() < 0.02


@pytest.mark.parametrize("dynamic", [False, True])
def test_levels_of_vmap_in_others_bring_no_constants(dynamic, fresh_compiler):
    reports = []
    model = nn.Sequential(nn.Linear(64, 64), Nested())
    options = {"recipe": "int8wo", "compile": False, "report": reports.append}
    fast = torch.compile(model, backend="aograph", dynamic=dynamic, options=options)
    with torch.no_grad():
        assert 0 < (fast(X) - model(X)).norm() / model(X).norm() < 0.02
    assert [report.bytes_before for report in reports] == [65 * 64 * 4]


class Nested(nn.Module):
    def forward(self, x):
        return torch.vmap(torch.vmap(lambda each: each.sin() + 1), in_dims=1, out_dims=1)(x)
