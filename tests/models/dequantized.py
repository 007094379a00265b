"""The oracle for whole models: what a model computes on the weights that its packed ones stand for."""

import copy

import torch
from aograph.kernels import int4_linear, int8_linear
from torch import nn

from aograph.program import get_attribute

INT8, INT8_GROUPS = "int8wo", "int8wo(group_size=32)"
INT4 = "int4wo(group_size=32, algorithm=minmax)"  # minmax packs fastest
UNPACK = {
    INT8: lambda packed, N: int8_linear.unpack(*packed),
    INT8_GROUPS: lambda packed, N: int8_linear.unpack(*packed),
    INT4: lambda packed, N: int4_linear.unpack(*packed, 32, N),
}


def owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def untie(model: nn.Module, aliases: dict[str, str]) -> dict[str, str]:
    """Gives a linear that shares an embedding's table a weight of its own; by name of the table, that weight's name."""
    untied = {}
    for alias, name in aliases.items():
        if isinstance(owner(model, name), nn.Embedding) and not isinstance(owner(model, alias), nn.Embedding):
            if (table := get_attribute(model, name)) is get_attribute(model, alias):
                setattr(owner(model, alias), alias.rpartition(".")[2], nn.Parameter(table.detach().clone()))
            untied[name] = alias
    return untied


@torch.no_grad()
def dequantized(model: nn.Module, optimized, recipe: str) -> nn.Module:
    """A copy of the model in which every weight that was packed is what its packed form stands for."""
    model = copy.deepcopy(model)
    for _, captured, _ in optimized._captures.values():
        untied = untie(model, captured.program.aliases)
        packs = [pack for pack in captured.program.packs.values() if pack.op is not None]
        names = {name for pack in packs for name in pack.weight.leaves}
        original = {name: get_attribute(model, untied.get(name, name)) for name in names}
        for pack in packs:
            parts = pack.weight.args[0] if "cat" in str(pack.weight.target) else [pack.weight]
            views = [part.evaluate(original.__getitem__) for part in parts]
            sizes = [len(view) for view in views]
            weight = UNPACK[recipe](optimized._store.packed[pack.key], sum(sizes))
            for view, values in zip(views, weight.split(sizes), strict=True):
                assert view._is_view() or isinstance(view, nn.Parameter)
                view.copy_(values)
    return model
