"""Query encoders side by side: the table, the frontier and its picture."""

import json
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import SHORT

import d2llm
from d2llm.beir import RetrievalData
from d2llm.cli import main
from d2llm.errors import DataError, MismatchError
from d2llm.evaluate import evaluate_retrieval
from d2llm.export import add_query_encoder, export
from d2llm.export.compare import Row, compare, draw, frontier
from d2llm.small_encoder import from_layers, from_tokens
from d2llm.student import Student

PASSAGES = [
    f"{verb} {noun}"
    for verb in ("open the", "close a", "read from the", "write to a", "remove the", "count every")
    for noun in ("file", "socket", "database", "picture", "letter", "window", "door", "book")
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Passages, and as queries the same in other words."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "qrels").mkdir()
    (folder / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(PASSAGES))
    )
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": f"q{i}", "text": f"how to {text}?"}) + "\n" for i, text in enumerate(PASSAGES))
    )
    judged = "".join(f"q{i}\td{i}\t1\n" for i in range(len(PASSAGES)))
    (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    return folder


@pytest.fixture(scope="module")
def folders(
    make_student: Callable[..., Student], tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A student, two small encoders of it (one is the whole student), and one of another student."""
    folder = tmp_path_factory.mktemp("small")
    for name, seed in (("student", 0), ("other", 1)):
        make_student(tiny_bert, seed=seed, **SHORT).save(folder / name)
    for of, name in (("student", "all-layers"), ("student", "table"), ("other", "stranger")):
        loaded = Student.load(folder / of).eval()
        loaded.merge_lora()
        (from_tokens(loaded, bigrams=64) if name == "table" else from_layers(loaded, [0, 1])).save(folder / name)
    return {path.name: path for path in folder.iterdir()}


def test_every_encoder_is_a_row_and_ranks_as_its_model_does(
    folders: dict[str, Path], dataset: Path, tmp_path: Path
) -> None:
    data = RetrievalData.load(str(dataset), "dev")
    rows = compare(folders["student"], data, [folders["all-layers"], folders["table"]], candidates=20, timed=9)
    assert [(row.name, row.kind, row.precision) for row in rows] == [
        ("full", "full", "fp32"), ("full", "full", "int8"),
        ("all-layers", "layers 0,1", "fp32"), ("all-layers", "layers 0,1", "int8"),
        ("table", "static", "fp32"), ("table", "static", "int8"),
    ]  # fmt: skip
    full, _, whole, _, table, _ = rows
    assert (full.speedup, full.graph_speedup, full.retention, full.difference) == (1, 1, 100, 0)
    assert whole.ndcg_10 == pytest.approx(full.ndcg_10, abs=0.02), "all layers are the student itself"
    assert table.ndcg_10 != full.ndcg_10
    for row in rows:
        assert 0 < row.graph_p50 <= row.p50 <= row.p95
        assert row.speedup == pytest.approx(full.p50 / row.p50)
        assert row.retention == pytest.approx(100 * row.ndcg_10 / full.ndcg_10)
        assert row.low <= row.difference <= row.high
    # The same figures as d2llm eval has, which loads the folder that a user would make.
    export(folders["student"], tmp_path / "model")
    add_query_encoder(folders["student"], tmp_path / "model", folders["table"])
    for row, choice in ((full, "full"), (table, "small")):
        model = d2llm.load(tmp_path / "model", query_encoder=choice)  # type: ignore[arg-type]  # a parametrised str
        found = evaluate_retrieval(model, data, candidates=20).table["recall + IEM"]
        assert row.ndcg_10 == pytest.approx(found["nDCG@10"], abs=1e-6)
        assert row.recall_100 == pytest.approx(found["Recall@100"], abs=1e-6)


def test_what_cannot_be_compared_is_refused(folders: dict[str, Path], dataset: Path, tmp_path: Path) -> None:
    data = RetrievalData.load(dataset, "dev")
    table = folders["table"]
    with pytest.raises(DataError, match="table, table are not all different"):
        compare(folders["student"], data, [table, table])
    with pytest.raises(MismatchError, match=r"stranger was aligned to the student"):
        compare(folders["student"], data, [folders["stranger"]], precisions=["fp32"])
    first = next(iter(data.queries))
    one = replace(data, queries={first: data.queries[first]}, qrels={first: data.qrels[first]})
    with pytest.raises(DataError, match="two or more queries, found 1"):
        compare(folders["student"], one, [table])


def row(name: str, p50: float, ndcg: float, precision: str = "fp32") -> Row:
    rest = {"p95": p50, "graph_p50": p50, "graph_p95": p50, "recall_100": 1.0, "difference": 0.0, "low": 0.0,
            "high": 0.0, "speedup": 1.0, "graph_speedup": 1.0, "retention": 100.0}  # fmt: skip
    return Row(name=name, kind="static", precision=precision, parameters=1, p50=p50, ndcg_10=ndcg, **rest)


def test_the_frontier_is_what_no_other_beats_in_both() -> None:
    rows = [row("full", 2.0, 0.8), row("slow", 3.0, 0.79), row("one", 0.5, 0.78), row("worse", 0.5, 0.7),
            row("table", 0.1, 0.75), row("equal", 2.0, 0.8)]  # fmt: skip
    beaten = {
        a.name
        for a in rows
        for b in rows
        if (b.p50 <= a.p50 and b.ndcg_10 >= a.ndcg_10) and (b.p50 < a.p50 or b.ndcg_10 > a.ndcg_10)
    }
    assert beaten == {"slow", "worse"}
    assert [one.name for one in frontier(rows)] == ["table", "one", "full"], "fastest first; of equals, the first"


def test_the_picture_is_a_png_of_some_size(tmp_path: Path) -> None:
    draw([row("full", 2.0, 0.8), row("full", 1.0, 0.79, "int8"), row("table", 0.1, 0.75)], tmp_path / "front.png", "x")
    content = (tmp_path / "front.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", content[16:24])
    assert (width, height) == (960, 600)


def test_the_command_prints_a_table_or_json_and_draws(folders: dict[str, Path], dataset: Path, tmp_path: Path) -> None:
    common = ["compare", str(folders["student"]), str(dataset), str(folders["table"]), "--timed", "5",
              "--precision", "fp32", "--precision", "fp32"]  # fmt: skip
    done = CliRunner().invoke(main, [*common, "--plot", str(tmp_path / "new" / "front.png")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "new" / "front.png").is_file()
    lines = done.stdout.splitlines()
    assert any(line.startswith("table") and "static" in line for line in lines)
    assert "nDCG@10" in done.stdout
    done = CliRunner().invoke(main, [*common, "--json", "--plot", str(dataset / "corpus.jsonl" / "front.png")])
    assert done.exit_code == 2 and "corpus.jsonl is no folder" in done.stderr and not done.stdout, "before the work"
    done = CliRunner().invoke(main, [*common, "--plot", str(dataset / "corpus.jsonl")])
    assert done.exit_code == 1 and "corpus.jsonl exists already and --plot has not drawn it" in done.stderr
    done = CliRunner().invoke(main, [*common, "--json", "--plot", str(tmp_path / "new" / "front.png")])  # its own
    assert [entry["name"] for entry in json.loads(done.stdout)] == ["full", "table"]
    done = CliRunner().invoke(main, ["compare", str(folders["student"]), str(tmp_path / "no"), str(folders["table"])])
    assert done.exit_code == 1 and "not a folder. Expected a folder with" in done.stderr
    assert CliRunner().invoke(main, ["compare", str(folders["student"]), str(dataset)]).exit_code == 2


def test_an_encoder_of_another_student_is_refused_before_anything_is_exported(
    folders: dict[str, Path], dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = list[Path]()
    monkeypatch.setattr("d2llm.export.compare.export", lambda student, *_, **__: exported.append(student))
    data = RetrievalData.load(dataset, "dev")
    with pytest.raises(MismatchError, match="stranger was aligned to the student"):
        compare(folders["student"], data, [folders["all-layers"], folders["stranger"]])
    assert not exported


def test_a_student_that_finds_nothing_keeps_no_percentage(folders: dict[str, Path], dataset: Path) -> None:
    data = RetrievalData.load(dataset, "dev")
    nothing = replace(data, qrels={query: dict.fromkeys(judged, 0) for query, judged in data.qrels.items()})
    rows = compare(folders["student"], nothing, [folders["table"]], precisions=["fp32"], timed=4)
    assert [(row.ndcg_10, row.retention) for row in rows] == [(0, None), (0, None)]


def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_exported(
    folders: dict[str, Path], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # not installed
    exported = list[Path]()
    monkeypatch.setattr("d2llm.export.compare.export", lambda student, *_, **__: exported.append(student))
    command = ["compare", folders["student"], dataset, folders["table"], "--plot", tmp_path / "front.png"]
    done = CliRunner().invoke(main, list(map(str, command)))
    assert done.exit_code == 1 and "pip install 'd2llm[eval]'" in done.stderr
    assert not exported
