import pytest
import torch
from aograph.kernels import cuda_scaled_linear, scaled_tuning
from aograph.kernels.cuda_linear import CAPABILITIES
from aograph.kernels.cuda_scaled_linear import ScaledPlan
from aograph.kernels.sparse24 import decompress

KINDS = [(torch.int8, False), (torch.float8_e4m3fn, False), (torch.int8, True), (torch.bfloat16, True)]


@pytest.mark.parametrize("codes, sparse", KINDS)
def test_what_is_drawn_fits_together(codes, sparse):
    made = scaled_tuning.draw(codes, sparse, 30, 160, 1024, device="cpu")
    y = made.x.double() @ made.weight.double().T
    if sparse:
        assert torch.equal(decompress(made.q, made.indices).float(), made.weight.float())
    if made.scale is not None:
        y = y * made.x_scale.double() * made.scale.double()
    assert ((scaled_tuning.expected(made).double() - y).norm() / y.norm()) < 1e-5


def test_blocks_have_something_to_do(monkeypatch):
    properties = type("Properties", (), {"multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    plan = ScaledPlan(1, 1, 4, 1, 128, 256, 8)
    assert scaled_tuning.worthwhile(plan, 28672, 4096, 2048, 1)
    assert not scaled_tuning.worthwhile(plan, 256, 4096, 256, 1)
    assert not scaled_tuning.worthwhile(ScaledPlan(8, 1, 4, 1, 64, 8, 4), 57344, 8192, 1, 1)


@pytest.mark.cuda
@pytest.mark.parametrize("codes, sparse", KINDS)
def test_the_fastest_is_one_of_the_plans(codes, sparse):
    if torch.cuda.get_device_capability() not in CAPABILITIES:
        pytest.skip("the kernel is for another architecture")
    told = []
    tokens = [None] * (len(cuda_scaled_linear.TOKENS) - 2) + [512, None]
    found = scaled_tuning.fastest(codes, sparse, 2048, 1024, tokens, each=lambda *args: told.append(args))
    plans = {plan for _, _, _, plan in told}
    assert len(found) == len(tokens) and found[-2] in plans and all(error < 1e-2 for _, _, error, plan in told if plan)
