import argparse

import pytest
import torch

from bench import decode
from bench.decode_step import HEAD
from bench.device import Ceilings

OPTIONS = argparse.Namespace(device="cpu", width=512, layers=1, window=8)
LIMITS = Ceilings(read=1e9, matmul=1e12)


@pytest.fixture(scope="module")
def worker():
    """A worker that runs the module as it is, as the doors to compile it are tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(decode.Worker, "compiled", lambda self: self.model)
        yield decode.Worker("bf16", OPTIONS)


@torch.no_grad()
def test_a_batch_is_compiled_and_measured(worker, monkeypatch):
    monkeypatch.setattr(decode, "STEPS", (2, 3))
    found = worker.compile(3)
    assert found["error"] < 0.02
    row = worker.measure(LIMITS)
    linear = sum(m.weight.nbytes for m in worker.model.modules() if isinstance(m, torch.nn.Linear))
    cache = 2 * 3 * 1 * 8 * HEAD * 2
    assert row["read GB"] == round((linear + cache) / 1e9, 3)
    assert row["tokens/s"] == pytest.approx(3e3 / row["ms"], rel=1e-2)
    assert worker.state[1].item() == decode.FIRST + 3 + 3 + row["steps"]


class Replies:
    """A contender that answers from a list."""

    def __init__(self, name, *answers):
        self.name, self.answers, self.failure, self.orders = name, list(answers), "", []

    def order(self, *order):
        if not self.failure:
            self.orders.append(order[0])

    def answer(self, until=None):
        if self.failure:
            return {}
        found = self.answers.pop(0)
        self.failure = found if isinstance(found, str) else ""
        return {} if self.failure else found


def test_contenders_are_compared_and_failures_stay():
    slow = {"ms": 2.0 * decode.HOPELESS + 1}
    bf16 = Replies("bf16", {}, {"ms": 2.0}, {}, {"ms": 4.0})
    ours = Replies("int4wo", {"compile s": 1}, {"ms": 1.0}, {}, {"ms": 1.0})
    broken = Replies("torchao-int4", "no device")
    hopeless = Replies("torchao-int8", {}, slow)
    contenders, base = [bf16, ours, broken, hopeless], {}
    rows = [row for batch in (1, 4) for row in decode.compare(contenders, batch, False, 9, LIMITS, base)]
    assert [row.get("x bf16") for row in rows[:3]] == [1.0, 2.0, None]
    assert rows[1]["compile s"] == 1
    assert rows[2]["failure"] == rows[6]["failure"] == "no device"
    assert rows[3]["ms"] == slow["ms"] and "skipped" in rows[7]["failure"]
    assert rows[5]["x bf16"] == 4.0
    assert hopeless.orders == ["compile", "measure"]
    assert "no device" in decode.table(rows)


def test_in_turn_each_ends_before_the_next_begins():
    log = []

    class Logged(Replies):
        def order(self, *order):
            log.append((self.name, "order"))

        def answer(self, until=None):
            log.append((self.name, "answer"))
            return {}

    decode.compiled([Logged("a"), Logged("b")], 1, True, 9)
    assert log == [("a", "order"), ("a", "answer"), ("b", "order"), ("b", "answer")]


def contender(pipe, alive: bool):
    class Process:
        exitcode = -9

        def join(self):
            pass

        def is_alive(self):
            return alive

        def terminate(self):
            self.terminated = True

    found = decode.Contender.__new__(decode.Contender)
    found.name, found.failure, found.pipe, found.process = "int4wo", "", pipe, Process()
    return found


def test_a_process_that_dies_is_a_failure(capsys):
    class Ended:
        def poll(self, timeout):
            return True

        def recv(self):
            raise EOFError

        def send(self, order):
            raise BrokenPipeError

    dead = contender(Ended(), alive=False)
    dead.order("compile", 1)
    assert dead.answer() == {}
    assert dead.failure == "the process ended with -9"
    assert "int4wo" in capsys.readouterr().err


def test_a_process_that_does_not_answer_in_time_is_ended():
    class Silent:
        def poll(self, timeout):
            return False

    late = contender(Silent(), alive=True)
    assert late.answer(until=0.0) == {}
    assert late.failure == "no answer in time" and late.process.terminated
