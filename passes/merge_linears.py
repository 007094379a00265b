"""Merges linears that read the same x (Q, K and V; gate and up) into one, before they are packed.

One large product uses the machine better than several small ones, and reads x once. The merged weight is a `cat`
of the originals in the graph: nothing is concatenated before the weight is packed.
"""

from __future__ import annotations

import operator
from collections import defaultdict

import torch
from torch.fx import Node

from ..expression import Expression
from ..patterns.language import Builder, constant, views_of, written
from ..program import Program, Site
from .base import Pass, Stage

aten = torch.ops.aten


class MergeLinears(Pass):
    """Siblings under the same scheme become one linear and a split of its output."""

    name = "merge_linears"
    stage = Stage.FUSE

    def run(self, program: Program, context) -> int:
        groups: dict[tuple, list[Site]] = defaultdict(list)
        for site in program.sites:
            if site.scheme is not None and (site.bias is None or is_vector(site.bias)):
                recorded = site.node.meta.get("grad", False)  # a region without gradients stays one
                groups[site.x, site.scheme, site.dtype, site.bias is None, recorded].append(site)
        siblings = [g for g in groups.values() if len(g) > 1 and written(g[0].x) is None]

        # A weight that serves several groups, or one place alone, would be packed more than once.
        homes: dict[str, set] = defaultdict(set)
        merged = {id(s): tuple(str(Expression.of(m.weight)) for m in g) for g in siblings for s in g}
        for site in program.sites:
            homes[str(Expression.of(site.weight))].add(merged.get(id(site)))
        siblings = [g for g in siblings if all(len(homes[str(Expression.of(s.weight))]) == 1 for s in g)]
        for group in siblings:
            self.merge(program, group)
        return len(siblings)

    def merge(self, program: Program, group: list[Site]) -> None:
        order = {node: i for i, node in enumerate(program.graph.nodes)}
        first = min((s.node for s in group), key=order.__getitem__)
        operands = [n for s in group for n in (s.weight, s.bias) if n is not None]
        for node in operands:
            hoist(node, first, order)
        g = Builder(first)
        weight = g.call(aten.cat.default, [s.weight for s in group])
        bias = None if group[0].bias is None else g.call(aten.cat.default, [s.bias for s in group])
        y = g.call(aten.linear.default, group[0].x, weight, bias)
        parts = g.call(aten.split_with_sizes.default, y, [s.N for s in group], -1)
        for i, site in enumerate(group):
            part = g.call(operator.getitem, parts, i)
            site.node.replace_all_uses_with(part)
            loosen(part)
        names = [row.name for s in group for row in s.rows]
        for site in group:
            for row in site.rows:
                row.notes.append("merged with " + ", ".join(n.rpartition(".")[2] for n in names if n != row.name))
            program.graph.erase_node(site.node)
        at = program.sites.index(group[0])
        program.sites = [s for s in program.sites if not any(s is m for m in group)]
        program.sites.insert(at, Site(y, [row for s in group for row in s.rows], group[0].scheme))


def is_vector(bias: Node) -> bool:
    return constant(bias) and bias.meta["val"].ndim == 1


def loosen(part: Node) -> None:
    """Lets views of a part, which is no longer contiguous, copy where they must."""
    for user in views_of(part):
        if user.target is aten.view.default:
            user.target = aten.reshape.default
        loosen(user)


def hoist(node: Node, before: Node, order: dict[Node, int]) -> None:
    """Moves a constant expression in front of a node, its inputs first."""
    if order.get(node, -1) < order[before]:
        return
    for source in node.all_input_nodes:
        hoist(source, before, order)
    before.prepend(node)
    order[node] = order[before] - 1
