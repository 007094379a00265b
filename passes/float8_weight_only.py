"""Linears under a `Float8WeightOnly` rule become `aograph::float8_linear`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..kernels.float8_linear import float8_linear
from ..kernels.op import Packing
from ..program import Program, Site
from ..schemes import Float8WeightOnly
from .base import SchemePass, swap

if TYPE_CHECKING:
    from ..pipeline import Context


class Float8WeightOnlyPass(SchemePass):
    """One scale for each output channel."""

    name = "float8_weight_only"
    scheme = Float8WeightOnly

    def rewrite(self, site: Site, program: Program, context: Context) -> None:
        swap(program, site, Packing(float8_linear, {}))
