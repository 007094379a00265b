import concurrent.futures
import json
import signal
import subprocess
import sys
import threading
import time
import types

import httpx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from aograph import InputError
from aograph.artifact import load
from aograph.batching import Engine
from aograph.cli import main
from tests.models.zoo import MINI

pytest.importorskip("uvicorn")

from aograph.serve import LARGEST_BODY, Server, Text, application, listen, tokenizer_of

MOST = 24  # new tokens
TOKENIZER = Tokenizer.from_file(str(MINI / "tokenizer.json"))
PROMPT = TOKENIZER.encode("Once upon").ids


@pytest.fixture(scope="module")
def artifact(language_model):
    """Whose texts end by their length alone."""
    artifact = load(language_model.path)
    artifact.generation["eos_token_id"] = []
    return artifact


def running(artifact, tokenizer, queue=8, grace=30):
    """A server on a free port of the loopback: `engine`, `server`, its `thread`, and an HTTP `client`."""
    engine = Engine(artifact, queue)
    server = Server(engine, application(engine, tokenizer, MOST), grace)
    listening = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    client = httpx.Client(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=60)
    return types.SimpleNamespace(engine=engine, server=server, thread=thread, client=client)


def stop(served):
    served.client.close()
    served.server.stop(0)
    served.thread.join(30)
    assert not served.thread.is_alive()


@pytest.fixture(scope="module")
def client(artifact):
    """Of a server that tests share."""
    served = running(artifact, TOKENIZER)
    yield served.client
    stop(served)


@pytest.fixture
def go(artifact, monkeypatch):
    """While it is clear no decoding step ends; a prompt still gets its first token."""
    go, decode = threading.Event(), artifact.decode

    def held(*inputs):
        assert go.wait(30)
        return decode(*inputs)

    monkeypatch.setattr(artifact, "decode", held)
    go.set()
    yield go
    go.set()


@pytest.fixture
def served(artifact, go):
    """A server of a test's own, whose steps it may hold."""
    served = running(artifact, TOKENIZER, queue=1)
    yield served
    go.set()
    stop(served)


def alone(artifact, prompt, count, **options):
    """What generate gives for a prompt alone."""
    return artifact.generate(torch.tensor([prompt]), count, **options)[0, len(prompt) :].tolist()


def events_of(lines):
    """(event, data) of server-sent events, as they come."""
    for line in lines:
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield kind, json.loads(line.removeprefix("data: "))


def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# --- answers -----------------------------------------------------------------------------------------------


def test_health(client, artifact):
    response = client.get("/health")
    assert response.status_code == 200
    assert response.json() == {
        "status": "ready", "model": str(artifact.path), "recipe_sha256": artifact.about["recipe_sha256"],
        "batch_size": 2, "max_length": artifact.generation["max_length"], "running": 0, "waiting": 0,
    }  # fmt: skip


@pytest.mark.parametrize("prompt", [{"prompt": "Once upon"}, {"input_ids": PROMPT, "prompt": None}])
def test_an_answer(client, artifact, prompt):
    response = client.post("/generate", json={**prompt, "max_new_tokens": 9})
    expected = alone(artifact, PROMPT, 9)
    assert response.status_code == 200
    assert response.json() == {
        "text": TOKENIZER.decode(expected), "tokens": expected, "finish_reason": "length"
    }  # fmt: skip


def test_a_stream(client, artifact):
    with client.stream(
        "POST", "/generate", json={"prompt": "Once upon", "max_new_tokens": 9, "stream": True}
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *tokens, (kind, end) = events_of(response.iter_lines())
    assert [token["token"] for _, token in tokens] == alone(artifact, PROMPT, 9) == end["tokens"]
    assert {kind for kind, _ in tokens} == {"token"} and kind == "end"
    assert end["text"].startswith("".join(token["text"] for _, token in tokens))
    assert end["finish_reason"] == "length"


def test_sampling(client, artifact):
    options = {"do_sample": True, "temperature": 1.4, "top_k": 40, "top_p": 0.9, "seed": 3}
    response = client.post("/generate", json={"input_ids": PROMPT, "max_new_tokens": 12, **options})
    assert response.json()["tokens"] == alone(artifact, PROMPT, 12, **options)


def test_as_many_tokens_as_there_may_be(client, artifact):
    free = artifact.generation["max_length"] - 10
    assert len(client.post("/generate", json={"input_ids": [5] * 10}).json()["tokens"]) == min(MOST, free)
    assert len(client.post("/generate", json={"input_ids": [5] * (free + 4)}).json()["tokens"]) == 6


def test_many_clients(client, artifact):
    """Sixteen at a time, streaming or not, on two rows: nothing is lost, wrong or out of order."""
    jobs = [{"input_ids": [5 + i] * (1 + i % 7), "max_new_tokens": 2 + i % 5, "stream": i % 2 == 1} for i in range(24)]
    jobs = [{**job, "do_sample": True, "seed": i} if i % 3 else job for i, job in enumerate(jobs)]

    def ask(job):
        while (response := client.post("/generate", json=job)).status_code == 429:
            time.sleep(0.02)
        return list(events_of(response.iter_lines()))[-1][1] if job["stream"] else response.json()

    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(ask, jobs))
    for job, answer in zip(jobs, answers, strict=True):
        sampling = {name: job[name] for name in ("do_sample", "seed") if name in job}
        assert answer["tokens"] == alone(artifact, job["input_ids"], job["max_new_tokens"], **sampling)


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body, message",
    [
        (b"", "the body is not JSON"),
        (b"\xff", "the body is not JSON"),
        (b"[" * 100_000, "the body is not JSON"),
        (b"[1, 2]", "not a JSON object"),
        ({"promt": "a"}, "unknown field 'promt'; did you mean 'prompt'?"),
        ({}, "give either prompt, a text, or input_ids"),
        ({"prompt": "a", "input_ids": [5]}, "give either prompt, a text, or input_ids"),
        ({"prompt": 5}, "prompt is 5; a string is expected"),
        ({"prompt": ""}, "the prompt has no tokens"),
        (b'{"prompt": "\\ud800"}', "prompt is no valid text"),
        ({"input_ids": "5"}, 'input_ids is "5"; a list of integers is expected'),
        ({"input_ids": [5, "a"]}, "the prompt holds 'a'"),
        ({"input_ids": [4096]}, "the prompt holds 4096: token ids are integers from 0 to 4095"),
        ({"input_ids": [5] * 1000}, "a prompt of 1000 tokens"),
        ({"input_ids": [5], "max_new_tokens": MOST + 1}, f"this server gives at most {MOST}"),
        ({"input_ids": [5], "max_new_tokens": 0}, "at least one new token"),
        ({"input_ids": [5], "max_new_tokens": True}, "max_new_tokens is true; an integer is expected"),
        ({"input_ids": [5], "temperature": 0.5}, 'temperature would have no effect: add "do_sample": true'),
        ({"input_ids": [5], "do_sample": True, "temperature": 0}, "temperature is 0"),
        (b'{"input_ids": [5], "do_sample": true, "temperature": NaN}', "temperature is nan"),
        ({"input_ids": [5], "do_sample": True, "top_k": 1.5}, "top_k is 1.5; an integer is expected"),
        ({"input_ids": [5], "stream": 1}, "stream is 1; true or false is expected"),
    ],
)  # fmt: skip
def test_bad_requests(client, body, message):
    response = client.post("/generate", content=body if isinstance(body, bytes) else json.dumps(body))
    assert response.status_code == 400
    assert list(response.json()) == ["error"] and message in response.json()["error"]


def test_a_body_that_is_too_long(client):
    response = client.post("/generate", content=b" " * (LARGEST_BODY + 1))
    assert response.status_code == 413 and "longer than" in response.json()["error"]


@pytest.mark.parametrize("method, path, status", [("GET", "/generate", 405), ("GET", "/other", 404)])
def test_other_paths_and_methods(client, method, path, status):
    response = client.request(method, path)
    assert response.status_code == status and "GET /health and POST /generate" in response.json()["error"]


def test_a_full_queue(served, go, artifact):
    go.clear()
    job = {"input_ids": PROMPT, "max_new_tokens": 4}
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        asked = [threads.submit(served.client.post, "/generate", json=job) for _ in range(3)]
        until(lambda: served.engine.running + served.engine.waiting == 3)
        health = served.client.get("/health").json()
        assert health["running"] + health["waiting"] == 3  # how many had a row before the first step is held
        refused = served.client.post("/generate", json=job)
        go.set()
        assert [each.result().json()["tokens"] for each in asked] == [alone(artifact, PROMPT, 4)] * 3
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
    assert "try again later" in refused.json()["error"]


def test_an_artifact_without_a_tokenizer(artifact):
    served = running(artifact, tokenizer_of({"tokenizer.model": b""}))
    refused = served.client.post("/generate", json={"prompt": "a"})
    answer = served.client.post("/generate", json={"input_ids": PROMPT, "max_new_tokens": 3}).json()
    job = {"input_ids": PROMPT, "max_new_tokens": 3, "stream": True}
    streamed = list(events_of(served.client.post("/generate", json=job).iter_lines()))
    stop(served)
    expected = alone(artifact, PROMPT, 3)
    assert refused.status_code == 400 and "holds no tokenizer.json: give input_ids" in refused.json()["error"]
    assert answer == {"tokens": expected, "finish_reason": "length"}
    assert streamed == [*(("token", {"token": token}) for token in expected), ("end", answer)]


# --- what may happen meanwhile -----------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_cancels_its_request(served, go, monkeypatch, stream):
    requests, submit = [], served.engine.submit
    monkeypatch.setattr(served.engine, "submit", lambda *a, **k: requests.append(submit(*a, **k)) or requests[-1])
    go.clear()
    job = {"input_ids": [5], "max_new_tokens": MOST, "stream": stream}
    if stream:
        with served.client.stream("POST", "/generate", json=job) as response:
            assert next(events_of(response.iter_lines()))[0] == "token"
    else:
        with pytest.raises(httpx.ReadTimeout):
            served.client.post("/generate", json=job, timeout=0.3)
    until(lambda: requests and requests[0].cancelled)
    go.set()
    assert len(requests[0].result(30)) < MOST and requests[0].finish_reason == "cancelled"
    assert served.client.post("/generate", json={"input_ids": [5], "max_new_tokens": 2}).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_failing_artifact(served, artifact, monkeypatch, stream):
    def fail(*_):
        raise RuntimeError("out of memory")

    job = {"input_ids": PROMPT, "max_new_tokens": 4, "stream": stream}
    with monkeypatch.context() as patch:
        patch.setattr(artifact, "decode", fail)
        response = served.client.post("/generate", json=job)
    message = {"error": "the artifact failed after 1 tokens: out of memory"}
    if stream:
        assert [kind for kind, _ in events_of(response.iter_lines())] == ["token", "error"]
        assert list(events_of(response.iter_lines()))[-1][1] == message
    else:
        assert (response.status_code, response.json()) == (500, message)
    assert served.client.post("/generate", json=job).status_code == 200


def test_stopping_answers_what_runs(served, go, artifact):
    go.clear()
    job = {"input_ids": PROMPT, "max_new_tokens": 8, "stream": True}
    with served.client.stream("POST", "/generate", json=job) as response:
        found = events_of(response.iter_lines())
        next(found)
        served.server.handle_exit(signal.SIGTERM, None)
        until(lambda: served.engine.stopping)
        health, refused = served.client.get("/health"), served.client.post("/generate", json=job)
        go.set()
        (_, end) = list(found)[-1]
    assert (health.status_code, health.json()["status"]) == (503, "stopping")
    assert refused.status_code == 503 and "takes no more requests" in refused.json()["error"]
    assert end["tokens"] == alone(artifact, PROMPT, 8)
    served.thread.join(30)
    assert not served.thread.is_alive()


def test_a_second_signal_ends_the_wait(served, go):
    go.clear()
    job = {"input_ids": PROMPT, "max_new_tokens": 8, "stream": True}
    with served.client.stream("POST", "/generate", json=job) as response:
        found = events_of(response.iter_lines())
        next(found)
        served.server.handle_exit(signal.SIGINT, None)
        until(lambda: served.engine.stopping)
        served.server.handle_exit(signal.SIGINT, None)
        until(lambda: served.engine._deadline <= time.monotonic())
        go.set()
        kind, content = list(found)[-1]
    assert kind == "error" and "the answer is not complete" in content["error"]


# --- text --------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 4095) | st.integers(100, 300), max_size=30))
def test_pieces_of_text_make_the_whole(tokens):
    text = Text(TOKENIZER)
    pieces = "".join([text.add(token) for token in tokens])
    whole = TOKENIZER.decode(tokens)
    assert whole.startswith(pieces)
    assert set(whole[len(pieces) :]) <= {"\N{REPLACEMENT CHARACTER}"} or whole.endswith("\N{REPLACEMENT CHARACTER}")


def test_characters_come_whole():
    text = Text(TOKENIZER)
    pieces = [text.add(token) for token in TOKENIZER.encode("a 日 b").ids]
    assert "".join(pieces) == "a 日 b" and "日" in pieces and "" in pieces


# --- the command -------------------------------------------------------------------------------------------


def test_the_command_ends_cleanly_at_a_signal(language_model, artifact):
    command = [sys.executable, "-m", "aograph", "serve", str(language_model.path), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        ready = process.stdout.readline()
        assert ready.startswith(f"serving {language_model.path} on http://127.0.0.1:"), process.stderr.read()
        sampling = {"do_sample": True, "temperature": 2.0, "seed": 0}  # greedy, the text would end at once
        job = {"prompt": "Once upon", "max_new_tokens": 30, "stream": True, **sampling}
        with httpx.stream("POST", f"{ready.split()[-1]}/generate", json=job, timeout=60) as response:
            found = events_of(response.iter_lines())
            next(found)
            process.send_signal(signal.SIGTERM)
            kind, end = list(found)[-1]
        assert kind == "end" and end["tokens"] == alone(artifact, PROMPT, 30, eos_token_id=0, **sampling)
        assert process.wait(30) == 0 and process.stderr.read() == ""
    finally:
        process.kill()
        process.communicate()


def test_the_command_says_what_is_wrong(language_model, capsys, monkeypatch):
    def fails(*arguments):
        assert main(["serve", *map(str, arguments)]) == 1
        return capsys.readouterr().err

    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert f"nothing can listen on 127.0.0.1 port {port}" in fails(language_model.path, "--port", port)
    assert "give another --host or --port" in fails(language_model.path, "--port", 1 << 20)
    assert "max_new_tokens is 0" in fails(language_model.path, "--max-new-tokens", 0)
    assert "queue is -1" in fails(language_model.path, "--queue", -1)
    monkeypatch.delitem(sys.modules, "aograph.serve")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "serving needs uvicorn: pip install 'aograph[serve]'" in fails(language_model.path)


def test_an_address_of_version_6():
    try:
        with listen("::1", 0) as listening:
            assert listening.getsockname()[0] == "::1"
    except InputError:
        pytest.skip("this machine has no IPv6")
