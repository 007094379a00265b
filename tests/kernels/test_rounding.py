"""Rounding: what must hold for any finite weight."""

import pytest
import torch
from aograph.kernels import rounding
from aograph.kernels.rounding import ALGORITHMS, Spec
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
INT8 = Spec(bits=8, group_size=None, symmetric=True)
INT4 = Spec(bits=4, group_size=32, symmetric=False)
SPECS = [INT8, INT4, Spec(8, 32, False), Spec(4, 64, True), Spec(2, 32, False)]

every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@st.composite
def weights(draw):
    """[N, 64·n] of any float dtype, of any magnitude that it holds, centred or not, some with outliers."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.integers(1, 9)), 64 * draw(st.integers(1, 3))
    random = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    weight = torch.randn(shape, generator=random) + draw(st.sampled_from([0, 0, 1, -30]))
    if draw(st.booleans()):
        weight[:, 3] *= 50
    return (weight * 10.0 ** draw(st.integers(-8, 1))).to(dtype)


def check(weight: torch.Tensor, spec: Spec, algorithm) -> rounding.Quantized:
    """The form of a result: dtypes, shapes, codes in their range, a scale that can be divided by."""
    result = algorithm(weight, spec)
    groups = weight.shape[1] // (spec.group_size or weight.shape[1])
    assert result.q.shape == weight.shape and result.q.dtype == (torch.int8 if spec.symmetric else torch.uint8)
    low, high = (-spec.largest, spec.largest) if spec.symmetric else (0, (1 << spec.bits) - 1)
    assert result.q.min() >= low and result.q.max() <= high
    for part in (result.scale, result.zero) if result.zero is not None else (result.scale,):
        assert part.shape == (weight.shape[0], groups) and part.dtype == weight.dtype and part.isfinite().all()
    assert (result.scale > 0).all() and (result.zero is None) == spec.symmetric
    return result


def squared_error(weight: torch.Tensor, result: rounding.Quantized) -> float:
    return (weight.double() - result.dequantize(torch.float64)).square().sum().item()


@every_spec
@settings(max_examples=20, deadline=None)
@given(weight=weights())
def test_minmax_is_off_by_half_a_step(spec, weight):
    result = check(weight, spec, rounding.minmax)
    off = (weight.double() - result.dequantize(torch.float64)).abs().unflatten(1, (result.scale.shape[1], -1))
    step = result.scale.double()[..., None]
    arithmetic = weight.double().abs().max() * 1e-6
    assert (off <= step * 0.5001 + arithmetic).all()


@every_spec
@settings(max_examples=20, deadline=None)
@given(weight=weights())
def test_mse_is_never_worse(spec, weight):
    least, spanned = check(weight, spec, rounding.mse), check(weight, spec, rounding.minmax)
    assert squared_error(weight, least) <= squared_error(weight, spanned) * (1 + 1e-5)


def test_mse_clips_outliers():
    weight = torch.randn(64, 128)
    weight[:, 0] = 6
    clipped, spanned = rounding.mse(weight, INT4), rounding.minmax(weight, INT4)
    assert squared_error(weight, clipped) < 0.95 * squared_error(weight, spanned)


@every_algorithm
@every_dtype
@every_spec
def test_constant_groups_are_exact(algorithm, dtype, spec):
    for value in (0.0, 1.0, -3.5, 0.02):
        weight = torch.full((3, 64), value, dtype=dtype)
        back = check(weight, spec, algorithm).dequantize(dtype)
        torch.testing.assert_close(back, weight, rtol=2**-7 if spec.symmetric else 0, atol=1e-6)
    assert not check(torch.zeros(3, 64, dtype=dtype), INT8, algorithm).q.any()


@every_algorithm
@every_dtype
@every_spec
def test_extreme_magnitudes(algorithm, dtype, spec):
    info = torch.finfo(dtype)
    for magnitude in (info.max, info.smallest_normal, info.smallest_normal * info.eps):
        weight = torch.linspace(-1, 1, 192).double().reshape(3, 64).mul(magnitude).clamp(info.min, info.max).to(dtype)
        check(weight, spec, algorithm)


def test_codes_meet_the_stored_scale():
    weight = torch.randn(20, 256, dtype=torch.bfloat16)
    result = rounding.minmax(weight, INT8)
    nearest = (weight.double() / result.scale.double()).round()
    assert (result.q - nearest).abs().max() <= 1 and (result.q != nearest).double().mean() < 1e-3


def test_ties_go_to_even():
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert rounding.minmax(weight, INT8).q.tolist() == [[127, 0, 2, 2, 0, -2]]


@every_algorithm
@every_spec
def test_pieces_and_strides_change_nothing(algorithm, spec, monkeypatch):
    weight = torch.randn(128, 70).T
    whole = algorithm(weight, spec)
    monkeypatch.setitem(rounding.CHUNK, "cpu", 1000)
    pieces = algorithm(weight.contiguous(), spec)
    assert torch.equal(whole.q, pieces.q) and torch.equal(whole.scale, pieces.scale) and whole.q.is_contiguous()


@every_algorithm
@every_spec
def test_without_data(algorithm, spec):
    real = algorithm(torch.randn(5, 128), spec)
    with FakeTensorMode():
        fakes = algorithm(torch.empty(5, 128), spec), algorithm(torch.empty(5, 128, device="meta"), spec)
    for fake in (*fakes, algorithm(torch.empty(5, 128, device="meta"), spec)):
        assert (fake.q.shape, fake.q.dtype) == (real.q.shape, real.q.dtype)
        assert (fake.scale.shape, fake.scale.dtype) == (real.scale.shape, real.scale.dtype)


def test_a_parameter_gives_plain_tensors():
    result = rounding.minmax(torch.nn.Parameter(torch.randn(4, 64)), INT4)
    assert not result.scale.requires_grad and not result.zero.requires_grad


def test_half_a_group_is_refused():
    with pytest.raises(ValueError, match="4 × 48 has no whole groups of 32"):
        rounding.minmax(torch.ones(4, 48), INT4)
