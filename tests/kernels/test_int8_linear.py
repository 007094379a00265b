"""The packed weight of int8_linear. What it computes: test_linear.py."""

import pytest
import torch
from aograph.kernels import rounding
from aograph.kernels.int8_linear import int8_linear, pack, unpack
from aograph.kernels.op import Case
from aograph.kernels.rounding import GROUP_SIZES

device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])


def test_pack_and_back():
    weight = torch.randn(50, 96, dtype=torch.bfloat16)
    q, scale = pack(weight)
    assert (q.dtype, q.shape, scale.dtype, scale.shape) == (torch.int8, (50, 96), torch.bfloat16, (50,))
    off = (unpack(q, scale).float() - weight.float()).abs()
    assert (off <= scale.float()[:, None] * 0.501 + weight.float().abs() / 256).all()
    assert unpack(q, scale).dtype == torch.bfloat16


@pytest.mark.parametrize("g", GROUP_SIZES)
@pytest.mark.parametrize("algorithm", rounding.ALGORITHMS)
def test_pack_groups_and_back(algorithm, g):
    weight = torch.randn(50, 3 * g, dtype=torch.bfloat16) * torch.tensor([1, 100, 0.01]).repeat_interleave(g)
    weight = weight.bfloat16()
    q, scale = pack(weight, algorithm, g)
    assert (q.dtype, q.shape, scale.dtype, scale.shape) == (torch.int8, (50, 3 * g), torch.bfloat16, (50, 3))
    rounded = rounding.ALGORITHMS[algorithm](weight, rounding.Spec(8, g, symmetric=True))
    assert torch.equal(unpack(q, scale), rounded.dequantize(torch.bfloat16)) and unpack(q, scale).is_contiguous()
    for i in range(3):  # a group is what a channel would be
        part = weight[:, i * g : (i + 1) * g].contiguous()
        alone = pack(part, algorithm)
        assert torch.equal(q[:, i * g : (i + 1) * g], alone[0]) and torch.equal(scale[:, i], alone[1])


def test_groups_are_closer_than_channels():
    weight = torch.randn(64, 512) * torch.rand(512).mul(4).exp()
    squared = [(unpack(*pack(weight, "minmax", g)) - weight).square().sum() for g in (None, 256, 64, 32)]
    assert squared == sorted(squared, reverse=True) and squared[0] > 2 * squared[-1]


@pytest.mark.parametrize("group_size", [None, 32])
def test_pack_is_symmetric(group_size):
    weight = torch.randn(8, 64)
    q, scale = pack(weight, group_size=group_size)
    negated, same = pack(-weight, group_size=group_size)
    assert torch.equal(negated, -q) and torch.equal(scale, same)
    assert q.unflatten(1, (-1, group_size or 64)).abs().amax(2).eq(127).all()


def test_what_cannot_be_packed_is_said():
    with pytest.raises(ValueError, match="no rounding algorithm 'best'; there are minmax, mse"):
        pack(torch.ones(2, 2), "best")
    with pytest.raises(ValueError, match=r"int8 groups are of .* not 48"):
        pack(torch.ones(4, 96), group_size=48)
    with pytest.raises(ValueError, match="no whole groups of 64: K must be a multiple"):
        pack(torch.ones(4, 96), group_size=64)


def test_scales_of_no_groups_are_refused():
    q = torch.ones(4, 192, dtype=torch.int8)
    x = torch.ones(1, 192)
    for scale in (torch.ones(4, 1), torch.ones(4, 4), torch.ones(4, 0), torch.ones(3, 6), torch.ones(4, 6, 1)):
        with pytest.raises(ValueError, match=r"scale is .*; expected float32 \[4\] or \[4, 6\] or \[4, 3\] on cpu"):
            int8_linear(x, q, scale)
    with pytest.raises(ValueError, match=r"scale is float32 \[3\] on cpu; expected float32 \[4\] on cpu"):
        int8_linear(x, q, torch.ones(3))


@device
@pytest.mark.parametrize("g", GROUP_SIZES)
def test_group_sizes(g, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    for dtype, tolerance in (torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-5):
        for groups in (1, 3, 2048 // g + 1):  # the last more than the native kernel has in work
            spread = torch.logspace(-2, 0, groups, device=device).repeat_interleave(g)
            q, scale = pack((torch.randn(70, groups * g, device=device) * spread).to(dtype), group_size=g)
            exact = q.double() * scale.double().repeat_interleave(g, 1)
            for M in (1, 3, 20, 70):
                x = torch.randn(M, groups * g, device=device).to(dtype)
                case = int8_linear.case_of(x, q, scale)
                assert case.group_size == g
                expected = x.double() @ exact.T
                for each in int8_linear:
                    if each.supports(case) is True:
                        y = int8_linear.run(x, q, scale, None, implementation=each.name)
                        assert (y.double() - expected).norm() <= tolerance * expected.norm(), (each.name, dtype, M)


def test_shapes_that_are_no_whole_vectors():
    for N, K in [(1, 1), (3, 33), (5, 127), (65, 40), (70, 129)]:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            q, scale = pack(torch.randn(N, K, dtype=dtype))
            x, bias = torch.randn(4, K, dtype=dtype), torch.randn(N, dtype=dtype)
            expected = x.double() @ (q.double() * scale.double()[:, None]).T + bias.double()
            for each in int8_linear:
                if each.supports(int8_linear.case_of(x, q, scale)) is True:
                    y = int8_linear.run(x, q, scale, bias, implementation=each.name)
                    assert (y - expected).norm() <= 1e-2 * expected.norm(), (each.name, N, K, dtype)


def test_plan_on_a_gpu():
    case = Case("cuda", torch.bfloat16, None, 4096, 4096, None, (9, 0))
    assert int8_linear.choose(case).name == "dequantize"
    assert int8_linear.plan(case, 128, None) == "dequantize"


def test_what_takes_no_groups_says_so():
    case = Case("cpu", torch.bfloat16, 1, 4096, 4096, 64)
    assert "one scale for each channel only" in int8_linear["aten"].supports(case)
