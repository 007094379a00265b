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
    new_k, new_v, stored     the tokens' own keys [B, H, T, D] and values [B, H, T, Dv], float, as they were before
                             they were rounded, and the positions [T] or [B, T] where `kv_update` has stored them,
                             those of a row differ; or None. Where T > FEW they count there, not what the cache holds;
                             fewer tokens, as in decoding, read themselves back from it
    scores = q · k * scale, then, where softcap > 0, softcap * tanh(scores / softcap)
-> [B, Hq, T, Dv] in q's dtype: softmax(scores) · v, and zeros for a token that sees nothing. Positions that no token of
a row sees change nothing, whatever they hold; NaN at one that some see may reach all tokens of that row.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import cuda_kv_attention, flash_kv_attention
from .kv_cache import FEW, FLOATS, CacheCase, CacheOp
from .op import capability

BLOCK = 1024  # positions at a time
BLOCKS_IN_GRAPH = 8  # at most, as each becomes a part of it
SCORES = {"cpu": 1 << 22}  # in work at a time: on CPU little enough for its caches, with one block of positions,
MANY_SCORES = 1 << 25  # elsewhere what keeps a GPU busy, 134 MB in fp32, of which there are a few

kv_attention = CacheOp(
    "kv_attention(Tensor q, Tensor k, Tensor k_scales, Tensor v, Tensor v_scales, Tensor positions, Tensor? start, "
    "Tensor? mask, float scale, float softcap, int window, Tensor? k_window=None, Tensor? k_held=None, "
    "Tensor? sinks=None, Tensor? new_k=None, Tensor? new_v=None, Tensor? stored=None) -> Tensor"
)


@dataclass(frozen=True)
class Call:
    """The arguments of the op."""

    q: Tensor
    k: Tensor
    k_scales: Tensor
    v: Tensor
    v_scales: Tensor
    positions: Tensor
    start: Tensor | None
    mask: Tensor | None
    scale: float
    softcap: float
    window: int
    k_window: Tensor | None = None
    k_held: Tensor | None = None
    sinks: Tensor | None = None
    new_k: Tensor | None = None
    new_v: Tensor | None = None
    stored: Tensor | None = None

    @property
    def fresh(self) -> bool:
        """Whether the tokens count as they were before they were stored; in a graph, where T is symbolic, if it is many
        when the graph runs (`stored_at`)."""
        T = self.q.shape[2]
        return self.stored is not None and not (isinstance(T, int) and T <= FEW)


@kv_attention.fake
def _(*arguments):
    q, case = arguments[0], kv_attention.case_of(*arguments)
    return q.new_empty(*q.shape[:3], case.N)


@kv_attention.case
def _(*arguments) -> CacheCase:
    call = Call(*arguments)
    q, k, v, mask = call.q, call.k, call.v, call.mask
    keys, D = kv_attention.fit(k, call.k_scales, call.k_window, call.k_held)
    values, of_values = kv_attention.fit(v, call.v_scales)
    (B, H, P, _), S = k.shape, v.shape[2]
    check, device = kv_attention.check, k.device
    check("v", v, device, (v.dtype,), (B, H, P if keys.block is None or keys.positions(S) != P else S, None))
    check("q", q, device, FLOATS, (B, None, None, D))
    _, Hq, T, _ = q.shape
    if Hq % H:
        raise ValueError(f"kv_attention: q has {Hq} heads; expected a multiple of the {H} KV heads")
    check("positions", call.positions, device, (torch.int64,), (B, T))
    if call.start is not None:
        check("start", call.start, device, (torch.int64,), (B,))
    if mask is not None:
        shapes = [(rows, heads, tokens, S) for tokens in (T, 1) for rows in (B, 1) for heads in (Hq, 1)]
        check("mask", mask, device, (torch.bool, *FLOATS), *shapes)
    if call.sinks is not None:
        check("sinks", call.sinks, device, FLOATS, (Hq,))
    new = {"new_k": call.new_k, "new_v": call.new_v, "stored": call.stored}
    if missing := [name for name, tensor in new.items() if tensor is None]:
        if len(missing) < len(new):
            raise ValueError(
                f"kv_attention: {' and '.join(missing)} missing; expected {', '.join(new)} or none of them"
            )
    else:
        check("new_k", call.new_k, device, FLOATS, (B, H, T, D))
        check("new_v", call.new_v, device, FLOATS, (B, H, T, of_values))
        check("stored", call.stored, device, (torch.int64,), (B, T), (T,))
    return CacheCase(
        device.type, q.dtype, T, of_values, D, None, capability(device), rows=B, heads=H, queries=Hq // H, length=S,
        keys=keys, values=values, softcap=call.softcap > 0, mask=mask.dtype if mask is not None else None,
        sinks=call.sinks is not None, fresh=call.stored is not None,
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


def stored_at(call: Call) -> Tensor | None:
    """[B, S]: which of the T tokens is stored at a position, -1: none; None where they read themselves back."""
    (B, _, T, _), S, device = call.q.shape, call.v.shape[2], call.q.device
    if call.stored is None or not call.fresh:
        return None
    tokens = torch.arange(T, device=device).expand(B, T)
    which = torch.full((B, S), -1, dtype=torch.int64, device=device).scatter(1, call.stored.expand(B, T), tokens)
    return which if isinstance(T, int) else torch.where(torch.scalar_tensor(T, device=device) > FEW, which, -1)


@dataclass(frozen=True)
class Fresh:
    """Keys or values [B, H, T, D] that were not rounded, and which of them is at a position [B, S], -1: none."""

    tokens: Tensor
    which: Tensor

    def over(self, old: Tensor, part: slice, shown: Tensor | None = None) -> Tensor:
        """[B, H, n, D]: what a cache holds at n positions, or such a token; of these those `shown` [B, n] alone."""
        which = self.which[:, part]
        which = which if shown is None else which.masked_fill(~shown, -1)
        asks = which.device.type == "cpu" and not torch.compiler.is_exporting()  # waits for no GPU
        if asks and bool((which < 0).all()):
            return old
        rows = torch.arange(old.shape[0], device=old.device)[:, None]
        new = self.tokens[rows, :, which.clamp(min=0)].transpose(1, 2)
        return torch.where((which < 0)[:, None, :, None], old, new.to(old.dtype))


@dataclass(frozen=True)
class Keys:
    """Packed keys: the arguments of the op."""

    codes: Tensor
    scales: Tensor
    window: Tensor | None = None
    held: Tensor | None = None
    fresh: Fresh | None = None

    @classmethod
    def of(cls, call: Call, which: Tensor | None) -> "Keys":
        fresh = None if which is None or call.new_k is None else Fresh(call.new_k, which)
        return cls(call.k, call.k_scales, call.k_window, call.k_held, fresh)

    @property
    def block(self) -> int:
        """Positions that are dequantized together."""
        return 1 if self.window is None else self.window.shape[2]

    def dequantize(self, part: slice, dtype: torch.dtype) -> Tensor:
        """[B, H, n, D] in fp32 or fp64: those of n positions, from the first of a block on."""
        keys = self.packed(part, dtype)
        return keys if self.fresh is None else self.fresh.over(keys, part)

    def packed(self, part: slice, dtype: torch.dtype) -> Tensor:
        """The same of what the cache holds."""
        form, W = kv_attention.format_of(self.codes, self.scales, self.window), self.block
        first, last = part.start // W, -(-part.stop // W)
        keys = form.dequantize(self.codes[:, :, first * W : last * W], self.scales[:, :, first:last], dtype)
        if self.window is None or self.held is None or first == last:
            return keys
        blocks, rows, place = keys.unflatten(2, (-1, W)), torch.arange(len(keys), device=keys.device), self.held - first
        inside, place = (place >= 0) & (place < last - first), place.clamp(0, last - first - 1)
        blocks[rows, :, place] = torch.where(inside[:, None, None, None], self.window.to(dtype), blocks[rows, :, place])
        return keys[:, :, : part.stop - part.start]


@dataclass(frozen=True)
class Values:
    """Packed values: the arguments of the op."""

    codes: Tensor
    scales: Tensor
    fresh: Fresh | None = None

    @classmethod
    def of(cls, call: Call, which: Tensor | None) -> "Values":
        fresh = None if which is None or call.new_v is None else Fresh(call.new_v, which)
        return cls(call.v, call.v_scales, fresh)

    def dequantize(self, part: slice, seen: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, H, n, Dv] in fp32 or fp64: those of n positions, 0 where no token sees them (seen [B, T, n])."""
        codes, scales, shown = self.codes[:, :, part], self.scales[:, :, part], seen.any(1)
        unseen = ~shown[(slice(None), None, ..., *[None] * (scales.dim() - 3))]
        form = kv_attention.format_of(self.codes, self.scales)
        values = form.dequantize(codes, scales.masked_fill(unseen, 0), dtype)
        return values if self.fresh is None else self.fresh.over(values, part, shown)


def product(weights: Tensor, values: Tensor) -> Tensor:
    """[B, H, G, T, Dv] of weights [B, H, G, T, n] and values [B, H, n, Dv]."""
    return (weights.flatten(2, 3) @ values).unflatten(2, weights.shape[2:4])


def sink_scores(sinks: Tensor, like: Tensor) -> Tensor:
    """[B, H, G, T, 1] of sinks [Hq], as `like` [B, H, G, T, n] is."""
    B, H, G, T, _ = like.shape
    return sinks.to(like.dtype).view(H, G, 1, 1).expand(B, H, G, T, 1)


@kv_attention.reference
def _(*arguments):
    call = Call(*arguments)
    H, S = call.v.shape[1:3]
    whole, which = slice(0, S), stored_at(call)
    sight = Sight.of(call.positions, call.start, call.mask, call.window, H)
    seen = sight.seen(whole)
    keys = Keys.of(call, which).dequantize(whole, torch.float64)
    scores = scores_of(call.q.double().unflatten(1, (H, -1)), keys, seen, sight.mask, call.scale, call.softcap)
    if call.sinks is not None:
        scores = torch.cat([scores, sink_scores(call.sinks, scores)], -1)
    weights = scores.softmax(-1).masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0)[..., :S]
    values = Values.of(call, which).dequantize(whole, seen, torch.float64)
    return product(weights, values).flatten(1, 2).to(call.q.dtype)


@kv_attention.implementation("cuda", supports=cuda_kv_attention.supports)
def _(*arguments):
    call, case = Call(*arguments), kv_attention.known_case(*arguments)
    return cuda_kv_attention.attention(
        call.q, call.k, call.k_scales, call.v, call.v_scales, call.positions, call.start, call.mask, call.scale,
        call.softcap, call.window, call.k_window, call.k_held, call.sinks, case,
    )  # fmt: skip


@kv_attention.implementation("flash", supports=flash_kv_attention.supports)
def _(*arguments):
    """Tokens that are not one behind the other, at the same positions in all rows, go through "blocks"."""
    call = Call(*arguments)
    H, S = call.v.shape[1:3]
    stored = call.stored if call.fresh else None
    first = flash_kv_attention.beginning(call.positions, call.start, call.window, S, stored)
    if first is None:
        return kv_attention["blocks"].function(*arguments)
    of_keys, form = Keys.of(call, None), kv_attention.format_of(call.v, call.v_scales)

    def keys(part: slice) -> Tensor:
        return of_keys.dequantize(part, torch.float32)

    def values(part: slice) -> Tensor:
        return form.dequantize(call.v[:, :, part], call.v_scales[:, :, part], torch.float32)

    own = (call.new_k, call.new_v) if call.fresh else None
    return flash_kv_attention.attention(call.q, keys, values, own, of_keys.block, H, first, call.scale)


@kv_attention.implementation("blocks", supports=lambda case: True, standalone=True)
def _(*arguments):
    """In fp32, a block of tokens at a time, and for it blocks of positions; in a graph all tokens: T is symbolic."""
    call = Call(*arguments)
    (B, Hq, T, _), (H, S), dtype = call.q.shape, call.v.shape[1:3], call.q.dtype
    sight = Sight.of(call.positions, call.start, call.mask, call.window, H)
    q, which = call.q.unflatten(1, (H, -1)), stored_at(call)
    packed = Keys.of(call, which), Values.of(call, which)
    parts = [slice(None)]
    if not torch.compiler.is_exporting():
        few = max(SCORES.get(q.device.type, MANY_SCORES) // max(B * Hq * BLOCK, 1), 1)
        parts = [slice(first, first + few) for first in range(0, max(T, 1), few)]
    y = []
    for part in parts:
        tokens = sight.tokens(part)
        span = tokens.span(S)
        y.append(
            online(q[:, :, :, part].float(), *packed, tokens, span, call.scale, call.softcap, call.sinks).to(dtype)
        )
    return torch.cat(y, 3).flatten(1, 2)


def online(q, keys, values, sight, span, scale, softcap, sinks):
    """[B, H, G, T, Dv] fp32 of q [B, H, G, T, D] fp32, over a span of positions, with a running maximum and sum.

    Milakov and Gimelshein, Online normalizer calculation for softmax, 2018.
    """
    most = q.new_full((*q.shape[:4], 1), -torch.inf)
    total = torch.zeros_like(most)
    if sinks is not None:
        most, total = sink_scores(sinks, q), torch.ones_like(most)  # what was seen before all blocks; it has no value
    y = q.new_zeros(*q.shape[:4], kv_attention.fit(values.codes, values.scales)[1])
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
        y = y * kept + product(weights, values.dequantize(part, seen, torch.float32))
    return y / total.masked_fill(total == 0, 1)
