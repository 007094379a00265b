"""What an operator of aograph is: one meaning, and implementations that are chosen late.

An op is declared by its schema. Its `reference`, in plain torch, is its meaning, its fallback and its test
oracle. Implementations register in order of preference, and each says of a `Case` whether it takes it or why
not. The choice is made at every call, from the real arguments, so that one compiled graph serves prefill and
decode; a report can ask for the same choice ahead of time.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor

OPS: dict[str, "Op"] = {}
ENDLESS = 1 << 24  # tokens: what an unbounded M is probed up to
REMEMBERED = 4096  # cases of an op


@dataclass(frozen=True)
class Case:
    """What decides which implementation runs.

    device: "cpu", "cuda", "meta" …; dtype: of x; M: tokens, None when unknown; N: out features; K: in features;
    group_size: weights along K that share a scale, None for a whole row; capability: CUDA's (major, minor),
    None when unknown or not CUDA; of fused ops only: gated: the halves of the output are a gate and what it gates;
    normed: x is normalized first; of ops on quantized activations only, whose dtype is that of y: per_token: tokens
    have scales of their own; shifted: x has a zero point.
    """

    device: str
    dtype: torch.dtype
    M: int | None
    N: int
    K: int
    group_size: int | None = None
    capability: tuple[int, int] | None = None
    gated: bool = False
    normed: bool = False
    per_token: bool = True
    shifted: bool = False


Supports = Callable[[Case], bool | str]


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op; `supports(case)` is True, or the reason why not.

    standalone: it is made of torch's own operators and Triton kernels, so that a graph into which its call is traced
    runs without this package.
    """

    name: str
    function: Callable[..., Tensor]
    supports: Supports
    standalone: bool = False


@dataclass(frozen=True)
class Packing:
    """How a weight is packed, as data: `packing(weight)` is what `op.pack(weight, **settings)` gives.

    An artifact writes it down, so that a loaded one can pack new weights.
    """

    op: "Op"
    settings: dict[str, int | str | None]

    def __call__(self, weight: Tensor) -> tuple[Tensor, ...]:
        return self.op.pack(weight, **self.settings)


def need(*conditions: tuple[bool, str]) -> bool | str:
    """True where every `(holds, reason)` holds, else the reason of the first that does not."""
    return next((reason for holds, reason in conditions if not holds), True)


@lru_cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """The CUDA compute capability of a device; None for any other kind of device, and where there is no GPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.cuda.is_available() else None


class Op:
    """An operator `torch.ops.aograph.NAME`, registered with torch when it is declared.

    schema: as torch writes it, `"int8_linear(Tensor x, Tensor q, Tensor scale, Tensor? bias=None) -> Tensor"`.
    version: raised when the meaning or the packed layout changes; from 2 on it is part of the registered name,
    so that an artifact never runs with another meaning than the one it was saved with.
    usual_group_size: that of the cases which `availability` asks about.
    takes: the dtypes that its first argument may have.
    """

    takes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)

    def __init__(self, schema: str, *, version: int = 1, usual_group_size: int | None = None):
        self.name, signature = schema[: schema.index("(")], schema[schema.index("(") :]
        self.version = version
        self.usual_group_size = usual_group_size
        self.implementations: list[Implementation] = []
        self.prepare: Callable[..., None] = lambda *packed: None
        self.registered = self.name if version == 1 else f"{self.name}_v{version}"
        self.qualified_name = f"aograph::{self.registered}"
        torch.library.define(self.qualified_name, signature, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(self.qualified_name, "default", self.run)
        self.overload = getattr(torch.ops.aograph, self.registered).default
        self.choose = lru_cache(maxsize=REMEMBERED)(self._choose)
        self.cases: dict[tuple, Case] = {}
        OPS[self.registered] = self

    def __repr__(self) -> str:
        return f"Op({self.qualified_name})"

    def __call__(self, *args) -> Tensor:
        return self.overload(*args)

    # Declaration ------------------------------------------------------------------------------------------

    def reference(self, function: Callable[..., Tensor], standalone: bool = True) -> Callable[..., Tensor]:
        """Decorator: the meaning of the op, on any device.

        standalone: False where an artifact had better call the op, and need this package, than hold what this does.
        """
        self.oracle = Implementation("reference", function, lambda case: True, standalone)
        return function

    def fake(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Decorator: shape and dtype of the result, symbolic shapes included."""
        torch.library.register_fake(self.qualified_name, function)
        return function

    def case(self, function: Callable[..., Case]) -> Callable[..., Case]:
        """Decorator: the `Case` that the arguments of a call are."""
        self.case_of = function
        return function

    def packing(self, function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        """Decorator: how a weight [N, K] becomes the packed arguments; other parameters are numbers or text."""
        self.pack = function
        return function

    def preparation(self, function: Callable[..., None]) -> Callable[..., None]:
        """Decorator: makes what implementations keep besides the packed arguments, once these are there, and brings it
        up to date once they were written in place: never in a call, which a CUDA graph may not even make."""
        self.prepare = function
        return function

    def implementation(self, name: str, *, supports: Supports, standalone: bool = False):
        """Decorator: a way to compute the op, preferred to all that register after it."""

        def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            self.implementations.append(Implementation(name, function, supports, standalone))
            self.choose.cache_clear()
            return function

        return register

    # Choice -----------------------------------------------------------------------------------------------

    def run(self, *args, implementation: str | None = None) -> Tensor:
        """Compute the op by the implementation chosen for these arguments, or by the one that is named."""
        return self.apply(self[implementation] if implementation else self.choose(self.known_case(*args)), *args)

    def known_case(self, *args) -> Case:
        """`case_of` real arguments, remembered by what it may depend on: checking them takes longer than a launch."""
        key = tuple([(each.shape, each.dtype, each.device) if isinstance(each, Tensor) else each for each in args])
        case = self.cases.get(key)
        if case is None:
            if len(self.cases) >= REMEMBERED:
                self.cases.clear()
            case = self.cases[key] = self.case_of(*args)
        return case

    def apply(self, choice: Implementation, *args) -> Tensor:
        """Compute the op by one of its implementations."""
        return choice.function(*args)

    def __getitem__(self, name: str) -> Implementation:
        found = [each for each in self if each.name == name]
        if not found:
            raise KeyError(f"{self.name} has no implementation {name!r}; it has {[each.name for each in self]}")
        return found[0]

    def __iter__(self) -> Iterator[Implementation]:
        """The implementations in order of preference; the reference comes last."""
        return iter([*self.implementations, self.oracle])

    def _choose(self, case: Case) -> Implementation:
        """The first implementation that supports the case. With M unknown: one that takes any M."""
        return next(each for each in self if each.supports(case) is True)

    def standalone(self, case: Case, lo: int, hi: int | None) -> Implementation | None:
        """The implementation for a graph that runs without this package, where M goes from `lo` to `hi`.

        The first in order of preference that is standalone and supports both ends of the range, None (`hi`): no end.
        """
        ends = [replace(case, M=M) for M in (max(lo, 1), ENDLESS if hi is None else max(lo, hi, 1))]
        fits = (each for each in self if each.standalone and all(each.supports(end) is True for end in ends))
        return next(fits, None)

    # Reports ----------------------------------------------------------------------------------------------

    def plan(self, case: Case, lo: int, hi: int | None) -> str:
        """Which implementation runs where M goes from `lo` to `hi` (None: unbounded), for a reader.

        "aten (M ≤ 4), dequantize (M > 4)"; a name alone where it covers the whole range. The choice is probed at
        powers of two and its changes located by bisection: a change that is undone before the next power of two
        is not seen.
        """

        @lru_cache(None)
        def name(M: int) -> str:
            return self.choose(replace(case, M=M)).name

        lo, hi = max(lo, 1), ENDLESS if hi is None else max(lo, hi, 1)
        starts = [lo]  # of each range
        for probe in [*(1 << i for i in range(lo.bit_length(), hi.bit_length())), hi]:
            while name(starts[-1]) != name(probe):
                other = partial(lambda was, M: name(M) != was, name(starts[-1]))
                starts.append(bisect_left(range(probe), True, lo=starts[-1] + 1, key=other))
        if len(starts) == 1:
            return name(lo)
        ends = [start - 1 for start in starts[1:]]
        between = [f"{first} ≤ M ≤ {last}" for first, last in zip(starts[1:], ends[1:], strict=False)]
        spans = [f"M ≤ {ends[0]}", *between, f"M > {ends[-1]}"]
        return ", ".join(f"{name(start)} ({span})" for start, span in zip(starts, spans, strict=True))

    def usual(self, device: torch.device, dtype: torch.dtype, M: int) -> Case:
        """A case that `availability` asks about."""
        return Case(device.type, dtype, M, 4096, 4096, self.usual_group_size, capability(device))

    def availability(self, device: str) -> list[tuple[str, bool | str]]:
        """For each implementation: True where it takes some usual case on this device, else why not."""
        usual = [
            self.usual(torch.device(device), dtype, M)
            for dtype in (torch.bfloat16, torch.float16, torch.float32)
            for M in (1, 4096)
        ]
        answers = [(each.name, [each.supports(case) for case in usual]) for each in self]
        return [(name, True if True in replies else replies[0]) for name, replies in answers]
