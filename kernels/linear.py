"""What the linear operators share: y = x @ W.T + bias, whatever W is packed to."""

from collections.abc import Callable
from importlib.util import find_spec
from math import prod

import torch
from torch import Tensor

from . import cpu_native
from .float8 import widen
from .op import Case, Implementation, Op, capability, need

TRITON = find_spec("triton") is not None  # imported at its first use only: that takes a while
FEW_TOKENS = 128  # from here on a GPU dequantizes the weight once and multiplies with cuBLAS
BLOCK = {"cpu": 1 << 21}  # weights dequantized at a time: on CPU what its caches hold,
LARGE_BLOCK = 1 << 27  # elsewhere what a large matrix product needs: 256 MB in half precision


class LinearOp(Op):
    """An op on x [..., K], a packed weight [N, K] and a bias, the last argument, that gives y [..., N] like x.

    Its implementations see x as a contiguous [M, K] with M ≥ 1, and give [M, N]. Gradients flow to x and to the bias;
    a packed weight has none.
    """

    def run(self, *args, implementation: str | None = None) -> Tensor:
        x, *weight = args
        case = self.known_case(*args)
        if not case.M:
            return x.new_empty(*x.shape[:-1], case.N)
        return self.apply(self[implementation] if implementation else self.choose(case), x, *weight)

    def apply(self, choice: Implementation, x: Tensor, *weight) -> Tensor:
        y = choice.function(x.reshape(-1, x.shape[-1]).contiguous(), *weight)
        return y.view(*x.shape[:-1], y.shape[-1])

    def like(self, x: Tensor, *weight) -> Tensor:
        """An empty y of the right shape: the op's fake."""
        return x.new_empty(*x.shape[:-1], self.case_of(x, *weight).N)

    def weight(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Decorator: the weight [N, K] that the arguments between x and the bias stand for, which gradients need."""

        def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
            _, *packed, _ = inputs
            ctx.tensors = [isinstance(each, Tensor) for each in packed]
            ctx.numbers = [each for each in packed if not isinstance(each, Tensor)]
            ctx.save_for_backward(*(each for each in packed if isinstance(each, Tensor)))

        def backward(ctx, of_y: Tensor) -> tuple:
            tensors, numbers = iter(ctx.saved_tensors), iter(ctx.numbers)
            packed = [next(tensors if is_tensor else numbers) for is_tensor in ctx.tensors]
            to_x, *_, to_bias = ctx.needs_input_grad
            of_x = of_y @ function(*packed) if to_x else None
            of_bias = of_y.sum_to_size(of_y.shape[-1:]) if to_bias else None
            return of_x, *[None] * len(packed), of_bias

        torch.library.register_autograd(self.qualified_name, backward, setup_context=setup_context)
        return function

    def fit(self, x: Tensor, N: int, K: int, group_size: int | None, *expected) -> Case:
        """The case of a call, once its arguments are known to fit together.

        expected: (name, tensor or None, dtype, *shapes) of each part of the packed weight, and of the bias; any of
        the shapes will do.
        Raises ValueError with the op, the argument, what it is and what was expected.
        """
        if x.dim() == 0 or x.shape[-1] != K or not x.is_floating_point():
            raise ValueError(f"{self.name}: x is {_words(x.dtype, x.shape)}; expected float [..., {K}]")
        fitting(self.name, x.device, *expected)
        return Case(x.device.type, x.dtype, prod(x.shape[:-1]), N, K, group_size, capability(x.device))


def fitting(op: str, device: torch.device, *expected) -> None:
    """Raises ValueError for the first argument of an op that is no None and not as expected; see `LinearOp.fit`."""
    for name, tensor, dtype, *shapes in expected:
        if tensor is None:
            continue
        if tensor.dtype is not dtype or tensor.shape not in shapes or tensor.device != device:
            found = f"{_words(tensor.dtype, tensor.shape)} on {tensor.device}"
            wanted = " or ".join([_words(dtype, shapes[0]), *(str(list(shape)) for shape in shapes[1:])])
            raise ValueError(f"{op}: {name} is {found}; expected {wanted} on {device}")


def matmul_by_blocks(
    x: Tensor, N: int, weight: Callable[[slice], Tensor], bias: Tensor | None = None, multiple: int = 1
) -> Tensor:
    """x [M, K] times W.T, where `weight(rows)` gives the columns [K, rows] of W.T: y [M, N].

    Block after block of rows, a multiple of `multiple`: a large dequantized weight is never there as a whole. Blocks
    are large where the call is traced, as each becomes a part of the graph.
    """
    size = LARGE_BLOCK if torch.compiler.is_exporting() else BLOCK.get(x.device.type, LARGE_BLOCK)
    block = max(size // max(x.shape[1], 1) // multiple, 1) * multiple
    if block >= N:
        return torch.mm(x, weight(slice(0, N))) if bias is None else torch.addmm(bias, x, weight(slice(0, N)))
    y = x.new_empty(x.shape[0], N)
    for start in range(0, N, block):
        rows = slice(start, min(start + block, N))
        if bias is None:
            torch.mm(x, weight(rows), out=y[:, rows])
        else:
            torch.addmm(bias[rows], x, weight(rows), out=y[:, rows])
    return y


def matmul_by_channel(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [M, K] times (q * scale).T, plus bias: y [M, N]; q [N, K] of codes that bf16 holds, scale [N], by blocks."""
    if slow_half(x):
        return in_fp32(matmul_by_channel, x, q, scale, bias)
    if x.dtype is torch.float16:  # sums of codes without their scale would overflow
        return matmul_by_blocks(x, len(q), lambda rows: (widen(q[rows], x.dtype) * scale[rows, None]).T, bias)
    y = matmul_by_blocks(x, len(q), lambda rows: widen(q[rows], x.dtype).T)
    return y.mul_(scale) if bias is None else torch.addcmul(bias, y, scale, out=y)


def slow_half(x: Tensor) -> bool:
    """Whether x is of a dtype that the device multiplies by far more slowly than fp32: fp16 on CPU."""
    return x.dtype is torch.float16 and x.device.type == "cpu"


def in_fp32(function: Callable[..., Tensor], x: Tensor, *weight) -> Tensor:
    """What function(x, *weight) gives, in x's dtype, computed with x and the weight's parts of that dtype in fp32."""
    wide = (each.float() if isinstance(each, Tensor) and each.dtype is x.dtype else each for each in weight)
    return function(x.float(), *wide).to(x.dtype)


def native(case: Case) -> bool | str:
    """Whether the C++ kernels take the case; their first use compiles them."""
    takes = case.dtype in cpu_native.DTYPES, "takes bf16, fp16 and fp32 x only"
    here = need((case.device == "cpu", "runs on CPU only"), takes)
    return cpu_native.available() if here is True else here


def aten(case: Case, most: int) -> bool | str:
    """Whether ATen's CPU kernels take the case, up to `most` tokens.

    What they do not refuse but must not be given: other x than bf16 goes one element at a time, and where K is not
    whole vectors they read past the end of the weight.
    """
    return need(
        (case.device == "cpu", "runs on CPU only"),
        (case.dtype is torch.bfloat16, "takes bf16 x only"),
        (case.K % 32 == 0, "K is not a multiple of 32"),
        (case.M is not None, "M is unknown"),
        ((case.M or 0) <= most, f"slower than a matrix product from M = {most + 1} on"),
    )


def triton(case: Case) -> bool | str:
    """Whether the Triton kernels take the case."""
    return need(
        (case.device == "cuda", "runs on CUDA only"),
        (TRITON, "Triton is not installed"),
        (case.dtype in (torch.bfloat16, torch.float16), "takes bf16 and fp16 x only"),
        ((case.capability or (8, 0)) >= (8, 0), "needs compute capability 8.0"),
        (case.M is not None, "M is unknown"),
        ((case.M or 0) < FEW_TOKENS, f"slower than cuBLAS from M = {FEW_TOKENS} on"),
    )


def _words(dtype: torch.dtype, shape) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
