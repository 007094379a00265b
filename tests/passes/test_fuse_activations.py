"""Where GELU becomes part of the linear before it; the kernel is said to take all, as there may be no GPU."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from aograph.passes import Stage
from torch import nn

import aograph
from tests.programs import apply, operators, program_of, up_to

module = importlib.import_module("aograph.passes.fuse_activations")
NAME = module.FuseActivations.name


@pytest.fixture
def taken(monkeypatch):
    """The kernel takes everything, and sparse products are faster than dense ones."""
    monkeypatch.setattr(module, "takes", lambda op, case: True)
    monkeypatch.setattr("aograph.passes.sparse24.pays", lambda *_: True)


class MLP(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.up, self.down, self.between = nn.Linear(64, 128), nn.Linear(128, 64), between
        self.to(torch.bfloat16).requires_grad_(False)

    def forward(self, x):
        return self.down(self.between(self.up(x)))


def fused(between, recipe="int8dq", x=None, **kwargs):
    x = torch.randn(2, 3, 64).bfloat16() if x is None else x
    program = program_of(MLP(between), x, **kwargs)
    apply(program, *(name for name in up_to(Stage.LOWER) if name != NAME), recipe=recipe)
    (matches,) = apply(program, NAME, recipe=recipe)
    before = program.text()
    assert apply(program, NAME, recipe=recipe) == [0] and program.text() == before
    return program, matches


@pytest.mark.parametrize(
    "recipe, op",
    [
        ("int8dq", "aograph.int8_scaled_activated_linear"),
        ("float8dq", "aograph.float8_scaled_activated_linear"),
        ("sparse24", "aograph.sparse24_activated_linear"),
        ("int8dq-sparse24", "aograph.int8_sparse24_scaled_activated_linear"),
        ("float8dq-sparse24", "aograph.float8_sparse24_scaled_activated_linear"),
    ],
)
@pytest.mark.parametrize("between", [F.gelu, nn.GELU("tanh")], ids=["gelu", "tanh"])
def test_fused(taken, recipe, op, between):
    program, matches = fused(between, recipe)
    found = operators(program)
    assert matches == 1 and found[op] == 1 and "aten.gelu" not in found
    rows = {row.name: row.notes for row in program.rows}
    assert {row.name: row.kernel for row in program.rows}["up"] == "cuda"
    assert "fused with GELU after it" in rows["up"] and "fused with GELU after it" not in rows["down"]
    assert {site.node.graph for site in program.sites} == {program.graph}


def side_by_side(y):
    first, second, third = y.split([16, 48, 64], -1)
    return torch.cat([first, F.gelu(second, approximate="tanh"), F.gelu(third)], -1)


def gated(y):
    gate, up = y.chunk(2, -1)
    return torch.cat([F.gelu(gate) * up, up], -1)


@pytest.mark.parametrize(
    "recipe",
    ["int8dq", "int8dq(mapping=asymmetric)", "float8dq", "float8dq(granularity=tensor)", "sparse24", "int8dq-sparse24"],
)
@pytest.mark.parametrize("between, plain, activated", [(side_by_side, 1, 2), (gated, 1, 1)], ids=["parallel", "gated"])
def test_parts(taken, monkeypatch, between, plain, activated, recipe):
    few, matches = fused(between, recipe)
    assert matches == 0 and operators(few)["aten.gelu"] == activated
    monkeypatch.setattr(module, "MANY_TOKENS", 5)
    program, matches = fused(between, recipe)
    found = operators(program)
    assert matches == 1 and not found.keys() & {"aten.gelu", "aten.split", "aten.split_with_sizes", "aten.chunk"}
    assert sum(count for name, count in found.items() if "activated" in name) == activated
    linears = sum(count for name, count in found.items() if name.endswith(("scaled_linear", "sparse24_linear")))
    assert linears == plain + 1
    (notes,) = (row.notes for row in program.rows if row.name == "up")
    assert "fused with GELU after a part, which is split off" in notes
    model, x = MLP(between), torch.randn(5, 64).bfloat16()
    results = [
        aograph.optimize(model, recipe, (x,), dynamic_shapes={"x": {}}, disable=disable, compile=False)(x)
        for disable in ((), (NAME,))
    ]
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


def both_used(y):
    return F.gelu(y) + y


def along_tokens(y):
    first, second, third = y.split(1, 1)
    return torch.cat([F.gelu(first), second, third], 1)


@pytest.mark.parametrize(
    "between", [F.relu, both_used, along_tokens, lambda y: F.gelu(y.add_(1)), lambda y: F.gelu(y) + F.gelu(y)]
)
def test_not_fused(taken, between):
    program, matches = fused(between)
    assert matches == 0 and "aograph.int8_scaled_linear" in operators(program)


def test_unknown_tokens_are_not_fused(taken):
    program, matches = fused(F.gelu, dynamic=True)
    assert matches == 0 and "aten.gelu" in operators(program)


def test_where_no_kernel_takes_both_nothing_changes():
    assert fused(F.gelu)[1] == 0


def test_other_schemes_are_left(taken):
    assert fused(F.gelu, "int8wo")[1] == 0


def test_blocks_of_scales_are_left():
    assert fused(side_by_side, "float8dq(granularity=block)")[1] == 0


def test_the_same_as_without(taken):
    model, x = MLP(F.gelu), torch.randn(5, 64).bfloat16()
    y = {
        disable: aograph.optimize(model, "int8dq", (x,), dynamic_shapes={"x": {}}, disable=disable, compile=False)(x)
        for disable in ((), (NAME,))
    }
    torch.testing.assert_close(*y.values(), rtol=2e-2, atol=2e-2)
