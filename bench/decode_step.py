"""One decode step of a Llama over a static cache that is full and rolls, as a plain module."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .random_model import random_model

HEAD = 128  # size of a head
SHARED = 4  # query heads that share a head of keys and values
THETA = 500000.0  # of the rotary embedding

Cache = list[tuple[Tensor, Tensor]]  # for each layer: keys, values [B, heads, window, HEAD]


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.heads = width // HEAD
        self.kv_heads = max(self.heads // SHARED, 1)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * HEAD, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * HEAD, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], slot: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """x [B, 1, width] -> the same; the token's key and value go to the slot."""
        B = x.shape[0]
        q = rotated(self.q_proj(x).view(B, self.heads, 1, HEAD), *turn)
        k = rotated(self.k_proj(x).view(B, self.kv_heads, 1, HEAD), *turn)
        keys.index_copy_(2, slot, k)
        values.index_copy_(2, slot, self.v_proj(x).view(B, self.kv_heads, 1, HEAD))
        return self.o_proj(F.scaled_dot_product_attention(q, keys, values, enable_gqa=True).view(B, 1, -1))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al., 2021) of x [B, heads, 1, HEAD], halves as pairs."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        inner = 14336 * width // 4096
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.input_norm, self.post_norm = (nn.RMSNorm(width, eps=1e-5) for _ in range(2))
        self.attention, self.mlp = Attention(width), MLP(width)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], slot: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        x = x + self.attention(self.input_norm(x), turn, slot, keys, values)
        return x + self.mlp(self.post_norm(x))


class Llama(nn.Module):
    """A decode step of Llama-3-8B where width is 4096 and layers 32; other widths shrink all sizes alike."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        vocabulary = 128256 * width // 4096
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor, position: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
        """ids [B, 1] at position [1] -> logits [B, vocabulary] and the next ids [B, 1]; the cache is written."""
        half = torch.arange(0, HEAD, 2, device=ids.device) / HEAD
        angles = (position / THETA**half).repeat(2)
        turn = angles.cos().bfloat16(), angles.sin().bfloat16()
        slot = position % cache[0][0].shape[2]
        x = self.embedding(ids)
        for layer, (keys, values) in zip(self.layers, cache, strict=True):
            x = layer(x, turn, slot, keys, values)
        logits = self.lm_head(self.norm(x)[:, -1])
        return logits, logits.argmax(-1, keepdim=True)


def llama(width: int, layers: int, device: torch.device) -> Llama:
    """With random weights, in bf16 on the device."""
    return random_model(lambda: Llama(width, layers), device)
