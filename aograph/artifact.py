"""Artifacts: compiled graphs and their weights, loaded from one file, without the model's source."""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from . import environment, repacking
from .archive import ABOUT, CODE, FORMAT, TOKENIZER, Archive
from .capture import flatten
from .decoding import CacheShape, Sampling, first_line, generate, parts, prompts_of
from .errors import ArtifactError, InputError
from .kernels.op import OPS
from .report import megabytes
from .signature import ALIGNMENT, Signature, outline, tree

CHUNK = 512  # tokens of a prompt that a graph takes at once: its scores are for an eighth of the cache
CACHE = re.compile(r"(key|value)_\d+(_codes|_scales)?$")  # inputs of prefill and decode
RUNNERS = 4  # calls of one graph that may be under way on a GPU at a time


class Gate:
    """Many calls at a time, or one change: a change waits for the calls under way, new calls wait for the change."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.calls, self.changes = 0, 0

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        with self.condition:
            self.condition.wait_for(lambda: not self.changes)
            self.calls += 1
        try:
            yield
        finally:
            with self.condition:
                self.calls -= 1
                self.condition.notify_all()

    @contextlib.contextmanager
    def change(self) -> Iterator[None]:
        with self.condition:
            self.changes += 1
            try:
                self.condition.wait_for(lambda: not self.calls)
                yield
            finally:
                self.changes -= 1
                self.condition.notify_all()


class Graph:
    """One compiled graph of an artifact."""

    def __init__(self, path: Path, name: str, about: Mapping[str, Any], device: torch.device):
        self.name, self.device = name, device
        self.signature = Signature.of({key: about[key] for key in Signature.__dataclass_fields__})
        runners, index = (RUNNERS, device.index) if device.type == "cuda" else (1, -1)
        self.loader = torch._C._aoti.AOTIModelPackageLoader(str(path), name, False, runners, index)
        self.exclusive = bool(about["buffers"])  # it writes what other calls read
        self.lock = threading.Lock()
        self.constants: dict[str, Tensor] = {}

    def use(self, constants: Mapping[str, Tensor]) -> None:
        """Makes these the weights; they are not copied."""
        self.constants = dict(constants)
        self.loader.load_constants(self.constants, False, True, True)

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The flat outputs for checked inputs. The list is this call's own: the compiled code takes it apart."""
        with self.lock if self.exclusive else contextlib.nullcontext(), on(self.device):
            return self.loader.boxed_run(list(tensors))

    def flat(self, values: Sequence[Any], contents: bool = True) -> list[Tensor]:
        """Calls with flat inputs, checked; `contents`: the numbers in them, too."""
        return self.run(self.signature.check(values, self.device, contents))

    def __str__(self) -> str:
        inputs, outputs = (outline_of(s, v) for s, v in self.sides)
        return f"{self.name}{inputs} → {outputs}"

    @property
    def sides(self) -> list[tuple[Any, Any]]:
        return [(self.signature.takes, self.signature.inputs), (self.signature.gives, self.signature.outputs)]


def outline_of(container: Any, values: Sequence[Any]) -> str:
    return outline(container, iter([str(value) for value in values]))


def on(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class Artifact:
    """What `load` gives: call it as the model was called when it was captured.

    Containers of the outputs are lists, tuples and dicts; of other classes, such as the outputs of transformers, they
    are dicts whose keys are attributes too, so that loading needs no other package.

    graphs: by name, `forward`, and for language models `prefill` and `decode`. about: all that the file says about
    itself. recipe (TOML), report (of `forward`, as `Report.as_dict`), environment (that it was compiled for): parts of
    it. Calls may come from several threads, each sees the weights before or after an update, never a mixture; on the
    CPU they take turns, and each uses the threads of torch.
    """

    def __init__(self, path: Path, contents: Archive, about: dict[str, Any], device: torch.device):
        self.path, self.about, self.device = path, about, device
        self.recipe: str = about["recipe"]
        self.environment: dict[str, Any] = about["environment"]
        self.report: dict[str, Any] = about["graphs"]["forward"]["report"]
        self.tokenizer_files = {
            name.removeprefix(TOKENIZER): contents.read(name) for name in contents.records if name.startswith(TOKENIZER)
        }
        self._gate = Gate()
        self._tensors = load_tensors(contents, device)
        self.graphs = {name: Graph(path, name, each, device) for name, each in about["graphs"].items()}
        self._use()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        flat, spec = flatten(args, kwargs)
        graph = self.graphs["forward"]
        if tree(spec) != graph.signature.takes:
            given = outline(tree(spec), iter(["…"] * len(flat)))
            raise InputError(
                f"the call has the inputs {given}; it was saved with "
                f"{outline_of(graph.signature.takes, graph.signature.inputs)}"
            )
        with self._gate.call(), torch.no_grad():
            return graph.signature.result(graph.flat(flat))

    # Language models --------------------------------------------------------------------------------------

    @property
    def generation(self) -> dict[str, Any]:
        """batch_size, max_length, cache shapes and special tokens of a language model."""
        if self.about["generation"] is None:
            raise InputError(f"{self.path} has {'; '.join(self.about['notes'])}")
        return self.about["generation"]

    def new_cache(self, rows: int | None = None) -> list[Tensor]:
        """An empty cache [key_0, value_0, key_1, …], each [rows, H, max_length, D]; by default batch_size rows.

        Where the recipe packs it, the codes and the scales of each come in its place.
        """
        rows = self.generation["batch_size"] if rows is None else rows
        shapes = map(CacheShape.of, self.generation["cache"])
        return [t for shape in shapes for t in shape.empty(rows, self.generation["max_length"], self.device)]

    def prefill(
        self, input_ids: Tensor, cache: Sequence[Tensor], row: int = 0, positions: Tensor | None = None
    ) -> Tensor:
        """The logits [1, V] behind a prompt [1, T], whose keys and values are written to a row of the cache.

        positions: [1, T], the places of the tokens in the row, by default 0 … T - 1; a prompt may come in parts.
        """
        with self._gate.call():
            return self._prefill(input_ids, cache, row, positions)

    def decode(self, tokens: Tensor, positions: Tensor, cache: Sequence[Tensor]) -> Tensor:
        """The logits [batch_size, V] behind one token [batch_size, 1] at the position [batch_size, 1] of each row.

        Rows may be at different positions. The keys and values of an idle row's token are written, too: give it a
        position whose content nobody needs, such as 0 of a row that will be prefilled.
        """
        with self._gate.call():
            return self._decode(tokens, positions, cache)

    def _prefill(self, input_ids: Tensor, cache: Sequence[Tensor], row: int, positions: Tensor | None = None) -> Tensor:
        if positions is None:
            positions = torch.arange(input_ids.shape[-1], device=self.device)[None]
        if input_ids.shape == positions.shape == (1, 1):  # the graph takes two or more: the token twice, in one place
            input_ids, positions = input_ids.expand(1, 2), positions.expand(1, 2)
        self._check_positions(positions)
        rows = [tensor[row : row + 1] for tensor in cache]
        aligned = [part.clone() if part.data_ptr() % ALIGNMENT else part for part in rows]  # rows of few scales are not
        shorter = [(input_ids, positions)]  # parts of the prompt
        if input_ids.shape == positions.shape and input_ids.shape[-1] > CHUNK:
            sizes = parts(input_ids.shape[-1], CHUNK)  # cloned below: they may begin at any address
            shorter = list(zip(input_ids.split(sizes, -1), positions.split(sizes, -1), strict=True))
        for ids, places in shorter:
            (logits,) = self.graphs["prefill"].flat([ids.clone(), places.clone(), *aligned])
        for part, written in zip(rows, aligned, strict=True):
            if written is not part:
                part.copy_(written)
        return logits

    def _decode(self, tokens: Tensor, positions: Tensor, cache: Sequence[Tensor]) -> Tensor:
        self._check_positions(positions)
        on_cpu = self.device.type == "cpu"  # a GPU would be waited for at each token
        (logits,) = self.graphs["decode"].flat([tokens, positions, *cache], contents=on_cpu)
        return logits

    def _check_positions(self, positions: Tensor) -> None:
        """On the CPU; on a GPU a look at the values would wait for it, and the compiled code checks its indices."""
        length = self.generation["max_length"]
        if positions.device.type == "cpu" and ((positions < 0) | (positions >= length)).any():
            raise InputError(f"positions are {positions.tolist()}; the cache has places 0 to {length - 1}")

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        attention_mask: Tensor | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        on_token: Callable[[int, int], Any] | None = None,
    ) -> Tensor:
        """The prompts [B, T] with up to max_new_tokens more, B ≤ batch_size: [B, T + new] int64.

        attention_mask: [B, T], 0 where a prompt is padded on the left. do_sample: draw tokens, by temperature, top_k
        and top_p; else the likeliest is taken. seed: of the draws; None: torch's generator. eos_token_id: what ends a
        row, by default the model's; a row that has ended is filled up with the padding token, or what ended it.
        on_token(row, token) is called for each new token as it comes.

        Raises `InputError` for what does not fit the cache.
        """
        about = self.generation
        rows, length = about["batch_size"], about["max_length"]
        if input_ids.ndim != 2 or input_ids.dtype is not torch.int64 or not 0 < len(input_ids) <= rows:
            raise InputError(
                f"input_ids is {list(input_ids.shape)} {input_ids.dtype}; expected int64 [B, T] with B from 1 to "
                f"{rows}, the batch_size that the artifact was saved with"
            )
        input_ids = input_ids.to(self.device)
        prompts = prompts_of(input_ids, None if attention_mask is None else attention_mask.to(self.device))
        longest, shortest = max(map(len, prompts)), min(map(len, prompts))
        if max_new_tokens < 1 or not shortest or longest + max_new_tokens > length:
            raise InputError(
                f"prompts of {shortest} to {longest} tokens and max_new_tokens = {max_new_tokens}: at least one token "
                f"each, and together at most {length}, the max_length that the artifact was saved with"
            )
        ends = about["eos_token_id"] if eos_token_id is None else eos_token_id
        ends = [ends] if isinstance(ends, int) else list(ends)
        pad = about["pad_token_id"] if about["pad_token_id"] is not None else ends[0] if ends else 0
        generator = None if seed is None else torch.Generator(self.device).manual_seed(seed)
        sampling = Sampling(do_sample, temperature, top_k, top_p)
        cache = self.new_cache()
        with self._gate.call(), torch.no_grad():  # one gate for all steps: they see the same weights
            new = generate(
                lambda row, prompt: self._prefill(prompt[None], cache, row),
                lambda tokens, positions: self._decode(tokens, positions, cache),
                prompts, rows, max_new_tokens, sampling, ends, pad, generator, on_token,
            )  # fmt: skip
        return torch.cat([input_ids, new], 1)

    def extract_tokenizer(self, folder: str | os.PathLike) -> None:
        """Writes the tokenizer's files to a folder, for `AutoTokenizer.from_pretrained`."""
        if not self.tokenizer_files:
            raise InputError(f"{self.path} was saved without a tokenizer")
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self.tokenizer_files.items():
            (Path(folder) / Path(name).name).write_bytes(content)

    # Weights ----------------------------------------------------------------------------------------------

    def update_weights(self, state: Mapping[str, Tensor]) -> int:
        """Packs new values of the model's own tensors, given by name, and puts them in place; how many packs that was.

        A part of the state will do, but tensors that are packed together must come together. Calls under way end with
        the weights that they began with. Where anything does not fit, nothing changes.

        Raises `InputError` naming what is unknown, missing, of another shape or dtype, or not finite.
        """
        with torch.no_grad():
            new, packs = repacking.new_weights(self.about, state, self.device)
        for key, tensor in new.items():
            old = self._tensors[key]
            if (old.shape, old.dtype) != (tensor.shape, tensor.dtype):
                raise InputError(f"the constant {key[1]} of {key[0]} would become {tensor.dtype} {list(tensor.shape)}")
        with self._gate.change():
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._tensors |= new
            self._use()
        return packs

    def _use(self) -> None:
        for name, graph in self.graphs.items():
            graph.use({n: tensor for (owner, n), tensor in self._tensors.items() if owner == name})


def load_tensors(contents: Archive, device: torch.device) -> dict[tuple[str, str], Tensor]:
    """The weights by graph and name, one tensor for each record, on the device."""
    made: dict[str, Tensor] = {}
    for entry in contents.index:
        if entry.record not in made:
            made[entry.record] = contents.tensor(entry).to(device)
    return {(entry.graph, entry.name): made[entry.record] for entry in contents.index}


def load(path: str | os.PathLike, *, device: torch.device | str | None = None, check: bool = True) -> Artifact:
    """Loads what `OptimizedModule.save` wrote.

    The code in an artifact is native code that runs in this process: load only files that you trust, as with any
    program. Nothing in it is unpickled.

    device: which GPU, by default the current one. check: compare the checksums of the weights, which reads them all.

    Raises `ArtifactError` for a file that is damaged, is no artifact, or does not fit this machine.
    """
    path = Path(path)
    contents, about = open_archive(path)
    kind = about["environment"]["device"]
    target = torch.device(kind if device is None else device)
    if target.type != kind:
        raise ArtifactError(f"{path} was compiled for {kind}, not for {target}: save the model for {target.type}")
    if kind == "cuda" and target.index is None and torch.cuda.is_available():
        target = torch.device("cuda", torch.cuda.current_device())
    wrong = environment.misfits(about["environment"], target if kind == "cuda" else None) + missing_ops(about)
    if wrong:
        raise ArtifactError(f"{path} does not fit this machine: {'; '.join(wrong)}")
    weights = {entry.record for entry in contents.index}
    contents.check(name for name in contents.records if check or name not in weights)
    try:
        return Artifact(path, contents, about, target)
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"the graphs in {path} could not be loaded: {first_line(error)}") from error


def inspect(path: str | os.PathLike) -> dict[str, Any]:
    """What a file says about itself, its sizes in bytes, and under `misfits` what does not fit this machine.

    Nothing of its code is loaded. Raises `ArtifactError` for a file that is damaged or is no artifact.
    """
    contents, about = open_archive(Path(path))
    contents.check(contents.records)

    def size(prefix: str) -> int:
        return sum(length for name, (_, length, _) in contents.records.items() if name.startswith(prefix))

    sizes = {"file": len(contents.bytes), "weights": size("weights/"), "code": size(CODE), "tokenizer": size(TOKENIZER)}
    return {**about, "bytes": sizes, "misfits": environment.misfits(about["environment"]) + missing_ops(about)}


def summary(about: Mapping[str, Any]) -> str:
    """What `inspect` gives, for a reader."""
    built = about["environment"]
    place = f"{built.get('gpu', built['processor'])} ({built.get('architecture', built['machine'])})"
    rows = [
        ["made by", f"aograph {about['aograph']}, torch {built['torch']}, on {built['system']}"],
        ["for", f"{built['device']}: {place}"],
        ["fits this machine", "no: " + "; ".join(about["misfits"]) if about["misfits"] else "yes"],
        *([part, megabytes(size)] for part, size in about["bytes"].items()),
        ["recipe", f"sha256 {about['recipe_sha256'][:16]}…\n{about['recipe'].strip()}"],
    ]
    if about["generation"]:
        rows.append(["cache", cache_of(about["generation"])])
    for name, each in about["graphs"].items():
        signature = Signature.of({key: each[key] for key in Signature.__dataclass_fields__})
        rows.append([f"graph {name}", ""])
        rows += [["", f"{value}"] for value in signature.inputs if not CACHE.match(value.name)]
        if cache := [value for value in signature.inputs if CACHE.match(value.name)]:
            rows.append(["", f"{cache[0]} … {cache[-1]}, written in place"])
        rows += [["", f"→ {value}"] for value in signature.outputs]
        limits = [f"{s} from {low} to {'∞' if high is None else high}" for s, (low, high) in signature.ranges.items()]
        rows += [["", text] for text in (*limits, *signature.guards)]
        rows += [["", f"{count} × {op} by {kernel}"] for op, kernel, count in each["kernels"]]
        rows += [["", f"calls aograph::{op}: runs only where this package is, not in C++"] for op in each["outside"]]
        rows += [["", f"not checked at a call: {text}"] for text in each["unread"]]
    rows += [["note", note] for note in about["notes"]]
    return tabulate(rows, tablefmt="plain", maxcolwidths=[None, 100])


def cache_of(generation: Mapping[str, Any]) -> str:
    """What holds the keys and values of a language model, for a reader."""
    shapes = list(map(CacheShape.of, generation["cache"]))
    forms = dict.fromkeys(
        form.name if form else str(s.dtype).removeprefix("torch.") for s in shapes for _, form in s.parts
    )
    rows, length, each = generation["batch_size"], generation["max_length"], sum(s.token_bytes for s in shapes)
    return (
        f"{' and '.join(forms)}: {each} bytes a token, {megabytes(rows * length * each)} for {rows} × {length} tokens"
    )


def open_archive(path: Path) -> tuple[Archive, dict[str, Any]]:
    """The file and its metadata, before anything of its code is loaded. Raises `ArtifactError`."""
    contents = Archive(path)
    try:
        about = json.loads(contents.read(ABOUT))
        if not isinstance(about["format"], int) or about["format"] != FORMAT:
            raise ArtifactError(
                f"{path} has the format {about['format']} of aograph {about.get('aograph')}; this version reads "
                f"{FORMAT}: install that version, or save the artifact again"
            )
        graphs = set(about["graphs"])
        about["environment"]["device"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: {ABOUT} cannot be read: {error!r}") from error
    found = {name.split("/")[2] for name in contents.records if name.startswith(CODE)}
    if found != graphs or {entry.graph for entry in contents.index} > graphs:
        raise ArtifactError(f"{path} has code for the graphs {sorted(found)}, but speaks of {sorted(graphs)}")
    return contents, about


def missing_ops(about: Mapping[str, Any]) -> list[str]:
    """The ops that graphs call, or that pack new weights, and that this package does not have in that version."""
    called = {op for graph in about["graphs"].values() for op in graph["outside"]}
    packing = {pack["op"] for pack in about["packs"]} - {None}
    return [
        f"this aograph has no op {op}; the artifact is of aograph {about['aograph']}"
        for op in sorted(called | packing)
        if op not in OPS or OPS[op].version != about["ops"].get(op)
    ]
