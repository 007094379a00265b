"""Every implementation against float64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from aograph.kernels import cuda, cuda_scaled_linear
from aograph.kernels.cuda_scaled_linear import ScaledPlan
from aograph.kernels.op import Case
from aograph.kernels.prune24 import prune24
from aograph.kernels.sparse24_linear import FROM_TOKENS, pack, pays, sparse24_linear
from aograph.kernels.sparse24_scaled_linear import SPARSE
from torch._subclasses import FakeTensorMode

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5, torch.float64: 1e-12}
device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_implementation = pytest.mark.parametrize("name", [each.name for each in sparse24_linear])


def linear(N, K, dtype, device="cpu", bias=True):
    weight = prune24(torch.randn(N, K).mul(0.1).to(dtype).to(device))
    return weight, *pack(weight), torch.randn(N).to(dtype).to(device) if bias else None


def run(name, x, *arguments):
    supported = sparse24_linear[name].supports(sparse24_linear.case_of(x, *arguments))
    if supported is not True:
        pytest.skip(supported)
    return sparse24_linear.run(x, *arguments, implementation=name)


def check(y, x, weight, bias):
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert y.dtype == x.dtype and y.shape == expected.shape
    assert (y.double() - expected).norm() <= TOLERANCE[x.dtype] * expected.norm()


@device
@dtype
@each_implementation
@pytest.mark.parametrize("N, K", [(1, 4), (3, 8), (129, 12), (3, 100), (129, 512), (64, 512)])
def test_computes_the_linear(N, K, name, dtype, device):
    for M, bias in [(1, True), (3, False), (17, True), (300, True)]:
        weight, *arguments = linear(N, K, dtype, device, bias)
        x = torch.randn(M, K, dtype=dtype, device=device)
        check(run(name, x, *arguments), x, weight, arguments[-1])


@device
@each_implementation
def test_nan_and_inf_reach_what_reads_them_and_no_other_row(name, device):
    weight, *arguments = linear(64, 64, torch.bfloat16, device)
    x = torch.randn(5, 64, dtype=torch.bfloat16, device=device)
    clean = run(name, x, *arguments)
    x[1, 5], x[3, 0] = float("nan"), float("inf")
    y = run(name, x, *arguments)
    assert y[1][weight[:, 5] != 0].isnan().all() and not y[3][weight[:, 0] != 0].isfinite().any()
    assert torch.equal(y[[0, 2, 4]], clean[[0, 2, 4]])


@device
def test_any_shape_and_stride_of_x(device):
    weight, *arguments = linear(32, 64, torch.float32, device)
    wide = torch.randn(4, 6, 128, device=device)
    for x in (wide[0, 0, :64], wide[..., ::2], wide[..., :64].transpose(0, 1), wide[:1, :1, :64].expand(3, 2, 64)):
        check(sparse24_linear(x, *arguments), x, weight, arguments[-1])
    for shape in [(0, 64), (2, 0, 64)]:
        assert sparse24_linear(torch.empty(shape, device=device), *arguments).shape == (*shape[:-1], 32)


def test_fake_and_registration():
    _, *arguments = linear(30, 20, torch.float32)
    torch.library.opcheck(sparse24_linear.overload, (torch.randn(2, 3, 20), *arguments))
    with FakeTensorMode() as mode:
        inside = [mode.from_tensor(each) for each in arguments]
        assert sparse24_linear(torch.empty(2, 0, 20), *inside).shape == (2, 0, 30)
        values, indices = pack(torch.empty(6, 20, dtype=torch.bfloat16))
    assert (values.shape, indices.shape, values.dtype) == ((6, 10), (6, 3), torch.bfloat16)


def test_gradients_of_x_and_bias():
    weight, values, indices, bias = linear(12, 16, torch.float64)
    x, bias = torch.randn(3, 16, dtype=torch.float64, requires_grad=True), bias.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, b: sparse24_linear(x, values, indices, b), (x, bias))
    (of_x,) = torch.autograd.grad(sparse24_linear(x, values, indices, bias).sum(), x)
    torch.testing.assert_close(of_x, weight.sum(0).expand(3, -1))


def test_what_does_not_fit_is_named():
    _, values, indices, bias = linear(12, 16, torch.float32)
    x = torch.ones(2, 16)
    for arguments, message in (
        ((x[:, :8], values, indices, bias), r"x is float32 \[2, 8\]; expected float \[..., 16\]"),
        ((x.bfloat16(), values, indices, bias), r"values is float32 \[12, 8\] on cpu; expected bfloat16"),
        ((x, values, indices.char(), bias), r"indices is int8 \[12, 2\] on cpu; expected uint8 \[12, 2\]"),
        ((x, values, indices[:, :1], bias), r"indices is uint8 \[12, 1\]"),
        ((x, values, indices, bias[:3]), r"bias is float32 \[3\]"),
    ):
        with pytest.raises(ValueError, match="sparse24_linear: " + message):
            sparse24_linear(*arguments)


def test_an_artifact_calls_the_op_as_all_that_it_could_hold_is_slower_than_a_dense_product():
    for op in (sparse24_linear, *SPARSE.values()):
        assert not any(each.standalone for each in op)


def test_where_it_pays(monkeypatch):
    gpu = Case("cuda", torch.bfloat16, 4096, 4096, 4096, capability=(9, 0))
    assert pays(replace(gpu, device="cpu", capability=None)) == "no sparse kernel on cpu"
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert pays(gpu) == "cuSPARSELt is not in this build of torch"
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    assert pays(gpu) is True
    assert pays(replace(gpu, M=FROM_TOKENS - 1)) == f"slower than dense below M = {FROM_TOKENS}"
    assert "multiples of 16" in pays(replace(gpu, K=4100))
    assert "bf16, fp16" in pays(replace(gpu, dtype=torch.float32))


@pytest.mark.parametrize("op, dtype", [(sparse24_linear, torch.bfloat16), (SPARSE["int8_scaled_linear"], torch.int8)])
def test_where_the_own_kernel_pays(op, dtype, monkeypatch):
    def plan(codes, sparse, M, N, K):
        assert codes is dtype and sparse
        return ScaledPlan(1, 1, 4, 1, 128, 64, 8, behind=M == 256)

    monkeypatch.setattr(cuda_scaled_linear, "plan", plan)
    monkeypatch.setattr(cuda, "available", lambda capability: True)
    gpu = Case("cuda", torch.bfloat16, 1, 4096, 4096, capability=(9, 0))
    assert pays(gpu, op) is True and pays(replace(gpu, M=257), op) is True
    assert pays(replace(gpu, M=256), op) == "slower than dense at M = 256"
