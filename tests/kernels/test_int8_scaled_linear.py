"""int8_scaled_linear against float64, by each implementation that takes the case."""

import itertools

import pytest
import torch
from aograph.kernels import cpu_native
from aograph.kernels.int8_linear import pack as pack_weight_only
from aograph.kernels.int8_scaled_linear import int8_scaled_linear as op
from aograph.kernels.int8_scaled_linear import pack
from aograph.kernels.op import Case
from aograph.kernels.quantized_activation import Int8PerTensor, int8_per_token, int8_per_token_asymmetric

QUANTIZE = int8_per_token, int8_per_token_asymmetric, Int8PerTensor(0.03), Int8PerTensor(0.03, 5)
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # of the norm: y's own rounding
NAMES = [each.name for each in op]
quantizers = pytest.mark.parametrize("quantize", QUANTIZE, ids=["token", "asymmetric", "tensor", "shifted"])
floats = pytest.mark.parametrize("dtype", TOLERANCE)


def arguments_of(x, weight, quantize, bias=None):
    """The arguments of a call, and the y that they stand for in float64."""
    made = quantize(x)
    if made.x_scale is None:
        made = made._replace(x_scale=torch.tensor([quantize.scale], device=x.device))
        if quantize.zero:
            made = made._replace(x_zero=torch.tensor([quantize.zero], dtype=torch.int32, device=x.device))
    q, scale, *sums = pack(weight, sums=made.x_zero is not None)
    given = {**made._asdict(), "q": q, "scale": scale, "sums": sums[0] if sums else None, "bias": bias}
    codes = made.x.double() - (0 if made.x_zero is None else made.x_zero)
    y = (codes @ q.double().T) * made.x_scale.double() * scale.double()
    return op.arguments(**given, dtype=x.dtype), y if bias is None else y + bias.double()


def check(arguments, expected, dtype, where):
    for each in op:
        if each.supports(op.case_of(*arguments)) is True:
            y = op.run(*arguments, implementation=each.name)
            assert y.dtype is dtype and y.shape == expected.shape, (each.name, where)
            assert (y.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm(), (each.name, where)


@quantizers
@floats
def test_every_implementation_agrees_with_float64(quantize, dtype):
    for M, K, N in itertools.product((0, 1, 3, 17, 64), (1, 7, 100, 513), (1, 3, 129)):
        x, weight = torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype)
        bias = torch.randn(N).to(dtype) if M != 3 else None
        check(*arguments_of(x, weight, quantize, bias), dtype, (M, K, N))


@quantizers
def test_outliers_and_long_rows(quantize):
    x, weight = torch.randn(5, 4000), torch.randn(70, 4000)
    x[1, 17], x[2], x[3, :2000] = 1e4, 0, 1e-6
    check(*arguments_of(x, weight, quantize), torch.float32, None)


@quantizers
def test_x_that_is_not_contiguous(quantize):
    weight, x = torch.randn(48, 64), torch.randn(64, 5, 3).permute(2, 1, 0)
    check(*arguments_of(x, weight, quantize), torch.float32, None)
    made, expected = arguments_of(torch.randn(1, 64), weight, quantize)
    row = made[0].as_strided((1, 64), (0, 1))  # counts as contiguous
    check((row, *made[1:]), expected, torch.float32, None)
    expanded = made[0].expand(20, 64)
    scales = [None if each is None else each.expand(20, 1) if each.dim() == 2 else each for each in made[1:3]]
    check((expanded, *scales, *made[3:]), expected.expand(20, 48), torch.float32, None)


@floats
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_poisoned_row_is_nan_and_alone(dtype, poison):
    x, weight = torch.randn(20, 64).to(dtype), torch.randn(48, 64).to(dtype)
    x[3, 5] = poison
    for quantize in QUANTIZE[:2]:
        arguments, expected = arguments_of(x, weight, quantize)
        others = torch.arange(20) != 3
        for each in op:
            y = op.run(*arguments, implementation=each.name) if each.supports(op.case_of(*arguments)) is True else None
            assert y is None or (y[3].isnan().all() and y[others].isfinite().all())
        assert expected[3].isnan().all()


def test_sums_are_exact():
    x, q = torch.full((20, 40_000), -128, dtype=torch.int8), torch.full((8, 40_000), -127, dtype=torch.int8)
    one = torch.ones(1)
    for each in op:
        if each.supports(Case("cpu", torch.float32, 20, 8, 40_000)) is True:
            y = op.run(x, one, None, q, torch.ones(8), None, None, torch.float32, implementation=each.name)
            assert y.eq(torch.tensor(128.0 * 127 * 40_000)).all(), each.name


def test_it_is_close_to_the_linear():
    x, weight = torch.randn(64, 512), torch.randn(128, 512)
    expected = x @ weight.T
    for quantize in QUANTIZE[:2]:
        y = op(*arguments_of(x, weight, quantize)[0])
        assert (y - expected).norm() < 0.012 * expected.norm()


@pytest.mark.parametrize("algorithm", ["minmax", "mse"])
def test_the_weight_is_packed_as_for_int8_linear(algorithm):
    weight = torch.randn(48, 64, dtype=torch.bfloat16)
    q, scale, sums = pack(weight, algorithm, sums=True)
    assert all(map(torch.equal, (q, scale), pack_weight_only(weight, algorithm)))
    assert sums.dtype is torch.int32 and torch.equal(sums.long(), q.long().sum(1))


def test_zero_points_and_sums_come_together():
    (x, x_scale, _, *rest), _ = arguments_of(torch.randn(3, 64), torch.randn(48, 64), int8_per_token)
    with pytest.raises(ValueError, match="x_zero and sums come together"):
        op(x, x_scale, torch.zeros(3, 1, dtype=torch.int32), *rest)


@quantizers
def test_torch_knows_the_op(quantize):
    arguments, _ = arguments_of(torch.randn(3, 5, 64), torch.randn(48, 64), quantize, torch.randn(48))
    torch.library.opcheck(op.overload, arguments, test_utils=("test_schema", "test_faketensor"))


def test_the_choice(monkeypatch):
    case = Case("cpu", torch.bfloat16, 64, 4096, 4096)
    here = torch.backends.cpu.get_cpu_capability() == "AVX512" and cpu_native.available() is True
    assert (op["native"].supports(case) is True) == here
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert op["native"].supports(case) == "slower than a product in fp32 without AVX-512"
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert op["int_mm"].supports(case) == "slow on a processor without VNNI" and op["float"].supports(case) is True
    assert op["int_mm"].supports(Case("cpu", torch.bfloat16, 64, 4096, 1)) is not True  # torch gives garbage there
    gpu = Case("cuda", torch.bfloat16, None, 4096, 4096, None, (9, 0))
    assert op.choose(gpu).name == "int_mm" and op.plan(gpu, 1, None) == "int_mm"
    odd = Case("cuda", torch.bfloat16, None, 4096, 4097, None, (9, 0))
    assert op["int_mm"].supports(odd) == "K is not a multiple of 8" and op.choose(odd).name == "float"


@pytest.mark.cuda
@quantizers
@floats
def test_on_cuda(quantize, dtype):
    for M, K, N in itertools.product((0, 1, 16, 17, 64), (7, 64, 512), (8, 129)):
        x, weight = torch.randn(M, K, device="cuda").to(dtype), torch.randn(N, K, device="cuda").to(dtype)
        check(*arguments_of(x, weight, quantize, torch.randn(N, device="cuda").to(dtype)), dtype, (M, K, N))
