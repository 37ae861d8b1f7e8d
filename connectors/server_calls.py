"""Calls to a Qdrant server: how it is reached, and which failed calls are repeated.

The errors of qdrant-client, gRPC and httpx become a `StoreError` here, and nowhere else.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.metadata
import logging
import math
import os
import random
import re
import ssl
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, get_args

from d2llm.errors import ArgumentError, StoreError, import_extra
from d2llm.types import StrPath

from .filters import key_of
from .location import check_location, shown
from .server_errors import ANY, MEANING, SEARCH, pause_of, status_of, text_of

if TYPE_CHECKING:
    import httpx
    from qdrant_client import AsyncQdrantClient, QdrantClient

logger = logging.getLogger(__name__)

OLDEST = (1, 16)
"""The first server version that keeps collection metadata."""
FIRST_CALL_PATIENCE = 2.0
"""Seconds for which the first call to a server is repeated. It is short so that a wrong address is noticed soon."""
MAX_TIMEOUT = 86400.0
"""Seconds in a day. The client's counters of milliseconds overflow somewhere above."""

ReadConsistency: TypeAlias = int | Literal["majority", "quorum", "all"]
WriteOrdering: TypeAlias = Literal["weak", "medium", "strong"]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Connection:
    """How a server is reached. The fields are those of `Qdrant`, with the address as `url`.

    Raises:
        ArgumentError: a port, a time, a key or a choice that is not possible.
    """

    url: str = field(repr=False)
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 30.0
    patience: float = 10.0
    grpc_port: int | None = 6334
    ca_file: StrPath | None = None
    read_consistency: ReadConsistency | None = None
    write_ordering: WriteOrdering | None = None

    def __post_init__(self) -> None:
        # With such a key, the client reports only that no connection can be made, or prints the key.
        if self.api_key is not None and not re.fullmatch(r"[!-~]([ -~]*[!-~])?|", self.api_key):
            raise ArgumentError(
                "the API key has a line break, a space at one of its ends, or a letter outside of ASCII, which no "
                "header can hold: was it read from a file with its line break?"
            )
        if self.grpc_port is not None and not 1 <= self.grpc_port <= 65535:
            raise ArgumentError(f"grpc_port must be from 1 to 65535, or None for none, found {self.grpc_port}")
        if not 0 < self.timeout <= MAX_TIMEOUT:
            raise ArgumentError(f"timeout must be above 0 and at most {MAX_TIMEOUT:g} seconds, found {self.timeout}")
        if not self.patience >= 0:
            raise ArgumentError(f"patience must be a number of seconds from 0 on, found {self.patience}")
        consistency, ordering = self.read_consistency, self.write_ordering
        if consistency not in (None, "majority", "quorum", "all") and not (
            isinstance(consistency, int) and consistency > 0
        ):
            raise ArgumentError(f"read_consistency {consistency!r}: choose a number from 1 on, majority, quorum or all")
        if ordering not in (None, *get_args(WriteOrdering)):
            raise ArgumentError(f"write_ordering {ordering!r}: choose weak, medium or strong")

    @property
    def seconds(self) -> int:
        """The timeout as the client takes it: in whole seconds."""
        return math.ceil(self.timeout)

    def client(self, kind: str) -> Any:
        """Make a client of the class `kind` of qdrant-client. Nothing is sent yet.

        Raises:
            StoreError: the file of the certificate authority cannot be read.
        """
        import httpx

        verify = self.trusted()
        options: dict[str, Any] = {
            # By default, gRPC waits up to two minutes before it looks again whether a server is back. (Leave its
            # min_reconnect_backoff_ms alone: it is the time within which a connection must be made.)
            "grpc.initial_reconnect_backoff_ms": 200,
            "grpc.max_reconnect_backoff_ms": 1000,
            # By default, it repeats calls on a dead connection until the system notices, which takes 15 minutes.
            # (A busy machine may not answer a ping within half a second, which a timeout of 1 s would leave.)
            "grpc.keepalive_time_ms": self.seconds * 250,
            "grpc.http2.ping_timeout_ms": max(self.seconds * 500, 2000),
        }
        if self.ca_file is not None:
            options["root_certificates"] = Path(self.ca_file).read_bytes()
        return getattr(import_extra("qdrant_client", "qdrant"), kind)(
            url=self.url,
            api_key=self.api_key,
            timeout=self.seconds,
            prefer_grpc=self.grpc_port is not None,
            grpc_port=self.grpc_port or 6334,
            grpc_options=options,
            check_compatibility=False,  # it starts a thread that only warns; see ServerCalls.connect
            limits=httpx.Limits(max_connections=100, max_keepalive_connections=20),  # off for localhost otherwise
            verify=verify,
        )

    def trusted(self) -> ssl.SSLContext | bool:
        """The certificates that https:// trusts, as httpx takes them.

        Raises:
            StoreError: the file of the certificate authority cannot be read.
        """
        if self.ca_file is None:
            return self.url.startswith("https:")  # reading the system's certificates takes 20 ms, useless for http://
        try:
            return ssl.create_default_context(cafile=self.ca_file)
        except OSError as error:
            raise StoreError(f"{self.ca_file}: {error.strerror}: the certificate authority's file") from error


def connection_to(location: StrPath, **server: Any) -> Connection | None:
    """How the server at `location` is reached; None if `location` is a folder. `server` holds fields of `Connection`.

    Raises:
        ArgumentError: `location` is not possible, or `Connection` refuses a field.
    """
    check_location(url := os.fspath(location))
    return Connection(url=url, **server) if "://" in url else None


class ServerCalls:
    """Clients of one server, and calls through them. Thread-safe, as the clients are.

    A call that fails for a reason that passes is repeated. Every error is a `StoreError` that names the place, and the
    `collection` if the calls are about one.
    """

    def __init__(self, connection: Connection, collection: str = "") -> None:
        self.connection, self.url = connection, shown(connection.url)
        self.async_clients: dict[asyncio.AbstractEventLoop, tuple[AsyncQdrantClient, AsyncGenerator[None, None]]] = {}
        self._collection = collection
        self._client: QdrantClient | None = None

    @property
    def client(self) -> QdrantClient:
        """The client that `connect` made."""
        assert self._client is not None, "connect() comes first"
        return self._client

    def connect(self) -> None:
        """Reach the server, and check its version. If this was done before, do nothing."""
        if self._client is not None:
            return
        if self.connection.url != self.url:
            _warn_of_unsent(self.url)
        self._client = self.connection.client("QdrantClient")
        patience = min(FIRST_CALL_PATIENCE, self.connection.patience)
        try:
            self._check_version(self.call(self._client.info, patience=patience, repeated=SEARCH).version)
        except StoreError:
            self.close()
            raise

    def _check_version(self, version: str) -> None:
        server, client = _version(version), _version(importlib.metadata.version("qdrant-client"))
        if server < OLDEST:
            raise StoreError(
                f"the server at {self.url} is Qdrant {version}: d2llm needs {OLDEST[0]}.{OLDEST[1]} or newer, which "
                "keeps collection metadata"
            )
        if server[0] != client[0] or abs(server[1] - client[1]) > 1:
            logger.warning(
                "the server at %s is Qdrant %s, qdrant-client is %d.%d: more than one minor apart, they may not "
                "understand one another", self.url, version, *client,
            )  # fmt: skip

    async def async_client(self) -> AsyncQdrantClient:
        """The client of the caller's event loop. No other event loop can use its connections."""
        loop = asyncio.get_running_loop()
        if loop not in self.async_clients:
            client = self.connection.client("AsyncQdrantClient")
            closing = self._closing(client)
            self.async_clients[loop] = client, closing
            await anext(closing)
        return self.async_clients[loop][0]

    async def _closing(self, client: AsyncQdrantClient) -> AsyncGenerator[None, None]:
        """Close `client` when this generator ends: in `aclose`, or when the event loop shuts its generators down."""
        loop = asyncio.get_running_loop()
        try:
            yield
        finally:
            del self.async_clients[loop]
            await client.close()

    def call(
        self, method: Callable[..., T], *, patience: float | None = None, repeated: frozenset[str] = ANY,
        **arguments: Any,
    ) -> T:  # fmt: skip
        """Call a method of the client, and repeat it after the failures in `repeated`. It must be safe to repeat."""
        retrying = self._retrying("Retrying", repeated, patience)
        with self._errors(retrying):
            answer: T = retrying(method, **arguments)
            return answer

    async def acall(self, method: Callable[..., Any], **arguments: Any) -> Any:
        """`call` for a search on the caller's event loop."""
        retrying = self._retrying("AsyncRetrying", SEARCH)
        with self._errors(retrying):
            return await retrying(method, **arguments)

    def collections(self) -> tuple[list[str], dict[str, str]]:
        """All collections of the server, and `{alias: collection}`."""
        names = [collection.name for collection in self.call(self.client.get_collections).collections]
        aliases = self.call(self.client.get_aliases).aliases
        return sorted(names), {alias.alias_name: alias.collection_name for alias in aliases}

    @contextmanager
    def snapshots(self, file: Path) -> Iterator[httpx.Client]:
        """An HTTP client at the address of the collection, to send or fetch the snapshot `file`.

        qdrant-client does not transfer files. A transfer takes as long as it needs, and is not repeated.
        """
        import httpx

        def check(answer: httpx.Response) -> None:
            if answer.is_error:
                answer.read()
                answer.raise_for_status()

        connection = self.connection
        try:
            with self._errors(), httpx.Client(
                base_url=f"{self.client.http.client.host.rstrip('/')}/collections/{self._collection}",
                headers={} if connection.api_key is None else {"api-key": connection.api_key},
                verify=connection.trusted(),
                timeout=httpx.Timeout(None, connect=connection.timeout),
                event_hooks={"response": [check]},
            ) as http:  # fmt: skip
                yield http
        except OSError as error:
            raise StoreError(f"{file}: {error.strerror}") from error

    def close(self) -> None:
        """Close the connection. `connect` opens it again."""
        if self._client is not None:
            self._client.close()
            self._client = None

    async def aclose(self) -> None:
        """Close the client of the caller's event loop."""
        if opened := self.async_clients.get(asyncio.get_running_loop()):
            _, closing = opened
            await closing.aclose()

    def _retrying(self, kind: str, repeated: frozenset[str], patience: float | None = None) -> Any:
        tenacity = import_extra("tenacity", "qdrant")
        limit = self.connection.patience if patience is None else patience
        backoff = tenacity.wait_random_exponential(multiplier=0.4, max=2.0)  # 0 to 0.4 s, 0 to 0.8 s, ...
        failures: list[float] = []

        def wait(state: Any) -> float:
            pause = pause_of(state.outcome.exception())
            return float(backoff(state)) if pause is None else pause * random.uniform(1.0, 1.1)

        def stop(state: Any) -> bool:
            """Whether the next pause would end later than `limit` seconds after the first failure.

            Time before that failure does not count, so a call that timed out is tried again.
            """
            failures.append(state.outcome_timestamp)
            return bool(failures[-1] - failures[0] + state.upcoming_sleep > limit)

        return getattr(tenacity, kind)(
            retry=tenacity.retry_if_exception(lambda error: status_of(error) in repeated),
            wait=wait,
            stop=stop,
            reraise=True,
        )

    @contextmanager
    def _errors(self, retrying: Any = None) -> Iterator[None]:
        """Turn the client's errors into a `StoreError`. Other errors pass."""
        start = time.monotonic()
        try:
            yield
        except Exception as error:  # every kind of error is classified below
            status = status_of(error)
            if status is None:
                raise
            message, tries = self._explain(status, error), retrying.statistics["attempt_number"] if retrying else 1
            if tries > 1:
                message += f" (tried {tries} times in {time.monotonic() - start:.1f} s)"
            raise StoreError(message) from error

    def _explain(self, status: str, error: Exception) -> str:
        connection, text = self.connection, text_of(error)
        if connection.api_key:  # a proxy may send back what it was sent
            text = text.replace(connection.api_key, "[secure]")
        text = text if len(text) <= 500 else f"{text[:500]} ..."
        if unindexed := re.search(r'Index required but not found for "(.+?)" of', text):
            status = "NO_INDEX"
        place, name = f"Qdrant at {self.url}", self._collection
        message = MEANING.get(status, "{where}: {text}").format(
            place=place,
            where=f"{place}, collection {name!r}" if name else place,
            url=self.url,
            ports=f" and gRPC port {connection.grpc_port}" if connection.grpc_port else "",
            seconds=connection.seconds,
            name=name,
            to_collection=f" to {name!r}" if name else "",
            field=unindexed and (key_of(unindexed[1]) or unindexed[1]),
            text=text,
        )
        pause = pause_of(error)
        return (
            message if pause is None else f"{message} (it asks for a pause of {pause:g} s, longer than patience allows)"
        )


@functools.cache
def _warn_of_unsent(url: str) -> None:
    logger.warning(
        "of the address of %s, the user, password and query are not sent: give a key by itself (--api-key; in Python "
        "api_key)", url,
    )  # fmt: skip


def _version(text: str) -> tuple[int, int]:
    numbers = re.match(r"(\d+)\.(\d+)", text)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
