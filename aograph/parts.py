"""Models that export cannot take whole: rewritten in parts, behind `torch.compile(backend="aograph")`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .capture import eval_mode, no_fast_paths
from .frozen import can_release
from .recipe import Recipe
from .report import Report


def in_parts(
    model: nn.Module,
    recipe: Recipe,
    reason: str,
    report: Report,
    hand_over: bool,
    compile_options: Mapping[str, Any] | None,
    **options: Any,
) -> Callable:
    """`model` behind `torch.compile(backend="aograph")`, for what cannot be captured whole.

    report: says why and what it costs, and collects the rows and notes of the graphs. hand_over: release originals as
    they are packed, where torch can guard freed memory.
    """
    graphs = 0

    def collect(part: Report) -> None:
        nonlocal graphs
        graphs += 1
        notes.extend(note for note in part.notes if note not in notes)
        rows = {(row.name, row.operator): row for row in [*report.rows, *part.rows]}
        report.rows = list(rows.values())
        report.bytes_before, report.bytes_after = (
            sum(getattr(row, key) for row in report.rows) for key in ("bytes_before", "bytes_after")
        )
        report.notes = [*notes, f"{graphs} graphs so far; sizes are those of the candidates"]

    notes = [f"in parts, by torch.compile: {reason}", "Python runs between the graphs, and there is no artifact"]
    if release := hand_over and can_release():
        notes.append("originals are released when a graph has packed them")
    elif hand_over:
        notes.append("originals are kept: this build of torch cannot guard freed memory")
    report.notes = notes
    warnings.warn(f"{type(model).__name__} runs {'; '.join(notes)}", stacklevel=4)
    given = dict(compile_options or {})
    run = torch.compile(
        model, backend="aograph", dynamic=given.get("dynamic"), options={
            **(given.get("options") or {}), "mode": given.get("mode"), "recipe": recipe.lenient(), "model": model,
            "report": collect, "release": release, "compile": compile_options is not None, **options,
        },
    )  # fmt: skip

    @torch.no_grad()
    def call(*args: Any, **kwargs: Any) -> Any:
        with eval_mode(model), no_fast_paths():
            return run(*args, **kwargs)

    return call
