"""The pipeline: passes in order of their stages, each timed, verified and recorded."""

from __future__ import annotations

import difflib
import logging
import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch.fx import Node

from . import reproducer
from .errors import AographError, PassError
from .kernels import cuda
from .kernels.fused_linear import FusedLinearOp
from .kernels.op import OPS, Case, Op
from .passes import PASSES, Pass
from .program import Program, nbytes
from .recipe import Recipe
from .report import REWRITTEN, SKIPPED, PassRecord, Report
from .schemes import nearest
from .statistics import LinearStatistics
from .verify import verify

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Context:
    """What passes may ask about besides the program.

    statistics: of the linears that the recipe was calibrated on, by the qualified names of their weights.
    """

    recipe: Recipe
    statistics: Mapping[str, LinearStatistics] = field(default_factory=dict)


def order(passes: Sequence[Pass]) -> list[Pass]:
    """By stage; within a stage after the passes that `after` names, then by name."""
    ordered: list[Pass] = []
    waiting = sorted(passes, key=lambda p: (p.stage, p.name))
    while waiting:
        names = {p.name for p in waiting}
        ready = next((p for p in waiting if names.isdisjoint(p.after)), None)
        if ready is None:
            raise PassError(f"passes wait for each other: {sorted(names)}")
        ordered.append(ready)
        waiting.remove(ready)
    return ordered


def run(
    program: Program,
    recipe: Recipe,
    *,
    disable: Collection[str] = (),
    dump: str | os.PathLike | None = None,
    passes: Sequence[Pass] = PASSES,
) -> Report:
    """Rewrites `program` by `recipe` and reports; weights are only touched by `WeightStore.materialize`.

    disable: names of passes to leave out. dump: a folder for a readable diff after each pass that changes the graph
    (default: the environment variable AOGRAPH_DUMP).

    Raises `PassError` where a pass fails or leaves a graph that the verifier refuses, with a reproducer folder.
    """
    known = [p.name for p in passes]
    for name in disable:
        if name not in known:
            raise PassError(f"there is no pass {name!r} to disable; {nearest(name, known)}")
    dump = dump or os.environ.get("AOGRAPH_DUMP")
    report = Report(bytes_before=sum(nbytes(t) for t in program.constants.values()))
    before = program.text()
    original = reproducer.snapshot(program)
    context = Context(recipe, recipe.statistics)
    for step, each in enumerate(order([p for p in passes if p.name not in disable])):
        start = time.perf_counter()
        try:
            matches = each.run(program, context)
            ran = time.perf_counter()
            verify(program)
        except AographError as error:
            if not isinstance(error, PassError):
                raise
            raise failed(each, error, original, recipe, disable) from error
        except Exception as error:
            raise failed(each, error, original, recipe, disable) from error
        done = time.perf_counter()
        after = program.text() if log.isEnabledFor(logging.DEBUG) or dump or matches else before
        report.history.append(
            PassRecord(each.name, each.stage.name.lower(), matches, before != after, ran - start, done - ran)
        )
        log.info("%s: %d matches in %.1f ms", each.name, matches, (ran - start) * 1e3)
        if before != after:
            lines = difflib.unified_diff(before.split("\n"), after.split("\n"), "before", "after", lineterm="")
            diff = "\n".join(lines)
            log.debug("after %s:\n%s", each.name, diff)
            if dump:
                Path(dump).mkdir(parents=True, exist_ok=True)
                Path(dump, f"{step:02d}_{each.name}.diff").write_text(diff + "\n")
        before = after
    decided = [(site.scheme, row) for site in program.sites for row in site.rows]
    for scheme, row in decided + [(cache.scheme, cache.row) for cache in program.caches]:
        if scheme is not None and row.outcome != REWRITTEN:
            row.close(SKIPPED, f"no pass carried out {scheme}: the one for it is disabled")
    report.rows = program.rows
    report.bytes_after = sum(nbytes(node.meta["val"]) for node in program.weights.values())
    given = [cache.row for cache in program.caches if cache.node.op == "placeholder"]
    report.bytes_before += sum(row.bytes_before for row in given)
    report.bytes_after += sum(row.bytes_after for row in given)
    report.notes += missing_kernels(program)
    return report


def packed_linears(program: Program) -> list[tuple[Op, Case]]:
    """The linears that run on packed weights: the op of each, and the case that it is for one token.

    A fused one counts as the linear that it is of.
    """
    ops = {op.overload: op for op in OPS.values()}
    found = []
    for node in program.graph.nodes:
        if op := ops.get(node.target):
            values = (each.meta["val"] if isinstance(each, Node) else each for each in node.args)
            case = replace(op.case_of(*values), M=1, gated=False, normed=False)
            found.append((op.base if isinstance(op, FusedLinearOp) else op, case))
    return found


def missing_kernels(program: Program) -> list[str]:
    """Notes for the report where nothing but this machine keeps linears from the CUDA C++ kernels."""
    reasons = []
    for op, case in packed_linears(program):
        missing = cuda.available(case.capability) if case.device == "cuda" else True
        if missing is not True and any(each.name == "cuda" and each.supports(case) == missing for each in op):
            reasons.append(missing)
    return [
        f"the CUDA C++ kernels cannot run here, others take their place: {reason}; what they need comes with "
        "torch's CUDA builds, and `aograph env` says what is found"
        for reason in dict.fromkeys(reasons)
    ]


def failed(each: Pass, error: Exception, original: str, recipe: Recipe, disable: Collection[str]) -> PassError:
    folder = reproducer.write(original, recipe, disable)
    return PassError(
        f"pass {each.name} failed: {type(error).__name__}: {error}\n"
        f"The model is untouched. Leave the pass out with disable=[{each.name!r}], or run it again with: "
        f"aograph reproduce {folder}"
    )
