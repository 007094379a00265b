"""Linear layers on quantized activations, and on 2:4 sparse weights, for CUDA, in CUDA C++: `scaled_linear.cu`.

The tensor cores multiply codes of 8 bits as they are, or half precision where only the weight is sparse; scales, zero
points, bias and an activation function meet the sums in registers. Which sizes are best for a shape is measured, as
for `cuda_linear.py`, and kept in the same files; other shapes take those of the nearest. Nothing is measured at run
time.
"""

from dataclasses import dataclass, field
from functools import cache, lru_cache

import torch
from torch import Tensor

from . import cuda, plans
from .cuda_linear import CAPABILITIES, SHARED
from .op import Case, need

TOKENS = (8, 16, 32, 64, 128, 256, 512, 1024, 4096, 1 << 24)  # a plan holds up to so many
AHEAD = 3072  # bytes of barriers and scales of tokens
AWAY = 64  # tokens of y that leave at a time where there is no room for all
CODES = {torch.int8: 0, torch.float8_e4m3fn: 1, torch.bfloat16: 2, torch.float16: 2}  # of x and the weight
FUNCTIONS = (None, "gelu", "gelu_tanh")  # of y, as the kernel counts them
BEHIND = "others were faster for so many tokens"
KINDS = {  # of linears, as their plans are filed, by the codes and whether the weight is 2:4
    (torch.int8, False): "int8dq",
    (torch.float8_e4m3fn, False): "float8dq",
    (torch.bfloat16, True): "sparse24",
    (torch.float16, True): "sparse24",
    (torch.int8, True): "int8dq-sparse24",
    (torch.float8_e4m3fn, True): "float8dq-sparse24",
}


@dataclass(frozen=True)
class ScaledPlan:
    """The sizes of a kernel; `scaled_linear.cu` says what they are.

    share: blocks of a cluster that share K; neighbours: blocks of a cluster that bring x to each other; one of them is
    1. stages, boxes; channels and tokens of a block; warps that multiply, in fours. behind: whether something else was
    faster where both were measured: for a sparse product, the dense one.
    """

    share: int
    neighbours: int
    stages: int
    boxes: int
    channels: int
    tokens: int
    warps: int
    behind: bool = field(default=False, compare=False)

    def defines(
        self,
        codes: torch.dtype,
        sparse: bool,
        scales: torch.dtype,
        y: torch.dtype,
        zeros: bool = False,
        function: str | None = None,
    ) -> dict[str, int]:
        return {
            "KIND": CODES[codes],
            "SPARSE": int(sparse),
            "HALF": int(y is torch.float16),
            "WIDE_SCALES": int(scales is torch.float32),
            "TOKENS": self.tokens,
            "GROUPS": self.warps // 4,
            "TALL": self.channels // self.warps // 16,
            "STAGES": self.stages,
            "AWAY": self.away(codes.itemsize, sparse),
            "BUFFERS": self.buffers(codes.itemsize, sparse),
            "BOXES": self.boxes,
            "NEIGHBOURS": self.neighbours,
            "SPLIT": int(self.share > 1),
            "PRODUCERS": self.producers,
            "ZEROS": int(zeros),
            "FUNCTION": FUNCTIONS.index(function),
        }

    @property
    def producers(self) -> int:
        """Threads that only copy, or give their registers away."""
        return 128 if self.warps == 8 and self.channels * self.tokens > 128 * 128 else 32

    @property
    def threads(self) -> int:
        return self.warps * 32 + self.producers

    def step(self, itemsize: int) -> int:
        """How much of K a stage holds."""
        return self.boxes * 128 // itemsize

    def row(self, sparse: bool) -> int:
        """Bytes of a channel in a stage."""
        return self.boxes * 128 // (1 + sparse)

    def ring(self, itemsize: int, sparse: bool) -> int:
        """Bytes of all stages."""
        indices = max(self.step(itemsize) // 8, 16) if sparse else 0
        stage = self.tokens * self.boxes * 128 + self.channels * (self.row(sparse) + indices)
        return self.stages * (-(-stage // 1024) * 1024)

    def room(self, itemsize: int, sparse: bool) -> int:
        """How many tokens of y there is room for behind the ring."""
        return (SHARED - AHEAD - self.ring(itemsize, sparse)) // (self.channels * 2)

    def away(self, itemsize: int, sparse: bool) -> int:
        """Tokens of y that leave at a time: all, if there is room for them."""
        return self.tokens if self.room(itemsize, sparse) >= self.tokens else min(self.tokens, AWAY)

    def buffers(self, itemsize: int, sparse: bool) -> int:
        """How often there is room for `away` tokens, at least twice where they are not all: one waits for the other."""
        away = self.away(itemsize, sparse)
        return 1 if away == self.tokens else max(self.room(itemsize, sparse) // away, 2)

    def shared(self, itemsize: int, sparse: bool) -> int:
        """Bytes of shared memory: barriers, scales of tokens, the ring, and behind it y of a tile, or some of it; or,
        where K is shared, barriers, the ring or the sums that take its place, and what the other blocks bring."""
        ring = self.ring(itemsize, sparse)
        if self.share == 1:
            return AHEAD + ring + self.buffers(itemsize, sparse) * self.away(itemsize, sparse) * self.channels * 2
        row = (self.channels + 8) * 4
        return 1024 + max(ring, self.tokens * row) + (self.share - 1) * -(-self.tokens // self.share) * row

    def __str__(self) -> str:
        size = f"{self.channels} channels × {self.tokens} tokens"
        if self.share > 1:
            return f"{size}, {self.share} blocks share K"
        return f"{size}, {self.neighbours} blocks share x" if self.neighbours > 1 else size

    def fits(self, N: int, K: int, itemsize: int, sparse: bool) -> bool:
        """Whether the kernel can run so, for a weight [N, K] of items of so many bytes."""
        step = self.step(itemsize)
        together = 128 // step if sparse and step < 128 else 1  # stages whose indices come in one copy
        even = self.stages % together == 0 and -(-K // step) % (together * (self.share if together > 1 else 1)) == 0
        return even and -(-K // step) >= self.share and self.shared(itemsize, sparse) <= SHARED


def sizes(codes: torch.dtype, sparse: bool, N: int, K: int) -> list[tuple[bool, str]]:
    """What the kernel asks of a shape, for `need`."""
    unit = 128 if sparse else 16 // codes.itemsize  # rows of what is copied are multiples of 16 bytes
    return [(K % unit == 0, f"K is not a multiple of {unit}"), (N % 8 == 0, "N is not a multiple of 8")]


@lru_cache(maxsize=4096)
def plan(codes: torch.dtype, sparse: bool, M: int, N: int, K: int) -> ScaledPlan | str:
    """The plan for M tokens: that of the nearest shape that was measured. Or the reason why there is none."""
    bucket = next(i for i, most in enumerate(TOKENS) if most >= M)
    measured = plans.table(KINDS[codes, sparse], ScaledPlan)
    found = plans.nearest(measured, bucket, N, K, lambda each: each.fits(N, K, codes.itemsize, sparse))
    if not found:
        return "no plan that fits was measured: `aograph tune` does that"
    return found[0] or BEHIND


def supports(case: Case, codes: torch.dtype, sparse: bool = False) -> bool | str:
    """Whether the kernel takes the case, with x of such codes."""
    here = need(
        (case.device == "cuda", "runs on CUDA only"),
        (case.capability in CAPABILITIES, "is written for compute capability 9.0"),
        (case.dtype in (torch.bfloat16, torch.float16), "gives bf16 and fp16 y only"),
        (case.group_size is None, "has no scales of blocks"),
        *sizes(codes, sparse, case.N, case.K),
        (case.M is not None, "M is unknown"),
    )
    if here is True:
        here = cuda.available(case.capability)
    if here is not True:
        return here
    found = plan(codes, sparse, case.M, case.N, case.K)
    if isinstance(found, str):
        return found
    return not found.behind or sparse or case.activated or BEHIND  # a kernel less makes up for it


def linear(
    x: Tensor,
    q: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    indices: Tensor | None = None,
    x_scale: Tensor | None = None,
    x_zero: Tensor | None = None,
    sums: Tensor | None = None,
    function: str | None = None,
) -> Tensor:
    """`run` by the plan for the shape; x and x_zero contiguous. ValueError where `supports` says no."""
    chosen = plan(x.dtype, indices is not None, x.shape[0], q.shape[0], x.shape[1])
    if isinstance(chosen, str):
        raise ValueError(f"a weight [{q.shape[0]}, {x.shape[1]}] under x {list(x.shape)}: {chosen}")
    bias = None if bias is None else bias.to(dtype)
    if scale is not None and scale.dtype not in (torch.float32, dtype):
        scale = scale.float()
    return run(chosen, x, x_scale, x_zero, q, indices, scale, sums, bias, dtype, function)


def run(
    plan: ScaledPlan,
    x: Tensor,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    q: Tensor,
    indices: Tensor | None,
    scale: Tensor | None,
    sums: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    function: str | None = None,
    dependent: bool = True,
) -> Tensor:
    """y [M, N] in dtype, bf16 or fp16, by a plan that fits.

    x [M, K] int8, float8_e4m3fn or, for sparse weights, of `dtype`, contiguous, M ≥ 1; x_scale fp32 and x_zero int32,
    of M tokens or of one for all; q [N, K] of x's dtype or, where sparse, [N, K/2], with indices [N, K/8] uint8; scale
    [N] or [1]; sums [N] int32, where there is an x_zero; bias [N] of `dtype`. What is None counts as 1 or 0. function:
    of FUNCTIONS, of y before it is rounded.
    dependent: whether it may start before the kernel ahead of it has ended.
    """
    (M, K), N, sparse = x.shape, q.shape[0], indices is not None
    y = torch.empty(M, N, dtype=dtype, device=x.device)
    x, q, indices = (t if t is None or t.data_ptr() % 16 == 0 else t.clone() for t in (x, q, indices))
    scales = torch.float32 if scale is None else scale.dtype
    compiled = kernel(plan, x.device, x.dtype, sparse, scales, dtype, x_zero is not None, function)
    shared = plan.shared(x.itemsize, sparse)
    cluster = plan.neighbours * plan.share
    blocks = -(-N // (plan.channels * plan.neighbours)) * -(-M // plan.tokens) * cluster
    if plan.share == 1:
        blocks = min(blocks, compiled.clusters_at_once(plan.threads, shared, cluster) * cluster)
    with torch.cuda.device_of(x):
        matrices = _boxes(plan, x.data_ptr(), q.data_ptr(), indices.data_ptr() if sparse else 0, M, N, K, x.itemsize)
        of_y = (
            y
            if plan.share > 1
            else cuda.boxes(y.data_ptr(), (M, N), 2, (plan.away(x.itemsize, sparse), 64), swizzle=128)
        )
        steps = (int(part is not None and part.numel() > 1) for part in (x_scale, scale))
        rest = x_scale, x_zero, scale, sums, bias, of_y, *steps, M, N, K
        compiled((blocks, 1, 1), plan.threads, (*matrices, *rest), shared=shared, cluster=cluster, dependent=dependent)
    return y


@lru_cache(maxsize=4096)
def _boxes(plan: ScaledPlan, x: int, q: int, indices: int, M: int, N: int, K: int, itemsize: int) -> tuple:
    """x, the codes and, where sparse, their indices at these addresses, as boxes."""
    sparse = bool(indices)
    row = min(plan.row(sparse), 128)
    found = (
        cuda.boxes(x, (M, K), itemsize, (plan.tokens // plan.neighbours, 128 // itemsize), swizzle=128),
        cuda.boxes(q, (N, K // (1 + sparse)), itemsize, (plan.channels, row // itemsize), swizzle=row),
    )
    if not sparse:
        return found
    return *found, cuda.boxes(indices, (N, K // 8), 1, (plan.channels, max(plan.step(itemsize) // 8, 16)))


@cache
def kernel(plan: ScaledPlan, device: torch.device, *form):
    return cuda.kernel("scaled_linear.cu", "scaled_linear", device, **plan.defines(*form))
