"""Removes what says nothing in an inference graph: asserts, detaches, stray clones and casts, dead dropout."""

from __future__ import annotations

import torch
from torch.fx import Node

from ..patterns.language import Any, Builder, Match, P, Rule, mutates, of_levels, packet, rewrite, views_of, written
from ..program import Program
from .base import Pass, Stage

aten = torch.ops.aten
x = Any("x")
EVERYTHING = 2**63 - 1  # how torch writes the end of what has none
ASSERTS = {aten._assert_async, aten._assert_scalar, aten._assert_tensor_metadata, aten.sym_constrain_range,
           aten.sym_constrain_range_for_size, torch.ops.profiler._record_function_exit}  # fmt: skip


def same_kind(m: Match) -> bool | str:
    """A cast to the dtype, device and layout that x has."""
    before, after = m.x.meta["val"], m.root.meta["val"]
    same = before.dtype == after.dtype and before.device == after.device
    # As text: asking torch whether two symbolic strides are equal would specialize the graph to its sizes.
    return (same and str(before.stride()) == str(after.stride())) or "it changes dtype, device or layout"


def never_written(m: Match) -> bool | str:
    """A copy that can be told from its source only by writing one of them."""
    source = m.x
    if source.op == "placeholder" or any(user.op == "output" for user in m.root.users):
        return "it separates an input from an output"
    return not (written(source) or written(m.root)) or "one of the two is written in place"


def without_gradients(m: Match) -> bool | str:
    """A detach says nothing only where no gradients are recorded."""
    return not m.root.meta.get("grad") or "gradients are recorded here"


def whole(m: Match) -> bool | str:
    """A slice that leaves nothing out."""
    size = m.x.meta["val"].shape[m.dim]
    ends = m.end is None or (isinstance(m.end, int) and m.end >= (size if isinstance(size, int) else EVERYTHING))
    return (m.start in (None, 0) and ends) or "it leaves something out"


def first(m: Match, g: Builder) -> Node:
    return m.x


RULES = [
    Rule("slice of all", P(aten.slice, x, Any("dim"), Any("start"), Any("end"), where=whole), first),
    Rule("detach", P(aten.detach, x, where=without_gradients), first),
    Rule("detach_", P(aten.detach_, x, where=without_gradients), first),
    Rule("alias", P(aten.alias, x), first),
    Rule("lift_fresh_copy", P(aten.lift_fresh_copy, x, where=never_written), first),
    Rule("clone", P(aten.clone, x, where=(never_written, same_kind)), first),
    Rule("contiguous", P(aten.contiguous, x, Any(), where=same_kind), first),
    Rule("dropout of an inference graph", P(aten.dropout, x, Any(), False), first),
    Rule("feature dropout of an inference graph", P(aten.feature_dropout, x, Any(), False), first),
    Rule("dropout in place", P(aten.dropout_, x, Any(), False), first),
    *(
        Rule("cast to the same", P(op, x, *wild, where=(same_kind, never_written)), first)
        for op, wild in (
            (aten.to.dtype, [Any()] * 4),
            (aten.to.device, [Any()] * 5),
            (aten.to.dtype_layout, [Any()] * 7),
            (aten.to.other, [Any()] * 4),
            (aten._to_copy.default, [Any()] * 6),
        )
    ),
]


class RemoveNoops(Pass):
    """Applies `RULES`, and erases asserts: shapes are checked at the call, values are the model's own."""

    name = "remove_noops"
    stage = Stage.NORMALIZE
    after = ("inline_subgraphs",)

    def run(self, program: Program, context) -> int:
        asserts = [n for n in program.graph.nodes if packet(n.target) in ASSERTS and not n.users]
        for node in asserts:
            program.graph.erase_node(node)
        hits, _ = rewrite(program.graph, RULES)
        return len(asserts) + sum(hits.values()) + erase_dead(program)


def erase_dead(program: Program) -> int:
    """Erases calls and weights that nothing uses, weights of packed linears only from the graph; writes stay, but for
    those to what nothing else uses, and so do levels of vmap, but for those in which nothing is left."""
    erased, packed = 0, {name for pack in program.packs.values() for name in pack.weight.leaves}
    for node in reversed(list(program.graph.nodes)):
        impure = (
            node.op in ("placeholder", "output")
            or writes(node)
            or of_vmap(node)
            or (node.op == "call_function" and not mutates(node) and node.is_impure())
        )
        if not node.users and not impure:
            program.graph.erase_node(node)
            erased += 1
            if node.op == "get_attr" and node.target not in packed:
                program.constants.pop(node.target, None)
    return erased + erase_levels(program)


def writes(node: Node) -> bool:
    """Whether a node writes what is not its own: a new tensor that nothing reads later is."""
    return not all(
        isinstance(each.target, torch._ops.OpOverload)
        and all(user <= node for user in each.users)
        and views_of(each) in ([], [node])
        and not mutates(each)
        and not any(each in views_of(source) for source in each.all_input_nodes)
        for each in mutates(node)
    )


def of_vmap(node: Node) -> bool:
    """Whether a node begins or ends a level of vmap."""
    return of_levels(node.target) and node.target.__name__ in ("_vmap_increment_nesting", "_vmap_decrement_nesting")


def erase_levels(program: Program) -> int:
    """Erases the beginnings and ends of those levels of vmap in which no tensor is batched any more."""
    open_levels: list[tuple[Node, list[Node]]] = []
    erased = 0
    for node in list(program.graph.nodes):
        if of_vmap(node) and node.target.__name__ == "_vmap_increment_nesting":
            open_levels.append((node, []))
        elif of_vmap(node) and open_levels:
            start, batched = open_levels.pop()
            if batched:
                for level in open_levels[-1:]:
                    level[1].extend(batched)
            else:
                program.graph.erase_node(node)
                program.graph.erase_node(start)
                erased += 2
        elif open_levels and of_levels(node.target):
            open_levels[-1][1].append(node)
    return erased
