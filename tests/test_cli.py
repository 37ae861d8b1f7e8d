"""The command line as people use it: the job, what it says about bad input, and what it leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from d2llm.cli import export_main, main

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
    assert "4 documents: 4 stored, 0 unchanged, 0 skipped; 1 were longer than 128 tokens" in indexed.stdout
    assert f'Next: d2llm search {model_folder} "your question"' in indexed.stdout
    again = json.loads(d2llm("index", model_folder, corpus, *place, "--json").stdout)
    assert again == {"added": 0, "unchanged": 4, "truncated": 0, "skipped": 0, "stored": 4}

    found = json.loads(d2llm("search", model_folder, "wait some seconds", *place, "--json", "--k", "2").stdout)
    assert [set(hit) for hit in found["hits"]] == [{"id", "score", "recall_score", "recall_rank", "payload"}] * 2
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
    for text, message in [("module", "expected KEY=VALUE"), ('{"a": ', "not valid JSON")]:
        refused = d2llm("search", model_folder, "q", *place, "--filter", text)
        assert refused.exit_code == 2 and message in refused.stderr


def test_no_rescore_shows_the_order_of_recall(model_folder: Path, corpus: Path, place: tuple[str, ...]) -> None:
    d2llm("index", model_folder, corpus, *place)
    found = json.loads(d2llm("search", model_folder, "seconds", *place, "--json", "--no-rescore").stdout)
    assert [hit["recall_rank"] for hit in found["hits"]] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no documents"),
        ([*DOCUMENTS, '{"_id": "x", "text": '], r"corpus.jsonl:5: not valid JSON"),
        ([*DOCUMENTS, ["a", "list"]], "corpus.jsonl:5: expected a JSON object"),
        ([*DOCUMENTS, {"_id": "x"}], "corpus.jsonl:5: document 'x': expected \"text\" to be a string"),
        ([*DOCUMENTS, {"text": "no id"}], 'corpus.jsonl:5: expected an "_id"'),
        ([*DOCUMENTS, {"_id": "x", "text": " "}], "corpus.jsonl:5: document 'x' is empty"),
        ([*DOCUMENTS, DOCUMENTS[1]], "corpus.jsonl:5: duplicate id 'sleep'"),
    ],
    ids=["empty", "broken", "list", "no-text", "no-id", "blank-text", "duplicate"],
)
def test_a_bad_corpus_is_refused_before_anything_is_written(
    model_folder: Path, tmp_path: Path, place: tuple[str, ...], lines: list[object], message: str
) -> None:
    refused = d2llm("index", model_folder, write(tmp_path / "corpus.jsonl", lines), *place)
    assert refused.exit_code == 1
    assert message in refused.stderr
    assert not (tmp_path / "qdrant").exists()


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
        (["index", tmp_path / "absent", corpus, *place], "absent is no folder"),
        (["index", corpus.parent, corpus, *place], "is no d2llm model"),
        (["search", model_folder, "q", *place], "no collection 'docs'"),
        (["index", model_folder, corpus, "--qdrant", "http://127.0.0.1:1", "--collection", "docs"], "127.0.0.1:1"),
        (["search", model_folder, "q", "--qdrant", "http://127.0.0.1:1", "--collection", "docs"], "127.0.0.1:1"),
        (["eval", model_folder, tmp_path / "absent.jsonl"], "absent.jsonl: no such file"),
        (["train", tmp_path / "absent.toml", tmp_path / "student"], "absent.toml: no such file"),
        (["doctor", tmp_path / "absent"], "absent is no folder"),
    ]
    for arguments, message in cases:
        refused = d2llm(*arguments)
        assert refused.exit_code == 1, arguments
        assert message in refused.stderr
        assert "Traceback" not in refused.output


def test_k_beyond_recall_is_a_usage_error(model_folder: Path, place: tuple[str, ...]) -> None:
    refused = d2llm("search", model_folder, "q", *place, "--k", "50", "--recall", "10")
    assert refused.exit_code == 2 and "raise --recall" in refused.stderr


def test_an_empty_query_is_refused(model_folder: Path, corpus: Path, place: tuple[str, ...]) -> None:
    d2llm("index", model_folder, corpus, *place)
    refused = d2llm("search", model_folder, " ", *place)
    assert refused.exit_code == 1 and "the query is empty" in refused.stderr


def test_eval_measures_folders_and_pairs(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "beir" / "qrels").mkdir(parents=True)
    write(tmp_path / "beir" / "corpus.jsonl", list(DOCUMENTS))
    write(tmp_path / "beir" / "queries.jsonl", [{"_id": "q", "text": "median of numbers"}])
    (tmp_path / "beir" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\tmedian\t1\n")
    found = json.loads(d2llm("eval", model_folder, tmp_path / "beir", "--json").stdout)
    assert list(found["rows"]) == ["BM25", "recall", "recall + IEM", "exhaustive IEM"]
    assert found["rows"]["BM25"]["nDCG@10"] == 1.0
    pairs = [{"text_a": "one", "text_b": "two", "score": 1.0}, {"text_a": "a cat", "text_b": "a kitten", "score": 4.0},
             {"text_a": "rain", "text_b": "sunshine", "score": 2.0}]  # fmt: skip
    shown = d2llm("eval", model_folder, write(tmp_path / "pairs.jsonl", list(pairs))).stdout
    assert "3 pairs" in shown and "Spearman" in shown and "IEM" in shown


def test_doctor_proves_a_model_and_explains_missing_cuda(model_folder: Path) -> None:
    works = d2llm("doctor", model_folder)
    assert works.exit_code == 0
    assert f"{model_folder} on cpu: works (384 dimensions, fp32)" in works.stdout
    assert "onnxruntime" in works.stdout
    refused = d2llm("doctor", model_folder, "--device", "cuda")
    assert refused.exit_code == 1 and "pip install" in refused.stderr


def test_the_exporter_says_what_it_wrote_and_refuses_an_existing_folder(student_folder: Path, tmp_path: Path) -> None:
    arguments = ["onnx", str(student_folder), str(tmp_path / "model")]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious").write_text("kept")
    refused = CliRunner().invoke(export_main, arguments)
    assert refused.exit_code == 1 and "exists already" in refused.stderr
    no_student = CliRunner().invoke(export_main, ["onnx", str(tmp_path / "model"), str(tmp_path / "other")])
    assert no_student.exit_code == 1 and "is no student" in no_student.stderr
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


def test_ctrl_c_while_indexing_keeps_what_was_stored_and_a_rerun_completes_it(
    model_folder: Path, tmp_path: Path, place: tuple[str, ...]
) -> None:
    total = 6000
    corpus = write(tmp_path / "big.jsonl", [{"_id": str(i), "text": f"passage number {i}"} for i in range(total)])
    arguments = [sys.executable, "-m", "d2llm", "index", str(model_folder), str(corpus), *place]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True)
    shard = tmp_path / "qdrant" / "docs"
    while not shard.exists():
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.02)
    time.sleep(2.0)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "run the same command again to go on" in said
    finished = json.loads(d2llm("index", model_folder, corpus, *place, "--json").stdout)
    assert finished["stored"] == total
    assert 0 < finished["unchanged"] < total
    assert finished["added"] == total - finished["unchanged"]
