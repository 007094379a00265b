"""Inlines the subgraphs that capture wraps around regions without gradients or without autocast."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from ..program import Program, get_attribute
from .base import Pass, Stage

# HOP → how many of its arguments come before the subgraph, and which of their values make it transparent.
HOPS = torch.ops.higher_order
WRAPPERS = {
    HOPS.wrap_with_set_grad_enabled: lambda args: True,
    HOPS.wrap_with_autocast: lambda args: args[2] is False,  # (device, dtype, enabled, cache)
}
SUBGRAPH = {HOPS.wrap_with_set_grad_enabled: 1, HOPS.wrap_with_autocast: 4}


class InlineSubgraphs(Pass):
    """Programs run without gradients and outside autocast, so regions that only say so are inlined."""

    name = "inline_subgraphs"
    stage = Stage.NORMALIZE

    def run(self, program: Program, context) -> int:
        inlined = 0
        while wrapped := [n for n in program.graph.nodes if n.target in WRAPPERS and WRAPPERS[n.target](n.args)]:
            for node in wrapped:
                self.inline(program, node)
                inlined += 1
        return inlined

    def inline(self, program: Program, node: Node) -> None:
        _, subgraph, *operands = node.args[SUBGRAPH[node.target] - 1 :]
        inner = get_attribute(program.graph_module, subgraph.target)
        mapping = dict(zip(inner.graph.find_nodes(op="placeholder"), operands, strict=True))
        with program.graph.inserting_before(node):
            outputs = program.graph.graph_copy(inner.graph, mapping)
        for copied in mapping.values():
            if isinstance(copied, Node):
                copied.meta.setdefault("origin", node.meta.get("origin", ("", "")))
        if isinstance(outputs, Node):
            node.replace_all_uses_with(outputs)
        else:
            for user in list(node.users):
                assert user.target is operator.getitem, user.format_node()
                user.replace_all_uses_with(outputs[user.args[1]])
                program.graph.erase_node(user)
        program.graph.erase_node(node)
        if not subgraph.users:
            program.graph.erase_node(subgraph)
