"""The CUDA kernels by their plans; as implementations of their ops they run in test_linear.py."""

import re
from dataclasses import replace

import pytest
import torch
from aograph.kernels import cuda_linear, int4_linear, int8_linear, nvrtc, plans, tuning
from aograph.kernels.cuda_linear import TOKENS, Plan
from aograph.kernels.op import Case
from aograph.kernels.rounding import GROUP_SIZES

PLANS = {
    "small": [
        Plan("small", 1, 2, 64, 1, 4),
        Plan("small", 2, 3, 64, 8, 4),
        Plan("small", 8, 2, 64, 8, 4),
        Plan("small", 4, 2, 64, 16, 8),
    ],
    "wide": [
        Plan("wide", 1, 4, 64, 16, 4),
        Plan("wide", 2, 6, 192, 32, 12, batch=2),
        Plan("wide", 4, 4, 128, 64, 8),
        Plan("wide", 8, 4, 256, 32, 8),
        Plan("wide", 1, 4, 128, 128, 4),
        Plan("wide", 2, 4, 256, 128, 8, batch=2),
        Plan("wide", 1, 4, 128, 256, 8),
        Plan("wide", 1, 4, 128, 256, 8, batch=2),
    ],
}
BOTH = [pytest.param(plan, id=f"{name}-{i}") for name, plans in PLANS.items() for i, plan in enumerate(plans)]
SHAPES = [(64, 512), (200, 1024), (8, 2048), (1000, 640), (70000, 1024)]


@pytest.fixture
def gpu():
    if torch.cuda.get_device_capability() not in cuda_linear.CAPABILITIES:
        pytest.skip("the kernels are for another architecture")


def arguments(bits: int, N: int, K: int, group_size: int | None, dtype: torch.dtype):
    """The packed weight, and what it stands for in float64."""
    weight = torch.randn(N, K, device="cuda", dtype=dtype) * 0.1
    if bits == 8:
        q, scale = int8_linear.pack(weight, group_size=group_size)
        return (q, scale), int8_linear.unpack(q.double(), scale.double())
    q, pairs = int4_linear.pack(weight, group_size)
    return (q, pairs), int4_linear.unpack(q, pairs.double(), group_size, N)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 6e-3), (torch.float16, 8e-4)], ids=["bf16", "fp16"])
@pytest.mark.parametrize("bits, group_size", [(8, None), (8, 32), (8, 128), (8, 256), *((4, g) for g in GROUP_SIZES)])
@pytest.mark.parametrize("plan", BOTH)
def test_each_plan(plan, bits, group_size, dtype, tolerance, gpu):
    ran = 0
    for N, K in SHAPES:
        if not plan.fits(N, K, bits, group_size) or (group_size and K % group_size):
            continue
        packed, exact = arguments(bits, N, K, group_size, dtype)
        bias = torch.randn(N, device="cuda", dtype=dtype)
        most = plan.tokens if plan.kernel == "small" else 2 * plan.tokens + 1
        for M in {1, min(plan.tokens // 2 + 1, most), plan.tokens, most}:
            x = torch.randn(M, K, device="cuda", dtype=dtype)
            x[:, 7] *= 50
            for b in (None, bias):
                y = cuda_linear.run(plan, x, *packed, b, N, group_size)
                expected = x.double() @ exact.T + (0 if b is None else b.double())
                error = ((y.double() - expected).norm() / expected.norm()).item()
                assert error < tolerance, (error, N, K, M, b is None)
                assert torch.equal(y, cuda_linear.run(plan, x, *packed, b, N, group_size))
        ran += 1
    assert ran >= 2


@pytest.mark.cuda
def test_in_a_graph_behind_what_makes_x(gpu):
    """Launched early, a kernel must still wait for x."""
    (q, pairs), exact = arguments(4, 4096, 4096, 64, torch.bfloat16)
    for plan in (Plan("small", 4, 4, 64, 8, 4), Plan("wide", 4, 4, 128, 16, 4)):
        x = torch.zeros(8, 4096, device="cuda", dtype=torch.bfloat16)
        source = torch.randn_like(x)

        def chain(x=x, source=source, plan=plan):
            x.copy_(source)
            for _ in range(5):
                y = cuda_linear.run(plan, x, q, pairs, None, 4096, 64)
                x.copy_(y / y.norm() * 64)
            return x.clone()

        chain()
        x.zero_()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = chain()
        for _ in range(20):
            source.normal_()
            graph.replay()
            expected = source.double()
            for _ in range(5):
                expected = expected @ exact.T
                expected *= 64 / expected.norm()
            assert ((result.double() - expected).norm() / expected.norm()).item() < 2e-2


@pytest.mark.cuda
def test_x_that_is_not_aligned(gpu):
    packed, exact = arguments(8, 128, 512, None, torch.bfloat16)
    x = torch.randn(512 * 3 + 1, device="cuda", dtype=torch.bfloat16)[1:].view(3, 512)
    y = cuda_linear.run(Plan("small", 2, 2, 64, 8, 4), x, *packed, None, 128, None)
    assert ((y.double() - x.double() @ exact.T).norm() / y.double().norm()).item() < 4e-3


def test_plans_are_those_of_the_nearest_shape(tmp_path, monkeypatch):
    near, far = Plan("small", 1, 2, 64, 8, 4), Plan("small", 4, 2, 64, 8, 4)
    path = tmp_path / "plans.json"
    plans.add(path, "int4wo", (1024, 1024), [near] * len(TOKENS), {})
    plans.add(path, "int4wo", (8192, 8192), [None, *[far] * (len(TOKENS) - 1)], {})
    monkeypatch.setattr(plans, "shipped", lambda: path)
    monkeypatch.setattr(plans, "tuned", lambda: tmp_path / "none.json")
    for cached in (plans.table, cuda_linear.plan):
        cached.cache_clear()
    try:
        assert cuda_linear.plan(4, 1, 2048, 1024, 64) == near
        assert cuda_linear.plan(4, 9, 8192, 4096, 64) == far
        assert "faster" in cuda_linear.plan(4, 1, 8192, 4096, 64)
        assert "aograph tune" in cuda_linear.plan(8, 8, 8192, 4096, None)
    finally:
        for cached in (plans.table, cuda_linear.plan):
            cached.cache_clear()


def test_shipped_plans_fit_their_shapes():
    for bits, kind in cuda_linear.KINDS.items():
        for (N, K), found in plans.read(plans.shipped(), kind, Plan).items():
            assert len(found) == len(TOKENS)
            for most, plan in zip(TOKENS, found, strict=True):
                for group_size in [None] if bits == 8 else int4_linear.GROUP_SIZES:
                    assert plan is None or plan.fits(N, K, bits, group_size), (bits, N, K, most)
                assert plan is None or plan.kernel == "wide" or plan.tokens >= most


def test_words():
    assert str(Plan("small", 1, 2, 64, 1, 4)) == "small, 64 channels × 1 token"
    assert str(Plan("wide", 2, 4, 64, 16, 4)) == "wide, 64 channels × 16 tokens, 2 blocks share K"


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"device": "cpu"}, "CUDA only"),
        ({"capability": (8, 0)}, r"capability 9\.0"),
        ({"dtype": torch.float32}, "bf16 and fp16"),
        ({"K": 192}, "multiple of 128"),
        ({"N": 4100}, "multiple of 8"),
        ({"M": None}, "unknown"),
    ],
)
def test_what_is_not_taken_is_said(change, reason):
    case = Case("cuda", torch.bfloat16, 1, 4096, 4096, 64, (9, 0))
    assert re.search(reason, cuda_linear.supports(replace(case, **change), 4))


@pytest.mark.parametrize(
    "plan, M, N, K, normed, gated, reason",
    [
        (Plan("small", 1, 2, 128, 8, 4), 8, 256, 4096, True, True, None),
        (Plan("small", 1, 2, 64, 8, 4), 8, 256, 4096, True, False, None),
        (Plan("wide", 1, 4, 128, 16, 4), 16, 256, 4096, False, False, "no fused form"),
        (Plan("small", 1, 2, 64, 16, 4), 16, 256, 8192, True, False, "does not fit into shared memory"),
        (Plan("small", 1, 2, 64, 8, 4), 8, 256, 4096, False, True, "too few channels for a gate"),
        (Plan("small", 1, 2, 128, 8, 4), 8, 192, 4096, False, True, "half of N is not a multiple of 64"),
    ],
)
def test_what_a_plan_fuses(plan, M, N, K, normed, gated, reason, monkeypatch):
    found = plan.fuses(4, M, N, K, 64, normed, gated)
    assert found is True if reason is None else reason in found
    if reason:
        monkeypatch.setattr(cuda_linear, "plan", lambda *shape: plan)
        x, norm = torch.ones(M, K), torch.ones(K) if normed else None
        with pytest.raises(ValueError, match=rf"int4 weights \[{N}, {K}\] under x \[{M}, {K}\]: .*{reason}"):
            cuda_linear.linear(x, x.byte(), x, None, N, 64, cuda_linear.Around(norm, 1e-5, None, gated))


@pytest.mark.parametrize("bits, group_size", [(4, 32), (4, 256), (8, None), (8, 64)])
def test_plans_compile(bits, group_size):
    """Of each number of tokens one that tuning may choose."""
    if isinstance(nvrtc.version(), str):
        pytest.skip(nvrtc.version())
    for tokens in TOKENS:
        plan = list(tuning.candidates(bits, min(tokens, 4096)))[-1]
        source = (nvrtc.FOLDER / f"{plan.kernel}_linear.cu").read_text()
        defines = plan.defines(bits, group_size) | {"HALF": 1}
        assert nvrtc.compile(source, f"{plan.kernel}_linear.cu", "sm_90a", defines)
