"""Attention that reads caches of keys and values.

A pattern of `ATTENTIONS` binds `q` [B, Hq, T, D], `key` and `value`, which are caches, and what `scale_of`,
`softcap_of`, `sinks_of` and `masks.seen` read.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .broadcast import arranged, behind, sizes
from .cache import FLOATS, Cache
from .flex import flex, flex_attention, softcap
from .language import Any, Builder, Either, Match, P, Value, packet, stays

aten = torch.ops.aten
HIDDEN = -1e4  # scores below it leave nothing after the softmax


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
    fill = number(m.fill)
    return (fill is not None and fill <= HIDDEN) or f"what is hidden is filled with {m.fill}, not with -inf"


def number(value: Value) -> float | None:
    """A number, or that of which a tensor is made."""
    if isinstance(value, Node) and packet(value.target) in (aten.full, aten.scalar_tensor) and stays(value):
        value = next((a for a in value.args if isinstance(a, (int, float))), None)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def heads_repeated(name: str) -> Callable[[Match], bool | str]:
    """Head i of what was repeated is head i // n of the cache."""

    def guard(m: Match) -> bool | str:
        if f"{name}_heads" not in m.bindings:
            return True
        (B, H, S, D), found = sizes(read(m, name)), sizes(m.bindings[f"{name}_heads"])
        numbers = found == [B, *found[1:2], S, D] and found[1].isdecimal() and H.isdecimal()
        whole = numbers and int(found[1]) % int(H) == 0
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
    ends = m.bindings.get("key_end", 0), m.bindings.get("value_end")
    together = sizes(read(m))[2] == sizes(read(m, "value"))[2] or ends[0] is ends[1]
    if sizes(m.key)[:3] != sizes(m.value)[:3] or not together:
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
