"""The other door: `torch.compile(model, backend="aograph", options={"recipe": …})`.

Dynamo hands over a graph; it becomes a `Program`, goes through the same pipeline as an exported model, and Inductor
compiles it with the packed weights as inputs (`aograph.frozen` fills them in at every call). A graph of which nothing
is rewritten goes to Inductor as it came. All that this project asks of torch's private modules is in this file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import logging
import uuid
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch import Tensor, nn
from torch._dynamo.exc import ShortenTraceback
from torch.fx import GraphModule, Node

from . import pipeline
from .cost import roofline
from .decoding import first_line
from .dynamo import DynamoGraph, from_dynamo
from .errors import AographError, InputError, RecipeError
from .frozen import Frozen
from .kernels.kv_attention import kv_attention
from .kernels.kv_cache import CacheCase
from .kernels.op import ENDLESS, OPS
from .passes import PASSES
from .program import Program, expression, hint
from .recipe import Recipe
from .report import Report
from .schemes import nearest
from .statistics import digest

log = logging.getLogger(__name__)

STATIC = {"_dynamo_static_input_type": "unguarded"}  # how Dynamo marks inputs that stay where they are, as weights do


@dataclass(frozen=True)
class Options:
    """What `options` may hold besides Inductor's own settings.

    recipe: as for `aograph.optimize`. mode: Inductor's mode ("reduce-overhead", "max-autotune" …), which
    `torch.compile` does not take together with options. release: free the originals once they are packed, where no
    graph reads them; their modules then refuse `state_dict()`. report: called with the `Report` of each graph once its
    weights are packed. strict: a graph of which nothing is rewritten is an error. compile: False runs graphs eagerly,
    without Inductor. disable, dump: names of passes to
    leave out; a folder for diffs. model: the module whose qualified names rules and reports use; without it, names
    start at the module whose `forward` Dynamo traced. inductor: Inductor's settings, by name.
    """

    recipe: Recipe
    mode: str | None = None
    release: bool = False
    report: Callable[[Report], Any] | None = None
    strict: bool = False
    compile: bool = True
    disable: Collection[str] = ()
    dump: Any = None
    model: nn.Module | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, mode: str | None, options: Mapping[str, Any] | None) -> Options:
        """From what users give to `torch.compile`. Raises `InputError` or `RecipeError` for what is no option."""
        own = {f.name for f in dataclasses.fields(cls)} - {"inductor"}
        known = torch._inductor.list_options()
        given: dict[str, Any] = {"mode": mode, "recipe": "int4wo", **(options or {})}
        for key in given.keys() - own:
            if key.replace("-", "_") not in known:
                raise InputError(f"unknown option {key!r} for aograph; {nearest(key, [*sorted(own), *known])}")
        modes = torch._inductor.list_mode_options()
        if given["mode"] not in (None, "default", *modes):
            raise InputError(f"unknown mode {given['mode']!r}; {nearest(given['mode'], ['default', *modes])}")
        settings = {key: given[key] for key in given.keys() & own}
        inductor = {key.replace("-", "_"): given[key] for key in given.keys() - own}
        for key, value in inductor.items():
            wanted = type(getattr(inductor_config, key, value))
            if wanted in (bool, int, str) and not isinstance(value, wanted):
                found = type(value).__name__
                raise InputError(f"option {key}={value!r} is a {found}; Inductor takes {wanted.__name__}")
        preset = modes.get(given["mode"], {}) if given["mode"] else {}
        return cls(**settings | {"recipe": Recipe.of(given["recipe"])}, inductor={**preset, **inductor})


def backend(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compiles one of Dynamo's graphs; registered with torch as "aograph". See `Options`.

    What cannot be compiled raises its `AographError`, not wrapped into an error of Dynamo's.
    """
    try:
        return compiled(graph_module, example_inputs, Options.of(mode, options))
    except AographError as error:
        raise through_dynamo(error, inspect.currentframe()) from None


def reset() -> None:
    """Forgets CUDA graphs, as `torch.compiler.reset()` asks backends to."""
    if torch.cuda.is_available():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


backend.reset = reset  # type: ignore[attr-defined]


def through_dynamo(error: AographError, frame: FrameType | None) -> Exception:
    """The error as one of its own class that Dynamo lets pass, with a traceback that starts at the frame."""
    kind = type(type(error).__name__, (ShortenTraceback, type(error)), {"__module__": type(error).__module__})
    return kind(*error.args, first_useful_frame=frame)


def compiled(graph_module: GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    settings: dict[str, Any] = {}
    forced: dict[str, Any] = {}

    def inductor(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        every = {**settings, **options.inductor, **forced, **cached_as(options)}
        return torch._inductor.compile(module, list(inputs), options=every) if options.compile else module

    if not any(isinstance(value, Tensor) for value in example_inputs):
        return inductor(graph_module, example_inputs)
    if autocast(graph_module):
        complain("the graph runs under autocast, where nothing is rewritten: cast the model instead", options.strict)
        return inductor(graph_module, example_inputs)

    try:
        dynamo = from_dynamo(graph_module, example_inputs, options.model)
    except Exception as error:  # of torch's tracer, such as at torch.utils.checkpoint, which Inductor knows
        complain(
            f"the graph cannot be traced to ATen, so nothing of it is rewritten: {first_line(error)}", options.strict
        )
        return inductor(graph_module, example_inputs)
    program, recipe = dynamo.program, options.recipe.lenient()
    if recipe.statistics and dynamo.shared:
        recipe = dataclasses.replace(recipe, statistics={})
        complain(
            "the statistics of the recipe are not used in this graph: Python runs between the graphs of the model, and "
            "Dynamo may call one graph with the weights of several layers; use aograph.optimize",
            options.strict,
        )
    report = pipeline.run(program, recipe, disable=options.disable, dump=options.dump)
    report.roofline = roofline(str(device_of(program)))
    log.info("%s", report.summary())
    for rule in options.recipe.unmatched(report.rows) if report.rows else ():
        complain(f"{rule}, in this graph", strict=False)
    if not report.rewritten:
        if report.rows:
            reasons = "; ".join(dict.fromkeys(note for row in report.rows for note in row.notes[:1]))
            complain(f"the recipe {str(options.recipe)!r} rewrote nothing of this graph: {reasons}", options.strict)
        if options.report:
            options.report(report)
        return inductor(graph_module, example_inputs)
    check_untrained(program)
    settings |= suited(report)
    forced |= needed(program)
    return lowered(dynamo, graph_module, example_inputs, report, options, inductor)


def lowered(
    dynamo: DynamoGraph,
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    report: Report,
    options: Options,
    compiler: Callable[[GraphModule, Sequence[Any]], Callable[..., Any]],
) -> Callable[..., Any]:
    """The rewritten program, compiled: weights are inputs again, packed ones filled in at each call."""
    program = dynamo.program
    packs = list(program.packs.values())
    unpacked = [name for name in program.weights if name in dynamo.weights]
    own = {name: tensor for name, tensor in program.constants.items() if name not in dynamo.weights}
    position = dynamo.weights

    def leaf(name: str, inputs: Sequence[Any]) -> Tensor:
        return inputs[position[name]] if name in position else own[name]

    frozen = Frozen(packs, unpacked, leaf, options.release, lambda: options.report and options.report(report))
    taken = [*dynamo.inputs, *(position[name] for name in unpacked)]
    fakes = weights_to_inputs(program, [*unpacked, *(name for pack in packs for name in pack.names)])
    module = GraphModule(program.graph_module, program.graph)
    module.meta.update(graph_module.meta)
    module._param_name_to_source = getattr(graph_module, "_param_name_to_source", {})  # type: ignore[assignment]
    run = compiler(module, [*(example_inputs[i] for i in taken), *fakes[len(unpacked) :]])

    def call(*inputs: Any) -> Any:
        return run(*(inputs[i] for i in taken), *frozen(inputs))

    return call


def weights_to_inputs(program: Program, names: Sequence[str]) -> list[Tensor]:
    """Makes weights the last inputs of the graph, in this order; their fake tensors."""
    nodes: dict[str, list[Node]] = {name: [] for name in names}
    for node in program.graph.find_nodes(op="get_attr"):
        if node.target in nodes:
            nodes[node.target].append(node)
    anchor = program.inputs[-1] if program.inputs else None
    fakes = []
    for i, olds in enumerate(nodes.values()):
        meta = olds[0].meta
        with program.graph.inserting_after(anchor) if anchor else program.graph.inserting_before():
            anchor = program.graph.placeholder(f"weight_{i}")
        anchor.meta = {**meta, "tensor_dict": meta.get("tensor_dict", STATIC)}
        anchor._dynamo_source = meta.get("source")
        for old in olds:
            old.replace_all_uses_with(anchor)
            program.graph.erase_node(old)
        fakes.append(meta["val"])
    return fakes


def check_untrained(program: Program) -> None:
    """Raises `InputError` if gradients are wanted for a weight that is packed."""
    packed = dict.fromkeys(name for pack in program.packs.values() for name in pack.weight.leaves)
    trained = [name for name in packed if torch.is_grad_enabled() and program.constants[name].requires_grad]
    if trained:
        raise InputError(
            f"gradients are needed for {len(trained)} weights that the recipe packs, first {trained[0]}: call the "
            "model under torch.no_grad(), freeze them with requires_grad_(False), or exclude them with a rule such as "
            f"{trained[0].removesuffix('.weight')}:none"
        )


def suited(report: Report) -> dict[str, Any]:
    """Settings of Inductor that suit a graph of this report."""
    matched = {record.name for record in report.history if record.matches}
    return {key: value for each in PASSES if each.name in matched for key, value in each.settings.items()}


def needed(program: Program) -> dict[str, Any]:
    """Settings of Inductor that a program has whatever its user says.

    No CUDA graphs where attention of many tokens over packed caches asks where they are: what is recorded cannot ask,
    and would read all of a cache each time.
    """
    for node in program.graph.find_nodes(op="call_function", target=kv_attention.overload):
        values = [each.meta["val"] if isinstance(each, Node) else each for each in node.args]
        case = kv_attention.case_of(*values)
        assert isinstance(case, CacheCase)
        _, most = program.bounds(expression(values[0].shape[2]))
        case = dataclasses.replace(case, rows=hint(case.rows), length=hint(case.length), M=most or ENDLESS)
        if kv_attention.choose(case).name == "flash":
            return {"triton.cudagraphs": False}
    return {}


def joined(
    options: Mapping[str, Any], settings: Mapping[str, Any], forced: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The user's options of `torch.compile` over settings of Inductor, and under those that are forced.

    A mode becomes options, as torch takes one of the two.
    """
    if not (settings or forced) or options.get("backend", "inductor") != "inductor":
        return dict(options)
    preset = torch._inductor.list_mode_options(options["mode"]) if options.get("mode") else {}
    rest = {key: value for key, value in options.items() if key != "mode"}
    return {**rest, "options": {**settings, **preset, **(options.get("options") or {}), **(forced or {})}}


def autocast(graph_module: GraphModule) -> bool:
    """Whether a graph runs under autocast, wholly or in part."""
    inside = any(getattr(node.target, "__name__", "") == "_enter_autocast" for node in graph_module.graph.nodes)
    return inside or any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))


def device_of(program: Program) -> torch.device:
    return next((t.device for t in program.constants.values()), torch.device("cpu"))


def complain(message: str, strict: bool) -> None:
    if strict:
        raise RecipeError(message)
    warnings.warn(message, stacklevel=2)


# --- compilation caches ------------------------------------------------------------------------------------


def cached_as(options: Options) -> dict[str, Any]:
    """The setting by which Inductor's and AOTAutograd's caches know what stands behind aograph's operators."""
    marked = {**inductor_config.unsafe_marked_cacheable_functions, "aograph": cache_key(options)}
    return {"unsafe_marked_cacheable_functions": marked}


def cache_key(options: Options) -> str:
    """A hash of all that decides what a rewritten graph computes, besides the graph itself."""
    from . import __version__

    try:
        recipe = options.recipe.to_toml()
    except RecipeError:  # a predicate that is a function has no text
        recipe = uuid.uuid4().hex
    parts = {
        "package": __version__,
        "recipe": recipe,
        "statistics": digest(options.recipe.statistics),
        "disable": sorted(options.disable),
        "ops": {op.qualified_name: op.version for op in OPS.values()},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
