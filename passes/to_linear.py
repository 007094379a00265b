"""Brings every linear, however the model wrote it, to `aten.linear`."""

from __future__ import annotations

from ..patterns.language import rewrite
from ..patterns.linear import TO_LINEAR
from ..program import Program
from .base import Pass, Stage
from .remove_noops import erase_dead


class ToLinear(Pass):
    """Applies the table `TO_LINEAR`; the nearest misses stay with their nodes, for the report."""

    name = "to_linear"
    stage = Stage.NORMALIZE
    after = ("remove_noops",)

    def run(self, program: Program, context) -> int:
        hits, misses = rewrite(program.graph, TO_LINEAR)
        for node, reason in misses.items():
            node.meta["miss"] = reason
        erase_dead(program)
        return sum(hits.values())
