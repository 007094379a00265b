"""Linears under the rule become `aograph::int8_scaled_linear` on activations that are quantized once."""

import pytest
import torch
import torch.nn.functional as F
from aograph.kernels import int8_scaled_linear
from aograph.kernels.quantized_activation import Int8PerTensor, int8_per_token, int8_per_token_asymmetric
from aograph.passes import Stage
from torch import nn
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

import aograph
from aograph.recipe import Recipe
from aograph.statistics import LinearStatistics
from aograph.weights import WeightStore
from tests.programs import apply, operators, outputs, program_of, up_to
from tests.small_models import MLP, untouched

X, W = torch.randn(3, 64), torch.randn(48, 64)
SCHEMES = [
    "int8dq", "int8dq(algorithm=mse)", "int8dq(mapping=asymmetric)", "int8dq(activation=static)",
    "int8dq(mapping=asymmetric, activation=static)",
]  # fmt: skip


def seen(*names, low=-4.0, high=5.0):
    return {name: LinearStatistics(low, high, torch.ones(64), 10) for name in names}


def calibrated(recipe, *names, **bounds):
    return Recipe(Recipe.of(recipe).rules, seen(*names, **bounds))


def rewritten(model, *inputs, recipe="int8dq", dynamic=False, passes=None, **weights):
    program = program_of(model, *inputs, dynamic=dynamic, **weights)
    apply(program, *(passes or up_to(Stage.QUANTIZE)), "eliminate_dead_code", recipe=recipe)
    return program


def materialized(program):
    WeightStore(nn.Module(), torch.device("cpu"), hand_over=False).materialize(program)
    program.graph_module.recompile()
    return program


def linear(x, weight, recipe, bias=None):
    """What a linear of the scheme computes, by the op's reference."""
    asymmetric, static = "asymmetric" in recipe, "static" in recipe
    quantize = int8_per_token_asymmetric if asymmetric else int8_per_token
    made = (Int8PerTensor.spanning(-4, 5, asymmetric) if static else quantize)(x)
    q, scale, *sums = int8_scaled_linear.pack(weight, "mse" if "mse" in recipe else "minmax", sums=asymmetric)
    if static:
        tensor = Int8PerTensor.spanning(-4, 5, asymmetric)
        zero = torch.tensor([tensor.zero], dtype=torch.int32) if asymmetric else None
        made = made._replace(x_scale=torch.tensor([tensor.scale]), x_zero=zero)
    op = int8_scaled_linear.int8_scaled_linear
    return op.oracle.function(*made, q, scale, sums[0] if sums else None, bias, x.dtype)


@pytest.mark.parametrize("recipe", SCHEMES)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 5, 64)])
def test_every_shape_of_x(shape, dynamic, recipe):
    x, b = torch.randn(shape), torch.randn(48)
    forward = lambda m, x: F.linear(x, m.w, m.b)  # noqa: E731
    program = materialized(rewritten(forward, x, recipe=calibrated(recipe, "w"), dynamic=dynamic, w=W, b=b))
    assert operators(program)["aograph.int8_scaled_linear"] == 1
    torch.testing.assert_close(outputs(program, x)[0], linear(x, W, recipe, b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", SCHEMES)
def test_the_row(recipe):
    program = materialized(rewritten(lambda m, x: F.linear(x, m.w), X, recipe=calibrated(recipe, "w"), w=W))
    (row,) = program.rows
    assert row.outcome == "rewritten" and row.scheme == recipe and row.kernel and not row.notes
    more = ("asymmetric" in recipe) * 4 * 48 + ("static" in recipe) * 4 + ("static" in recipe and "asym" in recipe) * 4
    assert row.bytes_after == 48 * 64 + 4 * 48 + more
    assert 0.001 < row.error < 0.02


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_error_of_static_scales_is_that_of_an_x_of_their_size(scale):
    recipe = calibrated("int8dq(activation=static)", "w", low=-4 * scale, high=4 * scale)
    program = materialized(rewritten(lambda m, x: F.linear(x, m.w), X, recipe=recipe, w=W))
    assert 0.001 < program.rows[0].error < 0.02


def attention(m, x):
    x = F.rms_norm(x, (64,))
    return F.linear(x, m.q), F.linear(x, m.k), F.linear(x, m.v)


@pytest.mark.parametrize("recipe", SCHEMES)
@pytest.mark.parametrize("merged", [True, False])
def test_query_key_and_value_share_one_quantized_x(merged, recipe):
    weights = {name: torch.randn(64, 64) for name in "qkv"}
    passes = [name for name in up_to(Stage.QUANTIZE) if merged or name != "merge_linears"]
    program = materialized(rewritten(attention, X, recipe=calibrated(recipe, *"qkv"), passes=passes, **weights))
    counts = operators(program)
    assert counts["aograph.int8_scaled_linear"] == (1 if merged else 3)
    assert counts["aten.round"] == (2 if recipe == "int8dq(mapping=asymmetric)" else 1)  # it rounds zeros, too
    x = F.rms_norm(X, (64,))
    for y, weight in zip(outputs(program, X), weights.values(), strict=True):
        torch.testing.assert_close(y, linear(x, weight, recipe), rtol=1e-5, atol=1e-5)


def test_schemes_share_the_x_that_they_quantize_alike():
    weights = {name: torch.randn(64, 64) for name in "qkv"}
    recipe = "int8dq + k:int8dq(algorithm=mse) + v:int8dq(mapping=asymmetric)"
    counts = operators(rewritten(attention, X, recipe=recipe, **weights))
    assert counts["aograph.int8_scaled_linear"] == 3 and counts["aten.round"] == 3  # one, and two with the zeros


def test_static_scales_cover_all_siblings():
    statistics = {**seen("q", low=-1.0, high=2.0), **seen("k", low=-3.0, high=1.0), **seen("v", low=0.0, high=1.0)}
    recipe = Recipe(Recipe.of("int8dq(activation=static)").rules, statistics)
    program = rewritten(attention, X, recipe=recipe, **{name: torch.randn(64, 64) for name in "qkv"})
    (pack,) = program.packs.values()
    assert pack.function.settings["x_scale"] == Int8PerTensor.spanning(-3, 2, False).scale


def test_one_weight_with_two_ranges_is_two_packs():
    packs = [
        next(
            iter(rewritten(lambda m, x: F.linear(x, m.w), X, recipe=calibrated(SCHEMES[3], "w", high=high), w=W).packs)
        )
        for high in (5.0, 6.0, 5.0)
    ]
    assert packs[0] == packs[2] != packs[1]


def test_without_statistics_it_is_skipped_and_said():
    recipe = calibrated("int8dq(activation=static)", "up.weight")
    program = rewritten(MLP(), X, recipe=recipe)
    up, down = program.rows
    assert up.outcome == "rewritten" and down.outcome == "skipped"
    assert down.notes == ["needs calibrated statistics: aograph.calibrate(model, recipe, batches)"]
    assert operators(program)["aten.linear"] == 1


@torch.no_grad()
def test_calibration_is_what_the_model_saw():
    model, recipe = MLP().eval(), "int8dq(activation=static)"
    hidden = model.up(X).relu()
    ranges = {"up.weight": X, "down.weight": hidden}
    statistics = {n: LinearStatistics(x.min().item(), x.max().item(), x.norm(dim=0), 3) for n, x in ranges.items()}
    fast = aograph.optimize(model, Recipe(Recipe.of(recipe).rules, statistics), X, compile=False)
    assert (fast(X) - model(X)).norm() < 0.02 * model(X).norm()


@torch.no_grad()
def test_few_and_no_tokens():
    model = MLP().eval()
    fast = aograph.optimize(model, "int8dq", torch.randn(4, 64), compile=False)
    for M in (0, 1, 2, 300):
        x = torch.randn(M, 64)
        assert fast(x).shape == (M, 64)
        assert (fast(x) - model(x)).norm() <= 0.02 * model(x).norm()


@torch.no_grad()
def test_a_poisoned_token_is_nan_and_alone():
    x = torch.randn(5, 64)
    x[2, 3] = torch.inf
    y = aograph.optimize(MLP(), "int8dq", x, compile=False)(x)
    assert y[2].isnan().all() and y[[0, 1, 3, 4]].isfinite().all()


def floats_of_the_size_of_a_weight(code, sizes):
    """Lines of generated code that make a float tensor of the size of a weight."""
    made = [line for line in code.splitlines() if "empty_strided" in line]
    return [line for line in made if any(str(size).replace(" ", "") in line.replace(" ", "") for size in sizes)]


@torch.no_grad()
@pytest.mark.parametrize("door", ["optimize", "backend"])
def test_no_dequantized_weight_is_made(door, fresh_compiler):
    model = nn.Sequential(nn.LayerNorm(64), MLP(64, 136)).eval()
    x = torch.randn(3, 64)
    if door == "optimize":
        run = aograph.optimize(model, "int8dq", x, dynamic_shapes=({},))
    else:
        run = torch.compile(model, backend="aograph", options={"recipe": "int8dq"})
    with untouched(model, x), config.patch(force_disable_caches=True):  # code comes from compiling only
        y, (code,) = run_and_get_code(run, x)
    assert (y - model(x)).norm() < 0.02 * model(x).norm()
    assert code.count("aograph.int8_scaled_linear.default(") == 2
    assert "empty_strided" in code and not floats_of_the_size_of_a_weight(code, [(136, 64), (64, 136)])


def test_where_gradients_are_recorded_it_is_skipped_and_said(fresh_compiler):
    model, reports = MLP().requires_grad_(False), []
    options = {"recipe": "int8dq", "report": reports.append, "compile": False}
    x = X.clone().requires_grad_()
    with pytest.warns(UserWarning, match="rewrote nothing of this graph: gradients are recorded"):
        y = torch.compile(model, backend="aograph", options=options)(x)
    y.sum().backward()
    again = X.clone().requires_grad_()
    model(again).sum().backward()
    torch.testing.assert_close(x.grad, again.grad)
    assert [row.outcome for row in reports[0].rows] == ["skipped"] * 2
    assert all("use torch.no_grad()" in note for row in reports[0].rows for note in row.notes)
    with torch.no_grad():
        torch.compile(model, backend="aograph", options=options)(X)
    assert [row.outcome for row in reports[-1].rows] == ["rewritten"] * 2
