"""What the linear operators on quantized activations share: y = (x - x_zero) @ q.T, times the scales, plus a bias.

How an activation is quantized: quantized_activation.py.
"""

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from .linear import fitting
from .op import Case, Implementation, Op, capability


class ScaledLinearOp(Op):
    """An op on the codes x [..., K] of an activation, their scale, a packed weight and a bias: y [..., N] in `dtype`.

    Its schema starts with x and x_scale, maybe x_zero, and ends with bias and dtype. Arguments are known by these names
    and those of the packed weight (`arguments`). Implementations see x as a contiguous [M, K] with M ≥ 1, x_scale and
    x_zero as contiguous [M, …] where each token has its own, as they came where all share one; they give [M, N].
    Rounding has no gradient, and neither have these ops.

    codes: the dtype of x.
    """

    def __init__(self, schema: str, codes: torch.dtype):
        super().__init__(schema)
        self.takes = (codes,)
        self.names = [argument.name for argument in self.overload._schema.arguments]
        self.own = [i for i, name in enumerate(self.names) if name in ("x", "x_scale", "x_zero")]

    def arguments(self, **given: Any) -> tuple:
        """The arguments of a call from their names; what is not given is None."""
        return tuple(given.get(name) for name in self.names)

    def run(self, *args, implementation: str | None = None) -> Tensor:
        case = self.known_case(*args)
        if not case.M:
            return self.like(*args)
        return self.apply(self[implementation] if implementation else self.choose(case), *args)

    def apply(self, choice: Implementation, *args) -> Tensor:
        x, rest = args[0], args[len(self.own) :]
        y = choice.function(*(rows(args[i], x.dim()) for i in self.own), *rest)
        return y.view(*x.shape[:-1], y.shape[-1])

    def like(self, x: Tensor, *args) -> Tensor:
        """An empty y of the right shape: the op's fake."""
        return x.new_empty(*x.shape[:-1], self.case_of(x, *args).N, dtype=args[-1])

    def packing(self, function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        """Decorator: how a weight [N, K] becomes the packed arguments.

        `op.pack` also takes `x_scale` and `x_zero`, numbers, where they were calibrated, and gives them as the last of
        the packed tensors, [1] fp32 and [1] int32.
        """

        def pack(weight: Tensor, x_scale: float | None = None, x_zero: int | None = None, **settings):
            constants = (x_scale, torch.float32), (x_zero, torch.int32)
            given = [weight.new_full((1,), value, dtype=dtype) for value, dtype in constants if value is not None]
            return *function(weight, **settings), *given

        super().packing(pack)
        return function

    def fit(
        self, x: Tensor, x_scale: Tensor, x_zero: Tensor | None, dtype: torch.dtype, N: int, K: int, *expected,
        group_size: int | None = None,
    ) -> Case:  # fmt: skip
        """The case of a call, once its arguments are known to fit together.

        expected: as for `LinearOp.fit`, of each part of the packed weight, and of the bias. group_size: codes of x that
        share a scale, where they may be fewer than a token.
        Raises ValueError with the op, the argument, what it is and what was expected.
        """
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise ValueError(f"{self.name}: dtype is {dtype}, that of y; expected a float of 16 bits or more")
        tokens = tuple(x.shape[:-1])
        scales = [(*tokens, 1), (), (1,)] if group_size is None else [(*tokens, K // group_size)]
        codes = "x", x, self.takes[0], (*tokens, K)
        zeros = "x_zero", x_zero, torch.int32, (*tokens, 1), (), (1,)
        fitting(self.name, x.device, codes, ("x_scale", x_scale, torch.float32, *scales), zeros, *expected)
        per_token, shifted = x_scale.dim() == x.dim(), x_zero is not None
        case = Case(x.device.type, dtype, prod(tokens), N, K, group_size, capability(x.device))
        return replace(case, per_token=per_token, shifted=shifted)


def rows(part: Tensor | None, dims: int) -> Tensor | None:
    """The part of an activation of so many dimensions as a contiguous [M, …]; what all tokens share, as it is."""
    if part is None or part.dim() != dims:
        return part
    return part.reshape(-1, part.shape[-1]).contiguous()


def scaled(sums: Tensor, x_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y [M, N] in dtype: sums [M, N] times the scales of tokens and of channels, plus bias, in fp32, rounded once."""
    y = sums.float() * scale.float() * x_scale
    return (y if bias is None else y + bias.float()).to(dtype)
