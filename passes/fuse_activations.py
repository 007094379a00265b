"""Fuses linears on quantized activations, or 2:4 weights, with the GELU behind them.

It is done only where their CUDA kernel takes both, which saves a kernel over all of y, or most of what quantizing y for
the next linear takes. Anywhere else GELU stays, for Inductor to fuse with what follows.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from ..kernels.activated_linear import ACTIVATED, ActivatedLinearOp
from ..kernels.op import Case
from ..patterns.language import arguments, inherit, stays
from ..program import Program
from .base import Pass, Stage

aten = torch.ops.aten
KERNEL = "cuda"  # the implementation that takes both
FUNCTIONS = {(aten.gelu.default, "none"): "gelu", (aten.gelu.default, "tanh"): "gelu_tanh"}  # call, behind its input


class FuseActivations(Pass):
    name = "fuse_activations"
    stage = Stage.LOWER

    def run(self, program: Program, context) -> int:
        fused = 0
        for site in program.sites:
            y = site.node
            behind = next(iter(y.users), None)
            if len(y.users) != 1 or not possible(y, behind):
                continue
            with program.graph.inserting_before(behind):
                call = ACTIVATED[y.target].overload, (*arguments(y), function(behind))
                site.node = inherit(program.graph.call_function(*call), y)
            behind.replace_all_uses_with(site.node)
            for node in (behind, y):
                program.graph.erase_node(node)
            for row in site.rows:
                row.kernel = KERNEL
                row.notes.append("fused with GELU after it")
            fused += 1
        return fused


def takes(op: ActivatedLinearOp, case: Case) -> bool:
    """Whether a kernel takes the op whole."""
    return op.choose(case).name == KERNEL


def function(node: Node) -> str | None:
    """What the ops call the activation function that a node is; None for any other."""
    return FUNCTIONS.get((node.target, *arguments(node)[1:])) if node.target is aten.gelu.default else None


def possible(y: Node, user: Node) -> bool:
    """Whether a kernel may stand at a user of the linear y in place of both; it has no gradients."""
    if y.target not in ACTIVATED or function(user) is None or any(node.meta.get("grad") for node in (user, y)):
        return False
    op = ACTIVATED[y.target]
    case = op.case_of(*torch.fx.map_arg(arguments(y), lambda n: n.meta["val"]), function(user))
    return isinstance(case.M, int) and takes(op, case) and all(map(stays, y.all_input_nodes))
