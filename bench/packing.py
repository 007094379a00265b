"""How long packing a model of the size of Llama-3-8B takes on a GPU, and how much memory it needs at the peak.

    python -m bench.packing [--recipe int4wo int8wo] [--layers 32]

Three ways: the caller keeps the model; hands it over on the GPU; hands it over on the CPU (all for the first recipe,
the second for the others). Sizes are of the GPU, in
units of 10^9 bytes; peaks are those of torch's allocator while packing.
"""

from __future__ import annotations

import argparse
import gc
import time

import torch
from tabulate import tabulate

from aograph import Recipe
from aograph.optimize import rewrite
from aograph.weights import WeightStore

from .llama import llama_8b


def measure(recipe: str, source: str, hand_over: bool, layers: int) -> list:
    model = llama_8b("cuda", layers).to(source)
    gc.collect()
    torch.cuda.empty_cache()
    device = torch.device("cuda", 0)
    original = sum(p.nbytes for p in model.parameters())
    ids = torch.zeros(1, 16, dtype=torch.int64, device=source)
    captured, _ = rewrite(model, Recipe.of(recipe), (ids,), {"use_cache": False}, None, device)
    store = WeightStore(model, device, hand_over)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    store.materialize(captured.program)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    packed = sum(t.nbytes for t in store.names.values())
    sizes = [original, packed, torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()]
    way = f"{'handed over' if hand_over else 'kept'}, on {source}"
    return [recipe, way, f"{seconds:.1f}", *(f"{s / 1e9:.2f}" for s in sizes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="+", default=["int4wo", "int8wo", "int4wo(algorithm=minmax)"])
    parser.add_argument("--layers", type=int, default=32)
    options = parser.parse_args()
    rows = []
    for recipe in options.recipe:
        for source, hand_over in (("cuda", False), ("cuda", True), ("cpu", True)):
            if recipe == options.recipe[0] or (source == "cuda" and hand_over):
                rows.append(measure(recipe, source, hand_over, options.layers))
                print(*rows[-1], flush=True)
                gc.collect()
                torch.cuda.empty_cache()
    headers = ["recipe", "model", "seconds", "original GB", "packed GB", "peak GB", "after GB"]
    print(tabulate(rows, headers, disable_numparse=True))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
