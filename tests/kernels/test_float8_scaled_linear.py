"""float8_scaled_linear: what every implementation computes, against float64, and which one is chosen."""

import pytest
import torch
from aograph.kernels.float8 import FLOAT8
from aograph.kernels.float8_scaled_linear import float8_scaled_linear, pack
from aograph.kernels.op import Case
from aograph.kernels.quantized_activation import (
    Float8PerTensor,
    float8_per_block,
    float8_per_tensor,
    float8_per_token,
)
from torch._subclasses import FakeTensorMode

QUANTIZE = {"row": float8_per_token, "tensor": float8_per_tensor, "block": float8_per_block}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float32: 1e-5}
ACCUMULATION = {"cuda": 5e-3, "cublaslt": 5e-3, "cublaslt_blocks": 5e-4}  # of tensor cores, which keep fewer bits
ONE_SIDED = 1e-2  # the same, where all terms are equal and each loses what it adds

device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
granularity = pytest.mark.parametrize("granularity", QUANTIZE)
each_implementation = pytest.mark.parametrize("name", [each.name for each in float8_scaled_linear])


@pytest.fixture(autouse=True)
def _gpu_when_asked_for(request):
    if request.node.get_closest_marker("cuda"):
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        torch.backends.cuda.matmul.allow_tf32 = False


def oracle(x, x_scale, q, scale, bias, dtype):
    """In float64, a scale for each element."""
    (*_, K), N = x.shape, len(q)
    k, n = torch.arange(K), torch.arange(N)
    x, x_scale, q, scale = (each.cpu().double() for each in (x, x_scale, q, scale))
    if scale.dim() == 2:
        wide, weight = x * x_scale[..., k // 128], q * scale[n // 128][:, k // 128]
    else:
        wide, weight = x * x_scale, q * scale.expand(N)[:, None]
    return wide @ weight.T + (0 if bias is None else bias.cpu().double())


def inputs(shape, N, dtype, granularity, device="cpu", bias=True):
    """The arguments of a random call."""
    random = torch.Generator().manual_seed(sum(shape) + N)
    x, weight = torch.randn(shape, generator=random), torch.randn(N, shape[-1], generator=random)
    b = torch.randn(N, generator=random).to(device, dtype) if bias else None
    activation = QUANTIZE[granularity](x.to(device, dtype))
    return activation.x, activation.x_scale, *pack(weight.to(device, dtype), granularity), b, dtype


def fits(K, granularity):
    return granularity != "block" or K % 128 == 0


def run(name, *arguments):
    """The result of an implementation; None where it does not take the case."""
    if float8_scaled_linear[name].supports(float8_scaled_linear.case_of(*arguments)) is not True:
        return None
    return float8_scaled_linear.run(*arguments, implementation=name)


def check(y, name, *arguments):
    x, _, q, *_, dtype = arguments
    assert y.dtype is dtype and y.shape == (*x.shape[:-1], len(q))
    expected = oracle(*arguments)
    tolerance = max(TOLERANCE[dtype], ACCUMULATION.get(name, 0))
    assert (y.cpu().double() - expected).norm() <= tolerance * expected.norm(), (name, x.shape, len(q))


@device
@granularity
@dtype
@each_implementation
def test_agrees_with_float64(name, dtype, granularity, device):
    shapes = [(1, 1, 1), (3, 3, 7), (17, 129, 100), (1, 144, 512), (3, 1, 640), (17, 129, 640), (130, 48, 512)]
    cases = [inputs((M, K), N, dtype, granularity, device, bias=M != 3) for M, N, K in shapes if fits(K, granularity)]
    found = [(run(name, *arguments), arguments) for arguments in cases]
    if all(y is None for y, _ in found):
        pytest.skip("takes none of these here")
    for y, arguments in found:
        if y is not None:
            check(y, name, *arguments)


@granularity
def test_no_tokens(granularity):
    for shape in ((0, 128), (2, 0, 128)):
        y = float8_scaled_linear(*inputs(shape, 70, torch.bfloat16, granularity))
        assert y.shape == (*shape[:-1], 70) and y.dtype is torch.bfloat16


@device
@granularity
def test_any_shape_and_stride_of_x(granularity, device):
    wide, scales, *weight = inputs((4, 6, 256), 48, torch.float32, granularity, device)
    for x, x_scale in (
        (wide, scales),
        (wide[0], scales[0] if granularity != "tensor" else scales),
        (wide[0, 0], scales[0, 0] if granularity != "tensor" else scales),
        (wide.transpose(0, 1), scales.transpose(0, 1) if granularity != "tensor" else scales),
        (wide[:1, :1].expand(3, 2, 256), scales[:1, :1].expand(3, 2, -1) if granularity != "tensor" else scales),
        (wide[:, ::2], scales[:, ::2] if granularity != "tensor" else scales),
    ):
        check(float8_scaled_linear(x, x_scale, *weight), "cublaslt" * (device == "cuda"), x, x_scale, *weight)


@device
def test_one_scale_for_all_tokens_and_one_for_each_channel(device):
    x, _, q, scale, bias, dtype = inputs((5, 64), 32, torch.bfloat16, "row", device)
    for x_scale in (torch.tensor([0.3], device=device), torch.tensor(0.3, device=device)):
        y = float8_scaled_linear(x, x_scale, q, scale, bias, dtype)
        check(y, "cublaslt" * (device == "cuda"), x, x_scale, q, scale, bias, dtype)


@device
@dtype
@each_implementation
def test_codes_as_large_as_there_are(name, dtype, device):
    x, q = (torch.full(shape, 448.0).to(device, FLOAT8) for shape in ((17, 640), (144, 640)))
    x_scale, scale = (torch.full(shape, 1 / 448, device=device) for shape in ((17, 1), (144,)))
    y = run(name, x, x_scale, q, scale, None, dtype)
    if y is None:
        pytest.skip("does not take it here")
    rtol = ONE_SIDED if name in ACCUMULATION else 2e-3
    torch.testing.assert_close(y, torch.full((17, 144), 640, dtype=dtype, device=device), rtol=rtol, atol=0)


@device
@pytest.mark.parametrize("granularity", ["row", "block"])
def test_a_row_knows_nothing_of_the_others(granularity, device):
    x = torch.randn(5, 256, device=device)
    weight = pack(torch.randn(48, 256, device=device), granularity)
    bias = torch.randn(48, device=device).bfloat16()

    def linear(x):
        return float8_scaled_linear(*QUANTIZE[granularity](x)[:2], *weight, bias, torch.bfloat16)

    clean = linear(x)
    x[0], x[1, 7], x[2, 7], x[3, 200] = 0, 1e30, float("nan"), float("-inf")
    y = linear(x)
    assert torch.equal(y[4], clean[4]) and torch.equal(y[0], bias)
    assert y[1].isfinite().all() and y[2:4].isnan().all()


@device
def test_one_scale_passes_on_what_is_not_finite(device):
    x, weight = torch.randn(3, 64, device=device), pack(torch.randn(32, 64, device=device), "tensor")
    x[1, 5] = float("inf")
    y = float8_scaled_linear(*float8_per_tensor(x)[:2], *weight, None, torch.bfloat16)
    assert y.isnan().all()
    given = torch.tensor([0.01], device=device)
    x[2, 5] = float("nan")
    y = float8_scaled_linear(Float8PerTensor(0.01)(x).x, given, *weight, None, torch.bfloat16)
    assert y[:2].isfinite().all() and y[2].isnan().all()


@pytest.mark.parametrize("granularity, shape", [("row", (300,)), ("tensor", (1,)), ("block", (3, 2))])
def test_packing(granularity, shape):
    weight = torch.randn(300, 256).bfloat16()
    q, scale = pack(weight, granularity)
    assert (q.dtype, q.shape, scale.dtype, scale.shape) == (FLOAT8, (300, 256), torch.float32, shape)
    ones = torch.ones(256, 2 if granularity == "block" else 1)
    back = oracle(torch.eye(256).to(FLOAT8), ones, q, scale, None, None).T
    assert (back - weight.double()).norm() <= 0.04 * weight.double().norm()
    *packed, x_scale = float8_scaled_linear.pack(weight, granularity=granularity, x_scale=0.5)
    assert len(packed) == 2 and torch.equal(x_scale, torch.tensor([0.5]))


def test_what_cannot_be_packed_is_said():
    with pytest.raises(ValueError, match="no granularity 'channel'; there are row, tensor, block"):
        pack(torch.ones(2, 2), "channel")
    with pytest.raises(ValueError, match="K must be a multiple"):
        pack(torch.ones(4, 192), "block")


def test_what_does_not_fit_is_named():
    x, x_scale, q, scale, bias, dtype = inputs((3, 256), 70, torch.float32, "row")
    of_blocks, blocks = torch.ones(3, 2), torch.ones(1, 2)
    for wrong, message in {
        (x.float(), x_scale, q, scale, bias, dtype): r"x is float32 .*; expected float8_e4m3fn \[3, 256\]",
        (x, x_scale[:2], q, scale, bias, dtype): r"x_scale is float32 \[2, 1\].*; expected float32 \[3, 1\] or \[\]",
        (x, x_scale.double(), q, scale, bias, dtype): "x_scale is float64",
        (x, x_scale, q, scale[:69], bias, dtype): r"scale is float32 \[69\] .*; expected float32 \[70\] or \[1\]",
        (x, of_blocks, q, torch.ones(1, 3), bias, dtype): r"scale is float32 \[1, 3\] .*; expected float32 \[1, 2\]",
        (x, x_scale, q, blocks, bias, dtype): r"x_scale is float32 \[3, 1\] .*; expected float32 \[3, 2\]",
        (x, x_scale, q, scale, bias[1:], dtype): r"bias is float32 \[69\]",
        (x, x_scale, q, scale, bias, torch.int8): "dtype is torch.int8",
        (x[:, :250], x_scale, q[:, :250], torch.ones(1, 1), bias, dtype): "K is 250; expected a multiple of 128",
    }.items():
        with pytest.raises(ValueError, match=f"float8_scaled_linear: {message}"):
            float8_scaled_linear(*wrong)


@granularity
def test_registration(granularity):
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]  # none compares float8
    for bias in (True, False):
        arguments = inputs((2, 3, 128), 70, torch.bfloat16, granularity, bias=bias)
        torch.library.opcheck(float8_scaled_linear.overload, arguments, test_utils=checks)


@granularity
def test_exports_with_any_number_of_tokens(granularity):
    _, _, *rest = inputs((2, 3, 128), 70, torch.float32, granularity)

    class Linear(torch.nn.Module):
        def forward(self, x):
            return float8_scaled_linear.overload(*QUANTIZE[granularity](x)[:2], *rest)

    batch = {"x": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(Linear(), (torch.ones(2, 3, 128),), dynamic_shapes=batch).module()
    for size in (1, 5):
        x = torch.randn(size, 3, 128)
        check(exported(x), "", *QUANTIZE[granularity](x)[:2], *rest)


@pytest.mark.parametrize("M", [1, 17])
@pytest.mark.parametrize("K", [128, 512, 640])
@granularity
def test_cublaslt_is_given_what_torch_takes(granularity, K, M):
    """By the checks that torch makes of tensors without data; of blocks it counts whole ones there."""
    N, name = 256, "cublaslt_blocks" if granularity == "block" else "cublaslt"
    with FakeTensorMode():
        x, q = (torch.empty(rows, K, dtype=FLOAT8, device="cuda") for rows in (M, N))
        shapes = {"row": ((M, 1), (N,)), "tensor": ((1,), (1,)), "block": ((M, K // 128), (2, K // 128))}
        x_scale, scale = (torch.empty(shape, device="cuda") for shape in shapes[granularity])
        bias = torch.empty(N, dtype=torch.bfloat16, device="cuda")
        row = x.as_strided((M, K), (0 if M == 1 else K, 1))
        for out in (torch.bfloat16, torch.float32):
            y = float8_scaled_linear[name].function(row, x_scale, q, scale, bias, out)
            assert y.shape == (M, N) and y.dtype is out and y.device.type == "cuda"


@pytest.mark.parametrize(
    "capability, dtype, group_size, chosen",
    [
        ((8, 0), torch.bfloat16, None, "dequantize"),
        ((8, 9), torch.bfloat16, None, "cublaslt"),
        ((8, 9), torch.float16, None, "dequantize"),
        ((8, 9), torch.bfloat16, 128, "dequantize"),
        ((9, 0), torch.bfloat16, None, "cublaslt"),
        ((9, 0), torch.float32, None, "cublaslt"),
        ((9, 0), torch.bfloat16, 128, "cublaslt_blocks"),
        ((10, 0), torch.bfloat16, None, "cublaslt"),
        ((10, 0), torch.bfloat16, 128, "dequantize"),
    ],
)
def test_the_choice_on_a_gpu(capability, dtype, group_size, chosen, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    float8_scaled_linear.choose.cache_clear()
    case = Case("cuda", dtype, 64, 4096, 4096, group_size, capability)
    assert float8_scaled_linear.choose(case).name == chosen
    odd = Case("cuda", dtype, 64, 4096, 4104, group_size, capability)
    assert "K is not a multiple of 16" in float8_scaled_linear["cublaslt"].supports(odd) or chosen != "cublaslt"
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert float8_scaled_linear["cublaslt_blocks"].supports(case) is not True
    float8_scaled_linear.choose.cache_clear()
