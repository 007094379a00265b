"""Linear layers on packed weights for CUDA, in CUDA C++: which kernel runs, of which sizes, for which shape.

`small_linear.cu` reads the weight as fast as memory gives it, for few tokens; `wide_linear.cu` feeds the tensor cores,
for more. What is best for a shape is measured: `aograph tune` finds the plans of some shapes for each number of
tokens (the upper ends of TOKENS) and keeps them in the cache folder, ahead of those that come with the package
(`tuned/sm_90.json`, from an H200); other shapes take those of the nearest. Nothing is measured at run time.
"""

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import cuda, plans
from .op import Case, need

KINDS = {4: "int4wo", 8: "int8wo"}  # of linears, as their plans are filed, by the bits of a weight
BITS = {torch.uint8: 4, torch.int8: 8}  # of the codes of a packed weight
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1 << 24)  # a plan holds up to so many
CAPABILITIES = {(9, 0)}  # wgmma is of this generation alone
SHARED = 232448  # bytes of shared memory that a block can have,
OF_MULTIPROCESSOR, RESERVED = 233472, 1024  # that its blocks share, and that each takes besides
STEP, UNIT = 64, 128  # k of a stage of the wide and the small kernel


@dataclass(frozen=True)
class Plan:
    """A kernel and its sizes; `blocks` of a cluster share K. The .cu files say what the other sizes are.

    small: stages, channels (64 for a panel of int4, 16 for a row of int8's), tokens (1, or 8 for a tile), warps.
    wide: stages, channels, tokens, the warps that multiply, each 16 or 32 channels, and the batch of products.
    """

    kernel: str
    blocks: int
    stages: int
    channels: int
    tokens: int
    warps: int
    batch: int = 1

    def defines(self, bits: int, group_size: int | None, norm: bool = False, gated: bool = False) -> dict[str, int]:
        """The defines of the kernel, for weights of so many bits; norm, gated: of a fused linear."""
        if self.kernel == "wide":
            values = {"TOKENS": self.tokens, "GROUPS": self.warps // 4, "TALL": self.channels // self.warps // 16}
            values |= {"PRODUCERS": self.producers, "BATCH": self.batch, "SPLIT": int(self.blocks > 1)}
        else:
            values = {
                "TILES": max(self.tokens // 8, 1),
                "WARPS": self.warps,
                "ONE": int(self.tokens == 1),
                "UNIT": UNIT,
                "NORM": int(norm),
                "GATED": int(gated),
            }
            values |= {"PANELS": self.channels // 64} if bits == 4 else {"ROWS": self.channels // 16}
        return {"STAGES": self.stages, **values, "INT4": int(bits == 4), "GROUP": group_size or 0}

    @property
    def producers(self) -> int:
        """Threads that only copy, or give their registers away."""
        return 128 if self.kernel == "wide" and self.warps == 8 and self.channels * self.tokens > 128 * 128 else 32

    @property
    def threads(self) -> int:
        return self.warps * 32 + self.producers

    def shared(self, bits: int, group_size: int | None) -> int:
        """Bytes of shared memory: barriers, the ring of stages or the sums that take its place at the end, and behind
        it, in the small kernel, what the blocks of a cluster bring each other; in the wide one, y of a tile."""
        unit = STEP if self.kernel == "wide" else UNIT
        stage = self.channels * (unit // 2 + max(unit // group_size, 1) * 4 if bits == 4 else unit)
        if self.kernel == "wide":
            stage = -(-(stage + self.tokens * 128) // 1024) * 1024
            if self.blocks == 1:
                return 1024 + self.stages * stage + self.tokens * self.channels * 2
            row = (self.channels + 8) * 4  # of sums; those of a slice of the tokens come from each other block
            parts = (self.blocks - 1) * -(-self.tokens // self.blocks) * row
            return 1024 + max(self.stages * stage, self.tokens * row) + parts
        sums = self.tokens * self.channels * 4
        parts = sums + 32 * self.blocks if self.blocks > 1 else 0  # slices of a cluster's sums are rounded up
        return 2048 + self.warps * max(self.stages * stage, sums) + parts

    def weighed(self, M: int, K: int) -> int:
        """Bytes of shared memory that a block of the small kernel needs besides, where x is normalized."""
        return M * (-(-K // UNIT // self.blocks) * UNIT + 32) * 2

    def fuses(self, bits: int, M: int, N: int, K: int, group_size: int | None, normed: bool, gated: bool) -> bool | str:
        """True where the kernel has a form that normalizes x, gates y or adds a residual, else why not."""
        room = SHARED - self.shared(bits, group_size)
        half = 64 if bits == 4 else 16  # channels that a block of the fused kernel has of the gate, or a multiple
        return need(
            (self.kernel == "small", "the kernel for so many tokens has no fused form"),
            (not normed or self.weighed(M, K) <= room, "x, normalized, does not fit into shared memory"),
            (not gated or self.channels % (2 * half) == 0, "a block has too few channels for a gate"),
            (not gated or N % (2 * half) == 0, f"half of N is not a multiple of {half}"),
        )

    def __str__(self) -> str:
        size = f"{self.kernel}, {self.channels} channels × {self.tokens} token{'s' * (self.tokens > 1)}"
        return f"{size}, {self.blocks} blocks share K" if self.blocks > 1 else size

    def fits(self, N: int, K: int, bits: int, group_size: int | None) -> bool:
        """Whether the kernel can run so, for this shape."""
        taken = all(holds for holds, _ in sizes(N, K))
        return taken and self.blocks <= K // UNIT and self.shared(bits, group_size) <= SHARED


def sizes(N: int, K: int) -> list[tuple[bool, str]]:
    """What the kernels ask of a shape, for `need`."""
    return [(K % UNIT == 0, f"K is not a multiple of {UNIT}"), (N % 8 == 0, "N is not a multiple of 8")]


class Around(NamedTuple):
    """What a fused linear does besides the product; see fused_linear.py."""

    norm: Tensor | None = None
    eps: float = 0.0
    residual: Tensor | None = None
    gated: bool = False


ALONE = Around()


def supports(case: Case, bits: int, fused: bool = False) -> bool | str:
    """Whether these kernels take a case of `int4_linear` or `int8_linear`, and are what it runs fastest with.

    fused: a case of the fused op, of which only the small kernel has a form.
    """
    here = need(
        (case.device == "cuda", "runs on CUDA only"),
        (case.capability in CAPABILITIES, "is written for compute capability 9.0"),
        (case.dtype in (torch.bfloat16, torch.float16), "takes bf16 and fp16 x only"),
        *sizes(case.N, case.K),
        (case.M is not None, "M is unknown"),
    )
    if here is True:
        here = cuda.available(case.capability)
    if here is not True:
        return here
    chosen = plan(bits, case.M, case.N, case.K, case.group_size)
    if isinstance(chosen, str):
        return chosen
    if not fused:
        return True
    if case.dtype is not torch.bfloat16:
        return "takes bf16 x only"
    return chosen.fuses(bits, case.M or 0, case.N, case.K, case.group_size, case.normed, case.gated)


def linear(
    x: Tensor,
    q: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    N: int,
    group_size: int | None,
    around: Around = ALONE,
) -> Tensor:
    """y [M, N] in x's dtype; x [M, K] bf16 or fp16, contiguous, M ≥ 1; the weight as its op packs it.

    group_size: None for one scale for each channel. around: its tensors are contiguous; y is [M, N / 2] if it is gated.
    ValueError where `supports` says no.
    """
    (M, K), bits = x.shape, BITS[q.dtype]
    chosen = plan(bits, M, N, K, group_size)
    if isinstance(chosen, Plan) and around is not ALONE:
        fuses = chosen.fuses(bits, M, N, K, group_size, around.norm is not None, around.gated)
        chosen = fuses if isinstance(fuses, str) else chosen
    if isinstance(chosen, str):
        raise ValueError(f"int{bits} weights [{N}, {K}] under x [{M}, {K}]: {chosen}")
    return run(chosen, x, q, scales, bias, N, group_size, around)


def run(
    plan: Plan,
    x: Tensor,
    q: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    N: int,
    group_size: int | None,
    around: Around = ALONE,
    dependent: bool = True,
) -> Tensor:
    """`linear`, by a plan that fits, and fuses what is around.

    dependent: whether it may start before the kernel ahead of it has ended.
    """
    (M, K), bits = x.shape, BITS[q.dtype]
    small = plan.kernel == "small"
    norm, eps, residual, gated = around
    y = x.new_empty(M, N // 2 if gated else N)
    x, q, scales, norm = (  # copies are of 16 bytes
        t if t is None or t.data_ptr() % 16 == 0 else t.clone() for t in (x, q, scales, norm)
    )
    kernel = _kernel(plan, bits, group_size, x.dtype, x.device, norm is not None, gated)
    shared = plan.shared(bits, group_size) + (plan.weighed(M, K) if norm is not None else 0)
    blocks = -(-N // plan.channels) * -(-M // plan.tokens) * plan.blocks
    if not small and plan.blocks == 1:
        multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
        blocks = min(blocks, multiprocessors * kernel.blocks_per_multiprocessor(plan.threads, shared))
        shared = max(shared, _no_more_than(-(-blocks // multiprocessors)))
    with torch.cuda.device_of(x):
        matrices = _boxes(plan, x.data_ptr(), q.data_ptr(), scales.data_ptr(), M, N, K, bits, group_size, 1 + gated)
        tensors = (box or tensor for box, tensor in zip(matrices, (x, q, scales), strict=True))
        if small:
            rest = bias, norm, residual, y, eps, M, N, K
        else:
            of_y = y if plan.blocks > 1 else cuda.boxes(y.data_ptr(), (M, N), 2, (plan.tokens, 64), swizzle=128)
            rest = bias, of_y, M, N, K
        kernel((blocks, 1, 1), plan.threads, (*tensors, *rest), shared=shared, cluster=plan.blocks, dependent=dependent)
    return y


@lru_cache(maxsize=4096)
def _boxes(
    plan: Plan, x: int, q: int, scales: int, M: int, N: int, K: int, bits: int, group_size: int | None, halves: int
) -> tuple:
    """x, the codes and the scales at these addresses as boxes, where the kernel takes them so (see the .cu files).

    halves: in how many the channels of a block are brought: 2 where y is gated.
    """
    wide, P = plan.kernel == "wide", -(-N // 64)
    of_x = cuda.boxes(x, (M, K), 2, (plan.tokens, STEP), swizzle=128) if wide else None
    if bits == 8:
        width = STEP if wide else UNIT
        return of_x, cuda.boxes(q, (N, K), 1, (plan.channels // halves, width), swizzle=width), None
    of_q = cuda.boxes(q, (P, K * 4), 8, (plan.channels // 64, STEP * 4)) if wide else None
    groups = max((STEP if wide else UNIT) // group_size, 1)
    return of_x, of_q, cuda.boxes(scales, (K // group_size, P * 64), 4, (groups, plan.channels // halves))


@cache
def _kernel(
    plan: Plan, bits: int, group_size: int | None, dtype: torch.dtype, device: torch.device, norm: bool, gated: bool
):
    defines = plan.defines(bits, group_size, norm, gated) | {"HALF": int(dtype is torch.float16)}
    return cuda.kernel(f"{plan.kernel}_linear.cu", f"int{bits}_{plan.kernel}", device, **defines)


def _no_more_than(blocks: int) -> int:
    """Bytes of shared memory with which no multiprocessor takes more than so many blocks of a grid.

    A grid that starts while the one ahead ends would pile up where there is room first.
    """
    return OF_MULTIPROCESSOR // (blocks + 1) - RESERVED + 16


# Plans ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def plan(bits: int, M: int, N: int, K: int, group_size: int | None) -> Plan | str:
    """The plan for M tokens: that of the nearest shape that was measured. Or the reason why there is none."""
    bucket = next(i for i, most in enumerate(TOKENS) if most >= M)
    measured = plans.table(KINDS[bits], Plan)
    found = plans.nearest(measured, bucket, N, K, lambda each: each.fits(N, K, bits, group_size))
    if not found:
        return "no plan that fits was measured: `aograph tune` does that"
    return found[0] or "dequantizing was faster for so many tokens"
