"""The packed weight of float8_linear. What it computes: test_linear.py."""

import pytest
import torch
from aograph.kernels import linear
from aograph.kernels.float8 import FLOAT8
from aograph.kernels.float8_linear import float8_linear, pack, unpack
from aograph.kernels.op import Case


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_pack_and_back(dtype):
    weight = torch.randn(50, 96).to(dtype)
    q, scale = pack(weight)
    assert (q.dtype, q.shape, scale.dtype, scale.shape) == (FLOAT8, (50, 96), dtype, (50,))
    back = unpack(q, scale)
    assert back.dtype is dtype
    off = (back.double() - weight.double()).abs()
    smallest = scale.double()[:, None] * 2.0**-10  # half a step of the subnormal codes
    assert (off <= weight.double().abs() * (2.0**-4 + 2.0**-8) + smallest).all()


def test_channels_know_nothing_of_each_other():
    weight = torch.randn(8, 64) * torch.logspace(-6, 6, 8)[:, None]
    weight[3] = 0
    q, scale = pack(weight)
    for n in range(8):
        alone = pack(weight[n : n + 1])
        assert torch.equal(q[n].float(), alone[0][0].float()) and scale[n] == alone[1][0]
    assert not unpack(q, scale)[3].any()


def test_shapes_that_are_no_whole_vectors():
    for N, K in [(1, 1), (3, 33), (5, 127), (65, 40), (129, 7)]:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            q, scale = pack(torch.randn(N, K).to(dtype))
            x, bias = torch.randn(4, K).to(dtype), torch.randn(N).to(dtype)
            expected = x.double() @ (q.double() * scale.double()[:, None]).T + bias.double()
            for each in float8_linear:
                if each.supports(float8_linear.case_of(x, q, scale)) is True:
                    y = float8_linear.run(x, q, scale, bias, implementation=each.name)
                    assert (y - expected).norm() <= 1e-2 * expected.norm(), (each.name, N, K, dtype)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)])
def test_the_plan_on_a_gpu(capability, monkeypatch):
    monkeypatch.setattr(linear, "TRITON", True)
    case = Case("cuda", torch.bfloat16, None, 4096, 4096, None, capability)
    assert float8_linear.plan(case, 128, None) == "dequantize"
    assert float8_linear["triton"].supports(Case("cuda", torch.bfloat16, 1, 4096, 4096, None, capability)) is True
