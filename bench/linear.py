"""Times linear layers under each scheme on a GPU against cuBLAS in bf16 and the kernels that people use.

    python -m bench.linear [--shapes 6144x4096 …] [--ops int4 int8dq …] [--m 1 2 …] [--json OUT] [--plot OUT.png]

Every contender of a shape and M is one CUDA graph. Its calls go round copies of the weight that together are at least
three times the L2, two at least, and there are as many calls as take half a millisecond at the ceilings of the device,
which are measured in the same run. The graphs are replayed in turns; a figure is the median over the replays, divided
by the calls. Each contender's result is first compared with a product in fp32 by the dequantized weight, and x as the
scheme rounds it; an error of ours over 1e-2 makes the exit status 1.

Of the weight-only schemes ours is the op. The peers, all but GemLite's zero points (rounded to bf16 anew) on the very
weights that ours reads:
    tinygemm          aten._weight_int4pack_mm; torchao's int4 on CUDA, without further packages, is this kernel too
    torchao           its int8 weight-only tensor, run eagerly: the weight is cast at each call, then cuBLAS
    torchao compiled  the same behind torch.compile under the settings that torchao sets, at M = 1 and 16, as each M is
                      compiled anew
    gemlite           its A16W4 and A16W8 layers, with the tables that it ships for the H100
Of the others ours is the graph of one linear as the recipe leaves it, compiled anew for each M, as are the peers; a
weight that is to be sparse is 2:4 already. Quantizing x is in the time.
    _int_mm, _scaled_mm       of torch, with quantizing and scaling compiled around it; float8 with fast accumulation
    torchao int8dq, float8dq  its dynamic configurations, float8 with a scale for each row, compiled as above
    cuSPARSELt …              after its search for an algorithm, in the faster layout of y; x padded to 16 tokens;
                              quantizing and scaling compiled around it
    … product                 its product alone, of an x that is quantized already: never the best peer
What is no figure says why: "not installed"; "skipped", where the peer took over 40 times as long as bf16 at a smaller
M; "no time", once a peer's first calls, where it compiles and tunes itself, have taken --patience seconds in all;
"error", with the message once on stderr. --without leaves peers out. `roofline` is the share of the larger of two
times: the bytes of packed weight, x and y at the read bandwidth, and the operations at the bf16 rate, twice that where
codes are of 8 bits on both sides or the weight is sparse, four times where both.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from .contenders import WEIGHT_ONLY, Contender
from .device import Ceilings, cache_bytes, ceilings, machine, medians, record, write
from .dynamic_contenders import DYNAMIC
from .schemes import KINDS, Weights
from .worker import distance

ENTRIES = WEIGHT_ONLY | DYNAMIC

SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (8192, 8192), (57344, 8192))  # N, K
BUSY = 5e-4  # seconds that a graph takes at the ceilings, so that its launch does not count
HOPELESS = 40  # times bf16
TOLERANCE = 1e-2


@dataclass
class Run:
    """What holds for all shapes: the device and its ceilings, and what became of each peer."""

    device: torch.device
    limits: Ceilings
    patience: float
    without: Collection[str] = ()  # peers that are left out
    waited: dict[str, float] = field(default_factory=dict)  # seconds of first calls, by contender
    told: set[str] = field(default_factory=set)
    errors: dict[str, float] = field(default_factory=dict)  # the largest of each contender

    def contender(self, name: str, *given: Any) -> Contender | str:
        try:
            return ENTRIES[name].build(*given).copied(3 * cache_bytes(self.device))
        except ModuleNotFoundError as missing:
            return self.tell(name, "not installed", missing)
        except Exception as error:
            return self.tell(name, "error", error)

    def tired(self, name: str) -> bool:
        """Whether a peer's first calls have taken too long."""
        return not ENTRIES[name].ours and self.waited.get(name, 0) > self.patience

    def tell(self, name: str, word: str, error: Exception) -> str:
        """The word for the table; what it stands for goes to stderr, once for a contender."""
        if name not in self.told:
            text = str(error).strip()
            print(f"{name}: {word}: {type(error).__name__}: {text[:600]}", file=sys.stderr, flush=True)
        self.told.add(name)
        return word

    def measure(
        self, found: dict[str, Contender], x: Tensor, references: dict[str, Tensor]
    ) -> tuple[dict[str, float | str], dict[str, float]]:
        """Seconds of a call of each contender on x [M, K], or why there are none; the errors against the references."""
        cells: dict[str, float | str] = {}
        errors, runs, counts = {}, {}, {}
        for name, each in found.items():
            try:
                start = time.perf_counter()
                for one in each.copies:  # a kernel may keep something of each
                    y = each.call(x, *one)
                errors[name] = distance(each.scaled(y), references[ENTRIES[name].kind])  # waits for the calls
                self.waited[name] = self.waited.get(name, 0) + time.perf_counter() - start
                calls = self.calls(each, x, y)
                runs[name], counts[name] = record(calls, self.device), len(calls)
            except Exception as error:
                cells[name] = self.tell(name, "error", error)
        for name, error in errors.items():
            self.errors[name] = max(self.errors.get(name, 0), error if error == error else float("inf"))
        found_seconds = medians(runs, self.device)
        return cells | {name: seconds / counts[name] for name, seconds in found_seconds.items()}, errors

    def calls(self, each: Contender, x: Tensor, y: Tensor) -> list[Callable[[], Tensor]]:
        """One call on each of the copies of the weight, over again until the device is busy for long enough."""
        least = self.limits.seconds(each.bytes + x.nbytes + y.nbytes, 2 * x.numel() * y.shape[-1])
        rounds = max(1, round(BUSY / (least * len(each.copies))))
        return [lambda one=one: each.call(x, *one) for one in each.copies * rounds]


def sweep(run: Run, N: int, K: int, tokens: Mapping[str, Collection[int]], group_size: int) -> Iterator[dict[str, Any]]:
    """The rows of one shape, for each M one of each kind that is measured there; tokens: the M of each kind."""
    weights = Weights(N, K, group_size, run.device)
    exact = {kind: KINDS[kind].weight(weights) for kind in ("bf16", *tokens)}
    entries = {name: each for name, each in ENTRIES.items() if each.kind in exact and name not in run.without}
    built = {name: run.contender(name, weights) for name, entry in entries.items() if not entry.anew}
    hopeless: set[str] = set()
    for M in sorted(set().union(*tokens.values())):
        torch.compiler.reset()  # the code of the last M
        x = torch.randn(M, K, dtype=torch.bfloat16, device=run.device)
        kinds = [kind for kind in tokens if M in tokens[kind]]
        references = {kind: KINDS[kind].x(x) @ exact[kind].T for kind in ("bf16", *kinds)}
        here: dict[str, Contender | str] = {}
        for name, entry in entries.items():
            if entry.kind in references and (entry.at is None or M in entry.at):
                out = "skipped" if name in hopeless else "no time" if run.tired(name) else None
                here[name] = out or (run.contender(name, weights, x) if entry.anew else built[name])
        cells: dict[str, float | str] = {name: each for name, each in here.items() if isinstance(each, str)}
        timed, errors = run.measure({n: each for n, each in here.items() if not isinstance(each, str)}, x, references)
        cells |= timed
        base = cells["bf16"]
        hopeless |= {n for n, t in timed.items() if not isinstance(t, str | None) and t > HOPELESS * seconds(base)}
        for kind in kinds:
            yield row_of(run, kind, weights, M, here[kind], cells, errors, x)


def seconds(cell: float | str) -> float:
    """A time as it is; what is none, as one that nothing beats and that beats nothing."""
    return float("inf") if isinstance(cell, str) else cell


def row_of(
    run: Run, kind: str, weights: Weights, M: int, ours: Contender | str,
    cells: dict[str, float | str], errors: dict[str, float], x: Tensor,
) -> dict[str, Any]:  # fmt: skip
    """One line of the figures: ours of this kind at one shape and M, and all that it is measured against."""
    mine = cells[kind]
    peers = {n: cells[n] for n, e in ENTRIES.items() if e.kind == kind and not e.ours and n in cells}
    whole = [name for name in peers if not ENTRIES[name].part]
    best = min(whole, key=lambda name: seconds(peers[name]), default=None)
    row: dict[str, Any] = {"N": weights.N, "K": weights.K, "M": M, "op": kind,
                           "us": {n: microseconds(cells[n]) for n in ("bf16", kind, *peers)},
                           "errors": {n: errors[n] for n in ("bf16", kind, *peers) if n in errors}}  # fmt: skip
    if isinstance(mine, str) or isinstance(ours, str):
        return row
    size = ours.bytes + 2 * M * (weights.K + weights.N)
    least = run.limits.seconds(size, 2 * M * weights.N * weights.K / KINDS[kind].rate)
    row |= {"kernel": ours.kernel(x), "roofline us": microseconds(least), "share": round(least / mine, 4)}
    if not isinstance(cells["bf16"], str):
        row["x bf16"] = round(cells["bf16"] / mine, 3)
    if best is not None and not isinstance(peers[best], str):
        row |= {"best peer": best, "x best peer": round(seconds(peers[best]) / mine, 3)}
    return row


def microseconds(cell: float | str) -> float | str:
    return cell if isinstance(cell, str) else round(cell * 1e6, 3)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of one shape and op for people; µs."""
    names = list(dict.fromkeys(name for row in rows for name in row["us"]))
    lines = []
    for row in rows:
        share = f"{row['share']:.0%}" if "share" in row else ""
        lines.append(
            [row["M"], *(shown(row["us"].get(name, "")) for name in names), row.get("x bf16", ""),
             row.get("x best peer", ""), share, row.get("kernel", "")]
        )  # fmt: skip
    headers = ["M", *names, "× bf16", "× best peer", "roofline", "kernel"]
    about = rows[0]
    return f"\n{about['op']}, {about['N']} × {about['K']}, µs\n" + tabulate(lines, headers, disable_numparse=True)


def shown(cell: float | str) -> str:
    return cell if isinstance(cell, str) else f"{cell:.1f}" if cell < 1000 else f"{cell:.0f}"


def plot(rows: Sequence[dict[str, Any]], limits: Ceilings, about: dict[str, Any], path: Path) -> None:
    """Time against M, one panel for each shape, a line for each contender, the roofline of each op dashed."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys((row["N"], row["K"]) for row in rows))
    columns = min(3, len(shapes))
    lines = -(-len(shapes) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(5.5 * columns, 4.5 * lines), squeeze=False)
    colors = {name: f"C{i}" for i, name in enumerate(ENTRIES)}
    for axis in axes.flat[len(shapes) :]:
        axis.remove()
    for (N, K), axis in zip(shapes, axes.flat, strict=False):
        here = [row for row in rows if (row["N"], row["K"]) == (N, K)]
        for name, color in colors.items():
            points = dict.fromkeys((row["M"], row["us"][name]) for row in here if name in row["us"])
            drawn = [(M, us) for M, us in points if not isinstance(us, str)]
            if drawn:
                width = 2.4 if ENTRIES[name].ours else 1.2
                axis.plot(*zip(*drawn, strict=True), "o-", ms=3, lw=width, color=color, label=name)
        for kind in dict.fromkeys(row["op"] for row in here):
            least = [(row["M"], row["roofline us"]) for row in here if row["op"] == kind and "roofline us" in row]
            if least:
                axis.plot(*zip(*least, strict=True), "--", lw=1, color=colors[kind], label=f"roofline, {kind}")
        axis.set(title=f"N = {N}, K = {K}", xlabel="M", ylabel="µs", xscale="log", yscale="log")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=7)
    figure.suptitle(f"{about['device']}, torch {about['torch']}, {about['date']}; {limits}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def shape(text: str) -> tuple[int, int]:
    N, K = text.lower().split("x")
    return int(N), int(K)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.linear", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=shape, nargs="+", default=SHAPES, metavar="NxK")
    parser.add_argument("--m", type=int, nargs="+", help="rows of x; else those that a scheme is for")
    parser.add_argument("--ops", nargs="+", choices=[*KINDS][1:], default=["int4", "int8"], help="schemes")
    parser.add_argument("--group-size", type=int, default=64, help="weights that share a scale, int4")
    parser.add_argument("--patience", type=float, default=60, help="seconds for the first calls of each peer, in all")
    peers = [name for name, entry in ENTRIES.items() if not entry.ours and name != "bf16"]
    parser.add_argument("--without", nargs="+", choices=peers, default=[], metavar="PEER", help=", ".join(peers))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the figures there")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="also draw them, with matplotlib")
    options = parser.parse_args(arguments)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what there is by then is still drawn
    torch.manual_seed(0)
    device = torch.device(options.device)
    about, limits = machine(device), ceilings(device)
    about["group size"] = options.group_size
    print(json.dumps(about))
    print(f"ceilings: {limits}", flush=True)
    run, rows = Run(device, limits, options.patience, options.without), []
    tokens = {kind: options.m or KINDS[kind].tokens for kind in options.ops}
    try:
        for N, K in options.shapes:
            first = len(rows)
            for row in sweep(run, N, K, tokens, options.group_size):
                rows.append(row)
                write(options.json, about, limits, rows)
            for kind in options.ops:
                print(table([row for row in rows[first:] if row["op"] == kind]), flush=True)
    finally:
        if options.plot and rows:
            plot(rows, limits, about, options.plot)
    print("\nlargest error against fp32: " + ", ".join(f"{name} {error:.2e}" for name, error in run.errors.items()))
    print(
        "seconds of making and first calls: " + ", ".join(f"{name} {waited:.1f}" for name, waited in run.waited.items())
    )
    wrong = [kind for kind in options.ops if not run.errors.get(kind, float("inf")) <= TOLERANCE]
    if wrong:
        raise SystemExit(f"{', '.join(wrong)}: the error is over {TOLERANCE}, or nothing ran")


if __name__ == "__main__":
    main()
