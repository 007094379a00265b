"""The Triton kernels without a GPU: that they compile for one, and, interpreted, what they compute.

On a GPU they run in test_linear.py.
"""

import contextlib
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")
INTERPRETED = """
import torch
from triton.runtime import interpreter

from aograph.kernels import float8_linear, int4_linear, int8_linear, triton_linear

patch = interpreter._patch_lang_tensor  # which in Triton 3.6 takes an int of a 1-element array: NumPy 2.4 refuses

def patch_for_numpy(tensor, scope):
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

interpreter._patch_lang_tensor = patch_for_numpy
triton_linear._multiprocessors = lambda device: 16
torch.manual_seed(0)
for M, N, K, g in [(1, 70, 1024, 64), (17, 65, 128, 32), (33, 3, 512, 256)]:
    # fp16, as the interpreter multiplies the bit patterns of bf16
    weight, bias, x = torch.randn(N, K).half(), torch.randn(N).half(), torch.randn(M, K).half()
    q, scale = int8_linear.pack(weight)
    codes, pairs = int4_linear.pack(weight, g)
    exact8 = q.double() * scale.double()[:, None]
    exact4 = int4_linear.unpack(codes, pairs.double(), g, N)
    y8 = triton_linear.int8_linear(x, q, scale, bias)
    in_groups, scales = int8_linear.pack(weight, group_size=g)
    exact8g = in_groups.double() * scales.double().repeat_interleave(g, 1)
    y8g = triton_linear.int8_linear(x, in_groups, scales, bias)
    y4 = triton_linear.int4_linear(x, codes, pairs, g, N, bias)
    e4m3, channels = float8_linear.pack(weight)
    exactf = e4m3.double() * channels.double()[:, None]
    yf = triton_linear.float8_linear(x, e4m3, channels, bias)  # here, as below 8.9, by its bits
    for y, exact in (y8, exact8), (y8g, exact8g), (y4, exact4), (yf, exactf):
        expected = x.double() @ exact.T + bias.double()
        assert (y - expected).norm() <= 2e-3 * expected.norm(), (M, N, K, g)
    transposed = triton_linear.int4_transposed(codes, pairs, g)
    torch.testing.assert_close(transposed.T[:N].double(), exact4, rtol=1e-3, atol=1e-6)
codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
codes = codes[~codes.float().isnan()]
for part in codes.split(16):  # every code by itself
    rows = torch.eye(len(part)).half()
    y = triton_linear.float8_linear(rows, part[None], torch.ones(1).half(), None)
    assert torch.equal(y.flatten().float(), part.float()), part
x, q, scale = torch.randn(3, 33).half(), torch.ones(5, 33, dtype=torch.int8), torch.ones(5).half()
y = triton_linear.int8_linear(x, q, scale, None)
torch.testing.assert_close(y, x.sum(1, keepdim=True).expand(3, 5), rtol=2e-3, atol=1e-2)
"""


def test_what_they_compute():
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env={"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def kernels(architecture: int, dtype: str, parts: int):
    """Each kernel as it is launched: its argument types and constants, warps and stages."""
    from aograph.kernels import triton_linear as t

    sizes = dict.fromkeys(["M", "N", "K", "k_per_part"], "i32")
    y, bias = ("*fp32", None) if parts > 1 else (dtype, dtype)
    for g in (0, 32) if parts > 1 else (0, 256):
        for _, BM, BN, BK, warps, stages in t.INT8_TILES:
            types = {"x": dtype, "q": "*i8", "scale": dtype, "bias": bias, "y": y, **sizes}
            constants = {"GROUP": g, "BM": BM, "BN": BN, "BK": min(BK, g or BK), "PARTS": parts, "FLOAT8_BITS": False}
            yield t.int8_kernel, types, constants, warps, stages
            if g == 0:
                float8 = {"q": "*fp8e4nv"} if architecture >= 89 else {}
                yield t.int8_kernel, types | float8, constants | {"FLOAT8_BITS": not float8}, warps, stages
    for _, BM, BN, BK, warps, stages in t.INT4_TILES:
        g = 64 if parts > 1 else 32
        types = {"x": dtype, "q": "*u8", "scale_zero": dtype, "bias": bias, "y": y, **sizes}
        constants = {"GROUP": g, "BM": BM, "BN": BN, "BK": min(BK, g), "PARTS": parts}
        yield t.int4_kernel, types, constants, warps, stages
    types = {"parts": "*fp32", "bias": "*bf16", "y": "*bf16", "N": "i32", "total": "i32"}
    yield t.add_parts_kernel, types, {"PARTS": 16, "BLOCK": 512}, 4, 3
    types = {"q": "*u8", "scale_zero": "*fp32", "w": "*fp32", "K": "i32", "sz_stride": "i32"}
    yield t.int4_transposed_kernel, types, {"GROUP": 64, "BK": 32}, 4, 3


@pytest.mark.parametrize("architecture, dtype, parts", [(80, "*fp16", 1), (90, "*bf16", 4)])
def test_they_compile(architecture, dtype, parts):
    import triton
    from triton.backends.compiler import GPUTarget

    for kernel, types, constants, warps, stages in kernels(architecture, dtype, parts):
        constants |= {name: None for name, type_ in types.items() if type_ is None}
        signature = {name: types.get(name) or "constexpr" for name in kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in types}
        source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
        options = {"num_warps": warps, "num_stages": stages}
        triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def test_splitting_k():
    from aograph.kernels.triton_linear import _parts

    assert _parts(tiles=1000, steps=100, multiprocessors=132) == 1
    assert _parts(tiles=64, steps=112, multiprocessors=132) == 4
    assert _parts(tiles=1, steps=8, multiprocessors=132) == 2
    assert _parts(tiles=1, steps=10000, multiprocessors=132) == 16


@pytest.mark.cuda
def test_more_than_2_to_the_31_weights():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    from aograph.kernels import triton_linear

    q = torch.zeros(2**31 // 4096 + 64, 4096, dtype=torch.int8, device="cuda")
    q[-1] = 1
    x, scale = torch.ones(2, 4096, dtype=torch.bfloat16, device="cuda"), torch.ones(len(q), device="cuda").bfloat16()
    y = triton_linear.int8_linear(x, q, scale, None)
    assert (y[:, -1] == 4096).all() and not y[:, :-1].any()


@pytest.fixture
def triton_linear(monkeypatch):
    """The module as it is under torch.export on a machine with a GPU of 132 multiprocessors; there need be none."""
    from aograph.kernels import triton_linear

    monkeypatch.setattr(torch.cuda, "device_of", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(triton_linear, "_multiprocessors", lambda _: 132)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    return triton_linear


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("name, codes", [("int8_linear", torch.int8), ("float8_linear", torch.float8_e4m3fn)])
@pytest.mark.parametrize("K, launches", [(256, 1), (4096, 2)])
def test_launches_become_nodes_of_an_exported_graph(triton_linear, K, launches, name, codes, capability, monkeypatch):
    monkeypatch.setattr(triton_linear, "capability", lambda device: capability)

    class Linear(torch.nn.Module):
        def forward(self, x, q, scale):
            return getattr(triton_linear, name)(x, q, scale, None)

    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(4, K, device="cuda", dtype=torch.bfloat16)
        q = torch.empty(192, K, device="cuda", dtype=codes)
        scale = torch.empty(192, device="cuda", dtype=torch.bfloat16)
        exported = torch.export.export(Linear(), (x, q, scale), strict=False)
    names = [node.name for node in exported.graph.nodes if "triton_kernel_wrapper" in node.name]
    assert len(names) == launches  # the kernel, and the sum of its parts where K is split
    assert exported.graph.output_node().args[0][0].meta["val"].shape == (4, 192)


def test_the_largest_of_a_dynamic_size(triton_linear):
    sizes = []

    class Look(torch.nn.Module):
        def forward(self, x):
            sizes.append(triton_linear.largest(x.shape[0]))
            return x + 1

    M = torch.export.Dim("M", min=2, max=100)
    torch.export.export(Look(), (torch.ones(5),), dynamic_shapes=({0: M},), strict=False)
    assert set(sizes) == {100} and triton_linear.largest(7) == 7
