"""The pattern language: one object per node of the graph that it describes.

A pattern names a target, binds what it captures and states its guards::

    x, w = Any("x"), Weight("w", ndim=2)
    P(aten.mm, x, w)                                   # mm of anything on a constant matrix
    P(aten.addmm, Any("b"), x, w, 1, 1)                # literals match exactly; Any() is the wildcard

Arguments stand in schema order, and an argument that a pattern leaves out must have its schema default.
`match` answers with a `Match`, which holds the bindings, or with a `Miss`, which says what failed: when the
root operator was right, that is a near miss worth reporting.

Rewriting is data too: a `Rule` joins a pattern to a function that builds the replacement with a `Builder`,
and `rewrite` applies a table of rules, indexed by root operator, in one walk over the graph.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any as Value

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Graph, Node

__all__ = [
    "Any", "Builder", "Either", "Match", "Maybe", "Miss", "P", "Rule", "Weight",
    "alike", "arguments", "batched", "constant", "fake_mode", "fit", "inherit", "match", "mutates", "of_levels",
    "packet", "propagate", "rewrite", "stays", "views_of", "written",
]  # fmt: skip


# --- reading nodes -----------------------------------------------------------------------------------------


def packet(target: Value) -> Value:
    """The overload packet of an ATen overload (`aten.mm` for `aten.mm.default`); other targets as they are."""
    return target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target


def arguments(node: Node) -> list[Value]:
    """The arguments of a call in schema order, defaults filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return [*node.args, *node.kwargs.values()]
    given = dict(enumerate(node.args))
    return [
        given[i] if i in given else node.kwargs.get(a.name, a.default_value)
        for i, a in enumerate(node.target._schema.arguments)
    ]


def mutates(node: Node) -> list[Node]:
    """The inputs that this node writes in place."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    schema = node.target._schema
    if not schema.is_mutable:
        return []
    written = []
    for argument, value in zip(schema.arguments, arguments(node), strict=True):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, Node)]
    return written


def views_of(node: Node) -> list[Node]:
    """The users of a node that may share its memory (views, and results of in-place ops)."""
    aliases = []
    for user in node.users:
        if user.target is operator.getitem:
            aliases.append(user)
        elif isinstance(user.target, torch._ops.OpOverload):
            schema = user.target._schema
            for argument, value in zip(schema.arguments, arguments(user), strict=True):
                if argument.alias_info is not None and value is node:
                    aliases.append(user)
                    break
            else:
                if packet(user.target) in MAYBE_VIEWS and arguments(user)[0] is node:
                    aliases.append(user)
    return aliases


MAYBE_VIEWS = {torch.ops.aten.reshape, torch.ops.aten.contiguous, torch.ops.aten.to, torch.ops.aten.flatten}


def written(node: Node) -> Node | None:
    """The first node that writes this node's memory in place, directly or through a view."""
    seen, stack = set(), [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        for user in current.users:
            if current in mutates(user):
                return user
        stack += views_of(current)
    return None


def stays(node: Node) -> bool:
    """Whether nothing writes what a node holds, through whatever view."""
    sources = [source for source in node.all_input_nodes if node in views_of(source)]
    return written(node) is None and all(map(stays, sources))


def alike(one: Value, other: Value) -> bool:
    """Whether two arguments of nodes are the same, or computed by the same functions from the same that stays."""
    if not (isinstance(one, Node) and isinstance(other, Node)):
        if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
            return len(one) == len(other) and all(map(alike, one, other))
        return type(one) is type(other) and one == other
    found = [each.meta.get("val") for each in (one, other)]
    if one is other or (all(isinstance(size, torch.SymInt) for size in found) and str(found[0]) == str(found[1])):
        return stays(one)
    pure = one.op == other.op == "call_function" and one.target is other.target and not mutates(one)
    if not pure or torch.Tag.nondeterministic_seeded in getattr(one.target, "tags", ()):
        return False
    if not (stays(one) and stays(other)):
        return False
    if packet(one.target) is torch.ops.aten.expand_as:  # of the other tensor, it takes the sizes alone
        return alike(one.args[0], other.args[0]) and str(found[0].shape) == str(found[1].shape)
    given, asked = ([*each.args, *each.kwargs, *each.kwargs.values()] for each in (one, other))
    return alike(given, asked)


def batched(node: Node) -> bool:
    """Whether what a node computes is batched by a level of vmap, outside of which torch computes nothing with it."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and torch._C._functorch.is_batchedtensor(value)


def of_levels(target: Value) -> bool:
    """Whether a call is one of those that levels of vmap, or of derivatives, consist of.

    It is for its graph to run: it may enter a level that the calls after it are in, or leave one.
    """
    return getattr(target, "__module__", None) == "torch._functorch.predispatch"


def constant(value: Value) -> bool:
    """Whether a node is a constant expression: weights and buffers that nothing writes, and pure functions
    of them (views, slices, casts, concatenations)."""
    if not isinstance(value, Node):
        return False
    if value.op == "get_attr":
        return isinstance(value.meta.get("val"), torch.Tensor) and written(value) is None
    if value.op != "call_function":
        return False
    if value.target is not operator.getitem:
        if not isinstance(value.target, torch._ops.OpOverload) or value.target._schema.is_mutable:
            return False
        if torch.Tag.nondeterministic_seeded in value.target.tags:
            return False
    inputs = value.all_input_nodes
    return bool(inputs) and all(map(constant, inputs)) and written(value) is None


# --- patterns ----------------------------------------------------------------------------------------------

Guard = Callable[["Match"], "bool | str"]


@dataclass(frozen=True)
class Any:
    """Matches every value (a node, a number, None) and binds it to `name`, if one is given."""

    name: str | None = None

    def fit(self, value: Value, found: Match) -> str | None:
        return found.bind(self.name, value)


@dataclass(frozen=True)
class Weight:
    """Matches a constant expression with `ndim` dimensions."""

    name: str | None = None
    ndim: int | None = None

    def fit(self, value: Value, found: Match) -> str | None:
        if not constant(value):
            return f"{self.name or 'an operand'} is not a constant"
        shape = tuple(value.meta["val"].shape)
        if self.ndim is not None and len(shape) != self.ndim:
            return f"the weight has {len(shape)} dimensions {list(shape)} where {self.ndim} are needed"
        return found.bind(self.name, value)


@dataclass(frozen=True)
class Maybe:
    """Matches None, and whatever its pattern matches."""

    pattern: Value

    def fit(self, value: Value, found: Match) -> str | None:
        if value is None:
            return found.bind(getattr(self.pattern, "name", None), None)
        return fit(self.pattern, value, found)


@dataclass(frozen=True, init=False)
class Either:
    """Matches what one of its patterns matches, the first that does; what the others bound is forgotten.

    The reason of a miss is that of the pattern of which most fitted, of several the last one's.
    """

    patterns: tuple

    def __init__(self, *patterns):
        object.__setattr__(self, "patterns", patterns)

    def fit(self, value: Value, found: Match) -> str | None:
        bindings, nodes, start = dict(found.bindings), len(found.nodes), found.progress
        nearest, reason = -1, "it has no alternatives"
        for pattern in self.patterns:
            missed = fit(pattern, value, found)
            if missed is None:
                return None
            if found.progress >= nearest:
                nearest, reason = found.progress, missed
            found.bindings, found.progress = dict(bindings), start
            del found.nodes[nodes:]
        found.progress = max(nearest, start)
        return reason


@dataclass(frozen=True, init=False)
class P:
    """A call of `target` (an overload, or a packet, which stands for all its overloads) on `args`.

    `users` is the exact number of users that the node must have (None: any number); it is not asked of the
    root. `where` guards run once all is bound; each answers True, or the reason for its no.
    """

    target: Value
    args: tuple
    users: int | None = None
    where: tuple[Guard, ...] = ()
    name: str | None = None

    def __init__(self, target, *args, users=None, where=(), name=None):
        for key, value in dict(target=target, args=args, users=users, where=where, name=name).items():
            object.__setattr__(self, key, tuple(value) if key == "where" and not callable(value) else value)
        if callable(where):
            object.__setattr__(self, "where", (where,))

    def fit(self, value: Value, found: Match) -> str | None:
        if not isinstance(value, Node) or value.op != "call_function":
            return f"{value} is no call of {self.target}"
        if self.target not in (value.target, packet(value.target)):
            return f"{value} calls {value.target}, not {self.target}"
        if self.users is not None and found.root is not value and len(value.users) != self.users:
            return f"{value} has {len(value.users)} users where {self.users} is needed"
        actual = arguments(value)
        if len(self.args) > len(actual):
            return f"{value.target} takes {len(actual)} arguments, the pattern {len(self.args)}"
        defaults = [a.default_value for a in value.target._schema.arguments] if hasattr(value.target, "_schema") else []
        expected = [*self.args, *defaults[len(self.args) :]]
        for pattern, argument in zip(expected, actual, strict=False):
            if reason := fit(pattern, argument, found):
                return reason
        for guard in self.where:
            if (answer := guard(found)) is not True:
                return answer or "a guard of the pattern said no"
            found.progress += 1
        found.nodes.append(value)
        return found.bind(self.name, value)


def fit(pattern: Value, value: Value, found: Match) -> str | None:
    """None if `value` fits `pattern` (binding into `found`), else the reason why not."""
    if hasattr(pattern, "fit"):
        reason = pattern.fit(value, found)
    elif isinstance(pattern, (list, tuple)) and isinstance(value, (list, tuple)):
        if len(pattern) != len(value):
            return f"{value} has {len(value)} entries where {len(pattern)} are needed"
        reason = next((r for p, v in zip(pattern, value, strict=True) if (r := fit(p, v, found))), None)
    else:
        same = type(pattern) is type(value) or {type(pattern), type(value)} <= {int, float}
        reason = None if same and pattern == value else f"argument {value} where {pattern} is needed"
    found.progress += reason is None
    return reason


class Match:
    """The bindings of a pattern that fitted, as attributes; `root` is the node at its top, `nodes` all its calls."""

    def __init__(self, root: Node):
        self.root = root
        self.nodes: list[Node] = []
        self.bindings: dict[str, Value] = {}
        self.progress = 0  # parts of the pattern that fitted

    def bind(self, name: str | None, value: Value) -> str | None:
        if name is not None and self.bindings.setdefault(name, value) is not value:
            return f"{name} is {self.bindings[name]} in one place and {value} in another"
        return None

    def __getattr__(self, name: str) -> Value:
        try:
            return self.__dict__["bindings"][name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass(frozen=True)
class Miss:
    """A pattern that did not fit, why, and how many of its parts did."""

    reason: str
    progress: int = field(default=0, compare=False)


def match(pattern: P, node: Node) -> Match | Miss:
    """Fits `pattern` to `node`; linear in the size of the pattern. Nothing fits what is inside of torch.vmap."""
    found = Match(node)
    reason = "it is inside of torch.vmap" if batched(node) else pattern.fit(node, found)
    return found if reason is None else Miss(reason, found.progress)


# --- rewriting ---------------------------------------------------------------------------------------------


class Builder:
    """Inserts calls before a node; each new node has `meta["val"]` and inherits the node's provenance."""

    def __init__(self, node: Node):
        self.node, self.graph = node, node.graph

    def call(self, target: Value, *args: Value, **kwargs: Value) -> Node:
        with self.graph.inserting_before(self.node):
            new = self.graph.call_function(target, args, kwargs)
        return inherit(new, self.node)


PROVENANCE = ("nn_module_stack", "stack_trace", "origin", "operator", "grad")


def inherit(new: Node, old: Node) -> Node:
    """Gives a new node the provenance of an old one, and its own `meta["val"]`."""
    new.meta = {k: v for k, v in old.meta.items() if k in PROVENANCE}
    new.meta["val"] = propagate(new)
    return new


def propagate(node: Node) -> Value:
    """The fake value of a call, computed from its inputs' `meta["val"]`."""
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    # The Python dispatcher decomposes composite operators (linear) where torch's own C++ has no symbolic sizes.
    with fake_mode(node.graph), enable_python_dispatcher(), torch.no_grad():
        return node.target(*args, **kwargs)


def fake_mode(graph: Graph) -> AbstractContextManager:
    """The mode of the fake tensors of a graph, which all its symbolic sizes belong to."""
    return next((m for n in graph.nodes if (m := getattr(n.meta.get("val"), "fake_mode", None))), nullcontext())


@dataclass(frozen=True)
class Rule:
    """`replace(match, builder)` builds what stands in place of a node that fits `pattern`."""

    name: str
    pattern: P
    replace: Callable[[Match, Builder], Node]


def rewrite(graph: Graph, rules: Iterable[Rule]) -> tuple[dict[str, int], dict[Node, str]]:
    """Applies `rules` to every node, the first that fits winning.

    Returns the number of hits by rule, and, for each node of whose operator there are rules but none that fits, the
    reason of the nearest miss: that of the rule of which most parts fitted.
    """
    by_target: dict[Value, list[Rule]] = defaultdict(list)
    for rule in rules:
        by_target[rule.pattern.target].append(rule)
    hits: dict[str, int] = defaultdict(int)
    misses: dict[Node, str] = {}
    for node in list(graph.nodes):
        candidates = by_target.get(node.target, []) + by_target.get(packet(node.target), [])
        nearest: Miss | None = None
        for rule in candidates if node.op == "call_function" else ():
            found = match(rule.pattern, node)
            if isinstance(found, Miss):
                nearest = found if nearest is None or found.progress > nearest.progress else nearest
                continue
            node.replace_all_uses_with(rule.replace(found, Builder(node)))
            graph.erase_node(node)
            hits[rule.name] += 1
            break
        else:
            if nearest is not None:
                misses[node] = nearest.reason
    return dict(hits), misses
