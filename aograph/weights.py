"""Weights: packed once, whatever number of graphs use them, one layer at a time, on the target device."""

from __future__ import annotations

import gc
import itertools
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .errors import WeightError
from .expression import Expression
from .kernels.op import Packing
from .kernels.prune24 import prune24
from .program import Program, get_attribute, set_attribute
from .report import Row

PROBE_TOKENS = 16


@dataclass
class Pack:
    """A weight that a pass has packed, to be packed for real by `WeightStore.materialize`.

    `weight` computes the original and `function(weight) -> tuple of tensors` packs it; `names` are the constants
    that the result fills. `kind` says what the function does, `key` what the constants hold. `op(x, packed) -> y` is
    the rewritten op without bias, whose error goes to the `rows` of the report; None where nothing is rounded. `state`:
    the graph writes what is packed, so that all graphs of a model have to read it in this form.
    """

    kind: str
    weight: Expression
    function: Callable[[Tensor], tuple[Tensor, ...]]
    names: tuple[str, ...]
    op: Callable[[Tensor, tuple[Tensor, ...]], Tensor] | None = None
    rows: list[Row] = field(default_factory=list)
    state: bool = False

    @property
    def key(self) -> str:
        return f"{self.kind}|{self.weight}"

    @torch.no_grad()
    def run(self, look_up: Callable[[str], Tensor]) -> tuple[tuple[Tensor, ...], float | None, str | None]:
        """The packed tensors of the weight [N, K], the leaves of which `look_up(name)` gives; the relative error of the
        op on them against the weight before it was pruned (None: nothing is rounded); and what its values tell.

        Raises `WeightError` if the weight, computed from finite values, is not finite.
        """
        if self.op is None:
            return tuple(self.function(self.weight.evaluate(look_up))), None, None
        dense, *norms = self.weight.args if self.weight.target is prune24 else (self.weight,)
        weight = dense.evaluate(look_up)
        if not all_finite(weight):
            raise WeightError(
                f"the weight {self.weight} is computed from finite values, but holds NaN or inf; exclude it with "
                f"the rule {self.rows[0].name}:none"
            )
        kept = weight if dense is self.weight else prune24(weight, *(each.evaluate(look_up) for each in norms))
        note = "2:4 already" if kept is not weight and torch.equal(kept, weight) else None
        packed = tuple(self.function(kept))
        generator = torch.Generator(weight.device).manual_seed(0)
        tokens = PROBE_TOKENS, weight.shape[1]
        x = torch.randn(tokens, generator=generator, device=weight.device, dtype=weight.dtype)
        expected = F.linear(x, weight).float()
        error = (self.op(x, packed).float() - expected).norm()
        return packed, float(error / expected.norm().clamp_min(torch.finfo(torch.float32).tiny)), note

    def prepare(self, packed: tuple[Tensor, ...]) -> None:
        """Has the op make what it keeps besides the packed tensors, which are there, or were written."""
        if isinstance(self.function, Packing):
            self.function.op.prepare(*packed)

    def report(self, error: float | None, note: str | None) -> None:
        """Tells the rows what packing showed."""
        for row in self.rows:
            row.error = error
            if note is not None and note not in row.notes:
                row.notes.append(note)


class Source(Protocol):
    """Where the tensors of a model come from that is on the meta device, such as a checkpoint."""

    def check(self, name: str) -> None:
        """Raises `WeightError` if it does not have the original of that name; reads nothing."""

    def original(self, name: str) -> Tensor:
        """The model's tensor of that name, on the device and in memory of its own. Raises `WeightError`."""

    def holds(self, key: str) -> bool:
        """Whether it has packed already what a pack of that key holds."""
        return False

    def packed(self, key: str) -> tuple[tuple[Tensor, ...], float | None]:
        """What a pack of that key holds, on the device, and its error."""
        raise KeyError(key)


class WeightStore:
    """The tensors that the programs of one model run on.

    Originals come from the programs' constants (which share the model's storage), or, for a model on meta, from
    `source`, one at a time. What a program packs is made once and shared by key; what it uses unpacked is shared
    with the model if that is on the device already, except that buffers which graphs write are copied, so that the
    model's own never change.

    With `hand_over`, an original is released as soon as no program needs it: the model's tensor moves to meta.
    """

    def __init__(self, model: nn.Module, device: torch.device, hand_over: bool, source: Source | None = None):
        self.device, self.source = device, source
        self.model: nn.Module | None = model if hand_over else None
        self.kept: dict[str, Tensor] = {}  # unpacked, on the device
        self.packed: dict[str, tuple[Tensor, ...]] = {}  # by key
        self.errors: dict[str, float] = {}  # by key
        self.notes: dict[str, str] = {}  # by key
        self.state: dict[str, str | None] = {}  # of each buffer that graphs write: the key that packs it, or None
        self.names: dict[str, Tensor] = {}  # all that programs refer to: the state
        self.lock = threading.RLock()

    def materialize(self, program: Program, progress: bool = True) -> None:
        """Packs what is not packed yet, puts all tensors where the graph looks for them, releases originals.

        Raises `WeightError` for a weight that is not to be had, or with NaN or inf, before anything is packed or
        released; what a source gives is read once, so its values are checked when its turn comes.
        """
        with self.lock:
            self.check_state(program)
            missing = [p for p in program.packs.values() if p.key not in self.packed]
            self.check_source(program, missing)
            self.check_finite(program, missing)
            if self.model is not None:
                gc.collect()  # what tracing left behind still refers to the originals, in cycles
            used = program.weights.keys()
            waiting = Counter(name for p in missing for name in p.weight.leaves)
            for pack in tqdm(missing, "packing", unit="weight", disable=None if progress else True, leave=False):
                self.pack(pack, program)
                waiting.subtract(pack.weight.leaves)
                for name in pack.weight.leaves:
                    if not waiting[name] and name not in used:
                        self.release(program, name)
            for name in program.constants.keys() - used:  # another program has packed it
                self.release(program, name)
            for pack in program.packs.values():
                pack.report(self.errors.get(pack.key), self.notes.get(pack.key))
                for name, tensor in zip(pack.names, self.packed[pack.key], strict=True):
                    self.publish(name, tensor)
                    set_attribute(program.graph_module, name, tensor)
            for name in list(program.constants):
                program.constants[name] = tensor = self.keep(program, name)
                self.publish(name, tensor)
                set_attribute(program.graph_module, name, tensor)

    def publish(self, name: str, tensor: Tensor) -> None:
        """Names a tensor in the state; programs that packed one weight differently get different names."""
        for suffix in itertools.chain([""], (f"_{i}" for i in itertools.count(2))):
            if self.names.setdefault(name + suffix, tensor) is tensor:
                return

    def original(self, program: Program, name: str) -> Tensor:
        """A tensor of the model: the program's own or, where that is on meta, the model's or what the source gives."""
        tensor = program.constants[name]
        if not tensor.numel():
            return torch.empty_like(tensor, device=self.device)
        if self.source is not None and tensor.is_meta:
            return self.source.original(name)
        if tensor.is_meta and self.model is not None:  # partly handed over, so that it was captured on meta
            tensor = get_attribute(self.model, name)
        if tensor.is_meta:
            raise WeightError(
                f"the weight {name} is on the meta device: it was never loaded, or was handed over and packed "
                "before; give the loaded model, or hand it over only once its shapes are captured"
            )
        return tensor.detach()

    def check_state(self, program: Program) -> None:
        """Raises `WeightError` for a buffer that this program would write in one form, and another in a second one."""
        found: dict[str, str | None] = dict.fromkeys(sorted(program.mutated & program.constants.keys()))
        found |= {name: p.key for p in program.packs.values() if p.state for name in p.weight.leaves}
        for name, key in found.items():
            if self.state.get(name, key) != key:
                raise WeightError(
                    f"the cache {name} is quantized in the graph of one call and as it was in that of another, whose "
                    "tokens it would not see: write the model so that all calls use it alike, or add the rule "
                    f"{name}:none"
                )
        self.state |= found

    def check_source(self, program: Program, packs: list[Pack]) -> None:
        """Raises `WeightError` where the source does not have what is to be packed or kept."""
        if self.source is not None:
            wanted = [name for p in packs if not self.source.holds(p.key) for name in p.weight.leaves]
            wanted += [name for name in program.weights if name in program.constants and name not in self.kept]
            for name in dict.fromkeys(wanted):
                if self.streamed(program, name):
                    self.source.check(name)

    def check_finite(self, program: Program, packs: list[Pack]) -> None:
        for name in dict.fromkeys(n for p in packs if p.op is not None for n in p.weight.leaves):
            if not self.streamed(program, name):
                check_finite(name, self.original(program, name))

    def streamed(self, program: Program, name: str) -> bool:
        """Whether a tensor has to be read from the source each time that it is needed."""
        tensor = program.constants[name]
        return self.source is not None and tensor.is_meta and tensor.numel() > 0

    def pack(self, pack: Pack, program: Program) -> None:
        def leaf(name: str) -> Tensor:
            tensor = self.original(program, name).to(self.device)
            if pack.op is not None and self.streamed(program, name):
                check_finite(name, tensor)
            return tensor

        if self.source is not None and self.source.holds(pack.key):
            self.packed[pack.key], error = self.source.packed(pack.key)
            note = None
        else:
            self.packed[pack.key], error, note = pack.run(leaf)
        pack.prepare(self.packed[pack.key])
        if error is not None:
            self.errors[pack.key] = error
        if note is not None:
            self.notes[pack.key] = note

    def keep(self, program: Program, name: str) -> Tensor:
        """The unpacked tensor of a program, on the device."""
        if name not in self.kept:
            original = self.original(program, name)
            tensor = original.to(self.device)
            own = self.model is not None or tensor.data_ptr() != original.data_ptr()
            self.kept[name] = tensor.clone() if name in program.mutated and not own else tensor
        return self.kept[name]

    def release(self, program: Program, name: str) -> None:
        """Lets go of an original: in the program, and, if it was handed over, in the model."""
        del program.constants[name]
        set_attribute(program.graph_module, name, torch.empty(0, device="meta"))
        if self.model is None:
            return
        for path in [name, *(alias for alias, owner in program.aliases.items() if owner == name)]:
            owner, _, leaf = path.rpartition(".")
            module = self.model.get_submodule(owner)
            for group in (module._parameters, module._buffers):
                if (tensor := group.get(leaf)) is not None:
                    group[leaf] = meta_like(tensor)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises `WeightError` for a weight with NaN or inf."""
    if not all_finite(tensor):
        bad = (~torch.isfinite(tensor.detach())).nonzero()[0].tolist()
        raise WeightError(
            f"the weight {name} holds NaN or inf, first at {bad}: nothing was packed; "
            f"repair the checkpoint, or exclude it with the rule {name.removesuffix('.weight')}:none"
        )


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor inf; needs no copy of it."""
    return not tensor.numel() or all(bound.isfinite() for bound in torch.aminmax(tensor.detach()))


def meta_like(tensor: Tensor) -> Any:
    """A tensor of the same kind on the meta device."""
    like = tensor.detach().to("meta")
    return nn.Parameter(like, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else like
