"""Decoding with a static cache: the step of a language model as a graph takes it, and the loop around it.

A step computes T tokens of B rows, each row at positions of its own, so that rows may be at different places of
different texts. Its inputs are tensors alone: `input_ids` and `positions` [B, T] int64, then for each layer i `key_i`
and `value_i` [B, H, S, D], the cache, which it writes in place: the keys and values of a token go to index `position`
of its row, and nothing else changes. A token sees what is at its own position and before. The output is `logits`
[B, V], in fp32 or the model's dtype, of the last of the T tokens. Under a recipe with a rule for caches a graph takes
codes and scales (`kernels/kv_cache.py`) in the place of each cache that the rule packs.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import huggingface
from .archive import DTYPES
from .capture import eval_mode
from .errors import InputError
from .kernels.kv_cache import KVFormat

LAYERS = ("full_attention", "sliding_attention")  # kinds whose state is the keys and values of tokens
DEFAULT_LENGTH = 2048  # tokens
TEMPERATURES = 1e-3, 1e6  # beyond them logits / temperature may overflow, and a draw from NaN stops a GPU


class NoSteps(Exception):
    """Why a model has no step with a static cache, in one sentence."""


@dataclass(frozen=True)
class CacheShape:
    """The cache of one layer: its key and value are [rows, heads, length, key_size or value_size] in `dtype`, or what
    `key_format` or `value_format` packs that into."""

    heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype
    key_format: KVFormat | None = None
    value_format: KVFormat | None = None

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> CacheShape:
        """From what `as_data` gives."""
        formats = {name: data[name] and KVFormat(**data[name]) for name in ("key_format", "value_format")}
        return cls(**{**data, **formats, "dtype": DTYPES[data["dtype"]]})

    def as_data(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "dtype": str(self.dtype).removeprefix("torch.")}

    @property
    def parts(self) -> list[tuple[int, KVFormat | None]]:
        return [(self.key_size, self.key_format), (self.value_size, self.value_format)]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of one row."""
        sizes = (form.token_bytes(D) if form else D * self.dtype.itemsize for D, form in self.parts)
        return self.heads * sum(sizes)

    def empty(self, rows: int, length: int, device: torch.device) -> list[Tensor]:
        found: list[Tensor] = []
        for D, form in self.parts:
            sizes = rows, self.heads, length, D
            found += form.empty(*sizes, device) if form else [torch.zeros(sizes, dtype=self.dtype, device=device)]
        return found


class StaticRows:
    """What a language model of transformers asks of its cache, on tensors [B, H, S, D] that are the caller's."""

    is_compileable = True

    def __init__(self, layers: Sequence[Sequence[Tensor]], positions: Tensor):
        self.layers, self.positions = layers, positions
        self.rows = torch.arange(positions.shape[0], device=positions.device)[:, None]
        self.is_sliding = [False] * len(layers)

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> Sequence[Tensor]:
        for cache, new in zip(self.layers[layer], (keys, values), strict=True):
            cache[self.rows, :, self.positions] = new.transpose(1, 2)
        return self.layers[layer]

    def get_seq_length(self, *_: Any) -> int:
        return 0


class Recorder(StaticRows):
    """A cache that keeps nothing but the shapes that it is given."""

    def __init__(self, positions: Tensor):
        super().__init__([], positions)
        self.shapes: list[CacheShape] = []

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> Sequence[Tensor]:
        self.shapes.append(CacheShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype))
        return keys, values


def step_of(model: nn.Module, layers: int, length: int) -> nn.Module:
    """A module that shares everything with `model`, names included, and computes a step with a cache of `length`."""

    def forward(input_ids: Tensor, positions: Tensor, *cache: Tensor) -> Tensor:
        pairs = list(zip(cache[::2], cache[1::2], strict=True))
        return run(model, input_ids, positions, StaticRows(pairs, positions), length)

    names = ["input_ids", "positions", *(f"{kind}_{layer}" for layer in range(layers) for kind in ("key", "value"))]
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in names]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    step = copy.copy(model)
    step.forward = forward
    return step


def run(model: nn.Module, input_ids: Tensor, positions: Tensor, cache: StaticRows, length: int) -> Tensor:
    """The logits [B, V] of the last token."""
    mask = masks(model, positions, length)
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    given: dict[Any, Any] = {huggingface.cache_argument(model.forward): cache, **last}
    outputs = model(input_ids=input_ids, position_ids=positions, attention_mask=mask, use_cache=True, **given)
    return outputs.logits[:, -1]


def masks(model: Any, positions: Tensor, length: int) -> Tensor | dict[str, Tensor]:
    """What tokens see of a cache, [B, 1, T, length]; by kinds of layers, where some slide over fewer tokens.

    Booleans; where attention adds its mask, zeros and what hides.
    """
    config = model.config.get_text_config() if hasattr(model, "config") else None
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    index, last = torch.arange(length, device=positions.device), positions[:, :, None]
    full = (index <= last)[:, None]
    if window is None or window >= length:
        found = {"full_attention": full}
    else:
        slides = full & (index > last - window)[:, None]
        found = {kind: slides if kind == "sliding_attention" else full for kind in kinds or ["sliding_attention"]}
    if getattr(config, "_attn_implementation", None) == "eager":
        hidden = torch.finfo(model.dtype).min
        found = {
            kind: torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, hidden) for kind, mask in found.items()
        }
    return found if len(found) > 1 else next(iter(found.values()))


def default_length(model: nn.Module) -> int:
    """Tokens for a cache whose length nobody asked for: as many as the model knows, but at most 2048."""
    config = getattr(model, "config", None)
    return min(DEFAULT_LENGTH, getattr(config, "max_position_embeddings", None) or DEFAULT_LENGTH)


@torch.no_grad()
def cache_shapes(model: Any, length: int) -> list[CacheShape]:
    """The caches of the layers of a language model of transformers.

    Raises `NoSteps` where it has no step with a static cache of `length` tokens.
    """
    if not getattr(model, "can_generate", bool)():
        raise NoSteps(f"{type(model).__name__} is no language model of transformers that generates")
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        raise NoSteps(f"{type(model).__name__} has an encoder")
    missing = {"position_ids", "attention_mask"} - inspect.signature(model.forward).parameters.keys()
    if huggingface.cache_argument(model.forward) is None:
        missing.add("cache")
    if missing:
        raise NoSteps(f"{type(model).__name__} takes no {' and no '.join(sorted(missing))}")
    if other := set(getattr(config, "layer_types", None) or ()) - set(LAYERS):
        raise NoSteps(f"the state of its layers of type {', '.join(sorted(other))} is not keys and values of tokens")
    weight = next(model.parameters())  # all are on one device
    shapes = layer_shapes(model)
    if not weight.is_meta:
        with eval_mode(model):
            check_step(model, shapes, weight.device)
    return shapes


@torch.no_grad()
def layer_shapes(model: Any) -> list[CacheShape]:
    """What each layer of a language model of transformers puts into a cache, by running it on four tokens.

    Raises `NoSteps` where it does not run so, or not all layers keep keys and values.
    """
    positions = torch.arange(4, device=next(model.parameters()).device)[None]
    recorder = Recorder(positions)
    try:
        with eval_mode(model):
            run(model, positions, positions, recorder, 4)
    except Exception as error:
        raise NoSteps(f"it does not run with a cache of keys and values: {first_line(error)}") from error
    layers = model.config.get_text_config().num_hidden_layers
    if len(recorder.shapes) != layers:
        raise NoSteps(f"{len(recorder.shapes)} of its {layers} layers keep keys and values")
    return recorder.shapes


def check_step(model: nn.Module, shapes: Sequence[CacheShape], device: torch.device) -> None:
    """Raises `NoSteps` unless four tokens at once and two more one by one give the logits of the model itself.

    Attention that slides does so over three tokens.
    """
    ids = torch.arange(1, 7, device=device)[None]
    positions = ids - 1
    cache = [tensor for shape in shapes for tensor in shape.empty(1, 8, device)]
    step = step_of(model, len(shapes), 8)
    with narrow_window(model, 3):
        expected = model(input_ids=ids, use_cache=False).logits.float()
        for start, stop in ((0, 4), (4, 5), (5, 6)):
            try:
                logits = step.forward(ids[:, start:stop], positions[:, start:stop], *cache).float()
            except Exception as error:
                raise NoSteps(f"it does not run with a static cache: {first_line(error)}") from error
            if not (logits - expected[:, stop - 1]).norm() <= 0.05 * expected[:, stop - 1].norm():
                raise NoSteps(
                    "with a static cache it computes something else: it does not follow the mask or positions"
                )


@contextlib.contextmanager
def narrow_window(model: Any, tokens: int) -> Iterator[None]:
    """Layers that slide over tokens do so over a few."""
    config: Any = model.config.get_text_config() if hasattr(model, "config") else None
    before = getattr(config, "sliding_window", None)
    if before is None:
        yield
        return
    config.sliding_window = tokens
    try:
        yield
    finally:
        config.sliding_window = before


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --- the loop ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How the next token is picked: the likeliest, or one drawn from the softmax of logits / temperature.

    temperature: from 0.001 to a million. top_k: only the k likeliest are drawn. top_p: only the likeliest that
    together have that probability.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        least, most = TEMPERATURES
        if not least <= self.temperature <= most:
            raise InputError(
                f"temperature is {self.temperature}, not from {least} to {most:g}: for the likeliest, do_sample=False"
            )
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k is {self.top_k}: it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}: it must be above 0 and at most 1")

    def pick(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The next tokens [B] of logits [B, V]."""
        if not self.do_sample:
            return logits.argmax(-1)
        scores = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if self.top_p is not None:
            ordered, index = scores.sort(descending=True)
            shares = ordered.softmax(-1)
            beyond = shares.cumsum(-1) - shares >= self.top_p  # what comes before has the probability already
            scores = scores.masked_fill(beyond.scatter(-1, index, beyond), -torch.inf)
        return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]


def parts(tokens: int, most: int) -> list[int]:
    """The sizes of the parts of a prompt, at most `most` tokens each; the last has more than one if it can."""
    sizes = [most] * (tokens // most) + [tokens % most] * (tokens % most > 0)
    if len(sizes) > 1 and sizes[-1] == 1 < most - 1:
        sizes[-2:] = most - 1, 2
    return sizes


def prompts_of(input_ids: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    """The tokens of each row of input_ids [B, T], what the mask leaves out (on the left) being taken away."""
    if attention_mask is None:
        return list(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise InputError(f"attention_mask is {list(attention_mask.shape)}, input_ids {list(input_ids.shape)}")
    mask = attention_mask.bool()
    if (mask[:, 1:] < mask[:, :-1]).any():
        raise InputError("attention_mask hides tokens behind the first that it shows: pad prompts on the left")
    return [row[keep] for row, keep in zip(input_ids, mask, strict=True)]


def generate(
    prefill: Callable[[int, Tensor], Tensor],
    decode: Callable[[Tensor, Tensor], Tensor],
    prompts: Sequence[Tensor],
    rows: int,
    limit: int,
    sampling: Sampling,
    ends: Sequence[int],
    pad: int,
    generator: torch.Generator | None,
    on_token: Callable[[int, int], Any] | None,
) -> Tensor:
    """New tokens [B, ≤ limit] for prompts; rows that have ended are filled up with `pad`.

    prefill(row, prompt) and decode(tokens [rows, 1], positions [rows, 1]) give logits [1, V] and [rows, V]; rows past
    the prompts are idle.
    """
    logits = torch.cat([prefill(row, prompt) for row, prompt in enumerate(prompts)])
    device, count = logits.device, len(prompts)
    tokens = torch.zeros(rows, 1, dtype=torch.int64, device=device)
    positions = torch.zeros_like(tokens)
    positions[:count, 0] = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ended = torch.zeros(count, dtype=torch.bool, device=device)
    stops = torch.tensor(list(ends), dtype=torch.int64, device=device)
    found: list[Tensor] = []
    while True:
        new = sampling.pick(logits, generator).masked_fill(ended, pad)
        found.append(new)
        if on_token is not None:
            for row in (~ended).nonzero()[:, 0].tolist():
                on_token(row, int(new[row]))
        ended |= torch.isin(new, stops)
        if len(found) == limit or ended.all():
            return torch.stack(found, 1)
        tokens[:count, 0] = new
        logits = decode(tokens, positions)[:count]
        positions[:count] += 1
