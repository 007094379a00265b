"""kv_attention: attention of new tokens over packed caches of keys and values.

q [B, Hq, T, D]; k, v with their scales: packed caches [B, H, S, D] and [B, H, S, Dv] (`kv_cache.py`); query head i
reads KV head i // (Hq / H). Token t of row b sees the cache's positions start[b] … positions[b, t], of them
only the newest `window` where window > 0, and of them only what mask allows:
    positions [B, T] int64   S - 1 and more: up to the end; negative: nothing
    start [B] int64          None: 0
    mask                     bool (True: seen), or float, added to the scores; [B or 1, Hq or 1, T or 1, S], or None
    k_window, k_held         of keys by channel (`kv_cache.py`); None where each token is by itself, as values are
    sinks [Hq] float         a score of each query head that all its tokens see besides, and that has no value (Xiao et
                             al., Efficient streaming language models with attention sinks, 2023; GPT-OSS), or None
    scores = q · k * scale, then, where softcap > 0, softcap * tanh(scores / softcap)
-> [B, Hq, T, Dv] in q's dtype: softmax(scores) · v, and zeros for a token that sees nothing. Positions that no token of
a row sees change nothing, whatever they hold; NaN at one that some see may reach all tokens of that row.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import cuda_kv_attention, flash_kv_attention
from .kv_cache import FLOATS, CacheCase, CacheOp
from .op import capability

BLOCK = 1024  # positions at a time
BLOCKS_IN_GRAPH = 8  # at most, as each becomes a part of it
SCORES = {"cpu": 1 << 22}  # in work at a time: on CPU little enough for its caches, with one block of positions,
MANY_SCORES = 1 << 25  # elsewhere what keeps a GPU busy, 134 MB in fp32, of which there are a few

kv_attention = CacheOp(
    "kv_attention(Tensor q, Tensor k, Tensor k_scales, Tensor v, Tensor v_scales, Tensor positions, Tensor? start, "
    "Tensor? mask, float scale, float softcap, int window, Tensor? k_window=None, Tensor? k_held=None, "
    "Tensor? sinks=None) -> Tensor"
)


@kv_attention.fake
def _(
    q, k, k_scales, v, v_scales, positions, start, mask, scale, softcap, window, k_window=None, k_held=None, sinks=None
):
    seen = positions, start, mask, scale, softcap, window
    case = kv_attention.case_of(q, k, k_scales, v, v_scales, *seen, k_window, k_held, sinks)
    return q.new_empty(*q.shape[:3], case.N)


@kv_attention.case
def _(
    q, k, k_scales, v, v_scales, positions, start, mask, scale, softcap, window, k_window=None, k_held=None, sinks=None
) -> CacheCase:
    keys, D = kv_attention.fit(k, k_scales, k_window, k_held)
    values, of_values = kv_attention.fit(v, v_scales)
    (B, H, P, _), S = k.shape, v.shape[2]
    check, device = kv_attention.check, k.device
    check("v", v, device, (v.dtype,), (B, H, P if keys.block is None or keys.positions(S) != P else S, None))
    check("q", q, device, FLOATS, (B, None, None, D))
    _, Hq, T, _ = q.shape
    if Hq % H:
        raise ValueError(f"kv_attention: q has {Hq} heads; expected a multiple of the {H} KV heads")
    check("positions", positions, device, (torch.int64,), (B, T))
    if start is not None:
        check("start", start, device, (torch.int64,), (B,))
    if mask is not None:
        shapes = [(rows, heads, tokens, S) for tokens in (T, 1) for rows in (B, 1) for heads in (Hq, 1)]
        check("mask", mask, device, (torch.bool, *FLOATS), *shapes)
    if sinks is not None:
        check("sinks", sinks, device, FLOATS, (Hq,))
    return CacheCase(
        device.type, q.dtype, T, of_values, D, None, capability(device), rows=B, heads=H, queries=Hq // H, length=S,
        keys=keys, values=values, softcap=softcap > 0, mask=mask.dtype if mask is not None else None,
        sinks=sinks is not None,
    )  # fmt: skip


@dataclass(frozen=True)
class Sight:
    """What tokens see: the arguments of the op, with mask [B or 1, H or 1, G or 1, T or 1, S]."""

    positions: Tensor
    start: Tensor | None
    window: int
    mask: Tensor | None

    @classmethod
    def of(cls, positions: Tensor, start: Tensor | None, mask: Tensor | None, window: int, H: int) -> "Sight":
        """From the arguments of the op, for H KV heads."""
        if mask is not None:
            mask = mask.unflatten(1, (H, -1)) if mask.shape[1] > 1 else mask[:, None]
        return cls(positions, start, window, mask)

    def tokens(self, part: slice) -> "Sight":
        """That of some of the tokens."""
        if part == slice(None):
            return self
        mask = self.mask if self.mask is None or self.mask.shape[3] == 1 else self.mask[:, :, :, part]
        return replace(self, positions=self.positions[:, part], mask=mask)

    def seen(self, part: slice) -> Tensor:
        """[B, T, n]: which tokens see which of n positions, mask aside."""
        places = torch.arange(part.start, part.stop, device=self.positions.device)
        positions = self.positions[..., None]
        seen = places <= positions
        if self.start is not None:
            seen = seen & (places >= self.start[:, None, None])
        return seen & (places > positions - self.window) if self.window > 0 else seen

    def span(self, S: int) -> range:
        """The positions that may be seen, of S; all of them where asking would wait for a GPU, and in a graph."""
        if self.positions.device.type != "cpu" or torch.compiler.is_exporting():
            return range(S)
        if not self.positions.numel():
            return range(0)
        first = int(self.positions.min()) - self.window + 1 if self.window > 0 else 0
        first = first if self.start is None else max(first, int(self.start.min()))
        return range(max(first, 0), min(int(self.positions.max()) + 1, S))


def scores_of(q: Tensor, keys: Tensor, seen: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    """[B, H, G, T, n] of q [B, H, G, T, D] and n keys [B, H, n, D]; -inf where a token does not see a key."""
    scores = (q.flatten(2, 3) @ keys.mT).unflatten(2, q.shape[2:4]) * scale
    if softcap > 0:
        scores = (scores / softcap).tanh() * softcap
    seen = seen[:, None, None]
    if mask is not None and mask.dtype is torch.bool:
        seen = seen & mask
    elif mask is not None:
        scores = scores + mask
    return scores.masked_fill(~seen, -torch.inf)


@dataclass(frozen=True)
class Keys:
    """Packed keys: the arguments of the op."""

    codes: Tensor
    scales: Tensor
    window: Tensor | None
    held: Tensor | None

    @property
    def block(self) -> int:
        """Positions that are dequantized together."""
        return 1 if self.window is None else self.window.shape[2]

    def dequantize(self, part: slice, dtype: torch.dtype) -> Tensor:
        """[B, H, n, D] in fp32 or fp64: those of n positions, from the first of a block on."""
        form, W = kv_attention.format_of(self.codes, self.scales, self.window), self.block
        first, last = part.start // W, -(-part.stop // W)
        keys = form.dequantize(self.codes[:, :, first * W : last * W], self.scales[:, :, first:last], dtype)
        if self.window is None or self.held is None or first == last:
            return keys
        blocks, rows, place = keys.unflatten(2, (-1, W)), torch.arange(len(keys), device=keys.device), self.held - first
        inside, place = (place >= 0) & (place < last - first), place.clamp(0, last - first - 1)
        blocks[rows, :, place] = torch.where(inside[:, None, None, None], self.window.to(dtype), blocks[rows, :, place])
        return keys[:, :, : part.stop - part.start]


def values_of(v: Tensor, v_scales: Tensor, seen: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, H, n, Dv] in fp32 or fp64: n values, 0 where no token sees them (seen [B, T, n])."""
    unseen = ~seen.any(1)[(slice(None), None, ..., *[None] * (v_scales.dim() - 3))]
    return kv_attention.format_of(v, v_scales).dequantize(v, v_scales.masked_fill(unseen, 0), dtype)


def product(weights: Tensor, values: Tensor) -> Tensor:
    """[B, H, G, T, Dv] of weights [B, H, G, T, n] and values [B, H, n, Dv]."""
    return (weights.flatten(2, 3) @ values).unflatten(2, weights.shape[2:4])


def sink_scores(sinks: Tensor, like: Tensor) -> Tensor:
    """[B, H, G, T, 1] of sinks [Hq], as `like` [B, H, G, T, n] is."""
    B, H, G, T, _ = like.shape
    return sinks.to(like.dtype).view(H, G, 1, 1).expand(B, H, G, T, 1)


@kv_attention.reference
def _(
    q, k, k_scales, v, v_scales, positions, start, mask, scale, softcap, window, k_window=None, k_held=None, sinks=None
):
    H, S = v.shape[1:3]
    sight = Sight.of(positions, start, mask, window, H)
    seen = sight.seen(slice(0, S))
    keys = Keys(k, k_scales, k_window, k_held).dequantize(slice(0, S), torch.float64)
    scores = scores_of(q.double().unflatten(1, (H, -1)), keys, seen, sight.mask, scale, softcap)
    if sinks is not None:
        scores = torch.cat([scores, sink_scores(sinks, scores)], -1)
    weights = scores.softmax(-1).masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0)[..., :S]
    return product(weights, values_of(v, v_scales, seen, torch.float64)).flatten(1, 2).to(q.dtype)


@kv_attention.implementation("cuda", supports=cuda_kv_attention.supports)
def _(
    q, k, k_scales, v, v_scales, positions, start, mask, scale, softcap, window, k_window=None, k_held=None, sinks=None
):
    arguments = q, k, k_scales, v, v_scales, positions, start, mask, scale, softcap, window, k_window, k_held
    assert sinks is None
    return cuda_kv_attention.attention(*arguments, kv_attention.known_case(*arguments))


@kv_attention.implementation("flash", supports=flash_kv_attention.supports)
def _(
    q, k, k_scales, v, v_scales, positions, start, mask, scale, softcap, window, k_window=None, k_held=None, sinks=None
):
    """Tokens that are not one behind the other, at the same positions in all rows, go through "blocks"."""
    assert sinks is None
    H, S = v.shape[1:3]
    first = flash_kv_attention.beginning(positions, start, window, S)
    if first is None:
        arguments = q, k, k_scales, v, v_scales, positions, start, mask, scale, softcap, window, k_window, k_held
        return kv_attention["blocks"].function(*arguments)
    of_keys, form = Keys(k, k_scales, k_window, k_held), kv_attention.format_of(v, v_scales)

    def keys(part: slice) -> Tensor:
        return of_keys.dequantize(part, torch.float32)

    def values(part: slice) -> Tensor:
        return form.dequantize(v[:, :, part], v_scales[:, :, part], torch.float32)

    return flash_kv_attention.attention(q, keys, values, of_keys.block, H, first, scale)


@kv_attention.implementation("blocks", supports=lambda case: True, standalone=True)
def _(
    q, k, k_scales, v, v_scales, positions, start, mask, scale, softcap, window, k_window=None, k_held=None, sinks=None
):
    """In fp32, a block of tokens at a time, and for it blocks of positions; in a graph all tokens: T is symbolic."""
    (B, Hq, T, _), (H, S) = q.shape, v.shape[1:3]
    q, sight = q.unflatten(1, (H, -1)), Sight.of(positions, start, mask, window, H)
    keys = Keys(k, k_scales, k_window, k_held)
    parts = [slice(None)]
    if not torch.compiler.is_exporting():
        few = max(SCORES.get(q.device.type, MANY_SCORES) // max(B * Hq * BLOCK, 1), 1)
        parts = [slice(first, first + few) for first in range(0, max(T, 1), few)]
    y = []
    for part in parts:
        tokens = sight.tokens(part)
        span = tokens.span(S)
        y.append(online(q[:, :, :, part].float(), keys, v, v_scales, tokens, span, scale, softcap, sinks).to(q.dtype))
    return torch.cat(y, 3).flatten(1, 2)


def online(q, keys, v, v_scales, sight, span, scale, softcap, sinks):
    """[B, H, G, T, Dv] fp32 of q [B, H, G, T, D] fp32, over a span of positions, with a running maximum and sum.

    Milakov and Gimelshein, Online normalizer calculation for softmax, 2018.
    """
    most = q.new_full((*q.shape[:4], 1), -torch.inf)
    total = torch.zeros_like(most)
    if sinks is not None:
        most, total = sink_scores(sinks, q), torch.ones_like(most)  # what was seen before all blocks; it has no value
    y = q.new_zeros(*q.shape[:4], kv_attention.fit(v, v_scales)[1])
    size = max(BLOCK, -(-len(span) // BLOCKS_IN_GRAPH)) if torch.compiler.is_exporting() else BLOCK
    size = -(-size // keys.block) * keys.block
    for first in range(span.start // keys.block * keys.block, span.stop, size):
        part = slice(first, min(first + size, span.stop))
        seen = sight.seen(part)
        mask = None if sight.mask is None else sight.mask[..., part]
        scores = scores_of(q, keys.dequantize(part, torch.float32), seen, mask, scale, softcap)
        before, most = most, torch.maximum(most, scores.amax(-1, keepdim=True))
        shift = most.masked_fill(most == -torch.inf, 0)  # of a token that has seen nothing yet
        weights, kept = (scores - shift).exp(), (before - shift).exp()
        total = total * kept + weights.sum(-1, keepdim=True)
        y = y * kept + product(weights, values_of(v[:, :, part], v_scales[:, :, part], seen, torch.float32))
    return y / total.masked_fill(total == 0, 1)
