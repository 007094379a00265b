"""Saving an artifact: graphs compiled by AOTInductor over one copy of the packed weights, in one file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from . import archive, environment, repacking
from .capture import Capture, handed_over, on_meta
from .decoding import CacheShape, NoSteps, cache_shapes, default_length, first_line, step_of
from .errors import CaptureError, CompileError, InputError, RecipeError
from .inline import Inlined, inline, is_tensor
from .kernels.float8 import FLOAT8
from .kernels.kv_cache import KVFormat
from .kernels.kv_update import kv_update
from .kernels.op import OPS
from .patterns.language import packet, views_of, written
from .program import Program, expression
from .report import EXCLUDED, REWRITTEN, Report
from .signature import Signature, Value, evaluate, symbols_of, tree
from .statistics import digest

if TYPE_CHECKING:
    from .optimize import OptimizedModule


# Weights come from the file, not from the code; and no number in the code was computed from one, however small: it
# could not be updated.
OPTIONS = {
    "aot_inductor.package_constants_in_so": False,
    "always_keep_tensor_constants": True,
    "joint_graph_constant_folding": False,
}
WRAPPER = "aot_inductor.compile_wrapper_opt_level"  # what a compiler is told of the code that calls kernels
aten = torch.ops.aten
INDEXING = {aten.index, aten.index_put, aten.index_put_}
TOKENIZER_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "chat_template*",
)  # fmt: skip


@dataclass
class Graph:
    """One named graph on its way into the file."""

    capture: Capture
    report: Report
    names: Sequence[str]  # of the inputs

    @property
    def program(self) -> Program:
        return self.capture.program


def save(
    optimized: OptimizedModule,
    path: str | os.PathLike,
    *,
    max_length: int | None = None,
    batch_size: int = 1,
    tokenizer: Any = None,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Compiles ahead of time, and writes one `.pt2` file that `aograph.load` reads without the model's source.

    It holds the graph `forward`, that of the first capture; for causal language models of transformers also `prefill`
    and `decode`, over a static cache of `max_length` tokens (default: what the model knows, at most 2048) for
    `batch_size` rows. Where there are none, `aograph inspect` says why. The packed weights are in the file once, the
    originals not at all. An existing file is replaced by a whole one or not at all.

    tokenizer: a tokenizer, or a folder with the files of one, to go along. options: Inductor's.

    Raises `InputError`, and `CompileError` where the graphs cannot be compiled ahead of time.
    """
    path = Path(path)
    check_path(path)
    check_request(optimized, max_length, batch_size)
    files = tokenizer_files(tokenizer)
    model = optimized._model[0]
    _, captured, _ = optimized._captures[min(optimized._captures)]
    assert optimized.report is not None, "there is a capture"
    graphs = {"forward": Graph(captured, optimized.report, [node.name for node in captured.program.inputs])}
    length = max_length or default_length(model)
    notes, generation = [], None
    try:
        whole = on_meta(model) if handed_over(model) else model  # not on several devices
        shapes = cache_shapes(whole, length)
        graphs |= step_graphs(optimized, whole, shapes, batch_size, length)
        shapes = packed_shapes(shapes, {name: graphs[name].program for name in ("prefill", "decode")})
        generation = generation_of(model, shapes, batch_size, length)
        notes += unpacked(graphs["decode"].program)
    except (NoSteps, CaptureError) as reason:
        notes.append(f"no graphs prefill and decode: {first_line(reason)}")
    with tempfile.TemporaryDirectory(prefix="aograph-") as folder:
        built = {name: compile_graph(name, graph, Path(folder), options or {}) for name, graph in graphs.items()}
        weights = {name: weights_of(each.exported, Path(folder, f"{name}.pt2")) for name, each in built.items()}
        lines, tensors = archive.index(weights)
        about = {
            "format": archive.FORMAT,
            **about_recipe(optimized),
            "environment": environment.describe(optimized.device),
            "ops": {op.registered: op.version for op in OPS.values()},
            "graphs": {name: about_graph(graph, built[name]) for name, graph in graphs.items()},
            "notes": notes,
            "generation": generation,
            "packs": repacking.packs_as_data({name: graph.program.packs for name, graph in graphs.items()}),
            "constants": {name: sorted(named) for name, named in weights.items()},
            "originals": repacking.originals_as_data(named_tensors(model)),
            "aliases": {alias: name for graph in graphs.values() for alias, name in graph.program.aliases.items()},
        }
        code = {file: content for name in built for file, content in code_of(Path(folder, f"{name}.pt2"), name)}
        records = {
            archive.ABOUT: json.dumps(about, indent=1).encode(),
            archive.INDEX: "".join(f"{line.line()}\n" for line in lines).encode(),
            **{archive.TOKENIZER + name: content for name, content in files.items()},
            **code,
        }
        archive.write(path, records, tensors)


def check_path(path: Path) -> None:
    """Raises `InputError` for a file that cannot be written or is not called `.pt2`, before any work is done."""
    if path.suffix != ".pt2":
        raise InputError(f"an artifact is a .pt2 file, not {path.name}: give {path.with_suffix('.pt2')}")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"{path} cannot be written: its folder is missing or not writable, or it is a folder itself")


def check_request(optimized: OptimizedModule, max_length: int | None, batch_size: int) -> None:
    """Raises `InputError` for what cannot be saved, before any work is done."""
    if optimized._parts is not None:
        raise InputError(
            "the model could not be captured whole and runs in parts, so that there is no graph to save: its report "
            "says where the capture failed"
        )
    if not optimized._captures:
        raise InputError("there is no graph to save yet: call the module once, or give example_inputs to optimize")
    _, captured, _ = optimized._captures[min(optimized._captures)]
    if state := [name for each in captured.program.packs.values() if each.state for name in each.weight.leaves]:
        raise InputError(
            f"an artifact cannot hold a quantized cache: save the model under a recipe without one for {state[0]}"
        )
    for name, value, least in (("max_length", max_length, 2), ("batch_size", batch_size, 1)):
        if value is not None and (not isinstance(value, int) or value < least):
            raise InputError(f"{name} is {value!r}: give a whole number from {least} on")


def step_graphs(
    optimized: OptimizedModule, model: nn.Module, shapes: Sequence[CacheShape], rows: int, length: int
) -> dict[str, Graph]:
    """`prefill`, T tokens of one row, and `decode`, one token of each of `rows` rows, packed by the same store."""
    from .optimize import rewrite

    step = step_of(model, len(shapes), length)
    device = next(iter(model.parameters())).device
    tokens = Dim("T", min=2, max=length)
    private = [f"{kind}_{layer}" for layer in range(len(shapes)) for kind in ("key", "value")]
    graphs = {}
    for name, batch, count, dynamic in (("prefill", 1, min(8, length), {1: tokens}), ("decode", rows, 1, {})):
        ids = torch.zeros(batch, count, dtype=torch.int64, device=device)
        cache = [tensor for shape in shapes for tensor in shape.empty(batch, length, device)]
        how: tuple = dynamic, dynamic, *({} for _ in cache)
        args = ids, torch.zeros_like(ids), *cache
        captured, report = rewrite(
            step, optimized.recipe, args, {}, how, optimized.device, disable=optimized._disable, private=private
        )
        optimized._store.materialize(captured.program, optimized._progress)
        captured.program.graph_module.recompile()
        names = [str(node.target) for node in captured.program.inputs]
        captured = dataclasses.replace(captured, in_spec=pytree.tree_structure((tuple(names), {})))  # caches are packed
        graphs[name] = Graph(captured, report, names)
    return graphs


def packed_shapes(shapes: Sequence[CacheShape], programs: Mapping[str, Program]) -> list[CacheShape]:
    """The caches of layers as the programs of all steps take them.

    Raises `CompileError` where one would read them in another form than the others.
    """
    found = {name: formats_of(program) for name, program in programs.items()}
    (first, formats), *others = found.items()
    for name, other in others:
        if wrong := [cache for cache in formats.keys() | other.keys() if formats.get(cache) != other.get(cache)]:
            raise CompileError(
                f"{min(wrong)} is not in the same form in {first} and in {name}: leave it as it is by "
                f"Rule(Keep(), name={min(wrong)!r}, optional=True)"
            )
    return [
        dataclasses.replace(shape, key_format=formats.get(f"key_{i}"), value_format=formats.get(f"value_{i}"))
        for i, shape in enumerate(shapes)
    ]


def formats_of(program: Program) -> dict[str, KVFormat]:
    """How a program packs caches, by their names."""
    return {cache.row.name: cache.format for cache in program.caches if cache.format is not None}


def unpacked(program: Program) -> list[str]:
    """What keeps caches as they are that a rule for caches might have packed; nothing where there is no such rule."""
    kept = [cache.row for cache in program.caches if cache.row.outcome not in (REWRITTEN, EXCLUDED)]
    reasons = dict.fromkeys("; ".join(row.notes) for row in kept)
    named = {reason: ", ".join(row.name for row in kept if "; ".join(row.notes) == reason) for reason in reasons}
    return [f"caches that are not packed: {names}: {reason}" for reason, names in named.items()]


def generation_of(model: Any, shapes: Sequence[CacheShape], rows: int, length: int) -> dict[str, Any]:
    """What the loop around the steps needs to know."""
    settings = model.generation_config
    ends = settings.eos_token_id
    return {
        "batch_size": rows,
        "max_length": length,
        "cache": [shape.as_data() for shape in shapes],
        "cache_token_bytes": sum(shape.token_bytes for shape in shapes),
        "eos_token_id": [] if ends is None else [ends] if isinstance(ends, int) else list(ends),
        "pad_token_id": settings.pad_token_id,
    }


# --- code --------------------------------------------------------------------------------------------------


def compile_graph(name: str, graph: Graph, folder: Path, options: Mapping[str, Any]) -> Inlined:
    """Compiles a graph to FOLDER/NAME.pt2.

    Raises `CompileError` where Inductor cannot, with what it said.
    """
    inlined = inline(graph.program)
    path = str(folder / f"{name}.pt2")
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch._inductor.aoti_compile_and_package(
                inlined.exported, package_path=path, inductor_configs={**settings(inlined.exported, options), **OPTIONS}
            )
    except Exception as error:
        raise CompileError(f"AOTInductor could not compile the graph {name}: {first_line(error)}") from error
    return inlined


def settings(exported: ExportedProgram, options: Mapping[str, Any]) -> dict[str, Any]:
    """The user's settings of Inductor. Where torch does not include float8 in the code that calls kernels, as 2.11 does
    not, the compiler is told to."""
    found = dict(options)
    values = (node.meta.get("val") for node in exported.graph.nodes)
    if torch.__version__ < "2.13" and any(isinstance(v, Tensor) and v.dtype is FLOAT8 for v in values):
        level = found.get(WRAPPER, torch._inductor.config.aot_inductor.compile_wrapper_opt_level)
        found[WRAPPER] = f"{level} -include c10/util/Float8_e4m3fn.h"
    return found


def weights_of(exported: ExportedProgram, package: Path) -> dict[str, Tensor]:
    """The tensors that compiled code asks for, by the names that it asks with."""
    known = {**exported.state_dict, **exported.constants}
    wanted = torch._C._aoti.AOTIModelPackageLoader(str(package), "model", False, 1, -1).get_constant_fqns()
    if unknown := [name for name in wanted if name not in known]:
        raise CompileError(f"the compiled code asks for constants that the graph does not have: {', '.join(unknown)}")
    return {name: known[name].detach() for name in wanted}


def code_of(package: Path, graph: str) -> Iterator[tuple[str, bytes]]:
    """The code in a package of one graph, under the graph's name; sources, which are not needed to run, left out."""
    with zipfile.ZipFile(package) as files:
        for name in files.namelist():
            _, found, rest = name.partition(f"{archive.CODE}model/")
            if found and not rest.endswith(".kernel.cpp"):
                yield f"{archive.CODE}{graph}/{rest}", files.read(name)


# --- metadata ----------------------------------------------------------------------------------------------


def about_recipe(optimized: OptimizedModule) -> dict[str, Any]:
    """The version of this package, and the recipe with a hash of it and its statistics; functions have no text."""
    from . import __version__

    try:
        text = optimized.recipe.to_toml()
    except RecipeError:
        text = str(optimized.recipe)
    calibrated = digest(optimized.recipe.statistics) if optimized.recipe.statistics else ""
    hashed = hashlib.sha256(f"{text}{calibrated}".encode()).hexdigest()
    return {"aograph": __version__, "recipe": text, "recipe_sha256": hashed}


def about_graph(graph: Graph, inlined: Inlined) -> dict[str, Any]:
    signature, unread = signature_of(graph, inlined.exported)
    return {
        **dataclasses.asdict(signature),
        "kernels": [[op, kernel, count] for (op, kernel), count in sorted(inlined.kernels.items())],
        "outside": inlined.outside,
        "buffers": sorted(graph.program.mutated),  # that a call writes
        "unread": unread,
        "report": graph.report.as_dict(),
    }


def signature_of(graph: Graph, exported: ExportedProgram) -> tuple[Signature, list[str]]:
    """What the compiled graph takes and gives, and the relations between sizes that no call can be checked for.

    Raises `CompileError` for inputs and outputs that cannot be written down.
    """
    user = exported.graph_signature.user_inputs
    compiled = iter([n.meta["val"] for n in exported.graph.find_nodes(op="placeholder") if n.name in user])
    inputs = tuple(
        described(name, next(compiled), written(node) is not None, within(node))
        if is_tensor(node)
        else described(name, node.meta.get("val"))
        for name, node in zip(graph.names, graph.program.inputs, strict=True)
    )
    results = iter([node.meta["val"] for node in exported.graph.output_node().args[0]])
    returned: Any = graph.program.graph.output_node().args[0]
    outputs = [next(results) if is_tensor(value) else value for value in returned]
    symbols = {name for i in inputs for size in i.sizes if isinstance(size, str) for name in symbols_of(size)}
    ranges = {}
    for symbol, bounds in exported.range_constraints.items():
        if str(symbol) in symbols:
            ranges[str(symbol)] = int(bounds.lower), int(bounds.upper) if bounds.upper < 2**62 else None
    sizes = {str(symbol): low for symbol, (low, _) in ranges.items()}
    guards, unread = guards_of(exported, sizes)
    gives = tuple(described(f"output_{i}", value) for i, value in enumerate(outputs))
    takes, returns = tree(graph.capture.in_spec), tree(graph.capture.out_spec)
    return Signature(inputs, gives, ranges, tuple(guards), takes, returns), unread


def described(name: str, value: Any, changed: bool = False, within: tuple[int, int] | None = None) -> Value:
    if isinstance(value, Tensor):
        sizes = tuple(s if isinstance(s, int) else str(expression(s)) for s in value.shape)
        dtype = str(value.dtype).removeprefix("torch.")
        return Value(name, dtype, value.device.type, sizes, written=changed, within=within)
    if isinstance(value, (bool, int, float, str, type(None))):
        return Value(name, value=value)
    value = value.meta["val"] if isinstance(value, torch.fx.Node) else value
    raise CompileError(f"{name} is a {type(value).__name__}: an artifact takes and gives tensors and plain values")


def within(node: torch.fx.Node) -> tuple[int, int] | None:
    """The numbers that an input may hold where it, or a view of it, is an index into something of a known size."""
    found: list[tuple[int, int]] = []
    stack = [node]
    while stack:
        current = stack.pop()
        stack += views_of(current)
        for user in current.users:
            read: Any = user.args
            if user.target is aten.embedding.default and read[1] is current:
                found.append((0, read[0].meta["val"].shape[0] - 1))
            elif user.target is kv_update.overload and read[3] is current:
                found.append((0, read[0].meta["val"].shape[2] - 1))
            elif packet(user.target) in INDEXING:
                among = zip(read[0].meta["val"].shape, read[1], strict=False)
                found += [(-size, size - 1) for size, index in among if index is current and isinstance(size, int)]
    return (max(low for low, _ in found), min(high for _, high in found)) if found else None


def guards_of(exported: ExportedProgram, sizes: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """Relations between sizes that the code was made for: those that can be checked at a call, and the others."""
    fakes = [n.meta.get("val") for n in exported.graph.find_nodes(op="placeholder")]
    modes = [fake.fake_mode for fake in fakes if getattr(fake, "fake_mode", None)]
    relations = [modes[0].shape_env.simplify(g.expr) for g in modes[0].shape_env.guards] if modes and sizes else []
    read, unread = [], []
    for relation in relations:
        if relation == sympy.true or in_ranges(relation):
            continue
        try:
            evaluate(str(relation), sizes)
            read.append(str(relation))
        except (ValueError, ZeroDivisionError):
            unread.append(str(relation))
    return list(dict.fromkeys(read)), list(dict.fromkeys(unread))


def in_ranges(relation: sympy.Basic) -> bool:
    """Whether a relation is a limit of one size, as the ranges of sizes are."""
    limit = isinstance(relation, (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt))
    return limit and relation.lhs.is_Symbol and relation.rhs.is_number


# --- files -------------------------------------------------------------------------------------------------


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """The files of a tokenizer: of a folder, or of an object with `save_pretrained`."""
    if tokenizer is None:
        return {}
    if hasattr(tokenizer, "save_pretrained"):
        with tempfile.TemporaryDirectory(prefix="aograph-") as folder:
            tokenizer.save_pretrained(folder)
            return tokenizer_files(folder)
    place = Path(tokenizer)
    found = {p.name: p.read_bytes() for pattern in TOKENIZER_FILES for p in sorted(place.glob(pattern)) if p.is_file()}
    if not found:
        raise InputError(f"{place} has no files of a tokenizer, such as tokenizer.json")
    return found
