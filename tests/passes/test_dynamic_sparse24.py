"""Quantized activations, and codes of pruned weights."""

from dataclasses import replace

import pytest
import torch
from aograph.kernels.op import Case
from aograph.kernels.prune24 import prune24
from aograph.kernels.sparse24_linear import pays
from aograph.kernels.sparse24_scaled_linear import SPARSE
from torch import nn

import aograph
from aograph import Recipe
from tests.models.zoo import build
from tests.passes.test_sparse24 import Siblings, optimized, pruned, sparse, text
from tests.small_models import MLP

__all__ = ["sparse"]

X = torch.randn(5, 64)
VARIANTS = {
    "int8dq-sparse24": "int8_sparse24_scaled_linear",
    "int8dq-sparse24(algorithm=mse, mapping=asymmetric)": "int8_sparse24_scaled_linear",
    "float8dq-sparse24": "float8_sparse24_scaled_linear",
    "float8dq-sparse24(granularity=tensor)": "float8_sparse24_scaled_linear",
}


@pytest.mark.parametrize("recipe", VARIANTS)
def test_it_is_the_dense_scheme_on_the_pruned_model(recipe, request):
    model = MLP().eval()
    expected = optimized(pruned(model), recipe.replace("-sparse24", ""))(X)
    dense = optimized(model, recipe)
    assert torch.equal(dense(X), expected)
    for row in dense.report.rows:
        assert row.notes == ["2:4 by magnitude", "dense: no sparse kernel on cpu"] and row.kernel != "dense"
        assert row.scheme == recipe and 0.3 < row.error < 0.6
    request.getfixturevalue("sparse")
    fast = optimized(model, recipe)
    assert text(fast).count(f"aograph.{VARIANTS[recipe]}.default") == 2
    assert {(row.kernel, *row.notes) for row in fast.report.rows} == {
        ("dequantize", "2:4 by magnitude", "slower than dense below M = 4")
    }
    torch.testing.assert_close(fast(X), expected)


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_static_scales_and_wanda_from_one_calibration(kind, sparse):
    model = MLP().eval()
    recipe = aograph.calibrate(model, f"{kind}dq-sparse24(method=wanda, activation=static)", [X])
    with torch.no_grad():
        expected, hidden = pruned(model), model.up(X).relu()
        expected.up.weight = nn.Parameter(prune24(model.up.weight.detach(), X.norm(dim=0)))
        expected.down.weight = nn.Parameter(prune24(model.down.weight.detach(), hidden.norm(dim=0)))
    fast = optimized(model, recipe)
    assert text(fast).count(f"aograph.{kind}_sparse24_scaled_linear") == 2
    dense = replace(recipe, rules=Recipe.of(f"{kind}dq(activation=static)").rules)
    torch.testing.assert_close(fast(X), optimized(expected, dense)(X))


def test_blocks_stay_dense():
    x = torch.randn(300, 128)
    fast = optimized(MLP(128, 128).eval(), "float8dq-sparse24(granularity=block)", x)
    assert text(fast).count("aograph.float8_scaled_linear.default") == 2
    case = Case("cuda", torch.bfloat16, 4096, 128, 128, 128, (9, 0))
    assert pays(case, SPARSE["float8_scaled_linear"]) == "cuSPARSELt has no scales of blocks"


def test_siblings_quantize_once_whatever_their_schemes(sparse):
    fast = optimized(Siblings().eval(), "int8dq + b:int8dq-sparse24")
    assert text(fast).count("aten.amax") == 1
    for op in ("int8_sparse24_scaled_linear", "int8_scaled_linear"):
        assert text(fast).count(f"aograph.{op}.default") == 1


def test_pruning_is_left_out_with_its_pass_and_so_is_the_rest():
    model = MLP().eval()
    with pytest.warns(UserWarning, match="rewrote nothing"):
        fast = optimized(model, "int8dq-sparse24", disable=["prune24"])
    torch.testing.assert_close(fast(X), model(X))


def test_behind_compile_new_weights_are_pruned_and_packed_again(fresh_compiler, sparse):
    model = MLP().eval().requires_grad_(False)
    run = torch.compile(model, backend="aograph", options={"recipe": "int8dq-sparse24", "compile": False})
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(run(X), optimized(pruned(model), "int8dq")(X))
        model.up.weight.copy_(torch.randn(128, 64))


def test_the_recipe_for_vits():
    model, inputs = build("vit")
    fast = aograph.optimize(model, "vit", inputs, compile=False)
    assert {".".join(row.name.split(".")[-2:]): (row.outcome, row.scheme) for row in fast.report.rows} == {
        **{f"attention.{name}_proj": ("rewritten", "int8dq") for name in "qkvo"},
        "mlp.fc1": ("rewritten", "int8dq-sparse24"),
        "mlp.fc2": ("rewritten", "sparse24"),
        "classifier": ("skipped", ""),
    }
    with torch.no_grad():
        for layer in model.vit.layers:
            for linear in (layer.mlp.fc1, layer.mlp.fc2):
                linear.weight.copy_(prune24(linear.weight))
        expected = model(**inputs).logits
        assert (fast(**inputs).logits - expected).norm() < 0.05 * expected.norm()
