"""Packed weights behind `torch.compile`: one copy for each parameter, whatever number of graphs run on it.

A graph that Dynamo hands over takes its parameters as inputs of every call. What a recipe makes of them is kept here,
by the parameter itself: graph breaks, recompilations, prefill and decode and several compiled callables of one module
share it, and it goes when the parameter goes. A write to the parameter in place is noticed at the next call, by the
version that torch counts; a write that torch does not count (through `.data`, under `torch.inference_mode`) only by
`refresh`. Either way the packed tensors are filled again where they are, so that compiled code and CUDA graphs stay.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .errors import InputError, WeightError
from .weights import Pack, check_finite

KNOWN: Any = WeakTensorKeyDictionary()  # the first weight of each pack → what it was packed to, by key
UNPACKED: Any = WeakTensorKeyDictionary()  # weights that some graph reads as they are
LOCK = threading.RLock()

# What makes torch raise when memory that was freed is read, instead of crashing; builds without CUDA lack it.
FORBID: Callable[[int, str], None] | None = getattr(torch._C, "_set_storage_data_ptr_access_error_msg", None)


class Packed:
    """What a pack makes of some weights; `tensors` are filled once, and again when a weight has changed."""

    def __init__(self, pack: Pack, leaves: Sequence[Tensor]):
        self.pack, self.names = pack, pack.weight.leaves
        self.leaves = [weakref.ref(leaf) for leaf in leaves]
        self.versions: list[int] = []
        self.tensors: tuple[Tensor, ...] = ()
        self.error: float | None = None
        self.note: str | None = None

    def of(self, leaves: Sequence[Tensor]) -> bool:
        return all(reference() is leaf for reference, leaf in zip(self.leaves, leaves, strict=True))

    def fill(self, leaves: Sequence[Tensor]) -> None:
        """Packs the weights as they are now. Raises `WeightError` before anything changes."""
        for name, leaf in zip(self.names, leaves, strict=True):
            if released(leaf):
                raise WeightError(
                    f"the original of {name} was released after packing: nothing can be packed from it again; load "
                    "the weights into a new model, and compile that"
                )
            if self.pack.op is not None:
                check_finite(name, leaf)
        with torch.inference_mode(False), torch.no_grad():
            values = dict(zip(self.names, leaves, strict=True))
            fresh, self.error, self.note = self.pack.run(lambda name: values[name].detach())
            for old, new in zip(self.tensors, fresh, strict=False):
                old.copy_(new)
                if old.is_cuda:  # kernels fetch packed weights before the work ahead of them has ended
                    torch.cuda.synchronize(old.device)
            self.tensors = self.tensors or tuple(t.clone() if shares(t, leaves) else t for t in fresh)
            self.pack.prepare(self.tensors)
            self.versions = [version(leaf) for leaf in leaves]


class Frozen:
    """The packed tensors that one compiled graph runs on, from the inputs of each call.

    packs: what the graph needs; leaf(name, inputs) gives a weight; unpacked: the names of weights that the graph reads
    as they are. release: let go of originals once they are packed, where no graph reads them. ready() is called when
    all is packed for the first time.
    """

    def __init__(
        self,
        packs: Sequence[Pack],
        unpacked: Iterable[str],
        leaf: Callable[[str, Sequence[Any]], Tensor],
        release: bool,
        ready: Callable[[], Any],
    ):
        if release and not can_release():
            raise InputError(
                "the option release needs a build of torch that can guard freed memory, as those with CUDA can: leave "
                "it out, or use aograph.optimize(model, recipe, hand_over=True)"
            )
        self.packs, self.unpacked, self.leaf, self.release = packs, list(unpacked), leaf, release
        self.waiting = [ready]
        self.names = list(dict.fromkeys(name for pack in packs for name in pack.weight.leaves))
        self.known: list[tuple[int, int]] | None = None  # identities and versions of the weights
        self.tensors: list[Tensor] = []
        self.watched: list[weakref.ref] = []

    def __call__(self, inputs: Sequence[Any]) -> list[Tensor]:
        """The packed tensors of these inputs, in the order of the packs."""
        leaves = [self.leaf(name, inputs) for name in self.names]
        known, tensors = self.known, self.tensors
        if known == [(id(leaf), version(leaf)) for leaf in leaves]:
            return tensors
        with LOCK:
            return self.bind(leaves, [self.leaf(name, inputs) for name in self.unpacked])

    def bind(self, leaves: Sequence[Tensor], unpacked: Sequence[Tensor]) -> list[Tensor]:
        for name, leaf in zip(self.unpacked, unpacked, strict=True):
            if released(leaf):
                raise WeightError(f"{name} is needed as it is here, but was released after packing: leave release out")
            UNPACKED[leaf] = True
        values = dict(zip(self.names, leaves, strict=True))
        tensors: list[Tensor] = []
        for pack in self.packs:
            found = packed(pack, [values[name] for name in pack.weight.leaves])
            tensors += found.tensors
            pack.report(found.error, found.note)
        if self.release:
            release(values)
        self.watched = [weakref.ref(leaf, self.forget) for leaf in leaves]
        self.tensors, self.known = tensors, [(id(leaf), version(leaf)) for leaf in leaves]
        while self.waiting:
            self.waiting.pop()()
        return tensors

    def forget(self, _: Any = None) -> None:
        """Lets go of the packed tensors: a weight that they come from is gone."""
        self.known, self.tensors, self.watched = None, [], []


def packed(pack: Pack, leaves: Sequence[Tensor]) -> Packed:
    """What a pack makes of these weights, packed now if that is not done yet or they have changed."""
    numbers = {name: f"${i}" for i, name in enumerate(pack.weight.leaves)}
    key = pack.kind, pack.weight.text(numbers)
    same = KNOWN.setdefault(leaves[0], {}).setdefault(key, [])
    found = next((each for each in same if each.of(leaves)), None)
    if found is None or found.versions != [version(leaf) for leaf in leaves]:
        found = found or Packed(pack, leaves)
        found.fill(leaves)
        if not any(each is found for each in same):
            same.append(found)
    return found


def refresh(model: nn.Module) -> int:
    """Packs all that was packed of the parameters and buffers of `model` again, from what they are now.

    For `torch.compile(backend="aograph")`. Needed after a write that torch does not count: through `.data`, or under
    `torch.inference_mode`; other writes are noticed at the next call. Returns how many weights were packed.
    Raises `WeightError` for one that was released, or that holds NaN or inf.
    """
    count = 0
    with LOCK:
        for tensor in dict.fromkeys([*model.parameters(), *model.buffers()]):
            for each in [each for same in KNOWN.get(tensor, {}).values() for each in same]:
                leaves = [reference() for reference in each.leaves]
                if all(leaf is not None for leaf in leaves):
                    each.fill(leaves)
                    count += 1
    return count


def version(tensor: Tensor) -> int:
    """How often torch has counted a write; it does not count those to inference tensors."""
    return 0 if tensor.is_inference() else tensor._version


def shares(tensor: Tensor, leaves: Sequence[Tensor]) -> bool:
    return any(tensor.untyped_storage().data_ptr() == leaf.untyped_storage().data_ptr() for leaf in leaves)


# --- releasing originals -----------------------------------------------------------------------------------


def can_release() -> bool:
    """Whether this build of torch can raise where freed memory is read."""
    return FORBID is not None


def released(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


def release(weights: Mapping[str, Tensor]) -> None:
    """Frees the memory of weights that no graph reads as they are; their modules then refuse state_dict(), and any
    other use of them raises too. A tensor that shares its memory with others is left as it is.
    """
    free = [
        tensor
        for tensor in weights.values()
        if not released(tensor) and tensor not in UNPACKED and tensor.untyped_storage().nbytes() == tensor.nbytes
    ]
    for module, name in owners(free):
        module.register_state_dict_pre_hook(refuse(name))
        module.register_load_state_dict_pre_hook(refuse(name))
    names = {id(tensor): name for name, tensor in weights.items()}
    for tensor in free:
        storage = tensor.untyped_storage()
        storage.resize_(0)
        assert FORBID is not None, "checked when the graph was compiled"
        FORBID(storage._cdata, f"{names[id(tensor)]} was released after packing (option release)")


def owners(tensors: Sequence[Tensor]) -> list[tuple[nn.Module, str]]:
    """The modules that hold these tensors, and under which name."""
    wanted = {id(tensor) for tensor in tensors}
    modules = [each for each in gc.get_objects() if issubclass(type(each), nn.Module)] if wanted else []
    return [
        (module, name)
        for module in modules
        for group in (vars(module).get("_parameters", {}), vars(module).get("_buffers", {}))
        for name, tensor in group.items()
        if id(tensor) in wanted
    ]


def refuse(name: str) -> Callable[..., None]:
    def hook(module: nn.Module, *arguments: Any) -> None:
        prefix = next((a for a in arguments if isinstance(a, str)), "")
        raise WeightError(
            f"{prefix}{name} was released after packing (option release): take state_dict() before the first compiled "
            "call, or load the original checkpoint into a new model"
        )

    return hook
