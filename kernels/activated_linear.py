"""…_activated_linear: a linear with an activation function behind it, for ops whose CUDA kernel takes both.

    y = function(linear(x))     the linear's arguments come first; function: "gelu", or "gelu_tanh" (approximate="tanh")

Shapes and dtypes are those of the linear. The CUDA kernel rounds once, at the end; where it does not take a case, the
linear rounds, too. GELU: Hendrycks and Gimpel, 2016.

`ACTIVATED` has the op of each linear.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .float8_scaled_linear import float8_scaled_linear
from .int8_scaled_linear import int8_scaled_linear
from .op import Case, Implementation, Op
from .sparse24_linear import sparse24_linear
from .sparse24_scaled_linear import SPARSE

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


class ActivatedLinearOp(Op):
    """The op of a linear, `base`, whose implementation "cuda" takes a `function`."""

    def __init__(self, base: Op):
        arguments = str(base.overload._schema).partition("(")[2].partition(")")[0].replace("=None", "")
        super().__init__(f"{base.name.replace('linear', 'activated_linear')}({arguments}, str function) -> Tensor")
        self.base, self.takes = base, base.takes
        self.case(self.fit)
        self.fake(self.like)
        self.reference(partial(self.composed, base.run), standalone=base.oracle.standalone)
        self.implementation("cuda", supports=base["cuda"].supports)(self.whole)

    def fit(self, *args) -> Case:
        """The case of a call, once its arguments are known to fit together; ValueError as from the linear."""
        if args[-1] not in FUNCTIONS:
            raise ValueError(f"{self.name}: function is {args[-1]!r}; expected one of {', '.join(FUNCTIONS)}")
        return replace(self.base.case_of(*args[:-1]), activated=True)

    def like(self, *args) -> Tensor:
        """An empty y of the right shape: the op's fake."""
        self.fit(*args)
        return self.base.like(*args[:-1])

    def composed(self, linear: Callable[..., Tensor], *args) -> Tensor:
        """The parts, one after the other."""
        return FUNCTIONS[args[-1]](linear(*args[:-1]))

    def whole(self, *args) -> Tensor:
        """One kernel."""
        kernel = self.base["cuda"]
        return self.base.apply(replace(kernel, function=partial(kernel.function, function=args[-1])), *args[:-1])

    def run(self, *args, implementation: str | None = None) -> Tensor:
        case = self.known_case(*args)
        choice = self[implementation] if implementation else self.choose(case)
        return self.apply(choice if case.M else self.oracle, *args)

    def standalone(self, case: Case, lo: int, hi: int | None) -> Implementation | None:
        inner = self.base.standalone(replace(case, activated=False), lo, hi)
        return inner and replace(inner, function=partial(self.composed, partial(self.base.apply, inner)))


ACTIVATED: dict[torch._ops.OpOverload, ActivatedLinearOp] = {
    base.overload: ActivatedLinearOp(base)
    for base in (int8_scaled_linear, float8_scaled_linear, sparse24_linear, *SPARSE.values())
}
