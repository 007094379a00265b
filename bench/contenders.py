"""Who is timed by `bench.linear`: plain bf16, ours, and the weight-only kernels that people use, on the same weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from aograph.kernels import int4_linear as int4
from aograph.kernels import int8_linear as int8
from torch import Tensor

from .schemes import Weights

# What torchao's quantize_ sets for all of Inductor.
TORCHAO = {
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
    "force_fuse_int_mm_with_mul": True,
}


def stored_bytes(tensor: Tensor) -> int:
    """Of a tensor; of a subclass that is made of others, theirs."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


@dataclass(frozen=True)
class Contender:
    """packed: the tensors that it reads the weight from; call(x, *packed) -> y; kernel(x): what runs, where it varies.

    scaled: makes what `call` gives y, outside of the time, where it is no y yet. copies: of `packed`, itself first; too
    many for the caches.
    """

    packed: tuple[Tensor, ...]
    call: Callable[..., Tensor]
    kernel: Callable[[Tensor], str] = lambda x: ""
    scaled: Callable[[Tensor], Tensor] = lambda y: y
    copies: tuple[tuple[Tensor, ...], ...] = ()

    @property
    def bytes(self) -> int:
        return sum(map(stored_bytes, self.packed))

    def copied(self, least: int) -> Contender:
        """With copies of together at least `least` bytes, two at least."""
        more = max(1, -(-least // self.bytes) - 1)
        return replace(self, copies=(self.packed, *(tuple(t.clone() for t in self.packed) for _ in range(more))))


def bf16(weights: Weights) -> Contender:
    return Contender((weights.plain,), F.linear)


def ours4(weights: Weights) -> Contender:
    rest = weights.group_size, weights.N, None
    op, packed = int4.int4_linear, weights.int4
    return Contender(
        packed, lambda x, *each: op(x, *each, *rest), lambda x: op.choose(op.case_of(x, *packed, *rest)).name
    )


def ours8(weights: Weights) -> Contender:
    op, packed = int8.int8_linear, weights.int8
    return Contender(
        packed, lambda x, *each: op(x, *each, None), lambda x: op.choose(op.case_of(x, *packed, None)).name
    )


def tinygemm(weights: Weights) -> Contender:
    codes, scale_zero, aten = weights.codes(), weights.scale_zero(), torch.ops.aten
    if codes.is_cuda:
        q = aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
        product = aten._weight_int4pack_mm
    else:
        q = aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2)
        product = aten._weight_int4pack_mm_for_cpu
    return Contender((q, scale_zero), lambda x, q, scale_zero: product(x, q, weights.group_size, scale_zero))


def torchao(weights: Weights) -> Contender:
    from torchao.quantization import Int8Tensor

    q, scale = weights.int8
    weight = Int8Tensor(q, scale.float()[:, None], [1, weights.K], torch.bfloat16)
    return Contender((weight,), F.linear)


def torchao_compiled(weights: Weights) -> Contender:
    call = torch.compile(lambda x, weight: F.linear(x, weight), dynamic=False, options=TORCHAO)
    return Contender(torchao(weights).packed, call)


def gemlite4(weights: Weights) -> Contender:
    gemlite = tables_of_gemlite()
    scale, zero = weights.scale_zero().float().permute(2, 1, 0)
    layer = gemlite.helper.A16W4_HQQ_INT(device=weights.plain.device, dtype=torch.bfloat16)
    return gemlite_contender(
        layer.from_weights(weights.codes(), scale.bfloat16().contiguous(), (8 - zero / scale).bfloat16())
    )


def gemlite8(weights: Weights) -> Contender:
    q, scale = weights.int8
    layer = tables_of_gemlite().helper.A16W8_INT8(device=weights.plain.device, dtype=torch.bfloat16)
    return gemlite_contender(layer.from_weights(q, scales=scale[:, None]))


def tables_of_gemlite() -> Any:
    import gemlite

    gemlite.load_config(str(Path(gemlite.__file__).parent / "configs" / "h100.json"))  # it has none for the H200
    return gemlite


def gemlite_contender(layer: Any) -> Contender:
    from gemlite import forward_functional

    about = layer.get_meta_args()
    packed = tuple(tensor.detach() for tensor in layer.get_tensor_args())
    return Contender(packed, lambda x, *each: forward_functional(x, None, list(each), about))


@dataclass(frozen=True)
class Entry:
    """kind: whose weights it computes with; build(weights); at: the M that it runs at, None for all; ours.

    anew: it is built for each M, by build(weights, x). part: it does a part of the work, so that no time is compared
    with its own.
    """

    kind: str
    build: Callable[..., Contender]
    at: tuple[int, ...] | None = None
    ours: bool = False
    anew: bool = False
    part: bool = False


WEIGHT_ONLY = {
    "bf16": Entry("bf16", bf16),
    "int4": Entry("int4", ours4, ours=True),
    "tinygemm": Entry("int4", tinygemm),
    "gemlite int4": Entry("int4", gemlite4),
    "int8": Entry("int8", ours8, ours=True),
    "torchao": Entry("int8", torchao),
    "torchao compiled": Entry("int8", torchao_compiled, at=(1, 16)),
    "gemlite int8": Entry("int8", gemlite8),
}
