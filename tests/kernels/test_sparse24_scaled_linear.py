"""Every implementation against float64, and against the dense op on the same codes."""

from dataclasses import replace

import pytest
import torch
from aograph.kernels.prune24 import prune24
from aograph.kernels.quantized_activation import (
    float8_per_block,
    float8_per_tensor,
    float8_per_token,
    int8_per_token,
    int8_per_token_asymmetric,
)
from aograph.kernels.sparse24 import decompress
from aograph.kernels.sparse24_scaled_linear import SPARSE
from torch._subclasses import FakeTensorMode

FLOAT8 = {"row": float8_per_token, "tensor": float8_per_tensor, "block": float8_per_block}
FAST_ACCUMULATION = 5e-3  # of tensor cores, which keep fewer bits of sums of float8
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-6}
device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
asymmetric = pytest.mark.parametrize("asymmetric", [False, True])
int8, float8 = SPARSE["int8_scaled_linear"], SPARSE["float8_scaled_linear"]


def int8_call(M, N, K, dtype, asymmetric=False, device="cpu", bias=True):
    """The arguments of a call, and what it should give, in float64."""
    x = (torch.randn(M, K) + asymmetric).to(dtype).to(device)
    codes, x_scale, x_zero = (int8_per_token_asymmetric if asymmetric else int8_per_token)(x)
    weight = prune24(torch.randn(N, K).to(dtype).to(device))
    values, indices, scale, *sums = int8.pack(weight, sums=asymmetric)
    b = torch.randn(N).to(dtype).to(device) if bias else None
    shifted = codes.double() - (0 if x_zero is None else x_zero)
    q = decompress(values, indices).double()
    expected = (shifted @ q.T) * x_scale.double() * scale.double() + (0 if b is None else b.double())
    return (codes, x_scale, x_zero, values, indices, scale, *(sums or [None]), b, dtype), expected


def float8_call(M, N, K, dtype, granularity="row", device="cpu"):
    x = torch.randn(M, K).to(dtype).to(device)
    codes, x_scale, _ = FLOAT8[granularity](x)
    values, indices, scale = float8.pack(prune24(torch.randn(N, K).to(dtype).to(device)), granularity=granularity)
    bias = torch.randn(N).to(dtype).to(device)
    q = decompress(values, indices)
    return (codes, x_scale, values, indices, scale, bias, dtype), (
        codes,
        x_scale,
        q,
        scale,
        bias.double(),
        torch.float64,
    )


def run(op, name, arguments):
    supported = op[name].supports(op.case_of(*arguments))
    if supported is not True:
        pytest.skip(supported)
    return op.run(*arguments, implementation=name)


@device
@asymmetric
@dtype
@pytest.mark.parametrize("name", [each.name for each in int8])
@pytest.mark.parametrize("N, K", [(1, 4), (3, 12), (129, 100), (64, 512)])
def test_int8(N, K, name, dtype, asymmetric, device):
    for M, bias in [(1, True), (3, False), (17, True), (300, True)]:
        arguments, expected = int8_call(M, N, K, dtype, asymmetric, device, bias)
        y = run(int8, name, arguments)
        assert y.dtype == dtype and y.shape == (M, N)
        assert (y.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@device
@dtype
@pytest.mark.parametrize("name", [each.name for each in float8])
@pytest.mark.parametrize("granularity", ["row", "tensor", "block"])
def test_float8(granularity, name, dtype, device):
    for M, N, K in [(1, 129, 128), (17, 64, 512), (300, 64, 128)]:
        arguments, exact = float8_call(M, N, K, dtype, granularity, device)
        expected = float8.base.run(*exact, implementation="reference")
        y = run(float8, name, arguments)
        assert y.dtype == dtype and y.shape == (M, N)
        rounded = torch.bfloat16 if name == "cusparselt" else dtype
        tolerance = max(TOLERANCE[rounded], FAST_ACCUMULATION if device == "cuda" else 1e-5)
        assert (y.double() - expected).norm() <= tolerance * expected.norm()


def test_blocks_of_scales_are_not_for_cusparselt():
    case = replace(float8.case_of(*float8_call(300, 64, 128, torch.bfloat16, "block")[0]), device="cuda")
    assert float8["cusparselt"].supports(case) == "cuSPARSELt has no scales of blocks"


@asymmetric
def test_the_codes_are_those_of_the_dense_op(asymmetric):
    weight = prune24(torch.randn(33, 64))
    values, indices, *rest = int8.pack(weight, algorithm="mse", sums=asymmetric)
    q, *dense = int8.base.pack(weight, algorithm="mse", sums=asymmetric)
    assert torch.equal(decompress(values, indices), q) and len(rest) == len(dense)
    assert all(torch.equal(a, b) for a, b in zip(rest, dense, strict=True))


def test_no_tokens_fake_and_registration():
    arguments, _ = int8_call(2, 30, 20, torch.float32)
    torch.library.opcheck(int8.overload, arguments)
    for wrap in (lambda t: t, FakeTensorMode().from_tensor):
        codes, x_scale, *rest = (wrap(each) if isinstance(each, torch.Tensor) else each for each in arguments)
        y = int8(codes[:0].view(2, 0, 20), x_scale[:0].view(2, 0, 1), *rest)
        assert y.shape == (2, 0, 30) and y.dtype == torch.float32


def test_what_does_not_fit_is_named():
    (x, x_scale, x_zero, values, indices, *rest), _ = int8_call(2, 12, 16, torch.float32)
    for arguments, message in (
        ((x, x_scale, x_zero, values.float(), indices), r"int8_sparse24_scaled_linear: values is float32 \[12, 8\]"),
        ((x, x_scale, x_zero, values, indices[:, :1]), r"int8_sparse24_scaled_linear: indices is uint8 \[12, 1\]"),
        (
            (x[:, :8], x_scale, x_zero, values, indices),
            r"int8_sparse24_scaled_linear, as .*: x is int8 \[2, 8\] on cpu; expected int8 \[2, 16\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            int8(*arguments, *rest)
