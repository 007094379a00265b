import types

import pytest
import torch

from bench import dynamic_contenders
from bench.dynamic_contenders import DYNAMIC, plain, pruned, recipe
from bench.schemes import KINDS, Weights
from bench.worker import distance

CPU = torch.device("cpu")


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return Weights(128, 256, 64, CPU)


def error(each, kind, weights, x, packed=None):
    expected = KINDS[kind].x(x) @ KINDS[kind].weight(weights).T
    return distance(each.scaled(each.call(x, *(packed or each.packed))), expected)


@pytest.fixture
def as_is(monkeypatch):
    """Nothing is compiled."""
    monkeypatch.setattr(dynamic_contenders, "compiled", lambda call, options=None: call)
    monkeypatch.setattr(torch, "compile", lambda call, **settings: call)


@torch.no_grad()
def test_a_recipe_becomes_a_call_on_its_packed_weight(weights, as_is):
    x = torch.randn(3, 256).bfloat16()
    found = recipe("int8wo", plain, weights, x)
    assert found.bytes == 128 * 256 + 2 * 128
    assert error(found, "int8", weights, x) < 5e-3
    of_pruned = recipe("int8wo", pruned, weights, x)
    assert error(found, "int8dq-sparse24", weights, x, of_pruned.packed) < 2e-2  # the weight is read from the arguments
    assert error(found, "int8dq-sparse24", weights, x) > 0.1
    assert found.kernel(x) in ("native", "aten", "dequantize")


@torch.no_grad()
def test_a_recipe_that_leaves_the_linear_says_why(weights, as_is):
    x = torch.randn(3, 256).bfloat16()
    with pytest.warns(UserWarning, match="rewrote nothing"):
        found = recipe("none", plain, weights, x)
    assert error(found, "bf16", weights, x) < 5e-3
    assert found.kernel(x).startswith("excluded")


@torch.no_grad()
@pytest.mark.parametrize("name", ["_int_mm", "_scaled_mm"])
def test_products_of_torch_are_of_the_scheme(name, weights, as_is, monkeypatch):
    def scaled(x, q, scale_x, scale, *, out_dtype, use_fast_accum):  # some versions refuse scales of rows on the CPU
        return (x.float() @ q.float() * scale_x * scale).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled)
    x = torch.randn(33, 256).bfloat16()
    assert error(DYNAMIC[name].build(weights, x), DYNAMIC[name].kind, weights, x) < 5e-3


@torch.no_grad()
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("name", [name for name in DYNAMIC if "cuSPARSELt" in name])
@pytest.mark.parametrize("M", [1, 48])
def test_what_stands_around_cusparselt(name, rows, M, weights, as_is, monkeypatch):
    """With a product of the same arguments in its place, which refuses what it would, and has one layout only."""

    def search(packed, b, bias, alpha, dtype, transposed):
        if transposed is not rows:
            raise RuntimeError("no such layout")
        return 3, 2, 1, 40

    def multiply(packed, b, *, out_dtype, transpose_result, alg_id, split_k, split_k_mode):
        assert (alg_id, split_k, split_k_mode) == (3, 2, 1)
        assert b.shape[1] % 16 == 0 and b.stride() == (1, 256) and b.dtype is packed.dtype
        assert out_dtype == (None if b.dtype is torch.bfloat16 else torch.bfloat16)
        y = (packed.float() @ b.float()).bfloat16()
        return y.T.contiguous() if transpose_result else y

    monkeypatch.setattr(torch, "_cslt_compress", lambda weight: weight)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)
    monkeypatch.setattr(torch._C, "_cusparselt", types.SimpleNamespace(mm_search=search), raising=False)
    x = torch.randn(M, 256).bfloat16()
    found = DYNAMIC[name].build(weights, x)
    assert found.call(x, *found.packed).shape == (-(-M // 16) * 16 if DYNAMIC[name].part else M, 128)
    assert error(found, DYNAMIC[name].kind, weights, x) < 5e-3


@torch.no_grad()
def test_no_layout_is_an_error(weights, monkeypatch):
    def search(*_):
        raise RuntimeError("not on this machine")

    monkeypatch.setattr(torch._C, "_cusparselt", types.SimpleNamespace(mm_search=search), raising=False)
    with pytest.raises(RuntimeError, match="not on this machine"):
        dynamic_contenders.product(weights.plain, torch.randn(16, 256))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@torch.no_grad()
@pytest.mark.parametrize("name", [name for name, entry in DYNAMIC.items() if not entry.ours and "torchao" not in name])
def test_peers_compute_what_they_are_compared_with(name):
    torch.manual_seed(0)
    weights = Weights(512, 1024, 64, torch.device("cuda"))
    for M in (32, 256):
        torch.compiler.reset()
        x = torch.randn(M, 1024, dtype=torch.bfloat16, device="cuda")
        assert error(DYNAMIC[name].build(weights, x), DYNAMIC[name].kind, weights, x) < 1e-2


def test_each_kind_has_ours_and_ours_is_named_for_it():
    assert {name for name, entry in DYNAMIC.items() if entry.ours} == {entry.kind for entry in DYNAMIC.values()}
    assert all(entry.kind in KINDS for entry in DYNAMIC.values())
