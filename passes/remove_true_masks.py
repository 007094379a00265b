"""Removes attention masks that hide nothing.

Transformers' bidirectional encoders, when exported, make a mask from `position >= 0`. It is true everywhere, but with
any mask at all attention leaves its fastest kernels.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from ..patterns.language import arguments, packet, written
from ..program import Program
from .base import Pass, Stage
from .remove_noops import erase_dead

aten = torch.ops.aten
VIEWS = {aten.unsqueeze, aten.expand, aten.view, aten.reshape, aten.to, aten.slice, aten.transpose, aten.permute}


class RemoveTrueMasks(Pass):
    """`scaled_dot_product_attention` under a mask that is true everywhere takes none."""

    name = "remove_true_masks"
    stage = Stage.NORMALIZE
    after = ("remove_noops",)

    def run(self, program: Program, context) -> int:
        removed = 0
        for node in program.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
            mask, is_causal = arguments(node)[3], arguments(node)[5]
            if isinstance(mask, Node) and not is_causal and always_true(mask):
                node.args = (*node.args[:3], None, *node.args[4:])
                node.kwargs = {k: v for k, v in node.kwargs.items() if k != "attn_mask"}
                removed += 1
        if removed:
            erase_dead(program)
        return removed


def always_true(node: Node) -> bool:
    """Whether a mask is `n >= 0` for an n that cannot be negative, viewed in any way."""
    if written(node):
        return False
    if packet(node.target) in VIEWS and node.meta["val"].dtype == torch.bool:
        return always_true(arguments(node)[0])
    return node.target is aten.ge.Scalar and node.args[1] == 0 and never_negative(node.args[0])


def never_negative(node: Node) -> bool:
    """Whether a tensor of integers holds nothing below 0: positions counted from 0, shifted up."""
    if node.op != "call_function" or node.meta["val"].dtype.is_floating_point or written(node):
        return False
    if node.target is aten.add.Tensor:
        other = node.args[1]
        shifted = isinstance(other, int) and other >= 0 and node.kwargs.get("alpha", 1) > 0
        return shifted and never_negative(node.args[0])
    if packet(node.target) in VIEWS:
        return never_negative(arguments(node)[0])
    return node.target is aten.arange.default
