"""int8_scaled_linear: y = ((x - x_zero) @ q.T) * x_scale * scale + bias, with codes of 8 bits on both sides.

x [..., K] int8; x_scale fp32 and x_zero int32 or None (0), [..., 1], one for each token, or [1] or [], one for all;
q [N, K] int8 in [-127, 127]; scale [N], float, one for each output channel; sums [N] int32, of the rows of q, where
there is an x_zero, else None; bias [N], float, or None -> y [..., N] in `dtype`. Products are added up exactly, in
int32; what follows is computed in fp32 and rounded once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu_native, cuda_scaled_linear, int8_linear
from .op import Case, need
from .scaled_linear import ScaledLinearOp, scaled

EXACT = 1024  # products of codes that fp32 adds up exactly
INT_MM_TOKENS = 17  # the fewest that torch._int_mm takes on CUDA

int8_scaled_linear = ScaledLinearOp(
    "int8_scaled_linear(Tensor x, Tensor x_scale, Tensor? x_zero, Tensor q, Tensor scale, Tensor? sums, Tensor? bias, "
    "ScalarType dtype) -> Tensor",
    codes=torch.int8,
)
int8_scaled_linear.fake(int8_scaled_linear.like)


@int8_scaled_linear.case
def _(x, x_scale, x_zero, q, scale, sums, bias, dtype) -> Case:
    N, K = q.shape
    if (x_zero is None) != (sums is None):
        raise ValueError("int8_scaled_linear: x_zero and sums come together, or neither does")
    expected = (
        ("q", q, torch.int8, (N, K)),
        ("scale", scale, scale.dtype, (N,)),
        ("sums", sums, torch.int32, (N,)),
        ("bias", bias, bias.dtype if bias is not None else None, (N,)),
    )
    return int8_scaled_linear.fit(x, x_scale, x_zero, dtype, N, K, *expected)


@int8_scaled_linear.packing
def pack(weight: Tensor, algorithm: str = "minmax", sums: bool = False) -> tuple[Tensor, ...]:
    """weight [N, K] float -> q [N, K] int8, scale [N] in the weight's dtype and, if wanted, sums [N] int32.

    As `int8_linear.pack` without groups.
    """
    q, scale = int8_linear.pack(weight, algorithm)
    return (q, scale, q.sum(1, dtype=torch.int32)) if sums else (q, scale)


@int8_scaled_linear.reference
def _(x, x_scale, x_zero, q, scale, sums, bias, dtype):
    codes = x.double() if x_zero is None else x.double() - x_zero
    return scaled(codes @ q.double().T, x_scale, scale, bias, dtype)


def shifted(products: Tensor, x_zero: Tensor | None, sums: Tensor | None) -> Tensor:
    """The sums [M, N] of (x - x_zero) * q from those of x * q."""
    return products if x_zero is None else products - x_zero * sums


def native(case: Case) -> bool | str:
    """Whether the C++ kernels take the case; their first use compiles them."""
    here = need(
        (case.device == "cpu", "runs on CPU only"),
        (case.dtype in cpu_native.DTYPES, "gives bf16, fp16 and fp32 y only"),
        (torch.backends.cpu.get_cpu_capability() == "AVX512", "slower than a product in fp32 without AVX-512"),
    )
    return cpu_native.available() if here is True else here


@int8_scaled_linear.implementation("native", supports=native)
def _(x, x_scale, x_zero, q, scale, sums, bias, dtype):
    return cpu_native.int8_scaled_linear(x, x_scale, x_zero, q, scale, sums, bias, dtype)


@int8_scaled_linear.implementation("cuda", supports=lambda case: cuda_scaled_linear.supports(case, torch.int8))
def _(x, x_scale, x_zero, q, scale, sums, bias, dtype, function=None):
    given = {"x_scale": x_scale, "x_zero": x_zero, "sums": sums, "function": function}
    return cuda_scaled_linear.linear(x, q, scale, bias, dtype, **given)


def int_mm(case: Case) -> bool | str:
    """Whether ATen's product of int8 takes the case, at any M: where it refuses few tokens they are filled up."""
    cpu = case.device == "cpu"
    return need(
        (case.device in ("cpu", "cuda"), "runs on CPU and CUDA only"),
        (not cpu or torch.cpu._is_vnni_supported(), "slow on a processor without VNNI"),
        (cpu or (case.capability or (8, 0)) >= (8, 0), "needs compute capability 8.0"),
        (case.K > 1, "wrong where K is 1"),  # on CPU, in torch 2.11 … 2.13
        (cpu or case.K % 8 == 0, "K is not a multiple of 8"),
        (cpu or case.N % 8 == 0, "N is not a multiple of 8"),
    )


@int8_scaled_linear.implementation("int_mm", supports=int_mm, standalone=True)
def _(x, x_scale, x_zero, q, scale, sums, bias, dtype):
    M = x.shape[0]
    if x.is_cuda and (torch.compiler.is_exporting() or M < INT_MM_TOKENS):
        x = F.pad(x, (0, 0, 0, INT_MM_TOKENS - 1))
    elif not torch.compiler.is_exporting() and M == 1:
        x = x.clone(memory_format=torch.contiguous_format)  # a row's stride may be 0, which makes the result wrong
    products = torch._int_mm(x, q.T)[:M]
    return scaled(shifted(products, x_zero, sums), x_scale, scale, bias, dtype)


@int8_scaled_linear.implementation("float", supports=lambda case: True, standalone=True)
def _(x, x_scale, x_zero, q, scale, sums, bias, dtype):
    """fp32 products of so few codes at a time that they are exact."""
    total = torch.zeros((), dtype=torch.int32, device=x.device)
    for start in range(0, x.shape[1], EXACT):
        part = slice(start, start + EXACT)
        total = total + (x[:, part].float() @ q[:, part].float().T).int()
    return scaled(shifted(total, x_zero, sums), x_scale, scale, bias, dtype)
