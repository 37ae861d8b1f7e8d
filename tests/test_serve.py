"""`d2llm serve` on a real socket: its answers are those of the library."""

import json
import threading
from collections.abc import Iterator
from dataclasses import asdict

import httpx
import pytest
from serving import DOCUMENTS, running

import d2llm
from d2llm.connectors import QdrantIndex
from d2llm.search import Searcher
from d2llm.serve import Service, Serving
from d2llm.serve.app import PAGE

QUERY = "how long does a refund take?"


@pytest.fixture(scope="module")
def searcher(model: d2llm.Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Searcher]:
    with QdrantIndex("kb", tmp_path_factory.mktemp("serve") / "qdrant", options={"bm25": {}}) as index:
        index.add(model, DOCUMENTS)
        yield Searcher(model, index)


@pytest.fixture(scope="module")
def client(searcher: Searcher) -> Iterator[httpx.Client]:
    with running(searcher) as address, httpx.Client(base_url=address) as client:
        yield client


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"k": 2},
        {"k": 1, "candidates": 3, "filter": {"number": {"gte": 2}}},
        {"rescore": False},
        {"task": "symmetric"},
        {"hybrid": "dbsf", "bm25_weight": 0.5},
    ],
    ids=str,
)
def test_search_answers_as_the_library(client: httpx.Client, searcher: Searcher, options: dict[str, object]) -> None:
    answer = client.post("/search", json={"query": QUERY, **options})
    assert answer.status_code == 200, answer.text
    expected = searcher.explain(QUERY, **options)  # type: ignore[arg-type]  # options of several types
    assert answer.json()["hits"] == [asdict(hit) for hit in expected.hits]
    assert answer.json()["candidates"] == expected.candidates
    assert answer.json()["seconds"].keys() == expected.seconds.keys()


def test_several_queries_have_one_answer_each(client: httpx.Client, searcher: Searcher) -> None:
    queries = [QUERY, "sun and skin", "the middle of numbers"]
    results = client.post("/search", json={"queries": queries, "k": 1}).json()["results"]
    assert [result["hits"][0]["id"] for result in results] == ["refund", "vitamin", "median"]
    assert [result["hits"] for result in results] == [[asdict(searcher.search(query, 1)[0])] for query in queries]


def test_an_answer_without_hits_names_the_keys_that_no_document_has(client: httpx.Client) -> None:
    def warnings(**filter: object) -> list[str]:
        answer = client.post("/search", json={"queries": [QUERY, "sun"], "filter": filter}).json()["results"]
        assert [len(result["hits"]) for result in answer] == [0, 0]
        assert answer[0]["warnings"] == answer[1]["warnings"]
        return list(answer[0]["warnings"])

    assert warnings(lang="fr") == [], "the field is there, though no document has this value"
    (typo, path) = warnings(lang="en", langg="en", **{"meta.lang": "en"})
    assert typo == "no document has the field 'langg' of the filter: check its name"
    assert path.endswith("'meta.lang' of the filter: for a field within a field, write .meta.lang")
    assert client.post("/search", json={"query": QUERY}).json()["warnings"] == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "give either query or queries"),
        ({"query": "a", "queries": ["b"]}, "give either query or queries"),
        ({"query": "a", "bm25_weight": 1}, "bm25_weight is for hybrid searches: add hybrid"),
        ({"query": "  "}, "query 0 of 1 is empty"),
        ({"query": "a", "k": 200}, "k=200, candidates=100"),
        ({"query": "a", "candidates": 2000}, "at most 1000 candidates, found 2000"),
        ({"query": "a", "filter": {"lang": {"like": "e"}}}, "like"),
        (
            {"query": "a", "recall": 10},
            "there is no field 'recall': leave it out, or use one of query, queries, k, cand",
        ),
        ({"query": "a", "k": "10"}, "k: found '10', expected a whole number"),
        ({"query": "a", "k": 0}, "k: found 0, expected at least 1"),
        ({"query": "a", "rescore": 1.5}, "rescore: found 1.5, expected true or false"),
        ({"query": "a", "filter": ["lang"]}, "filter: found a list of 1, expected an object"),
        ({"query": "a", "task": "new"}, "task: found 'new', expected 'symmetric' or 'asymmetric'"),
        ({"query": "a", "bm25_weight": float("nan")}, "bm25_weight: found NaN, expected a finite number"),
        ({"queries": ["a", None]}, "queries.1: found null, expected a text"),
        ({"queries": []}, "queries: found a list of 0, expected 1 or more"),
        ({"query": "half \ud800"}, "half of a surrogate pair"),
    ],
    ids=str,
)
def test_an_impossible_search_is_refused_with_a_reason(client: httpx.Client, body: object, message: str) -> None:
    headers = {"Content-Type": "application/json"}
    answer = client.post("/search", content=json.dumps(body), headers=headers)
    assert answer.status_code == 422
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        ('{"query": "a"}', "application/x-www-form-urlencoded", "with the header Content-Type: application/json"),
        ('{"query": "a"', "application/json", "the body is not valid JSON, at character 13"),
        ("", "application/json", "the body is no JSON object: send one"),
    ],
)
def test_a_body_that_is_no_json_is_told_what_it_lacks(
    client: httpx.Client, content: str, kind: str, message: str
) -> None:
    answer = client.post("/search", content=content, headers={"Content-Type": kind})
    assert answer.status_code == 422
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/embed", {}, "inputs is missing: add it"),
        ("/embed", {"inputs": {}}, "inputs: found an object, expected a text or a list"),
        ("/embed", {"inputs": [7]}, "inputs.0: found 7, expected a text"),
        ("/embed", {"inputs": "a", "normalize": False}, "normalize: found false, expected true"),
        ("/rerank", {"query": "a", "documents": [{}]}, "documents.0.text is missing: add it"),
        ("/rerank", {"query": "a", "ids": [7.5]}, "ids.0: found 7.5, expected a text"),
        ("/judgements", {"query": "a", "id": "", "relevance": 1}, "id: found '', expected 1 or more characters"),
    ],
)
def test_a_wrong_value_is_told_with_what_is_expected(
    client: httpx.Client, path: str, body: object, message: str
) -> None:
    answer = client.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["message"]) == (422, message)


def test_the_page_may_load_nothing_from_elsewhere(client: httpx.Client) -> None:
    answer = client.get("/")
    assert answer.text == (PAGE / "index.html").read_text(encoding="utf-8")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'") and "frame-ancestors 'none'" in policy


@pytest.mark.parametrize("path", ["/icon.svg", "/favicon.ico"])
def test_browsers_find_the_icon_beside_whatever_they_open(client: httpx.Client, path: str) -> None:
    answer = client.get(path)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/svg+xml")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/search", 405, "method_not_allowed"),
        ("POST", "/", 405, "method_not_allowed"),
        ("GET", "/nothing", 404, "not_found"),
        ("POST", "/nothing", 405, "method_not_allowed"),
        ("GET", "/../app.py", 404, "not_found"),
    ],
)
def test_another_method_and_another_address_are_told_apart(
    client: httpx.Client, method: str, path: str, status: int, code: str
) -> None:
    answer = client.request(method, path)
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, code)
    assert path != "/search" or answer.headers["Allow"] == "POST"


def test_health_is_503_until_the_model_is_loaded(searcher: Searcher) -> None:
    go = threading.Event()

    def load(serving: Serving) -> Service:
        go.wait()
        return Service(searcher, serving.settings, metrics=serving.metrics)

    with running(load, wait=False) as address:
        early = httpx.get(f"{address}/health")
        assert (early.status_code, early.headers["retry-after"]) == (503, "1")
        assert httpx.post(f"{address}/search", json={"query": QUERY}).status_code == 503
        go.set()
        while (late := httpx.get(f"{address}/health")).status_code == 503:
            pass
        assert (late.status_code, late.json()) == (200, {"status": "ready"})


def test_info_tells_the_model_and_the_collection(client: httpx.Client, searcher: Searcher) -> None:
    info = client.get("/info").json()
    assert info["model"]["fingerprint"] == searcher.model.config.fingerprint
    assert info["model"]["device"] == "cpu"
    assert info["collection"]["documents"] == len(DOCUMENTS)


def test_metrics_count_requests_and_stages(client: httpx.Client) -> None:
    client.post("/search", json={"query": QUERY})
    text = client.get("/metrics").text
    assert 'd2llm_requests_total{route="/search",status="200"}' in text
    assert 'd2llm_stage_seconds_count{stage="rescore"}' in text
    assert 'd2llm_queue_waiting{queue="queries"} 0.0' in text


def test_an_explained_search_answers_with_all_candidates_and_their_reasons(
    client: httpx.Client, searcher: Searcher
) -> None:
    body = {"query": "is money returned?", "k": 2, "candidates": 4, "hybrid": "rrf", "bm25_weight": 0.5}
    answer = client.post("/search", json={**body, "explain": True}).json()
    plain = client.post("/search", json=body).json()
    assert [hit["recall_rank"] for hit in answer["hits"]] == [1, 2, 3, 4]
    best = sorted(answer["hits"], key=lambda hit: -hit["score"])
    assert [hit["id"] for hit in best[:2]] == [hit["id"] for hit in plain["hits"]]
    assert list(answer["scales"]) == [*searcher.model.config.parts, "bm25"]
    for hit in answer["hits"]:
        assert sum(hit["parts"].values()) == pytest.approx(hit["score"], abs=1e-4)
        assert sum(hit["words"].values()) == pytest.approx(hit["parts"]["words"], abs=1e-4)
    refund = next(hit for hit in answer["hits"] if hit["id"] == "refund")
    text, marks = refund["payload"]["text"], refund["marks"]["text"]
    assert [text[start:end].lower() for start, end, weight in marks if weight > 0] == ["money", "is", "returned"]
