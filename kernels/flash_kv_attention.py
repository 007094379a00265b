"""Attention of many tokens over packed caches, by the flash attention of torch: a prompt, or a chunk of one.

Tokens at positions p, p + 1, … attend to themselves, as they were before they were stored where that is known, which is
causal, and to blocks of the positions before p, which is not; each block is dequantized for one call, on a GPU to q's
dtype, elsewhere to fp32, and what the calls give is put together by the logarithms of their sums of weights. So there
is never more than a block of the cache in full precision.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .kv_cache import CacheCase
from .op import Case, need

FEWEST = 64  # tokens, for which asking where they are does not matter
ELEMENTS = 1 << 23  # of the keys that are dequantized at a time, and as many of the values

aten = torch.ops.aten


def supports(case: Case) -> bool | str:
    """Whether this takes a case of `kv_attention`, wherever its tokens are."""
    assert isinstance(case, CacheCase)
    cuda = case.device == "cuda"
    return need(
        (case.device in ("cpu", "cuda"), "runs on CPU and CUDA only"),
        (not cuda or (case.capability or (0, 0)) >= (8, 0), "needs compute capability 8.0 or more"),
        (not cuda or case.dtype in (torch.bfloat16, torch.float16), "takes bf16 and fp16 q only"),
        (case.M is not None and case.M >= FEWEST, f"is for {FEWEST} tokens and more"),
        (case.K == case.N, "keys and values have heads of different sizes"),
        (case.K <= 256, "heads are larger than 256"),
        (case.mask is None and not case.softcap, "knows no mask and no softcap"),
        (not case.sinks, "knows no attention sinks"),
    )


def beginning(positions: Tensor, start: Tensor | None, window: int, S: int, stored: Tensor | None = None) -> int | None:
    """The first position, if the tokens of all rows are at the same ones, one behind the other, and see all before; and
    were stored there, where `stored` [T] or [B, T] says where.

    None where they are not, and where asking is not possible, as a CUDA graph is recorded. It waits for a GPU.
    """
    B, T = positions.shape
    recorded = positions.is_cuda and torch.cuda.is_current_stream_capturing()
    if start is not None or window > 0 or not B * T or recorded:
        return None
    same = positions == positions[:1, :1] + torch.arange(T, device=positions.device)
    same = same if stored is None else same & (stored == positions)
    first, alike = torch.stack([positions[0, 0], same.all().long()]).tolist()
    return first if alike and 0 <= first <= S - T else None


def attention(
    q: Tensor,
    keys: Callable[[slice], Tensor],
    values: Callable[[slice], Tensor],
    own: tuple[Tensor, Tensor] | None,
    block: int,
    kv_heads: int,
    first: int,
    scale: float,
) -> Tensor:
    """[B, Hq, T, D] of q [B, Hq, T, D], the tokens at positions from `first` on.

    keys(part), values(part): those of positions, [B, H, n, D]; of keys from a multiple of `block` on. own: those of the
    tokens themselves, [B, H, T, D]; None: as of other positions.
    """
    B, _, T, D = q.shape
    dtype = q.dtype if q.is_cuda else torch.float32
    q, result = q.to(dtype), q.dtype
    if own is None:
        begin = first // block * block
        own = keys(slice(begin, first + T))[:, :, first - begin :], values(slice(first, first + T))
    part, total = flash(q, own[0].to(dtype), own[1].to(dtype), True, scale)
    y, size = part.float(), max(ELEMENTS // (B * kv_heads * D), 1)
    size = -(-size // block) * block
    for at in range(0, first, size):
        old = slice(at, min(at + size, first))
        part, weight = flash(q, keys(old).to(dtype), values(old).to(dtype), False, scale)
        before, total = total, torch.logaddexp(total, weight)
        y.mul_((before - total).exp_()[..., None]).addcmul_(part, (weight - total).exp_()[..., None])
    return y.to(result)


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention, and the logarithms of the sums of its weights [B, Hq, T] in fp32."""
    q, k, v = (each if each.stride(3) == 1 else each.contiguous() for each in (q, k, v))  # the kernels take no other
    if q.is_cuda:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
