"""Fuses linears on quantized activations, or 2:4 weights, with the GELU behind them, or behind some of their channels.

It is done only where their CUDA kernel takes both, which saves a kernel over all of y, or most of what quantizing y for
the next linear takes. Anywhere else GELU stays, for Inductor to fuse with what follows. With many tokens, a linear
whose output is split, as that of a gate, or of attention and MLP side by side, becomes one for each part, on rows of
its weight.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.fx import Node

from ..kernels.activated_linear import ACTIVATED, ActivatedLinearOp
from ..kernels.op import Case
from ..patterns.language import Builder, arguments
from ..program import Program
from .base import Pass, Stage
from .remove_noops import erase_dead

aten = torch.ops.aten
KERNEL = "cuda"  # the implementation that takes both
FUNCTIONS = {(aten.gelu.default, "none"): "gelu", (aten.gelu.default, "tanh"): "gelu_tanh"}  # call, behind its input
SPLITS = aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default  # the dimension comes third
MANY_TOKENS = 1024  # with fewer, one kernel more is expected to cost more than GELU
OF_CHANNELS = {"q", "values", "indices", "scale", "sums", "bias"}  # have a row for each, or one for all


class Part(NamedTuple):
    """Channels of a linear, the node that holds what becomes of them, and the function in that, or None."""

    node: Node
    start: int
    stop: int
    function: str | None


class FuseActivations(Pass):
    name = "fuse_activations"
    stage = Stage.LOWER
    after = ("fold_constants",)  # a merged bias may be computed

    def run(self, program: Program, context) -> int:
        fused = 0
        for site in program.sites:
            y = site.node
            parts = list(parts_of(y)) if y.target in ACTIVATED and len(y.users) == 1 else []
            if not possible(y, parts):
                continue
            for part in parts:
                site.node = call(y, part, len(parts) > 1)
                part.node.replace_all_uses_with(site.node)
            erase_dead(program)
            for row in site.rows:
                row.kernel = KERNEL
                row.notes.append("fused with GELU after " + ("it" if len(parts) == 1 else "a part, which is split off"))
            fused += 1
        return fused


def takes(op: ActivatedLinearOp, case: Case) -> bool:
    """Whether a kernel takes the op whole."""
    return op.choose(case).name == KERNEL


def function(node: Node) -> str | None:
    """What the ops call the activation function that a node is; None for any other."""
    return FUNCTIONS.get((node.target, *arguments(node)[1:])) if node.target is aten.gelu.default else None


def parts_of(y: Node) -> Iterator[Part]:
    """What the only user of a linear makes of its channels: a function of all, or parts along the last dimension."""
    (user,) = y.users
    N = y.meta["val"].shape[-1]
    if name := function(user):
        yield Part(user, 0, N, name)
    elif user.target in SPLITS and arguments(user)[2] in (-1, y.meta["val"].ndim - 1):
        stops = torch.tensor([part.shape[-1] for part in user.meta["val"]]).cumsum(0).tolist()
        for item in user.users:
            i = item.args[1] if item.target is operator.getitem else 0
            behind = next(iter(item.users), item)
            name = function(behind) if len(item.users) == 1 else None
            yield Part(behind if name else item, stops[i - 1] if i else 0, stops[i], name)


def possible(y: Node, parts: list[Part]) -> bool:
    """Whether kernels may compute the parts in place of the linear y and the functions; they have no gradients."""
    functions = [part for part in parts if part.function]
    if not functions or any(node.meta.get("grad") for node in (y, *(part.node for part in parts))):
        return False
    op, values = ACTIVATED[y.target], torch.fx.map_arg(arguments(y), lambda n: n.meta["val"])
    case = op.case_of(*values, functions[0].function)
    return (
        isinstance(case.M, int)
        and (len(parts) == 1 or case.M >= MANY_TOKENS)
        and all(takes(op, replace(case, N=part.stop - part.start)) for part in functions)
    )


def call(y: Node, part: Part, split: bool) -> Node:
    """The linear of a part of the channels, in front of y."""
    g, N, given = Builder(y), y.meta["val"].shape[-1], arguments(y)
    for i, argument in enumerate(y.target._schema.arguments if split else ()):
        if argument.name in OF_CHANNELS and given[i] is not None and given[i].meta["val"].shape[0] == N:
            given[i] = g.call(aten.narrow.default, given[i], 0, part.start, part.stop - part.start)
    if not part.function:
        return g.call(y.target, *given)
    return g.call(ACTIVATED[y.target].overload, *given, part.function)
