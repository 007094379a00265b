"""Constant expressions, taken out of their graph: what a weight is, as a function of the model's own tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map


@dataclass(frozen=True)
class Expression:
    """A weight by its name, or a pure function of expressions.

    Its text is its identity: the same text computes the same tensor.
    """

    target: Any  # the name of a weight, or the function
    args: tuple = ()
    kwargs: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, node: Node) -> Expression:
        if node.op == "get_attr":
            return node.meta.get("literal") or cls(node.target)
        args = torch.fx.map_arg(node.args, cls.of)
        return cls(node.target, args, tuple(torch.fx.map_arg(node.kwargs, cls.of).items()))

    @property
    def leaves(self) -> list[str]:
        """The names of the weights that it reads, in order of first use."""
        if isinstance(self.target, str):
            return [self.target]
        inputs = tree_leaves([self.args, dict(self.kwargs)], is_leaf=is_expression)
        return list(dict.fromkeys(name for v in inputs if is_expression(v) for name in v.leaves))

    def evaluate(self, look_up: Callable[[str], Tensor]) -> Tensor:
        """The tensor, its leaves coming from `look_up(name)`."""
        if isinstance(self.target, str):
            return look_up(self.target)

        def value(v: Any) -> Any:
            return v.evaluate(look_up) if is_expression(v) else v

        args, kwargs = tree_map(value, (self.args, dict(self.kwargs)), is_leaf=is_expression)
        return self.target(*args, **kwargs)

    def text(self, names: Mapping[str, str]) -> str:
        """As text, with other names for weights."""
        if isinstance(self.target, str):
            return names.get(self.target, self.target)

        def show(value: Any) -> str:
            if isinstance(value, (list, tuple)):
                return f"[{', '.join(map(show, value))}]"
            return value.text(names) if is_expression(value) else str(value)

        given = [*map(show, self.args), *(f"{k}={show(v)}" for k, v in self.kwargs)]
        return f"{getattr(self.target, '__name__', self.target)}({', '.join(given)})"

    def __str__(self) -> str:
        return self.text({})

    __repr__ = __str__


class Literal(Expression):
    """A tensor that is no weight of the model, such as calibrated statistics; a node has it in `meta["literal"]`."""

    @property
    def leaves(self) -> list[str]:
        return []

    def evaluate(self, look_up: Callable[[str], Tensor]) -> Tensor:
        return self.target

    def text(self, names: Mapping[str, str]) -> str:
        return self.digest

    @cached_property
    def digest(self) -> str:
        here = self.target.cpu().contiguous()
        return f"{here.dtype}{list(here.shape)}#{hashlib.sha256(here.view(torch.uint8).numpy()).hexdigest()[:16]}"


def is_expression(value: Any) -> bool:
    return isinstance(value, Expression)
