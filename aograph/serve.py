"""An HTTP server over `batching.Engine`: `POST /generate`, with server-sent events if wanted, and `GET /health`.

It shows how an artifact is served, no more: one model, one process, no accounts. It needs the extra `aograph[serve]`.

`POST /generate` takes a JSON object: `prompt` (text, for artifacts that hold a tokenizer.json) or `input_ids`,
`max_new_tokens`, `do_sample`, `temperature`, `top_k`, `top_p`, `seed` and `stream`; all but the prompt may be left out.
It answers `{"text", "tokens", "finish_reason"}`, `text` where there is a tokenizer. As a stream that object comes in
the event `end`, after an event `token` for each token, `{"token", "text"}`; a character that several tokens make comes
with the last of them. What goes wrong is `{"error"}`, with the status 400, 413, 429 (the queue is full), 500, 503 (it
stops), or in the event `error`. A client that disconnects cancels its request.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from tokenizers import Tokenizer

from .artifact import load
from .batching import Engine, EngineError, QueueFull, Request, Stopped
from .errors import AographError, InputError
from .schemes import nearest

LARGEST_BODY = 4 << 20  # bytes
RETRY_AFTER = 1  # seconds
SLOW_CLIENT = 5  # seconds for what is complete to reach its client, when the server stops
# What a body may hold: the types, and what errors call them.
NUMBER, INTEGER, FLAG = ((int, float), "a number"), ((int,), "an integer"), ((bool,), "true or false")
SAMPLING: dict[str, tuple[tuple[type, ...], str]] = {
    "temperature": NUMBER, "top_k": INTEGER, "top_p": NUMBER, "seed": INTEGER
}  # fmt: skip
FIELDS = {
    "prompt": ((str,), "a string"), "input_ids": ((list,), "a list of integers"), "max_new_tokens": INTEGER,
    "do_sample": FLAG, **SAMPLING, "stream": FLAG,
}  # fmt: skip


class TooLarge(InputError):
    """A body that would fill the memory."""


STATUS = {QueueFull: 429, Stopped: 503, EngineError: 500, TooLarge: 413, InputError: 400}  # the first that fits


def serve(
    path: Path, host: str = "127.0.0.1", port: int = 8000, queue: int = 64, max_new_tokens: int = 256, grace: float = 30
) -> None:
    """Serves an artifact until SIGINT or SIGTERM; prints the address once it is ready. port 0: any that is free.

    queue: requests that may wait when all rows are taken. max_new_tokens: what a request may ask for at most, and gets
    if it does not ask. grace: seconds to complete answers after a signal.

    Raises `InputError` or `ArtifactError` before anything is served.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
    artifact = load(path)
    tokenizer = tokenizer_of(artifact.tokenizer_files)
    with Engine(artifact, queue) as engine, listen(host, port) as listening:
        Server(engine, application(engine, tokenizer, max_new_tokens), grace).run([listening])


class Server(uvicorn.Server):
    """Stops in two steps: what was accepted is answered, health being 503 meanwhile; then connections are closed.

    grace: seconds for the answers; what is not complete then gets an error. A second signal ends the wait.
    """

    def __init__(self, engine: Engine, app: Starlette, grace: float):
        super().__init__(
            uvicorn.Config(app, lifespan="off", log_level="warning", timeout_graceful_shutdown=SLOW_CLIENT)
        )
        self.engine, self.grace = engine, grace

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for host, port, *_ in (each.getsockname() for each in sockets or []):
            address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            print(f"serving {self.engine.artifact.path} on http://{address}", flush=True)

    def handle_exit(self, *_: Any) -> None:
        seconds = 0 if self.engine.stopping else self.grace
        threading.Thread(target=self.stop, args=(seconds,), name="aograph stop").start()

    def stop(self, seconds: float) -> None:
        self.engine.close(seconds)
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; `InputError` if that cannot be."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise InputError(f"nothing can listen on {host} port {port}: {error}; give another --host or --port") from error


def application(engine: Engine, tokenizer: Tokenizer | None, max_new_tokens: int) -> Starlette:
    """The ASGI application; max_new_tokens as for `serve`."""
    watchers: set[asyncio.Task] = set()  # the event loop itself does not keep tasks alive

    async def health(_: HTTPRequest) -> Response:
        artifact = engine.artifact
        about = {
            "status": "stopping" if engine.stopping else "ready",
            "model": str(artifact.path),
            "recipe_sha256": artifact.about["recipe_sha256"],
            "batch_size": artifact.generation["batch_size"],
            "max_length": engine.max_length,
            "running": engine.running,
            "waiting": engine.waiting,
        }
        return JSONResponse(about, 503 if engine.stopping else 200)

    async def generate(http: HTTPRequest) -> Response:
        body = fields_of(await body_of(http))
        prompt = await prompt_of(body, tokenizer)
        limit = limit_of(body, max_new_tokens, engine.max_length - len(prompt))
        sampling = {name: body[name] for name in SAMPLING if name in body}
        request = engine.submit(prompt, limit, do_sample=body.get("do_sample", False), **sampling)
        watcher = asyncio.create_task(cancel_when_gone(http, request))
        watchers.add(watcher)
        watcher.add_done_callback(watchers.discard)
        if body.get("stream", False):
            return StreamingResponse(events(request, tokenizer), media_type="text/event-stream")
        async for _ in request:
            pass
        return JSONResponse(answer(request, tokenizer))

    return Starlette(
        routes=[Route("/health", health), Route("/generate", generate, methods=["POST"])],
        exception_handlers={AographError: refuse, HTTPException: refuse_http},
    )


# Requests --------------------------------------------------------------------------------------------------


async def body_of(http: HTTPRequest) -> bytes:
    body = b""
    async for chunk in http.stream():
        body += chunk
        if len(body) > LARGEST_BODY:
            raise TooLarge(f"the body is longer than {LARGEST_BODY} bytes")
    return body


def fields_of(body: bytes) -> dict[str, Any]:
    """The fields that are given, of the types that they have; null is as good as not given. Raises `InputError`."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the body is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError('the body is not a JSON object, such as {"prompt": "Once", "max_new_tokens": 32}')
    for name, value in found.items():
        if name not in FIELDS:
            raise InputError(f"unknown field {name!r}; {nearest(name, FIELDS)}")
        types, called = FIELDS[name]
        if value is not None and type(value) not in types:
            raise InputError(f"{name} is {json.dumps(value)[:80]}; {called} is expected")
    given = {name: value for name, value in found.items() if value is not None}
    unused = [name for name in SAMPLING if name in given]
    if unused and not given.get("do_sample", False):
        raise InputError(f'{" and ".join(unused)} would have no effect: add "do_sample": true, or leave it out')
    return given


async def prompt_of(body: Mapping[str, Any], tokenizer: Tokenizer | None) -> list[int]:
    """The token ids of the prompt. Raises `InputError`."""
    if ("prompt" in body) == ("input_ids" in body):
        raise InputError("give either prompt, a text, or input_ids, its token ids")
    if "input_ids" in body:
        return body["input_ids"]
    if tokenizer is None:
        raise InputError("the artifact holds no tokenizer.json: give input_ids, or save it with tokenizer=")
    try:
        return (await asyncio.to_thread(tokenizer.encode, body["prompt"])).ids
    except (TypeError, UnicodeEncodeError) as error:  # JSON can spell halves of characters
        raise InputError(f"prompt is no valid text: {error}") from error


def limit_of(body: Mapping[str, Any], most: int, room: int) -> int:
    """How many new tokens it may have; what does not fit the cache is the engine's to refuse."""
    wanted = body.get("max_new_tokens", max(1, min(most, room)))
    if wanted > most:
        raise InputError(f"max_new_tokens is {wanted}; this server gives at most {most}")
    return wanted


async def cancel_when_gone(http: HTTPRequest, request: Request) -> None:
    """Waits for the client to disconnect; servers say so at the end of the response, too."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    request.cancel()


# Answers ---------------------------------------------------------------------------------------------------


def tokenizer_of(files: Mapping[str, bytes]) -> Tokenizer | None:
    """From the tokenizer files of an artifact; None without a tokenizer.json."""
    return Tokenizer.from_buffer(files["tokenizer.json"]) if "tokenizer.json" in files else None


class Text:
    """The text of tokens, as they come."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.start = self.said = 0  # of the tokens that are looked at, and of those whose text is not out yet

    def add(self, token: int) -> str:
        """What the token adds; nothing as long as a character is not complete."""
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens[self.start :])
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        before = self.tokenizer.decode(self.tokens[self.start : self.said])
        self.start, self.said = self.said, len(self.tokens)
        return text[len(before) :]


async def events(request: Request, tokenizer: Tokenizer | None) -> AsyncIterator[str]:
    """An event for each token, and one for the end."""
    text = None if tokenizer is None else Text(tokenizer)
    try:
        async for token in request:
            yield event("token", {"token": token} if text is None else {"token": token, "text": text.add(token)})
        yield event("end", answer(request, tokenizer))
    except EngineError as error:
        yield event("error", {"error": str(error)})


def event(kind: str, content: Mapping[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps(content)}\n\n"


def answer(request: Request, tokenizer: Tokenizer | None) -> dict[str, Any]:
    text = {} if tokenizer is None else {"text": tokenizer.decode(request.tokens)}
    return {**text, "tokens": request.tokens, "finish_reason": request.finish_reason}


async def refuse(_: HTTPRequest, error: Exception) -> Response:
    status = next((status for kind, status in STATUS.items() if isinstance(error, kind)), 500)
    headers = {"Retry-After": str(RETRY_AFTER)} if status in (429, 503) else None
    return JSONResponse({"error": str(error)}, status, headers)


async def refuse_http(_: HTTPRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: this server has GET /health and POST /generate"
    return JSONResponse({"error": message}, error.status_code, error.headers)
