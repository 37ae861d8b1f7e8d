"""Try odd and damaged inputs of every kind that a user can give to d2llm.

    python benchmarks/fuzz.py MODEL --inputs 1000

Hypothesis draws inputs of each kind: valid ones with odd values, and damaged ones. An input passes in two cases: d2llm
refuses it with an error of its own that names the place, and leaves nothing behind; or d2llm accepts it and returns it
equal, types included. Documents are stored in a real embedded collection, which is opened again at the end. Prints the
smallest failing input of each kind, a table for people, and one line of JSON for machines. Exits with 1 if any input
fails.
"""

from __future__ import annotations

import codecs
import csv
import dataclasses
import functools
import io
import json
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import click
import hypothesis
import numpy as np
import transformers
from click.testing import CliRunner
from huggingface_hub import constants as hub
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import d2llm
from d2llm.bad_rows import BadRow
from d2llm.beir import RetrievalData, read_qrels, read_run
from d2llm.cli import main
from d2llm.cli_options import echo_table
from d2llm.connectors import Qdrant, QdrantIndex
from d2llm.corpus import read_documents
from d2llm.deprecated import RenamedWarning
from d2llm.errors import ArgumentError, D2LLMError, DataError, ModelError
from d2llm.flat import FlatIndex
from d2llm.folder import CONFIG, TOKENIZER, read_config
from d2llm.indexing import digest_of, payload_of
from d2llm.pairs import read_pairs
from d2llm.readers import read_rows
from d2llm.student import Student
from d2llm.train.config import OLD_KEYS, Recipe, read_recipe
from d2llm.types import Document, Point

hub.HF_HUB_OFFLINE = True  # no hub is asked for a changed backbone
transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # the library has no types

Check: TypeAlias = Callable[[st.DataObject, "Ground"], bool]
"""Draws one input and tries it. Returns True if it is accepted, False if it is refused. Raises an error if it fails."""

FIELDS = ("lang", "year", "a.b", "naïve", "[0]", "a[]", 'quo"te', "back\\slash", "", " ", "x y", "名")


class Ground:
    """What the inputs of one kind are tried on: a model, an embedded collection, and a folder for files."""

    def __init__(self, folder: Path, model: Path, student: Path | None = None) -> None:
        self.folder, self.model, self.student, self.config = folder, model, student, read_config(model)
        self.stored: dict[str, dict[str, Any]] = {}
        """Payloads by id that the collection must contain."""
        self.index = QdrantIndex("fuzz", folder / "qdrant")
        self.index.open_for(self.config)
        self.opened = ExitStack()
        self.opened.callback(self.index.close)

    @functools.cached_property
    def filtered(self) -> tuple[FlatIndex, QdrantIndex]:
        """A flat index and a Qdrant index with the same documents."""
        indexes = FlatIndex(), QdrantIndex("filters", self.folder / "qdrant")
        points = [self.point(Document(f"doc {i}", "text", "", payload)) for i, payload in enumerate(population())]
        for index in indexes:
            self.opened.callback(index.close)
            index.open_for(self.config)
            index.upsert(points)
        return indexes

    def point(self, document: Document) -> Point:
        """A point of the document, with a constant vector."""
        vector = np.full(self.config.embedding_dim, self.config.embedding_dim**-0.5, np.float32)
        features = np.zeros(self.config.feature_bytes, np.uint8)
        return Point(document.id, vector, features, payload_of(document), digest_of(document))

    def store(self, documents: list[Document]) -> None:
        """Store documents, and check that the index returns them equal."""
        points = [self.point(document) for document in documents]
        self.index.upsert(points)
        expected = {document.id: payload_of(document) for document in documents}
        assert_same(self.index.get(list(expected)), expected)
        self.stored |= expected

    def close(self) -> None:
        """Open the collection again, and check that it contains all accepted documents."""
        self.opened.close()
        with QdrantIndex("fuzz", self.folder / "qdrant") as index:
            assert_same(index.get(list(self.stored)), self.stored)
            assert index.count() == len(self.stored), f"{index.count()} documents, not {len(self.stored)}"


def assert_same(actual: Any, expected: Any) -> None:
    """Check that the values are equal and of the same types: 1, 1.0 and true differ."""
    assert exact(actual) == exact(expected), f"{actual!r} came back for {expected!r}"


def exact(value: Any) -> str:
    """A text that is the same only for equal values of the same types."""
    return json.dumps(value, sort_keys=True, default=repr)


# What Hypothesis draws.

NUMBERS = ["0", "-0.0", "1e400", "-1e400", "1e308", "5e-324", str(2**53 + 1), str(2**63 - 1), str(2**63), str(-(2**63)),
           str(-(2**63) - 1), str(2**64), "1" * 400, "1.0", "0.1e1", "NaN", "Infinity"]  # fmt: skip
texts = st.text(max_size=12) | st.sampled_from(
    ["", " ", "\0", '"', "a\tb", "a\nb", "\r", "\x85", "\u2028", "\ufeff", "é"]
)
half_surrogates = st.text(st.characters(categories=["Cs"]) | st.just("a"), max_size=3)
raw_numbers = st.sampled_from(NUMBERS).map(lambda number: f"@@{number}@@")
"""Numbers as a file may spell them. `to_json` removes the marks and quotes."""
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts | half_surrogates | raw_numbers
keys = st.sampled_from(FIELDS) | texts | st.integers(1, 300).map(lambda n: "k" * n)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=8
) | st.tuples(st.integers(1, 200), st.booleans()).map(lambda drawn: nested(*drawn))
rows = st.fixed_dictionaries(
    {},
    optional={
        "_id": texts | st.integers() | values,
        "id": texts,
        "text": texts.filter(bool) | values,
        "title": texts | values,
        "_d2llm": values,
        **{name: values for name in FIELDS if name},
    },
)
documents = st.builds(lambda row, id_: {**row, "_id": id_, "text": "text"}, rows, texts.filter(bool))
SCRAPS = [b'"', b"\n", b"\r", b"\t", b",", b"\0", b"\xff", b"\xef\xbb\xbf", b"{", b"}", b"[" * 200, b"1e999",
          b"\\ud800", b"\xc3\xa9", b" ", b"\x85", b"-", b"9" * 30]  # fmt: skip


def nested(depth: int, mapping: bool) -> Any:
    """Lists or mappings `depth` deep."""
    value: Any = "x"
    for _ in range(depth):
        value = {"k": value} if mapping else [value]
    return value


def to_json(value: Any) -> str:
    """JSON text in which raw numbers keep their spelling."""
    return re.sub(r'"@@([^@"]+)@@"', r"\1", json.dumps(value))


@st.composite
def damage(draw: st.DrawFn, content: bytes) -> bytes:
    """The same bytes; or with scraps inserted, with a part cut out, or without their end."""
    for _ in range(draw(st.integers(0, 2))):
        at, more = draw(st.integers(0, len(content))), draw(st.integers(0, 8))
        scrap = draw(st.sampled_from(SCRAPS) | st.binary(max_size=4) | st.just(b""))
        content = content[:at] + scrap + content[at + more if draw(st.booleans()) else at :]
        if draw(st.integers(0, 9)) == 0:
            content = content[: draw(st.integers(0, len(content)))]
    return content


def population() -> list[dict[str, Any]]:
    """Payloads to filter: many values in each field that a filter can address."""
    kinds: list[Any] = [0, 1, True, False, 1.0, 2.5, -0.0, "1", "a", "", None, [], ["a", 1], [True, 2.5], {"k": 1},
                        2**53 + 1, 2**63 - 1, -(2**63), 1e300, "名", [["a"]], [None, "a"], " "]  # fmt: skip
    names = [name for name in FIELDS if name not in ("", 'quo"te', "back\\slash")]
    return [{name: kinds[(i + 7 * j) % len(kinds)] for j, name in enumerate(names)} for i in range(4 * len(kinds))]


# The checks, one for each kind of input.


def refused_here(error: D2LLMError, path: Path) -> None:
    """Check that an error about a file names the file."""
    assert path.name in str(error), f"the error does not name the file: {error}"


def read_all(path: Path) -> tuple[list[Document], list[BadRow]]:
    """Read the documents and the bad rows of a corpus, as `d2llm index --on-error skip` does."""
    bad: list[BadRow] = []
    read = list(read_documents(path, bad.append))
    for error in bad:
        assert re.match(re.escape(str(path)) + r":\d+$", error.where), f"no line: {error}"
    return read, bad


def corpus_file(path: Path, data: st.DataObject, ground: Ground, content: bytes) -> bool:
    """Read a damaged corpus, and store the accepted documents."""
    path.write_bytes(data.draw(damage(content), "content"))
    try:
        accepted, bad = read_all(path)
    except DataError as error:
        refused_here(error, path)
        return False
    ground.store(accepted)
    return not bad


def jsonl(data: st.DataObject, ground: Ground) -> bool:
    """JSON lines: each non-blank line gives a row or a bad row, and a row equals what Python's json reads."""
    drawn = data.draw(st.lists(documents | rows, max_size=4), "rows")
    path = ground.folder / "corpus.jsonl"
    accepted = corpus_file(path, data, ground, "".join(to_json(row) + "\n" for row in drawn).encode())
    lines, bad = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), list[BadRow]()
    good = list(read_rows(path, bad.append))
    assert len(good) + len(bad) == sum(1 for line in lines if line.strip())
    for where, row in good:
        assert_same(row, json.loads(lines[int(where.rpartition(":")[2]) - 1]))
    return accepted


def separated(path: Path, data: st.DataObject, ground: Ground) -> bool:
    """CSV as Python's csv writes it, or TSV; valid files come back cell by cell."""
    tabs = path.suffix == ".tsv"
    cells = texts.map(lambda text: re.sub(r"[\t\r\n]", " ", text)) if tabs else texts
    names = ["_id", "text", *data.draw(st.lists(cells, max_size=3, unique=True), "columns")]
    table = data.draw(st.lists(st.lists(cells, min_size=len(names), max_size=len(names)), max_size=5), "table")
    end = data.draw(st.sampled_from(["\n", "\r\n"]), "line end")
    if tabs:
        content = "".join("\t".join(row) + end for row in [names, *table])
    else:
        file = io.StringIO()
        minimal = not any("\r" in cell for row in [names, *table] for cell in row)  # csv does not quote \r
        csv.writer(file, lineterminator=end, quoting=csv.QUOTE_MINIMAL if minimal else csv.QUOTE_ALL).writerows(
            [names, *table]
        )
        content = file.getvalue()
    accepted = corpus_file(path, data, ground, content.encode())
    if path.read_bytes() == content.encode() and len(set(names)) == len(names):
        bad: list[BadRow] = []
        read = [row for _, row in read_rows(path, bad.append)]
        expected = [
            {name: cell for name, cell in zip(names, row, strict=True) if name and (cell or name == "text")}
            for row in table
        ]
        if tabs:  # a line of white space is not a row
            expected = [row for row, line in zip(expected, table, strict=True) if "\t".join(line).encode().strip()]
        assert not bad, bad[0]
        assert_same(read, expected)
    return accepted


def csv_(data: st.DataObject, ground: Ground) -> bool:
    """Comma-separated values."""
    return separated(ground.folder / "corpus.csv", data, ground)


def tsv(data: st.DataObject, ground: Ground) -> bool:
    """Tab-separated values."""
    return separated(ground.folder / "corpus.tsv", data, ground)


def parquet(data: st.DataObject, ground: Ground) -> bool:
    """Parquet, with one type for each column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types: dict[pa.DataType, st.SearchStrategy[Any]] = {
        pa.int64(): st.integers(-(2**63), 2**63 - 1),
        pa.uint64(): st.integers(0, 2**64 - 1),
        pa.float64(): st.floats(),
        pa.string(): texts,
        pa.bool_(): st.booleans(),
        pa.binary(): st.binary(max_size=3),
        pa.list_(pa.float64()): st.lists(st.floats(), max_size=2),
        pa.decimal128(38, 2): st.decimals(-1e30, 1e30, places=2),
        pa.struct([("k", pa.int64())]): st.fixed_dictionaries({"k": st.integers(0, 9)}),
    }
    count = data.draw(st.integers(1, 4), "rows")
    columns = {"_id": pa.array([f"p{i}" for i in range(count)]), "text": pa.array(["text"] * count)}
    for name in data.draw(st.lists(st.sampled_from(FIELDS), max_size=3, unique=True), "columns"):
        kind = data.draw(st.sampled_from(list(types)), "type")
        column = data.draw(st.lists(types[kind] | st.none(), min_size=count, max_size=count), "column")
        columns[name] = pa.array(column, kind)
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return corpus_file(ground.folder / "corpus.parquet", data, ground, file.getvalue())


ids = st.text(st.characters(exclude_categories=["Cs", "Cc", "Cf", "Z"]), min_size=1, max_size=6)


def qrels(data: st.DataObject, ground: Ground) -> bool:
    """Judgements in the formats of BEIR (with and without header) and TREC."""
    judged = data.draw(st.dictionaries(st.tuples(ids, ids), st.integers(-1, 3), min_size=1, max_size=5), "judged")
    form = data.draw(st.sampled_from(["{0}\t{1}\t{2}", "{0} 0 {1} {2}", "{0}\t{1}\t{2}.0"]), "form")
    lines = [form.format(query, document, grade) for (query, document), grade in judged.items()]
    if "\t" in form and data.draw(st.booleans(), "header"):
        lines.insert(0, "query-id\tcorpus-id\tscore")
    path, content = ground.folder / "qrels.tsv", "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(data.draw(damage(content), "content"))
    try:
        read = read_qrels(path)
    except DataError as error:
        assert path.read_bytes() != content, f"valid judgements are refused: {error}"
        refused_here(error, path)
        return False
    if path.read_bytes() == content:
        assert {(q, d): grade for q, row in read.items() for d, grade in row.items()} == judged
    return True


def runs(data: st.DataObject, ground: Ground) -> bool:
    """TREC run files."""
    ranked = data.draw(
        st.dictionaries(
            ids, st.dictionaries(ids, st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=4),
            min_size=1, max_size=3,
        ), "run",
    )  # fmt: skip
    known = RetrievalData(
        {id_: Document(id_, "text") for row in ranked.values() for id_ in row},
        dict.fromkeys(ranked, "query"),
        {query: dict.fromkeys(row, 1) for query, row in ranked.items()},
    )
    path = ground.folder / "one.run"
    content = "".join(f"{q} Q0 {d} 1 {score} tag\n" for q, row in ranked.items() for d, score in row.items()).encode()
    path.write_bytes(data.draw(damage(content), "content"))
    try:
        read = read_run(path, known)
    except DataError as error:
        assert path.read_bytes() != content, f"a valid run is refused: {error}"
        refused_here(error, path)
        return False
    if path.read_bytes() == content:
        assert read == ranked
    return True


def pairs(data: st.DataObject, ground: Ground) -> bool:
    """Judged pairs of texts."""
    odd = st.fixed_dictionaries(
        {"text_a": texts | values, "text_b": texts | values}, optional={"score": values, "label": values}
    )
    valid = st.fixed_dictionaries(
        {"text_a": st.just("a"), "text_b": st.just("b"), "score": st.integers(0, 5) | st.floats(-9, 9)}
    )
    drawn = data.draw(st.lists(valid, max_size=3) | st.lists(odd | valid, max_size=3), "pairs")
    path = ground.folder / "pairs.jsonl"
    path.write_bytes(data.draw(damage("".join(to_json(pair) + "\n" for pair in drawn).encode()), "content"))
    try:
        read = read_pairs(path)
    except DataError as error:
        refused_here(error, path)
        return False
    pairs_ = [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
    assert [pair.text_a for pair in read] == [pair["text_a"] for pair in pairs_]
    return True


def recipes(data: st.DataObject, ground: Ground) -> bool:
    """TOML with any key and values of every kind; accepted numbers are in range."""
    known = {"student": ["query_max_length", "document_max_length", "lora_rank", "feature_dim", "tuning", "pooling",
                         "product", "iem_inputs", "feature_bytes", "vectors", "vector_dim"],
             "data": ["negatives", "dev_queries", "dev_documents", "examples", "pairs_batch"],
             "teacher": ["batch_tokens", "calibration_queries", "max_length", "cache"],
             "recall": ["steps", "batch"],
             "distil": ["held_apart", "steps", "batch", "candidates", "negatives", "mining", "backbone", "eval_every"],
             "lr": ["backbone", "pooling", "iem", "scale"],
             "loss": ["recall", "temperature", "pairs", "preset"]}  # fmt: skip
    plain = [entry.name for entry in dataclasses.fields(Recipe) if entry.name not in known] + list(OLD_KEYS)
    every = plain + [f"{table}.{name}" for table, names in known.items() for name in names] + ["nonsense", "data.x.y"]
    numbers = st.sampled_from(["1", "2", "8", "64"]) | st.sampled_from(
        ["0", "-1", "nan", "inf", "-inf", "1e-5", "1e400", "9" * 30, "0.5", "true"]
    )
    texts_ = st.sampled_from(['"frozen"', '"lora"', '"auto"', '""', '"paper"', '"a\\u0000b"', "[]", "[1]", "{x = 1}"])
    chosen = data.draw(st.dictionaries(st.sampled_from(every), numbers | texts_, max_size=4), "keys")
    start = ['student.backbone = "minilm"', 'data.folder = "beir"']
    content = "\n".join(start + [f"{key} = {value}" for key, value in chosen.items()]).encode()
    path = ground.folder / "recipe.toml"
    path.write_bytes(data.draw(damage(content), "content"))
    try:
        with warnings.catch_warnings(action="ignore", category=RenamedWarning):  # for the keys of the last release
            recipe = read_recipe(path)
    except DataError as error:
        refused_here(error, path)
        return False
    for name, value in numbers_of(asdict(recipe)):
        assert np.isfinite(value), f"{name} is {value}"
        positive = r"every|(?<!in_)batch$|max_length|dev_queries|^lr\.|temperature"
        assert value > 0 or not re.search(positive, name), (name, value)
    return True


def numbers_of(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield all numbers of a nested mapping, with their keys."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from numbers_of(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + name, value


def changed_json(data: st.DataObject, content: Any) -> bytes:
    """JSON in which one value is replaced or missing, or bytes are damaged."""
    content = json.loads(json.dumps(content))
    place = content
    while isinstance(place, dict) and place:
        key = data.draw(st.sampled_from(sorted(place)), "key")
        if isinstance(place[key], dict) and place[key] and data.draw(st.booleans(), "deeper"):
            place = place[key]
        elif data.draw(st.booleans(), "drop"):
            del place[key]
            break
        else:
            place[key] = data.draw(values, "value")
            break
    return data.draw(damage(to_json(content).encode()), "content")


def model_folders(data: st.DataObject, ground: Ground) -> bool:
    """A model folder whose `d2llm.json` or tokenizer was changed."""
    folder = ground.folder / "model"
    if not folder.exists():
        shutil.copytree(ground.model, folder, copy_function=os.link)
    for name in (CONFIG, TOKENIZER):  # never write through the link, which would change the given model
        (folder / name).unlink(missing_ok=True)
    shutil.copy(ground.model / TOKENIZER, folder)
    (folder / CONFIG).write_bytes(changed_json(data, asdict(ground.config)))
    if damaged := data.draw(st.integers(0, 9), "damage the tokenizer") == 0:
        (folder / TOKENIZER).write_bytes(data.draw(damage((ground.model / TOKENIZER).read_bytes()), "tokenizer"))
    try:
        config = read_config(folder)
        if damaged or config == ground.config:
            d2llm.load(folder)
    except (ModelError, ArgumentError) as error:
        refused_here(error, folder)
        return False
    return True


def student_folders(data: st.DataObject, ground: Ground) -> bool:
    """A student folder with one of its small files changed."""
    assert ground.student is not None
    folder = ground.folder / "student"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ground.student, folder)
    name = data.draw(st.sampled_from(["student.json", "heads.safetensors", TOKENIZER]), "file")
    content = (folder / name).read_bytes()
    changed = changed_json(data, json.loads(content)) if name == "student.json" else data.draw(damage(content), "bytes")
    (folder / name).write_bytes(changed)
    try:
        Student.load(folder)
    except ModelError as error:
        assert folder.name in str(error) or "backbone" in str(error), error
        return False
    return True


def filters(data: st.DataObject, ground: Ground) -> bool:
    """Filters, which must mean the same in the flat index and in Qdrant."""
    number = st.sampled_from([0, 1, -1, 2.5, 2**53, 2**53 + 1, 2**63 - 1, -(2**63), 2**63, 1e300, float("nan"),
                              float("inf"), 10**400, True])  # fmt: skip
    value: st.SearchStrategy[Any] = st.sampled_from(
        ["a", "1", "", 0, 1, True, False, 1.0, 2.5, None, 2**53 + 1, 2**63 - 1, -(2**63), 2**63, "名", "\0", "\ud800",
         b"a", {}]
    )  # fmt: skip
    bounds = st.dictionaries(st.sampled_from(["gt", "gte", "lt", "lte", "eq", ""]), number | value, max_size=2)
    condition = value | st.lists(value, max_size=3) | bounds | number
    drawn = data.draw(st.dictionaries(st.sampled_from(FIELDS) | texts, condition, max_size=2), "filter")
    results: list[Any] = []
    for index in ground.filtered:
        try:
            results.append(index.count(drawn))
        except ArgumentError as error:
            assert str(error), drawn
            results.append("refused")
    addressable = not re.search(r'["\\]', "".join(drawn))  # Qdrant cannot address other names
    assert results[1] == (results[0] if addressable else "refused"), f"flat: {results[0]}, Qdrant: {results[1]}"
    return bool(results[1] != "refused")


def document_ids(data: st.DataObject, ground: Ground) -> bool:
    """Ids of documents: a document is stored under its id, and under no other."""
    id_ = data.draw(texts | half_surrogates | st.text(max_size=400), "id")
    other = data.draw(texts.filter(lambda text: text != id_), "other id")
    try:
        ground.store([Document(id_, "text")])
    except DataError:
        assert id_ not in ground.index.get([id_]) if id_.isprintable() else True
        return False
    ground.index.delete([other])
    ground.stored.pop(other, None)
    assert list(ground.index.get([id_])) == [id_]
    return True


def collection_names(data: st.DataObject, ground: Ground) -> bool:
    """Names of collections: the collection is made under its name in the folder and nowhere else, or refused."""
    name = data.draw(texts | st.text("abcXYZ019_-./\\~$ é", max_size=8) | st.integers(1, 300).map("n".__mul__), "name")
    place = ground.folder / "names"
    before = sorted(ground.folder.iterdir())
    try:
        with QdrantIndex(name, place) as index:
            index.open_for(ground.config)
            assert Qdrant(place).collections()[0] == [name]
            index.drop()
    except D2LLMError:
        assert not place.exists() or not list(place.glob("[!.]*")), "something is left"
        return False
    finally:
        shutil.rmtree(place, ignore_errors=True)
        assert sorted(ground.folder.iterdir()) == before, "something is left beside the folder"
    return True


def locations(data: st.DataObject, ground: Ground) -> bool:
    """Folders and addresses. No address is called: this checks only which are accepted."""
    scheme = data.draw(st.sampled_from(["", "http://", "https://", "ftp://", "://"]), "scheme")
    host = data.draw(st.sampled_from(["localhost", "127.0.0.1", "[::1]", "[::1", "user:secret@localhost", "", "a b"]))
    port = data.draw(st.sampled_from(["", ":6333", ":0", ":65535", ":65536", ":-1", ":x", ":", ":6333/path", ":٣"]))
    location = scheme + data.draw(st.sampled_from([host + port]) | texts, "rest")
    inside = ground.folder / "place"
    inside.mkdir()
    try:
        with working_in(inside):
            qdrant = Qdrant(location)
            if not qdrant.shared:
                qdrant.collections()
    except D2LLMError as error:
        assert "secret" not in str(error), error
        return False
    finally:
        shutil.rmtree(inside)
    return True


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Make paths relative to `folder` within the block."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def command_lines(data: st.DataObject, ground: Ground) -> bool:
    """Options of `d2llm search`, with values of every kind: exit status 0, 1 or 2, and never a traceback."""
    odd = st.sampled_from(["0", "-1", "1", "10", "nan", "inf", "1e400", "9" * 30, "", "a", "\udcff", "{", '{"a": NaN}'])
    filter_ = st.sampled_from(
        ["a=1", "=", "a", '{"a": 1e400}', '{"": 1}', "{}", '{"a": {"gte": null}}', "a=" + "[" * 2000]
    )
    options = {"--k": odd, "--candidates": odd, "--hnsw-ef": odd, "--filter": odd | filter_, "--timeout": odd,
               "--grpc-port": odd, "--bm25-weight": odd, "--collection": odd, "--threads": odd,
               "--fusion": odd, "--task": odd}  # fmt: skip
    chosen = data.draw(st.fixed_dictionaries({}, optional=options), "options")
    arguments = ["search", str(ground.model), "--qdrant", str(ground.folder / "no")]
    arguments += [part for name, value in ({"--collection": "kb"} | chosen).items() for part in (name, value)]
    arguments += ["--", data.draw(texts | odd, "query")]
    result = CliRunner().invoke(main, arguments)
    ended = result.exception is None or isinstance(result.exception, SystemExit)
    assert ended, "".join(traceback.format_exception(result.exception))
    assert result.exit_code in (1, 2), (result.exit_code, result.output)  # the collection does not exist
    assert "Traceback" not in result.output
    return result.exit_code == 1


KINDS: dict[str, Check] = {
    "JSON lines": jsonl,
    "CSV": csv_,
    "TSV": tsv,
    "Parquet": parquet,
    "judgements": qrels,
    "runs": runs,
    "pairs": pairs,
    "recipes": recipes,
    "model folders": model_folders,
    "student folders": student_folders,
    "filters": filters,
    "ids": document_ids,
    "collection names": collection_names,
    "locations": locations,
    "command lines": command_lines,
}


@dataclass
class Outcome:
    """The numbers of accepted and refused inputs of one kind, and the smallest failing input with its traceback."""

    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    failure: str = ""


def fuzz(kind: str, inputs: int, model: Path, student: Path | None = None, seed: int | None = None) -> Outcome:
    """Try `inputs` inputs of one kind. Hypothesis shrinks the first failing input. Without `seed` the inputs are always
    the same."""
    outcome, check = Outcome(), KINDS[kind]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        ground = Ground(Path(folder), model, student)

        @settings(max_examples=inputs, deadline=None, database=None, derandomize=seed is None,
                  report_multiple_bugs=False, print_blob=False, suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(st.data())
        def attempt(data: st.DataObject) -> None:
            if check(data, ground):
                outcome.accepted += 1
            else:
                outcome.refused += 1

        try:
            (attempt if seed is None else hypothesis.seed(seed)(attempt))()
            ground.close()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # any error is a failure; a panic of the engine is not an Exception
            outcome.failure = "".join(traceback.format_exception(error))
    outcome.seconds = time.perf_counter() - start
    return outcome


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option("--student", type=click.Path(path_type=Path, exists=True), help="For the kind student folders.")
@click.option("--inputs", default=1000, show_default=True, help="Inputs of each kind.")
@click.option("--kind", "kinds", multiple=True, type=click.Choice(list(KINDS)), help="Try only this kind. Repeatable.")
@click.option("--seed", type=int, help="Draw other inputs. [default: the same inputs each time]")
def fuzz_command(model: Path, student: Path | None, inputs: int, kinds: tuple[str, ...], seed: int | None) -> None:
    """Try odd and damaged inputs of every kind on MODEL and on an embedded collection."""
    outcomes: dict[str, Outcome] = {}
    for kind in kinds or KINDS:
        if kind == "student folders" and student is None:
            continue
        outcomes[kind] = fuzz(kind, inputs, model, student, seed)
        if outcomes[kind].failure:
            click.echo(f"--- {kind} ---\n{outcomes[kind].failure}")
    echo_table(
        [
            [kind, str(row.accepted), str(row.refused), f"{row.seconds:.1f}", "FAILED" if row.failure else "ok"]
            for kind, row in outcomes.items()
        ],
        header=["kind", "accepted", "refused", "seconds", ""],
    )
    click.echo(json.dumps({kind: asdict(outcome) for kind, outcome in outcomes.items()}))
    sys.exit(any(outcome.failure for outcome in outcomes.values()))


if __name__ == "__main__":
    fuzz_command()
