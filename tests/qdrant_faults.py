"""Failures between a Qdrant client and `qdrant_server`, on real sockets, one at a time or drawn at random.

Two layers: answers that the server gives instead of doing the work (or after doing it), and what happens to the
connection on the way back, done by a TCP proxy in front of each port (`QdrantServer(..., proxied=True)`).
"""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

CODES = {
    200: "UNKNOWN",
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    409: "ALREADY_EXISTS",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    500: "INTERNAL",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
}
"""HTTP's statuses in gRPC."""


@dataclass
class Refusal(Exception):
    """An answer that is no success, in both protocols."""

    status: int
    text: str
    media: str = "application/json"
    retry_after: int | None = None

    @property
    def code(self) -> str:
        return CODES[self.status]


_PAGE = "<html><head><title>Bad Gateway</title></head><body><center>nginx</center></body></html>"

ANSWERS: dict[str, tuple[Any, ...]] = {
    "408": (408, "Timeout: Operation 'Update' timed out after 60s"),
    "429": (429, "Rate limiting exceeded: Write rate limit exceeded"),
    "429-retry-after": (429, "Rate limiting exceeded: Write rate limit exceeded", "application/json", 1),
    "499": (499, "the server stops, and answers no more calls"),
    "500": (500, "Service internal error: task panicked"),
    "502-html": (502, _PAGE, "text/html"),
    "503": (503, "Shard temporarily unavailable: shard 0 is recovering"),
    "200-html": (200, _PAGE, "text/html"),
}
"""What the server may say instead."""

CONNECTION = ("reset", "reset-midway", "cut", "stall", "trickle", "outage")
"""What may happen to an answer: the connection is reset before its first byte, or in the middle of it; it is closed in
the middle; not a byte comes, then a reset; it comes slowly but whole; the port refuses all connections for a while."""

KINDS = (*ANSWERS, *CONNECTION)
WRITES = ("upsert", "delete")


@dataclass
class _Planned:
    kind: str
    on: Sequence[str] | None
    after: bool
    times: int


class Faults:
    """What goes wrong, and when. `struck` is what did: (kind, operation, whether the work was done before)."""

    def __init__(self) -> None:
        self.proxies: dict[str, Proxy] = {}
        self.stall_seconds, self.trickle_seconds, self.outage_seconds = 1.5, 0.5, 0.3
        self.struck: list[tuple[str, str, bool]] = []
        self._planned: list[_Planned] = []
        self._random: _Random | None = None
        self._lock = threading.Lock()

    def add(self, kind: str, *, times: int = 1, on: str | Sequence[str] | None = None, after: bool = False) -> None:
        """Let the next `times` calls of the operations `on` (None: any) fail, `after` or instead of their work."""
        self._check(kind)
        self._planned.append(_Planned(kind, (on,) if isinstance(on, str) else on, after, times))

    def every(self, n: int, *, seed: int = 0, on: Sequence[str] = WRITES, kinds: Sequence[str] = KINDS) -> None:
        """Let every `n`th call of the operations `on` fail, of a kind drawn at random, as is before or after."""
        for kind in kinds:
            self._check(kind)
        self._random = _Random(n, on, kinds, random.Random(seed))

    def clear(self) -> None:
        self._planned, self._random = [], None

    @contextmanager
    def around(self, operation: str, protocol: str, peer: int) -> Iterator[None]:
        """Around the work of one call, which came from the port `peer`."""
        with self._lock:
            kind, after = self._draw(operation)
            if kind:
                self.struck.append((kind, operation, after))
        if kind and not after:
            self._strike(kind, protocol, peer, done=False)
        yield
        if kind and after:
            self._strike(kind, protocol, peer, done=True)

    def _draw(self, operation: str) -> tuple[str, bool]:
        for planned in self._planned:
            if planned.times and (planned.on is None or operation in planned.on):
                planned.times -= 1
                return planned.kind, planned.after
        return self._random.draw(operation) if self._random else ("", False)

    def _strike(self, kind: str, protocol: str, peer: int, *, done: bool) -> None:
        if kind in ANSWERS:
            raise Refusal(*ANSWERS[kind])
        proxy = self.proxies[protocol]
        if kind == "outage":
            proxy.refuse(self.outage_seconds)
        else:
            seconds = {"stall": self.stall_seconds, "trickle": self.trickle_seconds}.get(kind, 0.0)
            proxy.arm(peer, kind, seconds)
        if not done and kind != "trickle":
            raise Refusal(503, "nobody receives this: it only makes the proxy act")

    def _check(self, kind: str) -> None:
        if kind not in KINDS:
            raise ValueError(f"fault {kind!r}: expected one of {', '.join(KINDS)}")
        if kind in CONNECTION and not self.proxies:
            raise ValueError(f"fault {kind!r} needs QdrantServer(..., proxied=True)")


@dataclass
class _Random:
    n: int
    on: Sequence[str]
    kinds: Sequence[str]
    generator: random.Random
    seen: int = 0

    def draw(self, operation: str) -> tuple[str, bool]:
        self.seen += operation in self.on
        if operation not in self.on or self.seen % self.n:
            return "", False
        return self.generator.choice(self.kinds), self.generator.random() < 0.5


class _Link:
    """One client's connection and ours to the server."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self.armed: tuple[str, float] | None = None
        self._closing = threading.Lock()
        self._closed = threading.Event()

    def close(self, *, reset: bool = False) -> None:
        """End both connections; with `reset`, the client's with RST instead of FIN."""
        if not self._closing.acquire(blocking=False):
            return
        self._closed.set()
        with suppress(OSError):
            if reset:
                self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                # Ends what another thread waits for, which would keep the socket alive, and sends no FIN.
                self.client.shutdown(socket.SHUT_RD)
            else:
                self.client.shutdown(socket.SHUT_RDWR)
        with suppress(OSError):
            self.server.shutdown(socket.SHUT_RDWR)
        self.client.close()
        self.server.close()

    def requests(self) -> None:
        with suppress(OSError):
            while data := self.client.recv(1 << 16):
                self.server.sendall(data)
        self.close()

    def answers(self) -> None:
        with suppress(OSError):
            while data := self.server.recv(1 << 16):
                armed, self.armed = self.armed, None
                if armed is None:
                    self.client.sendall(data)
                else:
                    self._spoil(data, *armed)
        self.close()

    def _spoil(self, data: bytes, kind: str, seconds: float) -> None:
        if kind == "trickle":
            step = -(-len(data) // 10)
            for start in range(0, len(data), step):
                time.sleep(seconds / 10)
                self.client.sendall(data[start : start + step])
            return
        if kind == "stall":
            self._closed.wait(seconds)
        elif kind != "reset":
            head = data.find(b"\r\n\r\n") + 4 if b"\r\n\r\n" in data else 0  # of REST: the body is what is spoilt
            self.client.sendall(data[: (head + len(data)) // 2])
        self.close(reset=kind != "cut")


class Proxy:
    """Forwards TCP connections from `port` to another port of this host."""

    def __init__(self, upstream: int) -> None:
        self.port = 0
        self._upstream = upstream
        self._links: dict[int, _Link] = {}
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(0, self._listen)
        self._listen()

    def arm(self, peer: int, kind: str, seconds: float) -> None:
        """Let this happen to the next bytes that the server sends to the connection that comes from the port `peer`."""
        self._links[peer].armed = (kind, seconds)

    def refuse(self, seconds: float) -> None:
        """End all connections, and take none for so long."""
        self.close()
        self._timer = threading.Timer(seconds, self._listen)
        self._timer.daemon = True
        self._timer.start()

    def close(self) -> None:
        self._timer.cancel()
        with self._lock:
            if self._socket is not None:
                with suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept()
                self._socket.close()
                self._socket = None
        for link in list(self._links.values()):
            link.close(reset=True)

    def _listen(self) -> None:
        with self._lock:
            if self._socket is None:
                self._socket = socket.create_server(("127.0.0.1", self.port), backlog=128)
                self.port = self._socket.getsockname()[1]
                threading.Thread(target=self._accept, args=(self._socket,), daemon=True).start()

    def _accept(self, listening: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listening.accept()
                self._connect(client)

    def _connect(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(("127.0.0.1", self._upstream))
        except OSError:  # the server is down
            client.close()
            return
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = self._links[server.getsockname()[1]] = _Link(client, server)
        for pump in (link.requests, link.answers):
            threading.Thread(target=pump, daemon=True).start()
