"""How an artifact does under concurrent load: called directly, through the engine, and by HTTP clients.

    python -m bench.serve [--dtype bfloat16] [--artifact model.pt2] [--requests 64]

Without --artifact, models/mini is saved first, for --batch-size rows. Each request is a piece of English text of 4 to
48 tokens and asks for 32 more; every third one samples with a seed. Clients ask one request after the other:

- direct: `Artifact.generate` from so many threads, one row each;
- engine: `Engine.submit` from so many threads, which batches them continuously;
- HTTP: streams of `POST /generate`, from so many clients in this process, of a real `aograph serve` on the loopback.

Each answer is compared with that of `generate` for the request alone, before. Wrong: another token, or one that was
streamed in another place than it has in the answer; lost: an error or no end. The exit status is 1 if there are any.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import httpx
import torch
from tabulate import tabulate

import aograph
from aograph import huggingface
from aograph.batching import Engine

from .cpu_linear import machine
from .perplexity import python_topics, tokens_of

MINI = Path(__file__).parents[1] / "models" / "mini"
PROMPT, NEW = (4, 48), 32  # tokens

Ask = Callable[["Job", Callable[[int], Any]], list[int]]  # calls back with each token, then gives all


@dataclass
class Job:
    """A request, and the new tokens that it should get."""

    prompt: list[int]
    sampling: dict[str, Any]
    expected: list[int] = field(default_factory=list)


@dataclass
class Answer:
    """Seconds to the first and to the last token, and whether the tokens are right."""

    first: float
    last: float
    tokens: int
    right: bool


def build(path: Path, options: argparse.Namespace) -> None:
    """Saves mini."""
    model, inputs = huggingface.load(MINI, getattr(torch, options.dtype), 32)
    fast = aograph.optimize(model, options.recipe, inputs, device=options.device, hand_over=True, compile=False)
    fast.save(path, max_length=PROMPT[1] + NEW, batch_size=options.batch_size, tokenizer=MINI)


def jobs_of(count: int) -> list[Job]:
    drawn = random.Random(0)
    text = tokens_of(MINI, python_topics(), limit=count * PROMPT[1]).tolist()
    starts = range(0, len(text), PROMPT[1])
    prompts = [text[start : start + drawn.randint(*PROMPT)] for start in starts]
    sampled = {"do_sample": True, "temperature": 0.8, "top_k": 50}
    return [Job(prompt, {**sampled, "seed": i} if i % 3 == 2 else {}) for i, prompt in enumerate(prompts)]


# --- ways to ask -------------------------------------------------------------------------------------------


def direct(artifact: aograph.Artifact) -> Ask:
    def ask(job: Job, seen: Callable[[int], Any]) -> list[int]:
        prompt = torch.tensor([job.prompt])
        tokens = artifact.generate(prompt, NEW, **job.sampling, on_token=lambda _, token: seen(token))
        return tokens[0, len(job.prompt) :].tolist()

    return ask


def through(engine: Engine) -> Ask:
    def ask(job: Job, seen: Callable[[int], Any]) -> list[int]:
        request = engine.submit(job.prompt, NEW, **job.sampling)
        for token in request:
            seen(token)
        return request.result()

    return ask


def over_http(address: str) -> Ask:
    own = threading.local()

    def ask(job: Job, seen: Callable[[int], Any]) -> list[int]:
        if not hasattr(own, "client"):
            own.client = httpx.Client(base_url=address, timeout=60)
        body = {"input_ids": job.prompt, "max_new_tokens": NEW, "stream": True, **job.sampling}
        with own.client.stream("POST", "/generate", json=body) as response:
            if response.status_code != 200:
                raise RuntimeError(f"{response.status_code}: {response.read().decode()}")
            for line in response.iter_lines():
                if line.startswith("data: "):
                    data = json.loads(line.removeprefix("data: "))
                    if "token" not in data:
                        return data["tokens"]
                    seen(data["token"])
        raise RuntimeError("the stream has no end")

    return ask


@contextlib.contextmanager
def server(path: Path) -> Iterator[str]:
    """The address of an `aograph serve`, in a process of its own."""
    command = [sys.executable, "-m", "aograph", "serve", str(path), "--port", "0", "--max-new-tokens", str(NEW)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
        process.send_signal(signal.SIGTERM)
        if process.wait(60):
            raise SystemExit(f"the server ended with {process.returncode}")
    finally:
        process.kill()
        process.wait()


# --- measuring ---------------------------------------------------------------------------------------------


def timed(ask: Ask, job: Job) -> Answer:
    start, seen, times = time.perf_counter(), [], []

    def see(token: int) -> None:
        seen.append(token)
        times.append(time.perf_counter() - start)

    tokens = ask(job, see)
    return Answer(times[0], time.perf_counter() - start, len(tokens), tokens == seen == job.expected)


def load(ask: Ask, jobs: Sequence[Job], clients: int, seconds: float) -> tuple[float, list[Answer], int]:
    """Seconds in all, the answers, and how many requests had none; none starts after `seconds`."""
    left: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        left.put(job)
    answers: list[Answer] = []
    errors: list[Exception] = []
    start = time.perf_counter()

    def client() -> None:
        while time.perf_counter() - start < seconds:
            try:
                answers.append(timed(ask, left.get_nowait()))
            except queue.Empty:
                return
            except Exception as error:
                errors.append(error)

    with ThreadPoolExecutor(clients) as threads:
        for done in [threads.submit(client) for _ in range(clients)]:
            done.result()
    for error in errors[:3]:
        print(f"lost: {error!r}", file=sys.stderr)
    return time.perf_counter() - start, answers, len(errors)


def percentiles(values: Sequence[float]) -> list[str]:
    """p50 and p99, milliseconds."""
    ordered = sorted(values)
    return [f"{1e3 * ordered[ceil(share * len(ordered)) - 1]:.0f}" for share in (0.5, 0.99)]


def row(way: str, clients: int, found: tuple[float, list[Answer], int]) -> list[Any]:
    seconds, answers, lost = found
    wrong = sum(not answer.right for answer in answers)
    if not answers:
        return [way, clients, 0, *["-"] * 6, wrong, lost]
    return [
        way, clients, len(answers), f"{sum(a.tokens for a in answers) / seconds:.0f}", f"{len(answers) / seconds:.1f}",
        *percentiles([a.last for a in answers]), *percentiles([a.first for a in answers]), wrong, lost,
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--artifact", type=Path, help="with rows of at least 80 tokens, and mini's tokens")
    parser.add_argument("--recipe", default="int8wo")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--requests", type=int, default=64, help="for each line of the table")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4, 8], help="that call directly")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16], help="of the engine, and of the server")
    parser.add_argument("--seconds", type=float, default=60, help="for each line; no request starts later")
    options = parser.parse_args()
    about = {**machine(), "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        path = options.artifact or Path(folder) / "mini.pt2"
        if options.artifact is None:
            build(path, options)
        artifact = aograph.load(path)
        jobs = jobs_of(options.requests)
        ask = direct(artifact)
        for job in jobs:
            job.expected = ask(job, lambda _: None)
        print(", ".join(f"{key} {value}" for key, value in about.items()))
        print(f"{artifact.generation['batch_size']} rows; {len(jobs)} requests; load now {os.getloadavg()[0]:.2f}\n")
        rows = [row("direct", n, load(ask, jobs, n, options.seconds)) for n in options.threads]
        with Engine(artifact) as engine:
            ask = through(engine)
            rows += [row("engine", n, load(ask, jobs, n, options.seconds)) for n in options.clients]
        with server(path) as address:
            ask = over_http(address)
            timed(ask, jobs[0])
            rows += [row("HTTP", n, load(ask, jobs, n, options.seconds)) for n in options.clients]
    headers = [
        "way", "clients", "answers", "tokens/s", "requests/s", "p50 ms", "p99 ms", "first token p50 ms", "p99 ms",
        "wrong", "lost",
    ]  # fmt: skip
    print(tabulate(rows, headers, "github", disable_numparse=True))
    print(f"\nload at the end {os.getloadavg()[0]:.2f}")
    if any(wrong or lost or not answers for _, _, answers, *_, wrong, lost in rows):
        raise SystemExit("there are answers wrong or lost")


if __name__ == "__main__":
    main()
