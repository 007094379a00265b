"""What a quantized KV cache costs in accuracy: language models of transformers, token by token or in chunks.

    python -m bench.cache_quality models/mini [FOLDER …] [--text FILE] [--windows 64] [--recipes kv8 kvfp8 kv4 …]
                                  [--chunk 256] [--device cuda] [--plot OUT.png]

Each window of 1,024 tokens is a row of a static cache, and each of its tokens but the first is predicted from the
cache, which holds the keys and values of those before it, rounded under a recipe. With --chunk tokens go through the
model in chunks, as those of a prompt, which see the others of their chunk as they are if they are more than a few.
`perplexity` is of all of them, with the change against bf16. `recall`: a passage of 64 tokens, others, and the passage
again, which a model predicts better when it finds it in the cache; the mean loss of its last 48 tokens by how many are
between, and the change. Without --text, the help texts of this Python.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import aograph
from aograph import huggingface
from aograph.decoding import StaticRows, cache_shapes, parts
from aograph.program import nbytes

from .perplexity import python_topics, tokens_of

WINDOW = 1024
DISTANCES = (0, 16, 64, 256, 512, 896)  # tokens between a passage and its second occurrence
PASSAGE = 64  # tokens

Step = Callable[[Tensor, Tensor], Tensor]


class CachedModel(nn.Module):
    """A language model of transformers with static caches of its own: a step takes T tokens of each row.

    forward(input_ids, positions), both [rows, T] int64 -> logits [rows, T, V].
    """

    def __init__(self, model: nn.Module, rows: int, length: int):
        super().__init__()
        self.model, self.length = model, length
        weight = next(model.parameters())
        self.shapes = cache_shapes(model, length)
        for layer, shape in enumerate(self.shapes):
            for name, tensor in zip(("key", "value"), shape.empty(rows, length, weight.device), strict=True):
                self.register_buffer(f"{name}_{layer}", tensor)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        layers = [(getattr(self, f"key_{i}"), getattr(self, f"value_{i}")) for i in range(len(self.shapes))]
        mask = (torch.arange(self.length, device=positions.device) <= positions[:, :, None])[:, None]
        cache = StaticRows(layers, positions)
        given = {"input_ids": input_ids, "position_ids": positions, "attention_mask": mask}
        given[huggingface.cache_argument(self.model.forward)] = cache
        return self.model(**given, use_cache=True).logits


@torch.no_grad()
def losses(step: Step, ids: Tensor, chunk: int = 1) -> Tensor:
    """The loss [rows, T - 1] of each token of ids [rows, T] but the first, as many tokens at a time as `chunk` says."""
    found, first = [], 0
    for count in parts(ids.shape[1] - 1, chunk):
        positions = torch.arange(first, first + count, device=ids.device).repeat(len(ids), 1)
        logits = step(ids[:, first : first + count], positions).float()
        first += count
        found.append(F.cross_entropy(logits.mT, ids[:, first - count + 1 : first + 1], reduction="none"))
    return torch.cat(found, 1)


def recall_texts(ids: Tensor, distance: int) -> Tensor:
    """[rows, 2 · PASSAGE + distance]: a passage of the next row, some tokens of the row's own, the passage again."""
    passage = ids.roll(1, 0)[:, -PASSAGE:]
    return torch.cat([passage, ids[:, :distance], passage], 1)


def recall(step: Step, ids: Tensor, distances: Sequence[int] = DISTANCES, chunk: int = 1) -> list[float]:
    """The mean loss of a passage the second time, but for its first quarter, at each distance."""
    texts = (recall_texts(ids, each) for each in distances)
    return [losses(step, text, chunk)[:, -PASSAGE * 3 // 4 :].mean().item() for text in texts]


def contender(model: nn.Module, recipe: str, rows: int, length: int, device: str, chunk: int = 1) -> tuple[Step, int]:
    """A step under a recipe, and the bytes of its cache for a token of a row."""
    step = CachedModel(model, rows, length)
    caches = [cache for shape in step.shapes for cache in shape.empty(1, 1, torch.device("meta"))]
    if recipe == "bf16":
        return step, sum(map(nbytes, caches))
    ids = torch.arange(chunk, device=device).repeat(rows, 1)
    shapes = ({}, {}) if chunk == 1 else None
    fast = aograph.optimize(step, recipe, (ids, ids), dynamic_shapes=shapes, compile=False, progress=False)
    found = [row for row in fast.report.caches if row.outcome == "rewritten"]
    if len(found) != len(caches):
        raise SystemExit(f"{recipe} rewrites {len(found)} of {len(caches)} caches:\n{fast.report}")
    return fast, sum(row.bytes_after for row in found) // (rows * length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--recipes", nargs="+", default=["kv8", "kvfp8", "kv4"])
    parser.add_argument("--chunk", type=int, default=1, help="tokens of a row at a time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="of the change of recall, with matplotlib")
    options = parser.parse_args()
    import transformers

    text = options.text.read_text() if options.text else python_topics()
    rows, curves = [], {}
    for folder in options.models:
        ids = tokens_of(folder, text, options.windows * WINDOW)
        ids = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW).to(options.device)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        model.to(options.device)
        base: list[float] = []
        for recipe in ("bf16", *options.recipes):
            step, size = contender(model, recipe, len(ids), WINDOW, options.device, options.chunk)
            chunk = options.chunk
            found = [math.exp(losses(step, ids, chunk).mean().item()), *recall(step, ids, chunk=chunk)]
            base = base or found
            changes = [found[0] / base[0] - 1, *(a - b for a, b in zip(found[1:], base[1:], strict=True))]
            shown = [f"{each:.3f} {change:+.4f}" for each, change in zip(found[1:], changes[1:], strict=True)]
            rows.append([folder.name, recipe, size, f"{found[0]:.4f} {changes[0]:+.2%}", *shown])
            curves[folder.name, recipe] = changes[1:]
            print(*rows[-1], flush=True)
    between = [f"recall, {each} between" for each in DISTANCES]
    print(tabulate(rows, ["model", "cache", "bytes/token", "perplexity", *between], disable_numparse=True))
    print(f"{options.windows} windows of {WINDOW} tokens, {options.chunk} at a time")
    print(f"torch {torch.__version__}, {options.device}")
    if options.plot:
        plot(curves, options.plot)


def plot(curves: dict[tuple[str, str], list[float]], path: Path) -> None:
    """The change of recall against the distance, a line for each model and recipe."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4))
    for (model, recipe), changes in curves.items():
        if recipe != "bf16":
            axis.plot(DISTANCES, changes, "o-", label=f"{model}, {recipe}")
    axis.set(xlabel="tokens between the passage and its second occurrence", ylabel="loss, change against bf16")
    axis.axhline(0, color="grey", lw=0.5)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
