"""Linears on quantized activations: x is quantized by ordinary operators, once for all that read it.

The operators stand right behind what computes x, where Inductor fuses them into it. Whoever needs the same of the same
x, other schemes included, uses what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from ..kernels.op import Packing
from ..kernels.quantized_activation import BLOCK, Activation
from ..kernels.scaled_linear import ScaledLinearOp
from ..patterns.language import inherit, stays
from ..program import Program, Site
from .base import SchemePass, replace_linear

MADE_HERE = "quantizes"  # in the meta of nodes that quantize an activation

Quantize = Callable[[Tensor], Activation]


class ScaledSchemePass(SchemePass):
    """Carries out a scheme that quantizes activations, too, by `op`."""

    op: ClassVar[ScaledLinearOp]
    settings: ClassVar = {"max_autotune_pointwise": True}  # up to 1.8 times as fast a norm with quantization behind it

    def form(self, site: Site) -> tuple[ScaledLinearOp, list[str]]:
        """The op for a site, and the names of what its packing gives in any case."""
        return self.op, ["q", "scale"]


def swap_scaled(
    program: Program,
    site: Site,
    packing: Packing,
    names: Sequence[str],
    quantize: Quantize,
    largest: float | None = None,
    **about: Any,
) -> None:
    """Puts a `ScaledLinearOp` in place of a linear, on x as `quantize` makes it and the weight as `packing` does.

    names: of what the packing gives, as the op calls them. quantize: a function, or an object that is equal to those
    that do the same. largest: the magnitude that x had in calibration, which the noise that stands for x in the
    report's error is given too; None where scales come from x itself. about: see `replace_linear`.
    """
    op, dtype = packing.op, site.x.meta["val"].dtype
    assert isinstance(op, ScaledLinearOp)

    def arguments(x: Activation, packed: Sequence[Any], bias: Any = None) -> tuple:
        given = {**x._asdict(), **dict(zip(names, packed, strict=True))}
        return op.arguments(**given, bias=bias, dtype=dtype)

    def probe(x: Tensor, packed: Sequence[Tensor]) -> Tensor:
        factor = 1.0 if largest is None else float(largest / x.abs().amax())
        return op(*arguments(quantize(x * factor), packed)) / factor

    nodes = quantized(site, quantize)
    replace_linear(program, site, packing, names, lambda packed, bias: arguments(nodes, packed, bias), probe, **about)


def quantized(site: Site, quantize: Quantize) -> Activation:
    """The nodes of the quantized x of a site, new or as they stand there."""
    x = site.x
    shared = stays(x)
    before = behind(x) if shared else site.node
    like = x.meta["val"]
    steps = traced(quantize, like.dtype, like.dim(), like.device.type)
    (given,) = steps.find_nodes(op="placeholder")
    made: dict[Node, Node] = {given: x}
    for step in (node for node in steps.nodes if node.op == "call_function"):
        made[step] = call(step, made, before, shared)
    return Activation(*torch.fx.map_arg(steps.output_node().args[0], made.__getitem__))


def call(step: Node, made: dict[Node, Node], before: Node, shared: bool) -> Node:
    """A step of quantizing in the graph, in front of a node or, where it may be shared, where it stands already."""
    args, kwargs = torch.fx.map_arg((step.args, step.kwargs), made.__getitem__)
    source = made[step.all_input_nodes[0]]
    for user in source.users if shared else ():
        same = user.target is step.target and str((user.args, user.kwargs)) == str((args, kwargs))  # NaN is not itself
        if same and MADE_HERE in user.meta:
            return user
    with before.graph.inserting_before(before):
        new = inherit(before.graph.call_function(step.target, args, kwargs), source)
    if shared:
        new.meta[MADE_HERE] = True
    return new


def behind(x: Node) -> Node:
    """The node in front of which there is x, and what quantizes it or the x before it."""
    node = x.next
    while node.op in ("placeholder", "get_attr") or MADE_HERE in node.meta:
        node = node.next
    return node


@lru_cache(maxsize=64)
def traced(quantize: Quantize, dtype: torch.dtype, dims: int, device: str) -> Graph:
    """What quantizing does to an x of any sizes on such a device, as a graph of operators: it names no size."""
    with FakeTensorMode(), torch.no_grad():
        like = torch.empty([1] * (dims - 1) + [BLOCK], dtype=dtype, device=device)
        return make_fx(lambda x: tuple(quantize(x)), pre_dispatch=True)(like).graph
