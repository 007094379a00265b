"""The format, byte by byte and there and back."""

import pytest
import torch
from aograph.kernels import rounding
from aograph.kernels.prune24 import prune24
from aograph.kernels.sparse24 import compress, decompress
from hypothesis import given
from hypothesis import strategies as st

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.float8_e4m3fn]


def random24(N, K, dtype):
    """2:4, zeros among the kept ones included."""
    weight = prune24((torch.randn(N, K) * 20).round() * (torch.rand(N, K) < 0.7))
    return weight.clamp(-127, 127).to(dtype)


@given(N=st.integers(0, 9), groups=st.integers(1, 40), dtype=st.sampled_from(DTYPES))
def test_there_and_back(N, groups, dtype):
    weight = random24(N, 4 * groups, dtype)
    values, indices = compress(weight)
    assert (values.shape, values.dtype) == ((N, 2 * groups), dtype)
    assert (indices.shape, indices.dtype) == ((N, -(-groups // 2)), torch.uint8)
    assert torch.equal(decompress(values, indices).double(), weight.double())


def test_layout_byte_by_byte():
    weight = torch.tensor([[0.0, 5, 0, 6, 7, 8, 0, 0, 0, 0, 9, 1], [0, 0, 0, 2, 0, 0, 0, 0, 3, 0, 0, 4]])
    values, indices = compress(weight)
    assert values.tolist() == [[5, 6, 7, 8, 9, 1], [0, 2, 0, 0, 3, 4]]
    places = [[(1, 3), (0, 1), (2, 3)], [(0, 3), (0, 1), (0, 3)]]
    expected = [[a | b << 2 | (c | d << 2) << 4, e | f << 2] for (a, b), (c, d), (e, f) in places]
    assert indices.tolist() == expected


def test_in_chunks(monkeypatch):
    weight = random24(333, 100, torch.float32)
    whole = compress(weight)
    monkeypatch.setitem(rounding.CHUNK, "cpu", 1000)
    assert all(torch.equal(a, b) for a, b in zip(whole, compress(weight), strict=True))


def test_what_is_not_2_4_is_refused():
    with pytest.raises(ValueError, match="not 2:4: three or four weights of one group are not zero"):
        compress(torch.tensor([[1.0, 0, 2, 3]]))
    with pytest.raises(ValueError, match="no whole groups of four"):
        compress(torch.zeros(2, 6))
