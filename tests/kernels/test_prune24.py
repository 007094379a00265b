import pytest
import torch
from aograph.kernels import rounding
from aograph.kernels.prune24 import prune24
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch._subclasses import FakeTensorMode

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def one_by_one(weight, norms=None):
    """The same, a group at a time in Python."""
    pruned = weight.clone()
    for row in pruned:
        for k in range(0, weight.shape[1], 4):
            group = row[k : k + 4].double()
            score = group.abs() * (1 if norms is None else norms[k : k + 4].double())
            by_score = sorted(range(4), key=lambda i: (group[i] == 0, -score[i], i))
            for i in by_score[2:]:
                if row[k + i] != 0:
                    row[k + i] = 0
    return pruned


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, K", [(1, 4), (3, 8), (129, 12), (3, 100), (1, 512), (0, 8), (2, 0)])
def test_the_two_largest_of_four_stay(N, K, dtype):
    weight = torch.randn(N, K).to(dtype)
    norms = torch.rand(K) + 0.1
    assert torch.equal(prune24(weight), one_by_one(weight))
    assert torch.equal(prune24(weight, norms), one_by_one(weight, norms))


few_numbers = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 3.0, -3.0, 1e-30, 65504.0])


@given(weight=arrays.arrays("float32", st.tuples(st.integers(1, 4), st.just(16)), elements=few_numbers))
def test_the_property(weight):
    weight = torch.from_numpy(weight)
    norms = torch.tensor([0.0, 1.0, 2.0, 0.0] * 4)
    for scores in (None, norms):
        pruned = prune24(weight, scores)
        assert (pruned.unflatten(1, (4, 4)) != 0).sum(-1).max() <= 2
        assert ((pruned == weight) | (pruned == 0)).all()
        assert torch.equal(prune24(pruned, scores).view(torch.int32), pruned.view(torch.int32))
        assert torch.equal(pruned, one_by_one(weight, scores))


def test_of_equals_the_first_stay():
    assert prune24(torch.tensor([[1.0, -1, 1, -1, 2, 3, 2, 2]])).tolist() == [[1, -1, 0, 0, 2, 3, 0, 0]]


def test_what_is_2_4_already_stays_to_the_bit_even_where_inputs_were_never_seen():
    weight = torch.tensor([[0.0, 5, -0.0, 3, 0, 0, 0, -7]])
    for norms in (None, torch.tensor([9.0, 0, 9, 0, 9, 9, 9, 0])):
        assert torch.equal(prune24(weight, norms).view(torch.int32), weight.view(torch.int32))


def test_in_chunks_and_from_any_stride(monkeypatch):
    weight, norms = torch.randn(64, 37).T, torch.rand(64)
    whole = prune24(weight, norms)
    monkeypatch.setitem(rounding.CHUNK, "cpu", 100)
    assert torch.equal(prune24(weight, norms), whole) and whole.is_contiguous()


def test_wanda_is_better_than_magnitude_where_inputs_have_outliers():
    x = torch.randn(512, 64)
    x[:, ::7] *= 30
    weight = torch.randn(96, 64)
    by_magnitude, by_wanda = ((x @ (weight - p).T).norm() for p in (prune24(weight), prune24(weight, x.norm(dim=0))))
    assert by_wanda < 0.5 * by_magnitude


@pytest.mark.parametrize("weight", [torch.ones(2, 6), torch.ones(4), torch.ones(2, 8, dtype=torch.int8)])
def test_what_cannot_be_pruned(weight):
    with pytest.raises(ValueError, match=r"prune24: weight is .*; expected float \[N, K\], 4 dividing K"):
        prune24(weight)


def test_norms_that_do_not_fit():
    with pytest.raises(ValueError, match=r"prune24: norms is \[4\]; expected \[8\]"):
        prune24(torch.ones(2, 8), torch.ones(4))


def test_registration():
    torch.library.opcheck(prune24, (torch.randn(3, 8),))
    torch.library.opcheck(prune24, (torch.randn(3, 8), torch.rand(8)))
    with FakeTensorMode():
        pruned = prune24(torch.empty(1 << 20, 1 << 20, dtype=torch.bfloat16))
    assert pruned.shape == (1 << 20, 1 << 20) and pruned.dtype == torch.bfloat16


@pytest.mark.cuda
def test_on_a_gpu_it_is_the_same_and_needs_little_more_than_the_result():
    weight, norms = torch.randn(65536, 4096, dtype=torch.bfloat16, device="cuda"), torch.rand(4096)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    pruned = prune24(weight, norms)
    assert torch.cuda.max_memory_allocated() - before - pruned.nbytes < 256 << 20
    assert torch.equal(pruned[:100].cpu(), prune24(weight[:100].cpu(), norms))
