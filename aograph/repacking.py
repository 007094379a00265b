"""Packs as data, so that a loaded artifact can pack new weights of the original names.

A pack says which op packs, with which settings, and how the weight [N, K] is computed from the model's own tensors: an
expression of ATen operators and `prune24`, which is read back without running anything but those.
"""

from __future__ import annotations

import base64
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import ArtifactError, InputError
from .expression import Expression, Literal
from .kernels.op import OPS, Packing
from .kernels.prune24 import prune24
from .schemes import nearest
from .weights import Pack, all_finite

SCALARS = (bool, int, float, str, type(None))
OWN: dict[str, Callable[..., Any]] = {"getitem": operator.getitem, str(prune24): prune24}


def packs_as_data(programs: Mapping[str, Mapping[str, Pack]]) -> list[dict[str, Any]]:
    """The packs of each graph by key: each once, with the names of the constants that it `fills` in each graph."""
    packs: dict[str, dict[str, Any]] = {}
    for graph, by_key in programs.items():
        for key, pack in by_key.items():
            packs.setdefault(key, as_data(pack))["fills"][graph] = list(pack.names)
    return list(packs.values())


def as_data(pack: Pack) -> dict[str, Any]:
    """A pack as JSON. `op` is None where the weight is used as it is computed."""
    packing = pack.function if isinstance(pack.function, Packing) else None
    return {
        "op": packing.op.registered if packing else None,
        "settings": packing.settings if packing else {},
        "weight": written(pack.weight),
        "leaves": pack.weight.leaves,
        "fills": {},
    }


def written(value: Any) -> Any:
    """An expression, or an argument in one, as JSON."""
    if isinstance(value, Literal):
        here = value.target.cpu().contiguous()
        content = base64.b64encode(here.view(torch.uint8).numpy()).decode()
        return {"tensor": content, "dtype": str(here.dtype).removeprefix("torch."), "sizes": list(here.shape)}
    if isinstance(value, Expression) and isinstance(value.target, str):
        return {"weight": value.target}
    if isinstance(value, Expression):
        name = next((name for name, own in OWN.items() if own is value.target), str(value.target))
        return {"call": name, "args": written(value.args), "kwargs": {k: written(v) for k, v in value.kwargs}}
    if isinstance(value, (list, tuple)):
        return [written(v) for v in value]
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    return value if isinstance(value, SCALARS) else {"unreadable": str(value)}


def read(data: Any, look_up: Callable[[str], Tensor]) -> Any:
    """The value of what `written` gave. Raises `ArtifactError` for a function that is none of ATen's, nor `prune24`."""
    match data:
        case {"tensor": str(content), "dtype": str(name), "sizes": list(sizes)}:
            bits = bytearray(base64.b64decode(content))
            return torch.frombuffer(bits, dtype=read({"dtype": name}, look_up)).view(sizes)
        case {"weight": str(name)}:
            return look_up(name)
        case {"call": str(name), "args": list(args), "kwargs": dict(kwargs)}:
            given = [read(v, look_up) for v in args], {k: read(v, look_up) for k, v in kwargs.items()}
            return function(name)(*given[0], **given[1])
        case {"dtype": str(name)} if isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        case list():
            return [read(v, look_up) for v in data]
        case bool() | int() | float() | str() | None:
            return data
    raise ArtifactError(f"the artifact computes a weight with {data}, which cannot be computed again")


def function(name: str) -> Callable[..., Any]:
    """A pure operator of ATen by its name, `getitem`, or `prune24`."""
    if own := OWN.get(name):
        return own
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    found = getattr(getattr(torch.ops.aten, packet, None), overload, None) if namespace == "aten" else None
    if not isinstance(found, torch._ops.OpOverload) or found._schema.is_mutable:
        raise ArtifactError(f"the artifact computes a weight with {name!r}, which is no pure operator of ATen")
    return found


def new_weights(
    about: Mapping[str, Any], state: Mapping[str, Any], device: torch.device
) -> tuple[dict[tuple[str, str], Tensor], int]:
    """What new values of some of the model's tensors make of the constants, by graph and name; and how many packs.

    about: the metadata of an artifact. state: tensors by their names in the model, tied ones under any of their names.
    Nothing is changed by this. Raises `InputError` naming what is unknown, missing, or does not fit.
    """
    given = checked(about, state)
    made: dict[tuple[str, str], Tensor] = {}
    touched = [pack for pack in about["packs"] if not given.keys().isdisjoint(pack["leaves"])]
    for pack in touched:
        if missing := [name for name in pack["leaves"] if name not in given]:
            raise InputError(
                f"{', '.join(n for n in pack['leaves'] if n in given)} is packed together with {', '.join(missing)}: "
                "give these too"
            )
    filled = {(graph, name) for pack in about["packs"] for graph, names in pack["fills"].items() for name in names}
    for graph, constants in about["constants"].items():
        for name in given.keys() & set(constants):
            if (graph, name) not in filled:
                made[graph, name] = given[name].detach().to(device, copy=True).contiguous()
    made = shared(made)
    for pack in touched:
        weight = read(pack["weight"], lambda name: given[name].detach().to(device))
        if pack["op"] is not None and not all_finite(weight):
            raise InputError(f"the weight computed from {', '.join(pack['leaves'])} holds NaN or inf")
        packed = OPS[pack["op"]].pack(weight, **pack["settings"]) if pack["op"] is not None else (weight,)
        for graph, names in pack["fills"].items():
            made |= {(graph, name): each.contiguous() for name, each in zip(names, packed, strict=True)}
    return made, len(touched)


def shared(made: dict[tuple[str, str], Tensor]) -> dict[tuple[str, str], Tensor]:
    """One tensor for each name, whatever number of graphs use it."""
    first: dict[str, Tensor] = {}
    return {(graph, name): first.setdefault(name, tensor) for (graph, name), tensor in made.items()}


def checked(about: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors under the names that the artifact knows them by. Raises `InputError`."""
    originals, aliases = about["originals"], about["aliases"]
    given: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name not in originals:
            raise InputError(f"the model has no weight {name!r}; {nearest(name, originals)}")
        like = originals[name]
        wanted = f"{like['dtype']} {like['sizes']}"
        if not isinstance(tensor, Tensor):
            raise InputError(f"{name} is a {type(tensor).__name__}; expected a tensor, {wanted}")
        found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        if found != wanted or tensor.is_meta:
            raise InputError(f"{name} is {found}{' on meta' * tensor.is_meta}; expected {wanted}")
        if tensor.is_floating_point() and not all_finite(tensor):
            raise InputError(f"{name} holds NaN or inf: nothing was updated")
        owner = aliases.get(name, name)
        if owner in given and not torch.equal(given[owner], tensor.to(given[owner].device)):
            raise InputError(f"{name} is tied to {owner}, but another value is given for each")
        given[owner] = tensor
    return given


def originals_as_data(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, dict[str, Any]]:
    """Dtype and sizes of the model's own tensors by name."""
    return {
        name: {"dtype": str(tensor.dtype).removeprefix("torch."), "sizes": list(tensor.shape)}
        for name, tensor in tensors
    }
