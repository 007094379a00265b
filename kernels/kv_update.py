"""kv_update: new keys or values, quantized, into a packed cache at their positions, in place.

codes and scales: a packed cache [B, H, S, D] (`kv_cache.py`), of any strides; new [B, H, T, D] fp32, bf16 or fp16;
positions [B, T] int64, or [T], the same for all rows; those of a row differ. A position outside of 0 … S - 1 is an
error, and nothing is written; on a GPU it stops the device, as indexing does.
"""

import torch
from torch import Tensor

from . import cuda_kv_update
from .kv_cache import CODES, FLOATS, CacheCase, CacheOp, KVFormat
from .op import capability


class Update(CacheOp):
    """It takes codes first."""

    takes = tuple(CODES.values())


kv_update = Update("kv_update(Tensor(a!) codes, Tensor(b!) scales, Tensor new, Tensor positions) -> ()")


@kv_update.fake
def _(codes, scales, new, positions):
    kv_update.case_of(codes, scales, new, positions)


@kv_update.case
def _(codes: Tensor, scales: Tensor, new: Tensor, positions: Tensor) -> CacheCase:
    form, D = kv_update.fit(codes, scales)
    B, H, S, _ = codes.shape
    kv_update.check("new", new, codes.device, FLOATS, (B, H, None, D))
    T = new.shape[2]
    kv_update.check("positions", positions, codes.device, (torch.int64,), (B, T), (T,))
    device = codes.device
    return CacheCase(
        device.type, new.dtype, T, D, D, None, capability(device), rows=B, heads=H, length=S, keys=form, values=form
    )


@kv_update.reference
def _(codes, scales, new, positions):
    B, H, S, _ = codes.shape
    positions = positions.expand(B, -1)
    torch._assert_async(
        ((positions >= 0) & (positions < S)).all(),
        f"kv_update: a position is outside of the cache, which holds 0 … {S - 1}: make it longer, or begin anew",
    )
    rows = torch.arange(B, device=codes.device)[:, None, None]
    heads = torch.arange(H, device=codes.device)[:, None]
    form: KVFormat = kv_update.format_of(codes, scales)
    for cache, packed in zip((codes, scales), form.quantize(new), strict=True):
        if packed.dtype.itemsize == 1:  # there is no index_put_ of float8
            cache, packed = cache.view(torch.uint8), packed.view(torch.uint8)
        cache.index_put_((rows, heads, positions[:, None]), packed)


@kv_update.implementation("cuda", supports=cuda_kv_update.supports)
def _(codes, scales, new, positions):
    if codes.is_contiguous() and scales.is_contiguous():
        cuda_kv_update.update(codes, scales, new, positions, kv_update.format_of(codes, scales))
    else:
        kv_update.oracle.function(codes, scales, new, positions)
