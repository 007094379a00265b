"""Hugging Face models: `generate` on captured graphs, with caches that stay the caller's own."""

from __future__ import annotations

import copy
import os
import warnings
from types import SimpleNamespace
from typing import Any

from torch import nn

from . import huggingface, prompts
from .capture import stand_in
from .errors import InputError, RecipeError
from .optimize import OptimizedModule
from .recipe import Recipe, Rule
from .schemes import CACHE

ROOM = 256  # tokens: packed caches that `generate` makes are a multiple of it long


class OptimizedPreTrained(OptimizedModule):
    """A Hugging Face model whose graph was rewritten by a recipe; call it, or its `generate`, as the model's.

    `config`, `generation_config`, `device` and `dtype` are as the model's; `generation_config` is a copy. A cache that
    is passed in is updated, as the model does it, and is the one in the outputs.

    An encoder-decoder model has its encoder in `encoder`, as `generate` calls that by itself: a module of its own with
    a report of its own, on the same packed weights.
    """

    def __init__(self, model: Any, recipe: Recipe, **options: Any):
        divided = getattr(model.config, "is_encoder_decoder", False)
        if divided:
            recipe = optional_rules(recipe, model)
        super().__init__(model, recipe, **options)
        self.config, self.dtype = model.config, model.dtype
        self.encoder: OptimizedModule | None = None
        self._longest = 0  # tokens, of packed caches that `generate` has made
        self._chunk = prompts.CHUNK  # tokens, of this call of `generate`
        members: dict[str, Any] = {"device": property(lambda _: self.device)}
        if divided:
            called = stand_in(model, lambda whole, *args, **kwargs: whole.get_encoder()(*args, **kwargs))
            optimized = self.encoder = OptimizedModule(called, recipe, **options)
            optimized.eval()
            optimized._store = self._store
            encoder = stand_in(model.get_encoder(), lambda _, *args, **kwargs: optimized(*args, **kwargs))
            members["get_encoder"] = lambda *_, **__: encoder
        members["_prepare_static_cache"] = lambda shell, *args, **kwargs: self._static_cache(shell, *args, **kwargs)
        members["_prepare_cache_for_generation"] = lambda shell, *args, **kwargs: self._prepare_cache(
            shell, *args, **kwargs
        )
        if not hasattr(model, "create_masks_for_generate"):  # one that has it makes masks of its own kind
            members["create_masks_for_generate"] = lambda _, **given: prompts.masks(**given)
        shell = stand_in(model, lambda _, *args, **kwargs: self._step(*args, **kwargs), **members)
        shell.generation_config = copy.deepcopy(getattr(model, "generation_config", None))  # BERT has none
        self._shell = [shell]  # in a list: not a submodule

    @property
    def generation_config(self) -> Any:
        """The defaults of `generate`: a copy of the model's, to be changed or replaced at will."""
        return self._shell[0].generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self._shell[0].generation_config = config

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generates tokens, as `generate` of the model does and with its parameters.

        Under a recipe with a rule for caches the cache is an `aograph.PackedCache`, made here or given, unless
        `cache_implementation` names another than "static"; a warning says where it cannot be. With a packed cache a
        prompt goes through the model in chunks of `prefill_chunk_size` tokens, 2048 unless given, so that no activation
        is longer; a call that asks for hidden states or attentions takes it whole.

        Raises `InputError` where the model cannot generate, for a packed cache that the text may outgrow, for a
        `compile_config` (the graphs are compiled as `optimize` was told), and for a cache that no graph can take.
        """
        model = self._shell[0]
        if not model.can_generate():
            raise InputError(f"{type(model).__name__} has no generate: it has no head that predicts tokens")
        if kwargs.get("compile_config") is not None:
            raise InputError("the graphs of an optimized module are compiled as compile_options of optimize say: "
                             "leave compile_config out")  # fmt: skip
        if isinstance(assistant := kwargs.get("assistant_model"), OptimizedPreTrained):
            kwargs["assistant_model"] = assistant._shell[0]
        if packs_caches(self.recipe) and self._makes_cache(kwargs):
            kwargs["cache_implementation"] = "static"
        return model.generate(*args, **{**kwargs, "disable_compile": True})

    def _makes_cache(self, options: dict[str, Any]) -> bool:
        """Whether a cache that `generate` makes may be packed: nobody has named one. Warns of what cannot have one."""
        config = options.get("generation_config") or self.generation_config

        def given(name: str) -> Any:
            return options.get(name, getattr(config, name, None))

        named = any(given(name) is not None for name in (*huggingface.NAMES, "cache_implementation"))
        if named or given("use_cache") is False:
            return False
        guessed = any(given(name) is not None for name in ("assistant_model", "prompt_lookup_num_tokens"))
        if (
            reason := "the model has an encoder"
            if self.encoder
            else guessed and "assisted generation takes tokens back"
        ):
            warnings.warn(f"the cache stays as it is: {reason}", stacklevel=3)
        return not reason

    def _prepare_cache(
        self, shell: Any, generation_config: Any, model_kwargs: dict, generation_mode: Any, batch_size: int,
        max_cache_length: int,
    ) -> None:  # fmt: skip
        """What transformers asks for a cache. Raises `InputError` for a packed one that the text may outgrow.

        Where it is packed, chunks of the prompt are ours: those of transformers 5.17 begin anew in each call.
        """
        cache = huggingface.cache_of(model_kwargs)
        if prompts.is_packed(cache) and max_cache_length > cache.max_cache_len:
            raise InputError(
                f"the cache has room for {cache.max_cache_len} tokens, but the text may take {max_cache_length}: make "
                "it longer, or give a lower max_new_tokens"
            )
        prepare: Any = type(self._model[0])._prepare_cache_for_generation  # type: ignore[attr-defined]
        prepare(shell, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
        if prompts.is_packed(huggingface.cache_of(model_kwargs)):
            size = getattr(generation_config, "prefill_chunk_size", None)
            if size is not None and size < 1:
                raise InputError(f"prefill_chunk_size is {size}: it must be at least 1")
            self._chunk, generation_config.prefill_chunk_size = size or prompts.CHUNK, None

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        """A forward of `generate`: the outputs of the last chunk."""
        outputs = None
        for chunk in prompts.chunks(kwargs, self._chunk):
            outputs = self(*args, **chunk)
        return outputs

    def _static_cache(
        self, shell: Any, cache_implementation: str, batch_size: int, max_cache_len: int, *rest: Any, **options: Any
    ) -> Any:
        """What transformers asks for in place of its own static cache: a packed one, where a rule packs caches.

        It has room to spare, as a graph is captured for one length alone.
        """
        if packs_caches(self.recipe) and not self.encoder and cache_implementation == "static":
            from .packed_cache import PackedCache

            self._longest = max(self._longest, -(-max_cache_len // ROOM) * ROOM)
            try:
                return PackedCache(self, batch_size=batch_size, max_cache_len=self._longest)
            except InputError as error:
                warnings.warn(f"the cache stays as it is: {error}", stacklevel=2)
        prepare: Any = type(self._model[0])._prepare_static_cache  # type: ignore[attr-defined]
        return prepare(shell, cache_implementation, batch_size, max_cache_len, *rest, **options)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes the packed weights, the config and the recipe, for `aograph.load_pretrained`."""
        from . import checkpoint

        checkpoint.save(self, folder)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = huggingface.caches((args, kwargs))
        outputs = super().forward(*args, **kwargs)
        return huggingface.with_caches(outputs, given) if given else outputs


def packs_caches(recipe: Recipe) -> bool:
    return any(rule.scheme.kind == CACHE for rule in recipe.rules)


def optional_rules(recipe: Recipe, model: nn.Module) -> Recipe:
    """A recipe for graphs that have an encoder, a decoder or both, so that rules for the other have nothing to match.

    Raises `RecipeError` for a rule whose name is that of no module, parameter or buffer of the whole model.
    """
    parts = model.named_modules(), model.named_parameters(), model.named_buffers()
    names = [name for named in parts for name, _ in named]
    for rule in recipe.rules:
        if rule.name is not None and not rule.optional:
            named = Rule(rule.scheme, name=rule.name.partition("[")[0] if "re:" not in rule.name else rule.name)
            kind = rule.scheme.kind
            if not any(named.matches(SimpleNamespace(name=name, kind=kind)) for name in names):  # type: ignore[arg-type]
                raise RecipeError(f"no module of the model has a name that the rule {rule} selects")
    return recipe.lenient()
