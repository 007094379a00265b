"""Linears under an `Int8WeightOnly` rule become `aograph::int8_linear`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..kernels.int8_linear import int8_linear
from ..kernels.op import Packing
from ..program import Program, Site
from ..schemes import Int8WeightOnly
from .base import SchemePass, swap

if TYPE_CHECKING:
    from ..pipeline import Context


class Int8WeightOnlyPass(SchemePass):
    """The group size, if any, divides K: `Int8WeightOnly.refuse` saw to it."""

    name = "int8_weight_only"
    scheme = Int8WeightOnly

    def rewrite(self, site: Site, program: Program, context: Context) -> None:
        packing = Packing(int8_linear, site.scheme.settings(changed_only=False))
        swap(program, site, packing, group_size=site.scheme.group_size)
