"""From a model to a `Program`, through `torch.export`; and what this door and that of `aograph.dynamo` share.

Both doors trace to ATen before decomposition and inference mode, take the weights out of the arguments into
named constants, one per storage, and keep where each node came from. What remains to be brought to normal form
is the work of the first passes.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.export import Dim, ShapesCollection
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from . import huggingface
from .errors import CaptureError, InputError
from .patterns.language import fake_mode, propagate, written
from .program import Bound, Program, expression, get_attribute, set_attribute


@dataclass
class Capture:
    """A program with the calling convention of the model that it was captured from."""

    program: Program
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    guards: Callable[..., Any] | None

    @functools.cached_property
    def sizes(self) -> list[tuple[int, str, list[int | str | Callable[[Mapping[str, int]], Any]]]]:
        """Of each tensor input the position, the name, and the sizes: numbers, names of symbols, or functions of the
        symbols by name. Every call is checked against them, so nothing is left to sympy but to evaluate the rest."""
        tensors = [(i, node) for i, node in enumerate(self.program.inputs) if isinstance(node.meta.get("val"), Tensor)]
        return [(i, node.name, [plain(expression(size)) for size in node.meta["val"].shape]) for i, node in tensors]

    @functools.cached_property
    def ranges(self) -> dict[str, Bound]:
        """The range of each symbol, by its name."""
        return {size.name: bound for size, bound in self.program.ranges.items() if size.is_Symbol}

    def accepts(self, flat: Sequence[Any]) -> str | None:
        """None if the flat inputs fit the captured shapes, else what does not."""
        bound: dict[str, int] = {}
        first: dict[str, str] = {}
        computed: list[tuple[str, Any, int]] = []
        for position, name, sizes in self.sizes:
            for i, (size, actual) in enumerate(zip(sizes, flat[position].shape, strict=True)):
                if isinstance(size, int):
                    if size != actual:
                        return f"{name}.shape[{i}] is {actual}, captured as {size}"
                elif not isinstance(size, str):
                    computed.append((f"{name}.shape[{i}]", size, actual))
                elif size not in bound:
                    bound[size], first[size] = actual, f"{name}.shape[{i}]"
                elif bound[size] != actual:
                    return (
                        f"{name}.shape[{i}] is {actual}, but another dimension that was captured as equal is "
                        f"{bound[size]}"
                    )
        for where, function, actual in computed:
            if (expected := function(bound)) != actual:
                return f"{where} is {actual}, captured as {expected}"
        for symbol, actual in bound.items():
            low, high = self.ranges.get(symbol, (0, None))
            if actual < low or (high is not None and actual > high):
                return f"{first[symbol]} is {actual}, captured for {low} … {'∞' if high is None else high}"
        if self.guards is not None:
            try:
                self.guards(*flat)
            except (AssertionError, RuntimeError) as error:
                return str(error).splitlines()[0]
        return None


def plain(size: sympy.Expr) -> int | str | Callable[[Mapping[str, int]], Any]:
    """A size in plain Python: a number, the name of a symbol, or a function of the symbols by name.

    The function answers with the expression itself where the sizes do not tell all its symbols.
    """
    if size.is_Integer:
        return int(size)
    if size.is_Symbol:
        return size.name
    names = sorted(symbol.name for symbol in size.free_symbols)
    own = {f.func.__name__: f.func for f in size.atoms(sympy.core.function.Application)}  # those of torch
    compute = sympy.lambdify(names, size, modules=[own, "math"])
    return lambda bound: compute(*map(bound.__getitem__, names)) if bound.keys() >= set(names) else size


# --- torch.export ------------------------------------------------------------------------------------------


def capture(model: nn.Module, args: tuple, kwargs: dict, dynamic_shapes: Any = None) -> Capture:
    """Captures `model` called as `model(*args, **kwargs)` with `torch.export` (non-strict), in eval mode.

    `dynamic_shapes` as in `torch.export.export`. None: every dimension of every tensor that is larger than one is
    dynamic where the model allows it, and if the model cannot be captured so, all are static.

    Raises `CaptureError` with the place in the model's code and what to try.
    """
    huggingface.register_pytrees()
    model = with_named_keywords(model, kwargs)
    args, kwargs = told_apart(args, kwargs)
    automatic, packed = ShapesCollection(), huggingface.packed_tensors((args, kwargs))
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.ndim:
            sizes = leaf.shape[:1] if id(leaf) in packed else leaf.shape  # its heads and positions are as they are
            automatic[leaf] = {i: Dim.AUTO for i, size in enumerate(sizes) if size > 1}
    attempts = [dynamic_shapes] if dynamic_shapes is not None else [automatic, None]
    for attempt in attempts:
        try:
            with eval_mode(model), torch.no_grad(), no_fast_paths():
                exported = torch.export.export(model, args, kwargs, strict=False, dynamic_shapes=attempt)
                graph_module = exported.module(check_guards=True)
            break
        except Exception as error:
            failure = error
    else:
        raise CaptureError(explain_failure(model, failure)) from failure

    guards = getattr(graph_module, "_guards_fn", None)
    in_spec, out_spec = exported.call_spec.in_spec, exported.call_spec.out_spec
    state = {**exported.state_dict, **exported.constants}
    ranges = {s: as_bound(r) for s, r in exported.range_constraints.items()}
    program = program_of(graph_module, state, names_of(model), ranges)
    return Capture(program, in_spec, out_spec, guards)


def told_apart(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments, a tensor that is there twice as a view of itself: torch.export would make one input of both.

    So is one whose sizes are marked as static, as torch.export wipes such marks out.
    """
    seen = set()

    def once(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or (id(leaf) not in seen and not hasattr(leaf, "_dynamo_static_indices")):
            seen.add(id(leaf))
            return leaf
        return leaf.detach()

    return pytree.tree_map(once, (args, kwargs))


def with_named_keywords(model: nn.Module, kwargs: dict) -> nn.Module:
    """The model, or one that computes the same with a signature that names each keyword argument of a call.

    torch.export pairs dynamic shapes wrongly with arguments that are taken as `**kwargs`.
    """
    signature = inspect.signature(model.forward)
    extra = [name for name in kwargs if name not in signature.parameters]
    rest = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    if not extra or len(rest) == len(signature.parameters):
        return model
    named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in extra]
    twin = stand_in(model, lambda _, *args, **kwargs: model.forward(*args, **kwargs))
    type(twin).forward.__signature__ = signature.replace(
        parameters=[inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY), *rest, *named]
    )
    return twin


def stand_in(module: nn.Module, forward: Callable[..., Any], **members: Any) -> Any:
    """A module that shares everything with another one but computes with `forward(self, ...)`; that stays as it is.

    Its class is a subclass with these members; the signature of `forward` is the other's.
    """
    kind, twin = type(module), copy.copy(module)
    members = {"__module__": kind.__module__, **members, "forward": functools.wraps(kind.forward)(forward)}
    twin.__class__ = type(kind.__name__, (kind,), members)
    twin.__dict__.pop("forward", None)
    return twin


@contextlib.contextmanager
def eval_mode(model: nn.Module):
    """All modules in eval mode, and each back in its own mode afterwards."""
    training = [m for m in model.modules() if m.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def no_fast_paths():
    """Without the fused transformer operators, which hide their linears."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def explain_failure(model: nn.Module, error: Exception) -> str:
    """What failed, the line of the model's own code where it failed, and what to try."""
    place = ""
    trace = error.__traceback__
    own = inspect.getsourcefile(type(model).forward) if hasattr(type(model), "forward") else None
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if file == own or (f"{'torch'}/" not in file.replace("\\", "/") and "aograph" not in file):
            place = f" at {file}:{trace.tb_lineno} in {trace.tb_frame.f_code.co_name}"
        trace = trace.tb_next
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return (
        f"torch.export could not capture {type(model).__name__}{place}: {type(error).__name__}: {lines[0]}\n"
        "Try: replace control flow that depends on tensor values (torch.where, torch.cond), give other example "
        "inputs or static dynamic_shapes, or optimize a submodule that can be captured."
    )


# --- from a traced graph to a program ----------------------------------------------------------------------


def names_of(model: nn.Module) -> dict[int, list[str]]:
    """The names of each parameter and buffer by identity, the first of a tied weight's names in front."""
    names: dict[int, list[str]] = {}
    for group in (model.named_parameters, model.named_buffers):
        for name, tensor in group(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
    return names


def as_bound(value_range: Any) -> Bound:
    low, high = value_range.lower, value_range.upper
    return int(low) if low > 0 else 0, int(high) if high < 2**62 else None


def program_of(
    graph_module: GraphModule,
    state: Mapping[str, Tensor],
    names: Mapping[int, list[str]],
    ranges: dict[sympy.Symbol, Bound],
) -> Program:
    """Puts a traced graph on canonical constant names, flat inputs and outputs, and known origins."""
    graph = graph_module.graph
    graph.set_codegen(torch.fx.graph.CodeGen())
    for node in list(graph.find_nodes(op="call_module")):  # the guards: `Capture.accepts` asks them
        graph.erase_node(node)
    if hasattr(graph_module, "_guards_fn"):
        del graph_module._guards_fn

    canonical = {alias: same[0] for same in names.values() for alias in same}
    aliases = {alias: name for alias, name in canonical.items() if alias != name}
    constants: dict[str, Tensor] = {}
    first: dict[str, Node] = {}
    for node in list(graph.find_nodes(op="get_attr")):
        value = get_attribute(graph_module, node.target)
        if not isinstance(value, Tensor):
            continue
        name = canonical.get(node.target, node.target)
        constants.setdefault(name, state.get(name, state.get(node.target, value)))
        if name in first:
            node.replace_all_uses_with(first[name])
            graph.erase_node(node)
            continue
        first[name] = node
        node.target = name
        if not isinstance(node.meta["val"], Tensor):
            raise CaptureError(f"the constant {name} of the graph is no tensor")
    for name, value in constants.items():
        set_attribute(graph_module, name, value.detach())
    for node in graph.nodes:
        node.meta["origin"] = origin(node)
        if isinstance(node.target, torch._ops.OpOverload):
            node.meta["operator"] = node.target._opname
    for name, node in list(first.items()):
        if not node.users:
            graph.erase_node(node)
            del first[name], constants[name]
    hoist_constants(graph_module)
    return Program(
        graph_module=GraphModule(graph_module, graph),
        constants=constants,
        mutated=frozenset(name for name, node in first.items() if written(node) is not None),
        aliases={a: n for a, n in aliases.items() if n in first},
        ranges=ranges,
    )


def hoist_constants(graph_module: GraphModule) -> None:
    """Weights stand in front of all that uses them, so that siblings can be merged wherever they are."""
    graph = graph_module.graph
    anchor = next(iter(graph.nodes))
    for node in graph.find_nodes(op="get_attr"):
        if node is not anchor and isinstance(node.meta.get("val"), Tensor):
            anchor.prepend(node)


def origin(node: Node) -> tuple[str, str]:
    """The qualified name and the class of the innermost module that a node came from."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return "", ""
    path, kind = list(stack.values())[-1][:2]
    path = re.sub(r"^L\['self'\]\.?", "", path)
    path = re.sub(r"@\d+$", "", path)
    kind = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    return path, kind


# --- models, calls and devices -----------------------------------------------------------------------------


def handed_over(model: nn.Module) -> bool:
    """Whether some of a model's tensors are on meta, as is what was handed over and packed."""
    return any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of a model whose tensors are on the meta device; the model itself is not copied."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        like = tensor.detach().to("meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(like, tensor.requires_grad) if is_parameter else like
    return copy.deepcopy(model, memo)


def flatten(args: tuple, kwargs: dict) -> tuple[list[Any], pytree.TreeSpec]:
    """The leaves of a call in a fixed order, and their structure (keyword arguments sorted by name)."""
    try:
        return pytree.tree_flatten((args, dict(sorted(kwargs.items()))))
    except Exception as error:
        raise InputError(f"the inputs cannot be flattened: {error}") from error


def retarget(program: Program, source: torch.device, target: torch.device) -> None:
    """Moves a program from one device to another, values that are only fake so far included.

    Tensors that the graph makes on `source` are made on `target`; what it makes elsewhere stays there. The real
    constants are left where they are: the weight store moves them.
    """

    def moved(value: Any) -> Any:
        if isinstance(value, torch.device):
            return target if value.type == source.type else value
        return value

    with fake_mode(program.graph):
        for node in program.graph.nodes:
            node.args, node.kwargs = pytree.tree_map(moved, (node.args, node.kwargs))
            value = node.meta.get("val")
            if node.op in ("placeholder", "get_attr") and isinstance(value, Tensor):
                here = value.device.type == source.type
                node.meta["val"] = torch.empty_like(value, device=target) if here else value
            elif node.op == "call_function":
                node.meta["val"] = propagate(node)
