"""Removes what nothing uses any more, and notes on rows which weights keep their full-precision copy."""

from __future__ import annotations

from ..patterns.language import constant, packet
from ..program import Program
from .base import Pass, Stage
from .remove_noops import erase_dead


class EliminateDeadCode(Pass):
    """Dead calls, and weights that only packed linears used."""

    name = "eliminate_dead_code"
    stage = Stage.CLEANUP

    def run(self, program: Program, context) -> int:
        erased = erase_dead(program)
        weights = program.weights
        for pack in program.packs.values():
            for leaf in pack.weight.leaves:
                users = [u for u in weights[leaf].users if not constant(u)] if leaf in weights else []
                for user in users[:1]:
                    role = str(packet(user.target)).removeprefix("aten.")
                    place = user.meta.get("origin", ("", ""))[0] or "the graph"
                    note = f"{leaf} keeps its full-precision copy for the {role} in {place}"
                    for row in pack.rows:
                        row.notes.append(note)
        return erased
