"""int8_ and float8_sparse24_scaled_linear: a linear on a quantized activation with a weight that is 2:4.

values [N, K/2] and indices [N, ceil(K/8)] uint8 stand for the codes q [N, K] of the dense op, in the format of
`sparse24.py`; all else, and what is computed, is as there, but that cuSPARSELt rounds the sums of float8 to bf16
before they are scaled. Sparse tensor cores do half the operations of a dense product.

`SPARSE` has the sparse op of each dense one.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from . import cuda_scaled_linear, cusparselt
from .float8 import FLOAT8
from .float8_scaled_linear import float8_scaled_linear
from .int8_scaled_linear import int8_scaled_linear, shifted
from .linear import fitting
from .op import Case, need
from .scaled_linear import ScaledLinearOp, scaled
from .sparse24 import compress, decompress

SUMS = {torch.int8: torch.int32, FLOAT8: torch.bfloat16}  # as cuSPARSELt gives those of products of codes


class SparseScaledLinearOp(ScaledLinearOp):
    """The op of a dense one, `base`, whose weight q is 2:4."""

    def __init__(self, base: ScaledLinearOp):
        arguments = str(base.overload._schema).partition("(")[2].partition(")")[0]
        arguments = arguments.replace("Tensor q", "Tensor values, Tensor indices")
        super().__init__(
            f"{base.name.replace('scaled', 'sparse24_scaled')}({arguments}) -> Tensor", codes=base.takes[0]
        )
        self.base = base
        self.at = self.names.index("values")
        self.case(self.sparse_case)
        self.fake(self.like)
        self.packing(self.compressed)
        self.preparation(lambda values, indices, *_: cusparselt.prepare(self, values, indices))
        self.reference(partial(self.densely, base.oracle.function), standalone=False)
        self.implementation(
            "cuda", supports=lambda case: cuda_scaled_linear.supports(case, self.takes[0], sparse=True)
        )(self.fused)
        self.implementation("cusparselt", supports=self.supports)(self.sparsely)
        self.implementation("dequantize", supports=lambda case: True)(partial(self.densely, base.run))

    def sparse_case(self, *args) -> Case:
        values, indices = args[self.at : self.at + 2]
        N, K = values.shape[0], 2 * values.shape[1]
        parts = ("values", values, self.takes[0], (N, K // 2)), ("indices", indices, torch.uint8, (N, -(-K // 8)))
        fitting(self.name, args[0].device, *parts)
        like = values.new_empty(1, 1).expand(N, K)
        try:
            return self.base.case_of(*args[: self.at], like, *args[self.at + 2 :])
        except ValueError as error:
            raise ValueError(f"{self.name}, as {error}") from None

    def compressed(self, weight: Tensor, **settings) -> tuple[Tensor, ...]:
        """As the base packs a weight [N, K] that is 2:4, but q as values and indices."""
        q, *rest = self.base.pack(weight, **settings)
        return *compress(q), *rest

    def densely(self, function: Callable[..., Tensor], *args) -> Tensor:
        values, indices = args[self.at : self.at + 2]
        return function(*args[: self.at], decompress(values, indices), *args[self.at + 2 :])

    def fused(self, *args, function: str | None = None) -> Tensor:
        given = dict(zip(self.names, args, strict=True))
        rest = {name: given.get(name) for name in ("indices", "x_scale", "x_zero", "sums")}
        return cuda_scaled_linear.linear(
            given["x"], given["values"], given["scale"], given["bias"], given["dtype"], function=function, **rest
        )

    def supports(self, case: Case) -> bool | str:
        here = need((case.group_size is None, "cuSPARSELt has no scales of blocks"))
        return cusparselt.supports(case, self.takes[0]) if here is True else here

    def sparsely(self, *args) -> Tensor:
        given = dict(zip(self.names, args, strict=True))
        x = given["x"]
        sums = cusparselt.product(x, given["values"], given["indices"], out_dtype=SUMS[x.dtype])
        sums = shifted(sums, given.get("x_zero"), given.get("sums"))
        return scaled(sums, given["x_scale"], given["scale"], given["bias"], given["dtype"])


SPARSE = {base.name: SparseScaledLinearOp(base) for base in (int8_scaled_linear, float8_scaled_linear)}
