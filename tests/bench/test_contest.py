import argparse
import json
import os

import pytest

from bench import contest
from bench.contest import Contender, Contest
from bench.device import Ceilings

LIMITS = Ceilings(read=1e9, matmul=1e12)


class Replies:
    """A contender that answers from a list; all keep one log of orders and answers."""

    def __init__(self, name, *answers, log=None):
        self.name, self.answers, self.failure, self.log = name, list(answers), "", [] if log is None else log

    def order(self, *order):
        if not self.failure:
            self.log.append((self.name, order[0]))

    def answer(self, until=None):
        if self.failure:
            return {}
        self.log.append((self.name, "answer"))
        found = self.answers.pop(0)
        self.failure = found if isinstance(found, str) else ""
        return {} if self.failure else found

    def end(self):
        self.log.append((self.name, "end"))


def test_contenders_are_compared_and_failures_stay():
    slow = {"ms": 2.0 * contest.HOPELESS + 1}
    bf16 = Replies("bf16", {}, {"ms": 2.0}, {}, {"ms": 4.0})
    ours = Replies("int4wo", {"compile s": 1}, {"ms": 1.0}, {}, {"ms": 1.0})
    broken = Replies("torchao-int4", "no device")
    hopeless = Replies("torchao-int8", {}, slow)
    found = Contest([bf16, ours, broken, hopeless], "batch", LIMITS)
    rows = [row for batch in (1, 4) for row in found.rows(batch)]
    assert [row.get("x bf16") for row in rows[:3]] == [1.0, 2.0, None]
    assert rows[1]["compile s"] == 1
    assert rows[2]["failure"] == rows[6]["failure"] == "no device"
    assert rows[3]["ms"] == slow["ms"] and "skipped" in rows[7]["failure"]
    assert rows[5]["x bf16"] == 4.0
    assert [what for _, what in hopeless.log] == ["compile", "answer", "measure", "answer"]
    assert "no device" in contest.table(rows, ["batch", "ms"])


def test_those_that_compile_alone_are_done_before_the_rest_begin():
    log = []
    contenders = [Replies(name, {}, log=log) for name in "abcd"]
    assert Contest(contenders, "batch", LIMITS, alone="bd").compiled(1) == {name: {} for name in "abcd"}
    alone = [(name, what) for name in "bd" for what in ("compile", "answer")]
    assert log == [*alone, ("a", "compile"), ("c", "compile"), ("a", "answer"), ("c", "answer")]


class Pipe:
    """An end of a pipe that is closed once all orders are read."""

    def __init__(self, *orders):
        self.orders, self.sent = list(orders), []

    def recv(self):
        if not self.orders:
            raise EOFError
        return self.orders.pop(0)

    def send(self, answer):
        self.sent.append(answer)


def test_a_process_answers_orders_and_tells_of_errors(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(os, "environ", dict(os.environ))

    class Half:
        def __init__(self, name, options):
            assert (name, options) == ("int8wo", None)

        def compile(self, case):
            return {"half": 12 // case}

    pipe = Pipe(("compile", 2), ("compile", 0), ("compile", 3))
    with pytest.raises(EOFError):
        contest.serve(Half, "int8wo", None, str(tmp_path), 3, pipe)
    assert pipe.sent == [{"half": 6}, "ZeroDivisionError: integer division or modulo by zero", {"half": 4}]
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "3"
    assert os.environ["TRITON_CACHE_DIR"].startswith(str(tmp_path))
    assert "ZeroDivisionError" in capsys.readouterr().err


def contender(pipe, alive: bool):
    class Process:
        exitcode = -9

        def join(self):
            pass

        def is_alive(self):
            return alive

        def terminate(self):
            self.terminated = True

    return Contender("int4wo", Process(), pipe)


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


def test_a_run_prints_writes_and_ends_what_it_started(monkeypatch, tmp_path, capsys):
    log, threads = [], {}

    def start(make, name, options, caches, count):
        threads[name] = count
        return Replies(name, {"kernels": {"native": 3}}, {"ms": 2.0} if name == "bf16" else {"ms": 1.0}, log=log)

    monkeypatch.setattr(Contender, "start", start)
    monkeypatch.setattr(contest, "ceilings", lambda device: LIMITS)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    out = tmp_path / "out.json"
    options = contest.parser("bench", None, ["bf16", "a", "b"], autotune=["a"]).parse_args(
        ["--device", "cpu", "--contenders", "a", "b", "bf16", "b", "--json", str(out)]
    )
    contest.run(argparse.Namespace, options, "edge", [7], ["edge", "what", "x bf16"], {"layers": 2})
    written = json.loads(out.read_text())
    assert [(row["what"], row["edge"], row["x bf16"]) for row in written["rows"]] == [
        ("bf16", 7, 1),
        ("a", 7, 2),
        ("b", 7, 2),
    ]
    assert written["machine"]["layers"] == 2
    assert threads == {"bf16": 4, "a": 8, "b": 4}
    assert {name for name, what in log if what == "end"} == {"bf16", "a", "b"}
    assert "native × 3" in capsys.readouterr().out
