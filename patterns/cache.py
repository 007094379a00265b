"""Caches of keys and values, and what stores new tokens in them.

A cache is a tensor [B, H, S, D] that the graph writes: B rows, H heads, S positions. A pattern of `UPDATES` binds
`cache` and `new`; `stored` gives what it stores as [B, H, T, D] and the positions, [T] or [B, T].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Node

from .broadcast import Size, behind, counts, size, sizes
from .language import Any, Builder, Match, P, arguments, mutates

aten = torch.ops.aten
new = Any("new")
FLOATS = {torch.float16, torch.bfloat16, torch.float32}


# --- reading nodes -----------------------------------------------------------------------------------------


def memory(value: object) -> Node | None:
    """The buffer or input that a node is the whole of: it, or what operators that wrote it in place returned; or what
    a packed cache was unpacked to."""
    while isinstance(value, Node) and value.op == "call_function" and mutates(value) == arguments(value)[:1] != []:
        value = arguments(value)[0]
    known = isinstance(value, Node) and (value.op in ("get_attr", "placeholder") or unpacks(value))
    return value if known else None


def unpacks(node: Node) -> bool:
    """Whether a node is a packed cache in full precision."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.name() == "aograph::kv_dequantize"


@dataclass(frozen=True)
class Cache:
    """Matches the whole of a buffer or an input with four dimensions, or of an unpacked cache, and binds that."""

    name: str

    def fit(self, value, found: Match) -> str | None:
        cache = memory(value)
        if cache is None or len(sizes(cache)) != 4:
            return f"{value} is no cache as a whole"
        return found.bind(self.name, cache)


@dataclass(frozen=True)
class Index:
    """Matches a tensor that a cache is indexed with, and binds it."""

    name: str

    def fit(self, value, found: Match) -> str | None:
        return found.bind(self.name, value) if isinstance(value, Node) else f"its index is {value}, not a tensor"


# --- updates: guards ---------------------------------------------------------------------------------------


def along_positions(m: Match) -> bool | str:
    return m.dim in (2, -2) or f"it is written along dimension {m.dim}, not along positions"


def list_of_positions(m: Match) -> bool | str:
    found = m.positions.meta["val"]
    fits = found.ndim == 1 and found.dtype == torch.int64
    return fits or f"it is written at {found.dtype} {list(found.shape)}, not at a list of int64 positions"


def one_for_each_position(m: Match) -> bool | str:
    return stored(m, sizes(m.positions)[0])


def stored(m: Match, T: str) -> bool | str:
    """Whether new is [B, H, T, D]."""
    B, H, _, D = sizes(m.cache)
    return is_new(m, [B, H, T, D])


def is_new(m: Match, wanted: list[str]) -> bool | str:
    """Whether new is floats of those sizes; it and what the cache is indexed with are where the cache is.

    Leading sizes of 1 may be missing: Python's item assignment takes them away. Two symbols may stand for one number of
    tokens: where neither is 1, indexing takes nothing but equal ones.
    """
    missing = len(wanted) - len(sizes(m.new)) if isinstance(m.new, Node) else -1
    same = missing >= 0 and all(
        found == size or not (found.isdecimal() or size.isdecimal())
        for found, size in zip(["1"] * missing + sizes(m.new), wanted, strict=True)
    )
    if not same or m.new.meta["val"].dtype not in FLOATS:
        found = f"{m.new.meta['val'].dtype} [{', '.join(sizes(m.new))}]" if isinstance(m.new, Node) else m.new
        return f"what is stored is {found}, not floats [{', '.join(wanted)}]"
    given = [m.new, *(m.bindings[name] for name in ("positions", "index") if name in m.bindings)]
    return len({each.meta["val"].device for each in (m.cache, *given)}) == 1 or "its index is on another device"


def as_long_as_the_slice(m: Match) -> bool | str:
    return stored(m, sizes(arguments(m.root)[0])[2])


def known_start(m: Match) -> bool | str:
    return not isinstance(m.start, int) or m.start >= 0 or isinstance(m.cache.meta["val"].shape[2], int)


def positions_of_rows(m: Match) -> bool | str:
    """cache[arange(B), :, positions] = new, with a list for each row, or one position for each."""
    B, H, _, D = sizes(m.cache)
    rows, positions = m.rows.meta["val"], m.positions.meta["val"]
    if rows.ndim != positions.ndim or rows.ndim not in (1, 2) or positions.dtype != torch.int64:
        return f"it is written at rows {sizes(m.rows)} and {positions.dtype} positions {sizes(m.positions)}"
    base, dims = behind(m.rows, [0, *[None] * (rows.ndim - 1)])
    if not counts(base, B) or dims[0] not in (0, None) or sizes(m.rows)[1:] not in ([], ["1"]):
        return "the rows that it is written at are not all of them, in order"
    return is_new(m, [B, *sizes(m.positions)[1:], H, D])


def index_of_positions(m: Match) -> bool | str:
    """A scatter whose index is the same for all heads and along D."""
    _, dims = behind(m.index, [0, 1, 2, 3])
    same = dims[1] is None and dims[3] is None and sizes(m.index) == sizes(m.new)
    return (same and stored(m, sizes(m.index)[2])) or "its index is not the same for all heads and all of a head"


# --- updates: what is stored, and where --------------------------------------------------------------------


def with_rank(m: Match, g: Builder, rank: int) -> Node:
    """new with the leading sizes of 1 that it is missing."""
    new = m.new
    for _ in range(rank - len(sizes(new))):
        new = g.call(aten.unsqueeze.default, new, 0)
    return new


def as_is(m: Match, g: Builder) -> tuple[Node, Node]:
    return with_rank(m, g, 4), m.positions


def at_rows(m: Match, g: Builder) -> tuple[Node, Node]:
    if len(sizes(m.positions)) == 1:
        new = with_rank(m, g, 3)
        return g.call(aten.unsqueeze.default, new, 2), g.call(aten.unsqueeze.default, m.positions, 1)
    B = m.cache.meta["val"].shape[0]
    positions = m.positions if sizes(m.positions)[0] == str(B) else g.call(aten.expand.default, m.positions, [B, -1])
    return g.call(aten.transpose.int, with_rank(m, g, 4), 1, 2), positions


def at_index(m: Match, g: Builder) -> tuple[Node, Node]:
    return m.new, g.call(aten.select.int, g.call(aten.select.int, m.index, 3, 0), 1, 0)


def from_start(m: Match, g: Builder) -> tuple[Node, Node]:
    start = m.start or 0
    if isinstance(start, int) and start < 0:
        start += m.cache.meta["val"].shape[2]
    new = with_rank(m, g, 4)
    return new, counted(m, g, start, size(g, new, 2))


def at_one(m: Match, g: Builder) -> tuple[Node, Node]:
    return g.call(aten.unsqueeze.default, with_rank(m, g, 3), 2), counted(m, g, m.start, 1)


def counted(m: Match, g: Builder, start: Size, count: Size) -> Node:
    """[T] int64: as many positions from `start` on."""
    positions = g.call(aten.arange.default, count, dtype=torch.int64, device=m.cache.meta["val"].device)
    return positions if start == 0 else g.call(aten.add.Tensor, positions, start)


def one_position(m: Match) -> bool | str:
    B, H, _, D = sizes(m.cache)
    inside = not isinstance(m.start, int) or m.start >= 0
    return is_new(m, [B, H, D]) if inside else "its position is counted from the back"


@dataclass(frozen=True)
class Update:
    """`stored(match, builder)` gives new [B, H, T, D] and positions [T] or [B, T] of what fits `pattern`."""

    pattern: P
    stored: Callable[[Match, Builder], tuple[Node, Node]]


cache, dim, start, positions = Cache("cache"), Any("dim"), Any("start"), Index("positions")

# fmt: off
UPDATES = [
    Update(P(aten.index_copy_, cache, dim, positions, new, where=(
        along_positions, list_of_positions, one_for_each_position)), as_is),
    Update(P(aten.scatter_.src, cache, dim, Any("index"), new, where=(along_positions, index_of_positions)), at_index),
    # cache[:, :, positions] = new; cache[rows, :, positions] = new
    *(Update(P(aten.index_put_, cache, [None, None, positions, *rest], new, where=(
        list_of_positions, one_for_each_position)), as_is) for rest in ([], [None])),
    *(Update(P(aten.index_put_, cache, [Index("rows"), None, positions, *rest], new, where=positions_of_rows), at_rows)
      for rest in ([], [None])),
    # cache[:, :, start:end] = new; cache[:, :, position] = new
    *(Update(P(aten.copy_, P(part, cache, dim, start, Any()), new, Any(), where=(
        along_positions, known_start, as_long_as_the_slice)), from_start) for part in (aten.slice, aten.narrow)),
    Update(P(aten.copy_, P(aten.select, cache, dim, start), new, Any(), where=(along_positions, one_position)), at_one),
]
# fmt: on
