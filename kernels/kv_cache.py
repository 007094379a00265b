"""The formats of a packed cache: keys or values [B, H, S, D] as codes with scales, by token or by channel.

B rows, H KV heads, S positions, heads of D. g neighbours along D, all of them unless told, share a scale:
    int8  codes [B, H, S, D] int8, scales [B, H, S, D/g] fp32: value = code * scale
    fp8   codes [B, H, S, D] float8_e4m3fn, scales as of int8
    int4  codes [B, H, S, D/2] uint8, scales [B, H, S, D/g, 2] bf16, (scale, minimum): value = code * scale + minimum;
          byte j holds the codes of d = 2j, low, and of d = 2j + 1, high

int4 may also be by channel, which suits keys: some channels have outliers at all tokens (Liu et al., KIVI, 2024). Then
each channel of a block of W tokens has a scale and a minimum, and one block of each row, the one that was written last,
is kept as it is, as its tokens come one by one; P is S rounded up to whole blocks:
          codes [B, H, P, D/2] uint8, scales [B, H, P/W, D, 2] bf16; window [B, H, W, D] fp32, bf16 or fp16 and
          held [B] int64, the block of each row that is in the window: the codes of that one say nothing
All tokens of a block make its scales, seen or not: one that is inf or NaN, such as a token of another text that was
never overwritten, makes NaN of its channel in the block.

Codes meet scale and minimum as stored. A new cache is all zeros, which stands for zeros. Where NaN or inf goes into a
scale, it is NaN, and so is all that it scales; codes are 0 there, and never NaN themselves: what has a scale, and a
minimum, of 0 is 0.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from .float8 import FLOAT8, widen
from .op import Case, Op, capability
from .quantized_activation import TINY, float8_per_token, int8_per_token

CODES = {"int8": torch.int8, "fp8": FLOAT8, "int4": torch.uint8}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HEAD_MULTIPLE = 16  # head sizes that kernels take
LARGEST = 15  # the largest int4 code
FEW = 16  # query tokens that read themselves back from the cache, whatever else is known of them

Layout = tuple[torch.dtype, tuple[int, ...]]  # of a tensor


@dataclass(frozen=True)
class KVFormat:
    """How keys or values are packed. name: a key of `CODES`; group_size: along D, None for all of it.

    block: tokens of a channel that share a scale, W, of int4 alone; None: each token has scales of its own.
    """

    name: str
    bits: int
    group_size: int | None = None
    block: int | None = None

    @property
    def asymmetric(self) -> bool:
        """Whether a group has a minimum besides its scale."""
        return self.name == "int4"

    @property
    def shared(self) -> int:
        """The dimension of [..., S, D] along which neighbours share a scale."""
        return -1 if self.block is None else -2

    def groups(self, D: int) -> int:
        """Groups of a head of D. ValueError where it has no whole ones, or no whole 16 elements."""
        if D % HEAD_MULTIPLE or D % (self.group_size or D):
            wanted = f"a multiple of {HEAD_MULTIPLE}" + (f" and of {self.group_size}" if self.group_size else "")
            raise ValueError(f"{self.name}: a head of {D}; expected {wanted}")
        return D // (self.group_size or D)

    def positions(self, S: int) -> int:
        """How many positions the codes of a cache of S have: S, or by channel those of all its blocks."""
        return S if self.block is None else -(-S // self.block) * self.block

    def layout(self, B: int, H: int, S: int, D: int, dtype: torch.dtype = torch.float32) -> tuple[Layout, ...]:
        """(dtype, shape) of each tensor of a cache [B, H, S, D]: codes, scales, and, by channel, window, in `dtype`,
        and held; ValueError as from `groups`."""
        groups, width = self.groups(D), D * self.bits // 8
        if self.block is not None:
            P = self.positions(S)
            return (
                (CODES[self.name], (B, H, P, width)),
                (torch.bfloat16, (B, H, P // self.block, D, 2)),
                (dtype, (B, H, self.block, D)),
                (torch.int64, (B,)),
            )
        codes = CODES[self.name], (B, H, S, width)
        return codes, (
            (torch.bfloat16, (B, H, S, groups, 2)) if self.asymmetric else (torch.float32, (B, H, S, groups))
        )

    def empty(
        self, B: int, H: int, S: int, D: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, ...]:
        """The tensors of a cache of zeros [B, H, S, D], as `layout` lists them; ValueError as from `groups`."""
        layout = self.layout(B, H, S, D, dtype)
        return tuple(torch.zeros(shape, dtype=kind, device=device) for kind, shape in layout)

    def token_bytes(self, D: int) -> int:
        """Bytes of one token of one head, windows aside; ValueError as from `groups`."""
        tokens = self.block or 1
        return sum(dtype.itemsize * prod(shape) for dtype, shape in self.layout(1, 1, tokens, D)[:2]) // tokens

    def pack(self, x: Tensor) -> tuple[Tensor, ...]:
        """The tensors of a cache that holds x [B, H, S, D] float, as `layout` lists them; ValueError as from `groups`.

        By channel the block that is held is that of the last token of each row that is not zero.
        """
        W, S = self.block, x.shape[2]
        if W is None:
            return self.quantize(x)
        places = torch.arange(self.positions(S), device=x.device).clamp(max=S - 1)  # the last token fills up its block
        whole = x[:, :, places]
        held = (places * (whole != 0).any(3).any(1)).amax(1) // W
        window = whole.unflatten(2, (-1, W))[torch.arange(len(x), device=x.device), :, held]
        return *self.quantize(whole), window, held

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., D] float -> codes and scales, whose shapes begin as x's; ValueError as from `groups`.

        By channel x is [..., n · W, D], whole blocks, and scales are [..., n, D, 2]. Rounded to nearest. The largest
        magnitude of a group becomes ±127 (int8) or ±448 (fp8); its range becomes 0 … 15 (int4).
        """
        shared, size = self.shared, x.shape[-1] // self.groups(x.shape[-1])
        grouped = x.unflatten(shared, (-1, self.block or size))
        if not self.asymmetric:
            codes, scales, _ = (int8_per_token if self.name == "int8" else float8_per_token)(grouped)
            codes = codes.view(torch.int8).masked_fill(scales.isnan(), 0).view(codes.dtype)
            return codes.flatten(-2), scales.squeeze(-1)
        wide = grouped.float()
        low, high = wide.amin(shared, keepdim=True), wide.amax(shared, keepdim=True)
        minimum = _as_bf16(low)
        scale = (high / LARGEST - minimum / LARGEST).clamp_min(TINY)  # each divided first: fp32 may span too much
        scale = _as_bf16(torch.where(scale.isfinite(), scale, torch.nan))
        codes = ((wide - minimum) / scale).nan_to_num(0).round().clamp(0, LARGEST).to(torch.uint8)
        scales = torch.stack([scale.squeeze(shared), minimum.squeeze(shared)], -1).to(torch.bfloat16)
        return (codes[..., ::2] | codes[..., 1::2] << 4).flatten(shared - 1, shared), scales

    def dequantize(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """[..., D] in `dtype`, fp32 or fp64, of codes and scales of any strides."""
        if not self.asymmetric:
            values = widen(codes, dtype).unflatten(-1, (scales.shape[-1], -1))
            return values.mul_(scales[..., None]).flatten(-2)
        pairs = codes.to(torch.int16, memory_format=torch.contiguous_format)
        halves = (pairs | pairs << 4).bitwise_and_(0x0F0F).view(torch.int8)  # the low byte comes first
        shared, size = self.shared, self.block or halves.shape[-1] // scales.shape[-2]
        scale, minimum = (each.unsqueeze(shared) for each in scales.to(dtype).unbind(-1))
        grouped = halves.to(dtype).unflatten(shared, (-1, size))
        return grouped.mul_(scale).add_(minimum).flatten(shared - 1, shared)


INT8 = KVFormat("int8", 8)
FP8 = KVFormat("fp8", 8)
INT4 = KVFormat("int4", 4, 32)
INT4_CHANNEL = KVFormat("int4", 4, block=64)


def _as_bf16(x: Tensor) -> Tensor:
    """fp32 rounded to what bf16 holds, by bits: compilers leave out a cast there and back. NaN may become a number."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & ~0xFFFF).view(torch.float32)


@dataclass(frozen=True)
class CacheCase(Case):
    """What decides which implementation of an op on packed caches runs.

    Of a `Case`: dtype: of what is new, or of q; M: T, tokens of each row; K: the head size of keys, N: of values, the
    same where there is one cache. heads: KV heads H; queries: query heads of each; length: S; keys, values: the
    formats, with group sizes as numbers; softcap, sinks: whether there are; mask: its dtype, None where there is none;
    fresh: whether the tokens are there as they were before they were stored, too, which more than `FEW` attend to.
    """

    rows: int = 1
    heads: int = 1
    queries: int = 1
    length: int = 1
    keys: KVFormat = INT8
    values: KVFormat = INT8
    softcap: bool = False
    mask: torch.dtype | None = None
    sinks: bool = False
    fresh: bool = False


class CacheOp(Op):
    """An op on packed caches."""

    def format_of(self, codes: Tensor, scales: Tensor, window: Tensor | None = None) -> KVFormat:
        """The format of a packed cache [B, H, S, D], by channel if there is a window; ValueError where it is none."""
        name = next((name for name, dtype in CODES.items() if codes.dtype is dtype), None)
        if name is None or codes.dim() != 4 or scales.dim() != 4 + (name == "int4"):
            found = " and ".join(f"{each.dtype} {list(each.shape)}" for each in (codes, scales))
            raise ValueError(f"{self.name}: codes and scales are {found}; expected those of one of {[*CODES]}")
        if window is not None:
            if name != "int4" or window.dim() != 4 or not window.shape[2]:
                found = f"{window.dtype} {list(window.shape)} beside codes of {name}"
                raise ValueError(f"{self.name}: the window is {found}; expected [B, H, W, D] beside codes of int4")
            return KVFormat(name, 4, block=window.shape[2])
        bits = 4 if name == "int4" else 8
        D, groups = codes.shape[3] * 8 // bits, scales.shape[3]
        return KVFormat(name, bits, D // groups if groups and D % groups == 0 else D)

    def fit(
        self, codes: Tensor, scales: Tensor, window: Tensor | None = None, held: Tensor | None = None
    ) -> tuple[KVFormat, int]:
        """The format and the head size of a packed cache; ValueError where it is none, or its tensors do not fit."""
        form = self.format_of(codes, scales, window)
        B, H, S, _ = codes.shape
        D = codes.shape[3] * 8 // form.bits
        if (window is None) != (held is None):
            raise ValueError(
                f"{self.name}: a window needs held, the block of each row that is in it, and held a window"
            )
        if form.block is not None and isinstance(S, int) and S % form.block:
            raise ValueError(
                f"{self.name}: codes have {S} positions; expected whole blocks of the window's {form.block}"
            )
        _, (dtype, shape), *rest = form.layout(B, H, S, D)
        self.check("scales", scales, codes.device, (dtype,), shape)
        for name, tensor, (dtype, shape) in zip(("window", "held"), (window, held), rest, strict=False):
            self.check(name, tensor, codes.device, FLOATS if name == "window" else (dtype,), shape)
        return form, D

    def check(self, name: str, tensor: Tensor, device: torch.device, dtypes: tuple, *shapes: tuple) -> None:
        """ValueError where an argument is not on the device, of none of the dtypes, or of none of the shapes.

        None in a shape is any size. Symbolic sizes are not compared, as the question would specialize a graph.
        """
        if tensor.device == device and tensor.dtype in dtypes and any(_fits(tensor.shape, shape) for shape in shapes):
            return
        wanted = " or ".join(str(list(shape)).replace("None", "any") for shape in shapes)
        raise ValueError(
            f"{self.name}: {name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; "
            f"expected {' or '.join(map(str, dtypes))} {wanted} on {device}"
        )

    def usual(self, device: torch.device, dtype: torch.dtype, M: int) -> CacheCase:
        return CacheCase(
            device.type, dtype, M, 128, 128, None, capability(device), heads=8, queries=4, length=4096,
            keys=KVFormat("int8", 8, 128), values=KVFormat("int8", 8, 128),
        )  # fmt: skip


class CodesOp(CacheOp):
    """One that takes codes first."""

    takes = tuple(CODES.values())


def _fits(shape: tuple, wanted: tuple) -> bool:
    known = ((found, size) for found, size in zip(shape, wanted, strict=False) if size is not None)
    return len(shape) == len(wanted) and all(
        found == size
        for found, size in known
        if not isinstance(found, torch.SymInt) and not isinstance(size, torch.SymInt)
    )
