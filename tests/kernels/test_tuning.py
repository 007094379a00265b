"""Tuning: what is measured, what is chosen, what is kept; the measuring itself needs a GPU."""

from types import SimpleNamespace

import pytest
import torch
from aograph.kernels import cuda, cuda_linear, cuda_scaled_linear, int4_linear, int8_linear, plans, tuning
from aograph.kernels.cuda_linear import TOKENS, Plan
from aograph.kernels.cuda_scaled_linear import ScaledPlan
from torch import nn

BOTH = pytest.mark.parametrize("bits, group_size", [(4, 64), (8, None)], ids=["int4", "int8"])
N, K = 64, 1024
ONE, FOUR, WIDE = Plan("small", 1, 2, 64, 8, 4), Plan("small", 4, 2, 64, 8, 4), Plan("wide", 2, 4, 64, 16, 4)


@pytest.fixture
def gpu(monkeypatch):
    """Makes a GPU of so many multiprocessors, with 1 MB of L2, that is not there."""

    def make(multiprocessors):
        properties = SimpleNamespace(multi_processor_count=multiprocessors, L2_cache_size=1 << 20)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    return make


@pytest.fixture
def without_gpu(gpu, monkeypatch):
    """Kernels give what the op's reference gives; what ran is listed."""

    def run(plan, x, q, scales, bias, N, group_size, dependent=True):
        ran.append(plan)
        if q.dtype is torch.int8:
            return int8_linear.int8_linear.run(x, q, scales, bias, implementation="reference")
        return int4_linear.int4_linear.run(x, q, scales, group_size, N, bias, implementation="reference")

    ran: list[Plan] = []
    gpu(multiprocessors=4)
    monkeypatch.setattr(cuda_linear, "run", run)
    monkeypatch.setattr(tuning, "compile_all", list)
    monkeypatch.setattr(tuning, "candidates", lambda bits, tokens: iter([ONE, FOUR, WIDE]))
    return ran


def timed_as(monkeypatch, ran, times):
    """Microseconds by the plan that a call ran last; None: no kernel ran."""

    def time_calls(calls):
        ran.clear()
        calls[-1]()
        return times[ran[-1] if ran else None]

    monkeypatch.setattr(tuning, "time_calls", time_calls)


# --- candidates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", TOKENS)
def test_candidates(bits, tokens):
    plans = list(tuning.candidates(bits, tokens))
    assert plans and len({plan.blocks for plan in plans}) > 1
    kernels = {plan.kernel for plan in plans}
    assert kernels == ({"small"} if tokens < 16 else {"small", "wide"} if tokens == 16 else {"wide"})
    for plan in plans:
        if plan.kernel == "small":
            assert plan.tokens == tokens
            continue
        accumulators = plan.channels * plan.tokens / (plan.warps * 32)  # of a thread, in fp32
        assert accumulators + 40 <= min(65536 // plan.threads, 255)  # registers, for all else some, too
        assert plan.channels // plan.warps in (16, 32) and 16 <= plan.tokens <= 256


@BOTH
def test_a_large_shape_has_candidates_that_fit_it(bits, group_size, gpu):
    gpu(multiprocessors=132)
    for M, most in zip(tuning.MEASURED, TOKENS, strict=True):
        plans = [p for p in tuning.candidates(bits, most) if p.fits(6144, 4096, bits, group_size)]
        assert any(tuning.worthwhile(plan, 6144, 4096, M) for plan in plans), M


@pytest.mark.parametrize(
    "plan, N, K, M, answer",
    [
        (ONE, 64 * 4, 1024, 1, True),
        (ONE, 64 * 3, 1024, 1, False),  # most of the GPU would have nothing to do,
        (FOUR, 64 * 1, 1024, 1, True),  # unless blocks share K,
        (FOUR, 64 * 1, 1023, 1, False),  # of which each needs some
        (FOUR, 64 * 24, 1024, 1, True),
        (FOUR, 64 * 25, 1024, 1, False),  # there is work for all as it is
        (ONE, 64 * 1000, 1024, 1, True),
        (WIDE, 64 * 8, 1024, 16 * 6, True),
        (WIDE, 64 * 8, 1024, 16 * 6 + 1, False),  # tiles of tokens count, too
    ],
)
def test_worthwhile(plan, N, K, M, answer, gpu):
    gpu(multiprocessors=12)
    assert tuning.worthwhile(plan, N, K, M) is answer


def test_no_copy_of_a_weight_is_in_the_cache(gpu):
    gpu(multiprocessors=4)
    large, small = torch.empty(8 << 20, dtype=torch.uint8), torch.rand(25_000)
    assert len(tuning.cold([large])) == 2
    copies = tuning.cold([small, None])
    assert len(copies) * small.nbytes >= 3 << 20 and len(tuning.cold([small, None, small])) == 16
    assert len({copy[0].data_ptr() for copy in copies}) == len(copies)
    assert all(torch.equal(copy[0], small) and copy[1] is None for copy in copies)


def test_a_kernel_is_compiled_once_for_plans_that_share_it(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda, "kernel", lambda file, name, device, **defines: compiled.append((file, name, defines)))
    kernels = [("small_linear.cu", "int4_small", plan.defines(4, 64)) for plan in (ONE, FOUR)]
    tuning.compile_all([*kernels, ("wide_linear.cu", "int4_wide", WIDE.defines(4, 64))])
    assert sorted(name for _, name, _ in compiled) == ["int4_small", "int4_wide"]
    assert ("small_linear.cu", "int4_small", ONE.defines(4, 64)) in compiled


# --- what is chosen ------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("best", [None, ONE, FOUR, WIDE], ids=["dequantize", "one", "four", "wide"])
def test_the_least_time_is_chosen(best, bits, group_size, without_gpu, monkeypatch):
    times = {None: 4.0, ONE: 3.5, FOUR: 3.25, WIDE: 3.0} | {best: 1.0}
    timed_as(monkeypatch, without_gpu, times)
    told = []
    tokens = (1,) * (len(TOKENS) - 1) + (16,)
    plans = tuning.fastest(bits, N, K, group_size, tokens, lambda *each: told.append(each), device="cpu")
    assert plans == [best] * len(TOKENS)
    assert {(M, plan): us for M, us, _, plan in told} == {(M, plan): times[plan] for M in (1, 16) for plan in times}
    assert all(error < tuning.TOLERANCE for _, _, error, _ in told)


@BOTH
def test_a_kernel_that_is_wrong_is_an_error(bits, group_size, without_gpu, monkeypatch):
    right = cuda_linear.run
    monkeypatch.setattr(
        cuda_linear, "run", lambda plan, *rest, **how: right(plan, *rest, **how) * (1.02 if plan == FOUR else 1)
    )
    timed_as(monkeypatch, without_gpu, {None: 1.0, ONE: 1.0, FOUR: 1.0, WIDE: 1.0})
    wrong = rf"blocks=4.*wrong by 2.\de-02 for torch.bfloat16 x \[1, {K}\] and y \[1, {N}\]"
    with pytest.raises(RuntimeError, match=wrong):
        tuning.fastest(bits, N, K, group_size, (1,) * len(TOKENS), lambda *_: None, device="cpu")


def test_a_kernel_that_gives_nan_is_an_error(without_gpu, monkeypatch):
    monkeypatch.setattr(cuda_linear, "run", lambda plan, x, *_, **how: x.new_full((x.shape[0], N), torch.nan))
    timed_as(monkeypatch, without_gpu, {None: 1.0})
    with pytest.raises(RuntimeError, match="wrong by nan"):
        tuning.fastest(8, N, K, None, (1,) * len(TOKENS), lambda *_: None, device="cpu")


def test_groups_of_int8_are_measured_as_such(without_gpu, monkeypatch):
    given, right = [], cuda_linear.run

    def run(plan, x, q, scales, bias, N, group_size, **how):
        given.append((scales.shape, group_size))
        return right(plan, x, q, scales, bias, N, group_size, **how)

    monkeypatch.setattr(cuda_linear, "run", run)
    timed_as(monkeypatch, without_gpu, {None: 4.0, ONE: 1.0, FOUR: 2.0, WIDE: 2.0})
    plans = tuning.fastest(8, N, K, 128, (1,) * len(TOKENS), lambda *_: None, device="cpu")
    assert plans == [ONE] * len(TOKENS) and set(given) == {((N, K // 128), 128)}


def test_only_what_fits_is_measured(without_gpu, monkeypatch):
    timed_as(monkeypatch, without_gpu, {None: 4.0, ONE: 1.0})
    plans = tuning.fastest(8, N, 256, None, (1,) * len(TOKENS), lambda *_: None, device="cpu")
    assert plans == [ONE] * len(TOKENS)  # four blocks, or two, would have next to nothing of K


# --- what is kept --------------------------------------------------------------------------------------------------


@pytest.fixture
def forgotten():
    """Nothing read before or during the test is remembered."""
    cached = plans.table, cuda_linear.plan, cuda_scaled_linear.plan
    for each in cached:
        each.cache_clear()
    yield
    for each in cached:
        each.cache_clear()


def test_what_is_kept_counts_at_once(monkeypatch, tmp_path, forgotten):
    path = tmp_path / "plans.json"
    monkeypatch.setattr(plans, "shipped", lambda: tmp_path / "none.json")
    monkeypatch.setattr(plans, "tuned", lambda: path)
    monkeypatch.setattr(cuda_linear, "CAPABILITIES", {(9, 0)})
    monkeypatch.setattr(cuda, "available", lambda capability: True)
    op = int8_linear.int8_linear
    case = int8_linear.Case("cuda", torch.bfloat16, 1, N, K, None, (9, 0))
    assert op.choose(case).name != "cuda"
    tuning.keep(path, "int8wo", (N, K), [ONE] * len(TOKENS), {"gpu": "a"})
    assert op.choose(case).name == "cuda" and cuda_linear.plan(8, 1, N, K, None) == ONE
    tuning.keep(path, "int8wo", (N, 2 * K), [WIDE] * len(TOKENS), {"gpu": "b"})
    tuning.keep(path, "int8wo", (N, K), [None] * len(TOKENS), {"gpu": "b"})
    assert op.choose(case).name != "cuda"
    expected = {(N, K): [None] * len(TOKENS), (N, 2 * K): [WIDE] * len(TOKENS)}
    assert plans.read(path, "int8wo", Plan) == expected
    scaled = ScaledPlan(1, 1, 4, 1, 64, 8, 4)
    assert isinstance(cuda_scaled_linear.plan(torch.int8, True, 1, N, K), str)
    tuning.keep(path, "int8dq-sparse24", (N, K), [scaled] * len(cuda_scaled_linear.TOKENS), {"gpu": "b"})
    assert cuda_scaled_linear.plan(torch.int8, True, 1, N, K) == scaled
    assert plans.read(path, "int8wo", Plan) == expected
    op.choose.cache_clear()


# --- where and what ------------------------------------------------------------------------------------------------


def test_where_nothing_can_be_measured(monkeypatch):
    assert tuning.available(torch.device("cpu")) == "the kernels run on CUDA only"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tuning.available(torch.device("cuda")) == "torch sees no CUDA GPU here"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert tuning.available(torch.device("cuda:2")) == "torch sees 2 CUDA GPUs here, counted from 0"
    monkeypatch.setattr(tuning, "capability", lambda device: (8, 0))
    assert "compute capability 9.0" in tuning.available(torch.device("cuda:1"))
    monkeypatch.setattr(tuning, "capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda, "available", lambda capability: f"nothing compiles for {capability}")
    assert tuning.available(torch.device("cuda")) == "nothing compiles for (9, 0)"


@pytest.mark.parametrize(
    "linear, answer",
    [
        ((4, 64, 1024, 64), True),
        ((8, 8, 128, None), True),
        ((8, 64, 64, None), "K is not a multiple of 128"),
        ((8, 100, 128, None), "N is not a multiple of 8"),
        ((4, 64, 128, 256), "K is not a multiple of the group size 256"),
        ((8, 64, 128, 128), True),
        ((8, 64, 384, 256), "K is not a multiple of the group size 256"),
    ],
)
def test_what_the_kernels_take(linear, answer):
    assert tuning.takes(*linear) == answer
    bits, N, K, group_size = linear
    if answer is True:
        assert ONE.fits(N, K, bits, group_size)


@pytest.mark.cuda
@BOTH
def test_tuning_a_small_shape_on_a_gpu(bits, group_size, monkeypatch, tmp_path, forgotten):
    device = torch.device("cuda", torch.cuda.current_device())
    if (here := tuning.available(device)) is not True:
        pytest.skip(here)
    shape, told = (8192, 1024), []
    monkeypatch.setattr(tuning, "TOKENS", (8, 64))
    found = tuning.fastest(bits, *shape, group_size, (4, 64), lambda *each: told.append(each))
    assert {(M, plan) for M, _, _, plan in told} >= {(4, found[0]), (64, found[1]), (4, None), (64, None)}
    for M, chosen in zip((4, 64), found, strict=True):
        times = {plan: us for tokens, us, _, plan in told if tokens == M}
        assert len(times) > 4 and times[chosen] == min(times.values()) > 0.5
    path = tmp_path / "plans.json"
    monkeypatch.setattr(plans, "tuned", lambda: path)
    kept = [plan or next(plan for _, _, _, plan in told if plan) for plan in (found * len(TOKENS))[: len(TOKENS)]]
    tuning.keep(path, cuda_linear.KINDS[bits], shape, kept, {"gpu": torch.cuda.get_device_name()})
    linear = nn.Linear(shape[1], shape[0], bias=False, device=device, dtype=torch.bfloat16)
    module = int4_linear if bits == 4 else int8_linear
    op = module.int4_linear if bits == 4 else module.int8_linear
    packed = module.pack(linear.weight.detach(), group_size=group_size)
    rest = (group_size, shape[0]) if bits == 4 else ()
    x = torch.randn(4, shape[1], device=device, dtype=torch.bfloat16)
    assert op.choose(op.case_of(x, *packed, *rest)).name == "cuda"
    expected = op.run(x, *packed, *rest, implementation="reference").float()
    assert (op.run(x, *packed, *rest).float() - expected).norm() < tuning.TOLERANCE * expected.norm()
    op.choose.cache_clear()
