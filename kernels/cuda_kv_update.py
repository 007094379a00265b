"""Quantizing new tokens into packed caches for CUDA, in CUDA C++: `kv_update.cu`."""

from functools import cache

import torch
from torch import Tensor

from . import cuda
from .cuda_kv_attention import INPUTS, KINDS
from .cuda_linear import CAPABILITIES
from .kv_cache import CacheCase, KVFormat
from .op import Case, need

WARPS = 4  # of a block
THREADS = 512  # by channel: two channels each
GROUPS = (32, 64)  # besides the whole head
LARGEST_HEAD = 1024  # what a warp holds


def supports(case: Case) -> bool | str:
    """Whether the kernel takes a case of `kv_update`."""
    assert isinstance(case, CacheCase)
    here = need(
        (case.device == "cuda", "runs on CUDA only"),
        (case.capability in CAPABILITIES, "is written for compute capability 9.0"),
        (case.keys.block is None or case.M == 1, "takes one token by channel"),
        (case.K % 16 == 0 and 0 < case.K <= LARGEST_HEAD, f"the head size is no multiple of 16 up to {LARGEST_HEAD}"),
        (case.keys.group_size in (None, case.K, *GROUPS), "has groups of the whole head, 32 or 64 only"),
    )
    return cuda.available(case.capability) if here is True else here


def update(
    codes: Tensor,
    scales: Tensor,
    new: Tensor,
    positions: Tensor,
    window: Tensor | None,
    held: Tensor | None,
    form: KVFormat,
) -> None:
    """`kv_update` of a case that `supports` takes, into caches that are contiguous."""
    (B, H, S, _), (T, D) = codes.shape, new.shape[2:]
    if not new.numel():
        return
    if new.stride(3) != 1 or max(new.stride()) >= 1 << 31:
        new = new.contiguous()
    positions = positions.contiguous()
    step = T if positions.dim() > 1 else 0
    store = _kernel(form, D, new.dtype, window.dtype if window is not None else None, new.device)
    row, head, token, _ = new.stride()
    with torch.cuda.device_of(new):
        if window is None:
            arguments = new, positions, codes, scales, B * H, H, T, S, row, head, token, step
            store((-(-B * H * T // WARPS), 1, 1), WARPS * 32, arguments)
        else:
            store((B, 1, 1), THREADS, (new, positions, codes, scales, window, held, H, S, row, head, step))


def defines(form: KVFormat, D: int, dtype: torch.dtype, window: torch.dtype | None = None) -> dict[str, int]:
    """window: the dtype of that of a cache by channel."""
    if window is not None:
        return {
            "INPUT": INPUTS[dtype],
            "HEAD": D,
            "BLOCK": form.block or 0,
            "WINDOW": INPUTS[window],
            "THREADS": THREADS,
        }
    group = form.group_size or D
    return {"KIND": KINDS[form.name], "INPUT": INPUTS[dtype], "HEAD": D, "GROUP": group, "WARPS": WARPS}


@cache
def _kernel(form: KVFormat, D: int, dtype: torch.dtype, window: torch.dtype | None, device: torch.device):
    name = "kv_store" if window is None else "kv_step"
    return cuda.kernel("kv_update.cu", name, device, **defines(form, D, dtype, window))
