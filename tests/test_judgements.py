"""Judgements of the page: files that the other commands read, whatever was there before."""

import threading
from pathlib import Path

import httpx
import pytest

pytest.importorskip("fastapi")

from passages import TEXTS
from serving import running

import d2llm
from d2llm.beir import RetrievalData
from d2llm.connectors import QdrantIndex
from d2llm.errors import DataError
from d2llm.files import write_lines
from d2llm.search import Searcher
from d2llm.serve import Judgements, Settings

REFUND, CHINESE = "how long does a refund take?", "退款需要多长时间"


def load(folder: Path) -> RetrievalData:
    write_lines(folder / "corpus.jsonl", ['{"_id": "a", "text": "A"}', '{"_id": "b 2", "text": "B"}'])
    return RetrievalData.load(folder, "test")


def test_what_is_judged_is_a_beir_folder(tmp_path: Path) -> None:
    judgements = Judgements(tmp_path / "judged")
    judgements.judge(REFUND, "a", 1)
    judgements.judge(REFUND, "b 2", 1)
    judgements.judge(CHINESE, "a", 0)
    judgements.judge(REFUND, "b 2", 0)
    expected = {REFUND: {"a": 1, "b 2": 0}, CHINESE: {"a": 0}}
    assert judgements.by_query() == Judgements(tmp_path / "judged").by_query() == expected
    data = load(tmp_path / "judged")
    assert {data.queries[id_]: judged for id_, judged in data.qrels.items()} == expected


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x1c"])
def test_a_query_with_an_odd_line_break_stays_one_line(tmp_path: Path, mark: str) -> None:
    query = f"a{mark}b next line"
    Judgements(tmp_path).judge(query, "a", 1)
    Judgements(tmp_path).judge(REFUND, "a", 1)  # a service that was started again
    assert Judgements(tmp_path).by_query() == {query: {"a": 1}, REFUND: {"a": 1}}


def test_what_others_add_meanwhile_is_kept(tmp_path: Path) -> None:
    ours, theirs = Judgements(tmp_path), Judgements(tmp_path)
    ours.judge(REFUND, "a", 1)
    theirs.judge(CHINESE, "a", 0)
    ours.judge(REFUND, "b 2", 0)
    assert theirs.by_query() == {REFUND: {"a": 1, "b 2": 0}, CHINESE: {"a": 0}}


def test_a_judgement_can_be_taken_back(tmp_path: Path) -> None:
    judgements = Judgements(tmp_path)
    judgements.judge(REFUND, "a", 1)
    judgements.judge(REFUND, "a", None)
    judgements.judge(REFUND, "never judged", None)
    assert judgements.by_query() == Judgements(tmp_path).by_query() == {}


def test_a_folder_keeps_what_it_had(tmp_path: Path) -> None:
    line = '{"_id": "7", "text": "how long does a refund take?", "metadata": {"from": "the log"}}'
    write_lines(tmp_path / "queries.jsonl", [line, '{"_id": "8", "text": "not judged"}'])
    write_lines(tmp_path / "qrels" / "test.tsv", ["query-id\tcorpus-id\tscore", "7\ta\t2"])
    judgements = Judgements(tmp_path)
    judgements.judge(REFUND, "b 2", 0)
    judgements.judge(CHINESE, "b 2", 1)
    lines = (tmp_path / "queries.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines[0] == line and len(lines) == 3
    data = load(tmp_path)
    assert data.qrels["7"] == {"a": 2, "b 2": 0}
    assert CHINESE in data.queries.values()


@pytest.mark.parametrize("name", ["queries.jsonl.gz", "qrels/test.tsv.gz"])
def test_gzipped_judgements_are_not_hidden_by_plain_ones(name: str, tmp_path: Path) -> None:
    (tmp_path / "qrels").mkdir()
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=rf"{name} is gzipped, and judgements go into plain files. Unpack it: gunzip"):
        Judgements(tmp_path)


def test_several_threads_lose_no_judgement(tmp_path: Path) -> None:
    judgements = Judgements(tmp_path)
    threads = [
        threading.Thread(target=lambda n=n: [judgements.judge(f"query {n}", f"d{i}", i % 2) for i in range(8)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {f"query {n}": {f"d{i}": i % 2 for i in range(8)} for n in range(4)}
    assert judgements.by_query() == Judgements(tmp_path).by_query() == expected


@pytest.mark.parametrize("id_", ["a\tb", "a\nb", "a\u2028b", " "], ids=repr)
def test_an_id_that_the_file_cannot_hold_is_named(tmp_path: Path, id_: str) -> None:
    judgements = Judgements(tmp_path)
    with pytest.raises(DataError, match="cannot hold the id"):
        judgements.judge(REFUND, id_, 1)
    assert judgements.by_query() == {} and not (tmp_path / "qrels").exists()


@pytest.mark.parametrize(("query", "id_"), [("half \ud800", "a"), (REFUND, "\udfff")])
def test_half_a_surrogate_pair_is_named(tmp_path: Path, query: str, id_: str) -> None:
    with pytest.raises(DataError, match="half of a surrogate pair"):
        Judgements(tmp_path).judge(query, id_, 1)
    assert not [*tmp_path.iterdir()]


def test_a_broken_folder_is_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "qrels" / "test.tsv", ["q1\ta\tgood"])
    with pytest.raises(DataError, match=r"test.tsv:1: expected query-id<TAB>corpus-id<TAB>score"):
        Judgements(tmp_path)


def test_the_service_keeps_judgements_behind_its_key(model: d2llm.Model, tmp_path: Path) -> None:
    body = {"query": REFUND, "id": "join", "relevance": 1}
    with QdrantIndex("kb", tmp_path / "qdrant") as index:
        index.add(model, [{"id": id_, "text": text} for id_, text in TEXTS.items()])
        searcher, key = Searcher(model, index), {"Authorization": "Bearer sesame"}
        with running(searcher, Settings(read_key="sesame"), judgements=Judgements(tmp_path / "judged")) as address:
            assert httpx.post(f"{address}/judgements", json=body).status_code == 401
            assert httpx.get(f"{address}/judgements").status_code == 401
            answer = httpx.post(f"{address}/judgements", json=body, headers=key)
            assert answer.json() == {"kept": True, "queries": {REFUND: {"join": 1}}}
            assert httpx.get(f"{address}/judgements", headers=key).json() == answer.json()
            for wrong in ({**body, "relevance": 2}, {**body, "id": "a\tb"}, {**body, "query": " "}, {"query": REFUND}):
                assert httpx.post(f"{address}/judgements", json=wrong, headers=key).status_code == 422
    assert Judgements(tmp_path / "judged").by_query() == {REFUND: {"join": 1}}


def test_judging_needs_the_key_for_writing_if_there_is_one(model: d2llm.Model, tmp_path: Path) -> None:
    body = {"query": REFUND, "id": "join", "relevance": 1}
    index = d2llm.FlatIndex()
    index.add(model, [{"id": id_, "text": text} for id_, text in TEXTS.items()])
    for read_key in ("reader", None):
        settings = Settings(read_key=read_key, write_key="writer")
        with running(Searcher(model, index), settings, judgements=Judgements(tmp_path)) as address:
            refused = httpx.post(f"{address}/judgements", json=body, headers={"api-key": "reader"})
            if read_key is None:
                assert refused.status_code == 401
            else:
                assert (refused.status_code, "use the key for writing" in refused.text) == (403, True)
            assert httpx.get(f"{address}/judgements", headers={"api-key": "reader"}).status_code == 200
            assert Judgements(tmp_path).by_query() == {}
            given = httpx.post(f"{address}/judgements", json=body, headers={"api-key": "writer"})
            assert given.json()["queries"] == {REFUND: {"join": 1}}
            httpx.post(f"{address}/judgements", json={**body, "relevance": None}, headers={"api-key": "writer"})


def test_a_service_without_a_folder_says_so(model: d2llm.Model) -> None:
    index = d2llm.FlatIndex()
    index.add(model, [{"id": id_, "text": text} for id_, text in TEXTS.items()])
    with running(Searcher(model, index)) as address:
        assert httpx.get(f"{address}/judgements").json() == {"kept": False, "queries": {}}
        answer = httpx.post(f"{address}/judgements", json={"query": REFUND, "id": "join", "relevance": 1})
        assert (answer.status_code, "--judgements FOLDER" in answer.json()["error"]["message"]) == (422, True)
