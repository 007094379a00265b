"""What surrounds the library, which a stand-in takes the place of; the library itself: test_sparse24_linear.py."""

import gc
import types

import pytest
import torch
from aograph.kernels import cusparselt
from aograph.kernels.cusparselt import Algorithm
from aograph.kernels.prune24 import prune24
from aograph.kernels.sparse24_linear import pack, sparse24_linear


@pytest.fixture
def library(monkeypatch, tmp_path):
    """Computes densely and keeps a log of what was asked of it."""
    log = types.SimpleNamespace(compressed=0, searches=[], products=[])

    def compress(weight):
        log.compressed += 1
        return weight.clone()

    def mm_search(blob, x, bias, alpha, out_dtype, transpose_result):
        assert transpose_result and blob.shape[1] == x.shape[0]
        log.searches.append(x.shape[1])
        return 7, 2, 1, 40

    def sparse_mm(blob, x, bias=None, transpose_result=False, **how):
        assert x.shape[1] % 8 == 0 and transpose_result
        log.products.append(how)
        return torch.nn.functional.linear(x.t(), blob, bias)

    monkeypatch.setattr(torch, "_cslt_compress", compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", sparse_mm)
    monkeypatch.setattr(torch._C, "_cusparselt", types.SimpleNamespace(mm_search=mm_search), raising=False)
    monkeypatch.setattr(cusparselt, "machine", lambda: ("a GPU", 800))
    monkeypatch.setattr(cusparselt, "KNOWN", {})
    monkeypatch.setenv("AOGRAPH_CACHE", str(tmp_path))
    return log


def linear(N=32, K=64):
    weight = prune24(torch.randn(N, K, dtype=torch.bfloat16))
    return weight, *pack(weight)


@pytest.mark.parametrize("M", [1, 8, 13])
def test_tokens_are_filled_up_and_cut_off(library, M):
    weight, *packed = linear()
    x, bias = torch.randn(M, 64, dtype=torch.bfloat16), torch.randn(32, dtype=torch.bfloat16)
    torch.testing.assert_close(cusparselt.product(x, *packed, bias), torch.nn.functional.linear(x, weight, bias))
    assert library.products == [{"alg_id": 7, "split_k": 2, "split_k_mode": 1}]


def test_one_search_for_a_shape_whatever_the_process(library, monkeypatch):
    _, *packed = linear()
    for M in (9, 16, 12, 17, 20, 32):
        cusparselt.product(torch.ones(M, 64, dtype=torch.bfloat16), *packed)
    assert library.searches == [16, 24]
    monkeypatch.setattr(cusparselt, "KNOWN", {})  # as in another process
    cusparselt.product(torch.ones(16, 64, dtype=torch.bfloat16), *packed)
    assert library.searches == [16, 24]
    monkeypatch.setattr(cusparselt, "KNOWN", {})
    monkeypatch.setattr(cusparselt, "machine", lambda: ("another GPU", 800))
    cusparselt.product(torch.ones(16, 64, dtype=torch.bfloat16), *packed)
    assert library.searches == [16, 24, 16]


def test_what_the_cache_folder_holds_may_be_damaged_or_not_writable(library, monkeypatch, tmp_path):
    _, *packed = linear()
    x = torch.ones(8, 64, dtype=torch.bfloat16)
    cusparselt.product(x, *packed)
    (path,) = tmp_path.glob("cusparselt-*.json")
    for damaged in ("", "[1]", "{}", "[1, null, 2]", "[1, 2, 3, 4]"):
        path.write_text(damaged)
        monkeypatch.setattr(cusparselt, "KNOWN", {})
        cusparselt.product(x, *packed)
        assert library.products[-1]["alg_id"] == 7
    monkeypatch.setenv("AOGRAPH_CACHE", "/proc/nowhere")
    monkeypatch.setattr(cusparselt, "KNOWN", {})
    cusparselt.product(x, *packed)
    assert len(library.searches) == 7


def test_the_second_form_is_made_once_and_again_in_place_when_the_weight_is_written(library, monkeypatch):
    _, values, indices = linear()
    x = torch.eye(64, dtype=torch.bfloat16)
    monkeypatch.setattr(sparse24_linear, "choose", lambda case: sparse24_linear["cusparselt"])
    sparse24_linear.prepare(values, indices)
    assert library.compressed == 1
    cusparselt.product(x, values, indices)
    assert library.compressed == 1
    _, blob = cusparselt.BLOBS[values]
    new, *packed = linear()
    for old, fresh in zip((values, indices), packed, strict=True):
        old.copy_(fresh)
    sparse24_linear.prepare(values, indices)  # nobody calls the op: a CUDA graph reads the blob
    assert torch.equal(blob, new) and library.compressed == 2
    assert torch.equal(cusparselt.product(x, values, indices), new.T) and library.compressed == 2


def test_it_goes_with_the_weight_and_is_not_made_for_nobody(library):
    _, values, indices = linear()
    sparse24_linear.prepare(values, indices)
    assert library.compressed == 0  # on CPU, no call would need it
    cusparselt.product(torch.ones(1, 64, dtype=torch.bfloat16), values, indices)
    before = len(cusparselt.BLOBS)
    del values
    gc.collect()
    assert len(cusparselt.BLOBS) == before - 1


@pytest.mark.cuda
def test_captured_in_a_cuda_graph_and_filled_again():
    _, *packed = (each.cuda() for each in linear(128, 256))
    bias, x = torch.randn(128).bfloat16().cuda(), torch.randn(300, 256).bfloat16().cuda()
    sparse24_linear.prepare(*packed)
    sparse24_linear(x, *packed, bias)  # searches
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sparse24_linear(x, *packed, bias)
    new, *fresh = (each.cuda() for each in linear(128, 256))
    for old, tensor in zip(packed, fresh, strict=True):
        old.copy_(tensor)
    sparse24_linear.prepare(*packed)
    graph.replay()
    torch.testing.assert_close(y, torch.nn.functional.linear(x, new, bias), rtol=2e-2, atol=2e-1)


def test_no_search_in_fp16(library):
    weight = prune24(torch.randn(32, 64)).half()
    cusparselt.product(torch.randn(8, 64).half(), *pack(weight))
    assert not library.searches and library.products == [Algorithm()._asdict()]
