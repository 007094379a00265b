"""Tuning: which linears `aograph tune` measures, those of a model or of given shapes, and how those of a scheme are."""

from __future__ import annotations

import datetime
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from .errors import InputError
from .kernels import plans, scaled_tuning, tuning
from .kernels.cuda_linear import Plan
from .kernels.cuda_scaled_linear import ScaledPlan
from .kernels.float8 import FLOAT8
from .kernels.float8_scaled_linear import float8_scaled_linear
from .kernels.int4_linear import int4_linear
from .kernels.int8_linear import int8_linear
from .kernels.int8_scaled_linear import int8_scaled_linear
from .kernels.op import Op
from .kernels.sparse24_linear import sparse24_linear
from .kernels.sparse24_scaled_linear import SPARSE
from .optimize import call_of, rewrite
from .pipeline import packed_linears
from .recipe import Recipe

Row = tuple[str, str, int, str, float, str, float | None]


@dataclass(frozen=True)
class Kind:
    """How the linears of a scheme are measured.

    op: what they are once packed. plan: the class of their plans. tokens: at how many they are measured.
    rival: what stands against the plans; empty where all else is far slower.
    takes(N, K[, group_size]): True, or why they cannot be measured. fastest(N, K[, group_size], each=…): the plans.
    """

    op: Op
    plan: type
    tokens: Sequence[int]
    rival: str
    takes: Callable[..., bool | str]
    fastest: Callable[..., list[Any | None]]


def weight_only(op: Op, bits: int) -> Kind:
    takes, fastest = partial(tuning.takes, bits), partial(tuning.fastest, bits)
    return Kind(op, Plan, tuning.MEASURED, "dequantize", takes, fastest)


def scaled(op: Op, codes: torch.dtype, sparse: bool, rival: str) -> Kind:
    takes, fastest = partial(scaled_tuning.takes, codes, sparse), partial(scaled_tuning.fastest, codes, sparse)
    return Kind(op, ScaledPlan, scaled_tuning.MEASURED, rival, takes, fastest)


KINDS = {  # by the presets; dense products ahead of the sparse ones that they stand against
    "int4wo": weight_only(int4_linear, 4),
    "int8wo": weight_only(int8_linear, 8),
    "int8dq": scaled(int8_scaled_linear, torch.int8, False, ""),
    "float8dq": scaled(float8_scaled_linear, FLOAT8, False, "cuBLASLt"),
    "sparse24": scaled(sparse24_linear, torch.bfloat16, True, "dense"),
    "int8dq-sparse24": scaled(SPARSE["int8_scaled_linear"], torch.int8, True, "dense"),
    "float8dq-sparse24": scaled(SPARSE["float8_scaled_linear"], FLOAT8, True, "dense"),
}


class Linear(NamedTuple):
    """A linear to measure: a name in KINDS, and N, K and, where groups share a scale, their size."""

    kind: str
    sizes: tuple[int, ...]

    @property
    def shape(self) -> str:
        return "{}x{}".format(*self.sizes)

    @property
    def scheme(self) -> str:
        return self.kind + "".join(f" in groups of {size}" for size in self.sizes[2:])

    def __str__(self) -> str:
        return f"{self.shape} under {self.scheme}"


def gpu(name: str) -> torch.device:
    """The GPU of that name. Raises `InputError` where the CUDA C++ kernels do not run on it."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device {name!r} is none that torch knows: {error}") from None
    here = tuning.available(device)
    if here is not True:
        raise InputError(f"nothing can be measured on {name!r}: {here}; run this on the GPU that is to be tuned for")
    return device


def check_plans(path: Path) -> None:
    """Raises `InputError` where a file is there to which plans cannot be added."""
    if not path.exists():
        return
    try:
        for name, kind in KINDS.items():
            plans.read(path, name, kind.plan)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is no file of plans, and is left as it is: {error!r}; delete it, or give another --output"
        ) from error


def of_shapes(shapes: Iterable[str], schemes: Iterable[str], group_size: int) -> list[Linear]:
    """Linears of all the shapes under all the schemes. group_size: of those under int4wo.

    Raises `InputError` for shapes that are none or that the kernels do not take.
    """
    linears = []
    for sizes in map(parse_shape, shapes):
        for scheme in schemes:
            linear = Linear(scheme, (*sizes, group_size) if scheme == "int4wo" else sizes)
            if (reason := KINDS[scheme].takes(*linear.sizes)) is not True:
                raise InputError(f"the kernels do not take {linear}: {reason}")
            linears.append(linear)
    return linears


def of_model(model: nn.Module, inputs: Any, recipe: Recipe, device: torch.device) -> list[Linear]:
    """What the passes leave of a model's linears under a recipe, on that GPU: merged, and sparse where that pays.

    Warns of those that the kernels do not take, and where there is none.
    """
    kinds = {kind.op: name for name, kind in KINDS.items()}
    captured, report = rewrite(model, recipe, *call_of(inputs), None, device)
    cases = [(kinds[op], case) for op, case in packed_linears(captured.program) if op in kinds]
    groups = [(name, case, () if case.group_size is None else (case.group_size,)) for name, case in cases]
    linears = []
    for linear in dict.fromkeys(Linear(name, (case.N, case.K, *group)) for name, case, group in groups):
        if (reason := KINDS[linear.kind].takes(*linear.sizes)) is True:
            linears.append(linear)
        else:
            warnings.warn(f"{linear} is not measured: {reason}", stacklevel=2)
    if not cases:
        notes = dict.fromkeys(note for row in report.rows for note in row.notes)
        reasons = f": {'; '.join(notes)}" if notes else ""
        warnings.warn(f"the recipe {str(recipe)!r} leaves no linear to measure{reasons}", stacklevel=2)
    return linears


def parse_shape(text: str) -> tuple[int, int]:
    """N and K. Raises `InputError` for what is no shape."""
    found = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)", text)
    if found is None:
        raise InputError(f"{text!r} is no shape: give out and in features, as in 6144x4096")
    return int(found[1]), int(found[2])


def tune(linears: Iterable[Linear], device: torch.device, path: Path) -> tuple[list[Row], list[str]]:
    """Measures each linear once, in the order of KINDS, and adds its plans to a file.

    A row for each linear and number of tokens: shape, scheme, M, plan, µs, what stands against it, µs of that. And what
    went wrong: of a linear with a kernel that is wrong nothing is kept.
    """
    about = {
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    rows: list[Row] = []
    failures = []
    ordered = sorted(dict.fromkeys(linears), key=lambda linear: list(KINDS).index(linear.kind))
    with torch.cuda.device(device):
        for linear in tqdm(ordered, "measuring", unit="shape", disable=None, leave=False):
            try:
                found, told = measure(linear)
            except RuntimeError as error:
                failures.append(f"nothing is kept for {linear}: {error}")
                continue
            N, K, *_ = linear.sizes
            tuning.keep(path, linear.kind, (N, K), found, about)
            rows += told
    return rows, failures


def measure(linear: Linear) -> tuple[list[Any | None], list[Row]]:
    """The fastest plans of a linear, and the rows of the table for it."""
    kind = KINDS[linear.kind]
    times: dict[tuple[int, Any | None], float] = {}

    def each(M: int, microseconds: float, error: float, plan: Any | None) -> None:
        times[M, plan] = microseconds

    def row(M: int, plan: Any | None) -> Row:
        against = times.get((M, None))
        rival = kind.rival if against is not None else ""
        return linear.shape, linear.scheme, M, str(plan or kind.rival), times[M, plan], rival, against

    found = kind.fastest(*linear.sizes, each=each)
    return found, [row(M, plan) for M, plan in zip(kind.tokens, found, strict=True)]
