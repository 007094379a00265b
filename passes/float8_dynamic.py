"""Linears under a `Float8Dynamic` rule become `aograph::float8_scaled_linear` on activations in float8."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..expression import Expression
from ..kernels.float8_scaled_linear import float8_scaled_linear
from ..kernels.op import Packing
from ..kernels.quantized_activation import (
    BLOCK,
    Float8PerTensor,
    float8_per_block,
    float8_per_tensor,
    float8_per_token,
)
from ..program import Program, Site
from ..schemes import Float8Dynamic
from .activation import Quantize, ScaledSchemePass, swap_scaled

if TYPE_CHECKING:
    from ..pipeline import Context

QUANTIZE: dict[str, Quantize] = {"row": float8_per_token, "tensor": float8_per_tensor, "block": float8_per_block}


class Float8DynamicPass(ScaledSchemePass):
    """Where scales are static, statistics are there, and the device multiplies float8: `find_sites` saw to it."""

    name = "float8_dynamic"
    scheme = Float8Dynamic
    op = float8_scaled_linear

    def rewrite(self, site: Site, program: Program, context: Context) -> None:
        scheme = site.scheme
        assert isinstance(scheme, Float8Dynamic)
        settings: dict[str, Any] = {"granularity": scheme.granularity}
        op, names = self.form(site)
        quantize, largest = QUANTIZE[scheme.granularity], None
        if scheme.calibrated:
            largest = max(context.statistics[leaf].absmax for leaf in Expression.of(site.weight).leaves)
            quantize = Float8PerTensor.spanning(largest)
            settings["x_scale"] = quantize.scale
            names.append("x_scale")
        swap_scaled(
            program, site, Packing(op, settings), names, quantize, largest,
            per_token=scheme.granularity != "tensor" and not scheme.calibrated,
            group_size=BLOCK if scheme.granularity == "block" else None,
        )  # fmt: skip
