"""Times blocks of the shape of Flux.1 (3072 wide, 24 heads of 128, MLP 12288) with random weights, batch 1.

    python -m bench.dit [--double 4] [--single 8] [--side 64] [--contenders bf16 int8dq …] [--json OUT]

One forward of the blocks: an image of 64 × 64 patches, so 4,096 tokens, and 512 tokens of text. Flux.1 has 19 double
and 38 single blocks; by default it is cut to 4 and 8, in the same proportion, which the first line of the output says.
What embeds the input and projects the output is left out. Every contender is the same module, in CUDA graphs:

    bf16              torch.compile under the settings of mode="reduce-overhead", kernels but for products tuned
    int8dq, float8dq  the same with backend="aograph"
    torchao-float8dq  quantize_ with float8 activations and weights, a scale for each row, under the settings that
                      quantize_ sets

--autotune names contenders that are compiled under the settings of "max-autotune" instead. Each is a process of its
own. Those under --autotune compile one after another, the others then at the same time; each measures while the others
wait. `compile s` is up to the third forward, packing included. Time is the median of the forwards, from start to end on
the device. `peak GB` is that of torch's allocator after the first forward, `linear GB` the size of the linears'
weights, packed. `error` is the distance of the output to that of the eager bf16 model on the same weights,
‖a − b‖ / ‖b‖.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import contest
from .flux_blocks import HEAD, FluxBlocks, turns
from .forward import COLUMNS, ForwardWorker
from .random_model import random_model


class DitWorker(ForwardWorker[int]):
    """A contender; a case is the number of patches along the edge of an image."""

    def made(self, case: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
        width, text = self.options.width, self.options.text
        model = random_model(lambda: FluxBlocks(width, self.options.double, self.options.single), self.device)
        shapes = (1, case * case, width), (1, text, width), (1, width)
        inputs = (torch.randn(shape, dtype=torch.bfloat16, device=self.device) for shape in shapes)
        return model, (*inputs, *turns(text, case, self.device))


def main(arguments: list[str] | None = None) -> None:
    parser = contest.parser("python -m bench.dit", __doc__, ["bf16", "int8dq", "float8dq", "torchao-float8dq"])
    parser.add_argument("--double", type=int, default=4, help="blocks with two streams; Flux.1 has 19")
    parser.add_argument("--single", type=int, default=8, help="blocks with one; Flux.1 has 38")
    parser.add_argument("--side", type=int, nargs="+", default=[64], help="patches along the edge of the image")
    parser.add_argument("--text", type=int, default=512, help="tokens of text")
    parser.add_argument("--width", type=int, default=3072, help=f"a multiple of {HEAD}, the size of a head")
    options = parser.parse_args(arguments)
    about = {"double": f"{options.double} of 19", "single": f"{options.single} of 38"}
    about |= {"width": options.width, "text tokens": options.text, "autotune": options.autotune}
    contest.run(DitWorker, options, "side", options.side, ("side", *COLUMNS), about)


if __name__ == "__main__":
    main()
