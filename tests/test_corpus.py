"""Files that users write by hand: what is read, and what the message says when a line is wrong."""

import datetime
import gzip
import json
import random
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2llm.bad_rows import BadRow
from d2llm.beir import RetrievalData, read_qrels, read_run, write_run
from d2llm.corpus import parse_document, read_documents, read_queries
from d2llm.errors import DataError
from d2llm.pairs import Pair, read_pairs
from d2llm.payload import check_document, storable
from d2llm.readers import read_jsonl
from d2llm.train.data import sample
from d2llm.train.examples import Example, examples_of, read_examples
from d2llm.train.schedule import batch_at
from d2llm.types import Document


def write(path: Path, *lines: str | dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


def beir(folder: Path, *qrels: str) -> Path:
    write(folder / "corpus.jsonl", {"_id": "d1", "text": "one"}, {"_id": "d2", "text": "two", "title": "Two"})
    write(folder / "queries.jsonl", {"_id": "q1", "text": "first"}, {"_id": "q2", "text": "second"})
    write(folder / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore", *qrels)
    return folder


# documents and queries


def test_documents_come_with_title_and_payload(tmp_path: Path) -> None:
    path = write(
        tmp_path / "docs.jsonl",
        {"_id": "a", "text": "über naïve 漢字 \N{SNOWMAN}", "title": "T", "year": 2020, "tags": ["x"]},
        "",
        "   ",
        {"id": "b", "text": "plain"},
        {"_id": "c", "title": "title alone", "text": ""},
        {"_id": "d", "text": "no title", "title": None},
    )
    assert list(read_documents(path)) == [
        Document("a", "über naïve 漢字 \N{SNOWMAN}", "T", {"year": 2020, "tags": ["x"]}),
        Document("b", "plain"),
        Document("c", "", "title alone"),
        Document("d", "no title"),
    ]


def test_an_integer_of_numpy_is_an_id() -> None:
    assert parse_document({"id": np.int64(3), "text": "x"}, "row 1") == Document("3", "x")


def test_the_encoder_reads_title_and_text() -> None:
    assert Document("a", "text", "Title").content == "Title text"
    assert Document("a", "text").content == "text"


def test_integer_ids_are_read_as_strings_and_zero_is_an_id(tmp_path: Path) -> None:
    path = write(tmp_path / "docs.jsonl", {"_id": 0, "text": "x"}, {"id": 17, "text": "y"})
    assert [document.id for document in read_documents(str(path))] == ["0", "17"]


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"_id": "a", "text": "x"}\r\n\r\n{"_id": "b", "text": "y"}')
    assert [document.id for document in read_documents(path)] == ["a", "b"]


def test_the_documents_of_a_beir_folder_are_its_corpus(tmp_path: Path) -> None:
    assert [document.id for document in read_documents(beir(tmp_path))] == ["d1", "d2"]


BAD_LINES = {
    "cut": (b'{"_id": "b", "text": "y"', "not valid JSON"),
    "two objects": (b'{"_id": "b"} {"_id": "c"}', "not valid JSON"),
    "list": (b'["b", "y"]', "expected a JSON object, found list"),
    "bare string": (b'"b"', "expected a JSON object, found str"),
    "invalid UTF-8": (b'{"_id": "b", "text": "caf\xe9"}', "not valid JSON .*can't decode byte 0xe9"),
    "half a surrogate pair": (rb'{"_id": "b", "text": "cut emoji \ud83d"}', "not valid JSON .*surrogates not allowed"),
    "half a surrogate pair as id": (rb'{"_id": "\uD83D", "text": "x"}', "not valid JSON .*surrogates not allowed"),
    "nested too deep": (b'{"_id": "b", "text": "y", "deep": ' + b"[" * 100_000, "not valid JSON .*recursion depth"),
    "no id": (b'{"text": "y"}', 'expected an "_id" .* found None'),
    "empty id": (b'{"_id": "", "text": "y"}', "expected an \"_id\" .* found ''"),
    "boolean id": (b'{"_id": true, "text": "y"}', 'expected an "_id" .* found True'),
    "float id": (b'{"_id": 1.5, "text": "y"}', 'expected an "_id" .* found 1.5'),
    "no text": (b'{"_id": "b"}', "document 'b': expected \"text\" to be a string, found None"),
    "text a number": (b'{"_id": "b", "text": 3}', "document 'b': expected \"text\" to be a string, found 3"),
    "title a list": (b'{"_id": "b", "text": "y", "title": ["t"]}', "document 'b': expected \"title\" to be a string"),
    "blank": (b'{"_id": "b", "text": " \\n"}', "document 'b' is empty: neither text nor title"),
    "number too large": (b'{"_id": "b", "text": "y", "n": 1e400}', "document 'b': field 'n': inf is not a JSON number"),
    "in a list": (b'{"_id": "b", "text": "y", "n": [0, -1e400]}', "document 'b': field 'n': -inf is not a JSON number"),
    "2**63": (b'{"_id": "b", "text": "y", "n": 9223372036854775808}', "document 'b': field 'n': an integer beyond 64"),
    "-2**63 - 1": (b'{"_id": "b", "text": "y", "n": -9223372036854775809}', "document 'b': field 'n': an integer"),
    "30 lists": (
        b'{"_id": "b", "text": "y", "n": ' + b"[" * 30 + b"]" * 30 + b"}",
        "document 'b': .* more than 30 deep",
    ),
    "900 objects": (b'{"_id": "b", "text": "y", "n": ' + b'{"":' * 900 + b"1" + b"}" * 901, "document 'b': .* 30 deep"),
    "large": (
        b'{"_id": "b", "text": "' + b"y" * 2**23 + b'"}',
        "document 'b': it takes 8.0 MB, .* may take 8 MB",
    ),
    "reserved": (b'{"_id": "b", "text": "y", "_d2llm": 1}', "document 'b': field '_d2llm': d2llm reserves this name"),
    "id seen before": (b'{"_id": "a", "text": "y"}', "duplicate id 'a': an earlier line has it too"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named_and_can_be_skipped(line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_bytes(b'{"_id": "a", "text": "x"}\n\n' + line + b'\n{"_id": "z", "text": "last"}\n')
    with pytest.raises(DataError, match=rf"docs\.jsonl:3: {message}"):
        list(read_documents(path))
    errors: list[DataError] = []
    assert [document.id for document in read_documents(path, errors.append)] == ["a", "z"]
    assert len(errors) == 1
    assert str(errors[0]).startswith(f"{path}:3: ")


def test_a_skipped_line_does_not_take_its_id_along(tmp_path: Path) -> None:
    path = write(tmp_path / "docs.jsonl", {"_id": "a", "text": ""}, {"_id": "a", "text": "good"})
    errors: list[DataError] = []
    assert list(read_documents(path, errors.append)) == [Document("a", "good")]
    assert len(errors) == 1


def test_whole_surrogate_pairs_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "docs.jsonl", r'{"_id": "a", "text": "\ud83d\ude00"}')
    assert [document.text for document in read_documents(path)] == ["\N{GRINNING FACE}"]


@pytest.mark.parametrize("skip", [False, True])
def test_a_missing_file_is_an_error_even_when_lines_may_be_skipped(skip: bool, tmp_path: Path) -> None:
    errors: list[DataError] = []
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        list(read_jsonl(tmp_path / "none.jsonl", errors.append if skip else None))


def test_a_document_made_of_a_mapping_names_its_place() -> None:
    with pytest.raises(DataError, match='document 3: expected an "_id"'):
        parse_document({"text": "x"}, "document 3")
    row = {"id": "a", "text": "x", "lang": "en"}
    assert parse_document(row, "here") == Document("a", "x", "", {"lang": "en"})
    assert row == {"id": "a", "text": "x", "lang": "en"}, "the caller's mapping is not ours to change"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3j, "JSON has no type complex"),
        (datetime.date(2020, 1, 1), "JSON has no type date"),
        (np.int64(3), "JSON has no type int64"),
        ({1: "x"}, "the key 1 is not a string"),
        ({"x": [float("nan")]}, "nan is not a JSON number"),
        ("cut \ud83d", "it cannot be written as UTF-8: half of a surrogate pair at character 5"),
        ({"\ud83d": 1}, "it cannot be written as UTF-8"),
    ],
    ids=str,
)
def test_a_value_that_no_index_stores_names_the_document_and_the_field(value: Any, message: str) -> None:
    with pytest.raises(BadRow, match=f"document 7: document 'a': field 'when': {message}"):
        parse_document({"_id": "a", "text": "x", "when": value}, "document 7")
    with pytest.raises(DataError, match=f"document 'a': field 'when': {message}"):
        check_document(Document("a", "x", payload={"when": value}))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (Document("", "x"), "document '': its id is empty"),
        (Document("a", "x", payload={"title": 5}), "document 'a': field 'title': expected a string"),
    ],
)
def test_what_could_not_be_read_again_is_not_stored(document: Document, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_document(document)


def test_values_that_are_stored_are_copied_in_plain_types() -> None:
    payload = {"n": np.float64(0.5), "pair": (1, 2), "deep": {"list": [True]}}
    copy = storable(payload)
    assert copy == {"n": 0.5, "pair": [1, 2], "deep": {"list": [True]}} and type(copy["n"]) is float
    payload["deep"]["list"].append(2)  # type: ignore[index]  # the payload is typed as a mapping of anything
    assert copy["deep"] == {"list": [True]}


def test_queries_have_the_checks_of_documents(tmp_path: Path) -> None:
    path = write(tmp_path / "queries.jsonl", {"_id": 1, "text": "what"}, {"_id": "q", "text": "how"})
    assert read_queries(path) == {"1": "what", "q": "how"}
    write(path, {"_id": "q", "text": "what"}, {"_id": "q", "text": "how"})
    with pytest.raises(DataError, match=r"queries\.jsonl:2: duplicate id 'q'"):
        read_queries(path)


# judgements


QRELS = {"q1": {"d1": 2, "d2": 0}, "q2": {"d1": -1}}
BEIR_LINES = b"q1\td1\t2\nq1\td2\t0\nq2\td1\t-1\n"
TREC_LINES = b"q1 0 d1 2\nq1 0 d2 0\nq2 0 d1 -1\n"


@pytest.mark.parametrize(
    "content",
    [
        b"query-id\tcorpus-id\tscore\n" + BEIR_LINES,
        b"query-id\tcorpus-id\tscore\n\n" + BEIR_LINES.replace(b"\n", b"\n\n"),
        BEIR_LINES,
        BEIR_LINES.strip().replace(b"\n", b"\r\n"),
        BEIR_LINES.replace(b"1\n", b"1.0\n").replace(b"2\n", b"+2.\n"),
        BEIR_LINES.replace(b"\t", b" "),
        b"\xef\xbb\xbf" + BEIR_LINES,
        b"\xef\xbb\xbfquery-id\tcorpus-id\tscore\n" + BEIR_LINES,
        TREC_LINES,
        TREC_LINES.replace(b" ", b"\t"),
        TREC_LINES.replace(b" ", b"  ").replace(b"0  d", b"0\td"),
        b"qid Q0 docid rel\n" + TREC_LINES.replace(b" 0 d", b" Q0 d"),
        BEIR_LINES + b"q1\td1\t2\n",
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["qrels.tsv", "qrels.txt.gz"])
def test_judgements_are_read_as_beir_and_trec_write_them(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert read_qrels(tmp_path / name) == QRELS


def test_ids_with_spaces_are_read_between_tabs(tmp_path: Path) -> None:
    path = write(tmp_path / "qrels.tsv", "my query\ta document\t1", "my query\tanother\u2028one\t0")
    assert read_qrels(path) == {"my query": {"a document": 1, "another\u2028one": 0}}


BEIR_FORM = "expected query-id<TAB>corpus-id<TAB>score, with a whole score"


@pytest.mark.parametrize(
    "line",
    ["q1\td1", "q1 0 d1 1", "q1\t0\td1\t1", "q1\td1\thigh", "q1\td1\t0.5", "q1\td1\t", "q1\t \t1", "q1\td1\t1e400",
     "q1\td1\t1_0", "q1\td1\tnan", "q1\td1\t" + "9" * 5000, "query-id\tcorpus-id\tscore", "q1\tcaf\udce9\t1"],
)  # fmt: skip
def test_a_bad_judgement_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "qrels.tsv"
    path.write_bytes(b"query-id\tcorpus-id\tscore\nq1\td1\t1\n" + line.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=rf"qrels\.tsv:3: {BEIR_FORM}, found 'q"):
        read_qrels(path)


@pytest.mark.parametrize("line", ["q1\td1\thigh", "q1\td1", "q1,d1,1", "q1 0 my document 1", "query,document,score"])
def test_a_bad_first_judgement_is_no_header(line: str, tmp_path: Path) -> None:
    path = write(tmp_path / "qrels.tsv", line, "q1\td2\t1")
    with pytest.raises(DataError, match=r"qrels\.tsv:1: expected query-id<TAB>corpus-id<TAB>score.* found 'q"):
        read_qrels(path)


def test_a_bad_judgement_of_a_trec_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "qrels.txt", "q1 0 d1 1", "q1 0 a document 1")
    with pytest.raises(
        DataError, match=r"qrels\.txt:2: expected query-id 0 corpus-id score, with a whole score, found"
    ):
        read_qrels(path)


def test_two_judgements_of_one_pair_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "qrels.tsv", "q1\td1\t1", "q1\td2\t1", "q1\td1\t0")
    with pytest.raises(DataError, match=r"qrels\.tsv:3: document 'd1' is judged twice for query 'q1': 1 and 0"):
        read_qrels(path)


def test_judgements_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"qrels/dev\.tsv: no such file"):
        RetrievalData.load(beir(tmp_path), "dev")
    for name in ("corpus.jsonl", "nowhere"):
        with pytest.raises(DataError, match=rf"{name}: not a folder\. Expected a folder with corpus\.jsonl"):
            RetrievalData.load(tmp_path / name, "dev")


def test_a_beir_folder_keeps_the_queries_that_its_split_judges(tmp_path: Path) -> None:
    data = RetrievalData.load(beir(tmp_path, "q2\td1\t1", "q2\td2\t0"), "test")
    assert data.queries == {"q2": "second"}
    assert data.qrels == {"q2": {"d1": 1, "d2": 0}}
    assert data.documents["d2"] == Document("d2", "two", "Two")


@pytest.mark.parametrize("packed", ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"])
def test_the_files_of_a_beir_folder_may_be_packed(packed: str, tmp_path: Path) -> None:
    folder = beir(tmp_path, "q1\td1\t1", "q2\td2\t1")
    expected = RetrievalData.load(folder, "test")
    content = (folder / packed).read_bytes()
    (folder / packed).unlink()
    (folder / f"{packed}.gz").write_bytes(gzip.compress(content))
    assert RetrievalData.load(folder, "test") == expected
    assert len(list(read_documents(folder))) == 2
    (folder / packed).write_bytes(content)
    (folder / f"{packed}.gz").write_bytes(b"the one that is not packed is read")
    assert RetrievalData.load(folder, "test") == expected


def with_empty_rows(folder: Path) -> Path:
    """A BEIR folder in which a judged document, one that is not judged, and a query that is not judged are empty."""
    beir(folder, "q1\td1\t1", "q1\td3\t2", "q2\td3\t1", "q2\td1\t0")
    for name, rows in (("corpus", [("d3", ""), ("d4", " ")]), ("queries", [("q3", "")])):
        with open(folder / f"{name}.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps({"_id": id_, "text": text}) + "\n" for id_, text in rows)
    return folder


def test_empty_documents_are_left_out_and_stay_judged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = RetrievalData.load(with_empty_rows(tmp_path), "test")
    assert caplog.messages == [f"{tmp_path}/corpus.jsonl: 2 of 4 documents are empty and left out"]
    assert list(data.documents) == ["d1", "d2"] and data.empty == {"d3", "d4"}
    assert data.queries == {"q1": "first", "q2": "second"}
    assert data.qrels == {"q1": {"d1": 1, "d3": 2}, "q2": {"d3": 1, "d1": 0}}, "what they are worth is lost to all"
    assert examples_of(data) == [Example("first", ["one"], [])], "q2 has no positive that could be read"
    small = sample(data, 2, 0, random.Random(0))
    assert small.qrels == data.qrels and list(small.documents) == ["d1"]
    path = write(tmp_path / "theirs.run", "q1 Q0 d3 1 0.9 tag", "q1 Q0 d4 2 0.8 tag", "q2 Q0 d1 1 0.7 tag")
    assert read_run(path, data) == {"q1": {"d3": 0.9, "d4": 0.8}, "q2": {"d1": 0.7}}, "others may rank them"


def test_a_judged_query_needs_a_text(tmp_path: Path) -> None:
    folder = with_empty_rows(tmp_path)
    write(folder / "qrels" / "test.tsv", "q1\td1\t1", "q3\td1\t1")
    with pytest.raises(DataError, match=r"qrels/test\.tsv judges query 'q3', which is empty in queries\.jsonl"):
        RetrievalData.load(folder, "test")


@pytest.mark.parametrize(
    ("qrels", "message"),
    [
        (["q9\td1\t1"], r"test\.tsv judges query 'q9', which is not in queries\.jsonl"),
        (["q1\td1\t1", "q1\td9\t1"], r"test\.tsv judges document 'd9', which is not in corpus\.jsonl"),
        ([], "2 documents and 0 judged queries in split 'test'"),
    ],
    ids=["unknown query", "unknown document", "nothing judged"],
)
def test_judgements_without_their_texts_are_named(qrels: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        RetrievalData.load(beir(tmp_path, *qrels), "test")


# runs


def test_a_run_is_written_and_read(tmp_path: Path) -> None:
    data = RetrievalData.load(beir(tmp_path, "q1\td1\t1", "q2\td1\t1"), "test")
    run = {"q1": {"d1": 0.1 + 0.2, "d2": 7.0}, "q2": {"d2": -1e-9}}
    write_run(tmp_path / "new" / "mine.run", run, "mine")
    assert (tmp_path / "new" / "mine.run").read_text(encoding="utf-8").splitlines() == [
        "q1 Q0 d2 1 7.0 mine",
        "q1 Q0 d1 2 0.30000000000000004 mine",
        "q2 Q0 d2 1 -1e-09 mine",
    ]
    assert read_run(tmp_path / "new" / "mine.run", data) == run
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mine.run"]


def test_the_run_files_of_others_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = RetrievalData.load(beir(tmp_path, "q1\td1\t1", "q2\td1\t1"), "test")
    path = tmp_path / "theirs.run"
    path.write_bytes(b"\xef\xbb\xbfq1\tQ0\td2\t1\t12\tBM25\r\n\r\nq1  0  d1  2  -3.5e1  BM25\n")
    assert read_run(path, data) == {"q1": {"d2": 12.0, "d1": -35.0}}
    assert "theirs.run ranks 1 of 2 judged queries: the others count as 0" in caplog.text


def test_a_run_is_read_without_the_document_that_is_the_query(tmp_path: Path) -> None:
    documents = {id_: Document(id_, id_) for id_ in ("a", "b")}
    data = RetrievalData(documents, {"a": "a", "b": "b"}, {"a": {"b": 1}, "b": {"b": 1}})
    path = write(tmp_path / "theirs.run", "a Q0 a 1 0.9 tag", "a Q0 b 2 0.8 tag", "b Q0 b 1 0.9 tag")
    assert read_run(path, data) == {"a": {"b": 0.8}, "b": {"b": 0.9}}, "b is judged relevant to b"
    with pytest.raises(DataError, match="document 'a' is ranked twice for query 'a'"):
        read_run(write(path, "a Q0 a 1 0.9 tag", "a Q0 a 2 0.8 tag"), data)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"q1 Q0 d2 1 0.5", "expected query-id Q0 document-id rank score tag, found 'q1 Q0 d2 1 0.5'"),
        (b"q1 Q0 d2 1 0.5 my tag", "expected query-id Q0 document-id rank score tag"),
        (b"q1 Q0 d2 1 high tag", "expected query-id Q0 document-id rank score tag"),
        (b"q1 Q0 d2 1 nan tag", "expected query-id Q0 document-id rank score tag"),
        (b"q1 Q0 caf\xe9 1 0.5 tag", "expected query-id Q0 document-id rank score tag"),
        (b"q2 Q0 d2 1 0.5 tag", "query 'q2' is not one of the 1 judged queries"),
        (b"q1 Q0 d9 1 0.5 tag", "document 'd9' is not in the corpus"),
        (b"q1 Q0 d1 2 0.5 tag", "document 'd1' is ranked twice for query 'q1'"),
    ],
)
def test_a_bad_line_of_a_run_is_named(line: bytes, message: str, tmp_path: Path) -> None:
    data = RetrievalData.load(beir(tmp_path, "q1\td1\t1"), "test")
    (tmp_path / "bad.run").write_bytes(b"q1 Q0 d1 1 0.9 tag\n" + line + b"\n")
    with pytest.raises(DataError, match=rf"bad\.run:2: {message}"):
        read_run(tmp_path / "bad.run", data)
    with pytest.raises(DataError, match=r"none\.run: no such file"):
        read_run(tmp_path / "none.run", data)


def test_a_run_that_the_format_cannot_hold_is_not_written(tmp_path: Path) -> None:
    for document in ("a b", "a ", " a", ""):
        with pytest.raises(DataError, match=rf"cannot hold ids with white space: 'q1', '{document}'"):
            write_run(tmp_path / "mine.run", {"q1": {"a": 2.0, document: 1.0}}, "mine")
    assert not list(tmp_path.iterdir())


# pairs


def test_pairs_have_scores(tmp_path: Path) -> None:
    rows = [{"text_a": "a", "text_b": "b", "score": score} for score in (3.5, 0, -1e-3)]
    pairs = read_pairs(write(tmp_path / "pairs.jsonl", *rows))
    assert pairs == [Pair("a", "b", score=score) for score in (3.5, 0.0, -0.001)]


def test_pairs_have_labels_in_words_or_bits(tmp_path: Path) -> None:
    yes, no = ["entailment", "Entailment", "true", "1", 1, True], ["neutral", "contradiction", "FALSE", "0", 0, False]
    rows = [{"text_a": "a", "text_b": "b", "label": label} for label in (*yes, *no)]
    pairs = read_pairs(write(tmp_path / "pairs.jsonl", *rows))
    assert pairs == [Pair("a", "b", label=True)] * len(yes) + [Pair("a", "b", label=False)] * len(no)


@pytest.mark.parametrize("label", ["-", "entails", "", 2, -1, 0.5, None, [1]])
def test_an_unknown_label_is_named(label: Any, tmp_path: Path) -> None:
    good, bad = ({"text_a": "a", "text_b": "b", "label": value} for value in ("neutral", label))
    path = write(tmp_path / "pairs.jsonl", good, bad)
    with pytest.raises(DataError, match=r"pairs\.jsonl:2: unknown label .*: choose one of entailment") as error:
        read_pairs(path)
    assert repr(label) in str(error.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text_a": "a", "score": 1}, r"expected non-empty strings \"text_a\" and \"text_b\", found \['a', None\]"),
        ({"text_a": " ", "text_b": "b", "score": 1}, "expected non-empty strings"),
        ({"text_a": "a", "text_b": 2, "score": 1}, "expected non-empty strings"),
        ({"text_a": "a", "text_b": "b"}, r"expected either a \"score\" or a \"label\", found the fields \['text_a'"),
        ({"text_a": "a", "text_b": "b", "score": 1, "label": 1}, 'expected either a "score" or a "label"'),
        ({"text_a": "a", "text_b": "b", "score": [1]}, r'expected "score" to be a number, found \[1\]'),
        ({"text_a": "a", "text_b": "b", "score": "1"}, "expected \"score\" to be a number, found '1'"),
        ({"text_a": "a", "text_b": "b", "score": True}, 'expected "score" to be a number, found True'),
        ({"text_a": "a", "text_b": "b", "score": float("nan")}, "not valid JSON .NaN is not a JSON number"),
        ({"text_a": "a", "text_b": "b", "label": 1}, 'this pair has a "label", the pairs before it have a "score"'),
    ],
)
def test_a_bad_pair_is_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", {"text_a": "a", "text_b": "b", "score": 1}, row)
    with pytest.raises(DataError, match=rf"pairs\.jsonl:2: {message}"):
        read_pairs(path)


@pytest.mark.parametrize(("read", "message"), [(read_pairs, "no pairs"), (read_examples, "no examples")])
def test_a_file_without_rows_is_an_error(read: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"empty\.jsonl: {message}"):
        read(write(tmp_path / "empty.jsonl", "", " "))


# training examples


def test_examples_default_to_asymmetric_and_no_negatives(tmp_path: Path) -> None:
    path = write(
        tmp_path / "train.jsonl",
        {"query": "q", "positives": ["p"]},
        {"query": "r", "positives": ["p", "s"], "negatives": ["n"], "task": "symmetric", "itself": "title r"},
    )
    assert read_examples(path) == [
        Example("q", ["p"], [], "asymmetric", None),
        Example("r", ["p", "s"], ["n"], "symmetric", "title r"),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": " "}, "expected \"query\" to be a non-empty string, found ' '"),
        ({"query": 3}, 'expected "query" to be a non-empty string, found 3'),
        ({"positives": []}, r'expected "positives" to be a list of one or more texts, found \[\]'),
        ({"positives": "p"}, 'expected "positives" to be a list of one or more texts'),
        ({"positives": ["p", ""]}, 'expected "positives" to be a list of one or more texts'),
        ({"negatives": ["n", None]}, r'expected "negatives" to be a list of texts'),
        ({"negatives": None}, 'expected "negatives" to be a list of texts, found None'),
        ({"itself": ["q"]}, r'expected "itself" to be a text, found \[\'q\'\]'),
        ({"task": "rank"}, "expected \"task\" to be one of symmetric, asymmetric, found 'rank'"),
    ],
)
def test_a_bad_example_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = {"query": "q", "positives": ["p"], "negatives": ["n"], "task": "symmetric"}
    path = write(tmp_path / "train.jsonl", good, {**good, **change})
    with pytest.raises(DataError, match=rf"train\.jsonl:2: {message}"):
        read_examples(path)


def test_examples_of_a_split_leave_out_queries_without_a_positive(tmp_path: Path) -> None:
    data = RetrievalData.load(beir(tmp_path, "q1\td1\t0", "q2\td1\t0", "q2\td2\t2"), "test")
    assert examples_of(data) == [Example("second", ["Two two"], [])]


def test_examples_know_the_document_that_is_the_query(tmp_path: Path) -> None:
    documents = {"a": Document("a", "text", "title"), "b": Document("b", "other")}
    data = RetrievalData(documents, {"a": "text", "b": "other", "c": "no document"},
                         {"a": {"b": 1}, "b": {"b": 1}, "c": {"a": 1}})  # fmt: skip
    assert [example.itself for example in examples_of(data)] == ["title text", None, None]


def test_batches_are_whole_passes_each_in_an_order_of_its_own() -> None:
    items = [f"item {i}" for i in range(10)]
    epochs = [[batch_at(items, 5, 2 * epoch + place, "seed") for place in (0, 1)] for epoch in range(3)]
    for batches in epochs:
        assert sorted(chain(*batches)) == items
    assert epochs[0] != epochs[1] != epochs[2]
    assert batch_at(items, 5, 3, "seed") == epochs[1][1], "a step's batch depends on the step alone"
    assert batch_at(items, 5, 3, "other") != epochs[1][1]
    assert sorted(batch_at(items, 50, 7, "seed")) == items


def test_a_batch_is_drawn_as_if_the_whole_list_were_shuffled_at_its_step() -> None:
    """The orders are kept; runs draw what they always drew, whichever lists and steps take turns."""
    lists = [range(7), range(100), [f"pair {i}" for i in range(33)]]
    for step in [*range(12), 3, 0, 1000]:
        for items, seed in chain.from_iterable([(items, "0"), (items, "1/deal")] for items in lists):
            epoch, place = divmod(step, len(items) // 4)
            shuffled = list(items)
            random.Random(f"{seed}/{epoch}").shuffle(shuffled)
            assert batch_at(items, 4, step, seed) == shuffled[place * 4 : place * 4 + 4]
