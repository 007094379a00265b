"""`load_pretrained`: from a Hugging Face folder to an optimized module, without the whole model anywhere in between."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from . import huggingface, statistics
from .checkpoint import PACKED, STATISTICS, Checkpoint, Contents, Repacked, Streamed, Valueless, is_packed, listed, same
from .errors import CaptureError, InputError, WeightError
from .generation import OptimizedPreTrained
from .optimize import OptimizedModule, call_of, resolve
from .recipe import Recipe
from .weights import Source

EXAMPLE_TOKENS = 16


@dataclass(frozen=True)
class LoadingReport:
    """How a checkpoint and its model fit, in the names of the model.

    unexpected: what the model does not have; it was left out. tied: what the checkpoint has under another name only.
    streamed: whether each weight was read when it was packed, rather than the whole model before. What a checkpoint
    lacks is an error, as packing what was never trained is of no use.
    """

    unexpected: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    streamed: bool = True


def load_pretrained(
    path: str | os.PathLike,
    recipe: Any = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    compile: bool = True,
    compile_options: Mapping[str, Any] | None = None,
    strict: bool = False,
    disable: Collection[str] | None = None,
    dump: str | os.PathLike | None = None,
    max_captures: int = 8,
    progress: bool = True,
) -> OptimizedModule:
    """The model of a Hugging Face folder, optimized while it is read: `optimize(from_pretrained(path), recipe)`.

    The model is built and captured without weights. Each weight is then read from safetensors, moved, packed and
    dropped before the next: the device never holds more than the packed model and one layer, the host one shard. Calls
    in other shapes read again what they need in another form, so the folder must stay. What cannot be read so is loaded
    whole on the CPU first, with a warning: checkpoints that transformers converts while it loads (experts that it
    merges) or that leave weights out which the model computes, and models that cannot be captured without weights.

    A folder that `save_pretrained` wrote is read as it is, nothing is packed again.

    path: a local folder with `model.safetensors`, or its shards and `model.safetensors.index.json`.
    recipe: as for `optimize`. None: "int4wo", or that of a packed folder, which takes no other.
    device: where to run and to pack. None: the CPU.
    dtype: of what is not packed. None: that of the config, else of the checkpoint.
    example_inputs: as for `optimize`. None: token ids or images, as the model takes them.
    disable: names of passes to leave out. None: none, or those of a packed folder.
    The others: as for `optimize`.

    `loading_report` of the result says how checkpoint and model fit; unexpected weights are a warning, too. Raises
    `InputError` for folders and options, `WeightError` for weights that are missing, of other shapes, or not finite,
    and what `optimize` raises.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: give a local one; huggingface_hub.snapshot_download(name) makes one")
    with huggingface.readable(folder):
        config, kind = huggingface.architecture(folder)
    packed = is_packed(folder)
    checkpoint = Checkpoint(folder, PACKED if packed else "model")
    if packed:
        contents = Contents.of(checkpoint)
        recipe = recipe_of(contents, folder, recipe)
        if dtype not in (None, config.dtype):
            raise InputError(
                f"{folder} is packed in {config.dtype}, not {dtype}: leave dtype out, or load the original checkpoint"
            )
        disable = contents.disabled if disable is None else disable
        del config.quantization_config
    elif method := (getattr(config, "quantization_config", None) or {}).get("quant_method"):
        raise InputError(f"{folder} is quantized already, by {method}: give the folder of the original weights")
    with huggingface.readable(folder):
        model = skeleton(kind, config, dtype or config.dtype or dtype_of(checkpoint))
        load_generation_config(model, folder)

    target = resolve(device or "cpu", model)
    parsed = Recipe.of("int4wo" if recipe is None else recipe)

    def optimized(model: Any, source: Source | None, report: LoadingReport) -> OptimizedModule:
        module: Any = OptimizedPreTrained(
            model, parsed, device=target, dynamic_shapes=dynamic_shapes, hand_over=source is None, compile=compile,
            compile_options=compile_options or {}, strict=strict, disable=disable or (), dump=dump,
            max_captures=max_captures, progress=progress, source=source,
        )  # fmt: skip
        module.eval()
        module.loading_report = report
        inputs = huggingface.example_inputs(model, EXAMPLE_TOKENS) if example_inputs is None else example_inputs
        module.add_capture(*call_of(inputs))
        return module

    if packed:
        return optimized(model, Repacked(model, checkpoint, contents, target), LoadingReport())
    fit = fit_of(model, checkpoint)
    reason = fit.why_whole
    if reason is None:
        warn_of(fit.unexpected, folder)
        try:
            source = Streamed(model, checkpoint, fit.keys, target)
            return optimized(model, source, LoadingReport(fit.unexpected, fit.tied))
        except (Valueless, CaptureError) as error:
            reason = str(error)
    warnings.warn(f"{folder} is loaded whole before it is packed: {reason}", stacklevel=2)
    model, report = load_whole(kind, folder, dtype)
    return optimized(model, None, report)


def recipe_of(contents: Contents, folder: Path, recipe: Any) -> Recipe:
    """The recipe of a packed folder; the caller may give the same."""
    saved = Recipe.from_toml(contents.recipe)
    if contents.statistics is not None:
        saved = replace(saved, statistics=statistics.read(folder / STATISTICS))
        if statistics.digest(saved.statistics) != contents.statistics:
            raise InputError(f"{folder} was not saved with the statistics in its {STATISTICS}: get the folder again")
    if recipe is not None and not same(Recipe.of(recipe), saved):
        raise InputError(
            f"{folder} is packed by the recipe {str(saved)!r}, not {str(Recipe.of(recipe))!r}: leave recipe out, or "
            "load the original checkpoint"
        )
    return saved


def load_whole(kind: Any, folder: Path, dtype: torch.dtype | None) -> tuple[Any, LoadingReport]:
    """The model with its weights on the CPU, as transformers loads it."""
    with huggingface.readable(folder):
        model, info = kind.from_pretrained(folder, dtype=dtype or "auto", output_loading_info=True)
    if info["missing_keys"]:
        raise lacking(folder, model, info["missing_keys"])
    unexpected = tuple(sorted(info["unexpected_keys"]))
    warn_of(unexpected, folder)
    return model.eval(), LoadingReport(unexpected, tuple(sorted(model.all_tied_weights_keys)), streamed=False)


def warn_of(unexpected: Collection[str], folder: Path) -> None:
    if unexpected:
        left_out = listed(sorted(unexpected))
        warnings.warn(
            f"{folder} holds weights that the model does not have, which are left out: {left_out}", stacklevel=3
        )


def lacking(folder: Path, model: Any, missing: Collection[str]) -> WeightError:
    return WeightError(
        f"{folder} lacks weights of {type(model).__name__}: {listed(sorted(missing))}; training starts them at random, "
        "so there is nothing to pack: give the checkpoint of that very model"
    )


# --- the model without weights -----------------------------------------------------------------------------


def skeleton(kind: Any, config: Any, dtype: torch.dtype) -> Any:
    """A model in eval mode whose parameters are on meta; buffers that no checkpoint holds have their values."""
    with parameters_on_meta():
        if hasattr(kind, "from_config"):  # AutoModel, for a config that names no class
            model = kind.from_config(config, dtype=dtype)
        else:
            model = kind._from_config(config, dtype=dtype)
    model.eval()
    for name, buffer in model.named_buffers():
        if name in model.state_dict():
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = buffer.to("meta")
    wide = model._get_dtype_plan(dtype)
    for name, parameter in model.named_parameters():
        if any(re.search(pattern.replace("*", ".*"), name) for pattern in wide):
            parameter.data = parameter.data.to(torch.float32)
    return model


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters of modules that this thread makes go to meta as they are registered: they are never initialized."""
    thread = threading.get_ident()

    def hook(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def dtype_of(checkpoint: Checkpoint) -> torch.dtype:
    """That of the first weight that is floating point."""
    dtypes = (checkpoint.read(name).dtype for name in checkpoint.shards)
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.get_default_dtype())


def load_generation_config(model: Any, folder: Path) -> None:
    """The defaults of `generate` from generation_config.json, else, as transformers does it, from config.json."""
    if not model.can_generate():
        return
    own = (folder / "generation_config.json").is_file()
    where = {} if own else {"config_file_name": "config.json", "_from_model_config": True}
    model.generation_config = type(model.generation_config).from_pretrained(folder, **where)


# --- its weights -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """Which tensor of a checkpoint is which of a model: `keys`, by the model's names; or `why_whole`, a reason for
    loading the checkpoint with transformers instead."""

    keys: dict[str, str] = field(default_factory=dict)
    unexpected: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    why_whole: str | None = None


def fit_of(model: Any, checkpoint: Checkpoint) -> Fit:
    """Matches names as transformers does: renamed ones, the prefix of a base model, tied weights, what to ignore.

    Unties weights of the model that the config ties, but for which the checkpoint has different values. Raises
    `WeightError` for weights that the checkpoint lacks, or has in other shapes.
    """
    state = model.state_dict(keep_vars=True)
    keys, others, converted = names_in(model, state, checkpoint.shards)
    if converted:
        return Fit(why_whole="transformers converts its weights while it loads them")
    wrong = [
        f"{name} {list(checkpoint.shapes[key])} instead of {list(state[name].shape)}"
        for name, key in keys.items()
        if checkpoint.shapes[key] != tuple(state[name].shape)
    ]
    if wrong:
        raise WeightError(f"weights of {checkpoint.folder} have other shapes than those of its config: {listed(wrong)}")
    for target, owner in list(model.all_tied_weights_keys.items()):
        if target in keys and owner in keys and not equal(checkpoint, keys[target], keys[owner]):
            untie(model, target)

    state = model.state_dict(keep_vars=True)
    found = {id(state[name]): key for name, key in keys.items()}
    missing = [name for name in state if id(state[name]) not in found]
    computed = [name for name in missing if any_matches(model._keys_to_ignore_on_load_missing, name)]
    if len(computed) < len(missing):
        raise lacking(checkpoint.folder, model, set(missing) - set(computed))
    if computed:
        return Fit(why_whole=f"it leaves out {listed(computed)}, which the model computes")
    tied = tuple(name for name in state if name not in keys)
    unexpected = tuple(name for name in others if not ignorable(model, name))
    return Fit({name: found[id(tensor)] for name, tensor in state.items()}, unexpected, tied)


def names_in(model: Any, state: dict[str, Tensor], names: Iterable[str]) -> tuple[dict[str, str], list[str], bool]:
    """The names of a checkpoint by those of the model, what the model does not have, and whether any is converted."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    keys: dict[str, str] = {}
    others: list[str] = []
    converted = False
    for key in sorted(names):
        name, how = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name, how = rename_source_key(key, [], [], model.base_model_prefix, state)
        if name in state:
            keys.setdefault(name, key)
            converted |= how is not None
        else:
            others.append(name)
    return keys, others, converted


def equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    return checkpoint.shapes[one] == checkpoint.shapes[other] and torch.equal(
        checkpoint.read(one), checkpoint.read(other)
    )


def untie(model: Any, name: str) -> None:
    """Gives the model a weight of its own, on meta, where it shares one."""
    owner, _, leaf = name.rpartition(".")
    shared = model.get_parameter(name)
    setattr(model.get_submodule(owner), leaf, nn.Parameter(torch.empty_like(shared), shared.requires_grad))
    del model.all_tied_weights_keys[name]


def ignorable(model: Any, name: str) -> bool:
    """Whether transformers leaves out a weight without a word: buffers that older versions saved, mostly."""
    old = [r"rotary_emb\.inv_freq"] if any(n.endswith("rotary_emb.inv_freq") for n, _ in model.named_buffers()) else []
    old += [r"(^|\.)position_ids$"] if any(n.endswith("position_ids") for n, _ in model.named_buffers()) else []
    return any_matches([*(model._keys_to_ignore_on_load_unexpected or ()), *old], name)


def any_matches(patterns: Iterable[str] | None, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())
