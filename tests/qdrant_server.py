"""Qdrant's wire protocols, REST and gRPC, in front of the embedded engine, which is the server's own storage.

For tests: real sockets, the real client and the real engine, without the server's program. Each operation stands here
once, on qdrant-client's models of REST; gRPC is converted to them and back. What is checked, and the words in which it
is refused, are the server's; what it can and this cannot is refused as "beyond this server".
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import re
import shutil
import socket
import ssl
import sys
import tarfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import numpy as np
import qdrant_edge as edge
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import to_json
from qdrant_client import grpc as proto
from qdrant_client.conversions.conversion import GrpcToRest, RestToGrpc, grpc_field_type_to_payload_schema
from qdrant_client.http import models
from qdrant_faults import Faults, Proxy, Refusal

if TYPE_CHECKING:
    import trustme

grpc: Any = importlib.import_module("grpc")  # has no types

# The server's defaults.
PARAMS = models.CollectionParams()
HNSW = models.HnswConfig(m=16, ef_construct=100, full_scan_threshold=10_000)
OPTIMIZERS = models.OptimizersConfig(default_segment_number=0, flush_interval_sec=5, indexing_threshold=10_000)
WAL = models.WalConfig(wal_capacity_mb=32, wal_segments_ahead=0)
MAX_REQUEST = 32 * 2**20
STRICT_MODE = models.StrictModeConfigOutput(enabled=False)


class Request(NamedTuple):
    """What arrived: `body` is a model of REST (or a name, or bytes), `options` what REST has in its query string."""

    protocol: str
    operation: str
    body: Any = None
    collection: str = ""
    options: Mapping[str, str] = {}


# ---- models of REST in the classes of the engine ----


def to_edge(value: Any) -> Any:
    if isinstance(value, list) and value and isinstance(value[0], BaseModel):
        return [to_edge(one) for one in value]
    if isinstance(value, dict):
        return {key: to_edge(one) for key, one in value.items()}
    if isinstance(value, datetime):
        return value.isoformat()
    if not isinstance(value, BaseModel | Enum):
        return value
    if type(value) not in CLASSES:
        raise Refusal(400, f"Wrong input: {type(value).__name__} is beyond this server")
    made = CLASSES[type(value)]
    if isinstance(value, BaseModel):
        return made(**{name: to_edge(field) for name, field in value if field is not None})
    return made[value] if isinstance(made, dict) else getattr(made, value.value.title().replace("_", ""))


def _itself(**fields: Any) -> Any:
    """For a model that only wraps its one field."""
    (value,) = fields.values()
    return value


def _by_place(made: Any) -> Callable[..., Any]:
    """For a class that names its one field otherwise."""
    return lambda **fields: made(_itself(**fields))


def _filter(min_should: Any = None, **clauses: Any) -> Any:
    # An empty clause, which gRPC cannot tell from none, is none: to the engine, within a nested one, it is not.
    given = {name: listed(clause) for name, clause in clauses.items() if clause != []}
    return edge.Filter(min_should=min_should, **given)


def _match_value(value: Any) -> Any:
    # The engine's binding takes Python's True for the integer 1, which matches no boolean; numpy's it takes for one.
    return edge.MatchValue(np.bool_(value) if isinstance(value, bool) else value)  # type: ignore[arg-type]  # numpy's bool is not in its hint


def _sparse_params(index: Any = None, modifier: Any = None) -> Any:
    return edge.EdgeSparseVectorParams(**(index or {}), modifier=modifier)


def _optimizers(indexing_threshold: int | None = None, **_: Any) -> Any:
    return edge.EdgeOptimizersConfig(indexing_threshold=indexing_threshold)


def _rrf(k: int = 2, weights: list[float] | None = None) -> Any:
    return edge.Fusion.Rrf(k=k, weights=weights)


CLASSES: dict[type, Any] = {
    models.VectorParams: edge.EdgeVectorParams,
    models.SparseVectorParams: _sparse_params,
    models.SparseIndexParams: dict,
    models.HnswConfig: edge.HnswIndexConfig,
    models.OptimizersConfig: _optimizers,
    models.ScalarQuantization: _itself,
    models.ScalarQuantizationConfig: edge.ScalarQuantizationConfig,
    models.BinaryQuantization: _itself,
    models.BinaryQuantizationConfig: edge.BinaryQuantizationConfig,
    models.TurboQuantization: _itself,
    models.TurboQuantQuantizationConfig: edge.TurboQuantQuantizationConfig,
    models.PointStruct: edge.Point,
    models.SparseVector: edge.SparseVector,
    models.PayloadSelectorInclude: _by_place(edge.PayloadSelector.Include),
    models.PayloadSelectorExclude: _by_place(edge.PayloadSelector.Exclude),
    models.SearchParams: edge.SearchParams,
    models.QuantizationSearchParams: edge.QuantizationSearchParams,
    models.AcornSearchParams: edge.AcornSearchParams,
    models.FusionQuery: _itself,
    models.RrfQuery: _itself,
    models.Rrf: _rrf,
    models.Filter: _filter,
    models.MinShould: edge.MinShould,
    models.FieldCondition: edge.FieldCondition,
    models.IsEmptyCondition: _by_place(edge.IsEmptyCondition),
    models.IsNullCondition: _by_place(edge.IsNullCondition),
    models.PayloadField: _itself,
    models.HasIdCondition: lambda has_id: edge.HasIdCondition(set(has_id)),
    models.HasVectorCondition: _by_place(edge.HasVectorCondition),
    models.NestedCondition: _itself,
    models.Nested: edge.NestedCondition,
    models.MatchValue: _match_value,
    models.MatchAny: edge.MatchAny,
    models.MatchExcept: _by_place(edge.MatchExcept),
    models.MatchText: edge.MatchText,
    models.MatchTextAny: edge.MatchTextAny,
    models.MatchPhrase: edge.MatchPhrase,
    models.Range: edge.RangeFloat,
    models.DatetimeRange: edge.RangeDateTime,
    models.ValuesCount: edge.ValuesCount,
    models.Distance: edge.Distance,
    models.Datatype: edge.VectorStorageDatatype,
    models.Memory: edge.Memory,
    models.Modifier: edge.Modifier,
    models.ScalarType: edge.ScalarType,
    models.TurboQuantBitSize: edge.TurboQuantBitSize,
    models.PayloadSchemaType: edge.PayloadSchemaType,
    models.UpdateMode: edge.UpdateMode,
    models.Fusion: {models.Fusion.RRF: _rrf(), models.Fusion.DBSF: edge.Fusion.Dbsf()},
}


def edge_config(config: Any) -> edge.EdgeConfig:
    params, hnsw = config.params, config.hnsw_config
    vectors = {}
    for name, vector in by_name(params.vectors).items():
        own = vector.hnsw_config and merged(hnsw, vector.hnsw_config)
        vectors[name] = to_edge(vector.model_copy(update={"hnsw_config": own}))
    if not vectors and not params.sparse_vectors:  # the server allows this, the engine does not
        vectors[" "] = edge.EdgeVectorParams(size=1, distance=edge.Distance.Dot)
    return edge.EdgeConfig(
        vectors=vectors,
        sparse_vectors=to_edge(params.sparse_vectors or {}),
        on_disk_payload=params.on_disk_payload,
        hnsw_config=to_edge(hnsw),
        quantization_config=to_edge(config.quantization_config),
        optimizers=to_edge(config.optimizer_config),
    )


def edge_query(request: Any) -> dict[str, Any]:
    """What a query and a prefetch have in common."""
    query = nearest = request.query
    if isinstance(query, models.NearestQuery):
        nearest = None if query.mmr else query.nearest
    if isinstance(nearest, list | models.SparseVector):
        query = edge.Query.Nearest(to_edge(nearest), using=request.using)
    return {
        "query": to_edge(query),
        "prefetches": [edge.Prefetch(**edge_query(one)) for one in listed(request.prefetch)],
        "filter": to_edge(request.filter),
        "params": to_edge(request.params),
        "score_threshold": request.score_threshold,
        "limit": 10 if request.limit is None else request.limit,
    }


def from_edge(record: Any, model: Any = models.Record) -> Any:
    """A point that the engine found."""
    vector = record.vector
    if isinstance(vector, dict):
        for name, one in vector.items():
            if isinstance(one, edge.SparseVector):
                vector[name] = models.SparseVector(indices=one.indices, values=one.values)
    scored = {"score": record.score, "version": record.version} if model is models.ScoredPoint else {}
    return model(id=point_id(record.id), payload=record.payload, vector=vector, **scored)


def point_id(id_: Any) -> Any:
    return str(id_) if isinstance(id_, uuid.UUID) else id_


def listed(value: Any) -> list[Any]:
    """What may be one or several or nothing."""
    return value if isinstance(value, list) else [] if value is None else [value]


def by_name(vectors: Any) -> dict[str, Any]:
    """Vectors, or their settings; a single one has the empty name."""
    return vectors if isinstance(vectors, dict) else {} if vectors is None else {"": vectors}


def merged(model: Any, diff: Any) -> Any:
    """`model` with what `diff` sets of its fields."""
    fields = {name: new for name, new in diff or () if new is not None and name in type(model).model_fields}
    return model.model_copy(update=fields)


# ---- collections ----


class State(BaseModel):
    """What a collection has beside its shard. In a payload index, the engine keeps the type alone."""

    config: models.CollectionConfig
    indexes: dict[str, models.PayloadFieldSchema] = {}


class Collection:
    """A shard and its settings, in a folder."""

    def __init__(self, folder: Path, state: State | None = None) -> None:
        self.folder, self._file = folder, folder / "config.json"
        self.state = state or State.model_validate_json(self._file.read_bytes())
        if state is None:
            self.open()
        else:
            config = edge_config(state.config)
            folder.mkdir()
            self.shard = edge.EdgeShard.create(str(folder / "shard"), config)
            self.save()

    def open(self) -> None:
        self.shard = edge.EdgeShard.load(str(self.folder / "shard"), edge_config(self.state.config))

    def close(self) -> None:
        self.shard.flush()
        self.shard.close()

    def save(self) -> None:
        self._file.write_text(self.state.model_dump_json())

    def configure(self, config: Any) -> None:
        edge_config(config)  # may refuse
        self.state.config = config
        self.save()
        self.close()
        self.open()

    def info(self, status: models.CollectionStatus) -> Any:
        """The server indexes in the background: here, whoever looks finds it done, unless it is to look otherwise."""
        if status == models.CollectionStatus.GREEN:
            self.shard.optimize()
        info = self.shard.info()
        schema = {
            field: models.PayloadIndexInfo(
                data_type=type_of(index),
                params=None if isinstance(index, Enum) else index,
                points=info.payload_schema[field].points,
            )
            for field, index in self.state.indexes.items()
        }
        return models.CollectionInfo(
            status=status,
            optimizer_status=models.OptimizersStatusOneOf.OK,
            points_count=info.points_count,
            indexed_vectors_count=info.indexed_vectors_count,
            segments_count=info.segments_count,
            config=self.state.config,
            payload_schema=schema,
        )

    # What the engine would take, or refuse only after it has written it to its log.

    def check_vector(self, name: str, vector: Any) -> None:
        params = self.state.config.params
        dense = by_name(params.vectors).get(name)
        if dense is None and name not in (params.sparse_vectors or {}):
            raise Refusal(400, f"Wrong input: Not existing vector name error: {name}")
        if dense is None or not isinstance(vector, list):
            return
        if len(vector) != dense.size:
            raise Refusal(400, f"Wrong input: Vector dimension error: expected dim: {dense.size}, got {len(vector)}")
        if (index := next((i for i, number in enumerate(vector) if not math.isfinite(number)), None)) is not None:
            place = f"component at index {index} of vector '{name}'"
            problem = f"{place} is not representable as a finite float32 value"
            raise Refusal(400, f"Wrong input: Vector value error: {problem}")

    def check_query(self, request: Any) -> None:
        query = request.query
        nearest = query.nearest if isinstance(query, models.NearestQuery) else query
        if isinstance(nearest, list | models.SparseVector):
            self.check_vector(request.using or "", nearest)
        self.check_filter(request.filter)
        for one in listed(request.prefetch):
            self.check_query(one)

    def check_filter(self, filter: Any, *, update: bool = False) -> None:
        """Strict mode: a field that is filtered on must be indexed."""
        strict = self.state.config.strict_mode_config or STRICT_MODE
        allowed = strict.unindexed_filtering_update if update else strict.unindexed_filtering_retrieve
        if filter is None or not strict.enabled or allowed is not False:
            return
        for key, types in needed_indexes(filter):
            if key not in self.state.indexes or type_of(self.state.indexes[key]) not in types:
                raise Refusal(
                    400,
                    f'Bad request: Index required but not found for "{key}" of one of the following types: '
                    f"[{', '.join(types)}]. Help: Create an index for this key or use a different filter.",
                )


def type_of(schema: Any) -> Any:
    """The type of a payload index, which is given as such or with parameters."""
    return models.PayloadSchemaType(schema if isinstance(schema, Enum) else schema.type)


def needed_indexes(filter: Any, prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """The fields of a filter, each with the types of index that would do."""
    clauses = [filter.must, filter.should, filter.must_not, filter.min_should and filter.min_should.conditions]
    for condition in (condition for clause in clauses for condition in listed(clause)):
        if isinstance(condition, models.Filter):
            yield from needed_indexes(condition, prefix)
        elif isinstance(condition, models.NestedCondition):
            yield from needed_indexes(condition.nested.filter, f"{prefix}{condition.nested.key}[].")
        elif isinstance(condition, models.FieldCondition) and (types := _index_types(condition)):
            yield prefix + condition.key, types
        elif isinstance(condition, models.IsEmptyCondition | models.IsNullCondition):
            (_, field), *_ = condition
            yield prefix + field.key, [*models.PayloadSchemaType]


def _index_types(condition: Any) -> list[str]:
    match = condition.match
    if isinstance(match, models.MatchValue | models.MatchAny | models.MatchExcept):
        ((_, given),) = match
        values = listed(given)
        if not values or isinstance(values[0], int):
            return ["bool" if isinstance(values[0], bool) else "integer"] if values else []
        return ["uuid", "keyword"] if all(map(_is_uuid, values)) else ["keyword"]
    if match is not None:
        return ["text"]
    if isinstance(condition.range, models.DatetimeRange):
        return ["datetime"]
    return ["float", "integer"] if condition.range else [*models.PayloadSchemaType]


def _is_uuid(text: str) -> bool:
    with suppress(ValueError):
        return bool(uuid.UUID(text))
    return False


class Storage:
    """The operations, named as the client names them, on what is in a folder. Takes one call at a time."""

    def __init__(self, folder: Path, version: str) -> None:
        self._folder, self._version = folder, version
        self._operations = self.busy_answers = 0
        self.grey, self.stuck = set[str](), False
        for kind in ("collections", "snapshots", "uploads"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        self.collections = {unquote(path.name): Collection(path) for path in (folder / "collections").iterdir()}
        self._aliases: dict[str, str] = {}
        with suppress(FileNotFoundError):
            self._aliases = json.loads((folder / "aliases.json").read_text())

    def close(self) -> None:
        for collection in self.collections.values():
            collection.close()

    def _resolve(self, name: str) -> str:
        resolved = name if name in self.collections else self._aliases.get(name, name)
        if resolved not in self.collections:
            raise Refusal(404, f"Not found: Collection `{name}` doesn't exist!")
        return resolved

    def _opened(self, request: Request) -> tuple[Collection, Any]:
        return self.collections[self._resolve(request.collection)], request.body

    def _written(self, request: Request) -> None:
        """Whatever changes a collection begins the optimizations that were put off."""
        if not self.stuck:
            self.grey.discard(self._resolve(request.collection))

    def _updated(self, request: Request) -> Any:
        self._written(request)
        self._operations += 1
        status = "completed" if request.options.get("wait") == "true" else "acknowledged"
        return models.UpdateResult(operation_id=self._operations, status=models.UpdateStatus(status))

    def info(self, request: Request) -> Any:
        return models.VersionInfo(title="qdrant - vector search engine", version=self._version)

    def collection_exists(self, request: Request) -> Any:
        known = (*self.collections, *self._aliases)
        return models.CollectionExistence(exists=request.collection in known)

    def get_collections(self, request: Request) -> Any:
        found = [models.CollectionDescription(name=name) for name in self.collections]
        return models.CollectionsResponse(collections=found)

    def create_collection(self, request: Request) -> bool:
        name, body = request.collection, request.body
        if name in self.collections:
            raise Refusal(409, f"Wrong input: Collection `{name}` already exists!")
        if name in self._aliases:
            problem = "Alias with the same name already exists"
            raise Refusal(400, f"Wrong input: Can't create collection with name {name}. {problem}")
        config = models.CollectionConfig(
            params=merged(PARAMS, body),
            hnsw_config=merged(HNSW, body.hnsw_config),
            optimizer_config=merged(OPTIMIZERS, body.optimizers_config),
            wal_config=merged(WAL, body.wal_config),
            quantization_config=body.quantization_config,
            strict_mode_config=merged(STRICT_MODE, body.strict_mode_config),
            metadata=body.metadata,
        )
        folder = self._folder / "collections" / quote(name, safe="")
        self.collections[name] = Collection(folder, State(config=config))
        return True

    def get_collection(self, request: Request) -> Any:
        collection, _ = self._opened(request)
        if self._resolve(request.collection) in self.grey:
            return collection.info(models.CollectionStatus.GREY)
        self.busy_answers -= (busy := self.busy_answers > 0)
        return collection.info(models.CollectionStatus.YELLOW if busy else models.CollectionStatus.GREEN)

    def update_collection(self, request: Request) -> bool:
        collection, body = self._opened(request)
        config = collection.state.config
        params = merged(config.params, body.params)
        for name, diff in (body.vectors or {}).items():
            vector = {name: merged(by_name(params.vectors)[name], diff)}
            params.vectors = {**params.vectors, **vector} if name else vector[name]
        new = {
            "params": params,
            "hnsw_config": merged(config.hnsw_config, body.hnsw_config),
            "optimizer_config": merged(config.optimizer_config, body.optimizers_config),
            "quantization_config": body.quantization_config or config.quantization_config,
            "strict_mode_config": merged(config.strict_mode_config, body.strict_mode_config),
            "metadata": {**(config.metadata or {}), **(body.metadata or {})} or None,
        }
        collection.configure(config.model_copy(update=new))
        self._written(request)
        return True

    def delete_collection(self, request: Request) -> bool:
        """Takes no alias for a name, as the server."""
        if (collection := self.collections.pop(request.collection, None)) is None:
            return False
        collection.close()
        shutil.rmtree(collection.folder)
        self._set_aliases({alias: name for alias, name in self._aliases.items() if name != request.collection})
        return True

    def update_collection_aliases(self, request: Request) -> bool:
        aliases = dict(self._aliases)
        for action in request.body.actions:
            if isinstance(action, models.CreateAliasOperation):
                name, alias = action.create_alias.collection_name, action.create_alias.alias_name
                if name not in self.collections:
                    raise Refusal(404, f"Not found: Collection `{name}` doesn't exist!")
                if alias in self.collections:
                    raise Refusal(409, f"Wrong input: Collection `{alias}` already exists!")
                aliases[alias] = name
            elif isinstance(action, models.DeleteAliasOperation):
                aliases.pop(action.delete_alias.alias_name, None)
            else:
                old, new = action.rename_alias.old_alias_name, action.rename_alias.new_alias_name
                if old not in aliases:
                    raise Refusal(404, f"Not found: Alias {old} does not exists!")
                aliases[new] = aliases.pop(old)
        self._set_aliases(aliases)
        return True

    def _set_aliases(self, aliases: dict[str, str]) -> None:
        self._aliases = aliases
        (self._folder / "aliases.json").write_text(json.dumps(aliases))

    def get_aliases(self, request: Request, *, of: str | None = None) -> Any:
        found = [(alias, name) for alias, name in self._aliases.items() if of in (None, name)]
        return models.CollectionsAliasesResponse(
            aliases=[models.AliasDescription(alias_name=alias, collection_name=name) for alias, name in found]
        )

    def get_collection_aliases(self, request: Request) -> Any:
        return self.get_aliases(request, of=self._resolve(request.collection))

    def upsert(self, request: Request) -> Any:
        collection, body = self._opened(request)
        check_ids([point.id for point in body.points], request.protocol)
        for point in body.points:
            for name, vector in by_name(point.vector).items():
                collection.check_vector(name, vector)
        collection.check_filter(body.update_filter, update=True)
        fields = (to_edge(field) for field in (body.points, body.update_filter, body.update_mode))
        collection.shard.update(edge.UpdateOperation.upsert_points(*fields))
        return self._updated(request)

    def delete(self, request: Request) -> Any:
        collection, body = self._opened(request)
        if isinstance(body, models.PointIdsList):
            check_ids(body.points, request.protocol)
            operation = edge.UpdateOperation.delete_points(body.points)
        else:
            collection.check_filter(body.filter, update=True)
            operation = edge.UpdateOperation.delete_points_by_filter(to_edge(body.filter))
        collection.shard.update(operation)
        return self._updated(request)

    def retrieve(self, request: Request) -> Any:
        collection, body = self._opened(request)
        check_ids(body.ids, request.protocol)
        payload = True if body.with_payload is None else to_edge(body.with_payload)
        found = collection.shard.retrieve(body.ids, with_payload=payload, with_vector=body.with_vector or False)
        return [from_edge(record) for record in found]

    def count(self, request: Request) -> Any:
        collection, body = self._opened(request)
        collection.check_filter(body.filter)
        found = collection.shard.count(edge.CountRequest(exact=body.exact is not False, filter=to_edge(body.filter)))
        return models.CountResult(count=found)

    def scroll(self, request: Request) -> Any:
        collection, body = self._opened(request)
        if body.order_by is not None:
            raise Refusal(400, "Wrong input: order_by is beyond this server")
        check_ids(listed(body.offset), request.protocol)
        collection.check_filter(body.filter)
        found, following = collection.shard.scroll(
            edge.ScrollRequest(
                offset=body.offset,
                limit=10 if body.limit is None else body.limit,
                filter=to_edge(body.filter),
                with_payload=True if body.with_payload is None else to_edge(body.with_payload),
                with_vector=body.with_vector or False,
            )
        )
        return models.ScrollResult(points=[from_edge(record) for record in found], next_page_offset=point_id(following))

    def query_points(self, request: Request) -> Any:
        collection, body = self._opened(request)
        collection.check_query(body)
        payload, vector = to_edge(body.with_payload) or False, body.with_vector or False
        query = edge.QueryRequest(**edge_query(body), offset=body.offset, with_payload=payload, with_vector=vector)
        found = collection.shard.query(query)
        return models.QueryResponse(points=[from_edge(point, models.ScoredPoint) for point in found])

    def query_batch_points(self, request: Request) -> Any:
        return [self.query_points(request._replace(body=one)) for one in request.body.searches]

    def create_payload_index(self, request: Request) -> Any:
        collection, body = self._opened(request)
        kind = to_edge(type_of(body.field_schema))
        collection.shard.update(edge.UpdateOperation.create_field_index(body.field_name, kind))
        collection.state.indexes[body.field_name] = body.field_schema
        collection.save()
        return self._updated(request)

    def delete_payload_index(self, request: Request) -> Any:
        collection, field = self._opened(request)
        collection.shard.update(edge.UpdateOperation.delete_field_index(field))
        collection.state.indexes.pop(field, None)
        collection.save()
        return self._updated(request)

    # A snapshot is here the folder of the closed collection in a tar: a server has the same shard, wrapped otherwise.

    def create_snapshot(self, request: Request) -> Any:
        collection, _ = self._opened(request)
        path = self._snapshots(request) / f"{collection.folder.name}-{time.time_ns()}.snapshot"
        path.parent.mkdir(exist_ok=True)
        collection.close()
        try:
            with tarfile.open(path, "w:gz", compresslevel=1) as tar:
                tar.add(collection.folder, ".")
        finally:
            collection.open()
        return _described(path)

    def list_snapshots(self, request: Request) -> Any:
        return [_described(path) for path in sorted(self._snapshots(request).glob("*"))]

    def delete_snapshot(self, request: Request) -> bool:
        self._snapshot(request).unlink()
        return True

    def download_snapshot(self, request: Request) -> bytes:
        return self._snapshot(request).read_bytes()

    def _snapshots(self, request: Request) -> Path:
        return self._folder / "snapshots" / quote(self._resolve(request.collection), safe="")

    def _snapshot(self, request: Request) -> Path:
        path = self._snapshots(request) / str(request.body)
        if not path.is_file():
            raise Refusal(404, f"Not found: Snapshot {request.body} not found")
        return path

    def upload_snapshot(self, request: Request) -> bool:
        """Make the collection what the snapshot holds, whether it exists or not."""
        name = self._aliases.get(request.collection, request.collection)
        staging, folder = (self._folder / kind / quote(name, safe="") for kind in ("uploads", "collections"))
        shutil.rmtree(staging, ignore_errors=True)
        try:
            with tarfile.open(fileobj=BytesIO(request.body)) as tar:
                unpack(tar, staging)
            State.model_validate_json((staging / "config.json").read_bytes())
        except (tarfile.TarError, OSError, ValueError) as error:
            raise Refusal(400, f"Wrong input: the snapshot cannot be read: {error}") from error
        if name in self.collections:
            self.collections.pop(name).close()
            shutil.rmtree(folder)
        self.collections[name] = Collection(staging.rename(folder))
        return True


def check_ids(ids: list[Any], protocol: str) -> None:
    for id_ in ids:
        if not (isinstance(id_, int) and id_ >= 0) and not _is_uuid(str(id_)):
            text = f"value {id_} is not a valid point ID, valid values are either an unsigned integer or a UUID"
            rest = protocol == "rest"
            raise Refusal(400, f"Format error in JSON body: {text}" if rest else f"Unable to parse UUID: {id_}")


def unpack(tar: tarfile.TarFile, folder: Path) -> None:
    """Leaving holes for zeros: there are 130 MB of them in a small collection."""
    for member in tar:
        path = folder / member.name
        if (source := tar.extractfile(member)) is None:
            path.mkdir(parents=True, exist_ok=True)
            continue
        with path.open("wb") as file:
            while block := source.read(1 << 16):
                if block == bytes(len(block)):
                    file.seek(len(block), 1)
                else:
                    file.write(block)
            file.truncate()


def _described(snapshot: Path) -> Any:
    return models.SnapshotDescription(
        name=snapshot.name,
        size=snapshot.stat().st_size,
        creation_time=datetime.fromtimestamp(snapshot.stat().st_mtime).isoformat(timespec="seconds"),
        checksum=hashlib.sha256(snapshot.read_bytes()).hexdigest(),
    )


# ---- both protocols ----

_C, _ALIASES = "/collections/{collection}", "/collections/aliases"
_INDEX, _SNAPSHOT = f"{_C}/index/{{field_name}}", f"{_C}/snapshots/{{snapshot_name}}"
ROUTES: list[tuple[str, Any, str, str]] = [
    ("info", None, "GET /", "Qdrant/HealthCheck"),
    ("get_collections", None, "GET /collections", "Collections/List"),
    ("collection_exists", None, f"GET {_C}/exists", "Collections/CollectionExists"),
    ("create_collection", models.CreateCollection, f"PUT {_C}", "Collections/Create"),
    ("get_collection", None, f"GET {_C}", "Collections/Get"),
    ("update_collection", models.UpdateCollection, f"PATCH {_C}", "Collections/Update"),
    ("delete_collection", None, f"DELETE {_C}", "Collections/Delete"),
    ("update_collection_aliases", models.ChangeAliasesOperation, f"POST {_ALIASES}", "Collections/UpdateAliases"),
    ("get_aliases", None, "GET /aliases", "Collections/ListAliases"),
    ("get_collection_aliases", None, f"GET {_C}/aliases", "Collections/ListCollectionAliases"),
    ("upsert", models.PointsList, f"PUT {_C}/points", "Points/Upsert"),
    ("retrieve", models.PointRequest, f"POST {_C}/points", "Points/Get"),
    ("delete", models.PointsSelector, f"POST {_C}/points/delete", "Points/Delete"),
    ("count", models.CountRequest, f"POST {_C}/points/count", "Points/Count"),
    ("scroll", models.ScrollRequest, f"POST {_C}/points/scroll", "Points/Scroll"),
    ("query_points", models.QueryRequest, f"POST {_C}/points/query", "Points/Query"),
    ("query_batch_points", models.QueryRequestBatch, f"POST {_C}/points/query/batch", "Points/QueryBatch"),
    ("create_payload_index", models.CreateFieldIndex, f"PUT {_C}/index", "Points/CreateFieldIndex"),
    ("delete_payload_index", "field_name", f"DELETE {_INDEX}", "Points/DeleteFieldIndex"),
    ("create_snapshot", None, f"POST {_C}/snapshots", "Snapshots/Create"),
    ("list_snapshots", None, f"GET {_C}/snapshots", "Snapshots/List"),
    ("delete_snapshot", "snapshot_name", f"DELETE {_SNAPSHOT}", "Snapshots/Delete"),
    ("download_snapshot", "snapshot_name", f"GET {_SNAPSHOT}", ""),
    ("upload_snapshot", bytes, f"POST {_C}/snapshots/upload", ""),
]
"""Operation, body (a model, the name of the field that is all of it, or a file), and where it arrives."""


# ---- REST ----


def _pattern(place: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"{(\w+)}", r"(?P<\1>[^/]+)", place))


REST = [(operation, kind, _pattern(place)) for operation, kind, place, _ in ROUTES]


class RestHandler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and content leave together
    server: RestServer

    def answer(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        if url.path in ("/healthz", "/readyz", "/livez"):
            return self._send(200, f"{url.path[1:]} check passed".encode(), "text/plain")
        try:
            if url.path != "/":
                self.server.qdrant.check_key({name.lower(): value for name, value in self.headers.items()})
            request = self._request(url.path, dict(parse_qsl(url.query)), content)
            result = self.server.qdrant.answer(request, self.client_address[1])
        except Refusal as refusal:
            retry = {} if refusal.retry_after is None else {"Retry-After": str(refusal.retry_after)}
            text = refusal.text.encode()
            if refusal.media == "application/json":
                text = to_json({"status": {"error": refusal.text}, "time": 0.0})
            return self._send(refusal.status, text, refusal.media, retry)
        if isinstance(result, bytes):
            return self._send(200, result, "application/octet-stream")
        if not isinstance(result, models.VersionInfo):
            result = {"result": result, "status": "ok", "time": 0.0}
        self._send(200, to_json(result), "application/json")

    do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = answer

    def _request(self, path: str, options: dict[str, str], content: bytes) -> Request:
        for operation, kind, pattern in REST:
            if found := pattern.fullmatch(f"{self.command} {path}"):
                parts = {name: unquote(part) for name, part in found.groupdict().items()}
                collection = parts.pop("collection", "")
                return Request("rest", operation, self._body(kind, parts, content), collection, options)
        raise Refusal(404, "", "text/plain")

    def _body(self, kind: Any, parts: dict[str, str], content: bytes) -> Any:
        if kind is None or isinstance(kind, str):
            return kind and parts[kind]
        if kind is bytes:
            return self._file(content)
        if len(content) > MAX_REQUEST:
            size = f"JSON payload ({len(content)} bytes) is larger than allowed (limit: {MAX_REQUEST} bytes)"
            raise Refusal(400, f"Payload error: {size}.")
        try:
            return TypeAdapter(kind).validate_json(content)
        except ValidationError as error:
            raise Refusal(400, f"Format error in JSON body: {error.errors()[0]['msg']}") from error

    def _file(self, content: bytes) -> bytes:
        """The one file of a form."""
        boundary = f"--{self.headers.get_param('boundary')}".encode()
        start = content.index(b"\r\n\r\n", content.index(boundary)) + 4
        return content[start : content.rindex(b"\r\n" + boundary)]

    def _send(self, status: int, content: bytes, media: str, headers: Mapping[str, str] = {}) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": media, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class RestServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, qdrant: QdrantServer, port: int, certificate: trustme.LeafCert | None) -> None:
        super().__init__(("127.0.0.1", port), RestHandler)
        self.qdrant = qdrant
        self._connections: set[Any] = set()
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            certificate.configure_cert(context)
            # Hands are shaken in the connection's own thread: here, a client that says nothing would stop the server.
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # OSError: the client has gone, or does not trust us
            super().handle_error(request, client_address)

    def close(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


# ---- gRPC ----

RENAMED = {
    "vectors_config": "vectors",
    "sparse_vectors_config": "sparse_vectors",
    "with_vectors": "with_vector",
    "query_points": "searches",
    "read_consistency": "consistency",
    "result": "points",
}
"""Fields that gRPC calls otherwise than REST."""


def to_rest(message: Any, kind: Any) -> Any:
    """A message as a model of REST: of what is set, what the model knows."""
    if kind is None or isinstance(kind, str):
        return kind and getattr(message, kind)
    if kind is models.PointsSelector:
        return GrpcToRest.convert_points_selector(message.points)
    if kind is models.CreateFieldIndex:
        return _index(message)
    fields = {RENAMED.get(field.name, field.name): field for field, _ in message.ListFields()}
    return kind(**{name: _field(message, field) for name, field in fields.items() if name in kind.model_fields})


def _field(message: Any, field: Any) -> Any:
    """The client has a conversion for each type, named after it."""
    value, kind = getattr(message, field.name), field.message_type or field.enum_type
    if kind is None:
        return value
    if kind is field.message_type and kind.GetOptions().map_entry:
        return GrpcToRest.convert_payload(value)
    convert = getattr(GrpcToRest, f"convert_{_snake(kind.name)}")
    return [convert(one) for one in value] if field.is_repeated else convert(value)


def _index(message: Any) -> Any:
    schema: models.PayloadFieldSchema
    if message.HasField("field_index_params"):
        schema = GrpcToRest.convert_payload_schema_params(message.field_index_params)
    else:
        schema = GrpcToRest.convert_payload_schema_type(grpc_field_type_to_payload_schema(message.field_type))
    return models.CreateFieldIndex(field_name=message.field_name, field_schema=schema)


def to_grpc(value: Any, kind: Any) -> Any:
    """A result, or a part of one, as messages of this type: the client has conversions of the parts that matter."""
    if kind is None:
        return value
    if kind.name == "PointId":
        return RestToGrpc.convert_extended_point_id(value)
    if kind.name == "RetrievedPoint":
        value = value.model_copy(update={"payload": value.payload or {}})
    if convert := getattr(RestToGrpc, f"convert_{_snake(kind.name)}", None):
        return convert(value)
    fields = {}
    for field in kind.fields:
        part = getattr(value, RENAMED.get(field.name, field.name), value)
        if field.is_repeated:
            fields[field.name] = [to_grpc(one, field.message_type) for one in part]
        elif field.name not in ("time", "usage") and part is not None:
            fields[field.name] = to_grpc(part, field.message_type)
    return getattr(proto, kind.name)(**fields)


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _options(message: Any) -> dict[str, str]:
    """What a request of REST has in its query string."""
    options = {}
    for field, _ in message.ListFields():
        if field.name in ("wait", "ordering", "read_consistency", "timeout"):
            options[RENAMED.get(field.name, field.name)] = str(_field(message, field)).lower()
    return options


class GrpcServer:
    def __init__(self, qdrant: QdrantServer, port: int, certificate: trustme.LeafCert | None) -> None:
        options = [("grpc.max_receive_message_length", MAX_REQUEST), ("grpc.so_reuseport", 0)]
        self._pool = ThreadPoolExecutor(8)
        self._server = grpc.server(self._pool, options=options)
        for module in ("qdrant", "collections_service", "points_service", "snapshots_service"):
            stubs = importlib.import_module(f"qdrant_client.grpc.{module}_pb2_grpc")
            messages = importlib.import_module(f"qdrant_client.grpc.{module}_pb2")
            ((service, described),) = messages.DESCRIPTOR.services_by_name.items()
            methods = {
                method.name: _method(qdrant, operation, kind, method.output_type)
                for method in described.methods
                for operation, kind, _, place in ROUTES
                if place == f"{service}/{method.name}"
            }
            servicer = type(service, (getattr(stubs, f"{service}Servicer"),), methods)()
            getattr(stubs, f"add_{service}Servicer_to_server")(servicer, self._server)
        address = f"127.0.0.1:{port}"
        if certificate is None:
            self.port = self._server.add_insecure_port(address)
        else:
            chain = b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
            credentials = grpc.ssl_server_credentials([(certificate.private_key_pem.bytes(), chain)])
            self.port = self._server.add_secure_port(address, credentials)
        self._server.start()

    def close(self) -> None:
        self._server.stop(None).wait()
        self._pool.shutdown()


def _method(qdrant: QdrantServer, operation: str, kind: Any, answered: Any) -> Callable[..., Any]:
    def method(_: Any, message: Any, context: Any) -> Any:
        try:
            qdrant.check_key(dict(context.invocation_metadata()))
            collection = getattr(message, "collection_name", "")
            request = Request("grpc", operation, to_rest(message, kind), collection, _options(message))
            return to_grpc(qdrant.answer(request, int(context.peer().rpartition(":")[2])), answered)
        except Refusal as refusal:
            if refusal.retry_after is not None:
                context.set_trailing_metadata([("retry-after", str(refusal.retry_after))])
            context.abort(getattr(grpc.StatusCode, refusal.code), refusal.text)
        except ValidationError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"Validation error in body: {error.errors()[0]['msg']}")

    return method


# ---- both ----


class QdrantServer:
    """Serves what is in `folder`, on ports of this host that it keeps over a restart.

    `certificate` (for 127.0.0.1, by trustme) makes both of them TLS. Those `faults` that happen to connections need
    `proxied`: `url` and `grpc_port` then lead through proxies. `requests` is what arrived and was let in.
    """

    def __init__(
        self,
        folder: Path,
        *,
        api_key: str | None = None,
        certificate: trustme.LeafCert | None = None,
        version: str = "1.18.2",
        proxied: bool = False,
    ) -> None:
        self.requests: list[Request] = []
        self.faults = Faults()
        self._folder, self._version, self._api_key, self._certificate = folder, version, api_key, certificate
        self._lock = threading.Lock()
        self._ports = (0, 0)
        self._storage: Storage | None = None
        self._open()
        if proxied:
            self.faults.proxies = {"rest": Proxy(self._ports[0]), "grpc": Proxy(self._ports[1])}

    def __enter__(self) -> QdrantServer:
        return self

    def __exit__(self, *_: object) -> None:
        for proxy in self.faults.proxies.values():
            proxy.close()
        self.close()

    @property
    def url(self) -> str:
        scheme = "https" if self._certificate else "http"
        return f"{scheme}://127.0.0.1:{self.faults.proxies['rest'].port if self.faults.proxies else self._ports[0]}"

    @property
    def grpc_port(self) -> int:
        return self.faults.proxies["grpc"].port if self.faults.proxies else self._ports[1]

    def close(self) -> None:
        """Drop all connections, and let go of the folder."""
        self._rest.close()
        self._grpc.close()
        with self._lock:
            if self._storage is not None:
                self._storage.close()
                self._storage = None

    def restart(self) -> None:
        self.close()
        self._open()

    def _open(self) -> None:
        self._storage = Storage(self._folder, self._version)
        self._rest = RestServer(self, self._ports[0], self._certificate)
        self._grpc = GrpcServer(self, self._ports[1], self._certificate)
        self._ports = (self._rest.server_port, self._grpc.port)

    def be_busy(self, answers: int) -> None:
        """Let the next so many answers about a collection say that it is being indexed (yellow)."""
        with self._lock:
            assert self._storage is not None
            self._storage.busy_answers = answers

    def be_grey(self, *, stuck: bool = False) -> None:
        """Put off optimizations until the next write of a collection, as a server does with those that it finds when it
        starts; if it is `stuck`, for ever."""
        with self._lock:
            assert self._storage is not None
            self._storage.grey, self._storage.stuck = set(self._storage.collections), stuck

    def answer(self, request: Request, peer: int) -> Any:
        """The result of one call that came from the port `peer`, as a model of REST.

        Raises:
            Refusal: there is none.
        """
        self.requests.append(request)
        with self.faults.around(request.operation, request.protocol, peer), self._lock:
            if self._storage is None:
                raise Refusal(503, "Service unavailable: shutting down")
            try:
                return getattr(self._storage, request.operation)(request)
            except Refusal:
                raise
            except Exception as error:  # the engine's errors are bare `Exception`s
                if str(error).startswith("Service runtime error"):
                    raise Refusal(500, f"Service internal error: {error}") from error
                raise Refusal(400, f"Wrong input: {error}") from error

    def check_key(self, headers: Mapping[str, str]) -> None:
        """A server answers this with a bare text."""
        found = headers.get("api-key") or headers.get("authorization", "").removeprefix("Bearer ")
        if self._api_key not in (None, found):
            missing = "Must provide an API key or an Authorization bearer token"
            raise Refusal(401, "Invalid API key or JWT" if found else missing, "text/plain")
