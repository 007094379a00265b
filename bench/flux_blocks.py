"""The transformer blocks of Flux (Black Forest Labs, 2024) as a plain module, without what embeds and what projects.

Double blocks keep an image and a text stream apart but for their attention, which is joint. Single blocks take both as
one, and compute attention and MLP next to each other. A vector, of time and prompt, modulates each block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD = 128  # size of a head
AXES = (16, 56, 56)  # of it, for a number, a row and a column
THETA = 10000.0  # of the rotary embedding

Turn = tuple[Tensor, Tensor]  # cosines and sines [T, HEAD / 2]


def turns(text: int, side: int, device: torch.device) -> Turn:
    """Angles of the rotary embedding: none for the text, its place for each patch of a square image."""
    place = torch.arange(side, device=device)
    rows, columns = place.repeat_interleave(side), place.repeat(side)
    places = F.pad(torch.stack([torch.zeros_like(rows), rows, columns], 1), (0, 0, text, 0))
    speeds = [THETA ** -(torch.arange(0, size, 2, device=device) / size) for size in AXES]
    angles = torch.cat([places[:, i, None] * speed for i, speed in enumerate(speeds)], 1)
    return angles.cos(), angles.sin()


def rotated(x: Tensor, turn: Turn) -> Tensor:
    """Rotary position embedding (Su et al., 2021) of x [B, heads, T, HEAD], neighbours as pairs, in fp32."""
    cos, sin = turn
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).type_as(x)


def attention(q: Tensor, k: Tensor, v: Tensor, turn: Turn) -> Tensor:
    """Each [B, heads, T, HEAD] -> [B, T, width]."""
    return F.scaled_dot_product_attention(rotated(q, turn), rotated(k, turn), v).transpose(1, 2).flatten(2)


class Modulation(nn.Module):
    """vector [B, width] -> `count` tensors [B, 1, width]: shift, scale and gate, once or twice."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.count, self.lin = count, nn.Linear(width, count * width)

    def forward(self, vector: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vector))[:, None].chunk(self.count, -1)


class QKNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query_norm, self.key_norm = nn.RMSNorm(HEAD, eps=1e-6), nn.RMSNorm(HEAD, eps=1e-6)

    def forward(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """qkv [B, T, 3 · width] -> q, k, v [B, heads, T, HEAD], the first two normalized."""
        q, k, v = qkv.unflatten(-1, (3, -1, HEAD)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.query_norm(q), self.key_norm(k), v


class SelfAttention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.norm, self.proj = nn.Linear(width, 3 * width), QKNorm(), nn.Linear(width, width)


class Stream(nn.Module):
    """What a double block has for one of its two streams."""

    def __init__(self, width: int):
        super().__init__()
        self.mod, self.attn = Modulation(width, 6), SelfAttention(width)
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def attends(self, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.attn.norm(self.attn.qkv((1 + scale) * self.norm1(x) + shift))

    def attended(self, x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, gate_mlp: Tensor) -> Tensor:
        """x with y, what attention gave of it, and with what the MLP makes of both."""
        x = x + gate * self.attn.proj(y)
        return x + gate_mlp * self.mlp((1 + scale) * self.norm2(x) + shift)


class DoubleBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.img, self.txt = Stream(width), Stream(width)

    def forward(self, image: Tensor, text: Tensor, vector: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
        of_image, of_text = self.img.mod(vector), self.txt.mod(vector)
        parts = zip(self.txt.attends(text, *of_text[:2]), self.img.attends(image, *of_image[:2]), strict=True)
        y = attention(*(torch.cat(part, 2) for part in parts), turn)
        y_text, y_image = y.split([text.shape[1], image.shape[1]], 1)
        return self.img.attended(image, y_image, *of_image[2:]), self.txt.attended(text, y_text, *of_text[2:])


class SingleBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.modulation, self.norm = Modulation(width, 3), QKNorm()
        self.pre_norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear1 = nn.Linear(width, 3 * width + 4 * width)  # q, k, v and the MLP's first
        self.linear2 = nn.Linear(width + 4 * width, width)  # the projection of attention and the MLP's second

    def forward(self, x: Tensor, vector: Tensor, turn: Turn) -> Tensor:
        shift, scale, gate = self.modulation(vector)
        qkv, inner = self.linear1((1 + scale) * self.pre_norm(x) + shift).split([3 * self.width, 4 * self.width], -1)
        y = attention(*self.norm(qkv), turn)
        return x + gate * self.linear2(torch.cat([y, F.gelu(inner, approximate="tanh")], 2))


class FluxBlocks(nn.Module):
    """Flux.1 has 19 double and 38 single blocks, 3072 wide."""

    def __init__(self, width: int, double: int, single: int):
        super().__init__()
        self.double_blocks = nn.ModuleList(DoubleBlock(width) for _ in range(double))
        self.single_blocks = nn.ModuleList(SingleBlock(width) for _ in range(single))

    def forward(self, image: Tensor, text: Tensor, vector: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """image [B, T, width], text [B, S, width], vector [B, width], of S + T tokens -> [B, T, width]."""
        for block in self.double_blocks:
            image, text = block(image, text, vector, (cos, sin))
        x = torch.cat([text, image], 1)
        for block in self.single_blocks:
            x = block(x, vector, (cos, sin))
        return x[:, text.shape[1] :]
