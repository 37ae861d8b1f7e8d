"""The door of the service: every request passes it first. Ids, keys, limits, headers, metrics and the log."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .keys import Keys, Refused, writes
from .metrics import Metrics
from .problems import interrupted, problem, unexpected
from .settings import Settings

logger = logging.getLogger("d2llm.serve.requests")

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
"""Headers of every answer: the page may load nothing from another host, and nothing inline."""
PATIENCE = 4
"""A body that is too large is still read up to this multiple of the limit, so that the client reads the answer."""
ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")


class Door:
    """An ASGI application around that of the service.

    It gives each request an id (that of `X-Request-ID`, or a new one), refuses what lacks its key, is too large or
    comes too slowly, and writes one line of the log as JSON. When the service stops, it interrupts what takes too long.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, api: frozenset[str]) -> None:
        """`api` are the paths that need a key. All others are files of the page."""
        self._app, self._settings, self._metrics, self._api = app, settings, metrics, api
        self._keys = Keys(settings)
        self._waiting, self._writing = set[asyncio.Task[Any]](), set[asyncio.Task[Any]]()

    async def interrupt(self) -> None:
        """Interrupt the requests in flight, except for writes that have begun. Return when those are done."""
        if self._writing:
            logger.info(f"waiting for {len(self._writing)} writes that have begun; a second signal ends at once")
        for task in self._waiting:
            task.cancel()
        if self._waiting:
            await asyncio.wait({*self._waiting}, timeout=1)  # their answers are on their way
        if self._writing:
            await asyncio.wait({*self._writing})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        id_ = given.decode() if ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["id"], state["log"] = id_, {}
        start, status = time.perf_counter(), 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = MutableHeaders(scope=message)
                own["X-Request-ID"] = id_
                for name, value in HEADERS.items():
                    own.setdefault(name, value)
            await send(message)

        task = _task()
        self._waiting.add(task)
        self._metrics.running.inc()
        try:
            await self._pass(scope, headers, receive, send_with_headers)
        except asyncio.CancelledError:  # the service ends: see `interrupt`, or at once
            if status:
                raise
            await interrupted(id_)(scope, receive, send_with_headers)
        except Exception:  # a client gets an answer, and the log the reason, whatever went wrong
            logger.exception({"event": "error", "request_id": id_})
            if not status:
                await unexpected(id_)(scope, receive, send_with_headers)
        finally:
            self._waiting.discard(task)
            self._writing.discard(task)
            self._metrics.running.dec()
            self._note(scope, status, time.perf_counter() - start, state)

    async def _pass(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:
        """Let a request pass with its whole body, or refuse it."""
        try:
            body = await self._admitted(scope, headers, receive)
        except Refused as error:
            asked = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
            answer = problem(
                error.status, error.kind, str(error), scope["state"]["id"], {**asked, "Connection": "close"}
            )
            await answer(scope, receive, send)
            return
        if writes(scope):
            task = _task()
            self._waiting.discard(task)
            self._writing.add(task)
        await self._app(scope, _replay(body, receive), send)

    async def _admitted(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive) -> Message:
        """Return the body of a request that has its key and arrives whole and in time, or raise `Refused`."""
        if scope["path"] in self._api:
            self._keys.check(scope, headers)
        seconds = self._settings.body_seconds
        try:
            async with asyncio.timeout(seconds):
                return await _read(receive, self._settings.max_body)
        except TimeoutError:
            raise Refused(408, "timeout", f"the request took longer than {seconds:.0f} s: send it at once") from None

    def _note(self, scope: Scope, status: int, seconds: float, state: dict[str, Any]) -> None:
        route = getattr(scope.get("route"), "path", "") or (scope["path"] if scope["path"] in self._api else "other")
        self._metrics.requests.labels(route, str(status)).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        line = {
            "event": "request",
            "request_id": state["id"],
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": round(seconds, 6),
            **state["log"],
        }
        logger.info(line)


def _task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None, "each request is a task of the server"
    return task


async def _read(receive: Receive, most: int) -> Message:
    """Read a whole body, as one message, or raise `Refused` if it has more than `most` bytes."""
    chunks, size, more = list[bytes](), 0, True
    while more and size <= PATIENCE * most:  # who still sends does not read an answer: what is too large is thrown away
        message = await receive()
        if message["type"] != "http.request":
            return message
        chunk = message.get("body", b"")
        size, more = size + len(chunk), message.get("more_body", False)
        if size > most:
            chunks.clear()
        else:
            chunks.append(chunk)
    if size > most:
        advice = "send several requests, or start with a larger --max-body"
        raise Refused(413, "too_large", f"the body has more than {most} bytes: {advice}")
    return {"type": "http.request", "body": b"".join(chunks), "more_body": False}


def _replay(body: Message, receive: Receive) -> Receive:
    """Return a function that gives the body first, then what comes after it."""
    first: list[Message] = [body]

    async def replayed() -> Message:
        return first.pop() if first else await receive()

    return replayed
