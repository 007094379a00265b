"""Long prompts of Hugging Face models through packed caches: in chunks, and without a mask of tokens by positions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from . import huggingface
from .decoding import parts

CHUNK = 2048  # tokens of a prompt that go through the model at once
ALONG = {"input_ids": 1, "inputs_embeds": 1, "position_ids": -1}  # the dimension of tokens, by argument


def is_packed(cache: Any) -> bool:
    return isinstance(cache, huggingface.cache_kind("PackedCache") or ())


def masks(attention_mask: Tensor | None, inputs_embeds: Tensor, **given: Any) -> Any:
    """What `generate` makes of its mask [B, n] for a static cache: T × S booleans, where that is not packed.

    For one that is packed only the mask itself [B, S], as the graph knows how far each token sees; None for tokens of a
    prompt where it hides nothing.
    """
    cache = huggingface.cache_of(given)
    if not is_packed(cache):
        return huggingface.masks_for_generate(attention_mask=attention_mask, inputs_embeds=inputs_embeds, **given)
    if attention_mask is None or (inputs_embeds.shape[1] > 1 and bool(attention_mask.all())):
        return None
    return F.pad(attention_mask.bool(), (0, cache.max_cache_len - attention_mask.shape[1]))


def chunks(call: dict[str, Any], size: int) -> Iterator[dict[str, Any]]:
    """The arguments of a forward, in parts of at most `size` tokens; whole, where it is not known how to part them."""
    parted = {name: call[name] for name in ALONG if isinstance(call.get(name), Tensor)}
    mask = call.get("attention_mask")
    others = [name for name, value in call.items() if isinstance(value, Tensor) and name not in parted]
    length = max((each.shape[ALONG[name]] for name, each in parted.items()), default=0)
    known = is_packed(huggingface.cache_of(call)) and (mask is None or getattr(mask, "ndim", 0) == 2)
    kept = any(call.get(name) for name in ("output_hidden_states", "output_attentions"))
    if length <= size or not known or kept or any(name != "attention_mask" for name in others):
        yield call
        return
    sizes = parts(length, size)
    pieces = {name: each.split(sizes, ALONG[name]) for name, each in parted.items()}
    for i in range(len(sizes)):
        yield call | {name: each[i].contiguous() for name, each in pieces.items()}
