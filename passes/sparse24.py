"""2:4 sparsity: weights are pruned, and linears under a `Sparse24` rule become `aograph::sparse24_linear`.

Pruning comes first, as a constant expression in front of the weight: what packs the weight later, whichever scheme of
those that are 2:4, packs the pruned one, and new weights are pruned like the old ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from ..expression import Expression, Literal
from ..kernels.op import ENDLESS, Case, Op, Packing, capability
from ..kernels.prune24 import METHODS, prune24
from ..kernels.sparse24_linear import pays, sparse24_linear
from ..patterns.language import Builder
from ..program import Program, Site, set_attribute
from ..report import REWRITTEN, SKIPPED
from ..schemes import Sparse, Sparse24
from ..weights import Pack
from .base import Pass, SchemePass, Stage, constant_names, packed_nodes, swap

if TYPE_CHECKING:
    from ..pipeline import Context


class Prune24(Pass):
    """Puts `prune24` in front of the weights of all sites whose scheme is 2:4.

    Where it needs statistics, they are there: `find_sites` saw to it.
    """

    name = "prune24"
    stage = Stage.SPARSIFY

    def run(self, program: Program, context) -> int:
        pruned = 0
        for site in program.sites:
            if not isinstance(site.scheme, Sparse):
                continue
            more = []
            if site.scheme.method == "wanda":
                norms = norms_of(site, context.statistics)
                if norms is None:
                    for row in site.rows:
                        row.close(SKIPPED, f"its weight was calibrated with other inputs than these {site.K}, too")
                    site.scheme = None
                    continue
                more = [literal(program, site, norms)]
            site.node.replace_input_with(site.weight, Builder(site.node).call(prune24, site.weight, *more))
            for row in site.rows:
                row.notes.append(f"2:4 by {METHODS[site.scheme.method]}")
            pruned += 1
        return pruned


def norms_of(site: Site, statistics: Mapping[str, Any]) -> Tensor | None:
    """The norms [K] of the inputs of a calibrated linear; None if they are others. Merged linears have the same."""
    known = (statistics[name].norms for name in Expression.of(site.weight).leaves)
    return next((norms for norms in known if norms.shape == (site.K,)), None)


def literal(program: Program, site: Site, tensor: Tensor) -> Node:
    """A node for a tensor that is no weight of the model, in front of a site."""
    (name,) = constant_names(program, Expression.of(site.weight).leaves, ["norms"])
    program.constants[name] = tensor
    set_attribute(program.graph_module, name, tensor)
    with program.graph.inserting_before(site.node):
        node = program.graph.get_attr(name)
    node.meta["val"] = site.weight.meta["val"].new_empty(tensor.shape, dtype=tensor.dtype)
    node.meta["literal"] = Literal(tensor)
    return node


class Sparse24Linear(SchemePass):
    """Where the sparse product pays for no number of tokens in range, the linear stays dense, on the pruned weight."""

    name = "sparse24"
    scheme = Sparse24

    def rewrite(self, site: Site, program: Program, context: Context) -> None:
        if site.weight.target is not prune24:
            return  # pruning was left out
        if worth(site, sparse24_linear):
            swap(program, site, Packing(sparse24_linear, {}))
        else:
            keep_dense(program, site)


def worth(site: Site, op: Op, group_size: int | None = None) -> bool:
    """Whether a site becomes sparse: where that pays for the fewest or the most tokens it may see; rows say why not."""
    like = site.weight.meta["val"]
    case = Case(like.device.type, like.dtype, None, site.N, site.K, group_size, capability(like.device))
    low, high = site.rows[0].shape.bounds
    low, high = max(low, 1), ENDLESS if high is None else max(low, high, 1)
    ends = [replace(case, M=M) for M in (low, high)]
    answers = [pays(end, op) for end in ends]
    notes = [str(answer) if True in answers else f"dense: {answer}" for answer in answers if answer is not True][:1]
    if True in answers and any(op.choose(end).name == "cusparselt" for end in ends):
        notes.append("cuSPARSELt keeps a second copy, in its own form")
    for row in site.rows:
        row.notes += notes
    return True in answers


def keep_dense(program: Program, site: Site) -> None:
    """Leaves a linear what it is, on a weight that is pruned once instead of at each call."""
    weight, like = Expression.of(site.weight), site.weight.meta["val"]
    kind = f"dense|{site.scheme}"
    key = f"{kind}|{weight}"
    if key not in program.packs:
        names = constant_names(program, weight.leaves, ["pruned"])
        program.packs[key] = Pack(kind, weight, lambda w: (w,), names, lambda x, packed: F.linear(x, *packed), [])
    program.packs[key].rows += site.rows
    (constant,) = packed_nodes(program, program.packs[key], [like], site.node)
    site.node.replace_input_with(site.weight, constant)
    for row in site.rows:
        row.outcome, row.scheme, row.kernel = REWRITTEN, str(site.scheme), "dense"
        row.bytes_after = row.bytes_before
