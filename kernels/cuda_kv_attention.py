"""Attention over packed caches for CUDA, in CUDA C++: `kv_attention.cu`, for few query rows of each KV head.

The cache of a row is dealt out to blocks by what its tokens see, on the device: nothing is read back, so that CUDA
graphs replay a step at any position. How many blocks there are follows from the capacity and the multiprocessors, and
how many warps from what that leaves to each. Numbers without another reason were measured on an H200 (bench/log.md).
"""

from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from . import cuda
from .cuda_linear import CAPABILITIES, SHARED
from .kv_cache import FEW, CacheCase, KVFormat
from .op import Case, need

KINDS = {"int8": 0, "fp8": 1, "int4": 2}  # as the kernels have them, and
INPUTS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
UNIT, LEAST = 32, 4  # tokens that a warp takes at a time, and about how often a block does at the least
BARRIERS = 1024  # bytes of shared memory ahead of the ring
MOST_STAGES = 7  # of a warp: a barrier each
FLIGHT = 100_000  # bytes on their way to a multiprocessor: with more, what is asked for first comes late
MANY = 96  # units of a block for which 16 warps are faster, though they take longer to begin and to add up
AHEAD = {8: 12, 4: 8}  # units of a block that are asked for while the grids ahead run, by the bits of a code
MOST_WAVES = 8  # of blocks
WINDOW = 64 * 256  # elements of a block of keys by channel, which is kept in shared memory as it is
ROWS = 32  # query rows of a KV head, of the tokens of which each lane of a warp knows a position;
SUMS = 512  # and tiles of 8 rows times the head size, for which there are registers


@dataclass(frozen=True)
class Sizes:
    """What the kernel is compiled for: elements of a head, tiles of 8 query rows, the formats."""

    head: int
    tiles: int
    keys: KVFormat
    values: KVFormat
    window: torch.dtype | None = None  # of keys by channel
    long: bool = False  # whether a block takes `MANY` units of a full cache

    def segments(self, form: KVFormat) -> tuple[int, int]:
        """Into how many boxes the codes of a token go, and how many bytes wide they are."""
        row = self.head * form.bits // 8
        width = next((width for width in (32, 64) if row <= width), 128)
        return -(-row // width), width

    @property
    def stage(self) -> int:
        """Bytes of a unit: codes and scales of its keys and values."""
        codes = sum(count * width for count, width in map(self.segments, (self.keys, self.values)))
        forms = self.keys, self.values
        scales = sum((UNIT * form.groups(self.head) if form.block is None else self.head) * 4 for form in forms)
        return UNIT * codes + scales

    @property
    def warps(self) -> int:
        """Of a block: twice as many where they take long, and have the registers."""
        most = 16 if self.long and self.head * self.tiles <= 128 else 8
        return next(warps for warps in (16, 8, 4) if warps <= most and self._fit(warps) > 1)

    @property
    def stages(self) -> int:
        """Of a warp: two, more where there are few bytes in them."""
        return min(max(FLIGHT // (self.stage * self.warps), 2), self._fit(self.warps), MOST_STAGES)

    def _fit(self, warps: int) -> int:
        """Stages of a warp that there is room for."""
        return (SHARED - BARRIERS - self.fragments) // (self.stage * warps)

    @property
    def fragments(self) -> int:
        """Bytes of q, of its sums, which minima are multiplied by, and of the window."""
        window = (self.keys.block or 0) * self.head * (self.window.itemsize if self.window else 0)
        return self.tiles * (self.head * 16 + 256) + window

    @property
    def shared(self) -> int:
        """Bytes of shared memory: the ring and q, or the sums that take their place."""
        sums = self.warps * self.tiles * 8 * ((self.head + 4) * 4 + 8)
        return BARRIERS + max(self.warps * self.stages * self.stage + self.fragments, sums)

    def defines(
        self,
        dtype: torch.dtype,
        mask: torch.dtype | None = None,
        sinks: torch.dtype | None = None,
    ) -> dict[str, int]:
        """Of q in a dtype."""
        groups = grouped(self.keys, self.values)
        by_channel = {"BLOCK": self.keys.block, "WINDOW": INPUTS[self.window]} if self.keys.block else {}
        return by_channel | {
            "FP16": int(dtype is torch.float16),
            "HEAD": self.head,
            "KEYS": KINDS[self.keys.name],
            "VALUES": KINDS[self.values.name],
            "GROUP": max((group or self.head for group in groups), default=32),
            "TILES": self.tiles,
            "WARPS": self.warps,
            "STAGES": self.stages,
            "AHEAD": AHEAD[max(self.keys.bits, self.values.bits)],
            "MASK": {None: 0, torch.bool: 1, dtype: 2, torch.float32: 3}[mask],
            "SINKS": 0 if sinks is None else INPUTS[sinks] + 1,
        }


def grouped(*forms: KVFormat) -> set[int | None]:
    """The group sizes of those whose codes have scales inside a head."""
    return {form.group_size for form in forms if form.asymmetric and form.block is None}


def supports(case: Case) -> bool | str:
    """Whether the kernel takes a case of `kv_attention`."""
    assert isinstance(case, CacheCase)
    forms, block = (case.keys, case.values), case.keys.block
    groups = grouped(*forms)
    rows = (case.M or 0) * case.queries
    here = need(
        (case.device == "cuda", "runs on CUDA only"),
        (case.capability in CAPABILITIES, "is written for compute capability 9.0"),
        (block is None or block % UNIT == 0, f"blocks of keys are no multiples of {UNIT} tokens"),
        (block is None or case.K % 32 == 0, "the head size is no multiple of 32, by channel"),
        (block is None or block * case.K <= WINDOW, f"blocks of keys have more than {WINDOW:,} elements"),
        (case.dtype in (torch.bfloat16, torch.float16), "takes bf16 and fp16 q only"),
        (case.M is not None, "T is unknown"),
        (not case.fresh or (case.M or 0) <= FEW, "reads all tokens from the cache"),
        (case.K == case.N, "keys and values have heads of different sizes"),
        (case.K % 16 == 0 and 0 < case.K <= 256, "the head size is no multiple of 16 up to 256"),
        (
            all(form.asymmetric or form.group_size in (None, case.K) for form in forms),
            "codes of 8 bits have one scale for a head",
        ),
        (all(group and group % 32 == 0 for group in groups), "groups of int4 are no multiples of 32"),
        (len(groups) < 2, "groups of keys and values differ"),
        (case.length % 4 == 0, "S is not a multiple of 4"),
        (
            case.rows * case.heads * case.keys.positions(case.length) < 1 << 31,
            "the cache has more than 2³¹ tokens and heads",
        ),
        (case.mask in (None, torch.bool, torch.float32, case.dtype), "the mask is of another dtype than q"),
        (rows <= ROWS and -(-rows // 8) * case.K <= SUMS, f"takes few query rows of a KV head only, not {rows}"),
    )
    return cuda.available(case.capability) if here is True else here


def attention(
    q: Tensor,
    k: Tensor,
    k_scales: Tensor,
    v: Tensor,
    v_scales: Tensor,
    positions: Tensor,
    start: Tensor | None,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    k_window: Tensor | None,
    k_held: Tensor | None,
    sinks: Tensor | None,
    case: CacheCase,
) -> Tensor:
    """`kv_attention` of a case that `supports` takes. Caches that are not contiguous are copied."""
    B, Hq, T, D = q.shape
    H, S = v.shape[1:3]
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not y.numel():
        return y
    if not S:
        return y.zero_()
    rows, pairs = Hq // H * T, B * H
    q, k, k_scales, v, v_scales = (_aligned(each) for each in (q, k, k_scales, v, v_scales))
    positions = positions.contiguous()
    start, k_held, sinks = (None if each is None else each.contiguous() for each in (start, k_held, sinks))
    k_window = None if k_window is None else _aligned(k_window)
    strides = (0, 0, 0)
    if mask is not None:
        mask = mask if mask.stride(3) == 1 and max(mask.stride()) < 1 << 31 else mask.contiguous()
        strides = tuple(mask.stride(i) if mask.shape[i] > 1 else 0 for i in range(3))
    multiprocessors = torch.cuda.get_device_properties(q.device).multi_processor_count
    blocks = blocks_of(pairs, S, multiprocessors)
    dtypes = [None if each is None else each.dtype for each in (k_window, mask, sinks)]
    sizes = Sizes(D, -(-rows // 8), case.keys, case.values, dtypes[0], blocks * UNIT * MANY <= S)
    sums = tops = None
    if blocks > 1:
        sums = q.new_empty(pairs, blocks, rows, D, dtype=torch.float32)
        tops = q.new_empty(pairs, blocks, rows, 2, dtype=torch.float32)
    attend, combine = _kernels(sizes, q.dtype, *dtypes[1:], q.device)
    with torch.cuda.device_of(q):
        boxes = [
            cuda.boxes(codes.data_ptr(), (pairs * codes.shape[2], codes.shape[3]), 1, (UNIT, width), swizzle=width)
            for codes, (_, width) in ((k, sizes.segments(case.keys)), (v, sizes.segments(case.values)))
        ]
        attend(
            (pairs * blocks, 1, 1),
            sizes.warps * 32,
            (q, boxes[0], k_scales, boxes[1], v_scales, k_window, k_held, positions, start, mask, sinks, y, sums, tops,
             float(scale), float(softcap), window, blocks, H, rows, T, S, *strides),
            shared=sizes.shared,
        )  # fmt: skip
        if blocks > 1:
            combine((pairs * rows, 1, 1), -(-D // 128) * 32, (sums, tops, sinks, y, blocks, H, rows, T))
    return y


@lru_cache(maxsize=4096)
def blocks_of(pairs: int, S: int, multiprocessors: int) -> int:
    """Blocks for each pair of a row and a KV head: those with which the multiprocessors, one block each at a time, are
    least idle while a full cache is read; fewer waves where that is much the same."""
    most = max(min(multiprocessors * MOST_WAVES // pairs, -(-S // (UNIT * LEAST))), 1)

    def time(blocks: int) -> float:
        waves = -(-pairs * blocks // multiprocessors)
        return waves / blocks * pairs + 0.02 * waves * multiprocessors

    return min(range(1, most + 1), key=time)


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous, at an address that copies of 16 bytes can begin at."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


@cache
def _kernels(
    sizes: Sizes,
    dtype: torch.dtype,
    mask: torch.dtype | None,
    sinks: torch.dtype | None,
    device: torch.device,
):
    defines = sizes.defines(dtype, mask, sinks)
    return [cuda.kernel("kv_attention.cu", name, device, **defines) for name in ("kv_attend", "kv_combine")]
