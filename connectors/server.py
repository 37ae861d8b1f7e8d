"""A Qdrant server or cluster, through qdrant-client. All that is qdrant-client stays in this file."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import math
import random
import re
import ssl
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, get_args

from d2llm.errors import ArgumentError, StoreError, import_extra
from d2llm.types import RESERVED

from .engine import RRF_K, Engine, Found, Search, Sparse, State, StoredPoint
from .location import shown
from .schema import HNSW_MIN_KB, VECTOR, WORDS, Metadata, PayloadType, Quantization

if TYPE_CHECKING:
    import httpx
    from qdrant_client import AsyncQdrantClient, QdrantClient

logger = logging.getLogger(__name__)

BATCH, BATCH_BYTES = 128, 8 * 2**20
"""Points in a request, and what they take as JSON: a server takes no request of more than 32 MB."""
OLDEST = (1, 16)
"""The first server version that keeps collection metadata."""
FIRST_CALL_PATIENCE = 2.0
"""Seconds for which the first call to a server is repeated: a wrong address is to be noticed soon."""
MAX_TIMEOUT = 86400.0
"""Seconds: a day. The client's counters of milliseconds end somewhere beyond."""
POLL = 1.0
SETTLED = 3
"""Times in a row that a server must say it is done: an optimizer may not have begun yet when it is first asked."""
BEGIN_PATIENCE = 60.0
"""Seconds in which a server must begin optimizations that it had put off (grey), once a write has asked for them."""
STALLED = 600.0
"""Seconds without progress after which someone who waits for a server is told so. A large graph takes hours, and is
counted when it is complete."""

ReadConsistency: TypeAlias = int | Literal["majority", "quorum", "all"]
WriteOrdering: TypeAlias = Literal["weak", "medium", "strong"]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Connection:
    """How a server is reached. The fields are those of `QdrantIndex`.

    Raises:
        ArgumentError: a port, a time, a key or a choice that cannot be.
    """

    url: str = field(repr=False)
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 30.0
    patience: float = 10.0
    grpc_port: int | None = 6334
    ca_file: Path | None = None
    read_consistency: ReadConsistency | None = None
    write_ordering: WriteOrdering | None = None

    def __post_init__(self) -> None:
        # The client would say of it what it is, or that no connection can be made.
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
        """The timeout as the client takes it: whole seconds."""
        return math.ceil(self.timeout)

    def client(self, kind: str) -> Any:
        """Make a client of that class; nothing is sent yet.

        Raises:
            StoreError: the file of the certificate authority cannot be read.
        """
        import httpx

        verify = self.trusted()
        options: dict[str, Any] = {
            # Left alone, gRPC waits up to two minutes before it looks again whether a server is back. (Its
            # min_reconnect_backoff_ms stays alone: that is the time in which a connection must be made.)
            "grpc.initial_reconnect_backoff_ms": 200,
            "grpc.max_reconnect_backoff_ms": 1000,
            # Left alone, it repeats a call on the connection that is dead, until the system notices: 15 minutes.
            # (In half a second, which a timeout of 1 s would leave, a busy machine may answer no ping.)
            "grpc.keepalive_time_ms": self.seconds * 250,
            "grpc.http2.ping_timeout_ms": max(self.seconds * 500, 2000),
        }
        if self.ca_file is not None:
            options["root_certificates"] = self.ca_file.read_bytes()
        return getattr(import_extra("qdrant_client", "qdrant"), kind)(
            url=self.url,
            api_key=self.api_key,
            timeout=self.seconds,
            prefer_grpc=self.grpc_port is not None,
            grpc_port=self.grpc_port or 6334,
            grpc_options=options,
            check_compatibility=False,  # a thread that only warns; see ServerEngine.open
            limits=httpx.Limits(max_connections=100, max_keepalive_connections=20),  # off for localhost otherwise
            verify=verify,
        )

    def trusted(self) -> ssl.SSLContext | bool:
        """Whom https:// trusts, as httpx takes it.

        Raises:
            StoreError: the file of the certificate authority cannot be read.
        """
        if self.ca_file is None:
            return self.url.startswith("https:")  # for http://, reading the system's certificates takes 20 ms in vain
        try:
            return ssl.create_default_context(cafile=self.ca_file)
        except OSError as error:
            raise StoreError(f"{self.ca_file}: {error.strerror}: the certificate authority's file") from error


class ServerEngine(Engine):
    """One collection on a server. Thread-safe, as the client is."""

    shared = True

    def __init__(self, collection: str, connection: Connection) -> None:
        self._collection, self._connection = collection, connection
        self._client: QdrantClient | None = None
        self._async_clients: dict[asyncio.AbstractEventLoop, tuple[AsyncQdrantClient, AsyncGenerator[None, None]]] = {}
        self._words, self._vector_bytes = False, 0

    def connect(self) -> None:
        self.models = import_extra("qdrant_client.models", "qdrant")
        if self._client is not None:
            return
        if self._connection.url != self._url:
            _warn_of_unsent(self._url)
        self._client = self._connection.client("QdrantClient")
        patience = min(FIRST_CALL_PATIENCE, self._connection.patience)
        try:
            self._check_version(self._call(self._client.info, patience=patience, repeated=_SEARCH).version)
        except StoreError:
            self.close()
            raise

    def peek(self) -> Metadata | None:
        self.connect()
        if not self._call(self._opened.collection_exists, **self._named):
            return None
        return Metadata.parse(self._metadata().get(RESERVED), f"collection {self._collection!r} at {self._url}")

    def remember(self, metadata: Metadata) -> None:
        self._update(metadata={RESERVED: metadata.to_json()})

    def open(self) -> Metadata | None:
        if (metadata := self.peek()) is not None:
            self._words, self._vector_bytes = metadata.options.words is not None, metadata.vector_bytes
        return metadata

    def _check_version(self, found: str) -> None:
        import importlib.metadata

        server, client = _version(found), _version(importlib.metadata.version("qdrant-client"))
        if server < OLDEST:
            raise StoreError(
                f"the server at {self._url} is Qdrant {found}: d2llm needs {OLDEST[0]}.{OLDEST[1]} or newer, which "
                "keeps collection metadata"
            )
        if server[0] != client[0] or abs(server[1] - client[1]) > 1:
            logger.warning(
                "the server at %s is Qdrant %s, qdrant-client is %d.%d: more than one minor apart, they may not "
                "understand one another", self._url, found, *client,
            )  # fmt: skip

    def create(self, metadata: Metadata) -> None:
        models, options = self.models, metadata.options
        self._words, self._vector_bytes = options.words is not None, metadata.vector_bytes
        vector = models.VectorParams(
            size=metadata.embedding_dim,
            distance=models.Distance.COSINE,
            on_disk=options.on_disk,
            datatype=models.Datatype(options.datatype),
        )
        words = {WORDS: models.SparseVectorParams(modifier=models.Modifier.IDF)} if options.words else None
        try:
            self._call(
                self._opened.create_collection,
                **self._named,
                vectors_config={VECTOR: vector},
                sparse_vectors_config=words,
                shard_number=options.shards,
                replication_factor=options.replicas,
                write_consistency_factor=options.write_consistency,
                hnsw_config=models.HnswConfigDiff(
                    m=options.hnsw_m, ef_construct=options.hnsw_ef_construct, full_scan_threshold=HNSW_MIN_KB
                ),
                optimizers_config=models.OptimizersConfigDiff(indexing_threshold=HNSW_MIN_KB),
                quantization_config=self._quantization(options.quantization),
                on_disk_payload=True,
                metadata={RESERVED: metadata.to_json()},
                timeout=self._connection.seconds,
            )
        except StoreError as error:
            # Ours all the same, if an earlier try made it and its answer was lost.
            if _status(error.__cause__ or error) != "ALREADY_EXISTS" or self.open() != metadata:
                raise

    def _quantization(self, kind: Quantization) -> Any:
        models = self.models
        if kind == "none":
            return None
        if kind == "int8":
            scalar = models.ScalarQuantizationConfig(type=models.ScalarType.INT8, always_ram=True)
            return models.ScalarQuantization(scalar=scalar)
        if kind == "binary":
            return models.BinaryQuantization(binary=models.BinaryQuantizationConfig(always_ram=True))
        if not hasattr(models, "TurboQuantization"):
            raise StoreError(f"quantization {kind!r} needs a newer qdrant-client: pip install -U qdrant-client")
        bits = models.TurboQuantBitSize[kind.replace("turbo", "BITS")]
        return models.TurboQuantization(turbo=models.TurboQuantQuantizationConfig(bits=bits, always_ram=True))

    def upsert(self, points: Sequence[StoredPoint]) -> None:
        models = self.models
        for batch in _batches(points):
            made = []
            for point in batch:
                vectors: dict[str, Any] = {VECTOR: point.vector}
                if point.words is not None:
                    vectors[WORDS] = models.SparseVector(indices=point.words.indices, values=point.words.values)
                made.append(models.PointStruct(id=point.id, vector=vectors, payload=point.payload))
            self._write(self._opened.upsert, points=made)

    def query(self, search: Search) -> Found:
        client = self._opened
        if search.words is None:
            return Found.of(self._call(client.query_points, repeated=_SEARCH, **self._nearest(search)).points)
        answers = self._call(client.query_batch_points, repeated=_SEARCH, **self._hybrid(search))
        return Found.of_hybrid(*(answer.points for answer in answers))

    async def aquery(self, search: Search) -> Found:
        client = await self._async_client()
        if search.words is None:
            return Found.of((await self._acall(client.query_points, **self._nearest(search))).points)
        answers = await self._acall(client.query_batch_points, **self._hybrid(search))
        return Found.of_hybrid(*(answer.points for answer in answers))

    async def _async_client(self) -> AsyncQdrantClient:
        """The client of the caller's event loop: no other loop can use its connections."""
        loop = asyncio.get_running_loop()
        if loop not in self._async_clients:
            client = self._connection.client("AsyncQdrantClient")
            closing = self._closing(client)
            self._async_clients[loop] = client, closing
            await anext(closing)
        return self._async_clients[loop][0]

    async def _closing(self, client: AsyncQdrantClient) -> AsyncGenerator[None, None]:
        """Waits to close `client`, for `aclose` or for the end of the event loop, which ends its generators first."""
        loop = asyncio.get_running_loop()
        try:
            yield
        finally:
            del self._async_clients[loop]
            await client.close()

    def _nearest(self, search: Search) -> dict[str, Any]:
        return {
            **self._read,
            "query": search.vector,
            "using": VECTOR,
            "query_filter": search.filter,
            "limit": search.limit,
            "with_payload": True,
            "search_params": search.params,
        }

    def _hybrid(self, search: Search) -> dict[str, Any]:
        """Three requests in one call: the fused ranking, all it had to choose from by words, and the former's points by
        cosine with their payloads."""
        models = self.models
        assert search.words is not None
        common = {"filter": search.filter, "limit": search.limit}
        words = models.SparseVector(indices=search.words.indices, values=search.words.values)
        both = [
            models.Prefetch(query=search.vector, using=VECTOR, params=search.params, **common),
            models.Prefetch(query=words, using=WORDS, **common),
        ]
        fusion = (
            models.RrfQuery(rrf=models.Rrf(k=RRF_K))
            if search.fusion == "rrf"
            else models.FusionQuery(fusion=models.Fusion.DBSF)
        )
        fused = models.Prefetch(prefetch=both, query=fusion, limit=search.limit)
        return {
            **self._read,
            "requests": [
                models.QueryRequest(prefetch=both, query=fusion, limit=search.limit),
                models.QueryRequest(prefetch=both, query=words, using=WORDS, limit=2 * search.limit),
                models.QueryRequest(
                    prefetch=fused, query=search.vector, using=VECTOR, params=search.params, limit=search.limit,
                    with_payload=True,
                ),
            ],
        }  # fmt: skip

    def retrieve(self, ids: Sequence[str], *, without: str = "", only: Sequence[str] = ()) -> list[dict[str, Any]]:
        models = self.models
        keys = (
            models.PayloadSelectorInclude(include=list(only))
            if only
            else models.PayloadSelectorExclude(exclude=[without])
        )
        records = self._call(self._opened.retrieve, **self._read, ids=list(ids), with_payload=keys)
        return [record.payload or {} for record in records]

    def scroll(self, size: int, *, only: Sequence[str] = (), vectors: bool = False) -> Iterator[list[StoredPoint]]:
        keys = self.models.PayloadSelectorInclude(include=list(only)) if only else True
        offset = None
        while True:
            records, offset = self._call(
                self._opened.scroll, **self._read, limit=size, offset=offset, with_payload=keys, with_vectors=vectors
            )
            yield [_stored(record) for record in records]
            if offset is None:
                return

    def delete(self, ids: Sequence[str]) -> None:
        self._write(self._opened.delete, points_selector=self.models.PointIdsList(points=list(ids)))

    def delete_where(self, filter: Any) -> None:
        self._write(self._opened.delete, points_selector=self.models.FilterSelector(filter=filter))

    def count(self, filter: Any) -> int:
        return int(
            self._call(
                self._opened.count, **self._named, count_filter=filter, exact=True, timeout=self._connection.seconds
            ).count
        )

    def state(self) -> State:
        info = self._info()
        deferred = info.config.optimizer_config.indexing_threshold == 0
        status = {"green": "ready", "yellow": "building", "grey": "waiting"}.get(info.status.value)
        schema = {path: str(field.data_type.value) for path, field in (info.payload_schema or {}).items()}
        points = info.points_count or 0
        if status is None:
            status = f"{info.status.value}: {info.optimizer_status}"
        return State(points, self._indexed(info), "deferred" if deferred else status, schema, None)

    def _indexed(self, info: Any) -> int:
        """Dense vectors in graphs: where there are words, the server counts those too, all of them. (It may also count
        what was deleted.)"""
        points = info.points_count or 0
        return min(points, max(0, (info.indexed_vectors_count or 0) - (points if self._words else 0)))

    def index_payload(self, fields: Mapping[str, PayloadType]) -> None:
        there = self._info().payload_schema or {}
        for path, kind in fields.items():
            if path not in there or there[path].data_type.value != kind:
                self._call(
                    self._opened.create_payload_index, **self._named, field_name=path, field_schema=kind, wait=True
                )  # without an ordering, which clients before 1.20 cannot send over gRPC

    def defer(self) -> None:
        self._set_threshold(0)

    def resume(self) -> None:
        if self._info().config.optimizer_config.indexing_threshold == 0:
            self._set_threshold(HNSW_MIN_KB)

    def _set_threshold(self, kilobytes: int) -> None:
        self._update(optimizers_config=self.models.OptimizersConfigDiff(indexing_threshold=kilobytes))

    def _update(self, **settings: Any) -> None:
        """Change settings of the collection, not its points."""
        self._call(self._opened.update_collection, **self._named, **settings, timeout=self._connection.seconds)

    def optimize(self) -> None:
        """Let the server index, as it does by itself, and wait until it has: until it says so and the counts agree."""
        self.resume()  # from a load that was killed
        status = self.models.CollectionStatus
        settled, before, moved, asked = 0, -1, time.monotonic(), None
        while settled < SETTLED:
            info = self._info()
            indexed, now = self._indexed(info), time.monotonic()
            if info.status == status.RED:
                raise StoreError(
                    f"the server at {self._url} could not index {self._collection!r}: see its log "
                    f"({info.optimizer_status})"
                )
            asked = self._begin(asked, now) if info.status == status.GREY else None
            green = info.status == status.GREEN
            left = ((info.points_count or 0) - indexed) * self._vector_bytes
            if green and left <= HNSW_MIN_KB * 1024 * info.segments_count:
                return
            # A green server that indexes no more is done too: it may keep more and smaller segments than counted here.
            settled = settled + 1 if green and indexed == before else 0
            if indexed != before:
                before, moved = indexed, now
            elif now - moved > STALLED:
                self._report(info, "still builds")
                moved = now
            time.sleep(POLL)
        self._report(info, "is done")

    def _begin(self, asked: float | None, now: float) -> float:
        """Have a server begin the optimizations that it found when it started, and puts off until the next write
        (grey). Returns when it was asked to: now, unless it was `asked` before.

        Raises:
            StoreError: it has not begun.
        """
        if asked is None:
            self._update(optimizers_config=self.models.OptimizersConfigDiff())  # counts as a write, and changes nothing
            return now
        if now - asked > BEGIN_PATIENCE:
            raise StoreError(
                f"the server at {self._url} does not begin to index {self._collection!r} (it calls it grey): see its "
                "log. All that is stored is there and found, but passages are compared one by one"
            )
        return asked

    def _report(self, info: Any, said: str) -> None:
        logger.warning(
            "%s at %s: the server %s, with %d of %d passages in its graphs; the others are compared one by one",
            self._collection, self._url, said, self._indexed(info), info.points_count,
        )  # fmt: skip

    def collections(self) -> tuple[list[str], dict[str, str]]:
        names = [found.name for found in self._call(self._opened.get_collections).collections]
        aliases = self._call(self._opened.get_aliases).aliases
        return sorted(names), {found.alias_name: found.collection_name for found in aliases}

    def point_alias(self, alias: str) -> None:
        models, aliases = self.models, self.collections()[1]
        name = aliases.get(self._collection, self._collection)  # an alias of an alias is refused
        create = models.CreateAlias(collection_name=name, alias_name=alias)
        steps = [models.CreateAliasOperation(create_alias=create)]
        if alias in aliases:
            steps.insert(0, models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=alias)))
        self._call(
            self._opened.update_collection_aliases,
            change_aliases_operations=steps,
            timeout=self._connection.seconds,
        )

    def snapshot(self, file: Path) -> None:
        """Made on the server, fetched, and removed there."""
        staging = file.with_name(f".{file.name}.part")
        with self._snapshots(file) as http:
            try:
                with open(staging, "wb") as out:  # where nothing can be written, the server need not begin
                    name = http.post("snapshots", params={"wait": "true"}).json()["result"]["name"]
                    try:
                        with http.stream("GET", f"snapshots/{name}") as answer:
                            for chunk in answer.iter_bytes():
                                out.write(chunk)
                    finally:
                        http.delete(f"snapshots/{name}")
                staging.replace(file)
            finally:
                with suppress(OSError):
                    staging.unlink()

    def restore(self, file: Path) -> None:
        with self._snapshots(file) as http, open(file, "rb") as content:
            options = {"priority": "snapshot", "wait": "true"}
            http.post("snapshots/upload", params=options, files={"snapshot": (file.name, content)})

    @contextmanager
    def _snapshots(self, file: Path) -> Iterator[httpx.Client]:
        """For whole files, which the client does not carry. They take what time they need, once there is a connection;
        nothing is tried twice."""
        import httpx

        def check(answer: httpx.Response) -> None:
            if answer.is_error:
                answer.read()
                answer.raise_for_status()

        connection = self._connection
        try:
            with self._sorted(), httpx.Client(
                base_url=f"{self._opened.http.client.host.rstrip('/')}/collections/{self._collection}",
                headers={} if connection.api_key is None else {"api-key": connection.api_key},
                verify=connection.trusted(),
                timeout=httpx.Timeout(None, connect=connection.timeout),
                event_hooks={"response": [check]},
            ) as http:  # fmt: skip
                yield http
        except OSError as error:
            raise StoreError(f"{file}: {error.strerror}") from error

    def drop(self) -> None:
        self._call(self._opened.delete_collection, **self._named, timeout=self._connection.seconds)

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    async def aclose(self) -> None:
        if found := self._async_clients.get(asyncio.get_running_loop()):
            await found[1].aclose()

    @property
    def _opened(self) -> QdrantClient:
        assert self._client is not None, "open() comes first"
        return self._client

    @property
    def _url(self) -> str:
        return shown(self._connection.url)

    @property
    def _named(self) -> dict[str, Any]:
        return {"collection_name": self._collection}

    @property
    def _read(self) -> dict[str, Any]:
        consistency = self._connection.read_consistency
        if isinstance(consistency, str):
            consistency = self.models.ReadConsistencyType(consistency)
        return {**self._named, "consistency": consistency, "timeout": self._connection.seconds}

    def _metadata(self) -> dict[str, Any]:
        return self._info().config.metadata or {}

    def _info(self) -> Any:
        return self._call(self._opened.get_collection, **self._named)

    def _write(self, method: Callable[..., Any], **arguments: Any) -> None:
        """A change of points."""
        ordering = self._connection.write_ordering
        if ordering is not None:
            arguments["ordering"] = self.models.WriteOrdering(ordering)
        self._call(method, **self._named, **arguments, wait=True)

    def _call(
        self, method: Callable[..., T], *, patience: float | None = None, repeated: frozenset[str] | None = None,
        **arguments: Any,
    ) -> T:  # fmt: skip
        """Call a client method, again after a failure that passes: only what may be done twice."""
        retrying = self._retrying("Retrying", repeated or _ANY, patience)
        with self._sorted(retrying):
            answer: T = retrying(method, **arguments)
            return answer

    async def _acall(self, method: Callable[..., Any], **arguments: Any) -> Any:
        """`_call` for a search."""
        retrying = self._retrying("AsyncRetrying", _SEARCH)
        with self._sorted(retrying):
            return await retrying(method, **arguments)

    def _retrying(self, kind: str, repeated: frozenset[str], patience: float | None = None) -> Any:
        tenacity = import_extra("tenacity", "qdrant")
        limit = self._connection.patience if patience is None else patience
        backoff = tenacity.wait_random_exponential(multiplier=0.4, max=2.0)  # 0 to 0.4 s, 0 to 0.8 s, ...
        failed: list[float] = []

        def wait(state: Any) -> float:
            asked = _retry_after(state.outcome.exception())
            return float(backoff(state)) if asked is None else asked * random.uniform(1.0, 1.1)

        def stop(state: Any) -> bool:
            """Patience begins with the first failure, so that a call that took the whole timeout gets another try."""
            failed.append(state.outcome_timestamp)
            return bool(failed[-1] - failed[0] + state.upcoming_sleep > limit)

        return getattr(tenacity, kind)(
            retry=tenacity.retry_if_exception(lambda error: _status(error) in repeated),
            wait=wait,
            stop=stop,
            reraise=True,
        )

    @contextmanager
    def _sorted(self, retrying: Any = None) -> Iterator[None]:
        """The one place that turns the client's errors into ours; others pass."""
        start = time.monotonic()
        try:
            yield
        except Exception as error:  # the one seam: every kind is sorted below
            status = _status(error)
            if status is None:
                raise
            said, tries = self._explain(status, error), retrying.statistics["attempt_number"] if retrying else 1
            if tries > 1:
                said += f" (tried {tries} times in {time.monotonic() - start:.1f} s)"
            raise StoreError(said) from error

    def _explain(self, status: str, error: Exception) -> str:
        connection, text = self._connection, _text(error)
        if connection.api_key:  # a proxy may send back what it was sent
            text = text.replace(connection.api_key, "[secure]")
        text = text if len(text) <= 500 else f"{text[:500]} ..."
        if found := re.search(r'Index required but not found for "(.+?)" of', text):
            status = "NO_INDEX"
        said = _MEANING.get(status, "{place}, collection {name!r}: {text}").format(
            place=f"Qdrant at {self._url}",
            url=self._url,
            ports=f" and gRPC port {connection.grpc_port}" if connection.grpc_port else "",
            seconds=connection.seconds,
            name=self._collection,
            field=found and found[1].strip('"'),
            text=text,
        )
        asked = _retry_after(error)
        return said if asked is None else f"{said} (it asks for a pause of {asked:g} s, longer than patience allows)"


@functools.cache
def _warn_of_unsent(url: str) -> None:
    logger.warning("of the address of %s, the user, password and query are not sent: give a key as api_key", url)


_MEANING = {
    "UNAVAILABLE": "cannot reach {place}: is it running, and are its address{ports} right? ({text})",
    "NOT_QDRANT": "what answers at {url} is no Qdrant, a proxy in front of it, or of a version that qdrant-client does "
    "not understand: check the address ({text})",
    "DEADLINE_EXCEEDED": "{place} did not answer within {seconds} s: raise timeout, or see what keeps it busy ({text})",
    "UNAUTHENTICATED": "{place} refuses access to {name!r}: check the API key ({text})",
    "PERMISSION_DENIED": "{place} refuses access to {name!r}: check the API key ({text})",
    "NOT_FOUND": "{place} has no collection {name!r} any more: index the corpus again ({text})",
    "ALREADY_EXISTS": "{place}: another process just made the collection {name!r}: run this again",
    "RESOURCE_EXHAUSTED": "{place} asks for fewer requests (a rate limit): {text}",
    "FULL": "{place} is full (disk, memory or a quota): {text}",
    "NO_INDEX": "{place}, collection {name!r}: strict mode allows no filter on {field!r}, which has no payload index. "
    "Make one with: d2llm collection index-payload {name} FIELD=TYPE ({text})",
}

_HTTP = {
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    409: "ALREADY_EXISTS",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
    507: "FULL",
}
_FULL = {"RESOURCE_EXHAUSTED": r"disk|memory|storage|quota|space", "INTERNAL": r"no space left"}

_SEARCH = frozenset({"UNAVAILABLE", "RESOURCE_EXHAUSTED", "INTERNAL", "ABORTED", "NOT_QDRANT"})
"""What passes. Someone may be waiting for a search, so that one that took the whole timeout is not repeated."""
_ANY = _SEARCH | {"DEADLINE_EXCEEDED"}


def _status(error: BaseException) -> str | None:
    """One vocabulary for the unrelated families of exceptions that the client raises: gRPC's, and NOT_QDRANT, and FULL,
    which looks like a rate limit or a failure of the server, and does not pass."""
    status = _code(error)
    if status in _FULL and _retry_after(error) is None and re.search(_FULL[status], _text(error), re.IGNORECASE):
        return "FULL"
    return status


def _code(error: BaseException) -> str | None:
    import httpx
    from pydantic import ValidationError
    from qdrant_client.common.client_exceptions import QdrantException
    from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

    grpc = import_extra("grpc", "qdrant")
    if isinstance(error, grpc.RpcError):
        code = getattr(error, "code", None)
        return str(code().name) if code is not None else "UNKNOWN"
    if isinstance(error, QdrantException):  # 429 with a Retry-After, be it one that the client cannot read
        return "RESOURCE_EXHAUSTED"
    if isinstance(error, UnexpectedResponse | httpx.HTTPStatusError):
        answer = _answer(error)
        if answer.status_code == 404 and b'"status"' not in answer.content:  # Qdrant says what it has not found
            return "NOT_QDRANT"
        return _HTTP.get(answer.status_code, "UNKNOWN")
    if isinstance(error, ResponseHandlingException):
        error = error.source
    if isinstance(error, httpx.TimeoutException):
        return "DEADLINE_EXCEEDED"
    if isinstance(error, httpx.TransportError):
        return "UNAVAILABLE"
    # A web page instead of an answer, JSON of another kind, or what cannot be unpacked.
    return "NOT_QDRANT" if isinstance(error, json.JSONDecodeError | ValidationError | httpx.RequestError) else None


def _answer(error: BaseException) -> Any:
    """What has the status, headers and content of an answer: the client's own error, or what httpx keeps in its."""
    return getattr(error, "response", error)


def _retry_after(error: BaseException) -> float | None:
    """Seconds for which a server asks to be left alone."""
    asked = getattr(error, "retry_after_s", None) or getattr(error, "headers", {}).get("retry-after", "")
    return float(asked) if str(asked).isdecimal() else None


def _text(error: BaseException) -> str:
    """What a server said, without what the client wraps it in."""
    details = getattr(error, "details", None)  # of gRPC
    said = details() if callable(details) else error
    with suppress(AttributeError, ValueError, TypeError, KeyError):
        said = json.loads(_answer(error).content)["status"]["error"]
    return " ".join(str(said).split())


def _version(text: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _stored(record: Any) -> StoredPoint:
    vectors = record.vector or {}
    words = vectors.get(WORDS)
    sparse = None if words is None else Sparse(list(words.indices), list(words.values))
    return StoredPoint(str(record.id), vectors.get(VECTOR, []), record.payload or {}, sparse)


def _batches(points: Sequence[StoredPoint]) -> Iterator[list[StoredPoint]]:
    batch, total = list[StoredPoint](), 0
    for point in points:
        numbers = len(point.vector) + 2 * len(point.words.indices if point.words else ())
        size = 20 * numbers + len(json.dumps(point.payload, ensure_ascii=False).encode())
        if batch and (len(batch) == BATCH or total + size > BATCH_BYTES):
            yield batch
            batch, total = [], 0
        batch.append(point)
        total += size
    if batch:
        yield batch
