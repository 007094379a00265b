"""The CUDA C++ kernel for codes of 8 bits and 2:4 weights, against float64."""

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from aograph.kernels import cuda_scaled_linear, nvrtc, plans, sparse24
from aograph.kernels.cuda_linear import CAPABILITIES
from aograph.kernels.cuda_scaled_linear import TOKENS, ScaledPlan
from aograph.kernels.op import Case
from aograph.kernels.prune24 import prune24
from aograph.kernels.scaled_tuning import candidates

PLANS = [
    ScaledPlan(1, 1, 4, 1, 128, 128, 8),
    ScaledPlan(1, 1, 4, 1, 64, 8, 4),
    ScaledPlan(1, 2, 4, 1, 128, 256, 8),
    ScaledPlan(1, 4, 4, 1, 128, 256, 8),
    ScaledPlan(1, 2, 4, 2, 128, 64, 8),
    ScaledPlan(2, 1, 4, 2, 64, 8, 4),
    ScaledPlan(4, 1, 2, 2, 128, 32, 8),
    ScaledPlan(8, 1, 2, 2, 64, 16, 4),
    ScaledPlan(1, 1, 2, 2, 256, 64, 8),
    ScaledPlan(2, 1, 4, 1, 64, 128, 4),
]
SHAPES = [(1, 64, 1024), (5, 200, 2048), (77, 1000, 1152), (300, 264, 4096), (513, 520, 2048)]
KINDS = [
    pytest.param(codes, sparse, id=f"{kind} of {codes}".replace("torch.", ""))
    for (codes, sparse), kind in cuda_scaled_linear.KINDS.items()
]


@pytest.fixture
def gpu():
    if torch.cuda.get_device_capability() not in CAPABILITIES:
        pytest.skip("the kernel is for another architecture")


def codes_of(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    if dtype is torch.int8:
        return torch.randint(-127, 128, (rows, columns), device="cuda", dtype=dtype)
    made = torch.randn(rows, columns, device="cuda") * (100 if dtype.itemsize == 1 else 1)
    made[:, 3] *= 4 if dtype.itemsize == 1 else 50  # an input that is larger than others
    return (made.clamp(-448, 448) if dtype.itemsize == 1 else made).to(dtype)


def drawn(codes: torch.dtype, sparse: bool, M: int, N: int, K: int, shared: bool, dtype: torch.dtype):
    """The arguments of a call, and y in float64."""
    x, q = codes_of(M, K, codes), codes_of(N, K, codes)
    if sparse:
        q = prune24(q.float()).to(codes)
    exact = x.double(), q.double()
    scaled = codes.itemsize == 1
    x_scale = torch.rand((1,) if shared else (M, 1), device="cuda") + 0.5 if scaled else None
    channels = 1 if shared and codes is torch.float8_e4m3fn else N  # int8 has a scale for each
    scale = torch.rand(channels, device="cuda") + 0.5 if scaled else None
    scale = scale.to(dtype) if codes is torch.int8 else scale
    zero = sums = None
    if codes is torch.int8 and M % 2:
        zero = torch.randint(-20, 20, (1,) if shared else (M, 1), device="cuda", dtype=torch.int32)
        sums = q.sum(1, dtype=torch.int32)
        exact = exact[0] - zero.double(), exact[1]
    bias = None if shared else torch.randn(N, device="cuda", dtype=dtype)
    y = exact[0] @ exact[1].T
    if scaled:
        y = y * x_scale.double() * scale.double()
    if bias is not None:
        y = y + bias.double()
    packed, indices = sparse24.compress(q) if sparse else (q, None)
    return (x, x_scale, zero, packed, indices, scale, sums, bias, dtype), y


@pytest.mark.cuda
@pytest.mark.parametrize("shared", [False, True], ids=["by token, bias", "one for all"])
@pytest.mark.parametrize("codes, sparse", KINDS)
@pytest.mark.parametrize("plan", PLANS, ids=[str(i) for i in range(len(PLANS))])
def test_each_plan(plan, codes, sparse, shared, gpu):
    ran = 0
    dtype = codes if codes.itemsize == 2 else torch.bfloat16
    for M, N, K in SHAPES:
        if plan.fits(N, K, codes.itemsize, sparse):
            arguments, exact = drawn(codes, sparse, M, N, K, shared, dtype)
            y = cuda_scaled_linear.run(plan, *arguments)
            error = ((y.double() - exact).norm() / exact.norm()).item()
            assert error < 4e-3, (error, M, N, K)
            assert torch.equal(y, cuda_scaled_linear.run(plan, *arguments))
            ran += 1
    assert ran or not any(plan.fits(N, K, codes.itemsize, sparse) for _, N, K in SHAPES)


@pytest.mark.cuda
@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn])
def test_fp16_and_nan_scales(codes, gpu):
    arguments, exact = drawn(codes, False, 40, 128, 512, False, torch.float16)
    arguments[1].mul_(1e-3)
    y = cuda_scaled_linear.run(PLANS[0], *arguments)
    exact = (exact - arguments[7].double()) * 1e-3 + arguments[7].double()
    assert ((y.double() - exact).norm() / exact.norm()).item() < 1e-3
    arguments[1][7] = float("nan")
    y = cuda_scaled_linear.run(PLANS[0], *arguments)
    assert y[7].isnan().all() and not y[8:].isnan().any()


@pytest.mark.cuda
@pytest.mark.parametrize("function, approximate", [("gelu", "none"), ("gelu_tanh", "tanh")])
@pytest.mark.parametrize("codes, sparse", KINDS)
@pytest.mark.parametrize("plan", [PLANS[1], PLANS[2], PLANS[6]], ids=["alone", "neighbours", "share"])
def test_functions(plan, codes, sparse, function, approximate, gpu):
    dtype = codes if codes.itemsize == 2 else torch.bfloat16
    (x, x_scale, zero, q, indices, scale, sums, bias, _), exact = drawn(codes, sparse, 77, 1000, 1024, False, dtype)
    exact = exact - bias.double()
    factor = exact.std().item() / 2  # y is of the size where GELU is neither 0 nor y
    scale = (torch.ones(1000, device="cuda") if scale is None else scale.float()) / factor
    y = cuda_scaled_linear.run(plan, x, x_scale, zero, q, indices, scale, sums, None, dtype, function)
    expected = F.gelu(exact / factor, approximate=approximate)
    atol = 3e-2 if codes is torch.float8_e4m3fn else 1e-3  # what the tensor cores lose of sums
    torch.testing.assert_close(y.double(), expected, rtol=torch.finfo(dtype).eps, atol=atol)
    if x_scale is not None:
        x_scale[3] = float("nan")
        y = cuda_scaled_linear.run(plan, x, x_scale, zero, q, indices, scale, sums, None, dtype, function)
        assert y[3].isnan().all() and not y[4:].isnan().any()


@pytest.mark.cuda
def test_in_a_graph_behind_what_writes_x(gpu):
    arguments, exact = drawn(torch.int8, False, 16, 256, 1024, False, torch.bfloat16)
    x = arguments[0].clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        cuda_scaled_linear.run(PLANS[1], *arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        copied = x.add(0)
        y = cuda_scaled_linear.run(PLANS[1], copied, *arguments[1:])
    x.copy_(arguments[0])
    for _ in range(3):
        graph.replay()
    assert ((y.double() - exact).norm() / exact.norm()).item() < 4e-3


@pytest.mark.parametrize("codes, sparse", KINDS)
def test_shipped_plans_fit_their_shapes(codes, sparse):
    shapes = plans.read(plans.shipped(), cuda_scaled_linear.KINDS[codes, sparse], ScaledPlan)
    assert shapes
    for (N, K), found in shapes.items():
        assert len(found) == len(TOKENS)
        assert all(plan.fits(N, K, codes.itemsize, sparse) for plan in found if plan), (N, K)
        assert not sparse or all(found)  # what is sparse has no dense product to fall back on


def test_words():
    assert str(ScaledPlan(1, 1, 4, 1, 64, 8, 4)) == "64 channels × 8 tokens"
    assert str(ScaledPlan(4, 1, 4, 1, 64, 8, 4)) == "64 channels × 8 tokens, 4 blocks share K"
    assert str(ScaledPlan(1, 2, 4, 1, 64, 8, 4)) == "64 channels × 8 tokens, 2 blocks share x"


@pytest.mark.parametrize("codes, sparse", KINDS)
def test_candidates_fit_into_shared_memory(codes, sparse):
    for tokens in TOKENS:
        found = list(candidates(codes, sparse, min(tokens, 2048)))
        assert found and len(set(found)) == len(found)
        assert all(plan.fits(4096, 14336, codes.itemsize, sparse) for plan in found if plan.share == 1)
        assert all(plan.share == 1 or plan.neighbours == 1 for plan in found)


@pytest.mark.parametrize("codes, sparse", KINDS)
def test_plans_compile(codes, sparse):
    if isinstance(nvrtc.version(), str):
        pytest.skip(nvrtc.version())
    source = (nvrtc.FOLDER / "scaled_linear.cu").read_text()
    scales, dtype = (torch.float32, torch.bfloat16) if codes.itemsize == 1 else (torch.float32, codes)
    for plan in PLANS[:4]:
        if plan.fits(4096, 4096, codes.itemsize, sparse):
            assert nvrtc.compile(source, "scaled_linear.cu", "sm_90a", plan.defines(codes, sparse, scales, dtype))


@pytest.mark.parametrize(
    "change, sparse, reason",
    [
        ({"device": "cpu"}, False, "CUDA only"),
        ({"capability": (8, 0)}, False, "9.0"),
        ({"dtype": torch.float32}, False, "bf16 and fp16"),
        ({"group_size": 128}, False, "no scales of blocks"),
        ({"K": 1000}, False, "K is not a multiple of 16"),
        ({"K": 1040}, True, "K is not a multiple of 128"),
        ({"N": 1001}, False, "N is not a multiple of 8"),
        ({"M": None}, False, "M is unknown"),
    ],
)
def test_what_is_not_taken_is_said(change, sparse, reason):
    case = Case("cuda", torch.bfloat16, 16, 1024, 1024, None, (9, 0))
    assert re.search(reason, cuda_scaled_linear.supports(replace(case, **change), torch.int8, sparse))


def test_no_plan_is_an_error(monkeypatch):
    monkeypatch.setattr(plans, "table", lambda kind, plan: {})
    cuda_scaled_linear.plan.cache_clear()
    x, q = torch.ones(2, 128, dtype=torch.int8), torch.ones(8, 128, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"a weight \[8, 128\] under x \[2, 128\]: no plan that fits was measured"):
        cuda_scaled_linear.linear(x, q, torch.ones(8), None, torch.bfloat16)
    cuda_scaled_linear.plan.cache_clear()
