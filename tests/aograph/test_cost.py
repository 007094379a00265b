import pytest
import sympy
import torch

from aograph import cost, explain
from aograph.cost import KNOWN, Roofline, linear_cost, roofline
from tests.small_models import MLP

s, u = sympy.symbols("s u", positive=True, integer=True)
SLOW = Roofline("slow", bandwidth=100.0, half=1000.0, single=10.0)


def test_costs_are_in_the_graphs_symbols():
    found = linear_cost(s * u, N=8, K=4, weight_bytes=64, itemsize=2)
    assert found.bytes == 24 * s * u + 64 and found.operations == 64 * s * u
    fixed = linear_cost(sympy.Integer(3), 8, 4, 64, 2)
    assert (fixed.bytes, fixed.operations) == (3 * 12 * 2 + 64, 2 * 3 * 8 * 4)


def test_a_report_has_costs_in_symbols():
    report = explain(MLP().eval(), "int8wo", torch.randn(2, 3, 64))
    M = report.rows[0].shape.M
    assert len(M.free_symbols) == 2
    text = report.costs()
    for row in report.rows:
        assert row.name in text and str(linear_cost(M, row.shape.N, row.shape.K, row.bytes_before, 4).bytes) in text
    assert report.roofline.name in text


def test_seconds_are_those_of_what_limits():
    memory = cost.Cost(sympy.Integer(500), sympy.Integer(10))
    arithmetic = cost.Cost(sympy.Integer(1), sympy.Integer(50))
    times = {torch.float32: (5, 5), torch.bfloat16: (5, 0.05), torch.float16: (5, 0.05)}
    for dtype, expected in times.items():
        assert [float(SLOW.seconds(c, dtype)) for c in (memory, arithmetic)] == pytest.approx(expected)
    symbolic = SLOW.seconds(linear_cost(s, 8, 4, 64, 4), torch.float32)
    assert symbolic.free_symbols == {s}
    assert [float(symbolic.subs(s, M)) for M in (1, 100)] == pytest.approx([6.4, 640])


@pytest.mark.parametrize("N, K", [(64, 64), (4096, 4096), (11008, 4096), (1, 4096), (8, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("device", ["H100", "L4", "slow"])
def test_break_even_against_brute_force(N, K, dtype, device):
    line = SLOW if device == "slow" else Roofline(device, *KNOWN[device])
    weight_bytes = N * K * dtype.itemsize
    rate = line.half if dtype in cost.HALF else line.single

    def bound_by_arithmetic(M):
        found = linear_cost(sympy.Integer(M), N, K, weight_bytes, dtype.itemsize)
        return found.operations / rate >= found.bytes / line.bandwidth

    limit = line.break_even(N, K, weight_bytes, dtype)
    if limit is None:
        assert not any(bound_by_arithmetic(10**i) for i in range(9))
    else:
        assert bound_by_arithmetic(limit) and (limit == 1 or not bound_by_arithmetic(limit - 1))


def test_some_linears_are_never_bound_by_arithmetic():
    assert Roofline("H100", *KNOWN["H100"]).break_even(1, 4096, 8192, torch.bfloat16) is None


def test_smaller_weights_never_take_longer():
    line = Roofline("L4", *KNOWN["L4"])
    for M in (1, 100, 10000):
        times = [line.seconds(linear_cost(sympy.Integer(M), 4096, 4096, b, 2), torch.bfloat16) for b in (2**23, 2**25)]
        assert times[0] <= times[1]


def test_a_cpu_is_measured_once():
    here = roofline("cpu")
    assert here is roofline("cpu") and "CPU" in here.name
    assert min(here.bandwidth, here.half, here.single) > 1e6


@pytest.mark.cuda
def test_a_gpu_has_a_roofline():
    here = roofline("cuda:0")
    assert here.name == torch.cuda.get_device_properties(0).name
    assert here.bandwidth > 1e10 and here.half > here.single > 1e11
