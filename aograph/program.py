"""The IR: an FX graph in normal form, with its weights, mutated buffers, ranges and provenance."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from .patterns.language import arguments, mutates

if TYPE_CHECKING:
    from .kernels.kv_cache import KVFormat
    from .report import Row
    from .schemes import KVCache, Scheme
    from .weights import Pack

Bound = tuple[int, int | None]  # an inclusive range of sizes; None: no upper bound


@dataclass
class Site:
    """A place of the graph where schemes may apply: a linear y = x @ w.T + b with a constant weight."""

    node: Node
    rows: list[Row]  # the rows of the report that this site stands for
    scheme: Scheme | None = None

    @property
    def x(self) -> Node:
        return arguments(self.node)[0]

    @property
    def weight(self) -> Node:
        return arguments(self.node)[1]

    @property
    def bias(self) -> Node | None:
        return arguments(self.node)[2]

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.meta["val"].dtype

    @property
    def M(self) -> sympy.Expr:
        return sympy.Mul(*(expression(s) for s in self.x.meta["val"].shape[:-1]))

    @property
    def N(self) -> int:
        return int(self.weight.meta["val"].shape[0])

    @property
    def K(self) -> int:
        return int(self.weight.meta["val"].shape[1])


@dataclass
class CacheSite:
    """A tensor [B, H, S, D] that the graph writes, its row, the scheme that the recipe gives it, how it is packed."""

    node: Node
    row: Row
    scheme: KVCache | None = None
    format: KVFormat | None = None


@dataclass
class Program:
    """One captured graph.

    `graph_module` takes the flat inputs and returns the flat outputs. Each weight, buffer and constant is a
    `get_attr` node under its qualified name, one per storage, its tensor in `constants`; `aliases` maps the other
    names of tied weights to that name. `mutated` names the buffers that the graph writes. `ranges` bounds the
    symbols of dynamic dimensions. `sites` are the places where schemes may apply, `caches` those where
    schemes for caches may, `rows` the report's rows of all candidates, `packs` what passes have packed, by key.
    `private` names the inputs whose tensors nobody but us makes and reads, so that passes may change their form.
    """

    graph_module: GraphModule
    constants: dict[str, Tensor]
    mutated: frozenset[str]
    aliases: dict[str, str] = field(default_factory=dict)
    ranges: dict[sympy.Symbol, Bound] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    caches: list[CacheSite] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    packs: dict[str, Pack] = field(default_factory=dict)
    private: frozenset[str] = frozenset()

    @property
    def graph(self) -> Graph:
        return self.graph_module.graph

    @property
    def inputs(self) -> list[Node]:
        return list(self.graph.find_nodes(op="placeholder"))

    @property
    def weights(self) -> dict[str, Node]:
        """The `get_attr` nodes of tensors, by name."""
        nodes = self.graph.find_nodes(op="get_attr")
        return {n.target: n for n in nodes if isinstance(n.meta.get("val"), Tensor)}

    def bounds(self, size: sympy.Expr) -> Bound:
        """The range of an expression of sizes.

        Sizes are sums and products of positive symbols, so they grow with each of them, and the bounds sit at the
        bounds of the symbols. An expression that has a subtraction in it gets (0, None).
        """
        if any(factor.could_extract_minus_sign() for factor in sympy.Add.make_args(sympy.expand(size))):
            return 0, None
        ranges = {s: self.ranges.get(s, (0, None)) for s in size.free_symbols}
        high = None if any(h is None for _, h in ranges.values()) else size.subs({s: h for s, (_, h) in ranges.items()})
        return int(size.subs({s: low for s, (low, _) in ranges.items()})), None if high is None else int(high)

    def text(self) -> str:
        """The graph as text, a line for each node in the order of the graph, under the names of the nodes."""
        names = {node: node.name for node in self.graph.nodes}
        return "\n".join(line(node, names) for node in names)

    def canonical(self) -> str:
        """The graph as text that is the same for all graphs that compute the same from the same inputs.

        Nodes come in the order in which the outputs need them and are numbered, inputs too, whatever their order and
        their names are in this graph.
        """
        numbers: dict[Node, str] = {}
        stack = [self.graph.output_node(), *(n for n in reversed(self.graph.nodes) if mutates(n))]
        while stack:
            node = stack.pop()
            waiting = [n for n in node.all_input_nodes if n not in numbers]
            if waiting:
                stack += [node, *reversed(waiting)]
            elif node not in numbers:
                numbers[node] = str(len(numbers))
        return "\n".join(line(node, numbers) for node in numbers)


def line(node: Node, names: dict[Node, str]) -> str:
    """One node as text."""

    def show(value: Any) -> str:
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(show, value))}]"
        return f"%{names[value]}" if isinstance(value, Node) else str(value)

    if node.op == "output":
        return f"return {show(node.args[0])}"
    call = {"get_attr": f"weight {node.target}", "placeholder": "input"}.get(node.op)
    call = call or f"{name_of(node.target)}({', '.join(map(show, arguments(node)))})"
    return f"%{names[node]} = {call} : {describe(node.meta.get('val'))}"


def name_of(target: Any) -> str:
    """`aten.linear.default`, `getitem` …: a target as text that is the same in every process."""
    return str(target) if isinstance(target, (str, torch._ops.OpOverload)) else getattr(target, "__name__", str(target))


def describe(value: Any) -> str:
    """`bf16[s0, 64]` for a tensor; the value itself for anything else."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(describe, value))}]"
    if not isinstance(value, Tensor):
        return str(value)
    short = str(value.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "f").replace("int", "i")
    return f"{short}[{', '.join(map(str, value.shape))}]"


def expression(size: Any) -> sympy.Expr:
    """The sympy expression of a size, in the symbols of the graph."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def hint(size: int | torch.SymInt) -> int:
    """A size; of a symbolic one that of the example."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def nbytes(value: Tensor) -> int:
    """The bytes of a tensor's elements; of fake ones, too."""
    return value.numel() * value.element_size()


def get_attribute(module: torch.nn.Module, name: str) -> Any:
    return operator.attrgetter(name)(module)


def set_attribute(module: torch.nn.Module, name: str, value: Tensor) -> None:
    """Registers a buffer under a dotted name, making the modules on the way and replacing what was there."""
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, torch.nn.Module())
        module = getattr(module, part)
    if hasattr(module, leaf):
        delattr(module, leaf)
    module.register_buffer(leaf, value)
