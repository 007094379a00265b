"""Plans of kernels that were measured, in files: by what is multiplied, shape and number of tokens.

Kinds of linears are named as the presets that make them. What was measured here, in a file of the cache folder, comes
ahead of what was measured on an H200 and comes with the package.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from math import log
from pathlib import Path
from typing import Any, TypeVar

from . import cache as files

NAME = "sm_90"  # of the files: what the kernels are written for
P = TypeVar("P")
Measured = dict[tuple[int, int], list[P | None]]  # by shape (N, K); for each bucket of tokens


def shipped() -> Path:
    """Those that come with the package."""
    return Path(__file__).parent / "tuned" / f"{NAME}.json"


def tuned() -> Path:
    """Those that were measured here."""
    return files.folder() / f"tuned-{NAME}.json"


@cache
def table(kind: str, plan: type[P]) -> Measured[P]:
    """All plans of a kind, those measured here ahead of those that come with the package."""
    plans: Measured[P] = {}
    for path in (shipped(), tuned()):
        if path.exists():
            try:
                plans |= read(path, kind, plan)
            except (ValueError, KeyError, TypeError, AttributeError) as error:  # never a reason to stop
                warnings.warn(f"{path} is no file of plans and is ignored: {error!r}; delete it", stacklevel=2)
    return plans


def read(path: Path, kind: str, plan: type[P]) -> Measured[P]:
    """The plans of a kind in a file that `add` wrote. Of another ValueError, KeyError, TypeError or AttributeError."""
    return {
        tuple(int(size) for size in shape.split("x")): [
            None if each is None else plan(**each) for each in found["plans"]
        ]
        for shape, found in json.loads(path.read_text())["measured"].get(kind, {}).items()
    }


def add(path: Path, kind: str, shape: tuple[int, int], plans: Sequence[Any | None], about: Mapping[str, str]) -> None:
    """Adds the plans of a shape (N, K) to a file, which need not exist yet, in place of older ones.

    about: where and when they were measured. Raises OSError, and what `read` does of a file that is none.
    """
    content = json.loads(path.read_text()) if path.exists() else {"measured": {}}
    found = {**about, "plans": [None if each is None else asdict(each) for each in plans]}
    content["measured"].setdefault(kind, {})["{}x{}".format(*shape)] = found
    with files.written_whole(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def nearest(
    measured: Mapping[tuple[int, int], Sequence[P | None]], bucket: int, N: int, K: int, fits: Callable[[P], bool]
) -> list[P | None]:
    """The plan of the shape that is nearest to [N, K], of those that fit.

    [None] where something else than these kernels was faster there, [] where none was measured. Where fewer numbers of
    tokens were told apart when it was measured, the last holds for all above.
    """
    found = [(shape, plans[min(bucket, len(plans) - 1)]) for shape, plans in measured.items() if plans]
    fitting = [(shape, plan) for shape, plan in found if plan is None or fits(plan)]
    distance = {shape: abs(log(shape[0] / N)) + abs(log(shape[1] / K)) for shape, _ in fitting}
    return [plan for _, plan in sorted(fitting, key=lambda each: distance[each[0]])[:1]]
