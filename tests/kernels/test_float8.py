"""e4m3: how weights are rounded to it, and that its codes come back as they are."""

import pytest
import torch
from aograph.kernels import float8, rounding
from aograph.kernels.float8 import FLOAT8, FLOAT8_MAX
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CODES = torch.arange(256, dtype=torch.uint8).view(FLOAT8)
FINITE = CODES[~CODES.float().isnan()]
VALUES = FINITE.double().unique()  # sorted

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_tile = pytest.mark.parametrize("tile", [(1, 256), (300, 256), (128, 128)], ids=str)


@st.composite
def weights(draw):
    """[N, 64] of any float dtype, of any magnitude that it holds, some with outliers."""
    dtype = draw(st.sampled_from(DTYPES))
    random = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    weight = torch.randn(draw(st.integers(1, 9)), 64, generator=random)
    if draw(st.booleans()):
        weight[:, 3] *= 1000
    return (weight * 10.0 ** draw(st.integers(-8, 1))).to(dtype)


@settings(max_examples=30, deadline=None)
@given(weight=weights())
def test_the_nearest_code_is_taken(weight):
    q, scale = float8.pack(weight, (1, 64), weight.dtype)
    assert q.dtype is FLOAT8 and scale.dtype is weight.dtype and (scale > 0).all() and scale.isfinite().all()
    exact = weight.double() / scale.double()
    nearest = (exact[..., None] - VALUES).abs().amin(-1)
    assert ((q.double() - exact).abs() <= nearest + exact.abs() * 1e-6).all()  # of the quotient in fp32
    assert (exact.abs() <= FLOAT8_MAX * rounding.HEADROOM).all()  # the largest code is the nearest to all beyond it


@every_tile
@every_dtype
def test_tiles_share_a_scale(dtype, tile):
    weight = torch.randn(300, 256).mul(torch.logspace(-2, 0, 300)[:, None]).to(dtype)
    q, scale = float8.pack(weight, tile, torch.float32)
    rows, columns = tile
    assert scale.shape == (-(-300 // rows), 256 // columns) and scale.dtype is torch.float32
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            assert scale[i, j] == weight[part].float().abs().max() / FLOAT8_MAX
            assert q[part].float().abs().max() == FLOAT8_MAX


@every_tile
def test_pieces_and_strides_change_nothing(tile, monkeypatch):
    weight = torch.randn(256, 300).T
    whole = float8.pack(weight, tile, torch.float32)
    monkeypatch.setitem(rounding.CHUNK, "cpu", 1000)
    for one, other in zip(whole, float8.pack(weight.contiguous(), tile, torch.float32), strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)) and one.is_contiguous()


@every_dtype
def test_zeros_and_extremes(dtype):
    info = torch.finfo(dtype)
    for magnitude in (0, info.max, info.smallest_normal, info.smallest_normal * info.eps):
        weight = torch.linspace(-1, 1, 64).double().mul(magnitude).clamp(info.min, info.max).to(dtype).expand(3, 64)
        q, scale = float8.pack(weight, (1, 64), dtype)
        assert (scale > 0).all() and scale.isfinite().all() and q.float().isfinite().all()
        off = (q.double() * scale.double()[:1] - weight.double()).abs().max()
        assert off <= scale.double().max() * 16.1  # half of the largest step


@every_tile
def test_without_data(tile):
    real = float8.pack(torch.randn(300, 256).bfloat16(), tile, torch.float32)
    with FakeTensorMode():
        fake = float8.pack(torch.empty(300, 256, dtype=torch.bfloat16), tile, torch.float32)
    meta = float8.pack(torch.empty(300, 256, dtype=torch.bfloat16, device="meta"), tile, torch.float32)
    for one, *others in zip(real, fake, meta, strict=True):
        assert all((o.shape, o.dtype) == (one.shape, one.dtype) for o in others)


def test_half_a_tile_is_refused():
    with pytest.raises(ValueError, match="4 × 192 has no whole tiles of 128 inputs"):
        float8.pack(torch.ones(4, 192), (128, 128), torch.float32)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_every_code_comes_back(dtype):
    assert torch.equal(float8.widen(FINITE, dtype).double(), FINITE.double())
    columns = FINITE[:252].view(14, 18)[:, ::3]  # not contiguous
    assert torch.equal(float8.widen(columns, dtype).double(), columns.double())
    assert float8.widen(torch.empty(0, 4, dtype=FLOAT8), dtype).shape == (0, 4)


def test_whole_numbers_come_back():
    codes = torch.arange(-128, 128, dtype=torch.int8)
    assert torch.equal(float8.widen(codes, torch.bfloat16).double(), codes.double())
