"""What quantizing an activation gives, against float64, and what rows that hurt come out as."""

import hypothesis.strategies as st
import pytest
import torch
from aograph.kernels.quantized_activation import (
    FLOAT8,
    INT8,
    TINY,
    Float8PerTensor,
    Int8PerTensor,
    float8_per_block,
    float8_per_tensor,
    float8_per_token,
    int8_per_token,
    int8_per_token_asymmetric,
)
from hypothesis import given, settings

E4M3 = torch.float8_e4m3fn
INT8_TOKENS = int8_per_token, int8_per_token_asymmetric
DYNAMIC = *INT8_TOKENS, float8_per_token, float8_per_tensor, float8_per_block
STATIC = Int8PerTensor(0.04), Int8PerTensor(0.04, 7), Float8PerTensor(0.01)
each = pytest.mark.parametrize("quantize", DYNAMIC, ids=lambda f: f.__name__)
floats = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def back(quantized, quantize=None):
    """The activation that codes stand for, in float64."""
    x, scale, zero = quantized
    if scale is None:
        scale, zero = torch.tensor(quantize.scale).double(), getattr(quantize, "zero", None)
    codes = x.double() - (0 if zero is None else zero)
    return (codes.unflatten(-1, (scale.shape[-1] if scale.dim() else 1, -1)) * scale.double()[..., None]).flatten(-2)


@each
@floats
@pytest.mark.parametrize("shape", [(128,), (5, 256), (2, 3, 128), (0, 128), (2, 0, 128)])
def test_shapes_and_dtypes(quantize, dtype, shape):
    x, scale, zero = quantize(torch.randn(shape).to(dtype))
    assert x.shape == shape and x.dtype is (torch.int8 if quantize in INT8_TOKENS else E4M3)
    groups = {float8_per_tensor: (1,), float8_per_block: (*shape[:-1], shape[-1] // 128)}
    assert scale.dtype is torch.float32 and scale.shape == groups.get(quantize, (*shape[:-1], 1))
    assert (zero is not None) == (quantize is int8_per_token_asymmetric)
    assert zero is None or (zero.dtype is torch.int32 and zero.shape == scale.shape)


@floats
def test_int8_is_off_by_half_a_step(dtype):
    for x in (torch.randn(17, 100), torch.rand(17, 100) + 3, -torch.rand(17, 100), torch.randn(17, 1)):
        x = x.to(dtype)
        for quantize in INT8_TOKENS:
            found = quantize(x)
            assert ((back(found) - x.double()).abs() <= found.x_scale * 0.5001).all(), quantize


@floats
def test_float8_is_the_nearest_code(dtype):
    x = (torch.randn(17, 256) * torch.rand(17, 256).mul(8).exp()).to(dtype)
    for quantize in (float8_per_token, float8_per_tensor, float8_per_block):
        found = quantize(x)
        smallest = found.x_scale.repeat_interleave(256 // found.x_scale.shape[-1], -1).double() * 2**-9
        assert ((back(found) - x.double()).abs() <= (x.double().abs() / 16).maximum(smallest) * 1.0001).all(), quantize


def test_the_whole_range_is_used():
    x = torch.randn(9, 128)
    assert int8_per_token(x).x.abs().amax(-1).eq(INT8).all()
    low, high = int8_per_token_asymmetric(x).x.aminmax(dim=-1)
    assert low.eq(-128).all() and high.eq(127).all()
    assert float8_per_token(x).x.float().abs().amax(-1).eq(FLOAT8).all()
    assert float8_per_block(x.view(3, 384)).x.float().unflatten(-1, (3, 128)).abs().amax(-1).eq(FLOAT8).all()


def test_ties_go_to_the_even_code():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert int8_per_token(x).x.tolist() == [[127, 0, 2, 2, 0, -2]]


def test_of_one_sign_the_zero_point_gains_a_bit():
    x = torch.rand(64, 256)
    symmetric, asymmetric = ((back(quantize(x)) - x).norm() for quantize in INT8_TOKENS)
    assert asymmetric < 0.6 * symmetric


@each
@floats
def test_zeros_stay_zeros(quantize, dtype):
    x = torch.zeros(3, 128, dtype=dtype)
    x[1] = torch.randn(128)
    found = quantize(x)
    assert back(found)[::2].eq(0).all() and found.x_scale.gt(0).all() and found.x_scale.isfinite().all()


@each
@pytest.mark.parametrize("huge", [3e38, -3e38, 1e30])
def test_one_huge_value(quantize, huge):
    x = torch.randn(3, 128)
    x[1, 5] = huge
    found = quantize(x)
    assert back(found).isfinite().all() and found.x_scale.isfinite().all()
    assert abs(back(found)[1, 5] / huge - 1) < 0.01
    others = back(found)[::2] - x[::2]
    assert quantize is float8_per_tensor or others.abs().max() < 0.2  # there all share a scale


@each
def test_the_smallest_values(quantize):
    x = torch.tensor([[1e-45], [TINY], [-1e-40]]).expand(3, 128)
    found = quantize(x)
    assert found.x_scale.ge(TINY).all() and (back(found) - x).abs().max() <= TINY


@each
@floats
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_poisoned_row_has_no_scale(quantize, dtype, poison):
    x = torch.randn(3, 256).to(dtype)
    x[1, 200] = poison
    scale = quantize(x).x_scale
    if quantize is float8_per_tensor:
        assert scale.isnan().all()
    else:
        assert scale[1, -1].isnan() and scale[::2].isfinite().all()


@pytest.mark.parametrize("quantize", STATIC, ids=str)
@floats
def test_given_scales(quantize, dtype):
    x = torch.randn(2, 5, 64).to(dtype)
    found = quantize(x)
    assert found.x_scale is None and found.x_zero is None
    assert (back(found, quantize) - x.double()).abs().max() <= (0.0201 if isinstance(quantize, Int8PerTensor) else 0.2)


def test_what_is_outside_of_a_given_range_saturates():
    x = torch.tensor([1e9, -1e9, torch.inf, -torch.inf, torch.nan])
    assert Int8PerTensor(0.1)(x).x.tolist() == [127, -127, 127, -127, 0]
    assert Int8PerTensor(0.1, 9)(x).x.tolist() == [127, -128, 127, -128, 9]
    assert Float8PerTensor(0.1)(x).x.float()[:4].tolist() == [448, -448, 448, -448]
    assert Float8PerTensor(0.1)(x).x[4].float().isnan()


@given(st.floats(-100, 100), st.floats(-100, 100))
@settings(max_examples=50)
def test_a_given_range_is_spanned(a, b):
    low, high = min(a, b), max(a, b)
    x = torch.linspace(low, high, 100)
    for asymmetric in (False, True):
        quantize = Int8PerTensor.spanning(low, high, asymmetric)
        assert (back(quantize(x), quantize) - x.double()).abs().max() <= quantize.scale * 0.51 + 1e-5
        assert -128 <= quantize.zero <= 127 and (asymmetric or quantize.zero == 0)


def test_compiled_it_gives_the_same():
    x = torch.randn(7, 128)
    x[1], x[2, 3], x[3, 4] = 0, torch.nan, torch.inf
    eager, compiled = int8_per_token(x), torch.compile(int8_per_token)(x)
    torch.testing.assert_close(compiled.x_scale, eager.x_scale, equal_nan=True)
    differences = (compiled.x.int() - eager.x.int())[[0, 1, 4, 5, 6]]
    assert differences.abs().max() <= 1 and (differences != 0).sum() <= 2  # a tie may fall to the other side


@pytest.mark.cuda
@each
@floats
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_gpu_gives_the_same_codes(quantize, dtype, compiled):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    x = torch.randn(70, 1280).to(dtype)
    if quantize is not float8_per_tensor:  # there all would be NaN
        x[1, 5], x[2, 7], x[3, 9], x[4], x[5], x[6, 0] = torch.nan, torch.inf, -torch.inf, 0, 1e-45, 6e4
        x[7, :6] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5])
        x[7, 6:] = 0
    found = torch.compile(lambda x: tuple(quantize(x)), dynamic=False)(x.cuda()) if compiled else quantize(x.cuda())
    expected = quantize(x)
    torch.testing.assert_close(found[1].cpu(), expected.x_scale, rtol=1e-6, atol=0, equal_nan=True)
    whole = expected.x_scale.isfinite().all(-1)
    codes, same = (each.float()[whole] if whole.dim() else each.float() for each in (found[0].cpu(), expected.x))
    apart = (codes - same).abs()
    assert (apart <= same.abs() / 8 + 1).all() and (apart > 0).float().mean() < 5e-3  # two codes may be as near
    if expected.x_zero is not None:
        torch.testing.assert_close(found[2].cpu()[whole], expected.x_zero[whole], rtol=0, atol=1)
