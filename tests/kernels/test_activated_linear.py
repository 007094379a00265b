"""A linear with GELU behind it: what the ops mean; the CUDA kernel's functions: test_cuda_scaled_linear.py."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from aograph.kernels import cuda, cuda_scaled_linear
from aograph.kernels.activated_linear import ACTIVATED
from aograph.kernels.cuda_scaled_linear import ScaledPlan
from aograph.kernels.float8_scaled_linear import float8_scaled_linear
from aograph.kernels.int8_scaled_linear import int8_scaled_linear
from aograph.kernels.op import Case
from aograph.kernels.prune24 import prune24
from aograph.kernels.quantized_activation import float8_per_token, int8_per_token, int8_per_token_asymmetric
from aograph.kernels.scaled_linear import ScaledLinearOp
from torch._subclasses import FakeTensorMode

N, K = 48, 128
QUANTIZE = {torch.int8: int8_per_token, torch.float8_e4m3fn: float8_per_token}
each_op = pytest.mark.parametrize("op", ACTIVATED.values(), ids=lambda op: op.base.name)


def call(op, shape, dtype=torch.bfloat16, bias=True, device="cpu"):
    """The arguments of the linear that `op` is of."""
    base, weight = op.base, prune24(torch.randn(N, K, device=device) / 8).to(dtype)
    bias = torch.randn(N, dtype=dtype, device=device) if bias else None
    x = torch.randn(*shape, K, dtype=dtype, device=device)
    if not isinstance(base, ScaledLinearOp):
        return x, *base.pack(weight), bias
    names = [name for name in base.names[len(base.own) :] if name not in ("bias", "dtype", "sums")]
    given = dict(zip(names, base.pack(weight), strict=True)) | QUANTIZE[base.takes[0]](x)._asdict()
    return base.arguments(**given, bias=bias, dtype=dtype)


@each_op
@pytest.mark.parametrize("function, approximate", [("gelu", "none"), ("gelu_tanh", "tanh")])
@pytest.mark.parametrize("shape", [(0,), (1,), (2, 7)], ids=str)
def test_meaning(op, function, approximate, shape):
    linear = call(op, shape)
    expected = F.gelu(op.base(*linear), approximate=approximate)
    y = op(*linear, function)
    assert y.shape == (*shape, N) and y.dtype == torch.bfloat16 and torch.equal(y, expected)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert op(*linear, function).shape == y.shape


@each_op
def test_any_other_function_is_an_error(op):
    with pytest.raises(ValueError, match=f"{op.name}: function is 'relu'; expected one of gelu, gelu_tanh"):
        op(*call(op, (3,)), "relu")


@each_op
def test_what_runs_without_this_package_is_the_linear_s(op):
    case = op.case_of(*call(op, (3,)), "gelu")
    assert case.activated
    inner, whole = op.base.standalone(case, 1, 8), op.standalone(case, 1, 8)
    assert (inner and inner.name) == (whole and whole.name)
    if whole:
        linear = call(op, (3,))
        torch.testing.assert_close(op.apply(whole, *linear, "gelu"), op(*linear, "gelu"), rtol=2e-2, atol=2e-2)


@pytest.mark.cuda
@each_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 17), (300,)], ids=str)
def test_on_a_gpu(op, dtype, shape):
    linear = call(op, shape, dtype, device="cuda")
    y, expected = op(*linear, "gelu"), F.gelu(op.base(*linear).double())
    torch.testing.assert_close(y.double(), expected, rtol=2e-2, atol=2e-2)
    assert torch.equal(y, op(*linear, "gelu"))


def test_asymmetric_activations():
    op = ACTIVATED[int8_scaled_linear.overload]
    x, weight = torch.randn(5, K) + 2, torch.randn(N, K)
    q, scale, sums = int8_scaled_linear.pack(weight, sums=True)
    arguments = int8_scaled_linear.arguments(
        **int8_per_token_asymmetric(x)._asdict(), q=q, scale=scale, sums=sums, dtype=torch.float32
    )
    error = (op(*arguments, "gelu") - F.gelu(x @ weight.T)).norm() / F.gelu(x @ weight.T).norm()
    assert error < 0.02


def test_the_kernel_takes_over_where_it_is_a_little_behind(monkeypatch):
    """A linear that cuBLASLt multiplies faster is the kernel's, once GELU is part of it."""
    plan = ScaledPlan(1, 1, 4, 1, 128, 256, 8, behind=True)
    monkeypatch.setattr(cuda_scaled_linear, "plan", lambda *_: plan)
    monkeypatch.setattr(cuda, "available", lambda capability: True)
    case = Case("cuda", torch.bfloat16, 4096, 5120, 1280, None, (9, 0))
    assert float8_scaled_linear["cuda"].supports(case) == cuda_scaled_linear.BEHIND
    assert ACTIVATED[float8_scaled_linear.overload]["cuda"].supports(replace(case, activated=True)) is True
