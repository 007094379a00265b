"""Fuses packed linears with what stands around them in a decoder: the norm before, the gate and the residual after.

For few tokens each of those is a kernel that takes longer to start than to run. It is done only where the CUDA kernel
of the linear takes them too; anywhere else they stay apart, for Inductor to fuse with one another.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any as Value
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from ..kernels.fused_linear import FUSED, FusedLinearOp
from ..kernels.op import Case
from ..patterns.language import Any, Builder, Match, P, Rule, arguments, inherit, rewrite, stays
from ..patterns.norm import RMS_NORMS, either_way, epsilon
from ..program import Program
from .base import Pass, Stage
from .remove_noops import erase_dead

aten = torch.ops.aten
FORMS = {op.overload: op for op in FUSED.values()}
OPS = {**FUSED, **FORMS}
ALONE = (None, 0.0, None, False)  # norm, eps, residual, gated: a linear with nothing around it


class FuseAroundLinears(Pass):
    """In one walk, each linear takes the norm, what it has become then the gate, and that the residual."""

    name = "fuse_around_linears"
    stage = Stage.LOWER
    after = ("fold_constants",)  # a norm's weight may be computed
    settings: ClassVar = {"combo_kernels": True}  # of few tokens: what takes longer to start than to run starts as one

    def run(self, program: Program, context) -> int:
        sites = {site.weight: site for site in program.sites if site.node.target in FUSED}
        rewrite(program.graph, RULES)
        erase_dead(program)
        fused = [node for node in program.graph.nodes if node.target in FORMS and arguments(node)[1] in sites]
        for node in fused:
            site = sites[arguments(node)[1]]
            site.node = node
            for row in site.rows:
                row.notes.append(note(call(node)))
        return len(fused)


def takes(op: FusedLinearOp, case: Case) -> bool:
    """Whether a kernel takes the fused op whole."""
    return op.choose(case).name == "cuda"


def call(y: Node) -> dict[str, Value]:
    """The arguments of a packed linear, by name, as those of its fused op."""
    names = (argument.name for argument in OPS[y.target].overload._schema.arguments)
    return dict(zip(names, [*arguments(y), *ALONE], strict=False))


def note(parts: dict[str, Value]) -> str:
    before = ["the norm before it"] if parts["norm"] is not None else []
    behind = ["the gate"] * parts["gated"] + ["the residual"] * (parts["residual"] is not None)
    return "fused with " + ", ".join(before + [" and ".join(behind) + " after it"] * bool(behind))


# --- guards --------------------------------------------------------------------------------------------------


def possible(m: Match, y: Node, *reads: Node, **more: bool) -> bool:
    """Whether a fused call may stand at the root in place of the linear y, which then reads more, too.

    It stands behind y, and the fused op has no gradients: what it reads must stay as it is, and none may be recorded.
    """
    if not isinstance(y, Node) or y.target not in OPS or any(node.meta.get("grad") for node in (m.root, y)):
        return False
    op, parts = OPS[y.target], call(y)
    case = op.case_of(*torch.fx.map_arg(list(parts.values()), lambda n: n.meta["val"]))
    if parts["residual"] is not None or any(getattr(case, name) for name in more):
        return False  # the residual comes last, the others once
    return (
        isinstance(case.M, int)
        and m.root.meta["val"].is_contiguous()  # as the result of the fused op is
        and takes(op, replace(case, **more))
        and all(map(stays, (*y.all_input_nodes, *reads)))
    )


def alone(m: Match) -> bool:
    return len(m.y.users) == 1


def halves(m: Match) -> bool:
    """The parts are the halves of y along its last dimension."""
    y, parts = m.y.meta["val"], m.parts.meta["val"]
    return m.dim in (-1, y.ndim - 1) and [2 * part.shape[-1] for part in parts] == [y.shape[-1]] * 2


def same_kind(m: Match) -> bool:
    """Two tensors of one shape and dtype; as text, because sizes of the residual may be symbolic."""
    values = [node.meta.get("val") for node in (m.residual, m.y) if isinstance(node, Node)]
    kinds = [(value.dtype, str(value.shape)) for value in values if isinstance(value, Tensor)]
    return m.residual is not m.y and len(kinds) == 2 and kinds[0] == kinds[1]


# --- the table -----------------------------------------------------------------------------------------------


def fused(g: Builder, y: Node, **more: Value) -> Node:
    """The linear y that takes more, in the place of the builder's node."""
    with g.graph.inserting_before(g.node):
        new = g.graph.call_function(OPS[y.target].overload, tuple((call(y) | more).values()))
    return inherit(new, y)


y, residual, dim = Any("y"), Any("residual"), Any("dim")
parts = [
    P(op, y, *how, dim, users=2, name="parts") for op, how in ((aten.split_with_sizes, [Any()]), (aten.chunk, [2]))
]
first, second = ([P(operator.getitem, each, i, users=1) for each in parts] for i in (0, 1))
gates = [
    pair for one, other in zip(first, second, strict=True) for pair in either_way(P(aten.silu, one, users=1), other)
]

# fmt: off
RULES = [
    *(Rule("norm", P(linear, norm, *[Any()] * (len(linear._schema.arguments) - 1),
                     where=lambda m: possible(m, m.root, m.x, normed=True)),
           lambda m, g: fused(g, m.root, x=m.x, norm=m.weight, eps=epsilon(m)))
      for linear in FUSED for norm in RMS_NORMS),
    *(Rule("gate", P(aten.mul.Tensor, *pair, where=(alone, lambda m: possible(m, m.y, gated=True), halves)),
           lambda m, g: fused(g, m.y, gated=True))
      for pair in gates),
    *(Rule("residual", P(aten.add.Tensor, *pair, where=(same_kind, alone, lambda m: possible(m, m.y, m.residual))),
           lambda m, g: fused(g, m.y, residual=m.residual))
      for pair in either_way(residual, y)),
]
# fmt: on
