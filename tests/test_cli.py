"""The command line as people use it: the job, what it says about bad input, and what it leaves behind."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from d2llm.cli import export_main, main
from d2llm.cli_options import display_width, shorten
from d2llm.connectors import QdrantIndex
from d2llm.folder import read_config

DOCUMENTS = [
    {"_id": "join", "text": "Join one or more path segments intelligently.", "module": "os", "year": 2001},
    {"_id": "sleep", "text": "Suspend execution for the given number of seconds.", "module": "time", "year": 2005},
    {
        "_id": "median",
        "title": "median",
        "text": "Return the median of numeric data.",
        "module": "statistics",
        "year": 2014,
    },
    {"_id": "long", "text": "word " * 400, "module": "none", "year": 2020},
]


def d2llm(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def write(path: Path, lines: list[object]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write(tmp_path / "corpus.jsonl", list(DOCUMENTS))


@pytest.fixture
def place(tmp_path: Path) -> tuple[str, str, str, str]:
    return "--qdrant", str(tmp_path / "qdrant"), "--collection", "docs"


def test_a_corpus_is_indexed_and_searched(model_folder: Path, corpus: Path, place: tuple[str, ...]) -> None:
    indexed = d2llm("index", model_folder, corpus, *place)
    assert indexed.exit_code == 0, indexed.stderr
    assert (
        "4 documents: 4 stored, 0 unchanged, 0 skipped, 0 removed; 1 were longer than 128 tokens and split into"
        in indexed.stdout
    )
    assert f"Next: d2llm search {model_folder} 'your question'" in indexed.stdout
    again = json.loads(d2llm("index", model_folder, corpus, *place, "--json").stdout)
    names = {"collection": "docs", "alias": None, "dropped": None}
    report = {"added": 0, "unchanged": 4, "truncated": 0, "pruned": 0, "split": 0, "passages": 0}
    assert again == {**names, **report, "skipped": 0, "stored": 4}

    found = json.loads(d2llm("search", model_folder, "wait some seconds", *place, "--json", "--k", "2").stdout)
    assert [set(hit) for hit in found["hits"]] == [
        {"id", "score", "recall_score", "recall_rank", "payload", "passage"}
    ] * 2
    shown = d2llm("search", model_folder, "wait some seconds", *place, "--k", "2", "--explain").stdout
    positions = [shown.index(f"  {hit['id']}  (recall: rank {hit['recall_rank']}") for hit in found["hits"]]
    assert positions == sorted(positions)
    assert all(stage in shown for stage in ("tokenise", "encode", "recall", "rescore", "whole"))


def test_filters_are_pairs_or_json(model_folder: Path, corpus: Path, place: tuple[str, ...]) -> None:
    d2llm("index", model_folder, corpus, *place)

    def ids(*filters: str) -> set[str]:
        options = [part for text in filters for part in ("--filter", text)]
        found = d2llm("search", model_folder, "a question", *place, "--json", *options)
        return {hit["id"] for hit in json.loads(found.stdout)["hits"]}

    assert ids("module=os") == {"join"}
    assert ids("year=2005") == {"sleep"}
    assert ids('{"year": {"gte": 2005}}', '{"module": ["time", "none"]}') == {"sleep", "long"}
    nothing = d2llm("search", model_folder, "a question", *place, "--filter", "module=absent")
    assert nothing.exit_code == 0 and "Nothing passes the filter" in nothing.stdout


def test_no_rescore_shows_the_order_of_recall(model_folder: Path, corpus: Path, place: tuple[str, ...]) -> None:
    d2llm("index", model_folder, corpus, *place)
    found = json.loads(d2llm("search", model_folder, "seconds", *place, "--json", "--no-rescore").stdout)
    ranks = [hit["recall_rank"] for hit in found["hits"]]
    assert ranks == sorted(ranks) and ranks[0] == 1 and len(ranks) == 4


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no documents"),
        ([*DOCUMENTS, '{"_id": "x", "text": '], r"corpus.jsonl:5: not valid JSON"),
        ([*DOCUMENTS, ["a", "list"]], "corpus.jsonl:5: expected a JSON object"),
        ([*DOCUMENTS, {"_id": "x"}], "corpus.jsonl:5: document 'x': expected \"text\" to be a string"),
        ([*DOCUMENTS, {"text": "no id"}], 'corpus.jsonl:5: expected an "_id"'),
        ([*DOCUMENTS, {"_id": "x", "text": " "}], "corpus.jsonl:5: document 'x' is empty"),
        ([*DOCUMENTS, {"_id": "x", "text": "y", "_d2llm": 1}], "corpus.jsonl:5: document 'x': field '_d2llm'"),
        ([*DOCUMENTS, DOCUMENTS[1]], "corpus.jsonl:5: duplicate id 'sleep'"),
    ],
    ids=["empty", "broken", "list", "no-text", "no-id", "blank-text", "reserved", "duplicate"],
)
def test_a_bad_corpus_is_refused_before_anything_is_written(
    model_folder: Path, tmp_path: Path, place: tuple[str, ...], lines: list[object], message: str
) -> None:
    refused = d2llm("index", model_folder, write(tmp_path / "corpus.jsonl", lines), *place)
    assert refused.exit_code == 1
    assert message in refused.stderr
    assert not (tmp_path / "qdrant").exists()


def test_rejected_rows_replace_no_corpus(model_folder: Path, tmp_path: Path, place: tuple[str, ...]) -> None:
    """A corpus of rows that were rejected once begins like a reject file."""
    (tmp_path / "beir").mkdir()
    source = write(tmp_path / "beir" / "corpus.jsonl", [{"where": "Paris", "_id": "a", "text": "x"}])
    before = source.read_bytes()
    for corpus in (source, source.parent):
        refused = d2llm("index", model_folder, corpus, *place, "--rejects", source)
        assert refused.exit_code == 2 and "corpus.jsonl belongs to the corpus: choose another file" in refused.stderr
    refused = d2llm("index", model_folder, tmp_path / "typo.jsonl", *place, "--rejects", source)
    assert refused.exit_code == 1 and "typo.jsonl: no such file" in refused.stderr
    assert source.read_bytes() == before


def test_wrong_use_is_said_in_a_line(model_folder: Path, corpus: Path, place: tuple[str, ...]) -> None:
    """Before a model is opened or a corpus is read: those of most cases are not there."""
    assert d2llm("index", model_folder, corpus, *place).exit_code == 0
    folder = place[:2]
    index: tuple[str | Path, ...] = ("index", "no-model", "no-corpus")
    search: tuple[str | Path, ...] = ("search", "no-model", "q")
    tune: tuple[str | Path, ...] = ("tune", "no-model", "--queries", "no-queries")
    cases: list[tuple[tuple[str | Path, ...], str]] = [
        ((*index, *place, "--alias", "kb"), "name either the collection (--collection), or an alias"),
        ((*index, *folder, "--collection", "a/b"), "collection name 'a/b'"),
        ((*index, *folder, "--alias", "a", "--alias", "b"), "'--alias': given 2 times (a, b): give one name"),
        *(((*command, *place, "--collection", "b"), "'--collection': given 2 times (docs, b): give one name")
          for command in (index, search, tune)),
        ((*index, *place, "--payload-index", "year=integer", "--payload-index", "year=float"),
         "the field 'year' is given twice: year=integer and year=float"),
        (("collection", "index-payload", "docs", "a=bool", "a=bool", *folder), "the field 'a' is given twice"),
        ((*index, *place, "--rejects", "bad.jsonl", "--on-error", "stop"), "--on-error stop contradicts --rejects"),
        *(((*index, *place, option, "2"), f"{option} is for a cluster, and {folder[1]} is a folder")
          for option in ("--shards", "--replicas", "--write-consistency")),
        ((*index, *folder, "--collection", ""), "collection name ''"),
        ((*index, *folder, "--alias", "a/b"), "collection name 'a/b'"),
        ((*index, *place, "--payload-index", 'a"b=integer'), "Qdrant cannot filter on a field with a"),
        ((*index, *place, "--hybrid", "--language", "klingon"), 'unsupported language: "klingon"'),
        ((*index, *place, "--hnsw-m", "9" * 30), "--hnsw-m"),
        ((*index, *place, "--threads", "9999999"), "--threads"),
        (("index", model_folder, "no-corpus", *place, "--engine", "ray"), "--engine ray needs a Qdrant server"),
        *(((*command, "--qdrant", "localhost:6333", "--collection", "a"), "is http://localhost:6333")
          for command in (index, search, tune)),
        *(((*command, "--qdrant", "http://localhost:port", "--collection", "a"), "its port is no number")
          for command in (index, search, tune)),
        *(((*command, "--qdrant", corpus, "--collection", "a"), "corpus.jsonl is a file")
          for command in (index, search, tune)),
        *(((*command, *folder, "--collection", "a/b"), "collection name 'a/b'") for command in (search, tune)),
        ((*search, *place, "--grpc-port", "65536"), "--grpc-port"),
        *(((*search, *place, "--timeout", seconds), "--timeout") for seconds in ("nan", "inf", "1e300")),
        ((*search, "--qdrant", "http://h", "--collection", "a", "--api-key", "key\n"), "which no header can hold"),
        ((*search, *place, "--k", "50", "--candidates", "10"), "raise --candidates"),
        ((*search, *place, "--k", "0"), "--k"),
        ((*search, *place, "--filter", "module"), "expected KEY=VALUE"),
        ((*search, *place, "--filter", '{"a": '), "not valid JSON"),
        ((*search, *place, "--filter", '{"a":' * 9999), "not valid JSON"),
        ((*search, *place, "--filter", '{"year": {"foo": 2}}'), "filter on 'year': {'foo': 2} is neither"),
        ((*search, *place, "--filter", '{"year": {"gte": 1e400}}'), "filter on 'year': {'gte': inf} is neither"),
        ((*search, *place, "--filter", "lang=null"), "filter on 'lang': None is neither"),
        ((*search, *place, "--filter", f"year={2**63}"), "filter on 'year': 9223372036854775808 is neither"),
        ((*search, *place, "--filter", 'a"b=1'), "Qdrant cannot filter on a field with a"),
        ((*search, *place, "--filter", "a=\udcff"), "is not UTF-8"),
        (("search", "no-model", "\udcff", *place), "is not UTF-8"),
        ((*search, *place, "--hybrid", "--bm25-weight", "nan"), "expected a finite number, found nan"),
        ((*search, *place, "--bm25-weight", "0.5"), "add --hybrid, or leave --bm25-weight out"),
        ((*search, *place, "--fusion", "rrf"), "--fusion is for hybrid searches"),
        ((*index, *place, "--language", "german"), "--language is for --hybrid: give both"),
        (("collection", "migrate", "docs", *folder, "--to", "there", "--language", "german"), "--language is for"),
        (("collection", "migrate", "docs", *folder, "--to", folder[1]), "would be copied onto itself"),
        ((*tune, *place, "--target", "nan"), "expected a finite number, found nan"),
        (("collection", "delete", "docs", *folder, "--yes", "--filter", '{"year": {"foo": 1}}'), "filter on 'year'"),
        (("collection", "delete", "docs", *folder, "--yes", "--filter", "{}"), "would remove every document"),
        (("collection", "delete", "docs", *folder, "--yes"), "either --id or --filter"),
        (("collection", "delete", "docs", *folder, "--yes", "--id", "\udcff"), "is not UTF-8"),
        (("collection", "index-payload", "docs", 'a"b=integer', *folder), "nor index it"),
        (("collection", "alias", "docs", "a/b", *folder), "collection name 'a/b'"),
        (("collection", "migrate", "docs", *folder, "--to", "http://h:0"), "its port is no number"),
    ]  # fmt: skip
    for arguments, message in cases:
        refused = d2llm(*arguments)
        assert refused.exit_code == 2 and not refused.stdout, arguments
        assert message in " ".join(refused.stderr.split()), arguments
    assert json.loads(d2llm("collection", "info", "docs", *folder, "--json").stdout)["documents"] == len(DOCUMENTS)


def test_what_does_not_belong_together_is_said_before_the_work(
    model_folder: Path, tmp_path: Path, place: tuple[str, ...]
) -> None:
    damaged = tmp_path / "damaged"  # a model of which the config alone can be read
    damaged.mkdir()
    for path in model_folder.iterdir():
        (damaged / path.name).touch()
    shutil.copy(model_folder / "d2llm.json", damaged)
    with QdrantIndex("docs", place[1]) as index:
        index.open_for(replace(read_config(model_folder), fingerprint="fedcba9876543210"))
    commands: list[list[str | Path]] = [["index", damaged, "no-corpus"], ["search", damaged, "q"]]
    for command in commands:
        refused = d2llm(*command, *place)
        assert refused.exit_code == 1 and "fedcba9876543210, this model is" in refused.stderr
        refused = d2llm(*command, "--qdrant", "http://127.0.0.1:1", "--collection", "docs")
        assert refused.exit_code == 1 and "cannot reach Qdrant at http://127.0.0.1:1" in refused.stderr


def test_a_filter_that_finds_nothing_may_mean_a_field_within_a_field(
    model_folder: Path, corpus: Path, place: tuple[str, ...], tmp_path: Path
) -> None:
    d2llm("index", model_folder, corpus, *place)
    found = d2llm("search", model_folder, "wait", *place, "--filter", "metadata.source=web")
    assert found.exit_code == 0 and "Nothing passes the filter" in found.stdout
    assert "for a field within a field, write .metadata.source" in found.stderr
    typo = d2llm("search", model_folder, "wait", *place, "--filter", "yaer=1066", "--json")
    assert json.loads(typo.stdout) == {
        "query": "wait", "hits": [], "warnings": ["no document has the field 'yaer' of the filter: check its name"],
    }  # fmt: skip
    for asked, said in (
        (
            'year="1966"',
            'holds numbers, such as 2001, and the filter asks for text, "1966": write it as {"year": 2001}',
        ),
        ("module=1", 'holds text, such as "os", and the filter asks for numbers, 1: write it as {"module": "1"}'),
        ('{"module": {"gte": 2}}', "the filter asks for numbers, 2: bounds are for numbers"),
    ):
        assert said in d2llm("search", model_folder, "wait", *place, "--filter", asked).stderr
    queries = tmp_path / "queries.txt"
    queries.write_text("wait\nsleep\n")
    assert "field 'yaer'" in d2llm("search", model_folder, "--queries", queries, *place, "--filter", "yaer=1").stderr
    assert "no document has" not in d2llm("search", model_folder, "wait", *place, "--filter", "year=1066").stderr


def test_more_hits_than_there_are_can_be_asked_for(model_folder: Path, corpus: Path, place: tuple[str, ...]) -> None:
    d2llm("index", model_folder, corpus, *place)
    many = ["--k", "9" * 30, "--candidates", "9" * 30, "--hnsw-ef", "9" * 30]
    found = json.loads(d2llm("search", model_folder, "wait", *place, "--json", *many).stdout)
    assert len(found["hits"]) == len(DOCUMENTS)


@pytest.mark.skipif(sys.platform == "win32", reason="on Windows the command line is Unicode")
def test_a_query_is_read_and_hits_are_written_in_any_locale(
    model_folder: Path, tmp_path: Path, place: tuple[str, ...]
) -> None:
    rows: list[object] = [
        {"_id": "a", "text": f"{BEIJING} \N{GRINNING FACE}", "city": BEIJING},
        {"_id": "b", "text": "Bangkok"},
    ]
    assert d2llm("index", model_folder, write(tmp_path / "corpus.jsonl", rows), *place).exit_code == 0
    command = ["search", str(model_folder), BEIJING, *place, "--filter", f"city={BEIJING}"]

    def search(*options: str, **environment: str) -> bytes:
        arguments = [sys.executable, "-m", "d2llm", *command, *options]
        return subprocess.run(arguments, env=os.environ | environment, stdout=subprocess.PIPE, check=True).stdout

    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    found = json.loads(search("--json", **plain))
    assert found == json.loads(d2llm(*command, "--json").stdout)
    assert [hit["payload"] for hit in found["hits"]] == [{"text": rows[0]["text"], "city": BEIJING}]  # type: ignore[index]  # `rows` is typed as objects
    assert rb"\u5317\u4eac" in search(PYTHONIOENCODING="latin-1")


def test_bad_documents_can_be_skipped_and_are_counted(
    model_folder: Path, tmp_path: Path, place: tuple[str, ...]
) -> None:
    bad = write(tmp_path / "corpus.jsonl", [DOCUMENTS[0], "{", {"_id": "x", "text": ""}, DOCUMENTS[0], DOCUMENTS[1]])
    indexed = d2llm("index", model_folder, bad, *place, "--on-error", "skip")
    assert indexed.exit_code == 0
    assert "2 documents: 2 stored, 0 unchanged, 3 skipped" in indexed.stdout
    assert all(f"corpus.jsonl:{line}" in indexed.stderr for line in (2, 3, 4))


def test_wrong_places_are_named(model_folder: Path, corpus: Path, place: tuple[str, ...], tmp_path: Path) -> None:
    cases: list[tuple[list[str | Path], str]] = [
        (["index", model_folder, tmp_path / "absent.jsonl", *place], "absent.jsonl: no such file"),
        (["index", tmp_path / "absent", corpus, *place], "absent is not a folder"),
        (["index", corpus.parent, corpus, *place], "is not a d2llm model"),
        (["search", model_folder, "q", *place], "no collection 'docs'"),
        (["index", model_folder, corpus, "--qdrant", "http://127.0.0.1:1", "--collection", "docs"], "127.0.0.1:1"),
        (["search", model_folder, "q", "--qdrant", "http://127.0.0.1:1", "--collection", "docs"], "127.0.0.1:1"),
        (["eval", model_folder, tmp_path / "absent.jsonl"], "absent.jsonl: no such file"),
        (["train", tmp_path / "absent.toml", tmp_path / "student"], "absent.toml: no such file"),
        (["doctor", tmp_path / "absent"], "absent is not a folder"),
    ]
    for arguments, message in cases:
        refused = d2llm(*arguments)
        assert refused.exit_code == 1, arguments
        assert message in refused.stderr
        assert "Traceback" not in refused.output


def test_an_empty_query_is_refused(model_folder: Path, corpus: Path, place: tuple[str, ...]) -> None:
    d2llm("index", model_folder, corpus, *place)
    refused = d2llm("search", model_folder, " ", *place)
    assert refused.exit_code == 1 and "the query is empty" in refused.stderr


FAMILY = "\N{MAN}\N{ZERO WIDTH JOINER}\N{WOMAN}\N{ZERO WIDTH JOINER}\N{GIRL}"
BEIJING = "\u5317\u4eac\u662f\u4e2d\u56fd\u7684\u9996\u90fd"
BANGKOK = "\u0e01\u0e23\u0e38\u0e07\u0e40\u0e17\u0e1e\u0e40\u0e1b\u0e47\u0e19"
LONG_TEXTS = {
    "Chinese": BEIJING * 20,
    "Chinese after a title": f"{BEIJING[:2]} {BEIJING * 20}",
    "Thai": BANGKOK * 20,
    "marks": "e\u0301\u0323" * 200,
    "emoji": FAMILY * 60,
    "one word": "x" * 300,
}


@pytest.mark.parametrize("text", LONG_TEXTS.values(), ids=LONG_TEXTS)
def test_a_long_text_fills_its_line_whatever_its_script(text: str) -> None:
    for width in range(20, 60):
        cut = shorten(text, width)
        kept = cut.removesuffix(" ...")
        assert kept != cut and text.startswith(kept)
        assert width - display_width(FAMILY) < display_width(cut) <= width
        following = text[len(kept)]
        assert unicodedata.category(following) not in ("Mn", "Cf") and kept[-1] != "\N{ZERO WIDTH JOINER}"


def test_a_long_text_is_cut_between_words() -> None:
    assert shorten("Suspend execution for\n some seconds", 30) == "Suspend execution for some ..."
    assert shorten("Suspend execution for\n some seconds", 29) == "Suspend execution for ..."
    assert shorten("Suspend execution for\n some seconds", 34) == "Suspend execution for some seconds"


def test_columns_of_a_terminal_are_counted() -> None:
    assert [display_width(text) for text in ("abc", BEIJING, "e\u0301", FAMILY)] == [3, 2 * len(BEIJING), 1, 6]


@pytest.mark.parametrize("command", [["--help"], ["collection", "info", "--qdrant", "nowhere"]])
def test_a_reader_that_has_gone_ends_a_command_in_silence(command: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "d2llm", *command], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


ROWS = ["BM25", "recall", "recall + IEM", "exhaustive IEM", "hybrid + IEM", "RRF", "DBSF"]
"""The rows without training queries."""


@pytest.fixture
def judged(tmp_path: Path) -> Path:
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    write(folder / "corpus.jsonl", list(DOCUMENTS))
    queries = {"q1": "median of numbers", "q2": "pause for some seconds", "q3": "word"}
    write(folder / "queries.jsonl", [{"_id": id_, "text": text} for id_, text in queries.items()])
    write(folder / "qrels" / "test.tsv", ["query-id\tcorpus-id\tscore", "q1\tmedian\t1", "q2\tsleep\t1", "q3\tlong\t1"])
    write(folder / "qrels" / "one.tsv", ["query-id\tcorpus-id\tscore", "q1\tmedian\t1"])
    return folder


def test_eval_gives_programs_everything_on_one_line(
    model_folder: Path, judged: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = write(tmp_path / "ce.run", ["q1 Q0 median 1 9.5 ce", "q1 Q0 join 2 3.25 ce", "q2 Q0 sleep 1 7 ce"])
    arguments = ["--run", f"cross-encoder={run}", "--teacher", "cross-encoder", "--baseline", "BM25", "--json"]
    shown = d2llm("eval", model_folder, judged, *arguments)
    assert shown.exit_code == 0, shown.stderr
    assert "ce.run ranks 2 of 3 judged queries" in caplog.text
    found = json.loads(shown.stdout)
    assert (found["queries"], found["documents"], found["judgements"], found["split"]) == (3, 4, 3, "test")
    assert list(found["rows"]) == list(found["retention"]) == [*ROWS, "cross-encoder"]
    assert list(found["significance"]) == [*ROWS[1:], "cross-encoder"]
    assert found["rows"]["cross-encoder"]["nDCG@10"] == pytest.approx(2 / 3)
    assert found["rows"]["BM25"]["Recall@10"] == 1.0
    assert found["retention"]["cross-encoder"] == 100
    assert (found["teacher"], found["baseline"]) == ("cross-encoder", "BM25")


def test_eval_shows_people_tables(model_folder: Path, judged: Path) -> None:
    shown = d2llm("eval", model_folder, judged, "--teacher", "BM25").stdout
    assert "3 queries with 3 judgements (test), 4 documents in 7 passages; candidates=100, asymmetric branch" in shown
    header = next(line for line in shown.splitlines() if "MRR@10" in line)
    assert header.split() == ["nDCG@10", "MRR@10", "Recall@10", "Recall@100", "MAP", "overlap@10", "retention"]
    assert next(line for line in shown.splitlines() if line.startswith("BM25")).endswith("100.0 %")
    assert "nDCG@10 against recall  difference" in shown and "paired randomisation test" in shown
    alone = d2llm("eval", model_folder, judged, "--split", "one")
    assert alone.exit_code == 0 and "There is one query." in alone.stdout
    assert json.loads(d2llm("eval", model_folder, judged, "--split", "one", "--json").stdout)["significance"] is None


def test_saved_runs_can_be_measured_again(model_folder: Path, judged: Path, tmp_path: Path) -> None:
    save: list[str | Path] = ["--save-runs", tmp_path / "runs", "--per-query", tmp_path / "queries.tsv", "--json"]
    first = json.loads(d2llm("eval", model_folder, judged, *save).stdout)["rows"]
    files = dict(
        zip(ROWS, ["bm25", "recall", "recall-iem", "exhaustive-iem", "hybrid-iem", "rrf", "dbsf"], strict=True)
    )
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == sorted(f"{f}.run" for f in files.values())
    runs = [part for name in files.values() for part in ("--run", f"my {name}={tmp_path / 'runs' / name}.run")]
    again = json.loads(d2llm("eval", model_folder, judged, *runs, "--json").stdout)["rows"]
    assert {row: again[f"my {name}"] for row, name in files.items()} == first

    lines = [line.split("\t") for line in (tmp_path / "queries.tsv").read_text().splitlines()]
    assert lines[0] == ["query-id", "row", "nDCG@10", "MRR@10", "Recall@10", "Recall@100", "MAP"]
    assert [line[:2] for line in lines[1:]] == [[query, row] for query in ("q1", "q2", "q3") for row in ROWS]
    ndcg = [float(line[2]) for line in lines[1:] if line[1] == "recall"]
    assert sum(ndcg) / 3 == pytest.approx(first["recall"]["nDCG@10"], abs=1e-6)


def test_a_hybrid_search_is_weighed_on_training_queries(model_folder: Path, judged: Path, tmp_path: Path) -> None:
    reason = "its weight needs training queries"
    assert f"cosine + BM25 is left out: {reason}" in d2llm("eval", model_folder, judged).stdout
    found = json.loads(d2llm("eval", model_folder, judged, "--json").stdout)
    assert found["left_out"]["cosine + BM25"].startswith(reason) and "train.tsv" in found["left_out"]["cosine + BM25"]
    assert (found["bm25_weight"], found["training_queries"]) == (None, 0)

    training = ["query-id\tcorpus-id\tscore", "t1\tmedian\t1", "t2\tsleep\t1", "q3\tlong\t1"]
    write(judged / "qrels" / "train.tsv", list(training))
    lines = (judged / "queries.jsonl").read_text().splitlines()
    more = [{"_id": "t1", "text": "the middle number"}, {"_id": "t2", "text": "wait some seconds"}]
    write(judged / "queries.jsonl", [*lines, *more])
    options: list[str | Path] = ["--baseline", "cosine + BM25", "--save-runs", tmp_path / "runs"]
    found = json.loads(d2llm("eval", model_folder, judged, *options, "--json").stdout)
    assert list(found["rows"]) == [*ROWS, "cosine + BM25"] and list(found["significance"]) == ROWS
    assert (found["training_queries"], found["left_out"]) == (2, {}), "q3 is measured"
    assert (tmp_path / "runs" / "cosine-bm25.run").exists()
    shown = d2llm("eval", model_folder, judged, *options).stdout
    assert f"BM25 has the weight {found['bm25_weight']:g}, which has the highest nDCG@10 on 2 training" in shown
    assert "nDCG@10 against cosine + BM25" in shown


def test_eval_can_stem_the_words_of_bm25(model_folder: Path, judged: Path) -> None:
    pytest.importorskip("Stemmer")
    write(judged / "queries.jsonl", [{"_id": "q1", "text": "medians"}])
    plain, stemmed = (
        json.loads(d2llm("eval", model_folder, judged, "--split", "one", *options, "--json").stdout)
        for options in ([], ["--stems", "english"])
    )
    assert (plain["stems"], stemmed["stems"]) == (None, "english")
    assert plain["rows"]["BM25"]["MRR@10"] < stemmed["rows"]["BM25"]["MRR@10"] == 1.0
    refused = d2llm("eval", model_folder, judged, "--split", "one", "--stems", "klingon")
    assert refused.exit_code == 2 and "no stems of the language 'klingon': choose one of" in refused.stderr


def test_eval_replaces_no_file_but_its_own(model_folder: Path, judged: Path) -> None:
    judgements = judged / "qrels" / "test.tsv"
    before = judgements.read_bytes()
    refused = d2llm("eval", model_folder, judged, "--per-query", judgements)
    assert refused.exit_code == 1 and "test.tsv exists already and --per-query has not written it" in refused.stderr
    assert judgements.read_bytes() == before
    refused = d2llm("eval", model_folder, judged, "--per-query", judgements / "measures.tsv")
    assert refused.exit_code == 2 and "test.tsv is no folder" in refused.stderr and not refused.stdout


def test_eval_replaces_no_run_but_its_own(model_folder: Path, judged: Path, tmp_path: Path) -> None:
    save: list[str | Path] = ["--save-runs", tmp_path / "runs", "--split", "one"]
    for _ in range(2):  # the second time, it replaces its own
        assert d2llm("eval", model_folder, judged, *save).exit_code == 0
    own = {path: path.read_bytes() for path in (tmp_path / "runs").iterdir()}
    assert len(own) == len(ROWS)
    path = tmp_path / "runs" / "ce.run"
    for content in ("q1 Q0 join 1 12.5 ce\n", "q1 Q0 join 1 -1.0 cross\n", "a note\n", "\na note\n"):
        path.write_text(content)
        refused = d2llm("eval", model_folder, judged, *save, "--run", f"ce={path}")
        assert refused.exit_code == 1 and "ce.run exists already and --save-runs has not written it" in refused.stderr
        assert path.read_text() == content
    assert {other: other.read_bytes() for other in own} == own


def test_eval_measures_scored_and_labelled_pairs(model_folder: Path, tmp_path: Path) -> None:
    texts = [("one", "two"), ("a cat", "a kitten"), ("rain", "sunshine"), ("he runs", "he is running")]

    def pairs(key: str, *values: object) -> Path:
        rows = [{"text_a": a, "text_b": b, key: value} for (a, b), value in zip(texts, values, strict=True)]
        return write(tmp_path / f"{key}.jsonl", list(rows))

    scored, labelled = pairs("score", 1, 4, 2, 4.5), pairs("label", "neutral", "entailment", "contradiction", 1)
    shown = d2llm("eval", model_folder, scored).stdout
    assert "4 pairs; symmetric branch" in shown and "Spearman" in shown and "threshold" not in shown
    shown = d2llm("eval", model_folder, labelled).stdout
    assert "4 pairs, 2 with entailment; symmetric branch" in shown
    assert "the more frequent label: 0.5000" in shown and "accuracy on the measured pairs themselves" in shown
    other = d2llm("eval", model_folder, labelled, "--threshold-from", labelled)
    assert f"highest accuracy on the 4 pairs of {labelled}." in other.stdout
    found = json.loads(d2llm("eval", model_folder, labelled, "--task", "asymmetric", "--json").stdout)
    assert (found["pairs"], found["entailment"], found["threshold_from"]) == (4, 2, str(labelled))
    assert list(found["rows"]["IEM"]) == ["Accuracy", "AP", "Precision", "Recall", "threshold"]
    refused = d2llm("eval", model_folder, labelled, "--threshold-from", scored)
    assert refused.exit_code == 1 and f"{scored}: these pairs have scores" in refused.stderr


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--teacher", "ce"], 2, "--teacher: no row 'ce': the rows are BM25, recall, recall + IEM, exhaustive IEM"),
        (["--baseline", "ce"], 2, "--baseline: no row 'ce': the rows are BM25"),
        (["--run", "ce"], 2, "expected NAME=FILE, with a letter or digit in NAME, found 'ce'"),
        (["--run", "+=ce.run"], 2, "expected NAME=FILE"),
        (["--run", "Recall IEM=ce.run"], 2, "'Recall IEM' is too similar to the row 'recall + IEM'"),
        (["--run", "rrf=ce.run"], 2, "'rrf' is too similar to the row 'RRF'"),
        (["--baseline", "cosine + BM25"], 2, "--baseline: no row 'cosine + BM25': its weight needs training queries"),
        (["--run", "a b=ce.run", "--run", "a-b=ce.run"], 2, "'a-b' is too similar to the row 'a b'"),
        (["--run", "ce=absent.run"], 1, "absent.run: no such file"),
        (["--threshold-from", "x.jsonl"], 2, "--threshold-from is for pairs"),
        (["--split", "absent"], 1, "absent.tsv: no such file"),
    ],
)
def test_eval_says_which_option_is_wrong(
    model_folder: Path, judged: Path, options: list[str], status: int, message: str
) -> None:
    refused = d2llm("eval", model_folder, judged, *options)
    assert refused.exit_code == status
    assert message in refused.stderr and not refused.stdout


def test_eval_of_pairs_refuses_the_options_of_folders(model_folder: Path, tmp_path: Path) -> None:
    pairs = write(tmp_path / "pairs.jsonl", [{"text_a": "one", "text_b": "two", "score": 1.0}])
    for option, value in (("--split", "test"), ("--save-runs", "runs"), ("--run", "a=b"), ("--candidates", "100")):
        refused = d2llm("eval", model_folder, pairs, option, value)
        assert refused.exit_code == 2 and f"{option} is for BEIR folders" in refused.stderr


def test_eval_of_one_scored_pair_asks_for_more(model_folder: Path, tmp_path: Path) -> None:
    pairs = write(tmp_path / "pairs.jsonl", [{"text_a": "one", "text_b": "two", "score": 1.0}])
    refused = d2llm("eval", model_folder, pairs)
    assert refused.exit_code == 1 and "needs at least two scored pairs, found 1: add pairs" in refused.stderr


def test_doctor_proves_a_model_and_explains_missing_cuda(model_folder: Path) -> None:
    works = d2llm("doctor", model_folder)
    assert works.exit_code == 0
    assert f"{model_folder} on cpu: works (384 dimensions, fp32)" in works.stdout
    assert "Documents are encoded in batches of up to" in works.stdout
    assert "onnxruntime" in works.stdout
    for arguments in (["doctor", model_folder], ["doctor"]):
        refused = d2llm(*arguments, "--device", "cuda")
        assert refused.exit_code == 1 and "pip install" in refused.stderr


def test_doctor_shows_what_is_broken_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ir_measures.py").write_text("raise OSError('libmeasures.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ir_measures", raising=False)
    done = d2llm("doctor")
    assert done.exit_code == 0
    line = next(line for line in done.stdout.splitlines() if "ir_measures" in line)
    assert "BROKEN (OSError: libmeasures.so: cannot open shared object file): pip install" in line
    assert "optimum" in done.stdout.partition(line)[2]  # the modules after it


def test_the_exporter_says_what_it_wrote_and_refuses_an_existing_folder(student_folder: Path, tmp_path: Path) -> None:
    arguments = ["onnx", str(student_folder), str(tmp_path / "model")]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious").write_text("kept")
    refused = CliRunner().invoke(export_main, arguments)
    assert refused.exit_code == 1 and "exists already" in refused.stderr
    no_student = CliRunner().invoke(export_main, ["onnx", str(tmp_path / "model"), str(tmp_path / "other")])
    assert no_student.exit_code == 1 and "is not a student folder" in no_student.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("command", [["--help"], ["index", "--help"], ["search", "--help"], ["eval", "--help"]])
def test_help_and_search_load_no_torch(command: list[str]) -> None:
    code = (
        "import sys; from d2llm.cli import main; main(sys.argv[1:], standalone_mode=False); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'onnxruntime')))"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_a_search_needs_neither_torch_nor_transformers(
    model_folder: Path, corpus: Path, place: tuple[str, ...]
) -> None:
    """Both packages made unimportable, then the whole job of serving."""
    blocked = "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'peft', 'onnx', 'scipy'])); "
    for command in (["index", model_folder, corpus], ["search", model_folder, "wait"]):
        code = blocked + "from d2llm.cli import main; main(sys.argv[1:])"
        arguments = [sys.executable, "-c", code, *map(str, command), *place, "--json"]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_while_indexing_keeps_what_was_stored_and_a_rerun_completes_it(
    times: int, model_folder: Path, tmp_path: Path, place: tuple[str, ...]
) -> None:
    """Once, what is in work is finished first; pressed again meanwhile, all ends there and then."""
    total = 1800
    corpus = write(tmp_path / "big.jsonl", [{"_id": str(i), "text": f"passage number {i} " * 4} for i in range(total)])
    arguments = [sys.executable, "-m", "d2llm", "index", str(model_folder), str(corpus), *place]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    shown = ""
    while not re.search(rf"\b[1-9]\d*/{total} ", shown):  # the progress bar: something is stored
        character = process.stderr.read(1)
        assert character, shown
        shown += character
    for _ in range(times):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.1)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    if times == 1:
        assert "run the same command again to go on" in said
    finished = json.loads(d2llm("index", model_folder, corpus, *place, "--json").stdout)
    assert finished["stored"] == total
    assert 0 < finished["unchanged"] < total
    assert finished["added"] == total - finished["unchanged"]
