"""The fused ops: what they mean, by each implementation, and the CUDA kernel by its plans."""

from itertools import product

import pytest
import torch
from aograph.kernels import cuda_linear, int4_linear, int8_linear
from aograph.kernels.cuda_linear import Around, Plan
from aograph.kernels.fused_linear import FUSED
from aograph.kernels.op import Case
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

EPS = 1e-5
N, K = 96, 128
INT4, INT8 = FUSED[int4_linear.int4_linear.overload], FUSED[int8_linear.int8_linear.overload]
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
PARTS = list(product([False, True], repeat=3))  # norm, residual, gated
each_op = pytest.mark.parametrize("op", [INT4, INT8], ids=["int4", "int8"])
each_bias = pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
each_part = pytest.mark.parametrize(
    "parts", PARTS, ids=["-".join(n for n, p in zip(("norm", "residual", "gated"), each, strict=True) if p) or "none"
                         for each in PARTS]
)  # fmt: skip


def linear(op, N: int, K: int, dtype: torch.dtype, device="cpu", g=64):
    """The arguments of a random linear between x and the bias, and its weight in float64."""
    weight = (torch.randn(N, K, device=device) * 0.1).to(dtype)
    if op is INT8:
        q, scale = int8_linear.pack(weight)
        return (q, scale), q.double() * scale.double()[:, None]
    q, scale_zero = int4_linear.pack(weight, g)
    return (q, scale_zero, g, N), int4_linear.unpack(q, scale_zero.double(), g, N)


def around(shape, N: int, K: int, parts, dtype: torch.dtype, device="cpu"):
    """norm, eps, residual and gated for x [*shape, K]."""
    norm, residual, gated = parts
    make = lambda *sizes: torch.randn(*sizes, device=device).to(dtype)  # noqa: E731
    return make(K) if norm else None, EPS, make(*shape, N // 2 if gated else N) if residual else None, gated


def meaning(x, weight, bias, norm, eps, residual, gated):
    """In float64."""
    x = x.double()
    if norm is not None:
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm.double()
    y = x @ weight.T + (0 if bias is None else bias.double())
    if gated:
        gate, up = y[..., : len(weight) // 2], y[..., len(weight) // 2 :]
        y = gate * gate.sigmoid() * up
    return y if residual is None else residual.double() + y


def close(y, expected, dtype, tolerance=None):
    assert y.dtype == dtype and y.shape == expected.shape and y.is_contiguous()
    assert (y.double() - expected).norm() <= (tolerance or TOLERANCE[dtype]) * expected.norm()


@each_bias
@each_part
@each_op
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_meaning(dtype, op, parts, with_bias):
    packed, weight = linear(op, N, K, dtype)
    bias = torch.randn(N).to(dtype) if with_bias else None
    for shape in [(), (0,), (1,), (3,), (2, 3), (2, 0)]:
        x = torch.randn(*shape, K).to(dtype)
        rest = around(shape, N, K, parts, dtype)
        y = op(x, *packed, bias, *rest)
        expected = meaning(x, weight, bias, *rest)
        close(y, expected, dtype)
        case = op.case_of(x, *packed, bias, *rest)
        assert (case.N, case.K, case.gated, case.dtype) == (N, K, parts[2], dtype)
        close(op.run(x, *packed, bias, *rest, implementation="reference"), expected, dtype)
        alone = op.standalone(case, 1, None)
        if x.numel():
            assert (
                alone.standalone and alone.name == op.base.standalone(op.base.case_of(x, *packed, bias), 1, None).name
            )
            close(op.apply(alone, x, *packed, bias, *rest), expected, dtype)


@each_op
def test_tensors_that_are_not_contiguous(op):
    packed, weight = linear(op, N, K, torch.float32)
    x, residual = torch.randn(3, 2, K).transpose(0, 1), torch.randn(3, 2, N).transpose(0, 1)
    rest = (torch.randn(2 * K)[::2], EPS, residual, False)
    close(op(x, *packed, None, *rest), meaning(x, weight, None, *rest), torch.float32)


@each_op
def test_what_does_not_fit_is_named(op):
    x = torch.randn(2, 3, K)
    packed, _ = linear(op, N, K, x.dtype)

    def call(norm=None, residual=None, gated=False, packed=packed, x=x):
        return op(x, *packed, None, norm, EPS, residual, gated)

    name = op.name
    with pytest.raises(ValueError, match=rf"{name}: norm is float32 \[64\] on cpu; expected float32 \[128\] on cpu"):
        call(norm=torch.ones(64))
    with pytest.raises(ValueError, match=rf"{name}: norm is bfloat16 \[128\] on cpu; expected float32 \[128\] on cpu"):
        call(norm=torch.ones(K).bfloat16())
    for shape in [(6, N), (1, 3, N), (N,), (2, 3, N // 2)]:
        with pytest.raises(ValueError, match=rf"{name}: residual is .*; expected float32 \[2, 3, 96\] on cpu"):
            call(residual=torch.ones(shape))
    with pytest.raises(ValueError, match=rf"{name}: residual is .*; expected float32 \[2, 3, 48\] on cpu"):
        call(residual=torch.ones(2, 3, N), gated=True)
    with pytest.raises(ValueError, match=rf"{name}: residual is float64 .*; expected float32 \[2, 3, 96\] on cpu"):
        call(residual=torch.ones(2, 3, N).double())
    odd, _ = linear(op, 65, K, x.dtype)
    with pytest.raises(ValueError, match=rf"{name}: N is 65; expected an even number"):
        call(packed=odd, gated=True)
    assert call(packed=odd).shape == (2, 3, 65)
    with pytest.raises(ValueError, match=rf"{op.base.name}: x is float32 \[2, 64\]; expected float \[..., 128\]"):
        call(x=torch.ones(2, 64))


@each_bias
@each_part
@each_op
def test_registration(op, parts, with_bias):
    packed, _ = linear(op, N, K, torch.float32)
    bias = torch.randn(N) if with_bias else None
    for shape in [(2,), (2, 3)]:
        torch.library.opcheck(
            op.overload, (torch.randn(*shape, K), *packed, bias, *around(shape, N, K, parts, torch.float32))
        )


@each_op
def test_fake(op):
    packed, _ = linear(op, N, K, torch.bfloat16)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fake = lambda t: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t  # noqa: E731
        inside = [*map(fake, packed)]
        for gated in (False, True):
            for shape in [(), (0,), (2, 3)]:
                rest = map(fake, around(shape, N, K, (True, True, gated), torch.bfloat16))
                y = op(torch.empty(*shape, K, dtype=torch.bfloat16), *inside, None, *rest)
                assert y.shape == (*shape, N // 2 if gated else N) and y.dtype == torch.bfloat16
            with pytest.raises(ValueError, match="residual is"):
                op(torch.empty(2, K).bfloat16(), *inside, None, None, EPS, torch.empty(3, N).bfloat16(), gated)


@each_part
@each_op
def test_exports_with_any_number_of_tokens(op, parts):
    packed, weight = linear(op, N, K, torch.float32)
    norm, _, _, gated = around((), N, K, parts, torch.float32)
    width = N // 2 if gated else N

    class Linear(torch.nn.Module):
        def forward(self, x):
            return op.overload(x, *packed, None, norm, EPS, x[..., :width] if parts[1] else None, gated)

    batch = {"x": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(Linear(), (torch.ones(2, 3, K),), dynamic_shapes=batch)
    (call,) = (n for n in exported.graph.nodes if n.target is op.overload)
    assert isinstance(call.meta["val"].shape[0], torch.SymInt) and call.meta["val"].shape[1:] == (3, width)
    x = torch.randn(5, 3, K)
    residual = x[..., :width] if parts[1] else None
    close(exported.module()(x), meaning(x, weight, None, norm, EPS, residual, gated), torch.float32)


@each_op
def test_the_kernel_is_asked_for_a_gate(op, monkeypatch):
    seen = []
    monkeypatch.setattr(cuda_linear, "supports", lambda case, bits, fused: seen.append((case, bits, fused)) or "no")
    case = Case("cuda", torch.bfloat16, 1, 4096, 4096, 64, (9, 0), gated=True)
    assert op.choose.__wrapped__(case).name == "reference"
    assert seen == [(case, 4 if op is INT4 else 8, True)]


# --- the CUDA kernel ---------------------------------------------------------------------------------------

PLANS = {
    "int4": [Plan("small", 1, 2, 128, 1, 4), Plan("small", 2, 3, 128, 8, 4), Plan("small", 4, 2, 128, 16, 8)],
    "int8": [Plan("small", 1, 2, 32, 1, 4), Plan("small", 2, 3, 64, 8, 4), Plan("small", 4, 2, 32, 16, 8)],
}
KINDS = {"int8": (INT8, None), **{f"int4-{g}": (INT4, g) for g in (32, 64, 128, 256)}}  # an op, a group size
ALL = [
    pytest.param(*kind, plan, id=f"{name}-{i}")
    for name, kind in KINDS.items()
    for i, plan in enumerate(PLANS[name[:4]])
]
SHAPES = [(512, 512), (1920, 1024), (256, 4096)]


@pytest.fixture
def gpu():
    if torch.cuda.get_device_capability() not in cuda_linear.CAPABILITIES:
        pytest.skip("the kernels are for another architecture")


@pytest.mark.cuda
@each_part
@pytest.mark.parametrize("op, group_size, plan", ALL)
def test_each_plan(op, group_size, plan, parts, gpu):
    dtype = torch.bfloat16
    for N, K in SHAPES:
        assert plan.fits(N, K, op.bits, group_size)
        (q, scales, *_), weight = linear(op, N, K, dtype, "cuda", group_size)
        some = torch.randn(N, device="cuda").to(dtype)
        for M, bias in product(sorted({1, min(plan.tokens // 2 + 1, plan.tokens), plan.tokens}), (None, some)):
            x = torch.randn(M, K, device="cuda").to(dtype)
            x[:, 7] *= 50
            rest = around((M,), N, K, parts, dtype, "cuda")
            y, again = (cuda_linear.run(plan, x, q, scales, bias, N, group_size, Around(*rest)) for _ in range(2))
            expected = meaning(x, weight, bias, *rest)
            assert y.dtype == dtype and y.shape == expected.shape
            error = ((y.double() - expected).norm() / expected.norm()).item()
            assert error < 6e-3, (error, N, K, M, bias is not None)
            assert torch.equal(y, again)


@pytest.mark.cuda
@each_part
@each_op
def test_the_op_by_its_kernel(op, parts, gpu, monkeypatch):
    """The whole way from the op to the kernel: batch dimensions, strides, and the reference beside it."""
    (plan,) = (each for each in PLANS["int4" if op is INT4 else "int8"] if each.tokens == 8)
    monkeypatch.setattr(cuda_linear, "plan", lambda *_: plan)
    op.choose.cache_clear()
    try:
        packed, weight = linear(op, 512, 1024, torch.bfloat16, "cuda")
        x = torch.randn(3, 2, 1024, device="cuda").bfloat16().transpose(0, 1)
        rest = around((2, 3), 512, 1024, parts, torch.bfloat16, "cuda")
        arguments = (x, *packed, None, *rest)
        assert op.choose(op.case_of(*arguments)).name == "cuda"
        expected = meaning(x, weight, None, *rest)
        close(op(*arguments), expected, torch.bfloat16, 6e-3)
        close(op.run(*arguments, implementation="reference"), expected, torch.bfloat16)
    finally:
        op.choose.cache_clear()


@pytest.mark.cuda
@each_op
def test_in_a_graph_behind_what_makes_x(op, gpu):
    """Launched early, a kernel must still wait for x and the residual, which the kernels before it write."""
    (plan,) = (each for each in PLANS["int4" if op is INT4 else "int8"] if each.tokens == 8)
    (q, scales, *_), weight = linear(op, 1024, 1024, torch.bfloat16, "cuda")
    norm = torch.rand(1024, device="cuda").bfloat16()
    source = torch.randn(8, 1024, device="cuda").bfloat16()
    group_size = 64 if op is INT4 else None

    def chain():
        x = source * 1
        for _ in range(5):
            x = cuda_linear.run(plan, x, q, scales, None, 1024, group_size, Around(norm, EPS, x))
        return x

    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = chain()
    for _ in range(20):
        source.normal_()
        graph.replay()
        expected = source.double()
        for _ in range(5):
            expected = meaning(expected, weight, None, norm, EPS, expected, False)
        assert ((result.double() - expected).norm() / expected.norm()).item() < 2e-2


@pytest.mark.cuda
@each_op
def test_not_finite_stays_in_its_row(op, gpu):
    (plan,) = (each for each in PLANS["int4" if op is INT4 else "int8"] if each.tokens == 8)
    (q, scales, *_), _ = linear(op, 512, 512, torch.bfloat16, "cuda")
    norm, group_size = torch.ones(512, device="cuda").bfloat16(), 64 if op is INT4 else None
    x = torch.randn(8, 512, device="cuda").bfloat16()
    run = lambda: cuda_linear.run(plan, x, q, scales, None, 512, group_size, Around(norm, EPS))  # noqa: E731
    clean = run()
    x[1, 5] = float("nan")
    y, rest = run(), [0, *range(2, 8)]
    assert y[1].isnan().all() and torch.equal(y[rest], clean[rest])
