"""Programs of a few nodes: capturing them, running passes on them, looking at their graphs."""

from collections import Counter

import torch
from aograph.passes import PASSES, Stage
from aograph.patterns.language import packet
from torch import Tensor, nn

from aograph.capture import capture
from aograph.pipeline import Context, order
from aograph.program import Program
from aograph.recipe import Recipe
from aograph.verify import verify


class Function(nn.Module):
    """`function(module, *inputs)`, with weights as parameters of the module."""

    def __init__(self, function, **weights: Tensor):
        super().__init__()
        self.function = function
        for name, value in weights.items():
            setattr(self, name, nn.Parameter(value))

    def forward(self, *inputs):
        return self.function(self, *inputs)


def program_of(model, *inputs, dynamic=False, **weights) -> Program:
    """A module, or a function and its weights, captured; by default with static shapes."""
    model = model if isinstance(model, nn.Module) else Function(model, **weights)
    return capture(model.eval(), inputs, {}, None if dynamic else {}).program


def apply(program: Program, *names: str, recipe="int8wo") -> list[int]:
    """Runs passes by name, the verifier after each; returns the number of their matches."""
    by_name, recipe = {each.name: each for each in PASSES}, Recipe.of(recipe)
    matches = []
    for name in names:
        matches.append(by_name[name].run(program, Context(recipe, recipe.statistics)))
        verify(program)
    program.graph_module.recompile()
    return matches


def up_to(stage: Stage) -> list[str]:
    """The names of the passes of a stage and of those before it, in order."""
    return [each.name for each in order(PASSES) if each.stage <= stage]


def operators(program: Program) -> Counter:
    """How often each operator is called: "aten.linear", "aograph.int8_linear", "getitem" …"""
    calls = (node.target for node in program.graph.nodes if node.op == "call_function")
    return Counter(str(packet(t)) if hasattr(t, "overloadpacket") else t.__name__ for t in calls)


def find(program: Program, operator: str):
    """The only call of an operator."""
    (node,) = (n for n in program.graph.nodes if n.op == "call_function" and str(packet(n.target)) == operator)
    return node


def outputs(program: Program, *inputs):
    with torch.no_grad():
        return program.graph_module(*inputs)
