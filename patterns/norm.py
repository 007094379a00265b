"""RMSNorm over the last dimension, with a weight, as models write it (Zhang and Sennrich, 2019).

A pattern of `RMS_NORMS` binds `x` [..., K], `weight` [K], both of the result's dtype, and `eps`, which `epsilon` reads.
As a part of another pattern, a norm has no user besides; what it computes on the way has none in any case.
"""

from __future__ import annotations

import torch

from .language import Any, Match, P, Weight

aten = torch.ops.aten
x, weight, eps = Any("x"), Weight("weight", ndim=1), Any("eps")


def whole_rows(m: Match) -> bool | str:
    """One weight for each element of a row of x, in x's dtype; as text, because sizes of x may be symbolic."""
    rows, scales = m.x.meta["val"], m.weight.meta["val"]
    same = rows.dtype == scales.dtype and str(rows.shape[-1]) == str(scales.shape[0])
    return same or "the weight of the norm is not one row of x, in x's dtype"


def same_dtype(m: Match) -> bool | str:
    return m.dtype == m.x.meta["val"].dtype or "the norm ends in another dtype than x's"


def plain_epsilon(m: Match) -> bool | str:
    return m.eps is None or isinstance(m.eps, (int, float)) or "eps is no number"


def epsilon(m: Match) -> float:
    """The eps of a norm; None is torch's default, that of the dtype in which it computes."""
    return torch.finfo(torch.promote_types(m.x.meta["val"].dtype, torch.float32)).eps if m.eps is None else float(m.eps)


def either_way(one, other) -> list[tuple]:
    """The operands of a commutative operator."""
    return [(one, other), (other, one)]


# As transformers writes it: in fp32, and rounded before the weight.
wide = P(aten.to.dtype, x, torch.float32, users=2, name="wide")
mean = P(aten.mean.dim, P(aten.pow.Tensor_Scalar, wide, 2, users=1), [-1], True, users=1)
scale = P(aten.rsqrt, P(aten.add.Tensor, mean, eps, users=1), users=1)
rounded = [
    P(aten.to.dtype, P(aten.mul.Tensor, *pair, users=1), Any("dtype"), users=1) for pair in either_way(wide, scale)
]
guards = (plain_epsilon, whole_rows)

RMS_NORMS = [
    P(aten.rms_norm, x, [Any()], weight, eps, users=1, where=guards),
    *(
        P(aten.mul.Tensor, *pair, users=1, where=(*guards, same_dtype))
        for each in rounded
        for pair in either_way(weight, each)
    ),
]
