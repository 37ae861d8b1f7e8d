"""Corpora in every format: the same documents from each, rows one after another, and what becomes of bad rows."""

import bz2
import csv
import datetime
import gc
import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from d2llm.bad_rows import BadRow, RejectFile
from d2llm.beir import read_qrels
from d2llm.corpus import read_documents, read_queries, read_query_log
from d2llm.errors import DataError, MissingExtraError
from d2llm.pairs import read_pairs
from d2llm.readers import read_jsonl, read_rows
from d2llm.types import Document

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROWS: list[dict[str, Any]] = [
    {"_id": "a", "text": "über naïve 漢字 \N{GRINNING FACE}", "title": "T", "lang": "de"},
    {"_id": "b", "text": '"quotes", a comma', "lang": "en"},
    {"_id": "c", "text": "", "title": "title alone"},
]
DOCUMENTS = [
    Document("a", "über naïve 漢字 \N{GRINNING FACE}", "T", {"lang": "de"}),
    Document("b", '"quotes", a comma', "", {"lang": "en"}),
    Document("c", "", "title alone"),
]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def write_tsv(path: Path, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["\t".join(names), *("\t".join(str(row.get(name, "")) for name in names) for row in rows)]
    path.write_text("".join(f"{line}\r\n" for line in lines), encoding="utf-8-sig", newline="")


def write_parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path, **options)


def write_beir(path: Path, rows: list[dict[str, Any]]) -> None:
    path.mkdir()
    write_jsonl(path / "corpus.jsonl", rows)


def packed(write: Callable[[Path, list[dict[str, Any]]], None]) -> Callable[[Path, list[dict[str, Any]]], None]:
    def write_packed(path: Path, rows: list[dict[str, Any]]) -> None:
        plain = path.with_suffix("")
        write(plain, rows)
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()

    return write_packed


FORMATS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "docs.jsonl": write_jsonl,
    "docs.json": write_jsonl,
    "docs.ndjson": write_jsonl,
    "docs": write_jsonl,
    "docs.v2.csv": write_csv,
    "DOCS.CSV": write_csv,
    "docs.tsv": write_tsv,
    "docs.parquet": write_parquet,
    "docs.jsonl.gz": packed(write_jsonl),
    "docs.csv.gz": packed(write_csv),
    "docs.tsv.gz": packed(write_tsv),
    "beir": write_beir,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents(name: str, tmp_path: Path) -> None:
    FORMATS[name](tmp_path / name, ROWS)
    assert list(read_documents(tmp_path / name)) == DOCUMENTS


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "beir"])
def test_queries_come_in_every_format(name: str, tmp_path: Path) -> None:
    FORMATS[name](tmp_path / name, ROWS[:2])
    assert read_queries(tmp_path / name) == {document.id: document.text for document in DOCUMENTS[:2]}


LOG = ["what is a \u2028 line", "next\x85 line\x0b", '"quoted', "{braces} inside"]


@pytest.mark.parametrize("name", ["log.txt", "log", "log.v2", "log.txt.gz"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_query_log_may_be_text_with_a_query_on_each_line(name: str, end: str, tmp_path: Path) -> None:
    content = end.join(["\ufeff" + LOG[0], "", f"  {LOG[1]} ", " ", LOG[0], *LOG[2:]]).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert read_query_log(tmp_path / name) == [text.strip() for text in LOG]
    with pytest.raises(DataError, match=rf'{name}:1: expected an "_id"'):
        read_queries(tmp_path / name)


@pytest.mark.parametrize("name", [*FORMATS, "log.txt"])
def test_a_query_log_comes_in_every_format(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"_id": str(number), "text": text} for number, text in enumerate(["b", "a", "", "b"])]
    if name == "beir":
        write_beir(tmp_path / name, [])
        write_jsonl(tmp_path / name / "queries.jsonl", rows)
    else:
        FORMATS.get(name, write_jsonl)(tmp_path / name, rows)
    assert read_query_log(tmp_path / name) == ["b", "a"]
    assert caplog.messages == [f"{tmp_path / name}: 1 empty queries are left out"]
    assert read_queries(tmp_path / name, keep_empty=True) == {"0": "b", "1": "a", "2": "", "3": "b"}


def test_a_log_that_begins_as_json_lines_is_read_as_such(tmp_path: Path) -> None:
    (tmp_path / "log").write_text('\n {"query": "x", "n": 1}\nplain\n', encoding="utf-8-sig")
    with pytest.raises(DataError, match=r"log:3: not valid JSON"):
        read_query_log(tmp_path / "log")
    (tmp_path / "log").write_bytes(b"plain\ncaf\xe9\n")
    with pytest.raises(DataError, match=r"log:2: not valid UTF-8"):
        read_query_log(tmp_path / "log")


def zipped(raw: bytes) -> bytes:
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        archive.writestr("word/document.xml", raw)
    return file.getvalue()


@pytest.mark.parametrize("name", ["docs.jsonl", "docs.csv", "docs.tsv"])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (gzip.compress, "is gzipped: add .gz to its name"),
        (bz2.compress, r"is compressed by bzip2: unpack it \(bunzip2\)"),
        (zipped, r"is a ZIP file, as \.docx, \.xlsx and \.epub are: convert it"),
        (lambda raw: raw.decode().encode("utf-16"), r"is UTF-16: convert it \(iconv -f UTF-16 -t UTF-8 OLD > NEW\)"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_named_with_the_way_out(
    name: str, changed: Callable[[bytes], bytes], message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(changed(b'{"_id": "a", "text": "x"}\n' * 3))
    with pytest.raises(DataError, match=message):
        list(read_rows(tmp_path / name, lambda _: None))


@pytest.mark.parametrize("name", FORMATS)
def test_a_bad_row_in_the_middle_is_named_and_can_be_rejected(name: str, tmp_path: Path) -> None:
    rows = [
        {"_id": "a", "text": "x"},
        {"_id": "b", "text": " ", "lang": "en"},
        {"_id": "a", "text": "y", "lang": "en"},
        {"_id": "z", "text": "last"},
    ]
    FORMATS[name](tmp_path / name, rows)
    with pytest.raises(DataError, match=r":\d: document 'b' is empty: neither text nor title"):
        list(read_documents(tmp_path / name))
    errors: list[DataError] = []
    assert [document.id for document in read_documents(tmp_path / name, errors.append)] == ["a", "z"]
    header = int("csv" in name.lower() or "tsv" in name)
    file = tmp_path / name / "corpus.jsonl" if name == "beir" else tmp_path / name
    assert [str(error) for error in errors] == [
        f"{file}:{2 + header}: document 'b' is empty: neither text nor title",
        f"{file}:{3 + header}: duplicate id 'a': an earlier line has it too",
    ]
    assert [error.row for error in errors if isinstance(error, BadRow)] == rows[1:3]


# rows come one after another


def open_files() -> set[str]:
    return {os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()}


@pytest.mark.parametrize("name", FORMATS)
def test_a_reader_that_is_left_early_closes_its_file(name: str, tmp_path: Path) -> None:
    rows = [{"_id": number, "text": "x" * 100} for number in range(2000)]
    FORMATS[name](tmp_path / name, rows)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        documents = read_documents(tmp_path / name)
        assert next(documents).id == "0"
        del documents
        gc.collect()
    assert not caught
    if Path("/proc/self/fd").is_dir():
        assert not [path for path in open_files() if path.startswith(str(tmp_path.resolve()))]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def scratch_second_group(path: Path) -> None:
    with pq.ParquetFile(path) as file:
        place = file.metadata.row_group(1).column(1).data_page_offset
    content = bytearray(path.read_bytes())
    content[place : place + 40] = b"\xff" * 40
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["docs.jsonl.gz", "docs.csv.gz", "docs.tsv.gz", "docs.parquet"])
def test_documents_before_a_damage_are_read_and_the_damage_stops_the_reading(name: str, tmp_path: Path) -> None:
    rows = [{"_id": number, "text": os.urandom(100).hex()} for number in range(2000)]  # random: it takes many blocks
    if name == "docs.parquet":
        write_parquet(tmp_path / name, rows, row_group_size=1500, use_dictionary=False)
        scratch_second_group(tmp_path / name)
    else:
        FORMATS[name](tmp_path / name, rows)
        cut(tmp_path / name)
    errors: list[DataError] = []
    documents = read_documents(tmp_path / name, errors.append)
    assert next(documents).id == "0"
    with pytest.raises(DataError, match=rf"{name}: not a \w+ file, or damaged \(.+\)"):
        list(documents)
    assert not errors, "a damage is no bad row that could be skipped"


def test_names_of_columns_that_are_not_utf8_are_a_damage(tmp_path: Path) -> None:
    write_parquet(tmp_path / "docs.parquet", [{"id": "a", "text": "x", "cafe": 1}])
    content = (tmp_path / "docs.parquet").read_bytes()
    (tmp_path / "docs.parquet").write_bytes(content.replace(b"cafe", b"caf\xe9"))
    with pytest.raises(DataError, match=r"docs\.parquet: not a Parquet file, or damaged \('utf-8' codec"):
        list(read_documents(tmp_path / "docs.parquet"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("docs.jsonl.gz", b'{"_id": "a", "text": "x"}', "not a gzip file, or damaged .*Not a gzipped file"),
        ("docs.csv.gz", b"_id,text\na,x\n", "not a gzip file, or damaged .*Not a gzipped file"),
        ("docs.csv.gz", b"", r"expected columns .*, found \[\]"),
        ("docs.csv", b"", r"expected columns .*, found \[\]"),
        ("docs.tsv", b"\n", r"expected columns .*, found \[\]"),
        ("docs.parquet", b"", "not a Parquet file, or damaged .*size is 0 bytes"),
        ("docs.parquet", b'{"_id": "a", "text": "x"}', "not a Parquet file, or damaged .*magic bytes not found"),
        ("docs.jsonl", b"PAR1\x15\x04", r"not valid JSON"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_an_error(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}(:1)?: {message}"):
        list(read_documents(tmp_path / name))


@pytest.mark.parametrize("name", [*FORMATS][:-1])
def test_a_missing_file_is_an_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{name}: no such file"):
        list(read_documents(tmp_path / name, lambda error: None))


@pytest.mark.parametrize("name", ["docs.jsonl", "docs.csv", "docs.tsv.gz", "docs.parquet"])
def test_what_is_no_file_is_an_error(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    for read in (read_jsonl, read_qrels, read_pairs):  # an iterator, a mapping, a list
        with pytest.raises(DataError, match=rf"{name}: a folder, where a file is expected"):
            list(read(tmp_path / name))
    with pytest.raises(DataError, match=rf"{name}/corpus\.jsonl: no such file"):
        list(read_documents(tmp_path / name))
    (tmp_path / name / "corpus.jsonl").mkdir()
    with pytest.raises(DataError, match=rf"{name}/corpus\.jsonl: a folder, where a file is expected"):
        list(read_documents(tmp_path / name))
    (tmp_path / name / "corpus.jsonl").rmdir()
    (tmp_path / name).rmdir()
    (tmp_path / name).symlink_to(tmp_path / "gone")
    for path, message in (
        (tmp_path / name, "no such file"),
        (tmp_path / f"{'x' * 300}{name}", "cannot be read .*File name too long"),
        (tmp_path / f"nul\0{name}", "cannot be read .*null byte"),
    ):
        with pytest.raises(DataError, match=f"{name}: {message}"):
            list(read_documents(path))


# columns


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        (["id", "body"], r"\['id', 'body'\]"),
        (["text", "docid"], r"\['text', 'docid'\]"),
        (["_id;text"], r"\['_id;text'\]"),
        (["id", "text", "text"], r"\['id', 'text', 'text'\]"),
    ],
)
@pytest.mark.parametrize("name", ["docs.csv", "docs.tsv", "docs.parquet"])
def test_columns_that_are_missing_or_doubled_are_named(
    name: str, columns: list[str], found: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if name == "docs.parquet":
        pq.write_table(pa.table([["x"]] * len(columns), names=columns), path)
    else:
        line = ("\t" if name == "docs.tsv" else ",").join(columns)
        path.write_text(f"{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf'{name}: expected .* including "text" and "_id" \(or "id"\), found {found}'):
        list(read_documents(path, lambda error: None))


@pytest.mark.parametrize("name", ["docs.csv", "docs.parquet"])
def test_a_table_with_columns_and_no_rows_has_no_documents(name: str, tmp_path: Path) -> None:
    if name == "docs.csv":
        (tmp_path / name).write_text("id,text", encoding="utf-8")
    else:
        pq.write_table(pa.table({"id": pa.array([], pa.string()), "text": pa.array([], pa.string())}), tmp_path / name)
    assert not list(read_documents(tmp_path / name))


# CSV


def test_cells_are_text_and_empty_ones_are_absent(tmp_path: Path) -> None:
    path = tmp_path / "docs.csv"
    path.write_text(",id,text,year,lang\n0,17,x,2020,\n\n1,18,y,,en\r\n", encoding="utf-8")
    assert list(read_documents(path)) == [
        Document("17", "x", "", {"year": "2020"}),
        Document("18", "y", "", {"lang": "en"}),
    ]


def test_a_long_text_passes(tmp_path: Path) -> None:
    text = "long " * 100_000
    write_csv(tmp_path / "docs.csv", [{"_id": "a", "text": text}])
    assert [document.text for document in read_documents(tmp_path / "docs.csv")] == [text]


def test_a_quoted_cell_of_csv_may_hold_anything(tmp_path: Path) -> None:
    texts = [
        'two\nlines, a comma,\ta tab and "quotes"',
        "an old\rline end",
        "windows\r\n",
        "nothing\0",
        '"',
        '""',
        "\n",
    ]
    rows = [{"_id": str(number), "text": f"text {text}", "last": text} for number, text in enumerate(texts)]
    write_csv(tmp_path / "docs.csv", rows)
    found = list(read_documents(tmp_path / "docs.csv"))
    assert [{"_id": document.id, "text": document.text, **document.payload} for document in found] == rows


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_table_has_any_line_ends_and_a_last_line_without_one(end: str, tmp_path: Path) -> None:
    (tmp_path / "docs.csv").write_text(end.join(['"_id","text"', 'a,"x"', "b,y"]), encoding="utf-8-sig", newline="")
    assert list(read_documents(tmp_path / "docs.csv")) == [Document("a", "x"), Document("b", "y")]


def test_a_line_end_of_old_macs_does_not_cut_a_cell(tmp_path: Path) -> None:
    (tmp_path / "docs.csv").write_bytes(b"_id,text\na,x\rrest\nb,y\n")
    errors: list[BadRow] = []
    assert list(read_documents(tmp_path / "docs.csv", errors.append)) == [Document("b", "y")]
    assert [error.row for error in errors] == ["a,x\rrest"]


BAD_CSV = {
    "a cell too few": (b"b", "expected 2 cells, found 1", "b"),
    "a cell too many": (b'b,"y, z",more\r', "expected 2 cells, found 3", 'b,"y, z",more'),
    "text after a quote": (b'b,"y"z', "not valid CSV .*expected after", 'b,"y"z'),
    "invalid UTF-8": (b"b,caf\xe9", "not valid UTF-8 .*can't decode byte 0xe9", "b,caf\\xe9"),
    "invalid UTF-8 on two lines": (b'b,"caf\xe9\ny"', "not valid UTF-8 .*can't decode byte 0xe9", 'b,"caf\\xe9\ny"'),
}


@pytest.mark.parametrize(("line", "message", "row"), BAD_CSV.values(), ids=BAD_CSV)
def test_a_bad_row_of_a_table_is_named_by_its_first_line(line: bytes, message: str, row: str, tmp_path: Path) -> None:
    path = tmp_path / "docs.csv"
    path.write_bytes(b'_id,text\na,"two\nlines"\n\n' + line + b"\nz,last\n")
    with pytest.raises(DataError, match=rf"docs\.csv:5: {message}"):
        list(read_documents(path))
    errors: list[BadRow] = []
    assert [document.id for document in read_documents(path, errors.append)] == ["a", "z"]
    assert [(error.where, error.row) for error in errors] == [(f"{path}:5", row)]


JOINED_ROWS = {
    "never closed": ('"Freedom', "free", "4: a quote that opens here is never closed, in a row of 198 lines"),
    "never closed, in its second line": ('"one\ntwo","Freedom', "free", "5: a quote that opens here is never closed"),
    "closed by the next one": ('"Freedom', '"free', r"4: not valid CSV \(.*expected after.*\), in a row of 98 lines"),
    "closed at the end of a cell": ('"Freedom', 'free"', "4: expected 3 cells, found 2, in a row of 98 lines"),
}


@pytest.mark.parametrize(("first", "second", "message"), JOINED_ROWS.values(), ids=JOINED_ROWS)
def test_rows_that_a_wrong_quote_joins_are_never_skipped(first: str, second: str, message: str, tmp_path: Path) -> None:
    lines = [f"{number},plain,text {number}" for number in range(200)]
    lines[2], lines[99] = f"2,{first},x", f"99,x,{second}"
    path = tmp_path / "docs.csv"
    path.write_text("\n".join(["_id,title,text", *lines]), encoding="utf-8")
    errors: list[BadRow] = []
    with pytest.raises(DataError, match=rf"docs\.csv:{message}.* never skipped: correct the quotes"):
        list(read_documents(path, errors.append))
    assert not errors


def test_a_last_line_that_is_cut_in_a_quote_can_be_skipped(tmp_path: Path) -> None:
    (tmp_path / "docs.csv").write_text('_id,text\na,x\nb,"y', encoding="utf-8")
    errors: list[BadRow] = []
    assert [document.id for document in read_documents(tmp_path / "docs.csv", errors.append)] == ["a"]
    assert [str(error) for error in errors] == [f"{tmp_path}/docs.csv:3: a quote that opens here is never closed"]


def test_a_quote_that_is_never_closed_is_noticed_after_the_longest_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d2llm.readers.MAX_CELL", 1000)
    before = csv.field_size_limit(10)
    path = tmp_path / "docs.csv"
    lines = [f"{number},{'x' * 100}\n" for number in range(100)]
    path.write_text('_id,text\na,"y\n' + "".join(lines), encoding="utf-8")
    try:
        with pytest.raises(DataError, match=r"docs\.csv:2: .*field larger than field limit.* in a row of 11 lines"):
            list(read_documents(path, lambda error: None))
    finally:
        csv.field_size_limit(before)


@pytest.mark.parametrize("header", [b'_id,text,"lang\na,x,en\n', b"_id,text,caf\xe9\n_id,text,lang\na,x,en\n"])
def test_a_header_that_cannot_be_read_is_not_skipped(header: bytes, tmp_path: Path) -> None:
    (tmp_path / "docs.csv").write_bytes(header)
    with pytest.raises(DataError, match=r"docs\.csv:1: (a quote that opens here|not valid UTF-8)"):
        list(read_documents(tmp_path / "docs.csv", lambda error: None))


# TSV


def test_quotes_in_tsv_are_characters_like_any_other(tmp_path: Path) -> None:
    texts = [
        '"Freedom is not free',
        "third",
        'the word freedom"',
        '5" pipe',
        '"both"',
        '""',
        "cr\rin",
        "nothing\0",
        "ls\u2028",
    ]
    write_tsv(tmp_path / "docs.tsv", [{"id": number, "text": text} for number, text in enumerate(texts)])
    assert [document.text for document in read_documents(tmp_path / "docs.tsv")] == texts


def test_the_last_line_of_tsv_needs_no_end(tmp_path: Path) -> None:
    (tmp_path / "docs.tsv").write_bytes(b'text\tid\tlang\n"x\ta\t\n\ny\tb\ten')
    assert list(read_documents(tmp_path / "docs.tsv")) == [Document("a", '"x'), Document("b", "y", "", {"lang": "en"})]


def test_a_bad_line_of_tsv_is_one_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "docs.tsv"
    path.write_bytes(b'id\ttext\na\tx\nb\t"two\nlines"\tz\t1\nc\tcaf\xe9\nz\tlast\n')
    errors: list[BadRow] = []
    assert list(read_documents(path, errors.append)) == [
        Document("a", "x"),
        Document("b", '"two'),
        Document("z", "last"),
    ]
    assert [error.where for error in errors] == [f"{path}:4", f"{path}:5"]
    assert errors[0].reason == "expected 2 cells, found 3"
    assert errors[1].reason.startswith("not valid UTF-8")
    with pytest.raises(DataError, match=r"docs\.tsv:1: not valid UTF-8"):
        path.write_bytes(b"id\ttext\tcaf\xe9\nid\ttext\tlang\na\tx\ten\n")
        list(read_documents(path, errors.append))


# Parquet

DAY = datetime.datetime(2024, 5, 6, 7, 8, 9)
ZONE = datetime.timezone(datetime.timedelta(hours=2))
VALUES = {
    "integer": (pa.array([7], pa.int16()), 7),
    "boolean": (pa.array([True]), True),
    "half float": (pa.array([1.5], pa.float16()), 1.5),
    "NaN": (pa.array([float("nan")]), None),
    "null": (pa.nulls(1), None),
    "seconds": (pa.array([DAY], pa.timestamp("s")), "2024-05-06T07:08:09"),
    "nanoseconds": (pa.array([1_700_000_000_123_456_789], pa.timestamp("ns")), "2023-11-14T22:13:20.123456"),
    "zone": (pa.array([DAY.replace(tzinfo=ZONE)], pa.timestamp("us", "+02:00")), "2024-05-06T07:08:09+02:00"),
    "date": (pa.array([DAY.date()]), "2024-05-06"),
    "time": (pa.array([DAY.time()]), "07:08:09"),
    "duration": (pa.array([datetime.timedelta(minutes=2)]), 120.0),
    "price": (pa.array([Decimal("19.90")]), 19.9),
    "whole decimal": (pa.array([Decimal(1234567890123456789)]), 1234567890123456789),
    "unsigned": (pa.array([2**63 - 1], pa.uint64()), 2**63 - 1),
    "uuid": (pa.array([uuid.UUID(int=1).bytes], pa.uuid()), "00000000-0000-0000-0000-000000000001"),
    "categorical": (pa.array(["x"]).dictionary_encode(), "x"),
    "list": (pa.array([["x", None]]), ["x", None]),
    "map": (pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())), [["k", 1]]),
    "struct": (
        pa.array([{"at": [DAY], "n": float("nan"), "deep": {"price": Decimal("0.5")}}]),
        {"at": ["2024-05-06T07:08:09"], "n": None, "deep": {"price": 0.5}},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("column", "value"), VALUES.values(), ids=VALUES)
def test_values_of_parquet_end_as_json(column: Any, value: Any, tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1], "text": ["x"], "field": column}), tmp_path / "docs.parquet")
    (document,) = read_documents(tmp_path / "docs.parquet")
    assert document == Document("1", "x", "", {} if value is None else {"field": value})
    assert type(document.payload.get("field")) is type(value)
    assert json.loads(json.dumps(document.payload)) == document.payload


@pytest.mark.parametrize(
    "column",
    [
        pa.array([0, 2**64 - 1], pa.uint64()),
        pa.array([Decimal(0), Decimal(2**63)]),
        pa.array([[], [2**63]], pa.list_(pa.uint64())),
    ],
    ids=["unsigned", "decimal", "nested"],
)
def test_integers_beyond_what_an_index_stores_make_a_bad_row(column: Any, tmp_path: Path) -> None:
    path = tmp_path / "docs.parquet"
    pq.write_table(pa.table({"id": [1, 2], "text": ["x", "y"], "field": column}), path)
    errors: list[BadRow] = []
    assert [document.id for document in read_documents(path, errors.append)] == ["1"]
    assert [str(error) for error in errors] == [
        f"{path}:2: document '2': field 'field': an integer beyond 64 bits: write it as text"
    ]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([None, b"\x89PNG" * 99, None]), r"column 'field': JSON has no b'.*\.\.\..*': leave the column out"),
        (pa.array([[], [{"deep": b"x"}], None]), "column 'field': JSON has no b'x': leave the column out"),
        (pa.array([0.0, float("inf"), 1.0]), "column 'field': JSON has no inf: leave the column out"),
        (pa.array([0, 2**62, 0], pa.timestamp("us")), "column 'field': date value out of range"),
        # A number of JSON would lose its last digit.
        (
            pa.array([Decimal("1.25"), Decimal("1234567890123456.78"), None]),
            r"column 'field': JSON has no Decimal\('1234567890123456.78",
        ),
    ],
    ids=["bytes", "nested bytes", "infinity", "far future", "digits"],
)
def test_a_value_that_json_has_not_makes_a_bad_row(column: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "docs.parquet"
    pq.write_table(pa.table({"id": [1, 2, 3], "text": ["x", "y", "z"], "field": column}), path)
    with pytest.raises(DataError, match=rf"docs\.parquet:2: {message}"):
        list(read_documents(path))
    errors: list[BadRow] = []
    assert [document.id for document in read_documents(path, errors.append)] == ["1", "3"]
    assert [error.row for error in errors] == [{"id": 2, "text": "y"}], "the row without what JSON has not"
    assert [error.document_id for error in errors] == ["2"]


def test_rows_are_counted_over_batches_and_row_groups(tmp_path: Path) -> None:
    rows = [{"id": number, "text": "" if number == 2500 else "x"} for number in range(1, 3001)]
    write_parquet(tmp_path / "docs.parquet", rows, row_group_size=700)
    errors: list[DataError] = []
    assert len(list(read_documents(tmp_path / "docs.parquet", errors.append))) == 2999
    (error,) = errors
    assert str(error).startswith(f"{tmp_path}/docs.parquet:2500: document '2500' is empty")


def test_without_pyarrow_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "docs.parquet", ROWS)
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(MissingExtraError, match=r"pip install 'd2llm\[parquet\]'"):
        list(read_documents(tmp_path / "docs.parquet"))


def test_pyarrow_is_imported_for_parquet_alone(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "docs.jsonl", ROWS)
    write_csv(tmp_path / "docs.csv", ROWS)
    code = (
        "import sys; from pathlib import Path; from d2llm.corpus import read_documents\n"
        "for name in sys.argv[1:]: assert len(list(read_documents(Path(name)))) == 3\n"
        "assert 'pyarrow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "docs.jsonl", tmp_path / "docs.csv"], check=True)


# standard input


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What is written to it is standard input."""
    ends = os.pipe()
    with open(ends[0], encoding="utf-8") as reading, open(ends[1], "wb", buffering=0) as writing:
        monkeypatch.setattr(sys, "stdin", reading)
        yield writing


def test_standard_input_is_read_line_by_line_and_once(pipe: Any) -> None:
    documents = read_documents(Path("-"))
    pipe.write(b'{"_id": "a", "text": "x"}\n')
    assert next(documents) == Document("a", "x")
    pipe.write(b'{"_id": "b", "text": "caf\xc3\xa9"}')
    pipe.close()
    assert list(documents) == [Document("b", "café")]
    assert not sys.stdin.closed
    assert list(read_documents(Path("-"))) == []


def test_errors_name_the_line_of_standard_input(pipe: Any) -> None:
    pipe.write(b'{"_id": "a", "text": "x"}\n\n{"_id"\n{"text": "y"}\n{"_id": "z", "text": "last"}\n')
    pipe.close()
    errors: list[DataError] = []
    assert [document.id for document in read_documents(Path("-"), errors.append)] == ["a", "z"]
    assert [str(error).split(": ")[0] for error in errors] == ["stdin:3", "stdin:4"]


# rejected rows


def test_rejected_rows_are_written_with_their_reason(tmp_path: Path) -> None:
    path, rejects = tmp_path / "docs.jsonl", RejectFile(tmp_path / "new" / "rejects.jsonl")
    path.write_bytes(
        b'{"_id": "a", "text": "x"}\n'
        b'{"_id": "b", "text": "caf\xe9"}\r\n'
        b'{"_id": "c", "text": "", "lang": "\xc3\xbc"}\n'
        b'{"_id": "a", "text": "y"}\n'
    )
    found = []
    for document in read_documents(path, rejects):
        found.append(document.id)
        assert not rejects.path.exists(), "written only when there is something to reject"
    assert found == ["a"]
    lines = [json.loads(line) for line in rejects.path.read_text(encoding="utf-8").splitlines()]
    assert [line["where"] for line in lines] == [f"{path}:2", f"{path}:3", f"{path}:4"]
    assert [line["row"] for line in lines] == [
        '{"_id": "b", "text": "caf\\xe9"}',
        {"_id": "c", "text": "", "lang": "ü"},
        {"_id": "a", "text": "y"},
    ]
    reasons = ["not valid JSON", "document 'c' is empty", "duplicate id 'a'"]
    assert all(line["reason"].startswith(reason) for line, reason in zip(lines, reasons, strict=True))
    assert rejects.count == len(lines) == 3


def test_a_rejected_row_that_json_cannot_hold_is_written_as_text(tmp_path: Path) -> None:
    path, rejects = tmp_path / "docs.jsonl", RejectFile(tmp_path / "rejects.jsonl")
    path.write_text('{"_id": "large", "text": "x", "n": 1e400}\n', encoding="utf-8")
    assert list(read_documents(path, rejects)) == []
    deep: list[Any] = []
    for _ in range(10_000):
        deep = [deep]
    rejects(BadRow("elsewhere:1", "nested too deep", {"_id": "deep", "n": deep}))

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    lines = [json.loads(line, parse_constant=no_constant) for line in rejects.path.read_text().splitlines()]
    assert [line["row"][:17] for line in lines] == ["{'_id': 'large', ", "{'_id': 'deep', '"]


def test_a_rejected_row_is_on_disk_before_the_next_is_read(tmp_path: Path) -> None:
    path, rejects = tmp_path / "docs.jsonl", RejectFile(tmp_path / "rejects.jsonl")
    path.write_text('{}\n{"_id": "a", "text": "x"}\n{}\n', encoding="utf-8")
    documents = read_documents(path, rejects)
    assert next(documents).id == "a"
    assert json.loads(rejects.path.read_text(encoding="utf-8"))["row"] == {}


def test_the_reject_file_of_an_earlier_run_goes(tmp_path: Path) -> None:
    path, rejects = tmp_path / "docs.jsonl", tmp_path / "rejects.jsonl"
    path.write_text("{}\n{}\n", encoding="utf-8")
    assert not list(read_documents(path, RejectFile(rejects)))
    path.write_text("{}\n", encoding="utf-8")
    assert not list(read_documents(path, RejectFile(rejects)))
    assert len(rejects.read_text(encoding="utf-8").splitlines()) == 1
    path.write_text("", encoding="utf-8")
    assert not list(read_documents(path, RejectFile(rejects)))
    assert not rejects.exists()


def test_a_file_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "docs.jsonl"
    write_jsonl(path, ROWS)
    for taken in (path, tmp_path):
        with pytest.raises(DataError, match="exists already and is not a file of rejected rows: choose another name"):
            RejectFile(taken)
    assert list(read_documents(path)) == DOCUMENTS


def test_rows_have_their_place(tmp_path: Path) -> None:
    write_csv(tmp_path / "docs.csv", [{"_id": "a", "text": "two\nlines"}, {"_id": "b", "text": "x"}])
    assert [where for where, _ in read_rows(tmp_path / "docs.csv")] == [f"{tmp_path}/docs.csv:{n}" for n in (2, 4)]


def test_a_bad_row_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(BadRow("docs.jsonl:3", "no text", {"_id": "a"})))
    assert (str(error), error.where, error.row) == ("docs.jsonl:3: no text", "docs.jsonl:3", {"_id": "a"})
