"""Times the encoder of a ViT-H (1280 wide, 32 layers, 16 heads, MLP 5120) with random weights, on whole images.

    python -m bench.vit [--images 224x64 1024x8] [--contenders bf16 int8dq float8dq vit …] [--json OUT]

`--images` are the edge of an image and how many make a batch. At 224 patches of 14 and a class token make 257 tokens,
which all attend to each other. From 512 on it is the encoder of Segment Anything: patches of 16, 4,096 tokens at 1024,
attention in windows of 14 × 14, padded to whole ones, but for layers 8, 16, 24 and 32, which look at the whole image.
Its relative position bias and its neck are left out. Every contender is the same module, in CUDA graphs:

    bf16              torch.compile under the settings of mode="reduce-overhead", kernels but for products tuned
    int8dq, float8dq  the same with backend="aograph"
    vit               the same with the preset of three rules: attention int8dq, the first linear of the MLP
                      int8dq-sparse24, the second sparse24
    torchao-int8dq, torchao-float8dq
                      quantize_ with its dynamic configurations, float8 with a scale for each row, under the settings
                      that quantize_ sets

--autotune names contenders that are compiled under the settings of "max-autotune" instead, which tunes products, too:
of the four of bf16 on an H200, at 224 and 64 images, cuBLAS was the fastest candidate. Each is a process of its own.
Those under --autotune compile one after another, the others then at the same time; each measures while the others
wait. `compile s` is up to the third forward, packing included. Time is the median of the forwards, from start to end on
the device; images/s are the batch over that. `peak GB` is that of torch's allocator after the first forward, `linear
GB` the size of the linears' weights, packed. `error` is the distance of the output to that of the eager bf16 model on
the same weights, ‖a − b‖ / ‖b‖. The weights are random, so the error of a pruned model says nothing of one that was
trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import contest
from .forward import COLUMNS, ForwardWorker
from .random_model import random_model
from .vit_encoder import Encoder

HEAD = 80  # size of a head
LARGE = 512  # from this edge on images are encoded as Segment Anything does
WINDOW = 14


class VitWorker(ForwardWorker[str]):
    """A contender; a case is "EDGExBATCH"."""

    def made(self, case: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
        edge, batch = sizes(case)
        patch, window = (16, WINDOW) if edge >= LARGE else (14, None)
        width, layers = self.options.width, self.options.layers
        model = random_model(lambda: Encoder(width, layers, width // HEAD, edge // patch, patch, window), self.device)
        return model, (torch.randn(batch, 3, edge, edge, dtype=torch.bfloat16, device=self.device),)

    def rates(self, case: str, seconds: float) -> dict[str, Any]:
        return {"images/s": round(sizes(case)[1] / seconds, 2)}


def sizes(case: str) -> tuple[int, int]:
    edge, batch = case.lower().split("x")
    return int(edge), int(batch)


def main(arguments: list[str] | None = None) -> None:
    names = ["bf16", "int8dq", "float8dq", "vit", "torchao-int8dq", "torchao-float8dq"]
    parser = contest.parser("python -m bench.vit", __doc__, names)
    parser.add_argument("--images", nargs="+", default=["224x64", "1024x8"], metavar="EDGExBATCH")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=1280, help=f"a multiple of {HEAD}, the size of a head")
    options = parser.parse_args(arguments)
    about = {"layers": options.layers, "width": options.width, "autotune": options.autotune}
    contest.run(VitWorker, options, "images", options.images, ("images", "images/s", *COLUMNS), about)


if __name__ == "__main__":
    main()
