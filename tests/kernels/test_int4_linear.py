"""The packed layout of int4_linear. What it computes: test_linear.py, but for its group sizes."""

import pytest
import torch
from aograph.kernels import rounding
from aograph.kernels.int4_linear import GROUP_SIZES, int4_linear, pack, unpack
from hypothesis import given, settings
from hypothesis import strategies as st

SPEC = rounding.Spec(bits=4, group_size=64, symmetric=False)
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])


@pytest.fixture(autouse=True)
def _gpu_when_asked_for(request):
    asked = "device" in request.fixturenames and request.getfixturevalue("device") == "cuda"
    if (asked or request.node.get_closest_marker("cuda")) and not torch.cuda.is_available():
        pytest.skip("no GPU")


def test_layout_byte_by_byte():
    weight = torch.randn(100, 128)
    q, scale_zero = pack(weight, 64)
    assert (q.shape, q.dtype) == ((2, 128, 32), torch.uint8)
    assert (scale_zero.shape, scale_zero.dtype) == ((2, 128, 2), torch.float32)
    rounded = rounding.minmax(weight, SPEC)
    for n, k in [(0, 0), (31, 5), (32, 5), (63, 127), (64, 64), (99, 127)]:
        byte = q[n // 64, k, n % 32].item()
        assert (byte >> 4 if n % 64 >= 32 else byte & 15) == rounded.q[n, k]
        assert scale_zero[k // 64, n].tolist() == [rounded.scale[n, k // 64], rounded.zero[n, k // 64]]
    assert not scale_zero[:, 100:].any()


@pytest.mark.skipif(not AVX512, reason="another layout of ATen's")
def test_layout_is_that_of_aten():
    weight = torch.randn(128, 192)
    codes = rounding.minmax(weight, SPEC).q.int()
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    assert torch.equal(pack(weight, 64)[0].view(128, 96), theirs)


@device
@settings(max_examples=12, deadline=None)
@given(
    N=st.integers(1, 140),
    groups=st.integers(1, 3),
    g=st.sampled_from(GROUP_SIZES),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    algorithm=st.sampled_from(list(rounding.ALGORITHMS)),
)
def test_pack_and_back(N, groups, g, dtype, algorithm, device):
    weight = torch.randn(N, groups * g, dtype=dtype, device=device)
    back = unpack(*pack(weight, g, algorithm), g, N)
    rounded = rounding.ALGORITHMS[algorithm](weight, rounding.Spec(4, g, symmetric=False))
    torch.testing.assert_close(back, rounded.dequantize(dtype), rtol=0, atol=torch.finfo(dtype).eps * 8)
    assert back.is_contiguous()


@pytest.mark.parametrize("algorithm", rounding.ALGORITHMS)
def test_packing_in_pieces_changes_nothing(algorithm, monkeypatch):
    weight = torch.randn(333, 128)
    whole = pack(weight, 32, algorithm)
    monkeypatch.setitem(rounding.CHUNK, "cpu", 1000)
    assert all(torch.equal(a, b) for a, b in zip(whole, pack(weight, 32, algorithm), strict=True))


@device
@pytest.mark.parametrize("g", GROUP_SIZES)
def test_group_sizes(g, device):
    for dtype, tolerance in (torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-5):
        weight = torch.randn(130, 3 * g, dtype=dtype, device=device) + torch.arange(3).repeat_interleave(g).to(device)
        weight = weight.to(dtype)
        q, scale_zero = pack(weight, g)
        exact = unpack(q, scale_zero.double(), g, 130)
        for M in (1, 20, 70):
            x = torch.randn(M, 3 * g, dtype=dtype, device=device)
            arguments = x, q, scale_zero, g, 130
            for each in int4_linear:
                if each.supports(int4_linear.case_of(*arguments)) is True:
                    y = int4_linear.run(*arguments, implementation=each.name)
                    expected = x.double() @ exact.T
                    assert (y.double() - expected).norm() <= tolerance * expected.norm(), (each.name, dtype, M)


def test_what_cannot_be_packed_is_said():
    with pytest.raises(ValueError, match=r"int4 groups are of .* not 48"):
        pack(torch.ones(4, 96), 48)
    with pytest.raises(ValueError, match="no whole groups of 64: K must be a multiple"):
        pack(torch.ones(4, 96), 64)
    with pytest.raises(ValueError, match="no rounding algorithm 'best'"):
        pack(torch.ones(4, 64), 64, "best")
    q, scale_zero = pack(torch.ones(4, 64), 64)
    with pytest.raises(ValueError, match="group_size is 48; expected one of"):
        int4_linear(torch.ones(1, 64), q, scale_zero, 48, 4)
    with pytest.raises(ValueError, match=r"q is uint8 \[1, 64, 32\] on cpu; expected uint8 \[2, 64, 32\]"):
        int4_linear(torch.ones(1, 64), q, scale_zero, 64, 65)


@pytest.mark.cuda
@pytest.mark.parametrize("algorithm", rounding.ALGORITHMS)
def test_workspace_of_packing(algorithm):
    weight = torch.randn(65536, 4096, dtype=torch.bfloat16, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = pack(weight, 64, algorithm)
    output = sum(part.numel() * part.element_size() for part in result)
    assert torch.cuda.max_memory_allocated() - before - output < 256 << 20
