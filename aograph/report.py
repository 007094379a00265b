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
from .schemes import CACHE, LINEAR

REWRITTEN, SKIPPED, EXCLUDED, NEAR_MISS = "rewritten", "skipped", "excluded", "near miss"


@dataclass
class Row:
    """One candidate: a matrix product on a constant, or a cache of keys or values.

    name: the qualified name of the weight's owner; operator: the operator as the model wrote it; module: class of
    the innermost module. shape: M tokens, N out, K in (None where it is no linear). outcome: rewritten, skipped,
    excluded, near miss. bytes_before, bytes_after: of the weight. error: the relative error of the rewritten op
    against the linear that it replaces, not pruned, on 16 tokens of Gaussian noise. notes: reasons, merges, copies
    kept. Of a cache, name is its own, operator the one that writes it, bytes_before and bytes_after are its bytes, and
    tokens is how many it has room for, in all rows together (None where it is no cache).
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
    tokens: int | None = None

    @property
    def kind(self) -> str:
        return LINEAR if self.tokens is None else CACHE

    def close(self, outcome: str, reason: str) -> None:
        """Ends a candidate that is not rewritten."""
        self.outcome, self.bytes_after = outcome, self.bytes_before
        self.notes.append(reason)

    def as_dict(self) -> dict[str, Any]:
        shape = self.shape
        return {
            "name": self.name,
            "kind": self.kind,
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
            "tokens": self.tokens,
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
    each storage once, and all caches, those that are inputs, too. `notes` say what holds for the whole. Prints as a
    table; `as_dict` is for programs."""

    rows: list[Row] = field(default_factory=list)
    history: list[PassRecord] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    roofline: Roofline | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def rewritten(self) -> list[Row]:
        return [r for r in self.rows if r.outcome == REWRITTEN]

    @property
    def caches(self) -> list[Row]:
        return [r for r in self.rows if r.kind == CACHE]

    @property
    def cache_bytes(self) -> tuple[int, int]:
        """The bytes of all caches, before and after."""
        return sum(r.bytes_before for r in self.caches), sum(r.bytes_after for r in self.caches)

    @property
    def cache_token_bytes(self) -> tuple[float, float]:
        """The bytes that one token of one row takes in all caches, before and after."""
        filled = [(r, r.tokens) for r in self.caches if r.tokens]
        return sum(r.bytes_before / tokens for r, tokens in filled), sum(r.bytes_after / tokens for r, tokens in filled)

    def as_dict(self) -> dict[str, Any]:
        return {
            "rows": [r.as_dict() for r in self.rows],
            "history": [dataclasses.asdict(h) for h in self.history],
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "cache_bytes": list(self.cache_bytes),
            "cache_token_bytes": list(self.cache_token_bytes),
            "notes": self.notes,
        }

    def summary(self) -> str:
        counts = collections.Counter(r.outcome for r in self.rows)
        parts = ", ".join(f"{counts[o]} {o}" for o in (REWRITTEN, SKIPPED, EXCLUDED, NEAR_MISS) if counts[o])
        before, after = self.cache_bytes
        sizes = f"weights {megabytes(self.bytes_before - before)} → {megabytes(self.bytes_after - after)}"
        if self.caches:
            each, now = self.cache_token_bytes
            sizes += f"; cache {megabytes(each)} → {megabytes(now)} a token, {megabytes(before)} → {megabytes(after)}"
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
