"""What ops on quantized activations share: arguments by name, shapes, what does not fit."""

import pytest
import torch
from aograph.kernels.int8_scaled_linear import int8_scaled_linear as op
from aograph.kernels.quantized_activation import int8_per_token
from aograph.kernels.scaled_linear import rows, scaled

Q, SCALE = torch.randint(-127, 128, (48, 64), dtype=torch.int8), torch.rand(48)


def call(shape=(3, 64), **given):
    activation = int8_per_token(torch.randn(shape))._asdict()
    return op.arguments(**{"q": Q, "scale": SCALE, "dtype": torch.float32, **activation, **given})


def test_arguments_by_name():
    assert op.names == ["x", "x_scale", "x_zero", "q", "scale", "sums", "bias", "dtype"]
    assert op.arguments(q=1, dtype=2, x=3) == (3, None, None, 1, None, None, None, 2)


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 5, 64), (0, 64), (2, 0, 64)])
def test_every_shape_of_x(shape):
    y = op(*call(shape))
    assert y.shape == (*shape[:-1], 48) and y.dtype is torch.float32
    assert op(*call(shape, dtype=torch.bfloat16)).dtype is torch.bfloat16
    meta = op(*(each.to("meta") if isinstance(each, torch.Tensor) else each for each in call(shape)))
    assert meta.shape == y.shape and meta.dtype == y.dtype


def test_rows_of_an_activation():
    scale = torch.rand(2, 1, 3, 1).transpose(0, 1)
    assert rows(scale, 4).shape == (6, 1) and rows(scale, 4).is_contiguous()
    one = torch.rand(1)
    assert rows(one, 2) is one and rows(None, 2) is None and rows(one, 1).shape == (1, 1)


def test_the_case_says_how_x_is_scaled():
    per_token, shared = op.case_of(*call()), op.case_of(*call(x_scale=torch.ones(1)))
    assert per_token.per_token and not shared.per_token and per_token.M == 3 and per_token.dtype is torch.float32
    zeros = {"x_zero": torch.zeros(3, 1, dtype=torch.int32), "sums": Q.sum(1, dtype=torch.int32)}
    assert op.case_of(*call(**zeros)).shifted and not per_token.shifted


@pytest.mark.parametrize(
    "given, message",
    [
        ({"x": torch.zeros(3, 64)}, r"x is float32 \[3, 64\] on cpu; expected int8 \[3, 64\]"),
        ({"x": torch.zeros(3, 63, dtype=torch.int8)}, r"x is int8 \[3, 63\]"),
        ({"x": torch.zeros((), dtype=torch.int8)}, r"x is int8 \[\]"),
        (
            {"x_scale": torch.ones(2, 1)},
            r"x_scale is float32 \[2, 1\] on cpu; expected float32 \[3, 1\] or \[\] or \[1\]",
        ),
        ({"x_scale": torch.ones(3, 1).double()}, r"x_scale is float64"),
        ({"scale": torch.ones(47)}, r"scale is float32 \[47\]"),
        ({"bias": torch.ones(47)}, r"bias is float32 \[47\]"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
        ({"dtype": torch.float8_e4m3fn}, "dtype is torch.float8_e4m3fn"),
    ],
)
def test_what_does_not_fit_is_said(given, message):
    with pytest.raises(ValueError, match=f"int8_scaled_linear: {message}"):
        op(*call(**given))


def test_calibrated_numbers_are_packed():
    weight = torch.randn(48, 64)
    q, scale, x_scale, x_zero = op.pack(weight, x_scale=0.5, x_zero=3)
    assert torch.equal(x_scale, torch.tensor([0.5])) and torch.equal(x_zero, torch.tensor([3], dtype=torch.int32))
    assert len(op.pack(weight)) == 2 and torch.equal(op.pack(weight)[0], q) and torch.equal(op.pack(weight)[1], scale)


def test_scales_meet_large_and_small_sums_in_an_order_that_fits():
    sums, x_scale, scale = torch.full((1, 1), 1e7), torch.full((1, 1), 1e33), torch.full((1,), 1e-3)
    assert scaled(sums, x_scale, scale, None, torch.float32).isfinite().all()
