"""Adding and removing documents through `d2llm serve`: who may, and that what was acknowledged is there."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serving import DOCUMENTS, running

import d2llm
from d2llm.connectors import QdrantIndex
from d2llm.errors import ArgumentError
from d2llm.search import Searcher
from d2llm.serve import Settings

READ, WRITE = {"Authorization": "Bearer reader"}, {"api-key": "writer"}
SETTINGS = Settings(read_key="reader", write_key="writer", writable=True)
NEW = {"_id": "new", "text": "Shops are closed on Sundays.", "lang": "en"}


@pytest.fixture
def index(model: d2llm.Model, tmp_path: Path) -> Iterator[QdrantIndex]:
    with QdrantIndex("kb", tmp_path / "qdrant") as index:
        index.add(model, DOCUMENTS)
        yield index


@pytest.fixture
def client(model: d2llm.Model, index: QdrantIndex) -> Iterator[httpx.Client]:
    with running(Searcher(model, index), SETTINGS) as address, httpx.Client(base_url=address) as client:
        yield client


def remove(client: httpx.Client, ids: list[str], headers: dict[str, str]) -> httpx.Response:
    return client.request("DELETE", "/documents", json={"ids": ids}, headers=headers)


def test_documents_are_added_replaced_found_and_removed(client: httpx.Client, index: QdrantIndex) -> None:
    answer = client.post("/documents", json={"documents": [NEW, DOCUMENTS[0]]}, headers=WRITE)
    assert answer.json() == {"added": 1, "unchanged": 1, "truncated": 0, "split": 0, "passages": 1}
    found = client.post("/search", json={"query": "are shops closed on Sundays?", "k": 1}, headers=WRITE).json()
    assert found["hits"][0]["id"] == "new" and found["hits"][0]["payload"] == {"text": NEW["text"], "lang": "en"}
    replaced = client.post("/documents", json={"documents": [{**NEW, "text": "Open every day."}]}, headers=WRITE)
    assert replaced.json()["added"] == 1
    assert index.get(["new"])["new"]["text"] == "Open every day."
    assert remove(client, ["new", "never there"], WRITE).json() == {"deleted": 1}
    assert index.count() == len(DOCUMENTS)


@pytest.mark.parametrize("explain", [False, True])
def test_an_empty_collection_is_searched_and_filled(client: httpx.Client, explain: bool) -> None:
    remove(client, [str(document["id"]) for document in DOCUMENTS], WRITE)
    body = {"query": "are shops closed on Sundays?", "explain": explain}
    answer = client.post("/search", json=body, headers=READ)
    assert (answer.status_code, answer.json()["hits"]) == (200, [])
    assert answer.json()["warnings"] == ["the collection has no documents"]
    assert client.get("/health").status_code == 200
    assert client.post("/rerank", json={"query": "Sundays", "ids": ["refund"]}, headers=READ).json() == []
    client.post("/documents", json={"documents": [NEW]}, headers=WRITE)
    assert [hit["id"] for hit in client.post("/search", json=body, headers=READ).json()["hits"]] == ["new"]


def test_ids_may_be_numbers_as_in_documents(client: httpx.Client, index: QdrantIndex) -> None:
    client.post("/documents", json={"documents": [{**NEW, "_id": 7}]}, headers=WRITE)
    ranked = client.post("/rerank", json={"query": "Sundays", "ids": ["refund", 7]}, headers=READ).json()
    assert [row["id"] for row in ranked] == ["7", "refund"]
    body = {"ids": [7]}
    assert client.request("DELETE", "/documents", json=body, headers=WRITE).json() == {"deleted": 1}
    assert client.request("DELETE", "/documents", json={"ids": [7.5]}, headers=WRITE).status_code == 422


def test_a_document_that_is_too_long_is_split(client: httpx.Client, index: QdrantIndex) -> None:
    long = {"id": "long", "text": "A parcel takes three days within the country. " * 100}
    answer = client.post("/documents", json={"documents": [long]}, headers=WRITE).json()
    assert (answer["split"], answer["truncated"]) == (1, 0) and answer["passages"] > 1
    assert index.get(["long"])["long"]["text"] == long["text"]


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([NEW, {"text": "no id"}], 'document 1: expected an "_id"'),
        ([NEW, NEW], "an id occurs twice"),
        ([NEW, {"id": "b", "text": " "}], "document 'b' is empty"),
        ([NEW, {"id": "b", "text": "t", "_d2llm": 1}], "d2llm reserves this name"),
        ([], "documents: found a list of 0, expected 1 or more"),
    ],
    ids=["no id", "same id", "empty", "reserved", "none"],
)
def test_a_bad_document_is_named_and_nothing_is_stored(
    client: httpx.Client, index: QdrantIndex, documents: list[object], message: str
) -> None:
    answer = client.post("/documents", json={"documents": documents}, headers=WRITE)
    assert answer.status_code == 422 and message in answer.json()["error"]["message"]
    assert index.count() == len(DOCUMENTS)


def test_each_key_opens_its_own_doors(client: httpx.Client) -> None:
    search = {"query": "refund"}
    assert client.get("/health").status_code == 200
    assert client.get("/").status_code == 200
    for path in ("/search", "/embed", "/rerank", "/v1/embeddings"):
        refused = client.post(path, json=search)
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        assert "Authorization: Bearer KEY" in refused.json()["error"]["message"]
    assert client.get("/metrics").status_code == client.get("/info").status_code == 401
    assert client.post("/search", json=search, headers={"api-key": "readers"}).status_code == 401
    assert client.post("/search", json=search, headers=READ).status_code == 200
    assert client.post("/search", json=search, headers=WRITE).status_code == 200
    refused = client.post("/documents", json={"documents": [NEW]}, headers=READ)
    assert refused.status_code == 403 and "only reads" in refused.json()["error"]["message"]
    assert remove(client, ["refund"], {}).status_code == 401


def test_nobody_writes_unless_it_was_allowed(model: d2llm.Model, index: QdrantIndex) -> None:
    with running(Searcher(model, index), Settings(write_key="writer")) as address:
        answer = httpx.post(f"{address}/documents", json={"documents": [NEW]}, headers=WRITE)
    assert answer.status_code == 403 and "--writable" in answer.json()["error"]["message"]
    with pytest.raises(ArgumentError, match="a writable service needs a key for writing"):
        Settings(writable=True)
    with pytest.raises(ArgumentError, match="the keys for reading and writing are the same"):
        Settings(read_key="one", write_key="one")
    with pytest.raises(ArgumentError, match="a key of the service is empty"):
        Settings(read_key="")
