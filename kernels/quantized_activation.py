"""Quantizing an activation: plain torch, to be traced into a graph, where a compiler fuses it with what computes x.

A function here takes x [..., K], float, and gives its `Activation`. Scales are computed in fp32 and are never 0: an
all-zero row gives codes of 0. int8 codes are rounded to nearest even; float8 ones (e4m3fn) by the cast, after clamping
to ±448, as a cast alone would make NaN of what is larger. No number of tokens is special, 0 included.

NaN and inf. Where a scale is computed from x, one that NaN or inf went into is NaN, and so is all of y that it scales:
the row, with one scale for a token or for blocks of it; everything, with one scale for the tensor. A scale given
beforehand cannot say so: there infinities saturate, NaN stays NaN in float8, and counts as 0 in int8.

On a GPU, comparisons that mind NaN and conversions would take longer than reading x: there the largest magnitude is
found among the bits of fp32, which are ordered as the magnitudes are, NaN above all, and codes are rounded by adding
`SHIFT`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

INT8, FLOAT8 = 127, 448  # the largest codes; float8 is e4m3fn
BLOCK = 128  # of K, where blocks have a scale each
TINY = torch.finfo(torch.float32).tiny
SHIFT = 1.5 * 2**23  # an fp32 number: to what is added an integer is left, rounded, in the lowest bits of the sum
SHIFT_BITS = 0x4B400000  # its own


class Activation(NamedTuple):
    """A quantized x: (code - x_zero) * x_scale.

    x [..., K]: the codes, int8 or float8_e4m3fn. x_scale, fp32: [..., 1], of each token, [..., K/128], of each block of
    it, or [1], of the whole; None where it was given. x_zero [..., 1] int32, or None for 0 or where it was given.
    """

    x: Tensor
    x_scale: Tensor | None = None
    x_zero: Tensor | None = None


def int8_per_token(x: Tensor) -> Activation:
    """Symmetric: the largest magnitude of each token becomes ±127."""
    wide = x.float()
    scale = _scale(_most(wide), INT8)
    return Activation(_rounded(wide * scale.reciprocal(), -INT8), scale)


def int8_per_token_asymmetric(x: Tensor) -> Activation:
    """The range of each token, with 0 in it, becomes -128 … 127, so that 0 has a code of its own."""
    wide = x.float()
    low, high = wide.amin(-1, keepdim=True).clamp_max(0), wide.amax(-1, keepdim=True).clamp_min(0)
    scale = _scale(high / 255 - low / 255, 1)  # each divided first: fp32 may span more than its maximum
    inverse = scale.reciprocal()
    zero = (-INT8 - 1 - low * inverse).round().clamp(-INT8 - 1, INT8)
    return Activation(_rounded(wide * inverse + zero, -INT8 - 1), scale, zero.to(torch.int32))


@dataclass(frozen=True)
class Int8PerTensor:
    """One scale, and one zero point or 0, that were calibrated; what is outside of their range saturates."""

    scale: float
    zero: int = 0

    @classmethod
    def spanning(cls, low: float, high: float, asymmetric: bool) -> "Int8PerTensor":
        """From low to high, with 0 between them; symmetric around 0 or not."""
        low, high = min(low, 0.0), max(high, 0.0)
        if not asymmetric:
            return cls(max(-low, high, INT8 * TINY) / INT8)
        scale = max((high - low) / 255, TINY)
        return cls(scale, round(-INT8 - 1 - low / scale))

    def __call__(self, x: Tensor) -> Activation:
        codes = x.float() * (1 / self.scale) + self.zero
        codes = codes.nan_to_num(float(self.zero)).round()
        return Activation(codes.clamp(-INT8 - 1 if self.zero else -INT8, INT8).to(torch.int8))


def float8_per_token(x: Tensor) -> Activation:
    """The largest magnitude of each token becomes ±448."""
    wide = x.float()
    scale = _scale(_most(wide), FLOAT8)
    return Activation((wide * scale.reciprocal()).to(torch.float8_e4m3fn), scale)


def float8_per_tensor(x: Tensor) -> Activation:
    """The largest magnitude of all becomes ±448."""
    wide = x.float()
    tokens = _most(wide).flatten()
    most = torch.nn.functional.pad(tokens, (0, 1)).amax(0, keepdim=True)  # there may be no token
    scale = _scale(most, FLOAT8)
    return Activation((wide * scale.reciprocal()).to(torch.float8_e4m3fn), scale)


def float8_per_block(x: Tensor) -> Activation:
    """The largest magnitude of each 128 neighbours along K, which must be whole blocks, becomes ±448."""
    wide = x.float().unflatten(-1, (-1, BLOCK))
    scale = _scale(_most(wide), FLOAT8)
    return Activation((wide * scale.reciprocal()).to(torch.float8_e4m3fn).flatten(-2), scale.squeeze(-1))


@dataclass(frozen=True)
class Float8PerTensor:
    """One scale that was calibrated; what is outside of its range saturates."""

    scale: float

    @classmethod
    def spanning(cls, most: float) -> "Float8PerTensor":
        """Up to a magnitude of `most`."""
        return cls(max(most, FLOAT8 * TINY) / FLOAT8)

    def __call__(self, x: Tensor) -> Activation:
        codes = x.float() * (1 / self.scale)
        return Activation(codes.clamp(-FLOAT8, FLOAT8).to(torch.float8_e4m3fn))


def _scale(most: Tensor, largest: int) -> Tensor:
    """What a code of 1 stands for where `most` becomes `largest`; NaN where it is not finite."""
    return torch.where(most.isfinite(), most / largest, torch.nan).clamp_min(TINY)


def _most(wide: Tensor) -> Tensor:
    """The largest magnitude along K [..., 1] of fp32; NaN where there is one."""
    if wide.device.type != "cuda":
        return wide.abs().amax(-1, keepdim=True)
    return (wide.view(torch.int32) & 0x7FFFFFFF).amax(-1, keepdim=True).view(torch.float32)


def _rounded(codes: Tensor, least: int) -> Tensor:
    """int8 of codes that are no further than a half from the range of least … 127, or NaN."""
    if codes.device.type != "cuda":
        return codes.round().clamp(least, INT8).to(torch.int8)
    return ((codes + SHIFT).view(torch.int32) - SHIFT_BITS).clamp(least, INT8).to(torch.int8)
