"""Inlining: a program as a graph that runs without this package, its ops replaced by what they are made of.

Each op of ours is traced into an implementation that is `standalone`: torch's own operators and Triton kernels. The
choice is made once for the whole range of M at that place, not for the sizes of an example.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, Interpreter, Node

from .errors import CompileError
from .kernels.op import OPS, Implementation, Op
from .program import Program, expression, get_attribute, set_attribute


@dataclass(frozen=True)
class Inlined:
    """A program ready for AOTInductor.

    exported: takes the program's inputs, and gives its outputs, that are tensors, in their order. kernels: how often
    which implementation of which op stands in the graph, as ("int8_linear", "dequantize"). outside: names of the ops
    that have no standalone implementation here: the graph calls them, and runs only where this package is.
    """

    exported: ExportedProgram
    kernels: dict[tuple[str, str], int]
    outside: list[str]


def inline(program: Program) -> Inlined:
    """Traces a program, whose weights are real, into one graph of standalone code.

    Raises `CompileError` where torch cannot trace it.
    """
    known = {op.overload: op for op in OPS.values()}
    ops = {node: known[node.target] for node in program.graph.nodes if node.target in known}
    chosen = {node: choice for node, op in ops.items() if (choice := choose(program, node, op))}
    root = runnable(program, {node: partial(ops[node].apply, choice) for node, choice in chosen.items()})
    fakes = [node.meta["val"] for node in program.inputs if is_tensor(node)]
    shapes = tuple({i: dynamic(program, size) for i, size in enumerate(fake.shape)} for fake in fakes)
    try:
        with torch.no_grad():
            exported = torch.export.export(root, tuple(map(example, fakes)), dynamic_shapes=(shapes,), strict=False)
    except Exception as error:
        raise CompileError(f"the rewritten graph could not be traced for an artifact: {error}") from error
    counts = collections.Counter((ops[node].name, choice.name) for node, choice in chosen.items())
    outside = sorted({op.registered for node, op in ops.items() if node not in chosen})
    return Inlined(exported, dict(counts), outside)


def choose(program: Program, node: Node, op: Op) -> Implementation | None:
    """The standalone implementation for all sizes that a call of our op can have."""
    case = op.case_of(*torch.fx.map_arg(node.args, lambda n: n.meta["val"]))
    return op.standalone(case, *program.bounds(expression(case.M)))


def runnable(program: Program, bodies: dict[Node, Callable[..., Tensor]]) -> nn.Module:
    """A module that owns the program's weights by name, and computes its outputs that are tensors from such inputs."""
    root = nn.Module()
    for node in program.graph.find_nodes(op="get_attr"):
        value = get_attribute(program.graph_module, node.target)
        if isinstance(value, Tensor):
            set_attribute(root, node.target, value.contiguous())
        else:
            root.add_module(node.target, value)  # a branch of torch.cond
    steps = Steps(root, program.graph, bodies)

    def forward(*tensors: Tensor) -> Any:
        given = iter(tensors)
        for node, tensor in zip(filter(is_tensor, program.inputs), tensors, strict=True):
            for captured, size in zip(node.meta["val"].shape, tensor.shape, strict=True):
                _, most = program.bounds(expression(captured))
                if isinstance(size, torch.SymInt) and most is not None:
                    torch._check(size <= most)  # Dim.AUTO tells its limits only after tracing: kernels ask before
        outputs = steps.run(*(next(given) if is_tensor(node) else node.meta.get("val") for node in program.inputs))
        return [value for value in outputs if isinstance(value, Tensor)]

    root.forward = forward
    return root


def is_tensor(value: Any) -> bool:
    """Whether an input or output of a graph is a tensor; outputs may be plain values, which are no nodes."""
    return isinstance(value, Node) and isinstance(value.meta.get("val"), Tensor)


class Steps(Interpreter):
    """Runs a graph with other functions in place of some of its calls."""

    def __init__(self, root: nn.Module, graph: Graph, bodies: dict[Node, Callable[..., Tensor]]):
        super().__init__(root, graph=graph)
        self.bodies = bodies

    def run_node(self, n: Node) -> Any:
        if n not in self.bodies:
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        return self.bodies[n](*args)


def dynamic(program: Program, size: Any) -> Any:
    """How torch.export is told about a size."""
    if not isinstance(size, torch.SymInt):
        return Dim.STATIC
    low, high = program.bounds(expression(size))
    return Dim.AUTO(min=low, max=high)


def example(fake: Tensor) -> Tensor:
    """A tensor of zeros of the size that a fake one was captured with."""
    sizes = [size.node.hint if isinstance(size, torch.SymInt) else size for size in fake.shape]
    return torch.zeros(sizes, dtype=fake.dtype, device=fake.device)
