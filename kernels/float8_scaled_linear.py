"""float8_scaled_linear: y = (x * x_scale) @ (q * scale).T + bias, with e4m3 codes on both sides.

x [..., K] and q [N, K] float8_e4m3fn; the scales, fp32, say by their shapes what shares one:
    x_scale [..., 1], a token, or [1] or [], all tokens; scale [N], an output channel, or [1], the whole weight
    x_scale [..., K/128], 128 neighbours along K; scale [ceil(N/128), K/128], a square block of the weight
bias [N], float, or None -> y [..., N] in `dtype`. Sums are of fp32, or what tensor cores keep of them without help
(`cuda`, and cuBLASLt's fast accumulation: on Hopper 640 equal terms lose up to 1 %; far less within blocks of scales);
scales and bias meet them in fp32, and y is rounded once. Where y is bf16, `dequantize` multiplies in bf16, which rounds
the sums, or with blocks x and the weight, before that.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cuda_scaled_linear, float8
from .float8 import FLOAT8, widen
from .linear import matmul_by_blocks
from .op import Case, need
from .quantized_activation import BLOCK
from .scaled_linear import ScaledLinearOp, scaled

FAST = torch.bfloat16  # what the fallback multiplies in where y is of it; else in fp32
CUBLAS_ROWS = (12, 9)  # the CUDA from which cuBLASLt takes scales of rows, and of blocks

float8_scaled_linear = ScaledLinearOp(
    "float8_scaled_linear(Tensor x, Tensor x_scale, Tensor q, Tensor scale, Tensor? bias, ScalarType dtype) -> Tensor",
    codes=FLOAT8,
)
float8_scaled_linear.fake(float8_scaled_linear.like)


@float8_scaled_linear.case
def _(x, x_scale, q, scale, bias, dtype) -> Case:
    N, K = q.shape
    blocks = scale.dim() == 2
    if blocks and K % BLOCK:
        raise ValueError(f"float8_scaled_linear: K is {K}; expected a multiple of {BLOCK}, as scale is that of blocks")
    expected = (
        ("q", q, FLOAT8, (N, K)),
        ("scale", scale, torch.float32, *([(-(-N // BLOCK), K // BLOCK)] if blocks else [(N,), (1,)])),
        ("bias", bias, bias.dtype if bias is not None else None, (N,)),
    )
    return float8_scaled_linear.fit(x, x_scale, None, dtype, N, K, *expected, group_size=BLOCK if blocks else None)


@float8_scaled_linear.packing
def pack(weight: Tensor, granularity: str = "row") -> tuple[Tensor, Tensor]:
    """weight [N, K] float -> q [N, K] float8_e4m3fn and scale, fp32: [N], [1] or [ceil(N/128), K/128].

    granularity: "row", "tensor" or "block". ValueError for any other, and for blocks where K is no multiple of 128.
    """
    N, K = weight.shape
    tiles = {"row": (1, K), "tensor": (N, K), "block": (BLOCK, BLOCK)}
    if granularity not in tiles:
        raise ValueError(f"no granularity {granularity!r}; there are {', '.join(tiles)}")
    q, scale = float8.pack(weight, tiles[granularity], torch.float32)
    return q, scale if granularity == "block" else scale.squeeze(1)


def spread(codes: Tensor, scale: Tensor) -> Tensor:
    """codes [..., K] times scale [..., G], each for K/G neighbours."""
    return (codes.unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2)


def of_channels(scale: Tensor, N: int) -> Tensor:
    """The scales of a weight as [N, G] or [1, G], each for K/G weights of a channel."""
    return scale[:, None] if scale.dim() == 1 else scale.repeat_interleave(BLOCK, 0)[:N]


@float8_scaled_linear.reference
def _(x, x_scale, q, scale, bias, dtype):
    wide = spread(x.double(), x_scale if x_scale.dim() else x_scale[None])
    weight = spread(q.double(), of_channels(scale, len(q)).double())
    return F.linear(wide, weight, None if bias is None else bias.double()).to(dtype)


def cublaslt(case: Case, blocks: bool) -> bool | str:
    """Whether cuBLASLt takes the case, or, where it has no scales of rows, CUTLASS in its place."""
    capability, cuda = case.capability or (0, 0), tuple(map(int, (torch.version.cuda or "0").split(".")))
    rows = capability[0] == 9 and cuda >= CUBLAS_ROWS
    return need(
        (case.device == "cuda", "runs on CUDA only"),
        (capability >= (8, 9), "needs compute capability 8.9"),
        (rows or not blocks, "needs compute capability 9 and CUDA 12.9"),
        (rows or case.dtype is torch.bfloat16, "gives bf16 only, but for compute capability 9 and CUDA 12.9"),
        (case.K % 16 == 0, "K is not a multiple of 16"),
        (case.N % 16 == 0, "N is not a multiple of 16"),
        (blocks or case.group_size is None, "takes no scales of blocks"),
        (not blocks or case.group_size is not None, "takes scales of blocks only"),
    )


def with_bias(product: Callable[[Tensor | None], Tensor], bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`product` of a bias as cuBLASLt takes it, in y's own dtype and in halves alone; else it is added behind."""
    if bias is None or dtype is torch.float32:
        return product(None) if bias is None else product(None).add_(bias)
    return product(bias.to(dtype))


def dense(x: Tensor) -> Tensor:
    """A contiguous x [M, K] with the stride of its rows, which a single row may lack."""
    return x.view(-1).view(x.shape)


@float8_scaled_linear.implementation("cuda", supports=lambda case: cuda_scaled_linear.supports(case, FLOAT8))
def _(x, x_scale, q, scale, bias, dtype):
    return cuda_scaled_linear.linear(x, q, scale, bias, dtype, x_scale=x_scale)


@float8_scaled_linear.implementation("cublaslt", supports=lambda case: cublaslt(case, blocks=False), standalone=True)
def _(x, x_scale, q, scale, bias, dtype):
    if x_scale.numel() != 1 or scale.numel() != 1:  # both for each row, or both for all
        x_scale, scale = x_scale.expand(x.shape[0], 1).contiguous(), scale.expand(1, q.shape[0]).contiguous()

    def product(bias: Tensor | None) -> Tensor:
        return torch._scaled_mm(dense(x), q.T, x_scale, scale, bias, out_dtype=dtype, use_fast_accum=True)

    return with_bias(product, bias, dtype)


@float8_scaled_linear.implementation("cublaslt_blocks", supports=lambda case: cublaslt(case, blocks=True))
def _(x, x_scale, q, scale, bias, dtype):
    """cuBLASLt reads the scales of x column by column, and of a column, as of a row of blocks, a multiple of four."""
    M, missing = x.shape[0], -x.shape[0] % 4
    if missing:
        x, x_scale = F.pad(x.view(torch.uint8), (0, 0, 0, missing)).view(FLOAT8), F.pad(x_scale, (0, 0, 0, missing))
    x_scale = x_scale.T.clone(memory_format=torch.contiguous_format).T
    scale = F.pad(scale, (0, -scale.shape[1] % 4)).T

    def product(bias: Tensor | None) -> Tensor:
        kinds = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
        return F.scaled_mm(dense(x), q.T, x_scale, kinds[0], scale, kinds[1], bias=bias, output_dtype=dtype)

    return with_bias(product, bias, dtype).narrow(0, 0, M)


@float8_scaled_linear.implementation("dequantize", supports=lambda case: True, standalone=True)
def _(x, x_scale, q, scale, bias, dtype):
    product = FAST if dtype is FAST else torch.float32
    if scale.dim() == 1:
        codes = x.to(product)  # of which some may be NaN, as none of q is
        sums = matmul_by_blocks(codes, q.shape[0], lambda rows: widen(q[rows], product).T)
        return scaled(sums, x_scale, scale, bias, dtype)

    def weight(rows: slice) -> Tensor:
        blocks = slice(rows.start // BLOCK, -(-rows.stop // BLOCK))
        wide = spread(widen(q[rows], torch.float32), of_channels(scale[blocks], rows.stop - rows.start))
        return wide.to(product).T

    bias = None if bias is None else bias.to(product)
    return matmul_by_blocks(spread(x.float(), x_scale).to(product), q.shape[0], weight, bias, BLOCK).to(dtype)
