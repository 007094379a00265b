"""Linears under an `Int8Dynamic` rule become `aograph::int8_scaled_linear` on activations in int8."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..expression import Expression
from ..kernels.int8_scaled_linear import int8_scaled_linear
from ..kernels.op import Packing
from ..kernels.quantized_activation import Int8PerTensor, int8_per_token, int8_per_token_asymmetric
from ..program import Program, Site
from ..schemes import Int8Dynamic
from .activation import Quantize, ScaledSchemePass, swap_scaled

if TYPE_CHECKING:
    from ..pipeline import Context


class Int8DynamicPass(ScaledSchemePass):
    """Where scales are static, statistics are there: `find_sites` saw to it."""

    name = "int8_dynamic"
    scheme = Int8Dynamic
    op = int8_scaled_linear

    def rewrite(self, site: Site, program: Program, context: Context) -> None:
        scheme = site.scheme
        assert isinstance(scheme, Int8Dynamic)
        asymmetric, largest = scheme.mapping == "asymmetric", None
        settings: dict[str, Any] = {"algorithm": scheme.algorithm, "sums": asymmetric}
        op, names = self.form(site)
        names += ["sums"] if asymmetric else []
        quantize: Quantize = int8_per_token_asymmetric if asymmetric else int8_per_token
        if scheme.calibrated:
            known = [context.statistics[leaf] for leaf in Expression.of(site.weight).leaves]
            low, high = min(each.low for each in known), max(each.high for each in known)
            largest = max(-low, high)
            quantize = Int8PerTensor.spanning(low, high, asymmetric)
            settings |= {"x_scale": quantize.scale, "x_zero": quantize.zero if asymmetric else None}
            names += ["x_scale", "x_zero"] if asymmetric else ["x_scale"]
        swap_scaled(
            program, site, Packing(op, settings), names, quantize, largest,
            shifted=asymmetric, per_token=not scheme.calibrated,
        )  # fmt: skip
