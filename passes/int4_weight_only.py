"""Linears under an `Int4WeightOnly` rule become `aograph::int4_linear`."""

from __future__ import annotations

from functools import partial

from ..kernels.int4_linear import int4_linear, pack
from ..program import Program, Site
from ..schemes import Int4WeightOnly
from .base import SchemePass, swap


class Int4WeightOnlyPass(SchemePass):
    """The group size must divide K."""

    name = "int4_weight_only"
    scheme = Int4WeightOnly

    def refuse(self, site: Site) -> str | None:
        size = site.scheme.group_size
        if site.K % size == 0:
            return None
        fits = [g for g in (256, 128, 64, 32) if site.K % g == 0]
        return f"K = {site.K} is not divisible by the group size {size}" + (f" ({fits[0]} would be)" if fits else "")

    def rewrite(self, site: Site, program: Program) -> None:
        size = site.scheme.group_size
        function = partial(pack, group_size=size, algorithm=site.scheme.algorithm)
        swap(program, site, int4_linear, function, size, site.N, group_size=size)
