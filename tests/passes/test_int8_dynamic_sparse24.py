"""Dynamic int8 on pruned weights."""

import pytest
import torch
from aograph.kernels.prune24 import prune24
from torch import nn

import aograph
from tests.models.zoo import build
from tests.passes.test_sparse24 import Siblings, optimized, pruned, sparse, text
from tests.small_models import MLP

__all__ = ["sparse"]

X = torch.randn(5, 64)
VARIANTS = ["int8dq-sparse24", "int8dq-sparse24(algorithm=mse, mapping=asymmetric)"]


@pytest.mark.parametrize("recipe", VARIANTS)
def test_it_is_int8dq_of_the_pruned_model(recipe, request):
    model = MLP().eval()
    expected = optimized(pruned(model), recipe.replace("-sparse24", ""))(X)
    dense = optimized(model, recipe)
    assert torch.equal(dense(X), expected)
    for row in dense.report.rows:
        assert row.notes == ["2:4 by magnitude", "dense: no sparse kernel on cpu"] and row.kernel != "dense"
        assert row.scheme == recipe and 0.3 < row.error < 0.6
    request.getfixturevalue("sparse")
    fast = optimized(model, recipe)
    assert text(fast).count("aograph.int8_sparse24_scaled_linear") == 2
    assert {(row.kernel, *row.notes) for row in fast.report.rows} == {
        ("dequantize", "2:4 by magnitude", "slower than dense below M = 4")
    }
    torch.testing.assert_close(fast(X), expected)


def test_static_scales_and_wanda_from_one_calibration(sparse):
    model = MLP().eval()
    recipe = aograph.calibrate(model, "int8dq-sparse24(method=wanda, activation=static)", [X])
    with torch.no_grad():
        expected, hidden = pruned(model), model.up(X).relu()
        expected.up.weight = nn.Parameter(prune24(model.up.weight.detach(), X.norm(dim=0)))
        expected.down.weight = nn.Parameter(prune24(model.down.weight.detach(), hidden.norm(dim=0)))
    fast = optimized(model, recipe)
    assert text(fast).count("aograph.int8_sparse24_scaled_linear") == 2
    assert (fast(X) - expected(X)).norm() < 0.05 * expected(X).norm()


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
