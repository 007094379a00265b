"""kv_attention: attention of new tokens over packed caches of keys and values.

q [B, Hq, T, D]; k, v with their scales: packed caches [B, H, S, D] and [B, H, S, Dv] (`kv_cache.py`); query head i reads
KV head i // (Hq / H). Token t of row b sees the cache's positions start[b] … positions[b, t], of them only the newest
`window` where window > 0, and of them only what mask allows:
    positions [B, T] int64   S - 1 and more: up to the end; negative: nothing
    start [B] int64          None: 0
    mask                     bool (True: seen), or float, added to the scores; [B or 1, Hq or 1, T or 1, S], or None
    scores = q · k * scale, then, where softcap > 0, softcap * tanh(scores / softcap)
-> [B, Hq, T, Dv] in q's dtype: softmax(scores) · v, and zeros for a token that sees nothing. Positions that no token of
a row sees change nothing, whatever they hold; NaN at one that some see may reach all tokens of that row.
"""

import torch
from torch import Tensor

from . import cuda_kv_attention
from .kv_cache import FLOATS, CacheCase, CacheOp
from .op import capability

kv_attention = CacheOp(
    "kv_attention(Tensor q, Tensor k, Tensor k_scales, Tensor v, Tensor v_scales, Tensor positions, Tensor? start, "
    "Tensor? mask, float scale, float softcap, int window) -> Tensor"
)


@kv_attention.fake
def _(q, k, k_scales, v, v_scales, positions, start, mask, scale, softcap, window):
    case = kv_attention.case_of(q, k, k_scales, v, v_scales, positions, start, mask, scale, softcap, window)
    return q.new_empty(*q.shape[:3], case.N)


@kv_attention.case
def _(q, k, k_scales, v, v_scales, positions, start, mask, scale, softcap, window) -> CacheCase:
    keys, D = kv_attention.fit(k, k_scales)
    values, of_values = kv_attention.fit(v, v_scales)
    B, H, S, _ = k.shape
    check, device = kv_attention.check, k.device
    check("v", v, device, (v.dtype,), (B, H, S, None))
    check("q", q, device, FLOATS, (B, None, None, D))
    _, Hq, T, _ = q.shape
    if Hq % H:
        raise ValueError(f"kv_attention: q has {Hq} heads; expected a multiple of the {H} KV heads")
    check("positions", positions, device, (torch.int64,), (B, T))
    if start is not None:
        check("start", start, device, (torch.int64,), (B,))
    if mask is not None:
        shapes = [(rows, heads, tokens, S) for rows in (B, 1) for heads in (Hq, 1) for tokens in (T, 1)]
        check("mask", mask, device, (torch.bool, *FLOATS), *shapes)
    return CacheCase(
        device.type, q.dtype, T, of_values, D, None, capability(device), rows=B, heads=H, queries=Hq // H, length=S,
        keys=keys, values=values, softcap=softcap > 0, mask=mask.dtype if mask is not None else None,
    )  # fmt: skip


def scores_of(q: Tensor, keys: Tensor, mask: Tensor | None, visible: Tensor, scale: float, softcap: float) -> Tensor:
    """[B, H, G, T, n] of q [B, H, G, T, D] and n keys [B, H, n, D]; -inf where a token does not see a key.

    mask: [B or 1, H or 1, G or 1, T or 1, n]; visible [B, T, n].
    """
    scores = (q.flatten(2, 3) @ keys.mT).unflatten(2, q.shape[2:4]).mul_(scale)
    if softcap > 0:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if mask is not None and mask.dtype is not torch.bool:
        scores = scores.add_(mask)
    seen = visible[:, None, None]
    return scores.masked_fill_(~(seen & mask if mask is not None and mask.dtype is torch.bool else seen), -torch.inf)


def visible_of(places: Tensor, positions: Tensor, start: Tensor | None, window: int) -> Tensor:
    """[B, T, n]: whether tokens at positions [B, T] see the cache's places [n], by length, start and window."""
    visible = places <= positions[..., None]
    if start is not None:
        visible = visible & (places >= start[:, None, None])
    return visible & (places > positions[..., None] - window) if window > 0 else visible


def by_kv_head(mask: Tensor | None, H: int) -> Tensor | None:
    """A mask [B, Hq or 1, T, S] as [B, H or 1, G or 1, T, S]."""
    return mask if mask is None else mask.unflatten(1, (H, -1)) if mask.shape[1] > 1 else mask[:, None]


@kv_attention.reference
def _(q, k, k_scales, v, v_scales, positions, start, mask, scale, softcap, window):
    H, S = k.shape[1:3]
    keys = kv_attention.format_of(k, k_scales).dequantize(k, k_scales, torch.float64)
    values = kv_attention.format_of(v, v_scales).dequantize(v, v_scales, torch.float64)
    visible = visible_of(torch.arange(S, device=k.device), positions, start, window)
    values = values.masked_fill(~visible.any(1)[:, None, :, None], 0)
    scores = scores_of(q.double().unflatten(1, (H, -1)), keys, by_kv_head(mask, H), visible, scale, softcap)
    weights = scores.softmax(-1).masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0)
    return (weights.flatten(2, 3) @ values).unflatten(2, weights.shape[2:4]).flatten(1, 2).to(q.dtype)


@kv_attention.implementation("cuda", supports=cuda_kv_attention.supports)
def _(q, k, k_scales, v, v_scales, positions, start, mask, scale, softcap, window):
    arguments = q, k, k_scales, v, v_scales, positions, start, mask, scale, softcap, window
    return cuda_kv_attention.attention(*arguments, kv_attention.known_case(*arguments))
