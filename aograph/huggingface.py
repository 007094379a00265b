"""What Hugging Face models need: their folders, and their caches as inputs and outputs of graphs.

Importing this imports no transformers.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import InputError


def load(folder: Path, dtype: torch.dtype | None, tokens: int) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a folder in eval mode, of the class that its config names, and example inputs: `tokens` token ids
    for a batch of two, or a batch of two images.

    Raises `InputError` if transformers is missing, or the folder holds no model that it knows.
    """
    with readable(folder):
        _, kind = architecture(folder)
        model = kind.from_pretrained(folder, dtype=dtype or "auto").eval()
    return model, example_inputs(model, tokens)


@contextlib.contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Raises `InputError` if transformers is missing, or cannot read the folder."""
    try:
        yield
    except ImportError as error:
        if error.name != "transformers":
            raise
        raise InputError("a Hugging Face folder needs transformers: pip install aograph[hf]") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds no model that transformers can load: {error}") from error


def architecture(folder: Path) -> tuple[Any, Any]:
    """The config of a folder, and the class that it names."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    return config, getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)


def example_inputs(model: Any, tokens: int) -> dict[str, Any]:
    """Inputs by keyword: `tokens` token ids for a batch of two, or a batch of two images."""
    config, name = model.config, getattr(model, "main_input_name", "input_ids")
    if name == "pixel_values":
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        return {name: torch.zeros(2, getattr(config, "num_channels", 3), size, size, dtype=model.dtype)}
    text = config.get_text_config()
    ids = torch.arange(2 * tokens).view(2, tokens) % text.vocab_size
    inputs: dict[str, Any] = {name: ids}
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        inputs["decoder_input_ids"] = ids
    return inputs | ({"use_cache": False} if hasattr(text, "use_cache") else {})


def calls_on_text(model: Any, folder: Path, text: str, tokens: int) -> list[dict[str, Any]]:
    """Inputs by keyword: the token ids of a text in windows of `tokens`, one a call; what fills no window is left out.

    Raises `InputError` for models that take no text, and texts that are shorter than a window.
    """
    import transformers

    example = example_inputs(model, tokens)
    if "input_ids" not in example:
        raise InputError(
            f"{type(model).__name__} takes {', '.join(example)}, no text: use aograph.calibrate from Python"
        )
    with readable(folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids
    windows = [window for window in ids.split(tokens, dim=1) if window.shape[1] == tokens]
    if not windows:
        raise InputError(f"the text has {ids.shape[1]} tokens, less than one window of {tokens}: give a longer one")
    return [{name: w if isinstance(value, Tensor) else value for name, value in example.items()} for w in windows]


def is_pretrained(model: nn.Module) -> bool:
    """Whether a model is one of transformers; none is before that is imported."""
    return "transformers" in sys.modules and isinstance(model, sys.modules["transformers"].PreTrainedModel)


def masks_for_generate(**given: Any) -> Any:
    """What `generate` of transformers makes of a mask for a static cache."""
    return sys.modules["transformers.masking_utils"].create_masks_for_generate(**given)


# --- caches as pytrees -------------------------------------------------------------------------------------
#
# The leaves of a cache are tensors alone. Numbers that change from call to call, such as how many tokens were seen,
# travel as the size of a tensor [n, 0]: sizes are what torch.export makes symbolic, so one graph serves all of them.
# What remains in the context says which graphs a call fits: the kinds of layers and their settings.


@dataclass(frozen=True)
class LayerKind:
    """What the layers of one class hold besides keys and values, by the names of their attributes: numbers that
    change from call to call, and settings that do not, of which a version of transformers may lack some. Static ones
    are written in place and count in a tensor."""

    static: bool = False
    numbers: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()


LAYERS = {
    "DummyLayer": LayerKind(),
    "DynamicLayer": LayerKind(),
    "DynamicSlidingWindowLayer": LayerKind(numbers=("cumulative_length",), settings=("sliding_window", "record_past")),
    "StaticLayer": LayerKind(static=True),
    "StaticSlidingWindowLayer": LayerKind(static=True, numbers=("cumulative_length_int",), settings=("_is_croppable",)),
    "PackedLayer": LayerKind(static=True),
    "PackedWindowLayer": LayerKind(static=True),
}

ABOUT_KEYS = "dtype", "device"  # what a layer says of its keys; the first until transformers 5.23
SIZES: WeakKeyDictionary[Any, dict[str, Tensor]] = WeakKeyDictionary()  # by layer and name of the number


def flatten_layer(layer: Any) -> tuple[list[Tensor], list[Any]]:
    """The tensors of a cache layer, and its context: class, what it says of its keys if it is filled, settings."""
    name = type(layer).__name__
    if name not in LAYERS:
        raise InputError(
            f"a cache with layers of the class {name} cannot go in or out of a captured graph; "
            f"those that can: {', '.join(LAYERS)}"
        )
    if name.startswith("Packed"):
        return layer.flatten()
    kind, filled = LAYERS[name], layer.keys is not None
    device = layer.keys.device if filled else None
    leaves = [layer.keys, layer.values] if filled else []
    if kind.static:
        leaves.append(layer.cumulative_length if filled else sized(layer, "max_cache_len", device))
    leaves += [sized(layer, number, device) for number in kind.numbers]
    about = [each for each in ABOUT_KEYS if filled and each in vars(layer)]
    return leaves, [name, about, {each: getattr(layer, each) for each in kind.settings if hasattr(layer, each)}]


def sized(layer: Any, number: str, device: torch.device | None) -> Tensor:
    """A tensor [n, 0] for a number n of a layer; the same one while n is: torch.export finds tensors by identity."""
    known, n = SIZES.setdefault(layer, {}), getattr(layer, number)
    if number not in known or known[number].shape[0] != n:
        known[number] = torch.empty(n, 0, device=device)
    return known[number]


def unflatten_layer(leaves: Iterator[Any], context: list[Any]) -> Any:
    """The layer that a context describes; takes its tensors from `leaves`."""
    if context[0].startswith("Packed"):
        return getattr(sys.modules[PACKED], context[0]).unflatten(leaves, context)
    name, about, settings = context
    kind, state, filled = LAYERS[name], dict(settings), bool(about)
    if filled:
        keys, values = next(leaves), next(leaves)
        state |= {"keys": keys, "values": values, "is_initialized": True}
        state |= {each: getattr(keys, each) for each in about}
    if kind.static:
        last = next(leaves)
        capacity = keys.shape[2] if filled else last.shape[0]
        settings = {"max_cache_len": capacity, "sliding_window": capacity}
    if kind.static and filled:
        sizes = dict(zip(("batch_size", "num_heads", "max_cache_len", "k_head_dim"), keys.shape, strict=True))
        state |= {"cumulative_length": last, "v_head_dim": values.shape[-1], **sizes}
    layer = getattr(sys.modules["transformers.cache_utils"], name)(**settings)
    vars(layer).update(state, **{number: next(leaves).shape[0] for number in kind.numbers})
    return layer


def flatten_layers(cache: Any) -> tuple[list[Tensor], list[Any]]:
    if cache.offloading:
        raise InputError("a cache that offloads its layers cannot go in or out of a captured graph")
    parts = [flatten_layer(layer) for layer in cache.layers]
    return [leaf for leaves, _ in parts for leaf in leaves], [context for _, context in parts]


def unflatten_layers(kind: Any, leaves: Iterable[Any], context: list[Any]) -> Any:
    """A cache of a class that is a list of layers; a dynamic one that has none yet adds them as they are needed."""
    waiting = iter(leaves)
    cache = kind.__new__(kind)
    cache.layers = [unflatten_layer(waiting, each) for each in context]
    cache.layer_class_to_replicate = None if context else sys.modules["transformers.cache_utils"].DynamicLayer
    cache.offloading = False
    return cache


def flatten_pair(cache: Any) -> tuple[list[Any], list[Any]]:
    """The two caches of an encoder-decoder model; whether the cross-attention of each layer is filled is context."""
    return [cache.self_attention_cache, cache.cross_attention_cache], sorted(map(list, cache.is_updated.items()))


def unflatten_pair(kind: Any, caches: Iterable[Any], context: list[Any]) -> Any:
    cache = kind.__new__(kind)
    cache.self_attention_cache, cache.cross_attention_cache = caches
    cache.is_updated = {layer: updated for layer, updated in context}
    return cache


PACKED = "aograph.packed_cache"  # imported by those who pack caches, as it imports transformers
CACHES = {
    "DynamicCache": (flatten_layers, unflatten_layers),
    "StaticCache": (flatten_layers, unflatten_layers),
    "PackedCache": (flatten_layers, unflatten_layers),
    "EncoderDecoderCache": (flatten_pair, unflatten_pair),
}


def register_pytrees() -> None:
    """Lets cache objects of transformers, if that is imported, go in and out of captured graphs.

    Replaces what others have registered for these classes: transformers' own forms leave out how far a sliding window
    has moved, copy the cache at every call, or hold numbers that fit one call only.
    """
    if "transformers" not in sys.modules:
        return
    for name, (flatten, unflatten) in CACHES.items():
        if (kind := cache_kind(name)) is None:
            continue
        known = pytree.SUPPORTED_NODES.get(kind)
        if known is not None and known.flatten_fn is flatten:
            continue
        if known is not None:
            pytree._deregister_pytree_node(kind)
        pytree.register_pytree_node(
            kind,
            flatten,
            functools.partial(unflatten, kind),
            serialized_type_name=f"{kind.__module__}.{name}",
            flatten_with_keys_fn=functools.partial(with_keys, flatten),
        )


def cache_kind(name: str) -> Any:
    """A class of caches by its name; None where nobody has imported it."""
    module = PACKED if name == "PackedCache" else "transformers.cache_utils"
    return getattr(sys.modules.get(module), name, None)


def with_keys(flatten: Callable[[Any], tuple[list[Any], Any]], cache: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """What flattening gives, each with a key, of which torch.export makes the name of an input."""
    children, context = flatten(cache)
    layers = enumerate(getattr(cache, "layers", ()))
    names = [f"layers_{i}_{name}" for i, layer in layers for name in leaf_names(layer)] or map(str, range(2))
    return [(pytree.MappingKey(name), child) for name, child in zip(names, children, strict=False)], context


def leaf_names(layer: Any) -> list[str]:
    """Names for the tensors of a cache layer, in the order of `flatten_layer`."""
    parts = {kind: getattr(layer, kind) for kind in ("keys", "values") if layer.keys is not None}
    counts = {kind: len(part) if isinstance(part, tuple) else 1 for kind, part in parts.items()}
    names = [f"{kind}_{i}" for kind, count in counts.items() for i in range(count)]
    return names + [f"state_{i}" for i in range(len(flatten_layer(layer)[0]) - len(names))]


# --- caches of a call --------------------------------------------------------------------------------------

NAMES = "cache", "past_key_values"  # of the argument: since transformers 5.24, and before


def cache_argument(forward: Callable[..., Any]) -> str | None:
    """What a forward calls the cache that it takes; None where it takes none."""
    taken = inspect.signature(forward).parameters
    return next((name for name in NAMES if name in taken), None)


def cache_of(call: Mapping[str, Any]) -> Any:
    """The cache among arguments by keyword, whatever it is called there; None where there is none."""
    return next((call[name] for name in NAMES if call.get(name) is not None), None)


def caches(values: Any) -> list[Any]:
    """The caches in the arguments of a call. Raises `InputError` for one of a class that no graph can take."""
    base = sys.modules["transformers.cache_utils"].Cache
    found = [v for v in pytree.tree_leaves(values, is_leaf=lambda v: isinstance(v, base)) if isinstance(v, base)]
    for cache in found:
        if type(cache) is not cache_kind(type(cache).__name__) or type(cache).__name__ not in CACHES:
            raise InputError(
                f"a {type(cache).__name__} cannot go in or out of a captured graph; those that can: {', '.join(CACHES)}"
            )
    return found


def packed_tensors(values: Any) -> set[int]:
    """The identities of tensors that packed caches in the arguments of a call hold."""
    kind = cache_kind("PackedCache")
    found = pytree.tree_leaves(values, is_leaf=lambda v: kind is not None and isinstance(v, kind))
    return {id(t) for cache in found if kind is not None and isinstance(cache, kind) for t in pytree.tree_leaves(cache)}


def with_caches(outputs: Any, given: list[Any]) -> Any:
    """The outputs of a call with the caches that it was given, brought up to date, in place of those that came back."""
    base = sys.modules["transformers.cache_utils"].Cache
    waiting = iter(given)

    def kept(new: Any) -> Any:
        return update_cache(next(waiting), new) if isinstance(new, base) else new

    outputs = pytree.tree_map(kept, outputs, is_leaf=lambda v: isinstance(v, base))
    if next(waiting, None) is not None:
        raise InputError(
            "the model was given a cache and returned none, so that is not up to date: give use_cache=True"
        )
    return outputs


def update_cache(cache: Any, new: Any) -> Any:
    """Gives a cache the state of one that a graph returned; its static tensors stay where they are.

    A graph has written them already. Those that it made itself are copied to a place of their own: the memory of what
    a CUDA graph returns is used again by the next replay.
    """
    if hasattr(cache, "is_updated"):
        update_cache(cache.self_attention_cache, new.self_attention_cache)
        update_cache(cache.cross_attention_cache, new.cross_attention_cache)
        cache.is_updated = new.is_updated
        return cache
    for layer, other in zip(cache.layers, new.layers, strict=False):
        static, filled = LAYERS[type(layer).__name__].static, layer.is_initialized
        for name, value in vars(other).items():
            if not (static and isinstance(value, (Tensor, tuple))):
                setattr(layer, name, value)
            elif not filled and isinstance(value, Tensor):
                setattr(layer, name, settled(value))
    cache.layers += new.layers[len(cache.layers) :]
    return cache


def settled(tensor: Tensor) -> Tensor:
    """A copy whose address CUDA graphs may rely on."""
    tensor = tensor.clone()
    torch._dynamo.mark_static_address(tensor)
    return tensor
