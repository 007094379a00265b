"""Computes small constant expressions once, such as the joint bias of merged linears, instead of at every call."""

from __future__ import annotations

from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..expression import Expression
from ..patterns.language import constant, packet, views_of
from ..patterns.linear import VIEWS
from ..program import Program, nbytes
from ..weights import Pack
from .base import Pass, Stage, constant_names, packed_nodes

LARGEST = 1 << 20  # bytes; what is larger would cost memory for little


class FoldConstants(Pass):
    """Largest constant expressions first; views stay, as they cost nothing, and so does what gradients train."""

    name = "fold_constants"
    stage = Stage.LOWER

    def run(self, program: Program, context) -> int:
        folded = 0
        for node in list(program.graph.nodes):
            if foldable(node) and not all(map(constant, node.users)) and not returned(node):
                expression = Expression.of(node)
                if node.meta.get("grad") and any(program.constants[n].requires_grad for n in expression.leaves):
                    continue
                key = f"constant|{expression}"
                if key not in program.packs:
                    names = constant_names(program, expression.leaves, ["folded"])
                    program.packs[key] = Pack("constant", expression, identity, names)
                (new,) = packed_nodes(program, program.packs[key], [node.meta["val"]], node)
                node.replace_all_uses_with(new)
                folded += 1
        return folded


def returned(node: Node) -> bool:
    """Whether the graph returns a node or a view of it: each call must return a tensor of its own."""
    return any(user.op == "output" or (user in views_of(node) and returned(user)) for user in node.users)


def identity(tensor):
    return (tensor,)


def foldable(node: Node) -> bool:
    """A call on constants that computes something, with a small tensor as its result."""
    small = hasattr(node.meta.get("val"), "dtype") and statically_known_true(nbytes(node.meta["val"]) <= LARGEST)
    return small and node.op == "call_function" and constant(node) and packet(node.target) not in VIEWS
