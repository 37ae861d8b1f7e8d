"""What `d2llm serve` does under load, with odd clients, and when its index or its process ends."""

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from qdrant_server import QdrantServer
from serving import DOCUMENTS, running

import d2llm
from d2llm.connectors import QdrantIndex
from d2llm.errors import StoreError
from d2llm.search import Searcher
from d2llm.serve import Settings, connection
from d2llm.types import Candidates, Point

QUERY = "how long does a refund take?"


class Gate(d2llm.FlatIndex):
    """An index whose searches, and writes after the first, wait until the gate opens."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.recalls, self.upserts = threading.Event(), 0, 0
        self.error: Exception | None = None

    def upsert(self, points: Sequence[Point]) -> None:
        self.upserts += 1
        assert self.upserts == 1 or self.open.wait(20)
        super().upsert(points)

    def recall_many(self, *arguments: Any, **named: Any) -> list[Candidates]:
        self.recalls += 1
        assert self.open.wait(20)
        if self.error is not None:
            raise self.error
        return super().recall_many(*arguments, **named)


@pytest.fixture
def gate(model: d2llm.Model) -> Iterator[Gate]:
    index = Gate()
    index.add(model, DOCUMENTS)
    yield index
    index.open.set()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as pool:
        yield pool


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def waiting(address: str, queue: str = "queries") -> float:
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    (line,) = [line for line in lines if line.startswith(f'd2llm_queue_waiting{{queue="{queue}"}}')]
    return float(line.rpartition(" ")[2])


def search(address: str, query: str = QUERY, **more: Any) -> httpx.Response:
    return httpx.post(f"{address}/search", json={"query": query, **more}, timeout=30)


WRITABLE = Settings(writable=True, write_key="key")


def add(address: str, id_: str) -> httpx.Response:
    documents = [{"id": id_, "text": f"The text of {id_}."}]
    return httpx.post(f"{address}/documents", json={"documents": documents}, headers={"api-key": "key"}, timeout=30)


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again(
    model: d2llm.Model, gate: Gate, pool: ThreadPoolExecutor
) -> None:
    with running(Searcher(model, gate), Settings(max_queue=2)) as address:
        first = pool.submit(search, address)
        until(lambda: gate.recalls == 1)
        queued = [pool.submit(search, address) for _ in range(2)]
        until(lambda: waiting(address) == 2)
        refused = search(address)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert "2 texts wait already" in refused.json()["error"]["message"]
        assert httpx.post(f"{address}/embed", json={"inputs": "other work goes on"}).status_code == 200
        assert httpx.get(f"{address}/health").status_code == 200
        gate.open.set()
        assert [future.result().status_code for future in [first, *queued]] == [200] * 3
        assert search(address).status_code == 200


def test_queries_that_wait_are_searched_together_and_each_has_its_own_answer(
    model: d2llm.Model, gate: Gate, pool: ThreadPoolExecutor
) -> None:
    searcher = Searcher(model, gate)
    queries = [f"{word} of money" for word in ("return", "transfer", "lack", "love")]
    with running(searcher) as address:
        first = pool.submit(search, address)
        until(lambda: gate.recalls == 1)
        futures: list[Future[httpx.Response]] = []
        for number, query in enumerate(queries):
            futures.append(pool.submit(search, address, query, k=number % 2 + 1))
            until(lambda number=number: waiting(address) == number + 1)  # type: ignore[misc]  # lambda with a default
        gate.open.set()
        for number, (query, future) in enumerate(zip(queries, futures, strict=True)):
            expected = searcher.search(query, number % 2 + 1)
            found = [(hit["id"], hit["score"]) for hit in future.result().json()["hits"]]
            assert [id_ for id_, _ in found] == [hit.id for hit in expected]
            assert [score for _, score in found] == pytest.approx([hit.score for hit in expected], abs=1e-4)
        first.result()
        assert gate.recalls == 3 + len(queries)  # the first one; those of k=1; those of k=2; and the expected ones
        metrics = httpx.get(f"{address}/metrics").text
    assert 'd2llm_batch_size_bucket{le="1.0",queue="queries"} 1.0' in metrics
    assert 'd2llm_batch_size_bucket{le="2.0",queue="queries"} 3.0' in metrics


def test_what_is_in_flight_is_answered_when_the_service_stops(
    model: d2llm.Model, gate: Gate, pool: ThreadPoolExecutor
) -> None:
    with running(Searcher(model, gate)) as address:
        futures = [pool.submit(search, address)]
        until(lambda: gate.recalls == 1)
        futures += [pool.submit(search, address) for _ in range(2)]
        until(lambda: waiting(address) == 2)
        threading.Timer(0.5, gate.open.set).start()
    assert [future.result().status_code for future in futures] == [200] * 3
    with pytest.raises(httpx.ConnectError):
        search(address)


def test_a_service_that_stops_waits_for_writes_and_interrupts_what_else_takes_long(
    model: d2llm.Model, gate: Gate, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d2llm.serve.running.GRACE", 0.2)

    with running(Searcher(model, gate), WRITABLE) as address:
        found = pool.submit(search, address)
        added = [pool.submit(add, address, "first")]
        until(lambda: gate.recalls == 1 and gate.upserts == 2)
        added.append(pool.submit(add, address, "second"))
        until(lambda: waiting(address, "passages") == 1)
        found.add_done_callback(lambda _: gate.open.set())  # so the search is answered while the writes still wait
    assert [future.result().json()["added"] for future in added] == [1, 1]
    assert gate.get(["first", "second"]).keys() == {"first", "second"}
    answer = found.result()
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "stopping")
    assert "acknowledged are stored" in answer.json()["error"]["message"]
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


def test_a_second_signal_ends_at_once_and_what_was_in_flight_is_told(
    model: d2llm.Model, gate: Gate, pool: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    with running(Searcher(model, gate), WRITABLE, signals=2) as address:
        futures = [pool.submit(search, address), pool.submit(add, address, "first")]
        until(lambda: gate.recalls == 1 and gate.upserts == 2)
    assert [future.result().json()["error"]["type"] for future in futures] == ["stopping"] * 2
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("error", [StoreError("the folder is gone"), RuntimeError("secret /path")], ids=repr)
def test_an_error_of_the_index_is_an_answer(
    model: d2llm.Model, gate: Gate, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    gate.error = error
    gate.open.set()
    with running(Searcher(model, gate)) as address:
        answer = search(address)
        message = answer.json()["error"]["message"]
        if isinstance(error, StoreError):
            assert (answer.status_code, message) == (503, "the folder is gone")
        else:
            assert answer.status_code == 500 and "secret" not in message and answer.json()["request_id"] in message
            until(lambda: any(record.exc_info for record in caplog.records))
        gate.error = None
        assert search(address).status_code == 200


def test_a_server_of_qdrant_that_goes_away_and_comes_back(model: d2llm.Model, tmp_path: Path) -> None:
    with QdrantServer(tmp_path / "server") as server:
        index = QdrantIndex("kb", server.url, grpc_port=server.grpc_port, patience=0.5, timeout=2)
        index.add(model, DOCUMENTS)
        with index, running(Searcher(model, index)) as address:
            assert search(address).status_code == 200
            server.close()
            gone = search(address)
            assert gone.status_code == 503, gone.text
            assert server.url in gone.json()["error"]["message"]
            assert gone.json()["error"]["type"] == "index_unavailable"
            server.restart()
            until(lambda: search(address).status_code == 200)


def test_too_much_is_refused(model: d2llm.Model, gate: Gate) -> None:
    gate.open.set()
    settings = Settings(max_body=2000, max_texts=3, max_length=100, max_k=50)
    with running(Searcher(model, gate, candidates=50), settings) as address:
        assert search(address).status_code == 200
        for content in (b"{" + b" " * 3000, iter([b"{", b" " * 3000])):  # with and without a length
            answer = httpx.post(f"{address}/search", content=content, headers={"Content-Type": "application/json"})
            assert answer.status_code == 413 and "more than 2000 bytes" in answer.json()["error"]["message"]
        answer = httpx.post(f"{address}/search", json={"queries": ["a"] * 4})
        assert answer.status_code == 413 and "at most 3 queries, found 4" in answer.json()["error"]["message"]
        answer = search(address, "a" * 101)
        assert answer.status_code == 413 and "101 characters, the most is 100" in answer.json()["error"]["message"]
        answer = search(address, candidates=51)
        assert answer.status_code == 422 and "at most 50 candidates" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[" * 1900,
        b'{"query":' * 200,
        b'{"k":' + b"9" * 1900 + b"}",
        b'{"query": NaN}',
        b"\xff\xfe",
    ],
    ids=["nothing", "half", "null", "deep list", "deep object", "long number", "NaN", "not UTF-8"],
)
def test_what_is_no_search_is_refused(model: d2llm.Model, gate: Gate, content: bytes) -> None:
    with running(Searcher(model, gate)) as address:
        answer = httpx.post(f"{address}/search", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    assert answer.json()["error"]["type"] == "validation"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/search", {"queries": [1] * 500_000}),
        ("/embed", {"inputs": [[]] * 500_000}),
        ("/rerank", {"query": "a", "documents": [{}] * 300_000}),
        ("/rerank", {"query": "a", "ids": [[]] * 500_000}),
        ("/documents", {"documents": [1] * 500_000}),
    ],
    ids=["queries", "inputs", "documents", "ids", "stored"],
)
def test_a_million_wrong_values_are_one_short_answer(model: d2llm.Model, gate: Gate, path: str, body: object) -> None:
    with running(Searcher(model, gate), WRITABLE) as address:
        answer = httpx.post(f"{address}{path}", json=body, headers={"api-key": "key"}, timeout=10)
    assert answer.status_code == 422 and len(answer.content) < 1000


def connect(address: str) -> socket.socket:
    host, _, port = address.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def test_nobody_waits_for_slow_clients(model: d2llm.Model, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    gate.open.set()
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.3)
    with running(Searcher(model, gate), Settings(body_seconds=0.3)) as address:
        silent, half, slow = connect(address), connect(address), connect(address)
        half.sendall(b"POST /search HTTP/1.1\r\nHost: d2llm\r\nContent-")
        slow.sendall(
            b"POST /search HTTP/1.1\r\nHost: d2llm\r\nContent-Type: application/json\r\nContent-Length: 30\r\n\r\n{"
        )
        assert search(address).status_code == 200
        assert silent.recv(100) == b"" and half.recv(100) == b""
        answer = b"".join(iter(lambda: slow.recv(10_000), b""))
        assert answer.startswith(b"HTTP/1.1 408") and b"took longer than" in answer
        for each in (silent, half, slow):
            each.close()


def test_each_request_has_an_id_and_a_line_in_the_log(
    model: d2llm.Model, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    gate.open.set()
    caplog.set_level(logging.INFO, "d2llm.serve.requests")
    for log_texts in (False, True):
        caplog.clear()
        with running(Searcher(model, gate), Settings(log_texts=log_texts)) as address:
            named = httpx.post(f"{address}/search", json={"query": QUERY}, headers={"X-Request-ID": "abc-123"})
            odd = httpx.post(f"{address}/search", json={"query": ""}, headers={"X-Request-ID": 'a"b'})
        assert named.headers["x-request-id"] == "abc-123"
        assert odd.json()["request_id"] == odd.headers["x-request-id"] != 'a"b'
        lines = [record.msg for record in caplog.records if isinstance(record.msg, dict)]
        line = next(line for line in lines if line["request_id"] == "abc-123")
        assert (line["method"], line["path"], line["status"], line["queries"]) == ("POST", "/search", 200, 1)
        assert (QUERY in json.dumps(lines)) == log_texts


def test_other_pages_may_use_the_service_only_if_they_are_named(model: d2llm.Model, gate: Gate) -> None:
    ask = {"Origin": "https://app.example.com", "Access-Control-Request-Method": "POST"}
    with running(Searcher(model, gate)) as address:
        assert "access-control-allow-origin" not in httpx.options(f"{address}/search", headers=ask).headers
    with running(Searcher(model, gate), Settings(read_key="key", cors=("https://app.example.com",))) as address:
        allowed = httpx.options(f"{address}/search", headers=ask)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://app.example.com"
        other = httpx.options(f"{address}/search", headers={**ask, "Origin": "https://evil.example.com"})
        assert "access-control-allow-origin" not in other.headers
