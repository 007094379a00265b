"""How much memory and time it takes to get from a checkpoint on disk to a packed model.

    python -m bench.loading [--recipe int4wo] [--layers 32] [--width 4096] [--shards 4] [--folder F] [--device cuda]

Writes a random checkpoint of the shape of Llama-3-8B in shards (with --width, all sizes shrink alike), then loads it in
new processes: by `load_pretrained`, by transformers and `optimize(hand_over=True)`, and from the folder that
`save_pretrained` wrote. Sizes are in units of 10^9 bytes. Host memory is what the process gains over what it has after
loading the model mini, sampled every 2 ms: "anonymous" is its own, "mapped" are pages of files, which the kernel can
drop at will. The peak of the device is that of torch's allocator. On the CPU the packed model is part of "anonymous".
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tabulate import tabulate

MINI = Path(__file__).parents[1] / "models" / "mini"
SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256}


def write_checkpoint(folder: Path, layers: int, width: int, shards: int) -> None:
    """bf16; linear weights are normal with deviation 0.02, norms are 1."""
    import transformers

    config = transformers.LlamaConfig(
        **{name: size * width // 4096 for name, size in SHAPE.items()}, num_hidden_layers=layers, head_dim=128,
        num_attention_heads=width // 128, num_key_value_heads=max(width // 512, 1), max_position_embeddings=8192,
        tie_word_embeddings=False, architectures=["LlamaForCausalLM"], dtype="bfloat16", bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in transformers.LlamaForCausalLM(config).named_parameters()}
    whole = sum(2 * shape.numel() for shape in shapes.values())
    weight_map: dict[str, str] = {}
    waiting, held = dict[str, torch.Tensor](), 0
    for name, shape in shapes.items():
        value = torch.empty(shape, dtype=torch.bfloat16, device="cuda" if torch.cuda.is_available() else "cpu")
        waiting[name] = (value.normal_(0, 0.02) if len(shape) > 1 else value.fill_(1)).cpu()
        held += value.nbytes
        if held >= whole / shards or len(weight_map) + len(waiting) == len(shapes):
            file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
            save_file(waiting, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(waiting, file)
            waiting, held = {}, 0
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def streamed(folder: Path, recipe: str, device: str) -> Any:
    import aograph

    return aograph.load_pretrained(folder, recipe, device=device, compile=False)


def whole(folder: Path, recipe: str, device: str) -> Any:
    import transformers

    import aograph

    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype="auto").eval()
    inputs = {"input_ids": torch.arange(32).view(2, 16), "use_cache": False}
    return aograph.optimize(model, recipe, inputs, device=device, hand_over=True, compile=False)


def packed(folder: Path, recipe: str, device: str) -> Any:
    import aograph

    return aograph.load_pretrained(folder / "packed", device=device, compile=False)


def resident() -> tuple[int, int]:
    """Bytes of this process in memory: anonymous, and mapped from files."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024, int(fields["RssFile"].split()[0]) * 1024


@contextlib.contextmanager
def watched() -> Iterator[list[int]]:
    """The most that `resident` grows by while the body runs."""
    before, peaks, done = resident(), [0, 0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peaks[:] = [max(p, now - b) for p, now, b in zip(peaks, resident(), before, strict=True)]

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()


def measure(load: Callable[..., Any], folder: Path, recipe: str, device: str, keep: bool) -> list[Any]:
    """One row of the table, in this process."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    cuda = device == "cuda"
    streamed(MINI, "int8wo", device)  # imports, CUDA, cuBLAS's workspace
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with watched() as peaks:
        start = time.perf_counter()
        optimized = load(folder, recipe, device)
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    size = sum(tensor.nbytes for tensor in optimized.state_dict().values())
    if keep:
        optimized.save_pretrained(folder / "packed")
    peak = f"{torch.cuda.max_memory_allocated() / 1e9:.3f}" if cuda else "-"
    return [load.__name__, f"{seconds:.1f}", f"{size / 1e9:.3f}", peak, *(f"{p / 1e9:.3f}" for p in peaks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="int4wo")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096, help="hidden size, a multiple of 512")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where there is room")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        write_checkpoint(folder, options.layers, options.width, options.shards)
        files = [path.stat().st_size for path in folder.glob("*.safetensors")]
        layer = 2 * 2 * options.width * (SHAPE["intermediate_size"] * options.width // 4096)  # gate and up, merged
        head = 2 * options.width * (SHAPE["vocab_size"] * options.width // 4096)
        print(
            f"checkpoint {sum(files) / 1e9:.3f} GB, largest shard {max(files) / 1e9:.3f}, head {head / 1e9:.3f}, "
            f"gate and up of a layer {layer / 1e9:.3f}; {options.recipe} on {options.device}, torch {torch.__version__}"
        )
        rows = []
        for load in (streamed, whole, packed):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                done = process.submit(measure, load, folder, options.recipe, options.device, load is streamed)
                rows.append(done.result())
        headers = ["way", "seconds", "packed GB", "peak device GB", "peak host anonymous GB", "peak host mapped GB"]
        print(tabulate(rows, headers, disable_numparse=True))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    main()
