"""The 2:4 format: of each 4 consecutive weights along K, the two that are not zero and where they stood.

    values   [N, K/2] in the weight's dtype: of each four the two kept weights, in their order
    indices  [N, ceil(K/8)] uint8: byte [n, b] = place of group 2b | place of group 2b + 1 << 4, where the place of four
             weights is first | second << 2, the positions 0 … 3 of the kept two, first < second; where K/4 is odd, the
             last high nibble is 0

Where fewer than two of four are not zero, zeros are kept, the first ones. Weights may be of any dtype, int8 and float8
included, whose codes are kept as they are.
"""

import torch
from torch import Tensor

from . import rounding
from .prune24 import largest_two

__all__ = ["compress", "decompress"]


def compress(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K], which is 2:4 -> values and indices.

    ValueError where 4 does not divide K, or where three or four of one group are not zero.
    """
    N, K = weight.shape
    if K % 4:
        raise ValueError(f"a weight of {N} × {K} has no whole groups of four: K must be a multiple of 4")
    values = weight.new_empty(N, K // 2)
    indices = weight.new_empty(N, -(-K // 8), dtype=torch.uint8)
    for rows in rounding.chunks(weight):
        groups = weight[rows].unflatten(1, (K // 4, 4))
        filled = nonzero(groups)
        if not rounding.is_fake(weight) and (filled.sum(-1) > 2).any():
            raise ValueError("the weight is not 2:4: three or four weights of one group are not zero")
        kept = largest_two(filled.to(torch.uint8))
        first = kept.to(torch.uint8).argmax(-1)
        second = 3 - kept.flip(-1).to(torch.uint8).argmax(-1)
        values[rows] = pick(groups, torch.stack([first, second], -1)).flatten(1)
        indices[rows] = bytes_of((first | second << 2).to(torch.uint8))
    return values, indices


def decompress(values: Tensor, indices: Tensor) -> Tensor:
    """values [N, K/2] and indices [N, ceil(K/8)] -> the weight [N, K]."""
    N, half = values.shape
    places = torch.stack([indices & 15, indices >> 4], -1).flatten(1)[:, : half // 2]
    positions = torch.stack([places & 3, places >> 2], -1).long()
    bits = as_bits(values)
    weight = bits.new_zeros(N, half // 2, 4).scatter_(2, positions, bits.unflatten(1, (half // 2, 2)))
    return weight.flatten(1).view(values.dtype)


def bytes_of(places: Tensor) -> Tensor:
    """places [n, K/4], 4 bits each -> bytes [n, ceil(K/8)], the first of two in the low half."""
    even = torch.nn.functional.pad(places, (0, places.shape[1] % 2))
    return even[:, ::2] | even[:, 1::2] << 4


def pick(groups: Tensor, positions: Tensor) -> Tensor:
    """groups [n, G, 4], positions [n, G, 2] -> [n, G, 2]."""
    return as_bits(groups).gather(2, positions).view(groups.dtype)


def as_bits(tensor: Tensor) -> Tensor:
    """A tensor of one-byte elements as bytes, which can be moved about where float8 cannot; others as they are."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def nonzero(groups: Tensor) -> Tensor:
    return (groups.float() if groups.element_size() == 1 else groups) != 0
