"""Linears under an `Int8DynamicSparse24` rule: dynamic int8 on weights that are 2:4, sparse where that pays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..kernels.prune24 import prune24
from ..kernels.scaled_linear import ScaledLinearOp
from ..kernels.sparse24_scaled_linear import SPARSE
from ..program import Program, Site
from ..schemes import Int8DynamicSparse24
from .int8_dynamic import Int8DynamicPass
from .sparse24 import worth

if TYPE_CHECKING:
    from ..pipeline import Context


class Int8DynamicSparse24Pass(Int8DynamicPass):
    """As `Int8DynamicPass`, on the pruned weight: elsewhere a dense product of the same codes."""

    name = "int8_dynamic_sparse24"
    scheme = Int8DynamicSparse24

    def rewrite(self, site: Site, program: Program, context: Context) -> None:
        if site.weight.target is prune24:  # else pruning was left out
            super().rewrite(site, program, context)

    def form(self, site: Site) -> tuple[ScaledLinearOp, list[str]]:
        op, names = super().form(site)
        sparse = SPARSE[op.name]
        return (sparse, ["values", "indices", *names[1:]]) if worth(site, sparse) else (op, names)
