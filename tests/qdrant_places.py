"""Points, filters, and places for collections, which the tests of indexes share."""

from __future__ import annotations

import functools
import os
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient
from qdrant_server import QdrantServer

from d2llm.connectors import Qdrant, QdrantIndex
from d2llm.folder import ModelConfig
from d2llm.types import Candidates, Filter, Floats, Point

E, H, N = 32, 10, 300  # H is no multiple of 3: features are padded when stored
CONFIG = ModelConfig(embedding_dim=E, feature_bytes=H, precision="fp32", fingerprint="0123456789abcdef")
SERVER = "D2LLM_QDRANT_URL"
PLACES = ("embedded", "rest", "grpc", "server")


class Place:
    """Where a test keeps its collections: a folder, or a server over REST or gRPC."""

    def __init__(self, kind: str, folder: Path, stack: ExitStack, server: QdrantServer | None) -> None:
        self.kind, self.server, self._stack = kind, server, stack
        self.location, self.options = str(folder / "qdrant"), dict[str, Any]()
        if server is not None:
            self.location = server.url
            self.options = {"grpc_port": server.grpc_port if kind == "grpc" else None}
        elif kind == "server":
            self.location = os.environ[SERVER]
        self._prefix = "" if self.embedded else f"d2llm-test-{uuid.uuid4().hex[:12]}-"
        self._opened: list[QdrantIndex] = []

    def __call__(self, name: str = "docs", **more: Any) -> QdrantIndex:
        """Opens a collection here, again at each call; closed in the end."""
        return self.opened(self.qdrant.index(self.name(name), **more))

    def opened(self, index: QdrantIndex) -> QdrantIndex:
        """The same index, which is closed in the end."""
        self._stack.callback(index.close)
        self._opened.append(index)
        return index

    def again(self, name: str = "docs", **more: Any) -> QdrantIndex:
        """The same when all others are closed: embedded, only one can have a collection open."""
        while self._opened:
            self._opened.pop().close()
        return self(name, **more)

    def name(self, name: str) -> str:
        """What a collection or alias is called here: others' are on a server too."""
        return name if name.startswith(self._prefix) else self._prefix + name

    def names(self) -> tuple[list[str], dict[str, str]]:
        """Collections and aliases, by the names that `name` was given."""
        cut = len(self._prefix)
        names, aliases = self.qdrant.collections()
        return (
            [name[cut:] for name in names if name.startswith(self._prefix)],
            {alias[cut:]: name[cut:] for alias, name in aliases.items() if alias.startswith(self._prefix)},
        )

    @functools.cached_property
    def qdrant(self) -> Qdrant:
        return Qdrant(self.location, **self.options)

    @property
    def embedded(self) -> bool:
        return self.kind == "embedded"

    @functools.cached_property
    def client(self) -> QdrantClient:
        """The server's own client, for what d2llm does not do."""
        assert not self.embedded
        client = QdrantClient(self.location, check_compatibility=False)
        self._stack.callback(client.close)
        return client


@contextmanager
def place_of(kind: str, folder: Path, server: QdrantServer | None = None) -> Iterator[Place]:
    """A place of this kind, without collections; what was made there is gone afterwards. Without `server`, REST and
    gRPC get one of their own."""
    if kind == "server" and SERVER not in os.environ:
        pytest.skip(f"{SERVER} is not set: no server to test against")
    with ExitStack() as stack:
        if kind not in ("rest", "grpc"):
            server = None
        elif server is None:
            server = stack.enter_context(QdrantServer(folder / "server", version="1.20.0"))
        place = Place(kind, folder, stack, server)
        yield place
        if not place.embedded:
            for name in place.names()[0]:
                place.client.delete_collection(place.name(name))  # and its aliases


def make_points(n: int = N, *, seed: int = 0, width: int = E) -> list[Point]:
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((n, width)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    features = rng.integers(256, size=(n, H), dtype=np.uint8)
    return [
        Point(f"doc {i}", vectors[i], features[i], payload_number(i), digest=f"{seed}-{i}")
        for i in range(n)
    ]  # fmt: skip


def payload_number(i: int) -> dict[str, Any]:
    payload: dict[str, Any] = {
        "text": f"text {i} \N{SNOWMAN}",
        "lang": ["en", "fr", "de"][i % 3],
        "year": 2000 + i % 30,
        "big": 2**53 + i % 3,
        "price": i / 4,
        "free": i % 2 == 0,
        "tags": [["a", "b"], ["b", 3, True], [], ["c", 2.0]][i % 4],
        "site.name": f"s{i % 5}",
        "": ["x", True][i % 2],
        "it's [a] \N{SNOWMAN}.name\n": f"n{i % 4}",
        "nested": {"lang": ["en", "fr"][i % 2], "free": i % 3 == 0, "deep": {"price": i / 2}, "a b": i},
        "mixed": [True, 1, 1.0, 0, "1", None, {"k": 1}][i % 7],
    }
    if i % 10 == 0:
        payload["rare"] = i
    return payload


def query_vector(seed: int = 7) -> Floats:
    return make_points(1, seed=seed)[0].vector


def assert_same(found: Candidates, expected: Candidates, name: str = "") -> None:
    assert found.ids == expected.ids, name
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    assert found.scores.dtype == np.float32 and found.features.dtype == np.uint8
    np.testing.assert_array_equal(found.features, expected.features)
    assert found.payloads == expected.payloads


FILTERS: dict[str, Filter] = {
    "none": {},
    "string": {"lang": "en"},
    "list of strings": {"lang": ["en", "de"]},
    "integer": {"year": 2003},
    "list of integers": {"year": [2003, 2004]},
    "integer equals whole float": {"price": 5},
    "true": {"free": True},
    "false": {"free": False},
    "both booleans": {"free": [True, False]},
    "one equals true": {"free": 1},
    "bounds on a boolean": {"free": {"gte": 1}},
    "lower bound": {"year": {"gte": 2020}},
    "bound beyond 64 bits": {"year": {"lt": 10**300}},
    "bounds are floats": {"big": {"gt": 2**53}},
    "both bounds": {"price": {"gt": 10, "lte": 20.5}},
    "combined": {"lang": "en", "free": True, "year": {"gte": 2005, "lt": 2020}},
    "value in a list": {"tags": "b"},
    "boolean in a list": {"tags": True},
    "bound in a list": {"tags": {"gte": 2}},
    "strings and integers": {"tags": ["a", 3]},
    "name with a dot": {"site.name": "s1"},
    "dot is no path": {"nested.lang": "en"},
    "path": {".nested.lang": "en"},
    "path, boolean": {".nested.free": True},
    "path, bound on a whole float": {".nested.deep.price": {"gte": 20, "lt": 30}},
    "path, integer equals whole float": {".nested.deep.price": 20},
    "path, name with a space": {".nested.a b": [3, 4]},
    "path of one name": {".year": 2003},
    "path that ends early": {".lang.x": "en"},
    "path, value is an object": {".nested.deep": 1},
    "empty name": {"": "x"},
    "empty name, boolean": {"": True},
    "name with marks": {"it's [a] \N{SNOWMAN}.name\n": "n3"},
    "value is an object": {"nested": "en"},
    "mixed types, integer": {"mixed": 1},
    "mixed types, false": {"mixed": False},
    "mixed types, string": {"mixed": "1"},
    "mixed types, bound": {"mixed": {"gte": 1}},
    "missing in most": {"rare": {"gt": 50}},
    "unknown field": {"nowhere": "x"},
    "unknown field, bound": {"nowhere": {"gt": 0}},
    "there in some": {"rare": {"exists": True}},
    "missing": {"rare": {"exists": False}},
    "null is missing": {"mixed": {"exists": False}},
    "an empty list is missing": {"tags": {"exists": False}, "lang": "en"},
    "an object is there": {"nested": {"exists": True}},
    "false is there": {"free": {"exists": True}},
    "path there": {".nested.lang": {"exists": True}},
    "path missing": {".nested.nowhere": {"exists": True}},
}
