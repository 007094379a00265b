"""What is measured, and what is told of it; the command is tested in test_cli.py, the measuring in tests/kernels."""

import warnings
from dataclasses import replace

import pytest
import torch
from aograph.kernels import cuda_linear, cuda_scaled_linear, plans
from torch import nn

from aograph import InputError, Recipe, tune
from aograph.schemes import PRESETS
from aograph.tune import Linear

CPU = torch.device("cpu")


def model():
    """Two linears that become one, and one of a shape that no kernel takes."""
    torch.manual_seed(0)
    return Siblings().eval(), torch.randn(3, 128)


class Siblings(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.last = nn.Linear(128, 64), nn.Linear(128, 192), nn.Linear(64, 36)

    def forward(self, x):
        return self.last(self.left(x) * self.right(x)[:, 128:])


def of_model(recipe):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = tune.of_model(*model(), Recipe.of(recipe), CPU)
    return found, [str(each.message) for each in warned]


def test_kinds_are_presets_under_which_the_kernels_look_for_plans():
    kinds = {*cuda_linear.KINDS.values(), *cuda_scaled_linear.KINDS.values()}
    assert tune.KINDS.keys() == kinds and kinds <= PRESETS.keys()
    for kind in tune.KINDS.values():
        assert any(each.name == "cuda" for each in kind.op)


@pytest.mark.parametrize("name", tune.KINDS)
def test_each_kind_has_shipped_plans_and_takes_their_shapes(name):
    kind = tune.KINDS[name]
    shapes = plans.read(plans.shipped(), name, kind.plan)
    assert shapes and all(kind.takes(*shape) is True for shape in shapes)
    assert all(len(found) == len(kind.tokens) for found in shapes.values())


@pytest.mark.parametrize(
    "recipe, kind, group",
    [
        ("int4wo(group_size=32)", "int4wo", (32,)),
        ("int8wo", "int8wo", ()),
        ("int8wo(group_size=64)", "int8wo", (64,)),
        ("int8dq", "int8dq", ()),
        ("int8dq(mapping=asymmetric)", "int8dq", ()),
        ("float8dq", "float8dq", ()),
        ("sparse24", "sparse24", ()),
        ("int8dq-sparse24", "int8dq-sparse24", ()),
        ("float8dq-sparse24", "float8dq-sparse24", ()),
    ],
)
def test_what_the_passes_leave(recipe, kind, group, monkeypatch):
    monkeypatch.setattr("aograph.passes.sparse24.pays", lambda case, op: True)
    found, (warned,) = of_model(recipe)
    assert found == [Linear(kind, (256, 128, *group))]
    assert warned.startswith("36x64 under ") and " is not measured: " in warned


@pytest.mark.parametrize(
    "recipe, message",
    [
        ("float8wo", "the recipe '→ float8wo' leaves no linear to measure"),
        ("sparse24", "leaves no linear to measure: .*dense: no sparse kernel on cpu"),
        (
            "float8dq(granularity=block) + last:none",
            "256x128 under float8dq in groups of 128 is not measured: .*blocks",
        ),
    ],
)
def test_no_linear_to_measure_is_a_warning(recipe, message):
    with pytest.warns(UserWarning, match=message):
        assert tune.of_model(*model(), Recipe.of(recipe), CPU) == []


def test_shapes_under_schemes():
    found = tune.of_shapes(["256x128", "64×512"], ["int4wo", "sparse24"], 128)
    assert [str(each) for each in found] == [
        "256x128 under int4wo in groups of 128", "256x128 under sparse24",
        "64x512 under int4wo in groups of 128", "64x512 under sparse24",
    ]  # fmt: skip
    with pytest.raises(InputError, match="do not take 100x128 under int8dq: N is not a multiple of 8"):
        tune.of_shapes(["100x128"], ["int8dq"], 64)


def test_rows_say_what_was_measured(monkeypatch):
    plan = cuda_scaled_linear.ScaledPlan(2, 1, 4, 1, 64, 8, 4)

    def fastest(N, K, each):
        each(1, 3.0, 0.0, plan)
        each(1, 4.0, 0.0, None)
        each(16, 5.0, 0.0, plan)
        return [plan, plan]

    monkeypatch.setitem(tune.KINDS, "sparse24", replace(tune.KINDS["sparse24"], tokens=(1, 16), fastest=fastest))
    found, rows = tune.measure(Linear("sparse24", (256, 128)))
    assert found == [plan, plan]
    words = "64 channels × 8 tokens, 2 blocks share K"
    assert rows == [
        ("256x128", "sparse24", 1, words, 3.0, "dense", 4.0), ("256x128", "sparse24", 16, words, 5.0, "", None)
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "[]", '{"about": {}, "plans": {}}', '{"measured": {"sparse24": {"x": {}}}}'])
def test_a_file_that_is_none_is_an_error(text, tmp_path):
    path = tmp_path / "plans.json"
    tune.check_plans(path)
    path.write_text(text)
    with pytest.raises(InputError, match=r"plans\.json is no file of plans, and is left as it is: .*--output"):
        tune.check_plans(path)
    assert path.read_text() == text
