"""What the tokens of an attention see, as `kv_attention` takes it.

A mask of booleans, or one to add that was made of one, is taken apart: where it says how far each token sees, that
becomes a position for each, and where it says from which one on, a window. A token that sees nothing gets zeros.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from .attention import HIDDEN, lengths, number, read
from .broadcast import Dims, Size, aligned, arranged, behind, counts, size, sizes
from .flex import AND, SIDES, Grid, Sum, bounds
from .language import Builder, Match, arguments, packet, stays

aten = torch.ops.aten
STEPS = {aten.add: 1, aten.sub: -1}
ZEROS = {aten.zeros, aten.zeros_like, aten.new_zeros}
NOT, OR = {aten.bitwise_not, aten.logical_not}, {aten.bitwise_or, aten.logical_or, aten.__or__}


@dataclass(frozen=True)
class Part:
    """A factor of a mask: a node, its dimensions by those of the mask, and whether True hides."""

    node: Node
    dims: Dims
    negated: bool


@dataclass(frozen=True)
class Limit:
    """A token sees up to `node` + `shift`, or, where it is the `first`, from there on; `dims` are the node's dimensions
    for the mask's B and T."""

    part: Part
    node: Node
    dims: Dims
    shift: int
    first: bool


def parts(node: Node, dims: Dims, negated: bool = False) -> Iterator[Part]:
    """The factors of a mask of booleans; all of them have to show a position."""
    node, dims = behind(node, dims)
    kind = packet(node.target) if stays(node) else None
    if kind in NOT:
        yield from parts(arguments(node)[0], dims, not negated)
    elif kind in (OR if negated else AND) and all(isinstance(each, Node) for each in arguments(node)):
        for each in arguments(node):
            yield from parts(each, aligned(node, each, dims), negated)
    else:
        yield Part(node, dims, negated)


def limit(part: Part, length: str) -> Limit | None:
    """Up to or from which position tokens see, where that is all that a part of a mask says, as in
    arange(length) <= position."""
    compare, kind = part.node, packet(part.node.target)
    if kind not in SIDES or not all(isinstance(each, Node) and sizes(each) for each in arguments(compare)):
        return None
    sign, slack = SIDES[kind]
    sign, slack = (-sign, -1 - slack) if part.negated else (sign, slack)
    for (index, position), side in (arguments(compare), sign), (reversed(arguments(compare)), -sign):
        along, where = behind(index, aligned(compare, index, part.dims))
        if counts(along, length) and where == [None, None, None, 0]:
            of, dims, shift = ahead(position, aligned(compare, position, part.dims))
            if of.meta["val"].dtype == torch.int64 and dims[1] is None and dims[3] is None:
                return Limit(part, of, [dims[0], dims[2]], shift + side * slack, side < 0)
    return None


def ahead(node: Node, dims: Dims) -> tuple[Node, Dims, int]:
    """What stands behind views, and behind numbers that are added to what nothing writes; their sum."""
    total = 0
    while True:
        node, dims = behind(node, dims)
        given = arguments(node) if packet(node.target) in STEPS else ()
        if len(given) != 3 or type(given[1]) is not int or given[2] != 1 or not (stays(given[0]) and stays(node)):
            return node, dims, total
        node, total = given[0], total + STEPS[packet(node.target)] * given[1]


@dataclass(frozen=True)
class Seen:
    """What tokens see, as `kv_attention` takes it."""

    positions: Node
    start: Node | None = None
    mask: Node | None = None
    window: int = 0


def seen(m: Match, g: Builder) -> Seen:
    """Of the S positions of a cache; positions [B, T] int64, up to which each token sees, start [B] int64, and of a
    mask what is left, [B or 1, Hq or 1, T or 1, S]."""
    B, T = size(g, m.q, 0), size(g, m.q, 2)
    found = said_by_flex(m, g, B, T) if "block_mask" in m.bindings else said_by_mask(m, g, T)
    positions = g.call(aten.expand.default, within(g, found.positions, m), [B, T])
    return replace(found, positions=positions, mask=spread(g, found.mask, m))


def said_by_flex(m: Match, g: Builder, B: Size, T: Size) -> Seen:
    known, cache = bounds(m.block_mask[-1]), m.key.meta["val"]
    rows = Grid(g, list(m.mask_inputs), {"b": B, "q_idx": T}, cache.device)
    whole = replace(rows, sizes={"b": B, "h": size(g, m.q, 1), "q_idx": T, "kv_idx": size(g, read(m), 2)})
    start = mask = None
    if known.first is not None:
        start = g.call(aten.expand.default, g.call(aten.select.int, rows.sum(known.first), 1, 0), [B])
    for each in map(whole.read, known.shown):
        mask = each if mask is None else g.call(aten.logical_and.default, mask, each)
    return Seen(rows.sum(known.last or Sum(cache.shape[2] - 1)), start, mask, known.window)


def said_by_mask(m: Match, g: Builder, T: Size) -> Seen:
    """From and up to the positions that a mask compares with; without one, as `is_causal` says."""
    given, negated = m.bindings.get("mask"), False
    if m.bindings.get("hidden") is not None:
        given, negated = m.hidden, True
    if given is not None:
        rank = len(sizes(given))
        whole = [None if i < 4 - rank or sizes(given)[i - 4 + rank] == "1" else i - 4 + rank for i in range(4)]
        shown = Part(given, whole, negated) if given.meta["val"].dtype == torch.bool else chosen(given, whole)
        found = list(parts(shown.node, shown.dims, shown.negated)) if shown is not None else []
        limits = [each for part in found for n in lengths(m) if (each := limit(part, n)) is not None]
        far = next((each for each in limits if not each.first), None)
        if far is not None and all(stays(part.node) for part in found):
            near = next((each for each in limits if within_reach(each, far) and read(m) is m.key), None)
            told = [far.part, near.part] if near is not None else [far.part]
            window = far.shift - near.shift + 1 if near is not None else 0
            return Seen(reached(far), None, joined([part for part in found if part not in told], g), window)
    device = m.key.meta["val"].device
    if m.bindings.get("causal") is True:
        positions = g.call(aten.arange.default, T, dtype=torch.int64, device=device)
    else:
        positions = g.call(aten.full.default, [T], m.key.meta["val"].shape[2] - 1, dtype=torch.int64, device=device)
    for _ in range(4 - len(sizes(given)) if given is not None else 0):
        given = g.call(aten.unsqueeze.default, given, 0)
    return Seen(positions, mask=g.call(aten.logical_not.default, given) if negated else given)


def chosen(node: Node, dims: Dims) -> Part | None:
    """The booleans that a mask to add was made of, as a choice between 0 and what hides."""
    while packet(node.target) in (aten.unsqueeze, aten.expand, aten.view):
        before = node
        node, dims = behind(node, dims)
        if node is before:
            return None
    given = arguments(node)
    if not stays(node):
        return None
    if packet(node.target) is aten.masked_fill:
        shown, other, condition, negated = given[0], given[2], given[1], True
    elif packet(node.target) is aten.where and len(given) == 3:
        condition, shown, other = given
        negated = number(shown) != 0
        shown, other = (other, shown) if negated else (shown, other)
    else:
        return None
    zero = number(shown) == 0 or (isinstance(shown, Node) and packet(shown.target) in ZEROS and stays(shown))
    hides = number(other)
    if not zero or hides is None or hides > HIDDEN or condition.meta["val"].dtype != torch.bool:
        return None
    return Part(condition, aligned(node, condition, dims), negated)


def within_reach(near: Limit, far: Limit) -> bool:
    """Whether two limits are a window: they depend on the same position, and something is between them."""
    same = near.first and near.node is far.node and near.dims == far.dims and stays(far.node)
    return same and near.shift <= far.shift


def reached(far: Limit) -> Node:
    """[B or 1, T or 1]: taken where it is compared, as it may be written before the attention."""
    g = Builder(far.part.node)
    positions = arranged(g, far.node, far.dims)
    if far.shift:
        return g.call(aten.add.Tensor, positions, far.shift)
    return positions if stays(far.node) else g.call(aten.clone.default, positions)


def joined(left: list[Part], g: Builder) -> Node | None:
    """One mask of parts; None of none."""
    mask = None
    for part in left:
        each = arranged(g, part.node, part.dims)
        each = g.call(aten.logical_not.default, each) if part.negated else each
        mask = each if mask is None else g.call(aten.logical_and.default, mask, each)
    return mask


def within(g: Builder, positions: Node, m: Match) -> Node:
    """Positions of which none is behind what is read of a cache."""
    if read(m) is m.key:
        return positions
    end = m.key_end
    if isinstance(end, Node):
        last = g.call(operator.sub, end, 1)
    else:
        last = end - 1 if end >= 0 else end - 1 + m.key.meta["val"].shape[2]
    return g.call(aten.clamp.default, positions, None, last)


def spread(g: Builder, mask: Node | None, m: Match) -> Node | None:
    """A mask with all of the S positions, whatever it says of those that are not read; where it is the same for all
    tokens it stays one for all."""
    if mask is None or sizes(mask)[3] == sizes(m.key)[2]:
        return mask
    S = m.key.meta["val"].shape[2]
    if read(m) is not m.key and sizes(mask)[3] != "1":
        known = size(g, mask, 3)
        room = S - known if isinstance(known, int) else g.call(operator.sub, S, known)
        return g.call(aten.constant_pad_nd.default, mask, [0, room], 0)
    return g.call(aten.expand.default, mask, [-1, -1, -1, S])
