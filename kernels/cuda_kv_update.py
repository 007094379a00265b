"""Quantizing new tokens into packed caches for CUDA, in CUDA C++: `kv_update.cu`."""

from functools import cache

import torch
from torch import Tensor

from . import cuda
from .cuda_kv_attention import KINDS
from .cuda_linear import CAPABILITIES
from .kv_cache import CacheCase, KVFormat
from .op import Case, need

INPUTS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # as the kernel has them
WARPS = 4  # of a block
GROUPS = (32, 64)  # besides the whole head
LARGEST_HEAD = 1024  # what a warp holds


def supports(case: Case) -> bool | str:
    """Whether the kernel takes a case of `kv_update`."""
    assert isinstance(case, CacheCase)
    here = need(
        (case.device == "cuda", "runs on CUDA only"),
        (case.capability in CAPABILITIES, "is written for compute capability 9.0"),
        (case.keys.block is None, "takes no keys by channel"),
        (case.K % 16 == 0 and 0 < case.K <= LARGEST_HEAD, f"the head size is no multiple of 16 up to {LARGEST_HEAD}"),
        (case.keys.group_size in (None, case.K, *GROUPS), "has groups of the whole head, 32 or 64 only"),
    )
    return cuda.available(case.capability) if here is True else here


def update(codes: Tensor, scales: Tensor, new: Tensor, positions: Tensor, form: KVFormat) -> None:
    """`kv_update` of a case that `supports` takes, into codes and scales that are contiguous."""
    (B, H, S, _), (T, D) = codes.shape, new.shape[2:]
    if not new.numel():
        return
    if new.stride(3) != 1 or max(new.stride()) >= 1 << 31:
        new = new.contiguous()
    positions = positions.contiguous()
    step = T if positions.dim() > 1 else 0
    store = _kernel(form, D, new.dtype, new.device)
    with torch.cuda.device_of(new):
        arguments = new, positions, codes, scales, B * H, H, T, S, *new.stride()[:3], step
        store((-(-B * H * T // WARPS), 1, 1), WARPS * 32, arguments)


def defines(form: KVFormat, D: int, dtype: torch.dtype) -> dict[str, int]:
    group = form.group_size or D
    return {"KIND": KINDS[form.name], "INPUT": INPUTS[dtype], "HEAD": D, "GROUP": group, "WARPS": WARPS}


@cache
def _kernel(form: KVFormat, D: int, dtype: torch.dtype, device: torch.device):
    return cuda.kernel("kv_update.cu", "kv_store", device, **defines(form, D, dtype))
