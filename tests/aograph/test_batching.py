import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import aograph
from aograph import InputError
from aograph.artifact import load
from aograph.batching import Engine, EngineError, QueueFull, Stopped
from tests.models.zoo import llama

SAMPLED = {"do_sample": True, "temperature": 1.3, "top_k": 50}


@pytest.fixture(scope="module")
def loaded(language_model):
    return load(language_model.path)


@pytest.fixture
def artifact(loaded, monkeypatch):
    """The artifact, whose steps a test may replace."""
    monkeypatch.setattr(loaded, "decode", loaded.decode)
    monkeypatch.setattr(loaded, "prefill", loaded.prefill)
    return loaded


@pytest.fixture
def go(artifact):
    """While it is clear no decoding step ends; a prompt still gets its first token."""
    go, decode = threading.Event(), artifact.decode

    def held(*inputs):
        assert go.wait(30)
        return decode(*inputs)

    artifact.decode = held
    go.set()
    yield go
    go.set()


def prompt_of(length, seed=0):
    return torch.randint(1, 4000, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(artifact, prompt, count, **options):
    """What generate gives for a prompt alone."""
    return artifact.generate(torch.tensor([prompt]), count, **options)[0, len(prompt) :].tolist()


def mixed():
    """Ten requests, more than rows: short and long, greedy and sampling."""
    sampling = [{}, {**SAMPLED, "seed": 1}, {"eos_token_id": []}, {**SAMPLED, "seed": 2, "top_p": 0.9}, {}]
    return [(prompt_of(1 + 3 * i, i), 4 + 7 * i % 12, sampling[i % 5]) for i in range(10)]


@pytest.fixture(scope="module")
def expected(loaded):
    """What the mixed requests get alone."""
    return [alone(loaded, prompt, count, **options) for prompt, count, options in mixed()]


# --- what comes out ----------------------------------------------------------------------------------------


def test_each_request_gets_what_it_would_get_alone(artifact, expected):
    with Engine(artifact) as engine:
        requests = [engine.submit(prompt, count, **options) for prompt, count, options in mixed()]
        assert [list(request) for request in requests] == expected
        assert [request.result() for request in requests] == expected
        assert {request.finish_reason for request in requests} <= {"length", "stop"}


def test_packed_caches(packed_cache):
    artifact = load(packed_cache.path)
    requests = [(prompt_of(1 + 3 * i, i), 4 + 7 * i % 12) for i in range(8)]
    expected = [alone(artifact, *request) for request in requests]
    with Engine(artifact) as engine:
        for tensor in engine._cache:  # as a request that went wrong leaves them
            tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.fill_(77)
        assert [list(request) for request in [engine.submit(*each) for each in requests]] == expected


def test_submissions_from_several_threads(artifact, expected):
    with Engine(artifact) as engine, ThreadPoolExecutor(5) as threads:
        found = threads.map(lambda request: list(engine.submit(request[0], request[1], **request[2])), mixed())
        assert list(found) == expected


def test_rows_decode_together(artifact, go):
    steps, decode = [], artifact.decode
    artifact.decode = lambda *inputs: steps.append(inputs[1].flatten().tolist()) or decode(*inputs)
    with Engine(artifact) as engine:
        steps.clear()
        go.clear()
        for seed in range(2):
            engine.submit(prompt_of(4, seed), 12, eos_token_id=[])
        go.set()
    assert 11 <= len(steps) <= 12  # the first tokens come from prefill; one row may be a step ahead


def test_requests_start_in_the_order_in_which_they_came(artifact, go):
    started, prefill = [], artifact.prefill
    artifact.prefill = lambda ids, *more: started.append(ids.shape[1]) or prefill(ids, *more)
    with Engine(artifact) as engine:
        for length in (5, 2, 9, 1, 7, 3):
            engine.submit(prompt_of(length), 6)
    assert started == [5, 2, 9, 1, 7, 3]


def test_a_token_that_ends_a_text(artifact):
    prompt = prompt_of(6, 3)
    free = alone(artifact, prompt, 12, **SAMPLED, seed=5, eos_token_id=[])
    end = free[7]
    with Engine(artifact) as engine:
        request = engine.submit(prompt, 12, **SAMPLED, seed=5, eos_token_id=end)
        assert request.result(30) == free[: free.index(end) + 1]
        assert request.finish_reason == "stop"


def test_without_a_seed_draws_differ(artifact):
    with Engine(artifact) as engine:
        a, b = (engine.submit(prompt_of(3), 16, do_sample=True, temperature=20.0, eos_token_id=[]) for _ in range(2))
        assert a.result(30) != b.result(30)


def test_async_iteration_gives_each_token_once_and_in_order(artifact, expected):
    async def collect(requests):
        async def tokens(request):
            return [token async for token in request]

        return await asyncio.gather(*map(tokens, requests))

    with Engine(artifact) as engine:
        requests = [engine.submit(prompt, count, **options) for prompt, count, options in mixed()]
        assert asyncio.run(collect(requests)) == expected
        assert asyncio.run(collect(requests)) == expected  # and again, when all has come


def test_an_abandoned_event_loop_cancels_the_request(artifact, go):
    async def first(request):
        async for token in request:
            return token

    with Engine(artifact) as engine:
        go.clear()
        request = engine.submit(prompt_of(4), 20, eos_token_id=[])
        assert asyncio.run(first(request)) == request.tokens[0]
        go.set()
        assert len(request.result(30)) < 20
        assert request.finish_reason == "cancelled"


@pytest.mark.cuda
def test_on_a_gpu(tmp_path):
    model, inputs = llama(use_cache=False)
    fast = aograph.optimize(model, "int8wo", inputs, device="cuda", compile=False)
    fast.save(tmp_path / "model.pt2", max_length=48, batch_size=2)
    artifact = load(tmp_path / "model.pt2")
    expected = [alone(artifact, prompt, count, **options) for prompt, count, options in mixed()]
    with Engine(artifact) as engine:
        requests = [engine.submit(prompt, count, **options) for prompt, count, options in mixed()]
        assert [request.result(60) for request in requests] == expected


# --- the queue ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queue", [0, 2])
def test_the_queue_is_bounded(artifact, go, queue):
    expected = alone(artifact, prompt_of(4), 5)
    with Engine(artifact, queue=queue) as engine:
        go.clear()
        accepted = [engine.submit(prompt_of(4), 5) for _ in range(2 + queue)]
        with pytest.raises(QueueFull, match=f"the queue of {queue} holds: try again later"):
            engine.submit(prompt_of(4), 5)
        assert engine.running + engine.waiting == 2 + queue
        go.set()
        assert [request.result(30) for request in accepted] == [expected] * (2 + queue)
        assert engine.submit(prompt_of(4), 5).result(30) == expected
    assert engine.running == engine.waiting == 0


def test_who_hears_of_the_end_finds_a_free_row(artifact):
    with Engine(artifact, queue=0) as engine:
        for _ in range(20):
            engine.submit(prompt_of(2), 1).result(30)


def test_cancelling_frees_the_row(artifact, go):
    expected = alone(artifact, prompt_of(5), 6)
    with Engine(artifact, queue=1) as engine:
        go.clear()
        running = [engine.submit(prompt_of(3), 40, eos_token_id=[]) for _ in range(2)]
        waiting = engine.submit(prompt_of(5), 6)
        running[0].cancel()
        go.set()
        assert waiting.result(30) == expected
        assert len(running[0].result(30)) < 40 and running[0].finish_reason == "cancelled"
        running[1].cancel()
        running[1].result(30)
        running[1].cancel()
        assert running[1].finish_reason in ("cancelled", "length")


def test_cancelling_what_waits(artifact, go):
    with Engine(artifact, queue=1) as engine:
        go.clear()
        running = [engine.submit(prompt_of(3), 5) for _ in range(2)]
        waiting = engine.submit(prompt_of(5), 6)
        waiting.cancel()
        go.set()
        assert waiting.result(30) == [] and waiting.finish_reason == "cancelled"
        assert [request.result(30) for request in running] == [alone(artifact, prompt_of(3), 5)] * 2


def test_waiting_for_a_result_has_its_time(artifact, go):
    with Engine(artifact) as engine:
        go.clear()
        request = engine.submit(prompt_of(3), 5)
        with pytest.raises(TimeoutError, match="of up to 5 tokens"):
            request.result(0.05)
        go.set()


# --- failures ----------------------------------------------------------------------------------------------


def failing_once(step, when):
    """The step, but the call that `when(*inputs)` picks first raises."""
    failures = iter([RuntimeError("out of memory\nand a long trace")])

    def run(*inputs):
        if when(*inputs) and (failure := next(failures, None)):
            raise failure
        return step(*inputs)

    return run


def test_a_prompt_that_fails_fails_alone(artifact):
    expected = [alone(artifact, prompt_of(n), 8) for n in (3, 4)]
    artifact.prefill = failing_once(artifact.prefill, lambda ids, *_: ids.shape[1] == 7)
    with Engine(artifact) as engine:
        first, bad, last = (engine.submit(prompt_of(n), 8) for n in (3, 7, 4))
        with pytest.raises(EngineError, match=r"the artifact failed after 0 tokens: out of memory$"):
            bad.result(30)
        assert bad.finish_reason == "error" and isinstance(bad.error.__cause__, RuntimeError)
        assert [first.result(30), last.result(30)] == expected


def test_a_step_that_fails_fails_those_that_run(artifact, go):
    expected = alone(artifact, prompt_of(5), 8)
    artifact.decode = failing_once(artifact.decode, lambda _, positions, __: 6 in positions)
    with Engine(artifact) as engine:
        go.clear()
        running = [engine.submit(prompt_of(4), 8, eos_token_id=[]) for _ in range(2)]
        waiting = engine.submit(prompt_of(5), 8)
        go.set()
        for request in running:
            with pytest.raises(EngineError, match=r"failed after [23] tokens"):
                list(request)
        assert waiting.result(30) == expected
        assert not engine.stopping


def test_logits_that_are_no_numbers_fail_the_request_that_draws_from_them(artifact):
    expected, decode = alone(artifact, prompt_of(4), 8), artifact.decode

    def broken(tokens, positions, cache):
        logits = decode(tokens, positions, cache)
        logits[positions[:, 0] > 15] = torch.nan
        return logits

    artifact.decode = broken
    with Engine(artifact) as engine:
        bad, good = engine.submit(prompt_of(14), 8, **SAMPLED, eos_token_id=[]), engine.submit(prompt_of(4), 8)
        with pytest.raises(EngineError, match="failed after 3 tokens"):
            bad.result(30)
        assert good.result(30) == expected


def test_what_a_row_held_before_does_not_matter(artifact):
    expected = alone(artifact, prompt_of(5), 8)
    with Engine(artifact) as engine:
        for tensor in engine._cache:
            tensor.fill_(torch.nan)
        assert engine.submit(prompt_of(5), 8).result(30) == expected


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failure_of_the_engine_itself_is_told_to_all(artifact, monkeypatch):
    engine = Engine(artifact)
    monkeypatch.setattr(engine, "_step", lambda: 1 / 0)
    with pytest.raises(Stopped, match=r"division by zero.*not complete"):
        engine.submit(prompt_of(4), 8, eos_token_id=[]).result(30)
    with pytest.raises(Stopped, match=r"division by zero.*takes no more requests"):
        engine.submit(prompt_of(4), 8)
    assert engine.stopping and engine.running == engine.waiting == 0
    engine.close()


# --- the end -----------------------------------------------------------------------------------------------


def test_leaving_answers_what_was_accepted(artifact):
    with Engine(artifact) as engine:
        requests = [engine.submit(prompt, count, **options) for prompt, count, options in mixed()]
    assert {request.finish_reason for request in requests} <= {"length", "stop"}
    with pytest.raises(Stopped, match="stopping"):
        engine.submit(prompt_of(3), 1)


def test_leaving_by_an_exception_does_not(artifact, go):
    with pytest.raises(KeyError), Engine(artifact) as engine:
        go.clear()
        requests = [engine.submit(prompt_of(4), 40, eos_token_id=[]) for _ in range(3)]
        threading.Timer(0.2, go.set).start()
        raise KeyError
    for request in requests:
        with pytest.raises(Stopped, match="stopping"):
            list(request)


def test_closing_twice_takes_the_earlier_end(artifact, go):
    engine = Engine(artifact)
    go.clear()
    request = engine.submit(prompt_of(4), 40, eos_token_id=[])
    closing = threading.Thread(target=engine.close)
    closing.start()
    threading.Timer(0.2, go.set).start()
    engine.close(0)
    closing.join(30)
    with pytest.raises(Stopped):
        request.result(30)


# --- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt, count, options, message",
    [
        ([], 4, {}, "no tokens"),
        ([5, -1], 4, {}, "holds -1: token ids are integers from 0 to 4095"),
        ([5, 4096], 4, {}, "holds 4096"),
        ([5, 1.5], 4, {}, r"holds 1\.5"),
        ([True], 4, {}, "holds True"),
        ([[5]], 4, {}, r"holds \[5\]"),
        ([5], 0, {}, "at least one new token"),
        ([5] * 1000, 1, {}, "a prompt of 1000 tokens.*at most"),
        ([5], 1000, {}, "max_new_tokens = 1000.*at most"),
        ([5], 4, {"do_sample": True, "temperature": 0.0}, "temperature is 0.0"),
        ([5], 4, {"do_sample": True, "temperature": 1e-30}, "temperature is 1e-30"),
        ([5], 4, {"do_sample": True, "temperature": 10**400}, "temperature is 1000"),
        ([5], 4, {"do_sample": True, "top_k": 0}, "top_k is 0"),
        ([5], 4, {"do_sample": True, "top_p": 1.5}, "top_p is 1.5"),
        ([5], 4, {"do_sample": True, "seed": 2**70}, "seed is"),
        ([5], 4, {"do_sample": True, "seed": "a"}, "seed is 'a'"),
    ],
)
def test_bad_requests(engine, prompt, count, options, message):
    with pytest.raises(InputError, match=message):
        engine.submit(prompt, count, **options)


@pytest.fixture(scope="module")
def engine(loaded):
    with Engine(loaded) as engine:
        yield engine


def test_tensors_are_prompts(engine, loaded):
    assert engine.submit(torch.tensor([5, 6, 7]), 4).result(30) == alone(loaded, [5, 6, 7], 4)


def test_an_engine_needs_a_language_model(few_tokens):
    with pytest.raises(InputError, match="no language model"):
        Engine(load(few_tokens.path))


def test_a_queue_has_a_size(loaded):
    with pytest.raises(InputError, match="queue is -1"):
        Engine(loaded, queue=-1)
