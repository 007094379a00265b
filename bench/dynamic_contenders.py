"""Who is timed by `bench.linear` where arithmetic is the bound: our recipes, and what torch, torchao and cuSPARSELt do.

All take x in bf16 and give y in bf16, so that quantizing x and scaling y are in the time; but for "product", which has
the codes of x already and leaves its sums unscaled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aograph
from aograph.backend import joined, suited, weights_to_inputs

from .contenders import TORCHAO, Contender, Entry
from .device import medians
from .schemes import Weights, float8_codes, int8_codes
from .worker import CONFIGS

Quantize = Callable[[Tensor], tuple[Tensor, Tensor]]
Weight = Callable[[Weights], Tensor]

plain: Weight = attrgetter("plain")
pruned: Weight = attrgetter("pruned")


def compiled(call: Callable[..., Any], options: dict[str, Any] | None = None) -> Callable[..., Any]:
    return torch.compile(call, fullgraph=True, dynamic=False, options=options)


def recipe(name: str, weight: Weight, weights: Weights, x: Tensor) -> Contender:
    """The graph of one linear as the recipe leaves it, compiled for the M of x; its weights have become inputs."""
    linear = nn.Linear(weights.K, weights.N, bias=False, device="meta")
    linear.weight = nn.Parameter(weight(weights), requires_grad=False)
    fast = aograph.optimize(linear, name, dynamic_shapes={"input": None}, compile=False, progress=False)
    captured, _ = fast.add_capture((x,), {})
    program = captured.program
    packed = {each: attrgetter(each)(program.graph_module).detach() for each in program.weights}
    weights_to_inputs(program, list(packed))
    module = torch.fx.GraphModule(program.graph_module, program.graph)
    run = torch.compile(module, **joined({"fullgraph": True, "dynamic": False}, suited(fast.report)))
    (row,) = fast.report.rows
    ran = row.kernel or "; ".join([row.outcome, *row.notes])
    return Contender(tuple(packed.values()), lambda x, *each: run(x, *each)[0], lambda x: ran)


def int_mm(weights: Weights, x: Tensor) -> Contender:
    def call(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
        of_x, scale_x = int8_codes(x)
        return (torch._int_mm(of_x, q.T) * scale_x * scale.T).bfloat16()

    return Contender(weights.int8_pair(weights.plain), compiled(call))


def scaled_mm(weights: Weights, x: Tensor) -> Contender:
    def call(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
        of_x, scale_x = float8_codes(x)
        return torch._scaled_mm(of_x, q.T, scale_x, scale.T, out_dtype=torch.bfloat16, use_fast_accum=True)

    return Contender(float8_codes(weights.plain), compiled(call))


def torchao(config: str, weights: Weights, x: Tensor) -> Contender:
    import torchao.quantization as ao

    linear = nn.Linear(weights.K, weights.N, bias=False, device="meta")
    linear.weight = nn.Parameter(weights.plain, requires_grad=False)
    with torch._inductor.config.patch(TORCHAO):  # which quantize_ sets for all that is compiled from then on
        ao.quantize_(linear, CONFIGS[config](ao))
    if type(linear.weight.data) is Tensor:  # as it leaves alone what a configuration cannot take
        raise RuntimeError(f"{config} leaves the weight as it is")
    return Contender((linear.weight.detach(),), compiled(lambda x, weight: F.linear(x, weight), TORCHAO))


def product(compressed: Tensor, x: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """cuSPARSELt's product of codes x [M, K] and a compressed weight, in the faster of its two layouts of y [M, N].

    M must be a multiple of 16. The algorithm is searched for in each.
    """
    dtype = torch.bfloat16 if x.dtype.itemsize == 1 else None  # of y, where it is not that of x

    def searched(rows: bool) -> Callable[[Tensor, Tensor], Tensor]:
        best, split, mode, _ = torch._C._cusparselt.mm_search(compressed, x.T, None, None, dtype, rows)
        settings = {"out_dtype": dtype, "transpose_result": rows, "alg_id": best, "split_k": split}
        multiply = partial(torch._cslt_sparse_mm, split_k_mode=mode, **settings)
        return lambda x, packed: multiply(packed, x.T) if rows else multiply(packed, x.T).T

    layouts, problem = {}, None
    for name, rows in (("rows", True), ("columns", False)):
        try:
            layouts[name] = partial(searched(rows), x, compressed)
            layouts[name]()
        except RuntimeError as error:  # not all are there for all dtypes
            layouts.pop(name, None)
            problem = error
    if problem and not layouts:
        raise problem
    times = medians(layouts, x.device)
    return layouts[min(times, key=times.__getitem__)].func


def padded(x: Tensor) -> Tensor:
    """x with rows of zeros, up to a multiple of 16."""
    return F.pad(x, (0, 0, 0, -len(x) % 16))


def cusparselt(weights: Weights, x: Tensor) -> Contender:
    packed = torch._cslt_compress(weights.pruned)
    multiply = product(packed, padded(x))
    if len(x) % 16 == 0:
        return Contender((packed,), multiply)
    return Contender((packed,), compiled(lambda x, packed: multiply(padded(x), packed)[: len(x)]))


def cusparselt8(quantize: Quantize, pair: Callable[[Weights], tuple[Tensor, Tensor]], alone: bool,
                weights: Weights, x: Tensor) -> Contender:  # fmt: skip
    """With codes of 8 bits. alone: the product, of x that is quantized and padded already."""
    q, scale = pair(weights)
    packed = torch._cslt_compress(q)
    of_x, scale_x = quantize(padded(x))
    multiply = product(packed, of_x)
    if alone:
        return Contender(
            (packed,), lambda _, each: multiply(of_x, each), scaled=lambda y: (y * scale_x * scale.T)[: len(x)]
        )

    def call(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
        of_x, scale_x = quantize(padded(x))
        return (multiply(of_x, packed) * scale_x * scale.T)[: len(x)].bfloat16()

    return Contender((packed, scale), compiled(call))


def sparse_int8(weights: Weights) -> tuple[Tensor, Tensor]:
    return weights.int8_pair(weights.pruned)


def sparse_float8(weights: Weights) -> tuple[Tensor, Tensor]:
    return float8_codes(weights.pruned)


def ours(name: str, weight: Weight = plain) -> Entry:
    return Entry(name, partial(recipe, name, weight), ours=True, anew=True)


def peer(kind: str, build: Callable[[Weights, Tensor], Contender], part: bool = False) -> Entry:
    return Entry(kind, build, anew=True, part=part)


DYNAMIC = {
    "float8wo": ours("float8wo"),
    "int8dq": ours("int8dq"),
    "_int_mm": peer("int8dq", int_mm),
    "torchao int8dq": peer("int8dq", partial(torchao, "torchao-int8dq")),
    "float8dq": ours("float8dq"),
    "_scaled_mm": peer("float8dq", scaled_mm),
    "torchao float8dq": peer("float8dq", partial(torchao, "torchao-float8dq")),
    "sparse24": ours("sparse24", pruned),
    "cuSPARSELt": peer("sparse24", cusparselt),
    "int8dq-sparse24": ours("int8dq-sparse24", pruned),
    "cuSPARSELt int8": peer("int8dq-sparse24", partial(cusparselt8, int8_codes, sparse_int8, False)),
    "cuSPARSELt int8 product": peer("int8dq-sparse24", partial(cusparselt8, int8_codes, sparse_int8, True), part=True),
    "float8dq-sparse24": ours("float8dq-sparse24", pruned),
    "cuSPARSELt float8": peer("float8dq-sparse24", partial(cusparselt8, float8_codes, sparse_float8, False)),
    "cuSPARSELt float8 product": peer(
        "float8dq-sparse24", partial(cusparselt8, float8_codes, sparse_float8, True), part=True
    ),
}
