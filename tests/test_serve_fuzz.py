"""`d2llm serve` and clients that mean no good: a short run of benchmarks/serve_fuzz.py."""

from collections.abc import Iterator

import pytest
from serve_fuzz import beside_hostile_clients, odd_requests
from serving import DOCUMENTS, running

import d2llm
from d2llm.connectors import QdrantIndex
from d2llm.search import Searcher
from d2llm.serve import Settings

KEY = "writer"


@pytest.fixture(scope="module")
def address(model: d2llm.Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with QdrantIndex("kb", tmp_path_factory.mktemp("fuzz") / "qdrant", options={"bm25": {}}) as index:
        index.add(model, DOCUMENTS)
        with running(Searcher(model, index), Settings(write_key=KEY, writable=True)) as address:
            yield address


def test_no_request_is_answered_by_an_error_of_the_server(address: str) -> None:
    statuses = odd_requests(address, KEY, examples=8)
    assert {"POST /search", "POST /embed", "POST /rerank", "DELETE /documents"} < statuses.keys()
    assert statuses["GET /info"][200] and statuses["POST /search"][422]  # few random searches are possible ones


def test_honest_clients_are_served_beside_hostile_ones(address: str) -> None:
    assert beside_hostile_clients(address, KEY, seconds=4)["answered"] > 5
