"""kv_dequantize: a packed cache as a whole, in full precision: what attention that knows no packed cache reads.

codes, scales, and by channel window and held: a packed cache [B, H, S, D] (`kv_cache.py`). -> [B, H, S, D] in dtype,
fp32, bf16 or fp16. By channel S is that of the codes, whole blocks.
"""

import torch
from torch import Tensor

from .kv_attention import Keys
from .kv_cache import FLOATS, CacheCase, CodesOp
from .op import capability

kv_dequantize = CodesOp(
    "kv_dequantize(Tensor codes, Tensor scales, ScalarType dtype, Tensor? window=None, Tensor? held=None) -> Tensor"
)


@kv_dequantize.fake
def _(codes, scales, dtype, window=None, held=None):
    case = kv_dequantize.case_of(codes, scales, dtype, window, held)
    return codes.new_empty(*codes.shape[:3], case.K, dtype=dtype)


@kv_dequantize.case
def _(codes: Tensor, scales: Tensor, dtype, window=None, held=None) -> CacheCase:
    form, D = kv_dequantize.fit(codes, scales, window, held)
    if dtype not in FLOATS:
        raise ValueError(f"kv_dequantize: dtype is {dtype}; expected one of {', '.join(map(str, FLOATS))}")
    (B, H, S, _), device = codes.shape, codes.device
    return CacheCase(
        device.type, dtype, S, D, D, None, capability(device), rows=B, heads=H, length=S, keys=form, values=form
    )


@kv_dequantize.reference
def _(codes, scales, dtype, window=None, held=None):
    whole = slice(0, codes.shape[2])
    return Keys(codes, scales, window, held).dequantize(whole, torch.float32).to(dtype)
