"""From the graph that Dynamo hands to a backend to a `Program`, the same that `aograph.capture` makes of the model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter
from torch.fx.experimental.proxy_tensor import make_fx

from .capture import as_bound, names_of, program_of
from .patterns.language import of_levels
from .program import Program, get_attribute, set_attribute


@dataclass
class DynamoGraph:
    """A program from Dynamo, whose constants were inputs of its graph.

    inputs: the positions of the graph's inputs that the program still takes, in its order; weights: those of its
    constants, by name. A constant that is in neither is the graph's own. shared: whether the graph reaches weights from
    another module than their owner; Dynamo may then call it with the weights of a sibling of that module.
    """

    program: Program
    inputs: list[int]
    weights: dict[str, int]
    shared: bool


def from_dynamo(
    graph_module: GraphModule, example_inputs: Sequence[Any], owner: nn.Module | None = None
) -> DynamoGraph:
    """A program from the graph that Dynamo hands to a backend.

    The graph calls Python functions on weights that are inputs: it is traced again to ATen, and its parameters and
    buffers become constants, under their names in `owner`, or else in the module that Dynamo found them in. Let
    Dynamo trace under `no_fast_paths`, or the linears of `nn.TransformerEncoder` stay hidden (and are near misses in
    the report).

    Where gradients are recorded, nodes say so in `meta["grad"]`.
    """
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    fakes = [n.meta["example_value"] for n in placeholders]
    mode = next(f.fake_mode for f in fakes if hasattr(f, "fake_mode"))
    interpreter, records = Levels(graph_module), torch.is_grad_enabled()
    with mode, torch.set_grad_enabled(records), torch.fx.traceback.preserve_node_meta():
        traced = make_fx(lambda *flat: interpreter.run(*flat), pre_dispatch=True)(*fakes)
    erase_shadows(traced)

    names = {} if owner is None else names_of(owner)
    state: dict[str, Tensor] = {}
    kept: list[int] = []
    weights: dict[str, int] = {}
    shared = False
    inputs = zip(traced.graph.find_nodes(op="placeholder"), placeholders, example_inputs, strict=True)
    for i, (node, given, real) in enumerate(inputs):
        source = getattr(given, "_dynamo_source", None)
        place = source.name if source else ""
        node._dynamo_source = source
        node.meta["tensor_dict"] = given.meta.get("tensor_dict", {})
        if not is_weight(real, place, names):
            kept.append(i)
            continue
        known = names.get(id(real))
        name = known[0] if known else free_name(place, state)
        shared |= known is not None and free_name(place, {}) not in known
        state[name], weights[name] = real, i
        set_attribute(traced, name, real)
        with traced.graph.inserting_before(node):
            weight = traced.graph.get_attr(name)
        weight.meta = {**node.meta, "source": source}
        node.replace_all_uses_with(weight)
        traced.graph.erase_node(node)
    for node in traced.graph.find_nodes(op="get_attr"):
        value = get_attribute(traced, node.target)
        if node.target not in state and isinstance(value, Tensor):
            state[node.target] = value
    for node in traced.graph.nodes:
        if node.op == "get_attr" and isinstance(state.get(node.target), Tensor) and node.target not in weights:
            node.meta["val"] = mode.from_tensor(state[node.target])  # tracing knows it under a mode of its own
        if node.target is torch._C._set_grad_enabled:
            node.meta["val"], (records,) = None, node.args
        if isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.returns:
            node.meta["val"] = None
        if of_levels(node.target):
            node.meta.setdefault("val", None)
        node.meta["grad"] = records
    ranges = {s: as_bound(r) for s, r in mode.shape_env.var_to_range.items()} if mode.shape_env else {}
    return DynamoGraph(program_of(traced, state, names, ranges), kept, weights, shared)


class Levels(Interpreter):
    """Runs a graph; the beginnings and ends of levels of vmap, and what is batched in them, are traced as calls, which
    torch does only where it exports."""

    def call_function(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not of_levels(target):
            return super().call_function(target, args, kwargs)
        before, torch.compiler._is_exporting_flag = torch.compiler._is_exporting_flag, True
        try:
            return super().call_function(target, args, kwargs)
        finally:
            torch.compiler._is_exporting_flag = before


def erase_shadows(traced: GraphModule) -> None:
    """Erases what torch has traced in nested levels of vmap besides the calls: views that nothing reads, of values that
    are only fake."""
    for node in traced.graph.find_nodes(op="get_attr"):
        if hasattr(get_attribute(traced, node.target), "fake_mode"):
            for each in (*node.users, node):
                if not each.users:
                    traced.graph.erase_node(each)


def is_weight(value: Any, source: str, names: Mapping[int, list[str]]) -> bool:
    """Whether an input of Dynamo's graph is a parameter or a buffer of a module."""
    if not isinstance(value, Tensor):
        return False
    return isinstance(value, nn.Parameter) or id(value) in names or "._buffers[" in source


def free_name(source: str, taken: Mapping[str, Tensor]) -> str:
    """`L['self']._modules['up']._parameters['weight']` → `up.weight`; with the variable's name if that is taken.

    A decorated forward has its module in `*args`.
    """
    source = source.replace("L['args'][0]", "L['self']", 1)
    words = ["".join(found) for found in re.findall(r"\['?([^'\]]+)'?\]|\.(\w+)", source)]
    root, *path = [word for word in words if word not in ("_modules", "_parameters", "_buffers")] or ["constant"]
    name = ".".join(path) or root
    while name in taken:
        name = f"{root}.{name}"
    return name
