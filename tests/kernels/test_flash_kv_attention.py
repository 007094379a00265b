"""Attention of a prompt over packed caches by torch's flash attention, against the reference in float64."""

import math

import pytest
import torch
from aograph.kernels import flash_kv_attention as flash
from aograph.kernels.kv_attention import kv_attention as op
from aograph.kernels.kv_cache import FP8, INT4, INT4_CHANNEL, INT8, CacheCase, KVFormat
from torch.utils._python_dispatch import TorchDispatchMode

FORMATS = {"int8": INT8, "int8-32": KVFormat("int8", 8, 32), "fp8": FP8, "int4": INT4, "channel": INT4_CHANNEL}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # of the norm: y's own rounding
ON_GPU = {torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of weights and values, too
B, H, D = 2, 2, 32
each = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(flash, "FEWEST", 1)
    monkeypatch.setattr(flash, "ELEMENTS", B * H * D * 48)
    op.choose.cache_clear()
    yield
    op.choose.cache_clear()


def call(form, T, first, S=256, Hq=8, D=D, dtype=torch.float32, device="cpu"):
    """The arguments of a call of T tokens from `first` on."""
    keys, values = torch.randn(B, H, S, D), torch.randn(B, H, S, D) + 0.3
    k, k_scales, *window = form.pack(keys.to(dtype))
    if window:
        window = [torch.randn(B, H, form.block, D).to(dtype), torch.full((B,), (first + T - 1) // form.block)]
    v, v_scales = (INT4 if form.block else form).quantize(values)
    q = torch.randn(B, T, Hq, D).to(dtype).transpose(1, 2)
    positions = (first + torch.arange(T)).expand(B, -1)
    tensors = q, k, k_scales, v, v_scales, positions, None, None, D**-0.5, 0.0, 0, *window
    return [t.to(device) if isinstance(t, torch.Tensor) else t for t in tensors]


def check(arguments, tolerance):
    assert op.choose(op.case_of(*arguments)).name == "flash"
    assert flash.beginning(arguments[5], arguments[6], arguments[10], arguments[3].shape[2]) is not None
    y, expected = op(*arguments), op.run(*arguments, implementation="reference")
    assert y.dtype is expected.dtype and y.shape == expected.shape
    assert (y.double() - expected.double()).norm() <= tolerance * expected.double().norm()
    return y


@each
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("T, first", [(1, 0), (1, 255), (3, 0), (64, 0), (65, 63), (70, 64), (48, 96), (100, 151)])
def test_chunks_anywhere(form, dtype, T, first):
    """At the beginning, at the end, in blocks and across them."""
    check(call(form, T, first, dtype=dtype), TOLERANCE[dtype])


@each
@pytest.mark.parametrize("heads, D", [(2, 64), (8, 64), (16, 64), (4, 96), (4, 128), (4, 256)])
def test_heads(form, heads, D):
    check(call(form, 20, 90, S=128, Hq=heads, D=D), TOLERANCE[torch.float32])


@each
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_chunks_that_are_read_as_they_were(form, dtype):
    """Unlike what the cache holds of them; with channels that are neighbours in memory, or tokens."""
    for T, first in ((17, 0), (48, 96), (70, 64)):
        arguments = call(form, T, first, dtype=dtype)
        arguments += [None] * (14 - len(arguments))
        new = [torch.randn(B, H, D, T).to(dtype).mT, torch.randn(B, T, H, D).to(dtype).transpose(1, 2)]
        check([*arguments, *new, arguments[5][0]], TOLERANCE[dtype])
    elsewhere = [*arguments, *new, arguments[5] + 1]
    assert op(*elsewhere).equal(op.run(*elsewhere, implementation="blocks"))


def test_queries_whose_channels_are_no_neighbours():
    arguments = call(INT8, 70, 64)
    arguments[0] = arguments[0].mT.contiguous().mT
    check(arguments, TOLERANCE[torch.float32])


def test_sinks_are_for_others():
    arguments = call(INT8, 70, 64)
    assert op.run(*arguments, None, None, None).equal(op(*arguments))
    arguments += [None, None, torch.randn(8)]
    assert flash.supports(op.case_of(*arguments)) == "knows no attention sinks"
    expected = op.run(*arguments, implementation="reference")
    assert (op(*arguments) - expected).norm() <= TOLERANCE[torch.float32] * expected.norm()


def test_scores_that_are_large():
    arguments = call(INT8, 20, 90)
    arguments[0] = arguments[0] * 1e3
    assert check(arguments, 1e-5).isfinite().all()


@pytest.mark.parametrize("form", [INT8, INT4], ids=["int8", "int4"])
def test_what_no_token_sees_does_not_matter_and_nan_that_is_seen_comes_out(form):
    arguments = call(form, 20, 90)
    expected = check(arguments, 1e-5)
    for scales in (arguments[2], arguments[4]):
        scales[:, :, 110:] = math.nan
    assert op(*arguments).equal(expected)
    arguments[4][0, 1, 5] = math.nan
    y = op(*arguments)
    assert y[0, 4:].isnan().any(-1).all() and y[0, :4].equal(expected[0, :4]) and y[1].equal(expected[1])


@pytest.mark.parametrize(
    "change",
    [
        {5: torch.tensor([[3, 4, 5], [4, 5, 6]])},
        {5: torch.tensor([[3, 4, 6]] * 2)},
        {5: torch.tensor([[-1, 0, 1]] * 2)},
        {5: torch.tensor([[254, 255, 256]] * 2)},
        {6: torch.tensor([0, 2])},
        {10: 3},
    ],
    ids=["rows apart", "a gap", "before the cache", "past its end", "padded", "a window"],
)
def test_tokens_that_are_elsewhere_go_through_blocks(change):
    arguments = call(INT8, 3, 3)
    for place, value in change.items():
        arguments[place] = value
    assert flash.beginning(arguments[5], arguments[6], arguments[10], 256) is None
    assert op.choose(op.case_of(*arguments)).name == "flash"
    assert op(*arguments).equal(op.run(*arguments, implementation="blocks"))


def test_no_tokens_and_no_cache():
    for T, S in ((0, 8), (2, 0)):
        arguments = call(INT8, T, 0, S=S)
        assert op.run(*arguments, implementation="flash").equal(torch.zeros(B, 8, T, D))


CASE = CacheCase(
    "cuda", torch.bfloat16, 64, 128, 128, None, (9, 0), heads=8, queries=4, length=4096, keys=INT8, values=INT8
)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, True),
        ({"capability": (7, 5)}, "needs compute capability 8.0 or more"),
        ({"dtype": torch.float32}, "takes bf16 and fp16 q only"),
        ({"device": "cpu", "dtype": torch.float32, "capability": None}, True),
        ({"device": "meta"}, "runs on CPU and CUDA only"),
        ({"M": 63}, "is for 64 tokens and more"),
        ({"M": None}, "is for 64 tokens and more"),
        ({"N": 64}, "keys and values have heads of different sizes"),
        ({"K": 512, "N": 512}, "heads are larger than 256"),
        ({"mask": torch.bool}, "knows no mask and no softcap"),
        ({"softcap": True}, "knows no mask and no softcap"),
    ],
)
def test_what_it_takes(change, reason, monkeypatch):
    monkeypatch.setattr(flash, "FEWEST", 64)
    assert flash.supports(CacheCase(**{**vars(CASE), **change})) == reason


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **kwargs or {})
        for each in found if isinstance(found, tuple) else (found,):
            if isinstance(each, torch.Tensor) and not function.is_view:
                self.elements = max(self.elements, each.numel())
        return found


def test_no_tensor_is_larger_than_a_block_or_the_output():
    arguments = call(INT8, 100, 924, S=1024)
    with Largest() as largest:
        op.run(*arguments, implementation="flash")
    assert largest.elements == max(arguments[0].numel(), B * H * D * 100) < 100 * 1024


@pytest.mark.cuda
@each
@pytest.mark.parametrize("dtype", ON_GPU)
@pytest.mark.parametrize("T, first", [(1, 0), (64, 0), (65, 63), (100, 151)])
def test_on_a_gpu(form, dtype, T, first):
    arguments = call(form, T, first, D=128, dtype=dtype, device="cuda")
    y, expected = op.run(*arguments, implementation="flash"), op.run(*arguments, implementation="reference")
    assert (y.double() - expected.double()).norm() <= ON_GPU[dtype] * expected.double().norm()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ON_GPU)
@pytest.mark.parametrize("name", ["flash", "blocks"])
def test_chunks_as_they_were_on_a_gpu(name, dtype):
    arguments = call(INT8, 65, 63, D=128, dtype=dtype, device="cuda")
    new = [torch.randn(B, H, 65, 128, device="cuda", dtype=dtype) for _ in range(2)]
    arguments += [None, None, None, *new, arguments[5]]
    y, expected = op.run(*arguments, implementation=name), op.run(*arguments, implementation="reference")
    assert (y.double() - expected.double()).norm() <= ON_GPU[dtype] * expected.double().norm()


@pytest.mark.cuda
def test_a_chunk_on_a_gpu_needs_little_memory(monkeypatch):
    """2048 tokens of 32 query heads at the end of 32768, whose scores would be 8.6 GB in fp32."""
    monkeypatch.setattr(flash, "ELEMENTS", 1 << 23)
    S, T = 32768, 2048
    cache = [INT8.empty(1, 8, S, 128, "cuda") for _ in range(2)]
    q, positions = torch.randn(1, 32, T, 128, device="cuda").bfloat16(), torch.arange(S - T, S, device="cuda")[None]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    op(q, *cache[0], *cache[1], positions, None, None, 0.1, 0.0, 0)
    assert torch.cuda.max_memory_allocated() - before < 0.25e9


@pytest.mark.cuda
def test_a_cuda_graph_is_recorded_without_asking():
    arguments = call(INT8, 64, 100, D=64, dtype=torch.bfloat16, device="cuda")
    expected = op.run(*arguments, implementation="flash")
    with torch.cuda.stream(torch.cuda.Stream()):
        op.run(*arguments, implementation="blocks")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op.run(*arguments, implementation="flash")
    graph.replay()
    torch.cuda.synchronize()
    assert (y.double() - expected.double()).norm() <= 1e-2 * expected.double().norm()
