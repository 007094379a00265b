from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from aograph.kernels import cuda_scaled_linear, scaled_tuning, tuning
from aograph.kernels.cuda_linear import CAPABILITIES
from aograph.kernels.cuda_scaled_linear import ScaledPlan
from aograph.kernels.scaled_tuning import candidates
from aograph.kernels.sparse24 import decompress

FLOAT8 = torch.float8_e4m3fn
KINDS = [(torch.int8, False), (FLOAT8, False), (torch.int8, True), (FLOAT8, True), (torch.bfloat16, True)]


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


ONE, FOUR, DENSE = (ScaledPlan(share, 1, 4, 1, 64, 8, 4) for share in (1, 4, 2))
N, K, COUNT = 64, 2048, len(cuda_scaled_linear.TOKENS)


@pytest.fixture
def without_gpu(monkeypatch):
    """Kernels give what they should; what ran is listed, as the plan and whether it was dependent, with the times."""

    def run(plan, x, x_scale, x_zero, q, indices, scale, sums, bias, dtype, dependent):
        ran.append((plan, dependent))
        weight = q if indices is None else decompress(q, indices)
        return scaled_tuning.expected(scaled_tuning.Codes(x, x_scale, q, indices, scale, weight)).to(dtype)

    def time_calls(calls):
        ran.clear()
        calls[-1]()
        plan, dependent = ran[-1] if ran else (None, True)
        return times[plan] if dependent else times[plan] + 1

    ran, times = [], {}
    properties = SimpleNamespace(multi_processor_count=4, L2_cache_size=1 << 16)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(cuda_scaled_linear, "run", run)
    monkeypatch.setattr(cuda_scaled_linear, "plan", lambda codes, sparse, M, N, K: DENSE)
    monkeypatch.setattr(scaled_tuning, "compile_all", list)
    monkeypatch.setattr(tuning, "time_calls", time_calls)
    monkeypatch.setattr(scaled_tuning, "candidates", lambda codes, sparse, tokens: iter([ONE, FOUR]))
    return times


def fastest(codes, sparse, told=None):
    tokens = [1, *[None] * (COUNT - 1)]
    told = [] if told is None else told
    return scaled_tuning.fastest(codes, sparse, N, K, tokens, lambda *each: told.append(each), device="cpu")[0]


@pytest.mark.parametrize("codes, sparse", KINDS)
@pytest.mark.parametrize("best", [ONE, FOUR], ids=["one", "four"])
def test_the_least_time_is_chosen(best, codes, sparse, without_gpu):
    without_gpu |= {None: 9.0, DENSE: 9.0, ONE: 5.0, FOUR: 5.0} | {best: 3.0}
    told = []
    assert fastest(codes, sparse, told) == best
    assert all(M == 1 and error < tuning.TOLERANCE for M, _, error, _ in told)
    times = {plan: us for _, us, _, plan in told}
    assert times[best] == 3.5  # the mean of calls that may start early and of those that may not
    assert times.get(None) == {True: 9.0, False: None}[sparse]


def test_what_is_sparse_has_a_plan_even_where_a_dense_product_is_faster(without_gpu):
    without_gpu |= {None: 1.0, DENSE: 1.0, ONE: 5.0, FOUR: 4.0}
    for codes, sparse in KINDS[2:]:
        told = []
        found = fastest(codes, sparse, told)
        assert found == FOUR and found.behind
        assert (None, 1.0) in [(plan, us) for _, us, _, plan in told]


def test_cublaslt_stands_against_float8_alone_and_where_no_plan_does_against_what_is_sparse(without_gpu, monkeypatch):
    without_gpu |= {None: 1.0, ONE: 5.0, FOUR: 4.0}
    monkeypatch.setattr(cuda_scaled_linear, "plan", lambda *_: "others were faster for so many tokens")
    assert fastest(torch.int8, False) == FOUR == fastest(FLOAT8, False)  # cuBLASLt takes no case of a CPU
    op = scaled_tuning.float8_scaled_linear
    for each in op.implementations:
        if each.name == "cublaslt":
            free = replace(each, function=op.oracle.function, supports=lambda case: True)
    monkeypatch.setattr(op, "implementations", [free])
    assert fastest(torch.int8, False) == FOUR and fastest(FLOAT8, False) is None
    told = []
    assert fastest(FLOAT8, True, told) == FOUR and (None, 1.0) in [(plan, us) for _, us, _, plan in told]
    assert all(error < tuning.TOLERANCE for _, _, error, _ in told)


def test_where_no_plan_gives_every_multiprocessor_work_all_are_measured(without_gpu, monkeypatch):
    without_gpu |= {None: 9.0, DENSE: 9.0, ONE: 5.0, FOUR: 4.0}
    monkeypatch.setattr(scaled_tuning, "worthwhile", lambda *_: False)
    assert fastest(torch.int8, False) == FOUR


def test_a_kernel_that_is_wrong_is_an_error(without_gpu, monkeypatch):
    without_gpu |= {None: 9.0, DENSE: 9.0, ONE: 5.0, FOUR: 4.0}
    right = cuda_scaled_linear.run
    monkeypatch.setattr(cuda_scaled_linear, "run", lambda plan, *rest: right(plan, *rest) * (1 + (plan == FOUR) / 50))
    with pytest.raises(RuntimeError, match=rf"share=4.*wrong by 2.\de-02 for torch.int8 x \[1, {K}\] and y \[1, {N}\]"):
        fastest(torch.int8, True)


@pytest.mark.parametrize(
    "codes, sparse, sizes, answer",
    [
        (torch.int8, False, (8, 16), True),
        (torch.int8, False, (8, 24), "K is not a multiple of 16"),
        (torch.int8, True, (8, 16), "K is not a multiple of 128"),
        (torch.bfloat16, True, (12, 128), "N is not a multiple of 8"),
        (FLOAT8, False, (128, 128, 128), "there are no scales of blocks"),
    ],
)
def test_what_the_kernel_takes(codes, sparse, sizes, answer):
    assert scaled_tuning.takes(codes, sparse, *sizes) == answer
    if answer is True:
        plans = list(candidates(codes, sparse, 8))
        assert any(plan.fits(*sizes, codes.itemsize, sparse) for plan in plans)


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
