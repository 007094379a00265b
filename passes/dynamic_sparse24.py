"""Linears under the rules that quantize activations and make weights 2:4: sparse products of codes where that pays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..kernels.prune24 import prune24
from ..kernels.quantized_activation import BLOCK
from ..kernels.scaled_linear import ScaledLinearOp
from ..kernels.sparse24_scaled_linear import SPARSE
from ..program import Program, Site
from ..schemes import Float8DynamicSparse24, Int8DynamicSparse24
from .activation import ScaledSchemePass
from .float8_dynamic import Float8DynamicPass
from .int8_dynamic import Int8DynamicPass
from .sparse24 import worth

if TYPE_CHECKING:
    from ..pipeline import Context


class SparseScaledSchemePass(ScaledSchemePass):
    """In front of the pass for the dense scheme: does the same on the pruned weight, by a sparse op where that pays."""

    def rewrite(self, site: Site, program: Program, context: Context) -> None:
        if site.weight.target is prune24:  # else pruning was left out
            super().rewrite(site, program, context)

    def form(self, site: Site) -> tuple[ScaledLinearOp, list[str]]:
        sparse = SPARSE[self.op.name]
        if not worth(site, sparse, BLOCK if blocks(site) else None):
            return super().form(site)
        return sparse, ["values", "indices", "scale"]


class Int8DynamicSparse24Pass(SparseScaledSchemePass, Int8DynamicPass):
    name = "int8_dynamic_sparse24"
    scheme = Int8DynamicSparse24


class Float8DynamicSparse24Pass(SparseScaledSchemePass, Float8DynamicPass):
    name = "float8_dynamic_sparse24"
    scheme = Float8DynamicSparse24


def blocks(site: Site) -> bool:
    """Whether blocks of the weight share a scale."""
    return isinstance(site.scheme, Float8DynamicSparse24) and site.scheme.granularity == "block"
