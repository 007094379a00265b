"""A vision transformer's encoder as a plain module, of one grid of patches, with or without windows.

Without windows it is a ViT (Dosovitskiy et al., 2021) with a class token. With them it is the image encoder of Segment
Anything (Kirillov et al., 2023): attention within windows, the grid padded to whole ones after the norm, but for some
layers. Its relative position bias and its neck of convolutions are left out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, width] -> the same; all tokens of a row attend to each other."""
        B, T, width = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, width))


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def windows(x: Tensor, side: int, window: int) -> Tensor:
    """x [B, side², width] -> [B · (windows of a row)², window², width], zeros where windows go over the edge."""
    B, _, width = x.shape
    more = -side % window
    n = (side + more) // window
    padded = F.pad(x.view(B, side, side, width), (0, 0, 0, more, 0, more))
    return padded.view(B, n, window, n, window, width).transpose(2, 3).reshape(B * n * n, window * window, width)


def together(x: Tensor, side: int, window: int) -> Tensor:
    """What `windows` took apart, without the padding."""
    n = -(-side // window)
    grid = x.view(-1, n, n, window, window, x.shape[-1]).transpose(2, 3)
    return grid.reshape(-1, n * window, n * window, x.shape[-1])[:, :side, :side].flatten(1, 2)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, side: int, window: int | None):
        super().__init__()
        self.side, self.window = side, window
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, heads), MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attended(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def attended(self, x: Tensor) -> Tensor:
        if self.window is None:
            return self.attn(x)
        return together(self.attn(windows(x, self.side, self.window)), self.side, self.window)


class Encoder(nn.Module):
    """Images [B, 3, side · patch, side · patch] -> [B, tokens, width]; a class token, the first, where no windows are.

    side: patches along an edge. window: patches along the edge of one; a quarter of the layers, evenly spread and the
    last among them, look at the whole grid. None: all do.
    """

    def __init__(self, width: int, layers: int, heads: int, side: int, patch: int, window: int | None):
        super().__init__()
        tokens = side * side + (window is None)
        self.patch_embed = nn.Conv2d(3, width, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width)) if window is None else None
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, width))
        every = max(layers // 4, 1)
        self.blocks = nn.Sequential(
            *(Block(width, heads, side, None if (i + 1) % every == 0 else window) for i in range(layers))
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).mT
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        return self.norm(self.blocks(x + self.pos_embed))
