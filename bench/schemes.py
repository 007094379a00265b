"""What `bench.linear` measures: a random weight, what each scheme makes of it and of x, and at which M."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from aograph.kernels import int4_linear as int4
from aograph.kernels import int8_linear as int8
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny
DECODE = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048)
PREFILL = (1, 16, 64, 256, 1024, 2048, 8192)


def codes(x: Tensor, largest: int, dtype: torch.dtype, stored: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """x [..., K] as codes [..., K] and scales [..., 1]: the largest magnitude of a row becomes `largest`.

    Scales are in fp32, but no more precise than the dtype that they are `stored` in.
    """
    wide = x.float()
    scale = (wide.abs().amax(-1, keepdim=True) / largest).clamp_min(TINY).to(stored).float()
    scaled = wide * scale.reciprocal()
    whole = scaled if dtype.is_floating_point else scaled.round()
    return whole.clamp(-largest, largest).to(dtype), scale


int8_codes = partial(codes, largest=127, dtype=torch.int8)
float8_codes = partial(codes, largest=448, dtype=torch.float8_e4m3fn)


def decoded(codes: Tensor, scale: Tensor) -> Tensor:
    """What codes stand for, in fp32."""
    return codes.float() * scale


class Weights:
    """A random weight [N, K] in bf16, and what schemes make of it, each when it is first asked for.

    Pairs are of codes [N, K] and scales [N, 1] in fp32. What is pruned is 2:4: of 4 neighbours along K the two of the
    largest magnitude, of equal ones the first.
    """

    def __init__(self, N: int, K: int, group_size: int, device: torch.device):
        self.N, self.K, self.group_size = N, K, group_size
        self.plain = torch.randn(N, K, dtype=torch.bfloat16, device=device).div_(K**0.5)

    @cached_property
    def int4(self) -> tuple[Tensor, Tensor]:
        return int4.pack(self.plain, self.group_size)

    @cached_property
    def int8(self) -> tuple[Tensor, Tensor]:
        return int8.pack(self.plain)

    @cached_property
    def pruned(self) -> Tensor:
        groups = self.plain.unflatten(1, (-1, 4))
        kept = groups.abs().sort(dim=-1, descending=True, stable=True).indices[..., :2]
        return torch.zeros_like(groups).scatter_(-1, kept, groups.gather(-1, kept)).flatten(1)

    def int8_pair(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """As int8_linear packs it, its scales in bf16 and then fp32."""
        q, scale = self.int8 if weight is self.plain else int8.pack(weight)
        return q, scale.float()[:, None]

    def unpacked_int4(self) -> Tensor:
        """The weight [N, K] that int4 computes with, in fp32."""
        q, scale_zero = self.int4
        return int4.unpack(q, scale_zero.float(), self.group_size, self.N)

    def codes(self) -> Tensor:
        """The codes of int4 as uint8 [N, K]."""
        q = self.int4[0]
        return torch.cat([q & 15, q >> 4], 2).transpose(1, 2).reshape(-1, self.K)[: self.N].contiguous()

    def scale_zero(self) -> Tensor:
        """The pairs (scale, zero) of int4, [K/g, N, 2]."""
        return self.int4[1][:, : self.N].contiguous()


@dataclass(frozen=True)
class Kind:
    """A scheme. What it computes with, in fp32: weight, x.

    tokens: the M that it is measured at. rate: of its product, as a multiple of that in bf16, by the data sheet.
    """

    weight: Callable[[Weights], Tensor]
    tokens: tuple[int, ...] = PREFILL
    rate: int = 2
    x: Callable[[Tensor], Tensor] = Tensor.float


def of_int8(x: Tensor) -> Tensor:
    return decoded(*int8_codes(x))


def of_float8(x: Tensor) -> Tensor:
    return decoded(*float8_codes(x))


KINDS = {
    "bf16": Kind(lambda w: w.plain.float(), rate=1),
    "int4": Kind(Weights.unpacked_int4, DECODE, 1),
    "int8": Kind(lambda w: decoded(*w.int8_pair(w.plain)), DECODE, 1),
    "float8wo": Kind(lambda w: decoded(*float8_codes(w.plain, stored=torch.bfloat16)), rate=1),
    "int8dq": Kind(lambda w: decoded(*w.int8_pair(w.plain)), x=of_int8),
    "float8dq": Kind(lambda w: of_float8(w.plain), x=of_float8),
    "sparse24": Kind(lambda w: w.pruned.float()),
    "int8dq-sparse24": Kind(lambda w: decoded(*w.int8_pair(w.pruned)), rate=4, x=of_int8),
    "float8dq-sparse24": Kind(lambda w: of_float8(w.pruned), rate=4, x=of_float8),
}
