"""Rounding a weight to few bits: how the scale and the zero point of each group are chosen.

An algorithm is a function `(weight [N, K], spec, statistics=None) -> Quantized`. Both of these need no data and
leave `statistics` alone: `minmax` spans the range of each group (round to nearest, "RTN"), `mse` also tries to
clip it. Codes are computed against the scale and zero point as stored, so that rounding those to the weight's
dtype costs nothing. Everything is plain tensor arithmetic without a look at the data, and so runs on meta and
fake tensors too. Weights must be finite.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

CHUNK = {"cpu": 1 << 19}  # weights in work at a time: on CPU what its caches hold,
LARGE_CHUNK = 1 << 22  # elsewhere what keeps a GPU busy; in fp32 with all temporaries under 128 MB
GROUP_SIZES = (32, 64, 128, 256)  # how many weights along K may share a scale in a linear
CLIP_RATIOS = [1 - i / 40 for i in range(1, 21)]  # what `mse` tries beside 1.0: 0.975 … 0.5
HEADROOM = 127.5 / 127  # a scale may round down by this much with the largest code still the nearest


@dataclass(frozen=True)
class Spec:
    """What to round to: `bits`, weights along K that share a scale (None: the whole row), and the grid.

    symmetric: w ≈ code * scale, code in [-(2^(bits-1) - 1), 2^(bits-1) - 1], int8.
    else:      w ≈ (code - 2^(bits-1)) * scale + zero, code in [0, 2^bits - 1], uint8.
    """

    bits: int
    group_size: int | None
    symmetric: bool

    @property
    def middle(self) -> int:
        """The code that stands for 0 (symmetric) or for `zero`."""
        return 0 if self.symmetric else 1 << (self.bits - 1)

    @property
    def largest(self) -> int:
        """The largest code, counted from the middle."""
        return (1 << (self.bits - 1)) - 1


@dataclass(frozen=True)
class Quantized:
    """q [N, K] int8 or uint8; scale [N, G] and zero [N, G] (None where symmetric), in the weight's dtype."""

    q: Tensor
    scale: Tensor
    zero: Tensor | None
    spec: Spec

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] that the codes stand for, computed in fp32 (fp64 for fp64) and rounded once."""
        wide = torch.promote_types(torch.promote_types(dtype, self.scale.dtype), torch.float32)
        codes = self.q.to(wide).unflatten(1, (self.scale.shape[1], -1)) - self.spec.middle
        w = codes * self.scale.to(wide)[..., None]
        return (w if self.zero is None else w + self.zero.to(wide)[..., None]).flatten(1).to(dtype)


class Rounded(NamedTuple):
    """Groups at work, all fp32: codes [n, G, g], counted from the middle; scale and zero [n, G, 1]."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


Algorithm = Callable[..., Quantized]


def minmax(weight: Tensor, spec: Spec, statistics=None) -> Quantized:
    """Each group's whole range, rounded to nearest even: off by half a step at most."""
    return _by_chunks(weight, spec, lambda w: _clipped(w, _range(w), spec, weight.dtype, 1.0))


def mse(weight: Tensor, spec: Spec, statistics=None) -> Quantized:
    """For each group the clip ratio, of 1.0 … 0.5, with the least squared error; never worse than minmax."""

    def search(w: Tensor) -> Rounded:
        span = _range(w)
        best = _clipped(w, span, spec, weight.dtype, 1.0)
        least = _squared_error(w, best)
        for ratio in CLIP_RATIOS:
            found = _clipped(w, span, spec, weight.dtype, ratio)
            error = _squared_error(w, found)
            better = error < least
            least = torch.where(better, error, least)
            best = Rounded(*(torch.where(better, new, old) for new, old in zip(found, best, strict=True)))
        return best

    return _by_chunks(weight, spec, search)


ALGORITHMS: dict[str, Algorithm] = {"minmax": minmax, "mse": mse}


def algorithm(name: str) -> Algorithm:
    """The algorithm of that name. ValueError names those there are."""
    if name not in ALGORITHMS:
        raise ValueError(f"no rounding algorithm {name!r}; there are {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name]


def chunks(weight: Tensor, multiple: int = 1) -> list[slice]:
    """Slices of the rows of a weight [N, K] that are worked on at a time, `multiple` rows or several of it.

    A fake weight comes in one piece: nothing is computed, so nothing needs to be small.
    """
    N, K = weight.shape
    rows = max(CHUNK.get(weight.device.type, LARGE_CHUNK) // max(K, 1) // multiple, 1) * multiple
    if is_fake(weight):
        rows = max(N, 1)
    return [slice(start, min(start + rows, N)) for start in range(0, N, rows)]


def is_fake(weight: Tensor) -> bool:
    """Whether a weight has a shape but no values; then shapes are all that can be asked for."""
    return weight.is_meta or isinstance(weight, FakeTensor)


def _by_chunks(weight: Tensor, spec: Spec, rounded: Callable[[Tensor], Rounded]) -> Quantized:
    """Apply `rounded` to [n, G, g] fp32 slices of the weight, one after the other, and collect the result."""
    weight = weight.detach()
    N, K = weight.shape
    g = spec.group_size or K
    if K % g:
        raise ValueError(f"a weight of {N} × {K} has no whole groups of {g}: K must be a multiple of the group size")
    q = weight.new_empty(N, K, dtype=torch.int8 if spec.symmetric else torch.uint8)
    scale = weight.new_empty(N, K // g)
    zero = None if spec.symmetric else torch.empty_like(scale)
    for rows in [] if is_fake(weight) else chunks(weight):
        found = rounded(weight[rows].float().unflatten(1, (K // g, g)))
        q[rows] = found.codes.add_(spec.middle).flatten(1)
        scale[rows] = found.scale.squeeze(2)
        if zero is not None:
            zero[rows] = found.zero.squeeze(2)
    return Quantized(q, scale, zero, spec)


def _range(w: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest weight of each group, both [n, G, 1]."""
    return w.aminmax(dim=2, keepdim=True)


def _clipped(w: Tensor, span: tuple[Tensor, Tensor], spec: Spec, dtype: torch.dtype, ratio: float) -> Rounded:
    """Round groups w [n, G, g] to a grid over `ratio` of their span, with scale and zero as `dtype` holds them."""
    low, high = span
    up, down = spec.largest, spec.largest + (not spec.symmetric)  # codes above and below the middle
    if spec.symmetric:
        low, high, zero = low * ratio, high * ratio, torch.zeros_like(low)
    else:
        step = high / (up + down) - low / (up + down)  # each divided first: fp32 may span more than its maximum
        clip = step * ((1 - ratio) / 2 * (up + down))
        low, high = low + clip, high - clip
        zero = (low + step * (ratio * down)).to(dtype).float()
    wanted = torch.maximum(high / up - zero / up, zero / down - low / down)  # reaches both ends from zero as stored
    scale = storable(wanted, dtype)
    return Rounded((w - zero).div_(scale).round_().clamp_(-down, up), scale, zero)


def storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A scale as `dtype` holds it, in fp32: never 0, and never too small for the largest code to reach.

    Below fp16's normal numbers rounding down can lose more than half a step; there the next number is one
    smallest number away.
    """
    smallest = 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).smallest_normal
    stored = scale.clamp_min(smallest).to(dtype).float()
    return torch.where(stored * HEADROOM < scale, stored + smallest, stored)


def _squared_error(w: Tensor, rounded: Rounded) -> Tensor:
    """[n, G, 1]: of each group, the sum of (w - its rounded value)²."""
    back = torch.addcmul(rounded.zero, rounded.codes, rounded.scale)
    return back.sub_(w).square_().sum(dim=2, keepdim=True)
