"""A Triton kernel that does nothing but read: what a device's memory gives at best."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def read_kernel(source, sums, BLOCK: tl.constexpr):
    """source int32 [programs * BLOCK] -> sums int32 [programs], so that no load can be left out."""
    program = tl.program_id(0)
    here = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(sums + program, tl.sum(tl.load(source + here)))


def read(source: Tensor, sums: Tensor) -> None:
    """Reads `source` (int32) once, in as many programs as `sums` (int32) has elements; it divides the source."""
    BLOCK = source.numel() // sums.numel()
    read_kernel[(sums.numel(),)](source, sums, BLOCK, num_warps=min(max(BLOCK // 512, 1), 16))
