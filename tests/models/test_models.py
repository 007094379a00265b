"""Whole models: each product on a weight is a row of the report, and the rewritten graph computes what the model
would compute on the dequantized weights."""

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from aograph import optimize

from .counter import count_products
from .dequantized import INT4, INT8, INT8_GROUPS, dequantized
from .zoo import MINI, MODELS, build, ids

SMALL = Path(__file__).parents[3] / "shared" / "models" / "small"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

COMPILED = [name for name in MODELS if name != "llama"]  # llama_with_cache has all that it has

both_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
FORMS = (INT4, torch.bfloat16, "int4-bf16"), (INT8, torch.float32, "int8-fp32")
CASES = [[pytest.param(name, *form, id=f"{name}-{label}") for *form, label in FORMS] for name in MODELS]
every_case = pytest.mark.parametrize("name, recipe, dtype", [case for forms in CASES for case in forms])
# Each model in one form; compiled it is in the other recipe.
each_case = pytest.mark.parametrize("name, recipe, dtype", [forms[i % 2] for i, forms in enumerate(CASES)])


def tensors(outputs) -> list[Tensor]:
    """The tensors of an output, a cache's included."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


@functools.cache
def optimized_zoo(name, recipe, dtype, device="cpu"):
    """(model, inputs, optimized) without compilation."""
    model, inputs = on(*build(name), device, dtype)
    return model, inputs, optimize(model, recipe, inputs, compile=False)


def on(model, inputs, device, dtype):
    inputs = tree_map_only(Tensor, lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype), inputs)
    return model.to(device, dtype), inputs


@torch.no_grad()
def check(model, inputs, optimized, recipe):
    """Compares with the dequantized model, whose own rounding shows in fp32."""
    reference = dequantized(model, optimized, recipe)
    expected, actual, plain = (tensors(m(**inputs)) for m in (reference, optimized, model))
    dtype = next(t.dtype for t in expected if t.is_floating_point())
    reference, inputs = on(reference, inputs, actual[0].device, torch.float32)
    exact = tensors(reference(**inputs))
    assert len(actual) == len(expected)
    for got, wanted, fp32 in zip(actual, expected, exact, strict=True):
        assert got.dtype == wanted.dtype and got.shape == wanted.shape and got.device == wanted.device
        rounding = (wanted - fp32).norm()
        assert (got - wanted).float().norm() <= TOLERANCE[dtype] * wanted.float().norm() + 2 * rounding
    assert any(not torch.equal(got, full) for got, full in zip(actual, plain, strict=True))  # it is quantized


@pytest.fixture(autouse=True)
def registered_caches():
    """Cache objects are pytrees, so that `tensors` finds what is in them."""
    pytest.importorskip("transformers")
    from aograph.huggingface import register_pytrees

    register_pytrees()


@each_case
def test_every_product_has_a_row(name, recipe, dtype):
    model, inputs, optimized = optimized_zoo(name, recipe, dtype)
    rows = optimized.report.rows
    assert len(rows) == count_products(model, inputs)
    assert all(row.outcome == "rewritten" or row.notes for row in rows)
    assert sum(row.outcome == "rewritten" for row in rows) > len(rows) / 2


@each_case
def test_eager(name, recipe, dtype):
    check(*optimized_zoo(name, recipe, dtype), recipe)


@pytest.mark.cuda
@every_case
def test_eager_on_a_gpu(name, recipe, dtype):
    check(*optimized_zoo(name, recipe, dtype, "cuda"), recipe)


@both_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["functional", "gpt2"])
def test_int8_in_groups(name, dtype, device):
    check(*optimized_zoo(name, INT8_GROUPS, dtype, device), INT8_GROUPS)


@both_devices
@pytest.mark.parametrize(
    "name, recipe", [(name, (INT8, INT4)[i % 2]) for i, name in enumerate(MODELS) if name in COMPILED]
)
def test_compiled(name, recipe, device, fresh_compiler):
    """One layer, as Inductor would compile a second like the first."""
    model, inputs = on(*build(name, layers=1), device, torch.float32)
    check(model, inputs, optimize(model, recipe, inputs), recipe)


@both_devices
@pytest.mark.parametrize("folder, recipe", [(MINI, INT8), (SMALL, INT4)], ids=["mini", "small"])
def test_pretrained(folder, recipe, device):
    if not (folder / "config.json").is_file():
        pytest.skip(f"{folder.name} is not in {folder.parent}")
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().to(device)
    inputs = {"input_ids": ids(vocabulary=model.config.vocab_size).to(device), "use_cache": False}
    optimized = optimize(model, recipe, inputs, compile=False)
    check(model, inputs, optimized, recipe)
    rows = optimized.report.rows
    assert len(optimized.report.rewritten) == len(rows) == 7 * model.config.num_hidden_layers + 1
