"""int4_fused_linear, int8_fused_linear: a linear on a packed weight with what stands around it in a decoder.

    h = rms_norm(x) * norm          where norm [K] is given: over the last dimension, with eps
    y = linear(h)                   int4_linear or int8_linear, whose arguments come first
    y = silu(gate) * up             where `gated`: gate, up are the halves of y [..., N]
    y = residual + y                where residual, of y's shape, is given

x [..., K], norm, residual and y are of one dtype. The fused kernel (small_linear.cu) rounds once, at the end; it
multiplies x by norm, in x's dtype, before the product and by the reciprocal root mean square after it. RMSNorm: Zhang
and Sennrich, 2019; gated units: Shazeer, 2020.

`FUSED` has the fused op of each op. An artifact, which has no kernels of ours but Triton's, gets the parts.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cuda_linear
from .int4_linear import int4_linear
from .int8_linear import int8_linear
from .linear import LinearOp, fitting
from .op import Case, Implementation, Op


class FusedLinearOp(Op):
    """The fused op of a `LinearOp`, `base`, on weights of so many bits."""

    def __init__(self, base: LinearOp, bits: int):
        arguments = str(base.overload._schema).partition("(")[2].partition(")")[0].replace("=None", "")
        more = "Tensor? norm, float eps, Tensor? residual, bool gated"
        name = base.name.replace("linear", "fused_linear")
        super().__init__(f"{name}({arguments}, {more}) -> Tensor", usual_group_size=base.usual_group_size)
        self.base, self.bits = base, bits
        self.case(self.fit)
        self.fake(self.like)
        self.reference(partial(self.composed, base.run))
        self.implementation("cuda", supports=lambda case: cuda_linear.supports(case, bits, fused=True))(self.whole)

    def fit(self, x: Tensor, *args) -> Case:
        """The case of a call, once its arguments are known to fit together; ValueError as from `LinearOp.fit`."""
        *weight, norm, _, residual, gated = args
        case = self.base.case_of(x, *weight)
        if gated and case.N % 2:
            raise ValueError(f"{self.name}: N is {case.N}; expected an even number, as gated halves it")
        y = (*x.shape[:-1], case.N // 2 if gated else case.N)
        fitting(self.name, x.device, ("norm", norm, x.dtype, (case.K,)), ("residual", residual, x.dtype, y))
        return replace(case, gated=gated, normed=norm is not None)

    def like(self, x: Tensor, *args) -> Tensor:
        """An empty y of the right shape: the op's fake."""
        N = self.case_of(x, *args).N
        return x.new_empty(*x.shape[:-1], N // 2 if args[-1] else N)

    def composed(self, linear: Callable[..., Tensor], x: Tensor, *args) -> Tensor:
        """The parts, one after another."""
        *weight, norm, eps, residual, gated = args
        h = x if norm is None else F.rms_norm(x, x.shape[-1:], norm, eps)
        y = linear(h, *weight)
        if gated:
            gate, up = y.chunk(2, -1)
            y = F.silu(gate) * up
        return y if residual is None else y + residual

    def whole(self, x: Tensor, *args) -> Tensor:
        """One kernel."""
        q, scales, *_, bias, norm, eps, residual, gated = args
        case = self.known_case(x, *args)
        rows = x.reshape(-1, case.K).contiguous()
        around = cuda_linear.Around(norm, eps, None if residual is None else residual.contiguous(), gated)
        y = cuda_linear.linear(rows, q, scales, bias, case.N, case.group_size, around)
        return y.view(*x.shape[:-1], y.shape[1])

    def run(self, *args, implementation: str | None = None) -> Tensor:
        case = self.known_case(*args)
        choice = self[implementation] if implementation else self.choose(case)
        return self.apply(choice if case.M else self.oracle, *args)

    def standalone(self, case: Case, lo: int, hi: int | None) -> Implementation | None:
        inner = self.base.standalone(replace(case, gated=False, normed=False), lo, hi)
        return inner and replace(inner, function=partial(self.composed, partial(self.base.apply, inner)))


FUSED: dict[torch._ops.OpOverload, FusedLinearOp] = {
    base.overload: FusedLinearOp(base, bits) for base, bits in ((int4_linear, 4), (int8_linear, 8))
}
