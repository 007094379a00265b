"""The report: one row for each candidate, what was done or why not, and what it costs."""

from __future__ import annotations

import collections
import dataclasses
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from tabulate import tabulate

from .cost import Roofline, linear_cost
from .predicate import Shape

REWRITTEN, SKIPPED, EXCLUDED, NEAR_MISS = "rewritten", "skipped", "excluded", "near miss"


@dataclass
class Row:
    """One candidate: a matrix product on a constant.

    name: the qualified name of the weight's owner; operator: the operator as the model wrote it; module: class of
    the innermost module. shape: M tokens, N out, K in (None where it is no linear). outcome: rewritten, skipped,
    excluded, near miss. bytes_before, bytes_after: of the weight. error: the relative error of the rewritten op
    against the linear that it replaces, not pruned, on 16 tokens of Gaussian noise. notes: reasons, merges, copies
    kept.
    """

    name: str
    operator: str
    module: str
    shape: Shape | None
    dtype: torch.dtype
    outcome: str = SKIPPED
    scheme: str = ""
    kernel: str = ""
    bytes_before: int = 0
    bytes_after: int = 0
    error: float | None = None
    notes: list[str] = field(default_factory=list)

    def close(self, outcome: str, reason: str) -> None:
        """Ends a candidate that is not rewritten."""
        self.outcome, self.bytes_after = outcome, self.bytes_before
        self.notes.append(reason)

    def as_dict(self) -> dict[str, Any]:
        shape = self.shape
        return {
            "name": self.name,
            "operator": self.operator,
            "module": self.module,
            "M": str(shape.M) if shape else None,
            "N": shape.N if shape else None,
            "K": shape.K if shape else None,
            "dtype": str(self.dtype).removeprefix("torch."),
            "outcome": self.outcome,
            "scheme": self.scheme,
            "kernel": self.kernel,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "error": self.error,
            "notes": "; ".join(self.notes),
        }


@dataclass
class PassRecord:
    """What a pass did: matches, whether the graph changed, seconds of its own and of the verifier after it."""

    name: str
    stage: str
    matches: int
    changed: bool
    seconds: float
    verify_seconds: float


@dataclass
class Report:
    """Rows, totals and the history of passes. `bytes_before` and `bytes_after` count all weights of the program,
    each storage once. `notes` say what holds for the whole. Prints as a table; `as_dict` is for programs."""

    rows: list[Row] = field(default_factory=list)
    history: list[PassRecord] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    roofline: Roofline | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def rewritten(self) -> list[Row]:
        return [r for r in self.rows if r.outcome == REWRITTEN]

    def as_dict(self) -> dict[str, Any]:
        return {
            "rows": [r.as_dict() for r in self.rows],
            "history": [dataclasses.asdict(h) for h in self.history],
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "notes": self.notes,
        }

    def summary(self) -> str:
        counts = collections.Counter(r.outcome for r in self.rows)
        parts = ", ".join(f"{counts[o]} {o}" for o in (REWRITTEN, SKIPPED, EXCLUDED, NEAR_MISS) if counts[o])
        sizes = f"weights {megabytes(self.bytes_before)} → {megabytes(self.bytes_after)}"
        return f"{len(self.rows)} candidates: {parts or 'nothing to rewrite'}; {sizes}"

    def __str__(self) -> str:
        table = [
            [r.name, r.operator, dimensions(r), r.outcome, r.scheme, r.kernel, megabytes(r.bytes_before),
             megabytes(r.bytes_after), "" if r.error is None else f"{r.error:.2%}", "; ".join(r.notes)]
            for r in self.rows
        ]  # fmt: skip
        headers = ["name", "operator", "M×N×K", "outcome", "scheme", "kernel", "before", "after", "error", "notes"]
        return tabulate(table, headers, maxcolwidths=[44, None, None, None, None, 40, None, None, None, 48]) + (
            "".join(f"\n{line}" for line in (self.summary(), *self.notes))
        )

    def costs(self) -> str:
        """The costs of each candidate in the graph's symbols, and the roofline times on the device."""
        table = []
        for row in self.rows:
            if row.shape is None or self.roofline is None:
                continue
            M, N, K, dtype = row.shape.M, row.shape.N, row.shape.K, row.dtype
            before, after = (linear_cost(M, N, K, b, dtype.itemsize) for b in (row.bytes_before, row.bytes_after))
            lowest = sympy.Integer(max(row.shape.bounds[0], 1))
            times = [
                f"{float(self.roofline.seconds(linear_cost(lowest, N, K, b, dtype.itemsize), dtype)) * 1e6:.3g}"
                for b in (row.bytes_before, row.bytes_after)
            ]
            limit = self.roofline.break_even(N, K, row.bytes_before, dtype)
            table.append([row.name, row.scheme or row.outcome, before.bytes, after.bytes, before.operations, *times,
                          "" if limit is None else limit])  # fmt: skip
        name = self.roofline.name if self.roofline else "?"
        headers = [
            "name",
            "scheme",
            "bytes before",
            "bytes after",
            "operations",
            "µs before",
            "µs after",
            "pays below M",
        ]
        return tabulate(table, headers) + f"\nroofline of {name}; times at the lowest M in range"

    def passes(self) -> str:
        """The history of passes with their times."""
        table = [
            [
                h.name,
                h.stage,
                h.matches,
                "yes" if h.changed else "",
                *(f"{s * 1e3:.1f}" for s in (h.seconds, h.verify_seconds)),
            ]
            for h in self.history
        ]
        return tabulate(table, ["pass", "stage", "matches", "changed", "ms", "ms to verify"])


def dimensions(row: Row) -> str:
    return f"{row.shape.M}×{row.shape.N}×{row.shape.K}" if row.shape else ""


def megabytes(size: float) -> str:
    """A size for people: B, KB, MB, GB in powers of 1000."""
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
