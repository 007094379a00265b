"""Shape predicates of recipes, such as "K >= 1024 and M <= 16".

M may be dynamic, so sizes are ranges, and the logic has three values: True, False and None for undecided.
"""

from __future__ import annotations

import ast
import operator
from dataclasses import dataclass

import sympy

from .errors import RecipeError
from .program import Bound

ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
              ast.Mod: operator.mod}  # fmt: skip
RELATIONS = {ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq,
             ast.NotEq: operator.ne}  # fmt: skip
INFINITY = float("inf")


@dataclass(frozen=True)
class Shape:
    """The shape of a linear: M tokens (an expression in the graph's symbols), N out and K in features."""

    M: sympy.Expr
    N: int
    K: int
    bounds: Bound  # of M


def parse(text: str) -> ast.expr:
    """The syntax tree of a predicate; `RecipeError` for anything but M, N, K, numbers, arithmetic, relations and
    `and`, `or`, `not`."""
    allowed = (ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.BinOp, ast.Compare, ast.Load,
               *ARITHMETIC, *RELATIONS)  # fmt: skip
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError:
        raise RecipeError(f"the shape predicate {text!r} is no expression") from None
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            if node.id not in ("M", "N", "K"):
                raise RecipeError(f"the shape predicate {text!r} knows M, N and K, not {node.id!r}")
        elif not isinstance(node, allowed) and not (isinstance(node, ast.Constant) and type(node.value) is int):
            raise RecipeError(f"the shape predicate {text!r} may not contain {ast.unparse(node)!r}")
    return tree.body


def holds(text: str, shape: Shape) -> bool | None:
    """Whether a predicate holds for every M in range (True), for none (False), or for some (None)."""
    low, high = shape.bounds
    sizes = {"N": (shape.N, shape.N), "K": (shape.K, shape.K), "M": (low, INFINITY if high is None else high)}

    def span(node: ast.expr) -> tuple[float, float]:
        if isinstance(node, ast.Constant):
            return int(node.value), int(node.value)  # type: ignore[arg-type]
        if isinstance(node, ast.Name):
            return sizes[node.id]
        if not isinstance(node, ast.BinOp):
            raise RecipeError(f"{ast.unparse(node)!r} in {text!r} is no number")
        left, right, function = span(node.left), span(node.right), ARITHMETIC[type(node.op)]
        if isinstance(node.op, (ast.Mod, ast.FloorDiv)) and right[0] <= 0 <= right[1]:
            raise RecipeError(f"{ast.unparse(node)!r} in {text!r} divides by zero")
        if left[0] == left[1] and right[0] == right[1]:
            return (function(left[0], right[0]),) * 2
        if isinstance(node.op, ast.Mod):
            return (0, right[0] - 1) if right[0] == right[1] > 0 else (-INFINITY, INFINITY)
        if isinstance(node.op, ast.FloorDiv) and INFINITY in map(abs, right):
            return -INFINITY, INFINITY
        if isinstance(node.op, ast.FloorDiv):
            ends = [a // b if abs(a) < INFINITY else a / b for a in left for b in right]
        else:
            ends = [function(a, b) for a in left for b in right]
        ends = [0 if e != e else e for e in ends]  # 0 × ∞
        return min(ends), max(ends)

    def relation(left: tuple[float, float], op: ast.cmpop, right: tuple[float, float]) -> bool | None:
        function = RELATIONS[type(op)]
        if isinstance(op, (ast.Eq, ast.NotEq)):
            if left[1] < right[0] or right[1] < left[0]:
                return isinstance(op, ast.NotEq)
            return function(left[0], right[0]) if left[0] == left[1] == right[0] == right[1] else None
        ends = {function(a, b) for a in left for b in right}
        return ends.pop() if len(ends) == 1 else None

    def truth(node: ast.expr) -> bool | None:
        if isinstance(node, ast.BoolOp):
            values, decisive = [truth(v) for v in node.values], isinstance(node.op, ast.Or)
            return decisive if decisive in values else (None if None in values else not decisive)
        if isinstance(node, ast.UnaryOp):
            value = truth(node.operand)
            return None if value is None else not value
        if not isinstance(node, ast.Compare):
            raise RecipeError(f"{ast.unparse(node)!r} in {text!r} is no condition")
        terms = [span(t) for t in (node.left, *node.comparators)]
        values = [relation(a, op, b) for a, op, b in zip(terms[:-1], node.ops, terms[1:], strict=True)]
        return False if False in values else (None if None in values else True)

    return truth(parse(text))
