"""2:4 products by cuSPARSELt, which comes with torch's CUDA builds.

It reads a weight in a form of its own, made once from the packed one and kept as long as that one lives: the weight is
in memory twice, in all 17/16 of the dense weight's bytes in half precision. Which of its algorithms is fastest for a
shape differs by up to a factor of two, so its search runs once for each shape and number of tokens (up to the next
power of two), and what it finds stays in the cache folder. Not in fp16, where the search ends in an illegal
instruction on an H200 (cuSPARSELt 0.8.0), and with it the process.
"""

import contextlib
import json
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import cache
from .op import ENDLESS, Case, Op, capability, need
from .sparse24 import decompress

MULTIPLES = {torch.bfloat16: (16, 8), torch.float16: (16, 8), torch.int8: (32, 16), torch.float8_e4m3fn: (32, 16)}
FROM_TOKENS = 256  # where its product overtakes a dense one
BLOBS: Any = WeakTensorKeyDictionary()  # the values of a packed weight → their version, and the weight as it is read


class Algorithm(NamedTuple):
    """What the search chooses, under the names of `torch._cslt_sparse_mm`."""

    alg_id: int = 0
    split_k: int = 1
    split_k_mode: int = -1


def supports(case: Case, dtype: torch.dtype) -> bool | str:
    """Whether cuSPARSELt takes a weight [N, K] of that dtype, or why not; any number of tokens will do."""
    rows, _ = MULTIPLES.get(dtype, (1, 1))
    return need(
        (case.device == "cuda", f"no sparse kernel on {case.device}"),
        (torch.backends.cusparselt.is_available(), "cuSPARSELt is not in this build of torch"),
        ((case.capability or (8, 0)) >= ((8, 9) if dtype is torch.float8_e4m3fn else (8, 0)), "the GPU is too old"),
        (dtype in MULTIPLES, "cuSPARSELt takes bf16, fp16, int8 and float8 weights only"),
        (case.N % rows == 0 and case.K % rows == 0, f"cuSPARSELt needs N and K that are multiples of {rows}"),
    )


def product(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None = None, **how: Any) -> Tensor:
    """x [M, K] @ W.T + bias: y [M, N], of a packed weight in the format of `sparse24.py`.

    how: alpha and out_dtype of `torch._cslt_sparse_mm`.
    """
    M, missing = x.shape[0], -x.shape[0] % MULTIPLES[x.dtype][1]
    filled = torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x
    blob = compressed(values, indices)
    found = algorithm(blob, filled, bias, how)
    y = torch._cslt_sparse_mm(blob, filled.t(), bias=bias, transpose_result=True, **found._asdict(), **how)
    return y[:M]


def prepare(op: Op, values: Tensor, indices: Tensor) -> None:
    """Compresses a packed weight ahead of the calls of `op`, where these go to cuSPARSELt, or again, after a write."""
    dtype = values.dtype if values.element_size() > 1 else torch.bfloat16
    case = Case(values.device.type, dtype, None, len(values), 2 * values.shape[1], capability=capability(values.device))
    if any(op.choose(replace(case, M=M)).name == "cusparselt" for M in (FROM_TOKENS, ENDLESS)):
        compressed(values, indices)


def compressed(values: Tensor, indices: Tensor) -> Tensor:
    """The weight as cuSPARSELt reads it; made again, in the same memory, where `values` has been written since."""
    version = 0 if values.is_inference() else values._version
    known, blob = BLOBS.get(values, (None, None))
    if known != version:
        with torch.inference_mode(False), torch.no_grad():
            fresh = torch._cslt_compress(decompress(values, indices))
            blob = fresh if blob is None else blob.copy_(fresh)  # CUDA graphs go on reading it where it is
        BLOBS[values] = version, blob
    return blob


def algorithm(blob: Tensor, x: Tensor, bias: Tensor | None, how: dict[str, Any]) -> Algorithm:
    """The fastest algorithm for x [M, K]; while a CUDA graph is captured, which no search survives, what is known."""
    up_to = 1 << (x.shape[0] - 1).bit_length()
    if x.dtype is torch.float16:
        return Algorithm()
    shape = tuple(blob.shape), x.shape[1], up_to, x.dtype, bias is not None, how.get("out_dtype")
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return KNOWN.get(shape, Algorithm()) if capturing else searched(shape, blob, x, bias, how)


KNOWN: dict[tuple, Algorithm] = {}


def searched(shape: tuple, blob: Tensor, x: Tensor, bias: Tensor | None, how: dict[str, Any]) -> Algorithm:
    """What the search finds for a shape, in this process or in one before."""
    if shape not in KNOWN:
        path = cache.entry("cusparselt.json", *shape, *machine())
        found = None
        with contextlib.suppress(OSError, ValueError, TypeError):
            alg_id, split_k, split_k_mode = map(int, json.loads(path.read_text()))
            found = Algorithm(alg_id, split_k, split_k_mode)
        if found is None:
            mm_search = torch._C._cusparselt.mm_search
            found = Algorithm(*mm_search(blob, x.t(), bias, how.get("alpha"), how.get("out_dtype"), True)[:3])
            with contextlib.suppress(OSError), cache.written_whole(path) as partial:  # else each process searches
                partial.write_text(json.dumps(found))
        KNOWN[shape] = found
    return KNOWN[shape]


@lru_cache(1)
def machine() -> tuple[str, int | None]:
    """What decides which algorithm is fastest, besides the shape."""
    return torch.cuda.get_device_name(), torch.backends.cusparselt.version()
