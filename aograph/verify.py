"""The verifier: what must hold of a program after every pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .errors import PassError
from .kernels.op import OPS
from .kernels.prune24 import prune24
from .patterns.language import batched, of_levels, propagate
from .program import Program, describe, expression

# Operators whose result has sizes that only the data decide: a fresh propagation gives fresh symbols.
DATA_DEPENDENT = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


def verify(program: Program) -> None:
    """Raises `PassError` at the first violation.

    The graph is well formed and in topological order; every call's `meta["val"]` is what a fresh propagation gives,
    which inside of torch.vmap nothing can; every weight has a tensor or is packed, and none is left over; aograph's ops
    get dtypes that they take; no other name of a tied weight has come back as a weight of its own.
    """
    try:
        program.graph.lint()
    except RuntimeError as error:
        raise PassError(f"the graph is malformed: {error}") from error

    packed = {name for pack in program.packs.values() for name in pack.names}
    sources = {name for pack in program.packs.values() for name in pack.weight.leaves}
    weights = program.weights
    for name in weights:
        if name not in program.constants and name not in packed:
            raise PassError(f"the graph reads {name}, which is neither a weight nor packed")
        if name in program.aliases:
            raise PassError(f"{name} is tied to {program.aliases[name]}, but has become a weight of its own")
    for name in program.constants:
        if name not in weights and name not in sources:
            raise PassError(f"the weight {name} is an orphan: neither the graph nor a packed weight needs it")
    for node in program.graph.nodes:
        if node.op == "call_function":
            verify_call(node)


def verify_call(node: Node) -> None:
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aograph" and target is not prune24:
        x, op = node.all_input_nodes[0].meta["val"], OPS.get(target._schema.name.removeprefix("aograph::"))
        if op is None or x.dtype not in op.takes:
            raise PassError(f"{node.format_node()}: {target} does not take {describe(x)}")
    values = tuple(n.meta.get("val") for n in (node, *node.all_input_nodes))
    seen = node.meta.get("verified")
    if seen is not None and seen[0] == (node.target, node.args, node.kwargs) and same_objects(seen[1], values):
        return
    if "val" not in node.meta:
        raise PassError(f"{node.format_node()} has no meta['val']")
    known = not isinstance(node.target, torch._ops.HigherOrderOperator) and not DATA_DEPENDENT & set(tags(node))
    if known and not of_levels(target) and not any(map(batched, (node, *node.all_input_nodes))):
        try:
            fresh = propagate(node)
        except Exception as error:
            raise PassError(f"{node.format_node()} does not fit its inputs: {error}") from error
        if not agree(node.meta["val"], fresh):
            said = describe(node.meta["val"])
            raise PassError(f"{node.format_node()} is said to be {said}, but is {describe(fresh)}")
    node.meta["verified"] = (node.target, node.args, node.kwargs), values


def same_objects(left: tuple, right: tuple) -> bool:
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))


def tags(node: Node) -> list[torch.Tag]:
    return getattr(node.target, "tags", [])


def agree(said: Any, fresh: Any) -> bool:
    """Whether two fake values have the same kind, dtype, device and shape."""
    if isinstance(said, (list, tuple)) and isinstance(fresh, (list, tuple)):
        return len(said) == len(fresh) and all(map(agree, said, fresh))
    if isinstance(said, Tensor) != isinstance(fresh, Tensor):
        return False
    if not isinstance(said, Tensor):
        return True  # numbers: a symbol may be written in several ways
    return (
        said.dtype == fresh.dtype
        and said.device == fresh.device
        and len(said.shape) == len(fresh.shape)
        and all(map(same_size, said.shape, fresh.shape))
    )


def same_size(said: int | torch.SymInt, fresh: int | torch.SymInt) -> bool:
    """Equal as expressions, or at the sizes of the capture where that cannot be seen; asking torch whether two
    symbolic sizes are equal would specialize the graph to those sizes."""
    if expression(said) == expression(fresh):
        return True
    hints = [s.node.hint if isinstance(s, torch.SymInt) else s for s in (said, fresh)]
    return None in hints or hints[0] == hints[1]
