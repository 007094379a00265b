"""The packed weight of int8_linear. What it computes: test_linear.py."""

import pytest
import torch
from aograph.kernels.int8_linear import int8_linear, pack, unpack
from aograph.kernels.op import Case


def test_pack_and_back():
    weight = torch.randn(50, 96, dtype=torch.bfloat16)
    q, scale = pack(weight)
    assert (q.dtype, q.shape, scale.dtype, scale.shape) == (torch.int8, (50, 96), torch.bfloat16, (50,))
    off = (unpack(q, scale).float() - weight.float()).abs()
    assert (off <= scale.float()[:, None] * 0.501 + weight.float().abs() / 256).all()
    assert unpack(q, scale).dtype == torch.bfloat16


def test_pack_is_symmetric():
    weight = torch.randn(8, 64)
    q, scale = pack(weight)
    negated, same = pack(-weight)
    assert torch.equal(negated, -q) and torch.equal(scale, same)
    assert q.abs().amax(1).eq(127).all()


def test_pack_knows_its_algorithms():
    with pytest.raises(ValueError, match="no rounding algorithm 'best'; there are minmax, mse"):
        pack(torch.ones(2, 2), "best")


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
