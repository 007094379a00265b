import json
import tempfile
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from aograph.passes import Stage
from torch import nn

from aograph import InputError, Int8WeightOnly, LinearStatistics, Recipe, RecipeError, Rule
from aograph.capture import capture
from aograph.reproducer import load, snapshot, versions, write
from tests.models.zoo import build
from tests.programs import apply, operators, program_of, up_to
from tests.small_models import MLP, Counting

X = torch.randn(3, 64)
INT8 = Recipe.of("int8wo")


@pytest.fixture(autouse=True)
def reproducers_go_here(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: self.linear(x), lambda x: x * float("inf"), (x,))


def loaded(program, folder, recipe=INT8):
    """The program of a reproducer, captured again."""
    module, inputs, shapes, read, _ = load(write(snapshot(program), recipe, folder=folder))
    assert read == recipe and all(t.is_meta for t in [*module.buffers(), *inputs] if isinstance(t, torch.Tensor))
    return capture(module, inputs, {}, shapes).program


def test_private_inputs(tmp_path):
    program = program_of(MLP(), X)
    program.private = frozenset(["x"])
    *_, how = load(write(snapshot(program), INT8, ["merge_linears"], folder=tmp_path))
    assert how == {"disable": ["merge_linears"], "private": ["x"]}


PROGRAMS = {
    "mlp": lambda dynamic: program_of(MLP(), X, dynamic=dynamic),
    "a written buffer": lambda dynamic: program_of(Counting(), X, dynamic=dynamic),
    "a subgraph": lambda dynamic: program_of(Conditional(), X, dynamic=dynamic),
    "plain inputs": lambda dynamic: capture(Plain(), (X, 3, None, 0.5, "same"), {}, None if dynamic else {}).program,
    "devices and dtypes": lambda dynamic: program_of(
        lambda m, x: x.to("cpu", torch.bfloat16) @ m.w.bfloat16() + torch.ones(64, device="cpu"), X,
        dynamic=dynamic, w=torch.randn(64, 64)),
}  # fmt: skip


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x, times, bias, scale, mode):
        return self.linear(x) * times * scale if mode == "same" and bias is None else x


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("make", PROGRAMS.values(), ids=PROGRAMS.keys())
def test_a_reproducer_is_the_graph(make, dynamic, tmp_path):
    program = make(dynamic)
    again = loaded(program, tmp_path)
    assert operators(again) == operators(program)
    assert again.constants.keys() == program.constants.keys()
    for name, tensor in program.constants.items():
        assert again.constants[name].shape == tensor.shape and again.constants[name].dtype == tensor.dtype
    symbolic = [
        [isinstance(s, torch.SymInt) for s in getattr(node.meta["val"], "shape", ())]
        for each in (program, again)
        for node in each.inputs
    ]
    assert symbolic[: len(symbolic) // 2] == symbolic[len(symbolic) // 2 :]


@pytest.mark.parametrize("name", ["llama_with_cache", "mixtral", "convnet"])
def test_whole_models_are_rewritten_the_same_way(name, tmp_path):
    model, inputs = build(name)
    program = capture(model, (), inputs).program
    again = loaded(program, tmp_path)
    outcomes = []
    for each in (program, again):
        apply(each, *up_to(Stage.CLEANUP))
        outcomes.append([(row.outcome, row.shape and (row.shape.N, row.shape.K)) for row in each.rows])
    assert outcomes[0] == outcomes[1]
    assert operators(program) == operators(again)


def test_no_weights_are_written(tmp_path):
    model = MLP()
    model.up.weight.data.fill_(1234.5)
    write(snapshot(program_of(model, X)), INT8, folder=tmp_path)
    files = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert sorted(files) == ["graph.py", "recipe.toml", "run.json"]
    assert not any("1234" in text for text in files.values())


def test_statistics_come_along(tmp_path):
    found = {"up.weight": LinearStatistics(-1.0, 2.0, torch.rand(64), 3)}
    loaded(program_of(MLP(), X), tmp_path, replace(INT8, statistics=found))


def test_versions(tmp_path):
    write(snapshot(program_of(MLP(), X)), INT8, ["merge_linears"], tmp_path)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run == {"disable": ["merge_linears"], "versions": versions()}
    assert versions()["torch"] == torch.__version__


def test_a_folder_is_made_if_none_is_given():
    one, two = (write(snapshot(program_of(MLP(), X)), INT8) for _ in range(2))
    assert one != two and one.is_dir()


def test_a_recipe_without_text_is_said_to_be_one(tmp_path):
    recipe = Recipe.of([Rule(Int8WeightOnly(), shape=lambda s: True)])
    write(snapshot(program_of(MLP(), X)), recipe, folder=tmp_path)
    assert "is a function" in (tmp_path / "recipe.toml").read_text()
    with pytest.raises(RecipeError):
        load(tmp_path)


def test_what_is_no_reproducer(tmp_path):
    with pytest.raises(InputError, match=r"it has no graph.py and no recipe.toml and no run.json"):
        load(tmp_path)
    (tmp_path / "graph.py").write_text("")
    with pytest.raises(InputError, match=r"it has no recipe.toml and no run.json"):
        load(tmp_path)


def test_a_snapshot_is_taken_before_the_graph_changes():
    program = program_of(lambda m, x: F.linear(x, m.w) + m.w[0], X, w=torch.randn(64, 64))
    before = snapshot(program)
    apply(program, *up_to(Stage.CLEANUP))
    assert snapshot(program_of(lambda m, x: F.linear(x, m.w) + m.w[0], X, w=torch.randn(64, 64))) == before
