"""Seconds until the first output: torch.compile with Inductor against backend="aograph", caches off.

Each contender compiles in a process of its own, which first compiles something else, so that what torch imports and
builds once for all is not counted. Packing is counted, and given apart.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from tabulate import tabulate

MINI = Path(__file__).parents[1] / "models" / "mini"


def model_of(name: str, layers: int, device: str) -> torch.nn.Module:
    """`mini`, or a Llama with the shapes of an 8B model and random weights, in bf16."""
    import transformers

    if name == "mini":
        return transformers.AutoModelForCausalLM.from_pretrained(MINI, dtype=torch.bfloat16).eval().to(device)
    from .llama import llama_8b

    return llama_8b(device, layers)


@torch.no_grad()
def measure(options: argparse.Namespace) -> dict[str, float]:
    from aograph.weights import Pack

    seconds = {"packing": 0.0}
    run = Pack.run

    def timed(pack, weight):
        torch.cuda.synchronize() if weight.is_cuda else None
        start = time.perf_counter()
        result = run(pack, weight)
        torch.cuda.synchronize() if weight.is_cuda else None
        seconds["packing"] += time.perf_counter() - start
        return result

    Pack.run = timed
    arguments = {"backend": "inductor"} if options.contender == "inductor" else {
        "backend": "aograph", "options": {"recipe": options.contender}
    }  # fmt: skip
    warm = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU()).to(options.device, torch.bfloat16)
    torch.compile(warm, **arguments)(torch.zeros(4, 64, device=options.device, dtype=torch.bfloat16))
    seconds["packing"] = 0.0
    model = model_of(options.model, options.layers, options.device)
    ids = torch.arange(64, device=options.device)[None] % 1000
    compiled = torch.compile(model, dynamic=False, **arguments)
    start = time.perf_counter()
    compiled(input_ids=ids, use_cache=False)
    if options.device == "cuda":
        torch.cuda.synchronize()
    seconds["all"] = time.perf_counter() - start
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["mini", "8b"], default="mini")
    parser.add_argument("--layers", type=int, default=32, help="of the 8B shape")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--contenders", nargs="+", default=["inductor", "int8wo", "int4wo", "int4wo(algorithm=minmax)"])
    parser.add_argument("--repeats", type=int, default=3, help="processes for each contender, in turn; medians")
    parser.add_argument("--contender", help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(measure(options)))
        return
    environment = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in options.contenders}
    for _ in range(options.repeats):
        for name, results in found.items():
            command = [sys.executable, "-m", "bench.compile_time", *sys.argv[1:], "--contender", name]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise SystemExit(done.stderr)
            results.append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for name, results in found.items():
        whole, packing = (median(r[key] for r in results) for key in ("all", "packing"))
        rows.append([name, f"{whole:.1f}", f"{packing:.1f}", f"{(whole - packing):.1f}"])
    base = float(rows[0][-1])
    for row in rows:
        row.append(f"{float(row[-1]) / base:.2f}")
    print(tabulate(rows, ["contender", "first call, s", "of it packing, s", "compilation, s", "× first"], "github"))


if __name__ == "__main__":
    main()
