"""The command `d2llm eval`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from d2llm.beir import RetrievalData, read_run, write_run
from d2llm.cli_doctor import EXTRAS
from d2llm.cli_options import (
    RenamedOptions,
    candidates_option,
    device_option,
    echo_json,
    echo_measures,
    echo_table,
    json_option,
    query_encoder_option,
    threads_option,
    typed_options,
)
from d2llm.errors import DataError, OutputExistsError, import_extra
from d2llm.evaluate import (
    EXHAUSTIVE,
    HYBRID_IEM,
    HYBRIDS,
    STAGES,
    Ranking,
    Table,
    evaluate_pairs,
    evaluate_retrieval,
    retention,
    significance,
    tabulate_queries,
    training_sample,
)
from d2llm.files import require_writable, write_lines
from d2llm.metrics import MEASURES
from d2llm.model import EncoderSize, Model, load
from d2llm.pairs import Pair, read_pairs
from d2llm.sessions import Device
from d2llm.types import TASKS, Task


def _runs(ctx: click.Context, parameter: click.Parameter, values: Sequence[str]) -> dict[str, Path]:
    """Parse the --run options into `{NAME: FILE}`."""
    runs: dict[str, Path] = {}
    rows = {_slug(row): row for row in (*STAGES, HYBRID_IEM, *HYBRIDS)}
    for value in values:
        name, _, path = (part.strip() for part in value.partition("="))
        if not (_slug(name) and name.isprintable() and path):
            raise click.BadParameter(f"expected NAME=FILE, with a letter or digit in NAME, found {value!r}")
        if _slug(name) in rows:
            raise click.BadParameter(f"{name!r} is too similar to the row {rows[_slug(name)]!r}: choose another NAME")
        rows[_slug(name)] = name
        runs[name] = Path(path)
    return runs


def _slug(row: str) -> str:
    """Return the name of a row's run file, which is also its tag: `recall-iem` for `recall + IEM`."""
    return re.sub(r"\W+", "-", row).strip("-").lower()


@click.command("eval", cls=RenamedOptions, renamed={"--recall": "--candidates"})
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("dataset", type=click.Path(path_type=Path))
@click.option("--split", default="test", show_default=True, help="Use the judgements in qrels/SPLIT.tsv.")
@candidates_option
@click.option(
    "--stems",
    metavar="LANGUAGE",
    help="Let BM25 compare words by their stems in LANGUAGE, such as english. They help on some data and harm on "
    "other (shell commands), so try both. [default: no stems]",
)
@click.option(
    "--chunk/--no-chunk",
    default=True,
    show_default=True,
    help="Split documents that are longer than the model's limit into passages, as d2llm index does, or cut them.",
)
@click.option(
    "--run",
    "runs",
    metavar="NAME=FILE",
    multiple=True,
    callback=_runs,
    help="Add a row NAME for a ranking by another system: a TREC run file (query-id Q0 document-id rank score tag), "
    "measured to its full depth. May be repeated.",
)
@click.option("--teacher", metavar="NAME", help="Show the nDCG@10 of each row in percent of the nDCG@10 of row NAME.")
@click.option(
    "--baseline",
    metavar="NAME",
    default="recall",
    show_default=True,
    help="Test whether the nDCG@10 of each row differs from the nDCG@10 of row NAME.",
)
@click.option(
    "--save-runs",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write each row as a TREC run file into the folder DIR. The scores are minus the rank.",
)
@click.option(
    "--per-query",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the measures of each query and row into FILE, tab-separated.",
)
@click.option(
    "--threshold-from",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Choose the threshold on the labelled pairs in FILE. [default: the pairs in DATASET]",
)
@click.option(
    "--task",
    type=click.Choice(TASKS),
    help="Branch of the IEM. [default: asymmetric for a BEIR folder, symmetric for pairs]",
)
@query_encoder_option
@device_option
@threads_option
@json_option
def eval_command(
    model: Path,
    dataset: Path,
    task: Task | None,
    query_encoder: EncoderSize | None,
    device: Device,
    threads: int | None,
    as_json: bool,
    threshold_from: Path | None,
    **retrieval: Any,
) -> None:
    """Measure MODEL on DATASET, a BEIR folder or a JSONL file of pairs.

    Use it to see what each stage of a search adds, and to compare models or other systems on the same data.

    A BEIR folder (corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv) gives one row for each stage: BM25, recall alone,
    recall with IEM rescoring, and the IEM over all passages. Four more rows are hybrid searches, which fuse the
    candidates by cosine and by BM25: hybrid + IEM rescores those of RRF; the others have no IEM. RRF and DBSF are
    Qdrant's. cosine + BM25 is a weighted sum; its weight is
    the best one on a sample of the queries in qrels/train.tsv, and the row is left out if there are none.

    A document that is longer than the model's limit is split into passages, as in an index, and ranks where its best
    passage does. --candidates counts passages. BM25's row is of passages too: for BM25 over whole documents, as others
    publish it, take --no-chunk.

    overlap@10 is the share of the exhaustive IEM's top ten that a row has in its own top ten. A table below shows the
    difference of each row to the row --baseline, with its 95 % confidence interval and p-value. A document with the
    query's own id (as in ArguAna) is left out, as BEIR does, unless it is judged relevant.

    Pairs have the fields text_a, text_b, and a score or a label. Scores give Pearson and Spearman correlations. Labels
    (entailment, neutral, contradiction; or 1 and 0) give accuracy, average precision, precision and recall of
    entailment.

    \b
    Measure all stages:
      d2llm eval model/ scifact/
    Compare with a cross-encoder:
      d2llm eval model/ scifact/ --split dev --run "cross-encoder=ce.run" --teacher cross-encoder
    Compare with a hybrid search:
      d2llm eval model/ scifact/ --baseline "cosine + BM25"
    Measure labelled pairs:
      d2llm eval model/ snli/dev.jsonl --threshold-from snli/train.jsonl
    """
    if not dataset.exists():
        raise DataError(f"{dataset}: no such file or folder")
    for module in EXTRAS["eval"]:
        import_extra(module, "eval")  # fail now if it is missing, not after minutes of encoding
    _refuse_options(["threshold_from"] if dataset.is_dir() else list(retrieval), dataset)
    loaded = load(model, device, threads=threads, query_encoder=query_encoder)
    if dataset.is_dir():
        report = _eval_folder(loaded, dataset, task or "asymmetric", as_json, **retrieval)
    else:
        report = _eval_pairs(loaded, dataset, task or "symmetric", as_json, threshold_from)
    if as_json:
        echo_json({"model": str(model), "dataset": str(dataset), **report})


def _refuse_options(names: Sequence[str], dataset: Path) -> None:
    """Raise a usage error if one of the options `names` was given, since they do not apply to `dataset`."""
    if options := typed_options(names):
        raise click.UsageError(
            f"{options[0]} is for {'pairs' if dataset.is_dir() else 'BEIR folders'}, and {dataset} is a "
            f"{'folder' if dataset.is_dir() else 'file'}: leave the option out"
        )


def _eval_folder(
    model: Model,
    folder: Path,
    task: Task,
    as_json: bool,
    *,
    split: str,
    candidates: int,
    stems: str | None,
    chunk: bool,
    runs: Mapping[str, Path],
    teacher: str | None,
    baseline: str,
    save_runs: Path | None,
    per_query: Path | None,
) -> dict[str, Any]:
    data = RetrievalData.load(folder, split)
    training, left_out = _training(folder, data)
    rows = [row for row in (*STAGES, HYBRID_IEM, *HYBRIDS, *runs) if row not in left_out]
    for option, row in (("--teacher", teacher), ("--baseline", baseline)):
        if row is not None and row not in rows:
            reason = left_out.get(row, f"the rows are {', '.join(rows)}")
            raise click.BadParameter(f"no row {row!r}: {reason}", param_hint=option)
    run_files = {row: save_runs / f"{_slug(row)}.run" for row in rows} if save_runs else {}
    for row, path in run_files.items():
        _require_own(path, rf"\S+ Q0 \S+ 1 -1\.0 {re.escape(_slug(row))}", "--save-runs")
    if per_query:
        _require_own(per_query, "\t".join(PER_QUERY), "--per-query")
    others = {name: Ranking.of(read_run(path, data), data.queries) for name, path in runs.items()}
    retrieval = evaluate_retrieval(
        model,
        data,
        candidates=candidates,
        task=task,
        training=training,
        stems=stems,
        others=others,
        progress=not as_json,
        chunk=chunk,
    )
    report = {
        "split": split,
        "query_encoder": model.query_encoder,
        "task": task,
        "candidates": candidates,
        "stems": stems,
        "queries": len(data.queries),
        "documents": len(data.documents),
        "passages": retrieval.passages,
        "judgements": sum(map(len, data.qrels.values())),
        "rows": retrieval.table,
        "left_out": left_out,
        "bm25_weight": retrieval.bm25_weight,
        "training_queries": len(training.queries) if training else 0,
        "baseline": baseline,
        "significance": significance(retrieval.rankings, data, baseline) if len(data.queries) > 1 else None,
        "teacher": teacher,
        "retention": retention(retrieval.table, teacher) if teacher else None,
    }
    if not as_json:
        _show_retrieval(report)
    for row, path in run_files.items():
        write_run(path, retrieval.rankings[row].run(data.queries), _slug(row))
    if per_query:
        _write_per_query(per_query, tabulate_queries(retrieval.rankings, data))
    return report


def _training(folder: Path, data: RetrievalData) -> tuple[RetrievalData | None, dict[str, str]]:
    """Return the training queries, or why a row is left out without them, `{row: reason}`."""
    try:
        return training_sample(folder, data), {}
    except DataError as error:
        return None, {HYBRIDS[-1]: f"its weight needs training queries ({error})"}


PER_QUERY = ["query-id", "row", *MEASURES]
"""The columns of the file that --per-query writes."""


def _require_own(path: Path, first_line: str, option: str) -> None:
    """Refuse a file that cannot be written, or that no earlier run with `option` has written, such as the judgements.

    `first_line` is the pattern of the first line of a file that `option` writes. An empty file is one without results.
    """
    require_writable(path, file=True)
    if path.exists() and path.stat().st_size:
        with open(path, "rb") as file:
            line = file.readline().decode(errors="replace").rstrip("\r\n")
        if not re.fullmatch(first_line, line):
            raise OutputExistsError(f"{path} exists already and {option} has not written it. Choose another name.")


def _write_per_query(path: Path, tables: Mapping[str, Table]) -> None:
    lines = ["\t".join(PER_QUERY)]
    for query, table in tables.items():
        lines += [
            "\t".join([query, name, *(f"{value:.6f}" for value in values.values())]) for name, values in table.items()
        ]
    write_lines(path, lines)


def _in_passages(report: Mapping[str, Any]) -> str:
    return "" if report["passages"] == report["documents"] else f" in {report['passages']} passages"


def _show_retrieval(report: Mapping[str, Any]) -> None:
    rows, retained = report["rows"], report["retention"]
    click.echo(
        f"{report['queries']} queries with {report['judgements']} judgements ({report['split']}), "
        f"{report['documents']} documents{_in_passages(report)}; candidates={report['candidates']}, "
        f"{report['task']} branch, {report['query_encoder']} query encoder, BM25 with {report['stems'] or 'no'} stems\n"
    )
    measures = list(rows[EXHAUSTIVE])
    cells = [[name, *(f"{values[measure]:.4f}" for measure in measures)] for name, values in rows.items()]
    if retained:
        cells = [[*row, f"{retained[row[0]]:.1f} %"] for row in cells]
    echo_table(cells, header=["", *measures, *(["retention"] if retained else [])])
    click.echo(f"\noverlap@10: share of the top ten of {EXHAUSTIVE} that the row has in its own top ten")
    if report["bm25_weight"] is not None:
        click.echo(
            f"{HYBRIDS[-1]}: BM25 has the weight {report['bm25_weight']:g}, which has the highest nDCG@10 on "
            f"{report['training_queries']} training queries"
        )
    for row, reason in report["left_out"].items():
        click.echo(f"{row} is left out: {reason}")
    if retained:
        click.echo(f"retention: nDCG@10 in percent of the nDCG@10 of {report['teacher']}")
    if report["significance"] is None:
        click.echo("There is one query. A significance test needs at least two.")
        return
    click.echo("")
    echo_table(
        [
            [name, f"{test['difference']:+.4f}", f"{test['low']:+.4f} to {test['high']:+.4f}", f"{test['p']:.4f}"]
            for name, test in report["significance"].items()
        ],
        header=[f"nDCG@10 against {report['baseline']}", "difference", "95 % interval", "p"],
    )
    click.echo(
        "\np: two-sided paired randomisation test over the queries, not corrected for the number of rows (Smucker et "
        "al. 2007); interval: bootstrap"
    )


def _eval_pairs(model: Model, path: Path, task: Task, as_json: bool, threshold_from: Path | None) -> dict[str, Any]:
    pairs = _labelled(path) if threshold_from else read_pairs(path)
    threshold_pairs = _labelled(threshold_from) if threshold_from else None
    table = evaluate_pairs(model, pairs, task, threshold_pairs=threshold_pairs)
    report: dict[str, Any] = {
        "query_encoder": model.query_encoder,
        "task": task,
        "pairs": len(pairs),
        "rows": table,
    }
    if labelled := pairs[0].label is not None:
        report |= {"entailment": sum(bool(pair.label) for pair in pairs), "threshold_from": str(threshold_from or path)}
    if not as_json:
        positives = f", {report['entailment']} with entailment" if labelled else ""
        click.echo(f"{len(pairs)} pairs{positives}; {task} branch, {model.query_encoder} query encoder\n")
        echo_measures(table)
    if labelled and not as_json:
        share = report["entailment"] / len(pairs)
        source = (
            f"the {len(threshold_pairs)} pairs of {threshold_from}"
            if threshold_pairs
            else "the measured pairs themselves, so the accuracy is an upper bound (use other pairs: --threshold-from)"
        )
        click.echo(f"\nAccuracy of giving all pairs the more frequent label: {max(share, 1 - share):.4f}")
        click.echo(f"threshold: scores at or above it mean entailment. It has the highest accuracy on {source}.")
    return report


def _labelled(path: Path) -> list[Pair]:
    pairs = read_pairs(path)
    if pairs[0].label is None:
        raise DataError(f"{path}: these pairs have scores, and --threshold-from is for pairs with labels")
    return pairs
