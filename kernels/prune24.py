"""prune24: of each 4 consecutive weights along K the two that matter most stay, the others become zero.

weight [N, K] float, K a multiple of 4; norms [K] or None -> [N, K] like the weight. What matters is |w| (magnitude), or
|w| · norms[k], where norms[k] is the 2-norm of the k-th input over the tokens of a calibration (Wanda: Sun et al., "A
Simple and Effective Pruning Approach for Large Language Models", 2023). Of equals the first ones stay, and zero never
wins over another weight, so that a weight that is 2:4 already comes out as it is, to the bit. Weights must be finite.
"""

import torch
from torch import Tensor

from . import rounding

__all__ = ["METHODS", "largest_two", "prune24"]

METHODS = {"magnitude": "magnitude", "wanda": "Wanda"}  # as recipes and as people write them

torch.library.define(
    "aograph::prune24", "(Tensor weight, Tensor? norms=None) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)
prune24 = torch.ops.aograph.prune24.default


def largest_two(score: Tensor) -> Tensor:
    """score [..., 4] -> bool [..., 4]: the two largest of each four, of equals the first."""
    mine, other = score[..., :, None], score[..., None, :]
    order = torch.arange(4, device=score.device)
    beaten = (other > mine) | ((other == mine) & (order < order[:, None]))
    return beaten.sum(-1) < 2


@torch.library.impl("aograph::prune24", "default")
def _(weight: Tensor, norms: Tensor | None = None) -> Tensor:
    check(weight, norms)
    wide = None if norms is None else norms.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
    pruned = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for rows in rounding.chunks(weight):
        w = weight[rows]
        score = w.abs() if wide is None else w.abs() * wide
        score = torch.where(w == 0, -1, score)  # below |w| · 0, as of an input that the calibration never saw
        kept = largest_two(score.unflatten(1, (weight.shape[1] // 4, 4))).flatten(1)
        pruned[rows] = torch.where(kept | (w == 0), w, 0)  # a -0.0 stays what it is
    return pruned


@torch.library.register_fake("aograph::prune24")
def _(weight: Tensor, norms: Tensor | None = None) -> Tensor:
    check(weight, norms)
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def check(weight: Tensor, norms: Tensor | None) -> None:
    """Raises ValueError for what cannot be pruned."""
    if weight.dim() != 2 or weight.shape[1] % 4 or not weight.is_floating_point():
        raise ValueError(f"prune24: weight is {weight.dtype} {list(weight.shape)}; expected float [N, K], 4 dividing K")
    if norms is not None and norms.shape != weight.shape[1:]:
        raise ValueError(f"prune24: norms is {list(norms.shape)}; expected {list(weight.shape[1:])}")
