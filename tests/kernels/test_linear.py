"""What holds for every linear op and every implementation of it: they are run by name, on one set of cases."""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from aograph.kernels import float8_linear, int4_linear, int8_linear
from aograph.kernels.op import Op
from torch._subclasses import FakeTensorMode

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}


def int8_by_channel(weight: torch.Tensor, g: int) -> tuple[list, torch.Tensor]:
    q, scale = int8_linear.pack(weight)
    return [q, scale], q.double() * scale.double()[:, None]


def int8_by_group(weight: torch.Tensor, g: int) -> tuple[list, torch.Tensor]:
    q, scale = int8_linear.pack(weight, group_size=g)
    return [q, scale], q.double() * scale.double().repeat_interleave(g, 1)


def float8(weight: torch.Tensor, g: int) -> tuple[list, torch.Tensor]:
    q, scale = float8_linear.pack(weight)
    return [q, scale], q.double() * scale.double()[:, None]


def int4(weight: torch.Tensor, g: int) -> tuple[list, torch.Tensor]:
    q, scale_zero = int4_linear.pack(weight, g)
    return [q, scale_zero, g, len(weight)], int4_linear.unpack(q, scale_zero.double(), g, len(weight))


class Kind(NamedTuple):
    """An op and a way to pack for it in groups of g: the arguments between x and the bias, and the weight in fp64."""

    op: Op
    pack: Callable[[torch.Tensor, int], tuple[list, torch.Tensor]]


KINDS = {
    "int8_by_channel": Kind(int8_linear.int8_linear, int8_by_channel),
    "int8_by_group": Kind(int8_linear.int8_linear, int8_by_group),
    "float8": Kind(float8_linear.float8_linear, float8),
    "int4": Kind(int4_linear.int4_linear, int4),
}
ALL = [pytest.param(kind, each.name, id=f"{name}-{each.name}") for name, kind in KINDS.items() for each in kind.op]

device = pytest.mark.parametrize("device", DEVICES)
dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
each_implementation = pytest.mark.parametrize("kind, name", ALL)


@pytest.fixture(autouse=True)
def _gpu_when_asked_for(request):
    if "device" in request.fixturenames and request.getfixturevalue("device") == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        torch.backends.cuda.matmul.allow_tf32 = False


@lru_cache
def packed(kind: Kind, N: int, K: int, dtype: torch.dtype, device: str = "cpu", g: int = 64, bias: bool = True):
    """The arguments after x of a random linear [N, K], and its weight and bias in fp64."""
    random = torch.Generator().manual_seed(N * 7919 + K)
    weight = torch.randn(N, K, generator=random).mul(0.1).to(dtype)
    b = torch.randn(N, generator=random).to(dtype) if bias else None
    arguments, exact = kind.pack(weight, g)
    move = lambda a: a.to(device) if isinstance(a, torch.Tensor) else a  # noqa: E731
    return [move(a) for a in [*arguments, b]], exact, 0 if b is None else b.double()


def tokens(*shape: int, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype).to(device)


def run(op: Op, name: str, x: torch.Tensor, arguments: list) -> torch.Tensor:
    """The result of one implementation; the test is skipped where it does not take the case."""
    supported = op[name].supports(op.case_of(x, *arguments))
    if supported is not True:
        pytest.skip(supported)
    return op.run(x, *arguments, implementation=name)


def check(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias, dtype: torch.dtype):
    """y is x @ weight.T + bias: as a whole within dtype's tolerance, and no element off by more than its terms."""
    assert y.dtype == dtype and y.shape == (*x.shape[:-1], len(weight))
    x, tolerance = x.double().cpu(), TOLERANCE[dtype]
    expected = x @ weight.T + bias
    error = (y.double().cpu() - expected).abs()
    assert error.norm() <= tolerance * expected.norm()
    typical = (x.square() @ weight.square().T).sqrt()  # of a sum whose terms have random signs
    cancelled = 0.02 * x.norm(dim=-1, keepdim=True) * weight.abs().max()  # where code and zero point all but meet
    assert (error <= tolerance * (expected.abs() + 2 * typical + cancelled)).all()


@device
@dtype
@pytest.mark.parametrize("M", [1, 2, 7, 33, 130])
@each_implementation
def test_computes_the_linear(kind, name, M, dtype, device):
    for N, K, bias in [(200, 320, True), (64, 64, False), (17, 256, True), (1, 128, True), (3, 1024, False)]:
        arguments, weight, b = packed(kind, N, K, dtype, device, bias=bias)
        x = tokens(M, K, dtype=dtype, device=device)
        check(run(kind.op, name, x, arguments), x, weight, b, dtype)


@device
@dtype
@each_implementation
def test_long_rows_with_outliers(kind, name, dtype, device):
    arguments, weight, bias = packed(kind, 130, 8192, dtype, device)
    x = tokens(5, 8192, dtype=dtype, device=device)
    x[:, 77] *= 1000
    check(run(kind.op, name, x, arguments), x, weight, bias, dtype)


@device
@dtype
@each_implementation
def test_each_weight_by_itself(kind, name, dtype, device):
    arguments, weight, _ = packed(kind, 70, 128, dtype, device, g=32, bias=False)
    for rows in torch.eye(128, dtype=dtype, device=device).split(8):
        check(run(kind.op, name, rows, arguments), rows, weight, 0, dtype)


@device
@each_implementation
def test_sums_larger_than_fp16_before_scaling(kind, name, device):
    arguments, weight, bias = packed(kind, 33, 1024, torch.float16, device)
    x = tokens(3, 1024, dtype=torch.float16, device=device) + 20 * weight[:3].sign().half().to(device)
    check(run(kind.op, name, x, arguments), x, weight, bias, torch.float16)


@device
@each_implementation
def test_not_finite_stays_in_its_row(kind, name, device):
    arguments, _, _ = packed(kind, 70, 192, torch.bfloat16, device)
    x = tokens(7, 192, dtype=torch.bfloat16, device=device)
    clean = run(kind.op, name, x, arguments)
    x[1, 5], x[3, 0], x[6, 191] = float("nan"), float("inf"), float("-inf")
    y = run(kind.op, name, x, arguments)
    assert y[1].isnan().all() and not y[[3, 6]].isfinite().any()
    assert torch.equal(y[[0, 2, 4, 5]], clean[[0, 2, 4, 5]])


@device
@each_implementation
def test_the_same_bits_twice(kind, name, device):
    arguments, _, _ = packed(kind, 300, 2048, torch.bfloat16, device)
    for M in (1, 8, 100):
        x = tokens(M, 2048, dtype=torch.bfloat16, device=device)
        if kind.op[name].supports(kind.op.case_of(x, *arguments)) is True:
            assert torch.equal(run(kind.op, name, x, arguments), run(kind.op, name, x, arguments))


@device
@dtype
@each_kind
def test_any_shape_and_stride_of_x(kind, dtype, device):
    arguments, weight, bias = packed(kind, 70, 128, dtype, device)
    wide = tokens(4, 6, 256, dtype=dtype, device=device)
    for x in (
        wide[0, 0, :128],
        wide[..., ::2],
        wide[:, ::2, 64:192],
        wide[..., :128].transpose(0, 1),
        wide[:1, :1, :128].expand(3, 2, 128),
        wide[..., :128].reshape(-1, 128).T.contiguous().T,
    ):
        check(kind.op(x, *arguments), x, weight, bias, dtype)


@device
@each_kind
def test_no_tokens(kind, device):
    arguments, _, _ = packed(kind, 70, 128, torch.float32, device)
    for shape in [(0, 128), (2, 0, 128)]:
        assert kind.op(torch.empty(shape, device=device), *arguments).shape == (*shape[:-1], 70)


@each_kind
def test_double_precision_stays(kind):
    arguments, weight, bias = packed(kind, 70, 128, torch.float64)
    x = tokens(3, 128, dtype=torch.float64)
    torch.testing.assert_close(kind.op(x, *arguments), x @ weight.T + bias)


@each_kind
def test_what_does_not_fit_is_named(kind):
    arguments, _, _ = packed(kind, 70, 128, torch.float32)
    with pytest.raises(ValueError, match=rf"{kind.op.name}: x is float32 \[2, 64\]; expected float \[..., 128\]"):
        kind.op(torch.ones(2, 64), *arguments)
    with pytest.raises(ValueError, match=r"scale.* is float32 .* on cpu; expected bfloat16"):
        kind.op(torch.ones(2, 128).bfloat16(), *arguments)
    with pytest.raises(ValueError, match=r"bias is float32 \[69\] on cpu; expected float32 \[70\]"):
        kind.op(torch.ones(2, 128), *arguments[:-1], torch.ones(69))
    with pytest.raises(ValueError, match=r"q is float32 .*; expected (uint8|int8|float8_e4m3fn) \["):
        kind.op(torch.ones(2, 128), arguments[0].float(), *arguments[1:])


@each_kind
def test_fake(kind):
    arguments, _, _ = packed(kind, 70, 128, torch.bfloat16)
    with FakeTensorMode() as mode:
        inside = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        for shape in [(128,), (0, 128), (2, 3, 128)]:
            y = kind.op(torch.empty(shape, dtype=torch.bfloat16), *inside)
            assert y.shape == (*shape[:-1], 70) and y.dtype == torch.bfloat16
        with pytest.raises(ValueError, match="expected float"):
            kind.op(torch.empty(3, 64, dtype=torch.bfloat16), *inside)


@each_kind
def test_registration(kind):
    arguments, _, _ = packed(kind, 70, 128, torch.float32)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if kind.op is float8_linear.float8_linear:
        checks.remove("test_schema")  # which compares the arguments: torch compares no float8
    torch.library.opcheck(kind.op.overload, (tokens(2, 3, 128, dtype=torch.float32), *arguments), test_utils=checks)


@each_kind
def test_exports_with_any_number_of_tokens(kind):
    arguments, weight, bias = packed(kind, 70, 128, torch.float32)

    class Linear(torch.nn.Module):
        def forward(self, x):
            return kind.op.overload(x, *arguments)

    batch = {"x": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(Linear(), (torch.ones(2, 3, 128),), dynamic_shapes=batch).module()
    x = tokens(5, 3, 128, dtype=torch.float32)
    check(exported(x), x, weight, bias, torch.float32)


@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64), (0, 64), (64,)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_of_x_and_bias_are_those_of_the_dequantized_linear(shape, with_bias):
    weight = torch.randn(40, 64)
    bias = torch.randn(40, requires_grad=True) if with_bias else None
    for op, packed, dense in (
        (int8_linear.int8_linear, (p := int8_linear.pack(weight)), int8_linear.unpack(*p)),
        (int8_linear.int8_linear, (p := int8_linear.pack(weight, group_size=32)), int8_linear.unpack(*p)),
        (float8_linear.float8_linear, (p := float8_linear.pack(weight)), float8_linear.unpack(*p)),
        (int4_linear.int4_linear, (p := (*int4_linear.pack(weight, 32), 32, 40)), int4_linear.unpack(*p)),
    ):
        x = torch.randn(shape, requires_grad=True)
        wanted = [x, bias] if with_bias else [x]
        upstream = torch.randn(*shape[:-1], 40)
        actual = torch.autograd.grad(op(x, *packed, bias), wanted, upstream)
        expected = torch.autograd.grad(F.linear(x, dense, bias), wanted, upstream)
        torch.testing.assert_close(actual, expected)
