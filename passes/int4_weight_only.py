"""Linears under an `Int4WeightOnly` rule become `aograph::int4_linear`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..kernels.int4_linear import int4_linear
from ..kernels.op import Packing
from ..program import Program, Site
from ..schemes import Int4WeightOnly
from .base import SchemePass, swap

if TYPE_CHECKING:
    from ..pipeline import Context


class Int4WeightOnlyPass(SchemePass):
    """The group size divides K: `Int4WeightOnly.refuse` saw to it."""

    name = "int4_weight_only"
    scheme = Int4WeightOnly

    def rewrite(self, site: Site, program: Program, context: Context) -> None:
        size = site.scheme.group_size
        packing = Packing(int4_linear, site.scheme.settings(changed_only=False))
        swap(program, site, packing, size, site.N, group_size=size)
