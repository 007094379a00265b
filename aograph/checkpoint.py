"""Models on disk: safetensors read one tensor at a time, and packed models written and read back bit for bit.

A packed folder is a Hugging Face folder (config, tokenizer) whose weights are in `packed.safetensors`, or in shards of
it with an index, under names that plain transformers looks for in vain. The header of each file holds, as JSON under
"aograph": the version of the format, the recipe, the versions of the ops, the passes left out, the tensors of each
pack with its error, and the tensors that are kept unpacked.
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import statistics
from .errors import InputError, WeightError
from .kernels.op import OPS
from .program import get_attribute, nbytes
from .recipe import Recipe
from .weights import Source

if TYPE_CHECKING:
    from .optimize import OptimizedModule
    from .weights import WeightStore

FORMAT = 1
PACKED = "packed"  # the stem of the files with packed weights
STATISTICS = f"{PACKED}.statistics.safetensors"  # those of a calibrated recipe
SHARD = 5 * 10**9  # bytes
TOKENIZER = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.spm", "spiece.model",
    "sentencepiece*.model", "chat_template*", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
WRITTEN = ("config.json", "generation_config.json", f"{PACKED}*.safetensors", f"{PACKED}.safetensors.index.json")


# --- reading -----------------------------------------------------------------------------------------------


class Checkpoint:
    """The tensors of `STEM.safetensors` in a folder, or of the shards that `STEM.safetensors.index.json` names.

    `shards` and `shapes` say of each tensor by name where it is and how large. A file is mapped, and only the one that
    was read last stays open: the host holds the pages of one shard at most.

    Raises `InputError` for files that are missing, broken or not what the index says, before a tensor is read.
    """

    def __init__(self, folder: Path, stem: str = "model"):
        self.folder = folder
        self.shards: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.metadata: dict[str, str] | None = None
        self.stamps: dict[Path, tuple[int, int]] = {}
        self.open: tuple[Path | None, Any] = (None, None)
        promised = self.promised(stem)
        for path in dict.fromkeys(promised.values()) or [folder / f"{stem}.safetensors"]:
            self.add(path)
        for name, path in promised.items():
            if self.shards.get(name) != path:
                raise InputError(
                    f"the index of {folder} puts the tensor {name} into {path.name}, where it is not: the folder mixes "
                    "files of several checkpoints, or the index is damaged; get it again"
                )

    def promised(self, stem: str) -> dict[str, Path]:
        """Where the index says that each tensor is; nothing if there is one file."""
        single, index = self.folder / f"{stem}.safetensors", self.folder / f"{stem}.safetensors.index.json"
        if single.is_file():
            return {}
        if not index.is_file():
            raise InputError(f"{self.folder} holds no {single.name} and no {index.name}{self.instead()}")
        try:
            files = json.loads(index.read_text())["weight_map"]
            missing = sorted({file for file in files.values() if not (self.folder / Path(file).name).is_file()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index} is no index of a checkpoint ({error!r}); get it again") from error
        if missing or not files:
            raise InputError(f"{index} names files that are not there: {listed(missing)}; get them, too")
        return {name: self.folder / Path(file).name for name, file in files.items()}

    def instead(self) -> str:
        found = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(self.folder.glob(pattern))]
        if not found:
            return ""
        return (
            f", only {listed(found)}: pickles are not read; convert them once with "
            "transformers.AutoModel.from_pretrained(folder).save_pretrained(new_folder), with the class of the model"
        )

    def add(self, path: Path) -> None:
        try:
            self.stamps[path] = stamp(path)
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                for name in file.keys():  # noqa: SIM118 (the file is no mapping)
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())
                    self.shards[name] = path
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is no whole safetensors file: {error}; get it again") from error
        if (self.metadata or metadata).get("aograph") != metadata.get("aograph"):
            raise InputError(f"{path} was not written together with the other files of its folder; save them again")
        self.metadata = metadata

    def read(self, name: str) -> Tensor:
        """A tensor on the CPU, in pages of the mapped file: copy it before the file may change."""
        path = self.shards[name]
        try:
            if self.open[0] != path:
                self.open = None, None  # unmaps the one before
                if stamp(path) != self.stamps[path]:
                    raise OSError("it has changed since the model was loaded")
                self.open = path, safe_open(path, framework="pt")
            return self.open[1].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise WeightError(
                f"the weight {name} cannot be read from {path}: {error}; keep the folder as it is as long as the model "
                "is called in new ways"
            ) from error


def stamp(path: Path) -> tuple[int, int]:
    """Size and time of the last change of a file."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


class Valueless(WeightError):
    """A tensor that only the model's code could have made, from values that are lost on the meta device."""


@dataclass
class Streamed(Source):
    """The weights of a model on meta, by its names, out of a checkpoint.

    keys: the names of the checkpoint by those of the model. Buffers that no checkpoint holds are the model's own.
    """

    model: nn.Module
    checkpoint: Checkpoint
    keys: Mapping[str, str]
    device: torch.device

    def check(self, name: str) -> None:
        if name not in self.keys and own(self.model, name) is None:
            raise Valueless(
                f"the model makes the tensor {name} of Python values at each call, which are lost on the meta device: "
                "load it with transformers, and hand it over to optimize"
            )

    def original(self, name: str) -> Tensor:
        if name not in self.keys:
            return own(self.model, name).to(self.device, copy=True)
        like = get_attribute(self.model, name)
        return self.checkpoint.read(self.keys[name]).to(self.device, like.dtype, copy=True)


def own(model: nn.Module, name: str) -> Any:
    """A tensor of a model that has values, such as a buffer that no checkpoint holds; None where there is none."""
    with contextlib.suppress(AttributeError):
        tensor = get_attribute(model, name)
        return None if tensor.is_meta else tensor
    return None


# --- the packed form ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contents:
    """What the header of a packed file says.

    format: version of these fields. package: version of aograph. recipe: as TOML. ops: versions by name. disabled:
    passes that were left out. packs: tensors of each pack in the file; errors: of each pack that is rounded. kept: the
    tensors in the file of what is not packed, by the model's names. statistics: the digest of those in the folder, if
    the recipe has some.
    """

    format: int
    package: str
    recipe: str
    ops: dict[str, int]
    disabled: list[str]
    packs: dict[str, list[str]]
    errors: dict[str, float]
    kept: dict[str, str]
    statistics: str | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Contents:
        """Raises `InputError` for what this version cannot read."""
        folder = checkpoint.folder
        try:
            fields = json.loads((checkpoint.metadata or {})["aograph"])
            if fields["format"] != FORMAT:
                raise InputError(
                    f"{folder} is packed in format {fields['format']} by aograph {fields.get('package')}; this aograph "
                    f"reads format {FORMAT}: update it, or pack the original checkpoint again"
                )
            contents = cls(**fields)
            used = {name for names in contents.packs.values() for name in names} | set(contents.kept.values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{folder} holds no packed weights of aograph: {error!r}") from error
        here = {op.name: op.version for op in OPS.values()}
        for name, version in contents.ops.items():
            if here.get(name) != version:
                known = f"knows version {here[name]}" if name in here else "does not know that op"
                raise InputError(
                    f"{folder} is packed for version {version} of {name}, and this aograph {known}: use aograph "
                    f"{contents.package}, or pack the original checkpoint again"
                )
        if absent := sorted(used - checkpoint.shards.keys()):
            raise InputError(f"{folder} lacks the tensors {listed(absent)}: save it again")
        return contents


@dataclass
class Repacked(Source):
    """The weights of a model on meta out of a packed folder."""

    model: nn.Module
    checkpoint: Checkpoint
    contents: Contents
    device: torch.device

    def check(self, name: str) -> None:
        if name not in self.contents.kept and own(self.model, name) is None:
            raise WeightError(
                f"{self.checkpoint.folder} does not hold the tensor {name} in the form that this call needs; it was "
                "packed for others: load the model from the original checkpoint for such calls"
            )

    def original(self, name: str) -> Tensor:
        kept = self.contents.kept
        tensor = self.checkpoint.read(kept[name]) if name in kept else own(self.model, name)
        return tensor.to(self.device, copy=True)

    def holds(self, key: str) -> bool:
        return key in self.contents.packs

    def packed(self, key: str) -> tuple[tuple[Tensor, ...], float | None]:
        tensors = tuple(self.checkpoint.read(n).to(self.device, copy=True) for n in self.contents.packs[key])
        return tensors, self.contents.errors.get(key)


def is_packed(folder: Path) -> bool:
    return any((folder / f"{PACKED}.safetensors{suffix}").is_file() for suffix in ("", ".index.json"))


# --- writing -----------------------------------------------------------------------------------------------


def save(optimized: OptimizedModule, folder: str | os.PathLike, shard_bytes: int = SHARD) -> None:
    """Writes a folder that `aograph.load_pretrained` reads without packing again: bit for bit the same weights.

    It holds the packed weights and those that are kept, the config, the generation config and the tokenizer's files, if
    the folder of the model has them; not the originals. What a capture has not needed so far is not in it.

    An existing folder is replaced, if it holds nothing that `save` did not write, and only by a whole new one. Raises
    `InputError` for any other folder, and for models that are not of transformers or were not captured yet.
    """
    model, folder = optimized._model[0], Path(folder).resolve()
    if not type(model).__module__.startswith("transformers."):
        raise InputError(
            f"{type(model).__name__} is no model of transformers, so that load_pretrained could not build it again: "
            "save state_dict(), or an artifact"
        )
    if optimized.report is None:
        raise InputError("nothing is packed before the first call: call the model, or give example_inputs")
    check_replaceable(folder)
    source = optimized._store.source
    if isinstance(source, Repacked) and source.checkpoint.folder.resolve() == folder:
        raise InputError(f"{folder} is where the model was loaded from, and may hold more than it: give another folder")
    fresh = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        fresh.mkdir(parents=True)
        write_weights(optimized, fresh, shard_bytes)
        write_settings(model, fresh)
        replace_folder(folder, fresh)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error}; what was there before is unchanged") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def write_weights(optimized: OptimizedModule, folder: Path, shard_bytes: int) -> None:
    from . import __version__

    store: WeightStore = optimized._store
    with store.lock:
        names = {id(tensor): name for name, tensor in store.names.items()}
        packs = {key: [names[id(tensor)] for tensor in tensors] for key, tensors in store.packed.items()}
        kept = {name: names[id(tensor)] for name, tensor in store.kept.items()}
        tensors = {names[id(tensor)]: tensor for tensor in store.names.values()}
        errors = dict(store.errors)
    used = {key.partition("|")[0] for key in packs}
    ops = {op.name: op.version for op in OPS.values() if op.name in used}
    disabled = sorted(optimized._disable)
    recipe, told = optimized.recipe, None
    if recipe.statistics:
        told = statistics.digest(recipe.statistics)
        statistics.write(folder / STATISTICS, recipe.statistics)
    contents = Contents(FORMAT, __version__, recipe.to_toml(), ops, disabled, packs, errors, kept, told)
    metadata = {"format": "pt", "aograph": json.dumps(asdict(contents))}

    shards = divide({name: nbytes(tensor) for name, tensor in tensors.items()}, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"{PACKED}{part}.safetensors"
        save_file({name: host(tensors[name]) for name in shard}, folder / file, metadata)
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(map(nbytes, tensors.values()))}, "weight_map": weight_map}
        (folder / f"{PACKED}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def write_settings(model: Any, folder: Path) -> None:
    """The config, marked as packed, the generation config, and the tokenizer's files."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.quantization_config = {"quant_method": "aograph"}
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    source = Path(getattr(model.config, "name_or_path", None) or "")
    for path in source.iterdir() if source.name and source.is_dir() else ():
        if path.is_file() and matches(path.name, TOKENIZER):
            shutil.copyfile(path, folder / path.name)


def divide(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names in shards of `most` bytes, in their order; what is larger has a shard of its own."""
    shards: list[list[str]] = [[]]
    room = most
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = most
        shards[-1].append(name)
        room -= size
    return shards


def host(tensor: Tensor) -> Tensor:
    """A tensor on the CPU that fills its storage, as the format wants it."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def check_replaceable(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: give a folder")
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    foreign = [name for name in there if not matches(name, WRITTEN + TOKENIZER)]
    if there and (foreign or not is_packed(folder)):
        raise InputError(
            f"{folder} holds {listed(foreign or there)}, which was not written by saving a packed model: give another "
            "folder, as saving replaces the whole of it"
        )


def replace_folder(folder: Path, fresh: Path) -> None:
    """Puts a whole new folder where there is an old one or none; until that is done, the old one is kept aside."""
    if not is_packed(folder):
        fresh.rename(folder)
        return
    aside = fresh.with_name(f"{fresh.name}.old")
    folder.rename(aside)
    try:
        fresh.rename(folder)
    except OSError:
        aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def same(given: Recipe, saved: Recipe) -> bool:
    """Whether two recipes ask for the same; whether a rule must match something plays no part, nor do statistics if the
    given one has none."""
    first, second = ([replace(rule, optional=False) for rule in recipe.rules] for recipe in (given, saved))
    return first == second and (not given.statistics or given.statistics == saved.statistics)


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" … ({len(names)} in all)" if len(names) > 8 else "")
