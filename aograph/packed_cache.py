"""A static cache of transformers whose keys and values are packed, for every way to run a model of transformers.

What a model stores goes through `aograph::kv_update`, and what attention gets is `aograph::kv_dequantize` of all of it.
That is the same eagerly, behind `torch.compile` and in a captured graph; the pass `packed_attention` then makes of an
unpacked cache and the attention that reads it one `aograph::kv_attention`.

Importing this imports transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticCache, StaticLayer, StaticSlidingWindowLayer

from . import huggingface
from .capture import on_meta
from .decoding import CacheShape, NoSteps, layer_shapes
from .errors import InputError
from .kernels.kv_dequantize import kv_dequantize
from .kernels.kv_update import kv_update
from .optimize import OptimizedModule
from .recipe import Recipe
from .report import Row
from .schemes import KVCache

WHOLE = StaticLayer, StaticSlidingWindowLayer  # kinds of layers that hold the last tokens, all if there is room
SHAPES: WeakKeyDictionary[nn.Module, tuple[Any, list[CacheShape]]] = WeakKeyDictionary()  # with what they depend on


class PackedLayer(StaticLayer):
    """The cache of one layer; `keys` and `values` are codes and scales, by channel also the window and its blocks."""

    keys: Any
    values: Any

    def __init__(self, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], written: Tensor):
        length = values[0].shape[2]
        super().__init__(max_cache_len=length, sliding_window=length)
        self.keys, self.values, self.cumulative_length = keys, values, written
        self.batch_size, self.num_heads = values[0].shape[:2]
        self.device, self.is_initialized = written.device, True

    @classmethod
    def empty(cls, shape: CacheShape, rows: int, length: int, device: torch.device) -> PackedLayer:
        keys, values = (
            form.empty(rows, shape.heads, length, D, device, shape.dtype) for D, form in shape.parts if form is not None
        )
        layer = cls(keys, values, torch.zeros((), dtype=torch.int64, device=device))
        for tensor in layer.tensors:
            torch._dynamo.mark_static_address(tensor)
            torch._dynamo.mark_static(tensor)
        return layer

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return *self.keys, *self.values, self.cumulative_length

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Stores new keys and values [B, H, T, D] behind those that are there; all of them, in full precision."""
        count = key_states.shape[2]
        positions = torch.arange(count, device=self.device) + self.cumulative_length
        found = []
        for (codes, scales, *window), new in ((self.keys, key_states), (self.values, value_states)):
            kv_update.overload(codes, scales, new, positions, *window)
            found.append(kv_dequantize.overload(codes, scales, new.dtype, *window))
        self.cumulative_length.add_(count)
        return found[0], found[1]

    def get_seq_length(self) -> Any:
        """Tokens stored so far; a tensor of its own: a mask_mod of FlexAttention reads it after `update`."""
        found = super().get_seq_length()
        return found.clone() if isinstance(found, Tensor) else found

    def reset(self) -> None:
        """Forgets all tokens; the tensors stay where they are."""
        for tensor in self.tensors:
            tensor.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was; the tensors stay where they are."""
        for tensor in (*self.keys, *self.values):
            tensor = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
            tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))

    def flatten(self) -> tuple[list[Tensor], list[Any]]:
        return list(self.tensors), [type(self).__name__, len(self.keys), len(self.values)]

    @classmethod
    def unflatten(cls, leaves: Iterator[Any], context: list[Any]) -> PackedLayer:
        keys, values = (tuple(next(leaves) for _ in range(count)) for count in context[1:])
        return cls(keys, values, next(leaves))


class PackedWindowLayer(PackedLayer, StaticSlidingWindowLayer):
    """The cache of a layer that sees the newest tokens alone, as many as there are slots: the oldest is in the first.

    As in the layer of transformers, all move by one slot for one token more. Where several come and not all that they
    see has room, attention gets what was there, unpacked, and the new ones as they are. Keys are packed by token.
    """

    is_croppable = False  # tokens that have left are gone

    def __init__(self, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], written: Tensor, seen: int = 0):
        super().__init__(keys, values, written)
        self.cumulative_length_int = seen

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        count, seen, room = key_states.shape[2], self.cumulative_length_int, self.max_cache_len
        if seen + count <= room:
            found = super().update(key_states, value_states)
            self.cumulative_length_int = seen + count
            return found
        self.cumulative_length_int = seen + count
        full = seen >= room
        kept = slice(1, None) if full else slice(0, seen)  # of what was there, what new tokens see
        states = []
        for packed, new in ((self.keys, key_states), (self.values, value_states)):
            old = None
            if not (full and count == 1) and seen > 0:
                old = kv_dequantize.overload(*packed, new.dtype)[:, :, kept]
            if count < room:
                shift(packed, count if full else seen + count - room)
            stored = min(count, room) if isinstance(count, int) else room if count >= room else count
            positions = torch.arange(stored, device=self.device) + (room - stored)
            kv_update.overload(*packed, new[:, :, count - stored :], positions)
            if full and count == 1:
                states.append(kv_dequantize.overload(*packed, new.dtype))
            else:
                states.append(new if old is None else torch.cat([old, new], 2))
        return states[0], states[1]

    def reset(self) -> None:
        super().reset()
        self.cumulative_length_int = 0

    def flatten(self) -> tuple[list[Tensor], list[Any]]:
        leaves, context = super().flatten()
        return [*leaves, huggingface.sized(self, "cumulative_length_int", self.device)], context

    @classmethod
    def unflatten(cls, leaves: Iterator[Any], context: list[Any]) -> PackedWindowLayer:
        keys, values = (tuple(next(leaves) for _ in range(count)) for count in context[1:])
        return cls(keys, values, next(leaves), next(leaves).shape[0])


def shift(packed: tuple[Tensor, ...], slots: int) -> None:
    """Moves what a cache by token holds towards the front."""
    for tensor in packed:
        tensor = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
        tensor.copy_(tensor.roll(-slots, 2))


class PackedCache(StaticCache):
    """A static cache that holds keys and values as the rules of a recipe say that are for caches.

    Give it to a model of transformers or to its `generate`, as it is, behind `torch.compile`, or optimized: as `cache`,
    or as `past_key_values`, its name before transformers 5.24. `aograph.optimize(model, "kv8").generate` makes one by
    itself. `reset` begins a new text, `reorder_cache` is for beams. Rules name caches `key_0`, `value_0` … by layer; a
    layer is packed where both are, and else it is transformers' own. Layers that slide over fewer tokens than the cache
    holds keep those alone, keys by token.

    model: a causal language model, compiled or not, or what `optimize` made of one.
    recipe: as for `aograph.optimize`; None: that of an optimized model.
    batch_size: rows; of beams, and sequences that are returned, each has one.
    max_cache_len: tokens of a row, rounded up to whole blocks of 64 where keys are packed by channel. Writing past the
        end is an error; on a GPU it stops the device, as indexing does, but `generate` of optimized models asks first.
    device: None: where the model is.

    Outside of graphs that aograph rewrites, each attention unpacks the cache of its layer as a whole. Raises
    `InputError` for a recipe without such rules, and a model whose layers keep something else or heads that do not fit.
    """

    def __init__(
        self,
        model: Any,
        recipe: Any = None,
        batch_size: int = 1,
        max_cache_len: int = 2048,
        device: torch.device | str | None = None,
    ):
        if recipe is None and not hasattr(model, "recipe"):
            raise InputError("PackedCache needs a recipe with a rule for caches, such as 'kv8'")
        parsed = model.recipe if recipe is None else Recipe.of(recipe)
        target = torch.device(device) if device is not None else model.device
        model = original(model)
        shapes = shapes_of(model)
        kept = [packed_shape(shape, parsed, i) for i, shape in enumerate(shapes)]
        block = max((form.block or 1 for shape in kept if shape for _, form in shape.parts if form), default=1)
        length = -(-max_cache_len // block) * block
        super().__init__(model.config, max_cache_len=length)
        self.room = length
        layers: list[Any] = self.layers
        for i, (layer, plain, shape) in enumerate(zip(layers, shapes, kept, strict=True)):
            if shape is not None and type(layer) in WHOLE and layer.max_cache_len == length:
                layers[i] = PackedLayer.empty(shape, batch_size, length, target)
            elif shape is not None and type(layer) is StaticSlidingWindowLayer:
                shape = packed_shape(plain, parsed, i, by_token=True) or shape
                layers[i] = PackedWindowLayer.empty(shape, batch_size, layer.max_cache_len, target)
            else:
                layer.lazy_initialization(*plain.empty(batch_size, 0, target))
        if not any(isinstance(layer, PackedLayer) for layer in layers):
            raise InputError(
                f"the recipe {str(parsed)!r} packs no cache of {type(model).__name__}: it needs a rule such as kv8, "
                "and the model a layer that attends to all tokens"
            )

    @property
    def max_cache_len(self) -> int:
        """Tokens of a row, in layers that hold all of them."""
        return self.room

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of one row in all packed layers."""
        found = 0
        for layer in self.layers:
            if isinstance(layer, PackedLayer):
                found += sum(t.nbytes for packed in (layer.keys, layer.values) for t in packed[:2]) // (
                    layer.batch_size * layer.max_cache_len
                )
        return found


def original(model: Any) -> Any:
    """The model of transformers behind what `torch.compile` or `optimize` made of it."""
    model = getattr(model, "_orig_mod", model)
    return model._model[0] if isinstance(model, OptimizedModule) else model


def shapes_of(model: Any) -> list[CacheShape]:
    """What the layers of a model put into a cache. Raises `InputError` where that is not keys and values alone."""
    known = model.dtype, model.config.get_text_config().num_hidden_layers
    if SHAPES.get(model, (None,))[0] != known:
        twin: Any = copy.copy(model)
        twin.__dict__.pop("forward", None)  # where it was compiled
        twin = on_meta(twin)
        twin.set_attn_implementation("eager")  # others do not all run on meta
        try:
            SHAPES[model] = known, layer_shapes(twin)
        except NoSteps as error:
            raise InputError(f"{type(model).__name__} cannot have a packed cache: {error}") from error
    return SHAPES[model][1]


def packed_shape(shape: CacheShape, recipe: Recipe, layer: int, by_token: bool = False) -> CacheShape | None:
    """The cache of a layer with its formats; None where a recipe does not pack both keys and values.

    by_token: whether keys are packed as values are.
    """
    formats: dict[str, Any] = {}
    for kind, D in (("key", shape.key_size), ("value", shape.value_size)):
        row = Row(f"{kind}_{layer}", "kv_update", "", None, shape.dtype, tokens=0)
        decision = recipe.decide(row)
        scheme = decision[1].scheme if decision is not None else None
        if not isinstance(scheme, KVCache):
            return None
        keys = kind == "key" and not by_token
        if reason := scheme.refuse_head(D, keys):
            raise InputError(f"{row.name} cannot be packed by {scheme}: {reason}; keep it by the rule {row.name}:none")
        formats[f"{kind}_format"] = scheme.packed_format(keys)
    return replace(shape, **formats)


huggingface.register_pytrees()
