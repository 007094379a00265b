"""How long the passes take on a graph of the size of Llama-3-8B, with the model on meta.

    python -m bench.pass_time [--recipe int4wo] [--layers 32]

Prints the time of capture and, for each pass, of the pass and of the verifier after it.
"""

from __future__ import annotations

import argparse
import time

import torch

from aograph import Recipe, pipeline
from aograph.capture import capture

from .llama import llama_8b


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="int4wo")
    parser.add_argument("--layers", type=int, default=32)
    options = parser.parse_args()
    model = llama_8b("meta", options.layers)
    ids = torch.zeros(2, 16, dtype=torch.int64, device="meta")
    start = time.perf_counter()
    program = capture(model, (ids,), {"use_cache": False}).program
    captured = time.perf_counter()
    nodes = len(program.graph.nodes)
    report = pipeline.run(program, Recipe.of(options.recipe))
    done = time.perf_counter()
    print(report.passes())
    print(f"{report.summary()}")
    print(f"{nodes} nodes; capture {captured - start:.1f} s; passes and verifier {done - captured:.1f} s")


if __name__ == "__main__":
    main()
