"""Tensors as they were before they were broadcast: a node and, for each dimension of what it became, one of its own."""

from __future__ import annotations

import torch
from torch.fx import Node

from .language import Builder, arguments, packet

aten = torch.ops.aten

Dims = list[int | None]  # for each dimension of what a node became that of the node, None: it is the same along it
Size = int | Node


def sizes(node: Node) -> list[str]:
    """The sizes of a tensor as text: asking torch whether two symbolic sizes are equal would specialize the graph."""
    return [str(size) for size in getattr(node.meta.get("val"), "shape", ())]


def size(g: Builder, node: Node, dim: int) -> Size:
    """A size as a number, or as the node that computes it."""
    known = node.meta["val"].shape[dim]
    return known if isinstance(known, int) else g.call(aten.sym_size.int, node, dim)


def aligned(node: Node, operand: Node, dims: Dims) -> Dims:
    """Dimensions of a node as those of an operand that was broadcast to it."""
    ndim, missing = len(sizes(operand)), len(sizes(node)) - len(sizes(operand))
    assert ndim >= 0
    return [None if d is None or d < missing or sizes(operand)[d - missing] == "1" else d - missing for d in dims]


def behind(node: Node, dims: Dims) -> tuple[Node, Dims]:
    """What stands behind views that only broadcast, behind casts of integers, and behind an offset of 0."""
    while node.op == "call_function":
        kind, given = packet(node.target), arguments(node)
        source = given[0] if given and isinstance(given[0], Node) else None
        if kind is aten.unsqueeze:
            at = given[1] % len(sizes(node))
            dims = [None if d == at or d is None else d - (d > at) for d in dims]
        elif kind in (aten.expand, aten.expand_as):
            dims = aligned(node, source, dims)
        elif kind in (aten.view, aten.reshape):
            kept = [[i for i, s in enumerate(sizes(each)) if s != "1"] for each in (node, source)]
            if [sizes(node)[i] for i in kept[0]] != [sizes(source)[i] for i in kept[1]]:
                break
            places = dict(zip(*kept, strict=True))
            dims = [None if d is None else places.get(d) for d in dims]
        elif kind is aten.add and type(given[1]) is int and given[1] == 0:
            pass
        elif kind not in (aten.to, aten._to_copy) or not keeps_integers(source, node):
            break
        node = source
    return node, [None if d is None or sizes(node)[d] == "1" else d for d in dims]


def keeps_integers(source: Node, node: Node) -> bool:
    dtypes = [each.meta["val"].dtype for each in (source, node)]
    return not any(d.is_floating_point or d.is_complex for d in dtypes) and (dtypes[0] == torch.bool) == (
        dtypes[1] == torch.bool
    )


def counts(node: Node, length: str) -> bool:
    """Whether a node is arange(length)."""
    if node.op != "call_function" or packet(node.target) is not aten.arange or sizes(node) != [length]:
        return False
    numbers = {aten.arange.default: [0, 1], aten.arange.start: [arguments(node)[0], 1]}
    return numbers.get(node.target, [arguments(node)[0], arguments(node)[2]]) == [0, 1]


def arranged(g: Builder, node: Node, dims: Dims) -> Node:
    """A node with its dimensions where `dims` says, and dimensions of 1 where it says None."""
    for d in reversed(range(len(sizes(node)))):
        if d not in dims:
            node = g.call(aten.select.int, node, d, 0)
    for i, d in enumerate(dims):
        if d is None:
            node = g.call(aten.unsqueeze.default, node, i)
    return node
