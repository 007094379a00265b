"""Plans of kernels that were measured, in files: by what is multiplied, shape and number of tokens."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from math import log
from pathlib import Path
from typing import Any, TypeVar

from . import cache as files

P = TypeVar("P")
Measured = dict[str, dict[tuple[int, int], list[P | None]]]  # by kind and shape (N, K); for each bucket of tokens


def shipped(name: str) -> Path:
    """Those that come with the package."""
    return Path(__file__).parent / "tuned" / f"{name}.json"


def tuned(name: str) -> Path:
    """Those that were measured here."""
    return files.folder() / f"tuned-{name}.json"


def known(paths: Sequence[Path], plan: type[P]) -> Measured[P]:
    """All plans in those of the files that are there, the later ahead of the earlier."""
    plans: Measured[P] = {}
    for path in paths:
        if path.exists():
            try:
                for kind, shapes in read(path, plan).items():
                    plans[kind] = plans.get(kind, {}) | shapes
            except (ValueError, KeyError, TypeError, AttributeError) as error:  # never a reason to stop
                warnings.warn(f"{path} is no file of plans and is ignored: {error}; delete it", stacklevel=2)
    return plans


def read(path: Path, plan: type[P]) -> Measured[P]:
    """The plans in a file that `write` wrote. Of another ValueError, KeyError, TypeError or AttributeError."""
    return {
        kind: {
            tuple(int(size) for size in shape.split("x")): [None if each is None else plan(**each) for each in plans]
            for shape, plans in shapes.items()
        }
        for kind, shapes in json.loads(path.read_text())["plans"].items()
    }


def write(path: Path, plans: Mapping[str, Mapping[tuple[int, int], Sequence[Any]]], about: Mapping[str, str]) -> None:
    """about: where and when they were measured."""
    shapes = {
        kind: {f"{N}x{K}": [None if each is None else asdict(each) for each in found] for (N, K), found in each.items()}
        for kind, each in plans.items()
    }
    with files.written_whole(path) as partial:
        partial.write_text(json.dumps({"about": about, "plans": shapes}, indent=1) + "\n")


def nearest(
    measured: Mapping[tuple[int, int], Sequence[P | None]], bucket: int, N: int, K: int, fits: Callable[[P], bool]
) -> list[P | None]:
    """The plan of the shape that is nearest to [N, K], of those that fit.

    [None] where something else than these kernels was faster there, [] where none was measured.
    """
    found = [(shape, plans[bucket]) for shape, plans in measured.items()]
    fitting = [(shape, plan) for shape, plan in found if plan is None or fits(plan)]
    distance = {shape: abs(log(shape[0] / N)) + abs(log(shape[1] / K)) for shape, _ in fitting}
    return [plan for _, plan in sorted(fitting, key=lambda each: distance[each[0]])[:1]]
