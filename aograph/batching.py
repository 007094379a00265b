"""Continuous batching: one artifact that many requests use at a time.

A thread owns the cache of the artifact. Requests wait in a bounded queue until one of its rows is free; then the prompt
is prefilled into that row, and all rows that are taken decode together, one token at a time, each at its own position.
A request that ends frees its row for the next one at once, in the order in which they came.

The tokens of a request are those that `Artifact.generate` gives for it alone: what runs in other rows has no part in
it, and a sampling request has a generator of its own. What can differ is the rounding of the attention kernel between
one row and another, some ulps, which decides only between tokens that are as good as equally likely. New weights
(`Artifact.update_weights`) are used from the next token on.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from types import TracebackType

import torch
from torch import Tensor

from .artifact import Artifact
from .decoding import Sampling, first_line
from .errors import AographError, InputError


class EngineError(AographError):
    """A request that was well formed, but could not be answered to its end."""


class QueueFull(EngineError):
    """As many requests wait as may wait: try again later."""


class Stopped(EngineError):
    """The engine has stopped, or stopped before the request had its answer."""


class Request:
    """A prompt and its new tokens, as they come: iterate, from any thread or with `async for`, or take `result()`.

    prompt: token ids. tokens: the new ones until now, what ended them included. finish_reason: None until it has ended,
    then "stop" (a token that ends texts), "length" (max_new_tokens), "cancelled" or "error". error: what happened; it
    is raised at the end of an iteration and by `result`.
    """

    def __init__(
        self, prompt: list[int], limit: int, sampling: Sampling, generator: torch.Generator | None, ends: Iterable[int]
    ):
        self.prompt, self.limit, self.ends = prompt, limit, frozenset(ends)
        self.sampling, self.generator = sampling, generator
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.error: EngineError | None = None
        self.cancelled = False
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], object]] = []

    def cancel(self) -> None:
        """Ends the request before its next token; nothing happens to one that has ended."""
        self.cancelled = True

    def result(self, timeout: float | None = None) -> list[int]:
        """All new tokens, once it has ended; `TimeoutError` if it has not within so many seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.finish_reason, timeout):
                raise TimeoutError(f"no end after {timeout} s: {len(self.tokens)} of up to {self.limit} tokens")
        if self.error is not None:
            raise self.error
        return self.tokens

    def __iter__(self) -> Iterator[int]:
        for i in itertools.count():
            with self._changed:
                while i == len(self.tokens) and not self.finish_reason:
                    self._changed.wait()
            if i == len(self.tokens):
                break
            yield self.tokens[i]
        if self.error is not None:
            raise self.error

    async def __aiter__(self) -> AsyncIterator[int]:
        changed, seen = asyncio.Event(), 0
        self._listeners.append(functools.partial(asyncio.get_running_loop().call_soon_threadsafe, changed.set))
        while True:
            changed.clear()
            ended = self.finish_reason  # read before the tokens: none comes after it
            if seen < len(self.tokens):
                yield self.tokens[seen]
                seen += 1
            elif ended:
                break
            else:
                await changed.wait()
        if self.error is not None:
            raise self.error

    @property
    def position(self) -> int:
        """Where the newest token goes in the row of the cache."""
        return len(self.prompt) + len(self.tokens) - 1

    def add(self, token: int) -> None:
        """The engine's: the next token."""
        self.tokens.append(token)
        self._notify()

    def end(self, reason: str, error: EngineError | None = None) -> None:
        """The engine's: nothing comes any more."""
        self.error, self.finish_reason = error, reason
        self._notify()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
        for listener in list(self._listeners):
            try:
                listener()
            except RuntimeError:  # its event loop is closed: nobody listens
                self.cancel()


class Engine:
    """Answers requests with a language model's artifact, as many at a time as the cache has rows.

    artifact: as `aograph.load` gives it. queue: how many requests may wait when all rows are taken. Use it as a context
    manager: leaving it answers what was accepted; leaving it by an exception does not.

        with Engine(aograph.load("model.pt2")) as engine:
            for token in engine.submit([5, 6, 7], max_new_tokens=32):
                ...

    Raises `InputError` for an artifact that is no language model.
    """

    def __init__(self, artifact: Artifact, queue: int = 64):
        if queue < 0:
            raise InputError(f"queue is {queue}: how many requests may wait, 0 or more")
        self.artifact, self.queue = artifact, queue
        self.max_length: int = artifact.generation["max_length"]
        self._rows: list[Request | None] = [None] * artifact.generation["batch_size"]
        self._waiting: deque[Request] = deque()
        self._deadline: float | None = None  # set when it stops
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        with torch.no_grad():
            self._cache = artifact.new_cache()
            self.vocabulary = self._decode([None] * len(self._rows)).shape[-1]  # a first step, which also warms up
        self._thread = threading.Thread(target=self._run, name="aograph engine", daemon=True)
        self._thread.start()

    # For any thread -------------------------------------------------------------------------------------------

    def submit(
        self,
        input_ids: Sequence[int] | Tensor,
        max_new_tokens: int,
        *,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> Request:
        """Accepts a prompt, token ids [T], for up to max_new_tokens more; the other parameters are those of
        `Artifact.generate`, but without a seed each request draws from one of its own.

        Raises `InputError` for what the artifact cannot take, `QueueFull`, and `Stopped`.
        """
        prompt = input_ids.tolist() if isinstance(input_ids, Tensor) else list(input_ids)
        self._check(prompt, max_new_tokens)
        sampling = Sampling(do_sample, temperature, top_k, top_p)
        ends = self.artifact.generation["eos_token_id"] if eos_token_id is None else eos_token_id
        ends = [ends] if isinstance(ends, int) else ends
        generator = generator_of(seed, self.artifact.device) if do_sample else None
        request = Request(prompt, max_new_tokens, sampling, generator, ends)
        with self._changed:
            if self.stopping:
                raise Stopped(f"the engine {self._reason()}: it takes no more requests")
            if len(self._waiting) >= self.queue + self._rows.count(None):
                raise QueueFull(
                    f"{self.running} requests run and {self.waiting} wait, which is all that the queue of {self.queue} "
                    "holds: try again later"
                )
            self._waiting.append(request)
            self._changed.notify_all()
        return request

    @property
    def running(self) -> int:
        return len(self._rows) - self._rows.count(None)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def stopping(self) -> bool:
        """Whether it takes no more requests."""
        return self._deadline is not None

    def close(self, seconds: float = float("inf")) -> None:
        """Takes no more requests, answers those accepted for at most so many seconds, and fails what is left."""
        with self._changed:
            self._deadline = min(time.monotonic() + seconds, self._deadline or float("inf"))
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(0 if kind else float("inf"))

    def _check(self, prompt: list[int], max_new_tokens: int) -> None:
        if not prompt:
            raise InputError("the prompt has no tokens: give at least one")
        wrong = next((t for t in prompt if type(t) is not int or not 0 <= t < self.vocabulary), None)
        if wrong is not None:
            raise InputError(f"the prompt holds {wrong!r}: token ids are integers from 0 to {self.vocabulary - 1}")
        if max_new_tokens < 1 or len(prompt) + max_new_tokens > self.max_length:
            raise InputError(
                f"a prompt of {len(prompt)} tokens and max_new_tokens = {max_new_tokens}: at least one new token, and "
                f"together at most {self.max_length}, the max_length that the artifact was saved with"
            )

    def _reason(self) -> str:
        return f"failed ({first_line(self._failure)})" if isinstance(self._failure, Exception) else "is stopping"

    # For its own thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with torch.no_grad():
                while self._has_work():
                    self._drop_cancelled()
                    self._admit()
                    self._step()
        except BaseException as error:
            self._failure = error
            raise
        finally:
            with self._changed:
                self._deadline = self._deadline or time.monotonic()
                left = [*filter(None, self._rows), *self._waiting]
                self._rows = [None] * len(self._rows)
                self._waiting.clear()
            for request in left:
                request.end("error", Stopped(f"the engine {self._reason()}: the answer is not complete"))

    def _has_work(self) -> bool:
        """Waits for it; False when the time has come to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self.stopping or self._waiting or self.running)
            if self._deadline is not None and time.monotonic() >= self._deadline:
                return False
            return bool(self._waiting or self.running)

    def _drop_cancelled(self) -> None:
        with self._changed:
            gone = [r for r in (*self._rows, *self._waiting) if r is not None and r.cancelled]
        for request in gone:
            self._end(request, "cancelled")

    def _end(self, request: Request, reason: str, error: EngineError | None = None) -> None:
        """Frees its place first: who hears of the end may submit the next request."""
        with self._changed:
            if request in self._rows:
                self._rows[self._rows.index(request)] = None
            else:
                self._waiting.remove(request)
        request.end(reason, error)

    def _admit(self) -> None:
        """Gives each free row to the request that waits longest, and computes its first token."""
        for row in [row for row, request in enumerate(self._rows) if request is None]:
            with self._changed:
                if not self._waiting:
                    return
                request = self._rows[row] = self._waiting.popleft()
            with self._failing([request]):
                for tensor in self._cache:  # a NaN that another request left would count, masked or not
                    tensor[row].zero_()
                prompt = torch.tensor([request.prompt], device=self.artifact.device)
                self._take([request], self.artifact.prefill(prompt, self._cache, row))

    def _step(self) -> None:
        """Computes the next token of all rows that are taken."""
        running = [request for request in self._rows if request is not None]
        if running:
            with self._failing(running):
                taken = torch.tensor([request is not None for request in self._rows], device=self.artifact.device)
                self._take(running, self._decode(self._rows)[taken])

    def _decode(self, rows: Sequence[Request | None]) -> Tensor:
        """The logits [rows, V] behind the newest tokens; a free row computes one that its next prompt overwrites."""
        tokens = [[request.tokens[-1] if request else 0] for request in rows]
        positions = [[request.position if request else 0] for request in rows]
        device = self.artifact.device
        return self.artifact.decode(
            torch.tensor(tokens, device=device), torch.tensor(positions, device=device), self._cache
        )

    def _take(self, requests: Sequence[Request], logits: Tensor) -> None:
        """Picks the next token of each request by its row of the logits [len(requests), V], and delivers it."""
        picked = []
        for request, row in zip(requests, logits.split(1), strict=True):
            with self._failing([request]):
                picked.append((request, request.sampling.pick(row, request.generator)))
        tokens = torch.cat([token for _, token in picked]).tolist() if picked else []  # one wait for the device
        for (request, _), token in zip(picked, tokens, strict=True):
            request.add(token)
            if token in request.ends:
                self._end(request, "stop")
            elif len(request.tokens) == request.limit:
                self._end(request, "length")

    @contextlib.contextmanager
    def _failing(self, requests: Sequence[Request]) -> Iterator[None]:
        """What goes wrong inside ends these requests; the engine goes on."""
        try:
            yield
        except Exception as error:
            for request in requests:
                if not request.finish_reason:
                    failure = EngineError(
                        f"the artifact failed after {len(request.tokens)} tokens: {first_line(error)}"
                    )
                    failure.__cause__ = error
                    self._end(request, "error", failure)


def generator_of(seed: int | None, device: torch.device) -> torch.Generator:
    """Raises `InputError` for a seed that torch does not take."""
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
        return generator
    try:
        return generator.manual_seed(seed)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"seed is {seed!r}: an integer of 64 bits is expected") from error
