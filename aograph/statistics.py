"""Statistics of what goes into linears, as `aograph.calibrate` collects them and recipes carry them.

A recipe has them by the qualified names of weights. On disk they are one safetensors file: the norms of each weight
under its name, and in the header, as JSON under "aograph", the rest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import RecipeError

FORMAT = 1


@dataclass(frozen=True, eq=False)
class LinearStatistics:
    """What the linears on one weight were given during calibration: x [tokens, K] over all batches and all uses.

    low, high: the least and the greatest element of x. norms: ‖x_k‖₂ of each input k over all tokens, fp32 [K] on the
    CPU, as Wanda (Sun et al. 2023) weighs weights; [0] where the weight serves linears of different K. tokens: how many
    rows x had.
    """

    low: float
    high: float
    norms: Tensor
    tokens: int

    @property
    def absmax(self) -> float:
        """The greatest magnitude in x."""
        return max(abs(self.low), abs(self.high))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LinearStatistics):
            return NotImplemented
        return self.plain == other.plain and torch.equal(self.norms, other.norms)

    def __hash__(self) -> int:
        return hash(self.plain)

    @property
    def plain(self) -> tuple[float, float, int]:
        return self.low, self.high, self.tokens


def digest(statistics: Mapping[str, LinearStatistics]) -> str:
    """The SHA-256 of statistics, in hexadecimal; equal ones have the same."""
    found = hashlib.sha256()
    for name, each in sorted(statistics.items()):
        found.update(json.dumps([name, each.plain, len(each.norms)]).encode())
        found.update(each.norms.numpy().tobytes())
    return found.hexdigest()


def write(path: Path, statistics: Mapping[str, LinearStatistics]) -> None:
    """Writes a safetensors file that `read` reads. Raises `RecipeError`."""
    about = {"format": FORMAT, "linears": {name: each.plain for name, each in statistics.items()}}
    norms = {name: each.norms.clone() for name, each in statistics.items()}  # tied weights share theirs
    try:
        save_file(norms, path, {"aograph": json.dumps(about)})
    except (SafetensorError, OSError) as error:
        raise RecipeError(f"the statistics {path} cannot be written: {error}") from None


def read(path: Path) -> dict[str, LinearStatistics]:
    """Raises `RecipeError` for a file that is missing, damaged, or of another format."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["aograph"])
            if about["format"] != FORMAT:
                raise RecipeError(
                    f"the statistics {path} are of format {about['format']}; this aograph reads format {FORMAT}: "
                    "update it, or calibrate again"
                )
            linears = about["linears"].items()
            return {
                name: LinearStatistics(low, high, file.get_tensor(name), tokens)
                for name, (low, high, tokens) in linears
            }
    except OSError as error:
        raise RecipeError(f"the statistics {path} cannot be read: {error}; calibrate again") from None
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"{path} holds no statistics of aograph: {error!r}; calibrate again") from error
