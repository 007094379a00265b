"""FlexAttention: what its two small functions say, where that is something that `kv_attention` can be told.

`score_mod` may leave scores as they are, or cap them by tanh. `mask_mod` may be a conjunction of comparisons of
kv_idx with sums of q_idx, numbers, and tensors indexed with b and q_idx: up to which position a token sees, from which
on its row does, and how many of the newest; and of booleans read from tensors, such as what is no padding. The meaning
is mask_mod's: blocks that a BlockMask leaves out besides, or takes whole, are taken to be those of it.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.fx import Graph, Node

from .language import Any, Builder, Either, Match, P, arguments, match, packet

aten, flex_attention = torch.ops.aten, torch.ops.higher_order.flex_attention
AND = {aten.bitwise_and, aten.logical_and, aten.__and__}
CASTS = {aten.to, aten._to_copy, aten.clone, aten.alias, aten.lift_fresh_copy}
ALL = {aten.new_ones: None, aten.ones: None, aten.full: 1, aten.new_full: 2}  # constants, and where they have it
SIDES = {aten.le: (1, 0), aten.lt: (1, -1), aten.ge: (-1, 0), aten.gt: (-1, -1)}  # a ? b: sign · (a - b) <= slack
READS = {aten.index, torch.ops.higher_order.flat_apply}  # tensor[indices]; as torch.export writes it
INTEGERS = {torch.int64, torch.int32}
INDICES = ("b", "h", "q_idx", "kv_idx")


@dataclass(frozen=True)
class Read:
    """An input of mask_mod, by its number, at indices; a number where there is one for each of its dimensions."""

    tensor: int
    indices: tuple[Sum, ...] = ()

    def __str__(self) -> str:
        return f"tensor {self.tensor}" + "".join(f"[{each}]" for each in self.indices)


@dataclass(frozen=True)
class Sum:
    """constant + Σ count · term; a term is an index of mask_mod by name, or a `Read`."""

    constant: int = 0
    terms: frozenset[tuple[str | Read, int]] = frozenset()

    def plus(self, other: Sum, sign: int = 1) -> Sum:
        counts = Counter(dict(self.terms))
        for term, count in other.terms:
            counts[term] += sign * count
        kept = frozenset((term, count) for term, count in counts.items() if count)
        return Sum(self.constant + sign * other.constant, kept)

    def uses(self, index: str) -> bool:
        return any(
            term == index or (isinstance(term, Read) and any(each.uses(index) for each in term.indices))
            for term, _ in self.terms
        )

    def __str__(self) -> str:
        return " + ".join([*(f"{count} {term}" for term, count in self.terms), str(self.constant)])


@dataclass(frozen=True)
class Bounds:
    """A token sees `first` … `last`, None: from or to the end; of them only the newest `window`, 0: all; and of those
    what all of `shown` say, which read booleans."""

    last: Sum | None
    first: Sum | None
    window: int
    shown: tuple[Read, ...] = ()


class Unknown(Exception):
    """What mask_mod has that is not known."""


def graph_of(node: object) -> Graph | None:
    """The graph of a function that a call takes."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    return getattr(operator.attrgetter(str(node.target))(node.graph.owning_module), "graph", None)


def result(graph: Graph) -> object:
    found = graph.output_node().args[0]
    return found[0] if isinstance(found, (list, tuple)) else found


# --- score_mod ---------------------------------------------------------------------------------------------

CAPPED = P(aten.mul.Tensor, P(aten.tanh, P(aten.div.Tensor, Any("score"), Any("cap"))), Any("cap_again"))


def softcap(score_mod: Node) -> float | str:
    """The cap of scores, 0 where there is none; or what else score_mod is."""
    graph = graph_of(score_mod)
    if graph is None:
        return "its score_mod is no function"
    first, found = next(iter(graph.nodes)), result(graph)
    if found is first:
        return 0.0
    m = match(CAPPED, found) if isinstance(found, Node) else None
    if isinstance(m, Match) and m.score is first and isinstance(m.cap, (int, float)) and m.cap == m.cap_again > 0:
        return float(m.cap)
    return f"its score_mod does more than to cap scores by tanh: it ends in {getattr(found, 'target', found)}"


# --- mask_mod ----------------------------------------------------------------------------------------------


def bounds(mask_mod: object) -> Bounds | str:
    """What mask_mod says, or why that is not known."""
    graph = graph_of(mask_mod)
    if graph is None:
        return "its mask_mod is no function"
    places = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    try:
        parts = factors(result(graph))
        shown = [read(each, places) for each in parts if packet(each.target) in READS]
        found = joined([compared(each, places) for each in parts if packet(each.target) not in READS])
        return replace(found, shown=tuple(shown))
    except Unknown as why:
        return f"its mask_mod {why}"


def factors(value: object) -> list[Node]:
    """The comparisons and booleans that all have to hold."""
    if not isinstance(value, Node) or value.op != "call_function":
        raise Unknown(f"returns {value}")
    kind, given = packet(value.target), arguments(value)
    if kind in AND:
        return [each for side in given for each in factors(side)]
    if kind in CASTS:
        return factors(given[0])
    everything = kind in ALL and (ALL[kind] is None or given[ALL[kind]] == 1)
    return [] if everything else [value]


def compared(node: Node, places: dict[Node, int]) -> tuple[int, Sum]:
    """(1, s) of kv_idx <= s, (-1, s) of kv_idx >= s."""
    kind = packet(node.target)
    if kind not in SIDES:
        raise Unknown(f"has {node.target}: it may be comparisons of kv_idx by <, <=, >, >=, and booleans, joined by &")
    sign, slack = SIDES[kind]
    left, right = (total(each, places) for each in arguments(node)[:2])
    above = left.plus(right, -1)  # sign · above <= slack
    count = dict(above.terms).get("kv_idx", 0)
    rest = above.plus(Sum(0, frozenset([("kv_idx", count)])), -1)
    if abs(count) != 1 or rest.uses("kv_idx") or rest.uses("h"):
        raise Unknown(f"compares {left} and {right}: not kv_idx with what depends on b and q_idx alone")
    other = Sum().plus(rest, -1) if count > 0 else rest  # kv_idx ? other
    way = sign * count
    return way, Sum(other.constant + way * slack, other.terms)


def total(value: object, places: dict[Node, int]) -> Sum:
    """A number as a sum."""
    if isinstance(value, int) and not isinstance(value, bool):
        return Sum(value)
    found = read(value, places)
    if isinstance(found, Read):
        return Sum(0, frozenset([(found, 1)]))
    if isinstance(found, Sum):
        return found
    raise Unknown(f"computes with {value}")


def read(value: object, places: dict[Node, int]) -> Read | Sum:
    """A node as a tensor at indices, or as a sum."""
    if not isinstance(value, Node):
        raise Unknown(f"computes with {value}")
    if value in places:
        at = places[value]
        return Sum(0, frozenset([(INDICES[at], 1)])) if at < len(INDICES) else Read(at - len(INDICES))
    kind, given = packet(value.target), arguments(value)
    if kind in (aten.add, aten.sub) and given[2] == 1:
        return total(given[0], places).plus(total(given[1], places), 1 if kind is aten.add else -1)
    if kind in CASTS and not value.meta["val"].dtype.is_floating_point:
        return read(given[0], places)
    if kind is aten.index:
        tensor, indices = given[0], given[1]
    elif kind is torch.ops.higher_order.flat_apply and str(given[2]).endswith("ModIndex"):
        tensor, *indices = given[3:]
    else:
        raise Unknown(f"has {value.target}")
    base = read(tensor, places)
    if not isinstance(base, Read):
        raise Unknown(f"indexes {tensor}")
    return Read(base.tensor, (*base.indices, *(total(each, places) for each in indices)))


def joined(parts: list[tuple[int, Sum]]) -> Bounds:
    lasts = list(dict.fromkeys(s for way, s in parts if way > 0))
    if len(lasts) > 1:
        raise Unknown(f"has {len(lasts)} bounds on how far a token sees: {' and '.join(map(str, lasts))}")
    last, first, window = (lasts or [None])[0], None, 0
    for start in dict.fromkeys(s for way, s in parts if way < 0):
        width = last.plus(start, -1) if last is not None else None
        if width is not None and not width.terms and not window and width.constant >= 0:
            window = width.constant + 1
        elif not start.uses("q_idx") and first is None:
            first = start
        else:
            raise Unknown(f"shows positions from {start} on, which is no window of a constant size, nor by row")
    return Bounds(last, first, window)


# --- as nodes ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Where sums become nodes: inputs of mask_mod, and the sizes of the indices that a result has a dimension for."""

    g: Builder
    inputs: list[Node]
    sizes: dict[str, int | Node]
    device: torch.device

    def sum(self, s: Sum) -> Node:
        """int64, of a size of 1 where it is the same for all of an index."""
        g, found = self.g, None
        for term, count in sorted(s.terms, key=str):
            each = self.read(term) if isinstance(term, Read) else self.index(term)
            each = g.call(aten.mul.Tensor, each, count) if count != 1 else each
            found = each if found is None else g.call(aten.add.Tensor, found, each)
        if found is None:
            found = g.call(aten.full.default, [], s.constant, dtype=torch.int64, device=self.device)
        elif s.constant:
            found = g.call(aten.add.Tensor, found, s.constant)
        found = found if found.meta["val"].dtype == torch.int64 else g.call(aten.to.dtype, found, torch.int64)
        whole = found.meta["val"].ndim == len(self.sizes)
        return found if whole else g.call(aten.view.default, found, [1] * len(self.sizes))

    def read(self, r: Read) -> Node:
        at = [self.sum(index) for index in r.indices]
        return self.g.call(aten.index.Tensor, self.inputs[r.tensor], at) if at else self.inputs[r.tensor]

    def index(self, name: str) -> Node:
        count = self.g.call(aten.arange.default, self.sizes[name], dtype=torch.int64, device=self.device)
        return self.g.call(aten.view.default, count, [-1 if each == name else 1 for each in self.sizes])


# --- the pattern -------------------------------------------------------------------------------------------


def score_known(m: Match) -> bool | str:
    known = softcap(m.score_mod)
    return isinstance(known, float) or known


def mask_known(m: Match) -> bool | str:
    known = bounds(m.block_mask[-1])
    if not isinstance(known, Bounds):
        return known
    sums = [s for s in (known.last, known.first) if s is not None]
    sums += [index for each in known.shown for index in each.indices]
    wanted = [(each, INTEGERS) for s in sums for each in all_reads(s)] + [(each, {torch.bool}) for each in known.shown]
    for each, dtypes in wanted:
        tensor = m.mask_inputs[each.tensor]
        value = tensor.meta["val"] if isinstance(tensor, Node) else None
        if not isinstance(value, torch.Tensor) or value.dtype not in dtypes:
            kind = "integers" if dtypes is INTEGERS else "booleans"
            return f"its mask_mod reads {getattr(value, 'dtype', tensor)}, not a tensor of {kind}"
        if value.ndim != len(each.indices):
            return f"its mask_mod reads {each} of a tensor {list(value.shape)}"
    return True


def all_reads(s: Sum) -> list[Read]:
    found = [term for term, _ in s.terms if isinstance(term, Read)]
    return [*found, *(inner for each in found for index in each.indices for inner in all_reads(index))]


def flex(query: object, key: Either, value: Either, *guards: Callable[[Match], bool | str]) -> P:
    """The output of a call whose functions are known."""
    given = Any("score_mod"), Any("block_mask"), Any("factor"), Any(), [], Any("mask_inputs")
    call = P(flex_attention, query, key, value, *given, where=(score_known, mask_known))
    return P(operator.getitem, call, 0, where=guards)
