"""The formats of a packed cache: keys or values [B, H, S, D] as codes with scales, each token by itself.

B rows, H KV heads, S positions, heads of D. g neighbours along D, all of them unless told, share a scale:
    int8  codes [B, H, S, D] int8, scales [B, H, S, D/g] fp32: value = code * scale
    fp8   codes [B, H, S, D] float8_e4m3fn, scales as of int8
    int4  codes [B, H, S, D/2] uint8, scales [B, H, S, D/g, 2] bf16, (scale, minimum): value = code * scale + minimum;
          byte j holds the codes of d = 2j, low, and of d = 2j + 1, high
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


@dataclass(frozen=True)
class KVFormat:
    """How keys or values are packed. name: a key of `CODES`; group_size: along D, None for all of it."""

    name: str
    bits: int
    group_size: int | None = None

    @property
    def asymmetric(self) -> bool:
        """Whether a group has a minimum besides its scale."""
        return self.name == "int4"

    def groups(self, D: int) -> int:
        """Groups of a head of D. ValueError where it has no whole ones, or no whole 16 elements."""
        if D % HEAD_MULTIPLE or D % (self.group_size or D):
            wanted = f"a multiple of {HEAD_MULTIPLE}" + (f" and of {self.group_size}" if self.group_size else "")
            raise ValueError(f"{self.name}: a head of {D}; expected {wanted}")
        return D // (self.group_size or D)

    def layout(self, B: int, H: int, S: int, D: int) -> tuple[tuple[torch.dtype, tuple], tuple[torch.dtype, tuple]]:
        """(dtype, shape) of the codes and of the scales of a cache [B, H, S, D]; ValueError as from `groups`."""
        groups = self.groups(D)
        codes = CODES[self.name], (B, H, S, D * self.bits // 8)
        return codes, (
            (torch.bfloat16, (B, H, S, groups, 2)) if self.asymmetric else (torch.float32, (B, H, S, groups))
        )

    def empty(self, B: int, H: int, S: int, D: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """The codes and scales of a cache of zeros [B, H, S, D]; ValueError as from `groups`."""
        codes, scales = (torch.zeros(shape, dtype=dtype, device=device) for dtype, shape in self.layout(B, H, S, D))
        return codes, scales

    def token_bytes(self, D: int) -> int:
        """Bytes of one token of one head; ValueError as from `groups`."""
        return sum(dtype.itemsize * prod(shape) for dtype, shape in self.layout(1, 1, 1, D))

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., D] float -> codes and scales, whose shapes begin as x's; ValueError as from `groups`.

        Rounded to nearest. The largest magnitude of a group becomes ±127 (int8) or ±448 (fp8); its range becomes
        0 … 15 (int4).
        """
        grouped = x.unflatten(-1, (self.groups(x.shape[-1]), -1))
        if not self.asymmetric:
            codes, scales, _ = (int8_per_token if self.name == "int8" else float8_per_token)(grouped)
            codes = codes.view(torch.int8).masked_fill(scales.isnan(), 0).view(codes.dtype)
            return codes.flatten(-2), scales.squeeze(-1)
        wide = grouped.float()
        low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
        minimum = _as_bf16(low)
        scale = (high / LARGEST - minimum / LARGEST).clamp_min(TINY)  # each divided first: fp32 may span too much
        scale = _as_bf16(torch.where(scale.isfinite(), scale, torch.nan))
        codes = ((wide - minimum) / scale).nan_to_num(0).round().clamp(0, LARGEST).to(torch.uint8)
        scales = torch.cat([scale, minimum], -1).to(torch.bfloat16)
        return codes[..., ::2].flatten(-2) | codes[..., 1::2].flatten(-2) << 4, scales

    def dequantize(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """[..., D] in `dtype`, fp32 or fp64, of codes and scales of any strides."""
        if not self.asymmetric:
            values = widen(codes, dtype).unflatten(-1, (scales.shape[-1], -1))
            return values.mul_(scales[..., None]).flatten(-2)
        pairs = codes.to(torch.int16, memory_format=torch.contiguous_format)
        halves = (pairs | pairs << 4).bitwise_and_(0x0F0F).view(torch.int8)  # the low byte comes first
        scale, minimum = scales.to(dtype)[..., None].unbind(-2)
        return halves.to(dtype).unflatten(-1, (scales.shape[-2], -1)).mul_(scale).add_(minimum).flatten(-2)


INT8 = KVFormat("int8", 8)
FP8 = KVFormat("fp8", 8)
INT4 = KVFormat("int4", 4, 32)


def _as_bf16(x: Tensor) -> Tensor:
    """fp32 rounded to what bf16 holds, by bits: compilers leave out a cast there and back. NaN may become a number."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & ~0xFFFF).view(torch.float32)


@dataclass(frozen=True)
class CacheCase(Case):
    """What decides which implementation of an op on packed caches runs.

    Of a `Case`: dtype: of what is new, or of q; M: T, tokens of each row; K: the head size of keys, N: of values, the
    same where there is one cache. heads: KV heads H; queries: query heads of each; length: S; keys, values: the
    formats, with group sizes as numbers; softcap: whether there is one; mask: its dtype, None where there is none.
    """

    rows: int = 1
    heads: int = 1
    queries: int = 1
    length: int = 1
    keys: KVFormat = INT8
    values: KVFormat = INT8
    softcap: bool = False
    mask: torch.dtype | None = None


class CacheOp(Op):
    """An op on packed caches."""

    def format_of(self, codes: Tensor, scales: Tensor) -> KVFormat:
        """The format of a packed cache [B, H, S, D]; ValueError where codes and scales are none."""
        name = next((name for name, dtype in CODES.items() if codes.dtype is dtype), None)
        if name is None or codes.dim() != 4 or scales.dim() != 4 + (name == "int4"):
            found = " and ".join(f"{each.dtype} {list(each.shape)}" for each in (codes, scales))
            raise ValueError(f"{self.name}: codes and scales are {found}; expected those of one of {[*CODES]}")
        bits = 4 if name == "int4" else 8
        D, groups = codes.shape[3] * 8 // bits, scales.shape[3]
        return KVFormat(name, bits, D // groups if groups and D % groups == 0 else D)

    def fit(self, codes: Tensor, scales: Tensor) -> tuple[KVFormat, int]:
        """The format and the head size of a packed cache; ValueError where it is none, or scales do not fit codes."""
        form = self.format_of(codes, scales)
        B, H, S, _ = codes.shape
        D = codes.shape[3] * 8 // form.bits
        _, (dtype, shape) = form.layout(B, H, S, D)
        self.check("scales", scales, codes.device, (dtype,), shape)
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


def _fits(shape: tuple, wanted: tuple) -> bool:
    known = ((found, size) for found, size in zip(shape, wanted, strict=False) if size is not None)
    return len(shape) == len(wanted) and all(
        found == size
        for found, size in known
        if not isinstance(found, torch.SymInt) and not isinstance(size, torch.SymInt)
    )
