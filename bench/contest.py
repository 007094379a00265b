"""Models against each other, each contender in a process of its own, as are its memory, its settings and its caches.

A bench gives a `Worker` (bench/worker.py), the cases that it is run on, and the columns of its table. For each case
all contenders compile at the same time, or some of them alone, one after another; then each measures while the others
wait. A contender that fails is a row that says why, and stays failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from .device import Ceilings, ceilings, machine, write

HOPELESS = 12  # times bf16


def serve(
    make: Callable[[str, argparse.Namespace], Any],
    name: str,
    options: argparse.Namespace,
    caches: str,
    threads: int,
    pipe: Connection,
) -> None:
    """The process of a contender: answers each order (method, arguments) with a dict, or with the text of an error.

    caches: a folder of its own for what Inductor and Triton compile, empty at first. threads: of Inductor's compilers.
    """
    for variable, kind in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        os.environ[variable] = str(Path(caches, kind))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))
    worker = None
    with torch.no_grad():
        while True:
            method, *rest = pipe.recv()
            try:
                worker = worker or make(name, options)
                pipe.send(getattr(worker, method)(*rest))
            except Exception as error:
                traceback.print_exc()
                about = str(error).strip().partition("\n\n")[0]  # Dynamo adds advice
                pipe.send(f"{type(error).__name__}: {about[:300]}")


class Contender:
    """The parent's end of a contender's process. One that has failed stays failed."""

    def __init__(self, name: str, process: Any, pipe: Connection):
        self.name, self.process, self.pipe, self.failure = name, process, pipe, ""

    @classmethod
    def start(cls, make: Callable[..., Any], name: str, options: argparse.Namespace, caches: str, threads: int):
        processes = multiprocessing.get_context("spawn")
        pipe, other = processes.Pipe()
        process = processes.Process(target=serve, args=(make, name, options, caches, threads, other), daemon=True)
        process.start()
        other.close()  # so that the end of the process is the end of the pipe
        return cls(name, process, pipe)

    def order(self, *order: Any) -> None:
        if not self.failure:
            with contextlib.suppress(BrokenPipeError):  # the answer will say so
                self.pipe.send(order)

    def answer(self, until: float = float("inf")) -> dict[str, Any]:
        """What the last order gave; nothing after a failure, which it is not to answer until that time."""
        if self.failure:
            return {}
        found: Any = "no answer in time"
        try:
            if self.pipe.poll(max(until - time.monotonic(), 0) if until < float("inf") else None):
                found = self.pipe.recv()
        except EOFError:
            self.process.join()
            found = f"the process ended with {self.process.exitcode}"
        if isinstance(found, dict):
            return found
        self.failure = found
        print(f"{self.name}: error: {found}", file=sys.stderr, flush=True)
        self.end()  # and what it holds
        return {}

    def end(self) -> None:
        if self.process.is_alive():
            self.process.terminate()


@dataclass
class Contest:
    """Contenders, bf16 first, on one case after another.

    key: what a case is called in a row. alone: the names of those that compile one after another, before all others.
    patience: seconds that a contender has to compile for a case. base: the ms of bf16, by case.
    """

    contenders: Sequence[Contender]
    key: str
    limits: Ceilings
    alone: Collection[str] = ()
    patience: float = float("inf")
    base: dict[Any, float] = field(default_factory=dict)

    def compiled(self, case: Any) -> dict[str, dict[str, Any]]:
        """What each contender says of its compilation for a case, by name."""
        together = [each for each in self.contenders if each.name not in self.alone]
        rounds = [*([each] for each in self.contenders if each.name in self.alone), together]
        found = {}
        for contenders in rounds:
            for each in contenders:
                each.order("compile", case)
            until = time.monotonic() + self.patience
            found |= {each.name: each.answer(until) for each in contenders}
        return found

    def rows(self, case: Any) -> Iterator[dict[str, Any]]:
        """A row of each contender: all compile, then each measures."""
        first = self.compiled(case)
        for each in self.contenders:
            each.order("measure", self.limits)
            row = {self.key: case, "what": each.name, **first[each.name], **each.answer()}
            if each.failure:
                yield row | {"failure": each.failure}
                continue
            if each.name == "bf16":
                self.base[case] = row["ms"]
            if case in self.base:
                row["x bf16"] = round(self.base[case] / row["ms"], 3)
                if row["ms"] > HOPELESS * self.base[case]:
                    each.failure = f"skipped: over {HOPELESS} times bf16 at {self.key} {case}"
            yield row


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    lines = []
    for row in rows:
        share = {"bandwidth": f"{row['bandwidth']:.0%}"} if "bandwidth" in row else {}
        ran = ", ".join(f"{kernel} × {count}" for kernel, count in row.get("kernels", {}).items())
        lines.append([*((row | share).get(column, "") for column in columns), row.get("failure", ran)])
    return tabulate(lines, [*columns, "kernels"], disable_numparse=True, maxcolwidths=[*[None] * len(columns), 60])


def parser(prog: str, about: str | None, names: Sequence[str], autotune: Sequence[str] = ()) -> argparse.ArgumentParser:
    """With the options of all contests. names: of the contenders; autotune: of those that are tuned by default."""
    found = argparse.ArgumentParser(prog=prog, description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--contenders", nargs="+", default=names, metavar="NAME", help="of those above, or any recipe")
    found.add_argument("--autotune", nargs="*", default=autotune, metavar="NAME",
                       help='contenders under the settings of mode="max-autotune"; they compile alone')  # fmt: skip
    found.add_argument("--in-turn", action="store_true", help="compile all contenders one after another")
    found.add_argument("--patience", type=float, default=600, help="seconds for a contender to compile for a case")
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--json", type=Path, metavar="OUT", help="also write the figures there")
    return found


def run(
    make: Callable[[str, argparse.Namespace], Any],
    options: argparse.Namespace,
    key: str,
    cases: Sequence[Any],
    columns: Sequence[str],
    about: Mapping[str, Any],
) -> None:
    """The whole of a bench: rows are printed and written as they come, the table at the end, or when interrupted.

    make: the worker of a contender's name and the options, in its process. about: what the figures also hang on.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # contenders are ended, and the table is printed
    names = sorted(dict.fromkeys(options.contenders), key=lambda name: name != "bf16")
    alone = names if options.in_turn else [name for name in names if name in options.autotune]
    cores = os.cpu_count() or 1
    shared = max(1, cores // max(1, len(names) - len(alone)))  # each would start as many compilers as there are cores
    device = torch.device(options.device)
    about, limits = machine(device) | dict(about), ceilings(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    print(json.dumps(about))
    print(f"ceilings: {limits}", flush=True)
    caches = tempfile.mkdtemp(prefix="aograph-bench-")  # `compile s` is from nothing
    contenders: list[Contender] = []
    rows: list[dict[str, Any]] = []
    try:
        for i, name in enumerate(names):
            own, threads = str(Path(caches, str(i))), cores if name in alone else shared
            contenders.append(Contender.start(make, name, options, own, threads))
        contest = Contest(contenders, key, limits, alone, options.patience)
        for case in cases:
            for row in contest.rows(case):
                rows.append(row)
                print(json.dumps(row), flush=True)
                write(options.json, about, limits, rows)
    finally:
        for each in contenders:
            each.end()
        shutil.rmtree(caches, ignore_errors=True)
        print(table(rows, columns))
