"""Indexing as a job: what it reads, what it leaves alone, how it ends, and what a second run makes of it."""

import csv
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import SHORT
from qdrant_server import QdrantServer

from d2llm.cli import main
from d2llm.connectors import Qdrant, QdrantIndex
from d2llm.connectors.distributed import add_on_ray
from d2llm.connectors.engine import StoredPoint
from d2llm.connectors.points import point_id
from d2llm.corpus import read_documents
from d2llm.errors import ArgumentError, DataError, StoreError
from d2llm.export import export
from d2llm.flat import FlatIndex
from d2llm.model import Model, load
from d2llm.pipeline import mapped, prefetched
from d2llm.student import Student
from d2llm.types import Document

ROWS: list[dict[str, Any]] = [
    {"_id": "join", "text": "Join one or more path segments.", "module": "os", "year": 2001},
    {"_id": "sleep", "text": "Suspend execution for some seconds.", "module": "time", "year": 2005},
    {"_id": "median", "title": "median", "text": "The median of numeric data.", "module": "statistics", "year": 2014},
]


def d2llm(*arguments: str | Path, input: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=input)


def json_of(*arguments: str | Path, input: str | None = None) -> dict[str, Any]:
    done = d2llm(*arguments, "--json", input=input)
    assert done.exit_code == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def lines(rows: list[Any]) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text(lines(rows))
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write(tmp_path / "corpus.jsonl", ROWS)


@pytest.fixture
def qdrant(tmp_path: Path) -> tuple[str, str]:
    return "--qdrant", str(tmp_path / "qdrant")


def stored(qdrant: tuple[str, str], name: str = "kb") -> dict[str, dict[str, Any]]:
    with QdrantIndex(name, qdrant[1]) as index:
        found: dict[str, dict[str, Any]] = index.get(list(index.ids()))
    return found


# ---- stages that overlap ----


def test_prefetched_gives_everything_in_order() -> None:
    assert list(prefetched(range(100), depth=3)) == list(range(100))
    assert list(prefetched([])) == []


def test_prefetched_works_ahead_but_not_further_than_it_should() -> None:
    drawn: list[int] = []
    allowed = threading.Semaphore(0)

    def items() -> Iterator[int]:
        for item in range(10):
            allowed.acquire(timeout=10)
            drawn.append(item)
            yield item

    allowed.release(10)
    stage = prefetched(items(), depth=2)
    assert next(stage) == 0
    deadline = time.monotonic() + 10
    while len(drawn) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert drawn == [0, 1, 2], "one was taken, two more are ready, and that is all"
    stage.close()


def test_prefetched_raises_what_its_source_raises_after_what_came_before() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise DataError("line 2 is bad")

    found = []
    with pytest.raises(DataError, match="line 2 is bad"):
        for item in prefetched(items()):
            found.append(item)
    assert found == [1]


@pytest.mark.parametrize("threads", [1, 2])
def test_mapped_gives_results_in_order_up_to_the_error_of_an_item(threads: int) -> None:
    def reciprocal(item: int) -> float:
        time.sleep(0.002 * (item % 2))  # the next item is ready first
        return 1 / (5 - item)

    found = []
    with pytest.raises(ZeroDivisionError):
        for result in mapped(reciprocal, range(100), threads):
            found.append(result)
    assert found == [1 / 5, 1 / 4, 1 / 3, 1 / 2, 1]


def test_mapped_computes_on_all_its_threads_at_a_time() -> None:
    both = threading.Barrier(2, timeout=10)
    assert len(set(mapped(lambda _: both.wait(), range(2), 2))) == 2


def test_prefetched_closed_early_leaves_no_thread() -> None:
    before = threading.active_count()
    stage = prefetched(iter(range(1000)))
    next(stage)
    stage.close()
    assert threading.active_count() == before


def test_prefetched_interrupted_while_it_waits_still_knows_that_its_thread_works() -> None:
    """Python waits at exit for threads that it knows to work; one that goes on unnoticed crashes the process."""
    working, allowed = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        yield 0
        working.set()
        allowed.wait(60)

    stage = prefetched(items(), depth=1)
    assert next(stage) == 0 and working.wait(60)
    before = set(threading.enumerate())
    interrupt = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        stage.close()
    (thread,) = [one for one in before if one.name.startswith("d2llm-stage")]
    assert thread.is_alive()
    allowed.set()
    thread.join(60)
    assert not thread.is_alive()


# ---- what is read ----


def test_every_format_gives_the_same_collection(model_folder: Path, tmp_path: Path, qdrant: tuple[str, str]) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    text_rows = [{key: str(value) for key, value in row.items()} for row in ROWS]  # a CSV knows only text
    table = io.StringIO()
    writer = csv.DictWriter(table, ["_id", "title", "text", "module", "year"])
    writer.writeheader()
    writer.writerows(text_rows)
    (tmp_path / "corpus.csv").write_text(table.getvalue())
    columns = {key: [row.get(key) for row in text_rows] for key in writer.fieldnames}
    parquet.write_table(arrow.table(columns), tmp_path / "corpus.parquet")
    write(tmp_path / "corpus.jsonl", text_rows)
    for ending in ("jsonl", "csv", "parquet"):
        done = json_of("index", model_folder, tmp_path / f"corpus.{ending}", *qdrant, "--collection", ending)
        assert done["added"] == done["stored"] == 3
    assert stored(qdrant, "csv") == stored(qdrant, "jsonl") == stored(qdrant, "parquet")


VALUES: dict[str, tuple[str, str, list[Any], str]] = {
    "csv": ("year", "integer", ["2001", "", "2005"], "document '0' has '2001' there"),
    "tsv": ("year", "float", ["2001", "", "2005"], "document '0' has '2001' there"),
    "jsonl": ("year", "integer", [None, "2001", 2.5, True, ["2001"]], "document '1' has '2001' there"),
    "parquet": ("lang", "keyword", [7, 8], "document '0' has 7 there"),
}


@pytest.mark.parametrize("suffix", VALUES)
def test_a_payload_index_that_would_hold_nothing_is_refused(
    suffix: str, model_folder: Path, qdrant: tuple[str, str], tmp_path: Path
) -> None:
    name, kind, values, message = VALUES[suffix]
    rows = [{"_id": str(number), "text": "x", name: value} for number, value in enumerate(values)]
    corpus = tmp_path / f"docs.{suffix}"
    if suffix == "jsonl":
        write(corpus, rows)
    elif suffix == "parquet":
        pytest.importorskip("pyarrow.parquet").write_table(
            pytest.importorskip("pyarrow").Table.from_pylist(rows), corpus
        )
    else:
        between = "," if suffix == "csv" else "\t"
        table = [[*rows[0]], *([str(cell) for cell in row.values()] for row in rows)]
        corpus.write_text("".join(between.join(cells) + "\n" for cells in table))
    job: list[str | Path] = ["index", model_folder, corpus, *qdrant, "--collection", "kb"]
    refused = d2llm(*job, "--payload-index", f"{name}={kind}")
    assert refused.exit_code == 1
    assert f"--payload-index {name}={kind} would index nothing: {message}" in refused.stderr
    assert not Path(qdrant[1]).exists(), "said before a collection is made"
    write(tmp_path / "more.jsonl", [*rows, {"_id": "fits", "text": "x", name: ["a"] if kind == "keyword" else [7]}])
    fields = ("--payload-index", f"{name}={kind}", "--payload-index", "absent=integer")
    assert json_of(*job[:2], tmp_path / "more.jsonl", *job[3:], *fields)["added"] == len(rows) + 1


def test_a_payload_index_made_later_is_refused_too_if_it_would_hold_nothing(
    model_folder: Path, corpus: Path, qdrant: tuple[str, str]
) -> None:
    """It would replace one that filters need."""
    json_of("index", model_folder, corpus, *qdrant, "--collection", "kb", "--payload-index", "year=integer")
    refused = d2llm("collection", "index-payload", "kb", "module=keyword", "year=keyword", *qdrant)
    assert refused.exit_code == 1 and "Error: year=keyword would index nothing: document '" in refused.stderr
    assert json_of("collection", "info", "kb", *qdrant)["payload_indexes"] == {"year": "integer"}, "nothing is made"
    done = d2llm("collection", "index-payload", "kb", "year=float", "absent=bool", *qdrant)
    assert done.exit_code == 0 and "Indexed: year, absent." in done.stdout
    assert json_of("collection", "info", "kb", *qdrant)["payload_indexes"] == {"year": "float", "absent": "integer"}


@pytest.mark.parametrize(
    "content", ["", " \n\n", '{"_id": "x", "text": ""}\n'], ids=["nothing", "blank", "empty documents"]
)
@pytest.mark.parametrize(
    "job",
    [("--collection", "kb", "--prune"), ("--alias", "live"), ("--collection", "new")],
    ids=["prune", "alias", "new"],
)
def test_a_stream_without_documents_changes_nothing(
    job: tuple[str, ...], content: str, model_folder: Path, corpus: Path, qdrant: tuple[str, str]
) -> None:
    json_of("index", model_folder, corpus, *qdrant, "--collection", "kb")
    json_of("index", model_folder, corpus, *qdrant, "--alias", "live")
    before = [json_of("collection", "info", *name, *qdrant) for name in ((), ("kb",), ("live",))]
    skip = () if "--prune" in job else ("--on-error", "skip")
    refused = d2llm("index", model_folder, "-", *qdrant, *job, *skip, input=content)
    assert refused.exit_code == 1, refused.output
    assert "stdin: no documents" in refused.stderr or "stdin:1: document 'x' is empty" in refused.stderr
    assert [json_of("collection", "info", *name, *qdrant) for name in ((), ("kb",), ("live",))] == before


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Gives a pipe with this content, as the shell's `<(command)` does."""
    writers = list[threading.Thread]()

    def make(content: str) -> Path:
        path = tmp_path / f"pipe{len(writers)}"
        os.mkfifo(path)
        writers.append(threading.Thread(target=path.write_text, args=(content,)))
        writers[-1].start()
        return path

    yield make
    for writer in writers:
        writer.join(10)


def test_a_pipe_is_read_once(
    fifo: Callable[[str], Path], model_folder: Path, qdrant: tuple[str, str], tmp_path: Path
) -> None:
    arguments: list[str | Path] = ["--collection", "kb", *qdrant]
    assert json_of("index", model_folder, fifo(lines(ROWS)), *arguments)["added"] == 3
    refused = d2llm("index", model_folder, fifo(""), *arguments, "--prune")
    assert refused.exit_code == 1 and "pipe1: no documents" in refused.stderr
    rejects = tmp_path / "rejects.jsonl"
    skipped = json_of("index", model_folder, fifo(lines(["{", *ROWS])), *arguments, "--rejects", rejects)
    assert (skipped["unchanged"], skipped["skipped"]) == (3, 1)
    assert len(rejects.read_text().splitlines()) == 1


def test_a_stream_is_read_from_stdin(model_folder: Path, qdrant: tuple[str, str]) -> None:
    arguments: list[str | Path] = ["index", model_folder, "-", *qdrant, "--collection", "kb"]
    assert json_of(*arguments, input=lines(ROWS))["added"] == 3
    assert json_of(*arguments, input=lines(ROWS[:2]))["unchanged"] == 2
    refused = d2llm(*arguments, input=lines([*ROWS, "{"]))
    assert refused.exit_code == 1 and "stdin:4: not valid JSON" in refused.stderr
    pruned = json_of(*arguments, "--prune", input=lines(ROWS[:2]))
    assert (pruned["pruned"], pruned["stored"]) == (1, 2)
    refused = d2llm(*arguments, "--prune", "--on-error", "skip", input=lines(ROWS))
    assert refused.exit_code == 2 and "--prune needs every row of a stream" in refused.stderr


def test_bad_rows_go_to_a_file_with_their_reasons(model_folder: Path, tmp_path: Path, qdrant: tuple[str, str]) -> None:
    bad = write(tmp_path / "corpus.jsonl", [ROWS[0], "{", {"_id": "x", "text": ""}, ROWS[1], {"_id": "n", "text": 5},
                                            '{"_id": "nan", "text": "x", "price": NaN}'])  # fmt: skip
    rejects = tmp_path / "rejects.jsonl"
    for source in (bad, "-"):
        done = json_of(
            "index", model_folder, source, *qdrant, "--collection", "kb", "--rejects", rejects, input=bad.read_text()
        )
        assert (done["skipped"], done["stored"]) == (4, 2)
        found = [json.loads(line) for line in rejects.read_text().splitlines()]
        assert [row["where"].rpartition(":")[2] for row in found] == ["2", "3", "5", "6"]
        assert [row["row"] for row in found][:2] == ["{", {"_id": "x", "text": ""}]
        assert "NaN is not a JSON number" in found[3]["reason"]


NEVER_STORED = {
    "number too large": '{"_id": "bad", "text": "x", "n": 1e400}',
    "integer too large": '{"_id": "bad", "text": "x", "n": 18446744073709551616}',
    "nested too deep": '{"_id": "bad", "text": "x", "n": ' + "[" * 130 + "]" * 130 + "}",
}


@pytest.mark.parametrize("row", NEVER_STORED.values(), ids=NEVER_STORED)
def test_what_the_index_cannot_store_is_refused_before_anything_is_made(
    row: str, model_folder: Path, tmp_path: Path, qdrant: tuple[str, str]
) -> None:
    bad = write(tmp_path / "corpus.jsonl", [*ROWS, row])
    arguments: list[str | Path] = ["index", model_folder, bad, *qdrant, "--alias", "kb"]
    refused = d2llm(*arguments)
    assert refused.exit_code == 1 and f"{bad}:4: document 'bad': field 'n': " in refused.stderr
    assert not Path(qdrant[1]).exists()
    done = json_of(*arguments, "--on-error", "skip")
    assert (done["added"], done["skipped"], done["stored"]) == (3, 1, 3)
    assert sorted(stored(qdrant)) == ["join", "median", "sleep"]


# ---- what is left alone, replaced and removed ----


def test_a_second_run_encodes_what_has_changed_and_prunes_what_has_vanished(
    model_folder: Path, corpus: Path, tmp_path: Path, qdrant: tuple[str, str]
) -> None:
    arguments: list[str | Path] = ["index", model_folder, corpus, *qdrant, "--collection", "kb"]
    json_of(*arguments)
    write(corpus, [ROWS[0], {**ROWS[1], "year": 2006}, {"_id": "new", "text": "A new one."}])
    kept = json_of(*arguments)
    assert (kept["added"], kept["unchanged"], kept["pruned"], kept["stored"]) == (2, 1, 0, 4)
    pruned = json_of(*arguments, "--prune")
    assert (pruned["added"], pruned["unchanged"], pruned["pruned"], pruned["stored"]) == (0, 3, 1, 3)
    found = stored(qdrant)
    assert sorted(found) == ["join", "new", "sleep"] and found["sleep"]["year"] == 2006


def test_the_last_of_two_documents_with_one_id_stays(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2llm.indexing.BATCH", 2)
    index = FlatIndex()
    index.add(model, [Document("x", "now")])
    fillers = [Document(str(number), f"number {number}") for number in range(3)]
    index.add(model, [Document("x", "once"), *fillers, Document("x", "now")])
    assert index.get(["x"])["x"]["text"] == "now"


def test_prune_removes_nothing_because_of_a_row_that_cannot_be_read(
    model_folder: Path, corpus: Path, qdrant: tuple[str, str]
) -> None:
    arguments: list[str | Path] = ["index", model_folder, corpus, *qdrant, "--collection", "kb"]
    json_of(*arguments)
    write(corpus, [ROWS[0], '{"_id": "sleep", "text": '])
    refused = d2llm(*arguments, "--prune", "--on-error", "skip")
    assert refused.exit_code == 1 and "1 bad rows of" in refused.stderr and "--prune would remove" in refused.stderr
    assert len(stored(qdrant)) == 3


def test_prune_keeps_the_document_of_a_bad_row_that_states_its_id(
    model_folder: Path, corpus: Path, qdrant: tuple[str, str]
) -> None:
    arguments: list[str | Path] = ["index", model_folder, corpus, *qdrant, "--collection", "kb"]
    json_of(*arguments)
    write(corpus, [ROWS[0], {"_id": "sleep", "text": " "}])
    report = json_of(*arguments, "--prune", "--on-error", "skip")
    assert (report["unchanged"], report["skipped"], report["pruned"]) == (1, 1, 1)
    assert sorted(stored(qdrant)) == sorted([ROWS[0]["_id"], "sleep"])


def test_a_row_that_becomes_bad_while_the_job_runs_is_told_and_not_pruned(
    model_folder: Path, corpus: Path, qdrant: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: list[str | Path] = ["index", model_folder, corpus, *qdrant, "--collection", "kb", "--on-error", "skip"]
    write(corpus, ["{", *ROWS])
    json_of(*arguments)

    def load_after_a_change(*given: Any, **options: Any) -> Model:
        """The model is loaded between the check of the corpus and the job."""
        write(corpus, ["{", *ROWS[:2], '{"_id": "sleep", "text": '])
        return load(*given, **options)

    monkeypatch.setattr("d2llm.connectors.cli.load", load_after_a_change)
    told = d2llm(*arguments, "--json")
    assert told.exit_code == 0 and json.loads(told.stdout)["skipped"] == 2
    assert told.stderr.count(f"skipped {corpus}:1: ") == told.stderr.count(f"skipped {corpus}:4: ") == 1
    write(corpus, ROWS)
    refused = d2llm(*arguments, "--prune")
    assert refused.exit_code == 1 and f"{corpus}:1: not valid JSON" in refused.stderr
    assert "the corpus changed while this command read it, and --prune would remove its document" in refused.stderr
    assert len(stored(qdrant)) == 3


def test_pruning_to_nothing_is_refused(model: Model) -> None:
    index = FlatIndex()
    index.add(model, ROWS)
    with pytest.raises(DataError, match="pruning would empty the index"):
        index.add(model, [], prune=True)
    with pytest.raises(DataError, match="pruning would empty the index"):
        index.prune([])
    with pytest.raises(TypeError, match="a list of ids, found a single string"):
        index.add(model, ROWS[:1], prune=True, keep="sleep")
    assert index.prune(["join", "elsewhere"]) == 2
    assert list(index.ids()) == ["join"]


# ---- a collection beside the one that is searched ----


def test_an_alias_moves_when_all_is_there(model_folder: Path, corpus: Path, qdrant: tuple[str, str]) -> None:
    arguments: list[str | Path] = ["index", model_folder, corpus, *qdrant, "--alias", "kb"]
    first = json_of(*arguments)
    assert (first["collection"], first["alias"], first["dropped"]) == ("kb-1", "kb", None)
    write(corpus, ROWS[:2])
    second = json_of(*arguments, "--hybrid")
    assert (second["collection"], second["dropped"], second["stored"]) == ("kb-2", "kb-1", 2)
    with QdrantIndex("kb", qdrant[1]) as index:
        assert Qdrant(qdrant[1]).collections() == (["kb-2"], {"kb": "kb-2"})
        words = index.info().metadata.options.bm25
    assert words is not None and 2 < words.average_words < 5, "measured on this corpus"
    found = json_of("search", model_folder, "seconds", *qdrant, "--collection", "kb", "--hybrid", "--fusion", "dbsf")
    assert {hit["id"] for hit in found["hits"]} == {"join", "sleep"}
    third = d2llm(*arguments, "--quantization", "none")
    assert "kb is now kb-3; kb-2 is dropped." in third.stdout
    assert "--collection kb --hybrid" in third.stdout, "what is not typed is as it was"
    made = json_of("collection", "info", "kb", *qdrant)["metadata"]
    assert made["options"]["quantization"] == "none" and made["generation"] == {"alias": "kb", "job": None}
    assert d2llm(*arguments, "--no-hybrid").exit_code == 0
    assert json_of("collection", "info", "kb", *qdrant)["metadata"]["options"]["bm25"] is None


def test_an_alias_leaves_the_collections_of_others_alone(
    model_folder: Path, corpus: Path, tmp_path: Path, qdrant: tuple[str, str]
) -> None:
    other = write(tmp_path / "other.jsonl", [{"_id": str(i), "text": f"Of another corpus, {i}."} for i in range(4)])
    json_of("index", model_folder, other, *qdrant, "--collection", "kb-1")
    json_of("index", model_folder, other, *qdrant, "--collection", "live")
    assert d2llm("collection", "alias", "live", "kb", *qdrant).exit_code == 0
    done = d2llm("index", model_folder, corpus, *qdrant, "--alias", "kb")
    assert "kb is now kb-2." in done.stdout, done.output
    for name in ("kb-1", "live"):
        assert json_of("collection", "info", name, *qdrant)["passages"] == 4
    assert "generation of" in d2llm("collection", "info", "kb", *qdrant).stdout
    assert sorted(stored(qdrant)) == sorted(row["_id"] for row in ROWS)


def test_an_interrupted_collection_is_gone_on_with(
    model_folder: Path, model: Model, corpus: Path, qdrant: tuple[str, str]
) -> None:
    arguments: list[str | Path] = ["index", model_folder, corpus, *qdrant, "--alias", "kb"]
    json_of(*arguments)
    with QdrantIndex("kb-2", qdrant[1], generation_of="kb") as killed:
        killed.add(model, [ROWS[0], {"_id": "gone", "text": "Of an earlier corpus."}])
    done = json_of(*arguments)
    assert (done["collection"], done["unchanged"], done["added"], done["pruned"]) == ("kb-2", 1, 2, 1)


def test_an_alias_needs_a_name_of_its_own(model_folder: Path, corpus: Path, qdrant: tuple[str, str]) -> None:
    json_of("index", model_folder, corpus, *qdrant, "--collection", "kb")
    refused = d2llm("index", model_folder, corpus, *qdrant, "--alias", "kb")
    assert refused.exit_code == 1 and "'kb' is a collection, so it cannot be an alias" in refused.stderr
    unnamed = d2llm("index", model_folder, corpus, *qdrant)
    assert unnamed.exit_code == 2 and "name either the collection (--collection), or an alias" in unnamed.stderr


def test_other_storage_than_the_collection_has_is_refused(
    model_folder: Path, corpus: Path, qdrant: tuple[str, str]
) -> None:
    arguments: list[str | Path] = ["index", model_folder, corpus, *qdrant, "--collection", "kb"]
    json_of(*arguments, "--quantization", "binary", "--hybrid", "--language", "german")
    for typed in ([], ["--quantization", "binary"], ["--hybrid"], ["--language", "german", "--hybrid"]):
        assert json_of(*arguments, *typed)["unchanged"] == 3, "only what is typed is compared"
    refused = d2llm(*arguments, "--quantization", "none")
    assert refused.exit_code == 1 and "quantization 'binary', not 'none'" in refused.stderr
    refused = d2llm(*arguments, "--no-hybrid")
    assert refused.exit_code == 1 and "with bm25 german, not none." in refused.stderr
    json_of("index", model_folder, corpus, *qdrant, "--collection", "plain")
    refused = d2llm("search", model_folder, "q", *qdrant, "--collection", "plain", "--hybrid")
    assert refused.exit_code == 1 and "has no BM25 vectors" in refused.stderr
    commands = re.findall(r"d2llm (.*? --hybrid)", refused.stderr)
    assert [shlex.split(command)[0] for command in commands] == ["collection", "index"]
    assert d2llm(*shlex.split(commands[0])).exit_code == 0, "it can be typed"
    assert json_of("search", model_folder, "q", *qdrant, "--collection", "plain-hybrid", "--hybrid")["hits"]
    refused = d2llm(*arguments, "--payload-index", "year=number")
    assert refused.exit_code == 2 and "TYPE one of keyword, integer, float, bool; found 'year=number'" in refused.stderr
    refused = d2llm(
        "index", model_folder, corpus, *qdrant, "--collection", "other", "--hybrid", "--language", "klingon"
    )
    assert refused.exit_code == 2 and "klingon" in refused.stderr
    assert not (Path(qdrant[1]) / "other").exists()


# ---- the commands of a collection ----


def test_a_collection_is_looked_at_copied_saved_and_removed(
    model_folder: Path, corpus: Path, tmp_path: Path, qdrant: tuple[str, str]
) -> None:
    json_of("index", model_folder, corpus, *qdrant, "--collection", "kb", "--payload-index", "year=integer")
    assert "kb\n" in d2llm("collection", "info", *qdrant).stdout
    shown = d2llm("collection", "info", "kb", *qdrant).stdout
    assert "year=integer" in shown and "ready" in shown and "384 x float32, in RAM: int8" in shown
    info = json_of("collection", "info", "kb", *qdrant)
    assert (info["passages"], info["status"], info["aliases"]) == (3, "ready", [])

    assert "docs is now kb." in d2llm("collection", "alias", "kb", "docs", *qdrant).stdout
    assert json_of("collection", "info", *qdrant) == {"collections": ["kb"], "aliases": {"docs": "kb"}}
    assert "Indexed: module." in d2llm("collection", "index-payload", "kb", "module=keyword", *qdrant).stdout

    copied = d2llm("collection", "migrate", "kb", *qdrant, "--to", tmp_path / "there", "--as", "copy", "--hybrid")
    assert copied.exit_code == 0 and "3 documents copied; copy at" in copied.stdout
    there = ("--qdrant", str(tmp_path / "there"))
    assert stored(there, "copy") == stored(qdrant)
    assert json_of("search", model_folder, "seconds", *there, "--collection", "copy", "--hybrid")["hits"]

    assert "MiB" in d2llm("collection", "snapshot", "kb", tmp_path / "kb.snapshot", *qdrant).stdout
    assert "back holds 3 documents" in d2llm("collection", "restore", "back", tmp_path / "kb.snapshot", *qdrant).stdout
    again = d2llm("collection", "snapshot", "kb", tmp_path / "kb.snapshot", *qdrant)
    assert again.exit_code == 2 and "exists already" in again.stderr

    gone = d2llm("collection", "delete", "kb", *qdrant, "--filter", '{"year": {"lt": 2004}}', "--yes")
    assert "1 documents removed, 2 are left." in gone.stdout
    gone = d2llm("collection", "delete", "kb", *qdrant, "--id", "sleep", "--id", "elsewhere")
    assert "1 documents removed, 1 are left." in gone.stdout
    assert d2llm("collection", "delete", "kb", *qdrant).exit_code == 2

    kept = CliRunner().invoke(main, ["collection", "drop", "kb", *qdrant], input="n\n")
    assert kept.exit_code == 1 and "Remove kb with 1 documents and its alias docs from" in kept.output
    with QdrantIndex("kb", qdrant[1]) as index:
        assert index.count() == 1
        locked = d2llm("collection", "drop", "kb", *qdrant)
        assert locked.exit_code == 1 and not locked.stdout and "in use by another process" in locked.stderr
    assert "kb is gone, and with it the alias docs." in d2llm("collection", "drop", "kb", *qdrant, "--yes").stdout
    assert json_of("collection", "info", *qdrant) == {"collections": ["back"], "aliases": {}}
    missing = d2llm("collection", "info", "kb", *qdrant)
    assert missing.exit_code == 1 and "no collection 'kb'" in missing.stderr
    assert "No collections at" in d2llm("collection", "info", "--qdrant", tmp_path / "nowhere").stdout


def test_a_collection_that_cannot_be_opened_is_named_and_can_be_dropped(
    model_folder: Path, corpus: Path, qdrant: tuple[str, str]
) -> None:
    """An earlier version stored what the engine then could not read."""
    for name in ("deep", "torn", "panics", "whole"):
        json_of("index", model_folder, corpus, *qdrant, "--collection", name)
    place = Path(qdrant[1])
    with QdrantIndex("deep", place) as index:
        value: Any = "x"
        for _ in range(124):
            value = [value]
        vector = [0.0] * index.info().metadata.embedding_dim
        with suppress(StoreError):
            index._engine.upsert([StoredPoint(point_id("x"), vector, {"deep": value})])
    (place / "torn" / "collection.json").write_text("{")
    for file in (place / "panics").rglob("vectors/status.dat"):
        file.write_bytes(b"")
    assert json_of("collection", "info", *qdrant)["collections"] == ["deep", "panics", "torn", "whole"]
    for name in ("deep", "torn", "panics"):
        shown = d2llm("collection", "info", name, *qdrant)
        assert shown.exit_code == 1 and shown.stderr.startswith(f"Error: {place / name}"), name
        assert f"(d2llm collection drop {name} --qdrant {place})" in shown.stderr
        asked = d2llm("collection", "drop", name, *qdrant, input="y\n")
        assert asked.exit_code == 0 and f"Remove {name} (it cannot be opened: " in asked.stdout, asked.stderr
    assert sorted(path.name for path in place.iterdir()) == [".whole.lock", "whole"]
    assert len(stored(qdrant, "whole")) == 3


def test_the_line_that_says_what_to_do_next_can_be_typed(
    model_folder: Path, corpus: Path, tmp_path: Path, server: QdrantServer
) -> None:
    places = [("--qdrant", str(tmp_path / "my qdrant")), ("--qdrant", server.url, "--grpc-port", "0"),
              ("--qdrant", server.url, "--grpc-port", str(server.grpc_port))]  # fmt: skip
    for place in places:
        shown = d2llm("index", model_folder, corpus, *place, "--collection", "kb").stdout
        (line,) = [line for line in shown.splitlines() if line.startswith("Next: ")]
        _, program, *typed = shlex.split(line)
        assert program == "d2llm" and tuple(typed[3 : 3 + len(place)]) == place
        assert len(json_of(*typed)["hits"]) == 3
    missing = d2llm("search", model_folder, "q", *places[0], "--collection", "missing").stderr
    assert "There are: kb." in missing and f"--qdrant '{tmp_path}/my qdrant' --collection missing" in missing


# ---- a server, and many encoders ----


@pytest.fixture
def server(tmp_path: Path) -> Iterator[QdrantServer]:
    with QdrantServer(tmp_path / "server", version="1.20.0") as server:
        yield server


def test_the_same_job_fills_a_server(model_folder: Path, corpus: Path, server: QdrantServer) -> None:
    place = ("--qdrant", server.url, "--grpc-port", str(server.grpc_port))
    done = json_of("index", model_folder, corpus, *place, "--alias", "kb", "--hybrid", "--shards", "2", "--replicas",
                   "1", "--write-consistency", "1", "--payload-index", "year=integer")  # fmt: skip
    assert (done["collection"], done["stored"]) == ("kb-1", 3)
    operations = [request.operation for request in server.requests]
    assert operations.index("create_payload_index") < operations.index("upsert"), "a graph built later knows of them"
    updates = [request.body.optimizers_config.indexing_threshold for request in server.requests
               if request.operation == "update_collection" and request.body.optimizers_config]  # fmt: skip
    assert updates == [0, 10_000], "deferred during the load, and restored"
    found = json_of("search", model_folder, "seconds", *place, "--collection", "kb", "--hybrid")
    assert len(found["hits"]) == 3


def test_what_is_secret_in_an_address_is_not_printed(
    model_folder: Path, corpus: Path, tmp_path: Path, server: QdrantServer
) -> None:
    address = server.url.replace("//", "//user:s3cret@")
    place = ("--qdrant", address, "--grpc-port", str(server.grpc_port))
    outputs = [
        d2llm(*command, *place)
        for command in (
            ("index", model_folder, corpus, "--collection", "kb"),
            ("collection", "info", "kb"),
            ("collection", "info", "kb", "--json"),
            ("collection", "info", "missing"),
            ("collection", "alias", "kb", "kb"),
            ("search", model_folder, "q", "--collection", "missing"),
        )
    ]
    outputs.append(d2llm("collection", "migrate", "kb", *place, "--to", address, "--to-grpc-port", "0", "--as", "copy"))
    outputs.append(CliRunner().invoke(main, ["collection", "drop", "kb", *place], input="n\n"))
    assert [output.exit_code for output in outputs] == [0, 0, 0, 1, 1, 1, 0, 1]
    for output in outputs:
        assert "127.0.0.1" in output.output and "s3cret" not in output.output


@pytest.mark.filterwarnings("ignore")  # Ray and its threads warn about themselves
def test_ray_gives_what_one_process_gives(
    model_folder: Path, model: Model, tmp_path: Path, server: QdrantServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    monkeypatch.setattr("d2llm.connectors.distributed.SHARE", 8)
    rows = [{"_id": f"d{i}", "text": f"passage number {i} on topic {i % 7}", "year": 2000 + i} for i in range(40)]
    corpus = write(tmp_path / "corpus.jsonl", [*rows[:20], "{", *rows[20:]])
    names = ("local", "ray")
    place = Qdrant(server.url, grpc_port=server.grpc_port)
    local, spread = (partial(place.index, name) for name in names)
    with local() as index:
        index.add(model, rows)
    with spread() as index:
        index.open_for(model.config)
        index.add(model, [{"_id": "vanished", "text": "Not in the corpus."}, rows[0]])
    options = {"num_cpus": 3, "include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    for again in (True, True, True, False):
        try:
            ray.init(**options)
            break
        except Exception:  # of several classes: a node that needs more than 30 s to start, on a busy machine
            ray.shutdown()
            if not again:
                raise
    try:
        report = add_on_ray(place, "ray", model_folder, corpus, lambda _: None, workers=2, threads=1, prune=True)
        with pytest.raises(DataError, match=r"corpus.jsonl:21: not valid JSON"):
            add_on_ray(place, "ray", model_folder, corpus, workers=1, threads=1)
    finally:
        ray.shutdown()
    assert (report.added, report.unchanged, report.pruned) == (39, 1, 1)
    with local() as one, spread() as many:
        assert many.get(list(many.ids())) == one.get(list(one.ids()))
        vector = model.encode_query(["topic 3"]).vectors[0]
        assert many.recall(vector, 40).ids == one.recall(vector, 40).ids


def test_ray_needs_a_server_and_a_file(model_folder: Path, model: Model, corpus: Path, qdrant: tuple[str, str],
                                       server: QdrantServer) -> None:  # fmt: skip
    pytest.importorskip("ray")
    refused = d2llm("index", model_folder, corpus, *qdrant, "--collection", "kb", "--engine", "ray")
    assert refused.exit_code == 2 and "--engine ray needs a Qdrant server" in refused.stderr
    place = Qdrant(server.url, grpc_port=server.grpc_port)
    place.index("kb").open_for(model.config)
    with pytest.raises(ArgumentError, match="give --engine ray a file"):
        add_on_ray(place, "kb", model_folder, Path("-"))
    refused = d2llm("index", model_folder, "-", *qdrant, "--collection", "kb", "--engine", "ray", input=lines(ROWS))
    assert refused.exit_code == 2 and "give --engine ray a file" in refused.stderr


# ---- killed ----


def test_a_killed_job_is_completed_by_the_next(model_folder: Path, tmp_path: Path, qdrant: tuple[str, str]) -> None:
    """benchmarks/kills.py does this many times, at random moments."""
    total = 3000
    rows = [{"_id": str(i), "text": f"passage number {i}"} for i in range(total)]
    corpus = write(tmp_path / "big.jsonl", rows)
    arguments = ["index", str(model_folder), str(corpus), *qdrant, "--collection", "kb"]
    process = subprocess.Popen([sys.executable, "-m", "d2llm", *arguments], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    shown = ""
    while f" 512/{total}" not in shown:
        character = process.stderr.read(1)
        assert character, shown
        shown += character
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    finished = json_of(*arguments)
    assert finished["stored"] == total and 0 < finished["unchanged"] < total
    assert finished["added"] == total - finished["unchanged"]
    expected = {document.id: {"text": document.text} for document in read_documents(corpus)}
    assert stored(qdrant) == expected


def test_an_embedded_collection_that_is_open_elsewhere_is_named(
    model_folder: Path, model: Model, corpus: Path, qdrant: tuple[str, str]
) -> None:
    with QdrantIndex("kb", qdrant[1]) as index:
        index.add(model, ROWS)
        refused = d2llm("index", model_folder, corpus, *qdrant, "--collection", "kb")
        assert refused.exit_code == 1 and "in use by another process" in refused.stderr
        with pytest.raises(StoreError, match="in use"):
            QdrantIndex("kb", qdrant[1]).count()


def test_two_processes_leave_each_others_collections_whole(
    make_student: Callable[..., Student], tiny_bert: Path, tmp_path: Path
) -> None:
    """A few rounds of what benchmarks/two_processes.py does many times."""
    make_student(tiny_bert, **SHORT).save(tmp_path / "student")
    export(tmp_path / "student", tmp_path / "model")
    benchmark = Path(__file__).parent.parent / "benchmarks" / "two_processes.py"
    command = [sys.executable, str(benchmark), str(tmp_path / "model"), "--rounds", "2", "--documents", "500"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["rounds"], told["lost"], told["tracebacks"], told["killed, and run again"]) == (2, 0, 0, 1)
