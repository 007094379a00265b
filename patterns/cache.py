"""Caches of keys and values: what stores new tokens in them, and the attention that reads them.

A cache is a tensor [B, H, S, D] that the graph writes: B rows, H heads, S positions. A pattern of `UPDATES` binds
`cache` and `new`; `stored` gives what it stores as [B, H, T, D] and the positions, [T] or [B, T]. A pattern of
`ATTENTIONS` binds `q` [B, Hq, T, D], `key` and `value`, which are caches, and what `scale_of`, `softcap_of` and
`limits` read. `limits` takes a mask apart: where it says how far each token sees, that becomes a position for each.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .flex import Sum, bounds, computed, flex, flex_attention, softcap
from .language import Any, Builder, Either, Match, P, arguments, mutates, packet, stays

aten = torch.ops.aten
new = Any("new")
FLOATS = {torch.float16, torch.bfloat16, torch.float32}

Size = "int | Node"


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


def sizes(node: Node) -> list[str]:
    """The sizes of a tensor as text: asking torch whether two symbolic sizes are equal would specialize the graph."""
    return [str(size) for size in getattr(node.meta.get("val"), "shape", ())]


def size(g: Builder, node: Node, dim: int) -> Size:
    """A size as a number, or as the node that computes it."""
    known = node.meta["val"].shape[dim]
    return known if isinstance(known, int) else g.call(aten.sym_size.int, node, dim)


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

    name: str
    pattern: P
    stored: Callable[[Match, Builder], tuple[Node, Node]]


cache, dim, start, positions = Cache("cache"), Any("dim"), Any("start"), Index("positions")

# fmt: off
UPDATES = [
    Update("index_copy_", P(aten.index_copy_, cache, dim, positions, new, where=(
        along_positions, list_of_positions, one_for_each_position)), as_is),
    *(Update("cache[:, :, positions] = new", P(aten.index_put_, cache, [None, None, positions, *rest], new, where=(
        list_of_positions, one_for_each_position)), as_is) for rest in ([], [None])),
    *(Update("cache[rows, :, positions] = new", P(
        aten.index_put_, cache, [Index("rows"), None, positions, *rest], new, where=positions_of_rows), at_rows)
      for rest in ([], [None])),
    Update("cache[:, :, start:end] = new", P(aten.copy_, P(aten.slice, cache, dim, start, Any()), new, Any(), where=(
        along_positions, known_start, as_long_as_the_slice)), from_start),
    Update("narrow(2, start, length).copy_", P(aten.copy_, P(aten.narrow, cache, dim, start, Any()), new, Any(), where=(
        along_positions, known_start, as_long_as_the_slice)), from_start),
    Update("cache[:, :, position] = new", P(aten.copy_, P(aten.select, cache, dim, start), new, Any(), where=(
        along_positions, one_position)), at_one),
    Update("scatter_", P(aten.scatter_.src, cache, dim, Any("index"), new, where=(
        along_positions, index_of_positions)), at_index),
]
# fmt: on


# --- attention ---------------------------------------------------------------------------------------------


def swaps_last_two(m: Match) -> bool | str:
    return {m.one % 4, m.other % 4} == {2, 3} or "keys are transposed otherwise than [B, H, D, S]"


def along(name: str) -> Callable[[Match], bool | str]:
    """Whether what a softmax consists of is along positions."""

    def guard(m: Match) -> bool | str:
        dim = m.bindings[name]
        return dim in (3, -1) or f"{name.replace('_dim', '')} is over dimension {dim}, not over positions"

    return guard


def sinks_fit(m: Match) -> bool | str:
    """Whether what is concatenated to the scores is a logit for each query head."""
    if m.sinks_dim not in (3, -1) or not isinstance(m.sinks, Node) or len(sizes(m.sinks)) != 4:
        return f"{m.sinks} is concatenated to its scores along dimension {m.sinks_dim}"
    base, dims = behind(m.sinks, [0, 1, 2, 3])
    one = sizes(m.sinks)[3] == "1" and [dims[0], *dims[2:]] == [None] * 3 and m.sinks.meta["val"].dtype in FLOATS
    return (one and stays(base)) or f"its sinks [{', '.join(sizes(m.sinks))}] are no logit for each query head"


def without_sinks(m: Match) -> bool | str:
    whole = str(m.until) == "-1" or (isinstance(m.until, int) and str(m.until) == sizes(read(m))[2])
    return (m.of in (3, -1) and whole) or f"of its probabilities with sinks {m.of}, :{m.until} is taken"


def same_softcap(m: Match) -> bool | str:
    capped = isinstance(m.cap, (int, float)) and m.cap == m.cap_again and m.cap > 0
    return capped or f"tanh between / {m.cap} and * {m.cap_again} is no softcap"


def numbers(*names: str) -> Callable[[Match], bool | str]:
    def guard(m: Match) -> bool | str:
        no = [name for name in names if not isinstance(m.bindings.get(name), (int, float, type(None)))]
        return not no or f"its {no[0]} is no number"

    return guard


def adds(m: Match) -> bool | str:
    found = m.mask.meta["val"].dtype if isinstance(m.mask, Node) else m.mask
    return found in FLOATS or f"what is added to its scores is no mask: {found}"


def hides(m: Match) -> bool | str:
    """A fill from which nothing is left after the softmax."""
    fill = m.fill
    if isinstance(fill, Node) and packet(fill.target) in (aten.full, aten.scalar_tensor):
        fill = [a for a in fill.args if isinstance(a, (int, float))][:1] or [None]
        fill = fill[0]
    return (isinstance(fill, (int, float)) and fill <= -1e4) or f"what is hidden is filled with {m.fill}, not with -inf"


def heads_repeated(name: str) -> Callable[[Match], bool | str]:
    """Head i of what was repeated is head i // n of the cache."""

    def guard(m: Match) -> bool | str:
        if f"{name}_heads" not in m.bindings:
            return True
        repeated, (B, H, S, D) = m.bindings[f"{name}_heads"].meta["val"], sizes(read(m, name))
        heads = repeated.shape[1] if repeated.ndim == 4 else None
        same = heads is not None and [str(s) for s in repeated.shape] == [B, str(heads), S, D]
        whole = same and isinstance(heads, int) and H.isdecimal() and heads % int(H) == 0
        return whole or f"the {name}s are repeated otherwise than for groups of heads"

    return guard


def read(m: Match, name: str = "key") -> Node:
    """What of a cache is read: the cache, or its first positions."""
    return m.bindings.get(f"{name}_read", m.bindings[name])


def lengths(m: Match) -> set[str]:
    """What stands for the number of positions that are read: of a part, its size, or that up to which it was taken."""
    end = m.bindings.get("key_end")
    return {sizes(read(m))[2], *([str(end.meta["val"])] if isinstance(end, Node) else [])}


def first_positions(name: str) -> Callable[[Match], bool | str]:
    def guard(m: Match) -> bool | str:
        dim, start, end = (m.bindings[f"{name}_{what}"] for what in ("dim", "start", "end"))
        if dim not in (2, -2):
            return f"a part of its {name}s is read, along dimension {dim}"
        if start not in (0, None):
            return f"a part of its {name}s is read, from position {start} on, not from the first"
        last = end.meta["val"] if isinstance(end, Node) else end
        static = isinstance(m.bindings[name].meta["val"].shape[2], int)
        known = (isinstance(last, int) and (last >= 0 or static)) or (
            isinstance(last, torch.SymInt) and statically_known_true(last >= 0)
        )
        return known or f"a part of its {name}s is read, up to {end}, which may be counted from the back"

    return guard


def first_of(name: str) -> Either:
    """A cache, or its first positions."""
    whole, of, end = Cache(name), Any(f"{name}_dim"), Any(f"{name}_end")
    known = dict(where=first_positions(name), name=f"{name}_read")
    return Either(
        whole,
        P(aten.slice, whole, of, Any(f"{name}_start"), end, **known),
        P(aten.narrow, whole, of, Any(f"{name}_start"), end, **known),
    )


def repeated(name: str) -> Either:
    """A cache or its first positions, its heads repeated for groups of query heads or not."""
    whole = first_of(name)
    groups = P(aten.expand, Either(P(aten.unsqueeze, whole, 2), P(aten.unsqueeze, whole, -3)), Any(), Any())
    groups = Either(groups, P(aten.clone, groups, Any()), P(aten.contiguous, groups, Any()))
    return Either(
        whole,
        *(P(op, groups, *rest, name=f"{name}_heads") for op, rest in (
            (aten.reshape, [Any()]), (aten.view, [Any()]), (aten._unsafe_view, [Any()]), (aten.flatten, [1, 2]))),
        *(P(aten.repeat_interleave.self_int, whole, Any(), d, Any(), name=f"{name}_heads") for d in (1, -3)),
    )  # fmt: skip


def heads_fit(m: Match) -> bool | str:
    """q [B, Hq, T, D] with the rows of both caches, whose heads divide its heads."""
    q, key, value = (each.meta["val"] for each in (m.q, m.key, m.value))
    if q.ndim != 4 or sizes(m.q)[0] != sizes(m.key)[0] or sizes(m.q)[3] != sizes(m.key)[3]:
        return f"queries are [{', '.join(sizes(m.q))}], the cache [{', '.join(sizes(m.key))}]"
    same = sizes(read(m))[2] == sizes(read(m, "value"))[2] or m.bindings.get("key_end", 0) is m.bindings.get(
        "value_end"
    )
    if sizes(m.key)[:3] != sizes(m.value)[:3] or not same:
        return f"keys are [{', '.join(sizes(read(m)))}], values [{', '.join(sizes(read(m, 'value')))}]"
    numbers = isinstance(q.shape[1], int) and isinstance(key.shape[1], int)
    if not numbers or q.shape[1] % key.shape[1]:
        return f"{q.shape[1]} query heads are no multiple of {key.shape[1]}"
    same = m.root.meta["val"].dtype == q.dtype and key.dtype == value.dtype
    return same or f"attention of {q.dtype} queries ends in {m.root.meta['val'].dtype}"


def mask_fits(m: Match) -> bool | str:
    """Whether what masks an attention can be told to `kv_attention`."""
    given = m.bindings.get("mask") or m.bindings.get("hidden")
    if given is None:
        return True
    if not isinstance(given, Node):
        return f"{given} is no mask"
    expected = [sizes(m.q)[0], sizes(m.q)[1], sizes(m.q)[2], sizes(read(m))[2]]
    found = sizes(given)
    known = [*({"1", e} for e in expected[:3]), {"1"} | lengths(m)]
    fits = len(found) <= 4 and all(s in e for s, e in zip(reversed(found), reversed(known), strict=False))
    dtype = given.meta["val"].dtype
    usual = dtype == torch.bool or (dtype in FLOATS and "mask" in m.bindings)
    return (fits and usual) or f"its mask is {dtype} [{', '.join(found)}], not [{', '.join(expected)}]"


q, mask, hidden, fill = Any("q"), Any("mask"), Any("hidden"), Any("fill")

key, value = repeated("key"), repeated("value")
keys_transposed = Either(
    P(aten.transpose, key, Any("one"), Any("other"), where=swaps_last_two),
    P(aten.permute, key, [0, 1, 3, 2]),
    P(aten.mT, key),
)
products = P(aten.matmul, q, keys_transposed)
scaled = Either(
    P(aten.mul.Tensor, products, Any("factor"), where=numbers("factor")),
    P(aten.div.Tensor, products, Any("divisor"), where=numbers("divisor")),
    products,
)
capped = Either(
    P(aten.mul.Tensor, P(aten.tanh, P(aten.div.Tensor, scaled, Any("cap"))), Any("cap_again"), where=same_softcap),
    scaled,
)
wide = Either(P(aten.to.dtype, capped, torch.float32), capped)
masked = Either(
    P(aten.add.Tensor, wide, mask, where=adds),
    P(aten.masked_fill.Scalar, wide, hidden, fill, where=hides),
    P(aten.where.ScalarOther, mask, wide, fill, where=hides),
    P(aten.where.self, mask, wide, fill, where=hides),
    wide,
)
joined = P(aten.cat, [masked, Any("sinks")], Any("sinks_dim"), where=sinks_fit, name="joined")
largest = Either(
    P(operator.getitem, P(aten.max.dim, joined, Any("largest_dim"), True, where=along("largest_dim")), 0),
    P(aten.amax, joined, [Any("largest_dim")], True, where=along("largest_dim")),
)
with_sinks = Either(P(aten.sub.Tensor, joined, largest), joined)
softmax = Either(
    P(aten.slice, P(aten.softmax.int, with_sinks, Any("softmax_dim"), Any(), where=along("softmax_dim")), Any("of"),
      Either(0, None), Any("until"), where=without_sinks),
    P(aten.softmax.int, masked, Any("softmax_dim"), Any(), where=along("softmax_dim")),
)  # fmt: skip
probabilities = Either(P(aten.to.dtype, softmax, Any()), P(aten.type_as, softmax, Any()), softmax)
guards = (heads_repeated("key"), heads_repeated("value"), heads_fit, mask_fits)

ATTENTIONS = [
    P(aten.scaled_dot_product_attention, q, key, value, mask, 0.0, Any("causal"), Any("factor"), Any("gqa"), where=(
        numbers("factor"), *guards)),
    P(aten.matmul, probabilities, value, where=guards),
    flex(q, key, value, numbers("factor"), *guards),
]  # fmt: skip


def may_attend(pattern: P, node: Node) -> bool:
    """Whether a node is the operator that an attention ends in."""
    if pattern.target is operator.getitem:
        return node.target is operator.getitem and node.args[0].target is flex_attention
    return packet(node.target) is pattern.target


def scale_of(m: Match) -> float:
    """What the products of queries and keys are multiplied with."""
    if m.bindings.get("factor") is not None:
        return float(m.factor)
    if packet(m.root.target) is aten.scaled_dot_product_attention:
        return m.key.meta["val"].shape[3] ** -0.5
    return 1 / m.bindings.get("divisor", 1)


def softcap_of(m: Match) -> float:
    """0 where there is none."""
    if "score_mod" in m.bindings:
        found = softcap(m.score_mod)
        assert isinstance(found, float)
        return found
    return float(m.bindings.get("cap", 0))


def sinks_of(m: Match, g: Builder) -> Node | None:
    """[Hq]: a logit for each query head that takes part in the softmax alone."""
    if "sinks" not in m.bindings:
        return None
    base, dims = behind(m.sinks, [0, 1, 2, 3])
    found = arranged(g, base, [dims[1]])
    return found if sizes(found) == sizes(m.q)[1:2] else g.call(aten.expand.default, found, [m.q.meta["val"].shape[1]])


# --- masks -------------------------------------------------------------------------------------------------

Dims = "list[int | None]"  # for each dimension of a mask [B, Hq, T, S] that of a node, None: it is the same along it
NOT = {aten.bitwise_not, aten.logical_not}
AND, OR = {aten.bitwise_and, aten.logical_and, aten.__and__}, {aten.bitwise_or, aten.logical_or, aten.__or__}

# What `index ? position` adds to the position that a token sees up to; hidden: where it hides instead of showing.
FIRST = {(aten.le, False): 0, (aten.lt, False): -1, (aten.gt, True): 0, (aten.ge, True): -1}
SECOND = {(aten.ge, False): 0, (aten.gt, False): -1, (aten.lt, True): 0, (aten.le, True): -1}


@dataclass(frozen=True)
class Part:
    """A factor of a mask: a node, its dimensions by those of the mask, and whether True hides."""

    node: Node
    dims: Dims
    negated: bool


@dataclass(frozen=True)
class Horizon:
    """A token sees up to `node` + `shift`; `dims` are the node's dimensions for the mask's B and T."""

    part: Part
    node: Node
    dims: Dims
    shift: int


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


def parts(node: Node, dims: Dims, negated: bool = False) -> Iterator[Part]:
    """The factors of a mask of booleans; all of them have to show a position."""
    node, dims = behind(node, dims)
    kind = packet(node.target)
    if kind in NOT:
        yield from parts(arguments(node)[0], dims, not negated)
    elif kind in (OR if negated else AND) and all(isinstance(each, Node) for each in arguments(node)):
        for each in arguments(node):
            yield from parts(each, aligned(node, each, dims), negated)
    else:
        yield Part(node, dims, negated)


def horizon(part: Part, length: str) -> Horizon | None:
    """How far tokens see, where that is all that a part of a mask says: arange(length) <= position."""
    compare = part.node
    if compare.op != "call_function" or len(arguments(compare)) != 2:
        return None
    sides = arguments(compare)
    for table, index, position in ((FIRST, *sides), (SECOND, *reversed(sides))):
        shift = table.get((packet(compare.target), part.negated))
        if shift is None or not all(isinstance(each, Node) and sizes(each) for each in sides):
            continue
        along, where = behind(index, aligned(compare, index, part.dims))
        of, dims = behind(position, aligned(compare, position, part.dims))
        whole = of.meta["val"].dtype == torch.int64 and dims[1] is None and dims[3] is None
        if counts(along, length) and where == [None, None, None, 0] and whole:
            return Horizon(part, of, [dims[0], dims[2]], shift)
    return None


def arranged(g: Builder, node: Node, dims: Dims) -> Node:
    """A node with its dimensions where `dims` says, and dimensions of 1 where it says None."""
    for d in reversed(range(len(sizes(node)))):
        if d not in dims:
            node = g.call(aten.select.int, node, d, 0)
    for i, d in enumerate(dims):
        if d is None:
            node = g.call(aten.unsqueeze.default, node, i)
    return node


@dataclass(frozen=True)
class Seen:
    """What tokens see, as `kv_attention` takes it."""

    positions: Node
    start: Node | None = None
    mask: Node | None = None
    window: int = 0


def seen(m: Match, g: Builder) -> Seen:
    if "block_mask" not in m.bindings:
        positions, mask = limits(m, g)
        return Seen(positions, mask=mask)
    known = bounds(m.block_mask[-1])
    B, T, S = size(g, m.q, 0), size(g, m.q, 2), m.key.meta["val"].shape[2]
    of = list(m.mask_inputs), B, T, m.key.meta["val"].device
    last = Sum(S - 1) if known.last is None else known.last
    positions = g.call(aten.expand.default, within(g, computed(last, g, *of), m), [B, T])
    start = None
    if known.first is not None:
        start = g.call(aten.select.int, computed(known.first, g, *of), 1, 0)
        start = g.call(aten.expand.default, start, [B])
    return Seen(positions, start, None, known.window)


def limits(m: Match, g: Builder) -> tuple[Node, Node | None]:
    """positions [B, T] int64, up to which each token sees, and the mask [B or 1, Hq or 1, T or 1, S] that is left.

    None where the attention's mask says no more than that.
    """
    B, S = size(g, m.q, 0), m.key.meta["val"].shape[2]
    T, device = size(g, m.q, 2), m.key.meta["val"].device
    given, negated = m.bindings.get("mask"), False
    if m.bindings.get("hidden") is not None:
        given, negated = m.hidden, True
    if given is not None and given.meta["val"].dtype == torch.bool:
        rank = len(sizes(given))
        whole = [None if i < 4 - rank or sizes(given)[i - 4 + rank] == "1" else i - 4 + rank for i in range(4)]
        found = list(parts(given, whole, negated))
        far = next((h for part in found for n in lengths(m) if (h := horizon(part, n)) is not None), None)
        if far is not None and all(stays(part.node) for part in found):
            at = Builder(far.part.node)  # where it is compared: it may be written before the attention
            positions = arranged(at, far.node, far.dims)
            if far.shift:
                positions = at.call(aten.add.Tensor, positions, far.shift)
            elif not stays(far.node):
                positions = at.call(aten.clone.default, positions)
            left = None
            for part in found:
                if part is not far.part:
                    each = arranged(g, part.node, part.dims)
                    each = g.call(aten.logical_not.default, each) if part.negated else each
                    left = each if left is None else g.call(aten.logical_and.default, left, each)
            return g.call(aten.expand.default, within(g, positions, m), [B, T]), spread(g, left, m)
    causal = m.bindings.get("causal") is True
    positions = (
        g.call(aten.arange.default, T, dtype=torch.int64, device=device)
        if causal
        else g.call(aten.full.default, [T], S - 1, dtype=torch.int64, device=device)
    )
    for _ in range(4 - len(sizes(given)) if given is not None else 0):
        given = g.call(aten.unsqueeze.default, given, 0)
    if negated:
        given = g.call(aten.logical_not.default, given)
    return g.call(aten.expand.default, within(g, positions, m), [B, T]), spread(g, given, m)


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
