"""The command `d2llm tune` and its output."""

from __future__ import annotations

import math
import random
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from d2llm.beir import read_qrels
from d2llm.cli_options import (
    RenamedOptions,
    candidates_option,
    device_option,
    echo_json,
    echo_table,
    finite,
    json_option,
    threads_option,
)
from d2llm.corpus import read_queries, read_query_log
from d2llm.errors import DataError
from d2llm.folder import read_config
from d2llm.metrics import Qrels
from d2llm.model import EncoderSize, load
from d2llm.sessions import Device
from d2llm.types import Embeddings

from .cli_calibrate import CALIBRATING, calibrate_collection, reset_scales
from .cli_options import collection_option, place_option, reached_by, search_words
from .place import Qdrant
from .schema import HNSW_MIN_KB
from .tune import (
    DEPTH,
    Bm25Table,
    EffortTable,
    OverfetchTable,
    Tuning,
    measure_bm25,
    measure_effort,
    measure_overfetch,
)

SAMPLE = 200
"""Queries that are measured by default."""


@click.command("tune", cls=RenamedOptions, renamed={"--recall": "--candidates"})
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--queries", "source", metavar="FILE", type=click.Path(path_type=Path),
              help="Queries as your users type them: a text file with one per line, JSONL with `text` (with --qrels "
                   "`_id` too), or a BEIR folder. Required without --calibrate.")  # fmt: skip
@click.option("--qrels", metavar="FILE", type=click.Path(path_type=Path),
              help="Judgements of these queries (BEIR's three columns or TREC's four), to suggest the weight of "
                   "BM25 in hybrid searches, or to calibrate.")  # fmt: skip
@click.option("--calibrate", "calibrating", is_flag=True,
              help="Measure nothing else: weigh the parts of the IEM's score for this collection, and store the "
                   "weights in it if they are better.")  # fmt: skip
@click.option("--reset", is_flag=True,
              help="With --calibrate: remove the stored weights. Searches use the model's again.")  # fmt: skip
@place_option
@collection_option
@device_option
@threads_option
@candidates_option
@click.option("--target", default=0.99, show_default=True, metavar="SHARE", callback=finite,
              type=click.FloatRange(0, 1, min_open=True),
              help="Share to find: of the exact nearest passages, and of the full encoder's hits.")  # fmt: skip
@click.option("--sample", type=click.IntRange(1), metavar="N",
              help=f"Use N random queries, the same each time. [default: {SAMPLE}; {CALIBRATING} with --calibrate, of "
                   "each kind of pseudo-queries]")  # fmt: skip
@json_option
def tune_command(
    model: Path, source: Path | None, qrels: Path | None, calibrating: bool, reset: bool, qdrant: Qdrant,
    collection: str, device: Device, threads: int | None, candidates: int, target: float, sample: int | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Measure recall against latency in a collection, and suggest search options.

    In a large collection, Qdrant does not compare all passages. It walks a graph (HNSW) to the nearest ones, and misses
    some. How many it misses depends on the vectors and on hnsw_ef, the number of nodes that it keeps in view. This
    command searches with several values of hnsw_ef and exactly, and suggests the smallest value whose recall reaches
    --target. It changes nothing in the collection.

    If the model has a small query encoder (d2llm-export onnx --query-encoder), both encoders are measured. The small
    encoder finds other candidates than the full one. A second table shows how many candidates it must fetch to include
    the full encoder's top 10.

    With --qrels, and in a collection with BM25 (d2llm index --hybrid), it also suggests the weight of BM25 beside the
    IEM in hybrid searches. A low weight is best where the model was trained on similar data, a higher one elsewhere.
    Only judged queries are used then. Give it hundreds (--sample), and keep those that you test with apart.

    With --calibrate, it weighs the parts of the IEM's score for the collection (docs/collections.md): the words of both
    texts and their vectors, beside the cosine. Weights are chosen by one half of the queries and tested on the other
    half. They are stored only if they are surely better, and searches that are opened later use them. The queries are
    the judged ones of --queries and --qrels (20 or more), or without them pseudo-queries that are made of the passages.

    Run it when the collection is loaded, and again when it has grown several times; on the machine that serves; with
    queries of your users, since those of a test set may be easier.

    \b
    d2llm tune MODEL --queries queries.jsonl --qdrant ./qdrant --collection kb
    d2llm tune MODEL --queries queries.jsonl --qdrant http://localhost:6333 --collection kb --target 0.95
    d2llm tune MODEL --queries queries.jsonl --qrels dev.tsv --sample 1000 --qdrant ./qdrant --collection kb
    d2llm tune MODEL --calibrate --qdrant ./qdrant --collection kb
    d2llm tune MODEL --calibrate --queries queries.jsonl --qrels dev.tsv --qdrant ./qdrant --collection kb
    """
    _check_options(source, qrels, calibrating, reset)
    if reset:
        reset_scales(qdrant, collection, as_json)
        return
    judged = None if qrels is None else read_qrels(qrels)
    number = sample or (CALIBRATING if calibrating else SAMPLE)
    chosen = {} if source is None else _choose(source, qrels, judged, number)
    if calibrating:
        calibrate_collection(
            model, qdrant, collection, None if judged is None else (chosen, judged), as_json,
            most=number, candidates=candidates, device=device, threads=threads,
        )  # fmt: skip
        return
    texts = list(chosen.values())
    config = read_config(model)
    shown: dict[str, Any] = {"progress": not as_json}
    with qdrant.index(collection) as index:
        index.open_for(config, create=False)  # raises for another model before the work begins
        info, graph = index.info(), index.has_graph()
        passages, vector_bytes = info.passages, info.metadata.vector_bytes
        loaded = load(model, device, threads=threads, query_encoder="full")
        queries: dict[EncoderSize, Embeddings] = {"full": loaded.encode_query(texts, **shown)}
        default: EncoderSize = "full"
        if config.query_encoder:  # the encoder that searches then use by default
            loaded, default = load(model, device, threads=threads, query_encoder="small"), "small"
            queries["small"] = loaded.encode_query(texts, **shown)
        bm25 = overfetch = None
        if judged is not None:
            bm25 = measure_bm25(index, loaded, chosen, queries[default], judged, candidates, **shown)
        efforts = {
            encoder: measure_effort(index, embeddings.vectors, candidates, **shown)
            for encoder, embeddings in queries.items()
        }
        if "small" in efforts:
            hnsw_ef = efforts["small"].cheapest(target).hnsw_ef if graph else None
            overfetch = measure_overfetch(
                index, loaded, queries["full"], queries["small"], candidates, hnsw_ef=hnsw_ef, **shown
            )
    tuning = Tuning(passages, graph, len(texts), candidates, target, efforts, overfetch, bm25)
    if as_json:
        suggestions: dict[str, Any] = {encoder: asdict(tuning.suggest(encoder)) for encoder in efforts}
        if bm25:
            suggestions["bm25_weight"] = bm25.suggestion
        echo_json({"model": str(model), "collection": collection, **asdict(tuning), "suggestions": suggestions})
        return
    show_tuning(tuning, vector_bytes)
    for encoder in efforts:
        _show_lines(tuning, encoder, model, qdrant, collection)
    if bm25 and bm25.suggestion is not None:
        click.echo("\nFor hybrid searches, together with the above:")
        more = ["--candidates", str(candidates), "--hybrid", "--bm25-weight", str(bm25.suggestion)]
        click.echo(f"  {shlex.join(search_words(model, qdrant, collection, *more))}")
        click.echo(
            f'  Searcher(..., bm25_weight={bm25.suggestion}).search(query, candidates={candidates}, hybrid="rrf")'
        )


def _check_options(source: Path | None, qrels: Path | None, calibrating: bool, reset: bool) -> None:
    if reset and not calibrating:
        raise click.UsageError("--reset is for --calibrate: give both")
    if source is None and not calibrating:
        raise click.UsageError("Missing option '--queries'.")
    if reset and (source or qrels):
        raise click.UsageError("--reset needs no queries: leave --queries and --qrels out")
    if calibrating and (source is None) != (qrels is None):
        raise click.UsageError(
            "--calibrate takes judged queries, --queries with --qrels; or neither, for pseudo-queries of the passages"
        )


def _choose(source: Path, qrels: Path | None, judged: Qrels | None, sample: int) -> dict[str, str]:
    """A random `sample` of the queries, `{id: text}`; only judged ones if there are judgements."""
    if judged is None:
        queries = {str(number): text for number, text in enumerate(read_query_log(source))}
        ids = list(queries)
    else:
        queries = {id_: text for id_, text in read_queries(source, keep_empty=True).items() if text.strip()}
        ids = [id_ for id_ in queries if any(grade > 0 for grade in judged.get(id_, {}).values())]
    if not ids:
        raise DataError(
            f"{qrels} has a relevant document for none of the {len(queries)} queries of {source}: do their ids agree, "
            "and are scores above 0?"
        )
    return {id_: queries[id_] for id_ in random.Random(0).sample(ids, min(sample, len(ids)))}


def show_tuning(tuning: Tuning, vector_bytes: int) -> None:
    """Print a table for each query encoder, for over-fetching and for the weight of BM25, and what each one means."""
    click.echo(
        f"{tuning.passages:,} passages, {tuning.queries} queries, the nearest {tuning.candidates}; "
        f"target {tuning.target}"
    )
    if note := _why_nothing_to_tune(tuning, vector_bytes):
        click.echo(note)
    for encoder, table in tuning.efforts.items():
        click.echo(f"\n{encoder.capitalize()} query encoder")
        echo_table(
            [
                *([f"{row.hnsw_ef}{' (default)' * (row is table.of_default)}", f"{row.recall:.4f}", f"{row.worst:.4f}",
                   f"{row.ms.p50:.2f}", f"{row.ms.p95:.2f}"] for row in table.figures),
                ["exact search", "1.0000", "1.0000", f"{table.exact_ms.p50:.2f}", f"{table.exact_ms.p95:.2f}"],
            ],
            header=["hnsw_ef", "recall", "worst 5 %", "ms p50", "ms p95"],
        )  # fmt: skip
        if tuning.graph:
            click.echo(_effort_in_words(table, tuning.target))
    if tuning.overfetch:
        click.echo(f"\nThe full encoder's top {DEPTH} and the small encoder's candidates")
        echo_table(
            [
                [str(row.candidates), f"{row.held:.4f}", f"{row.overlap:.4f}", f"{row.ms.p50:.2f}", f"{row.ms.p95:.2f}"]
                for row in tuning.overfetch.figures
            ],
            header=["candidates", "held", f"overlap@{DEPTH}", "ms p50", "ms p95"],
        )
        click.echo(_overfetch_in_words(tuning.overfetch, tuning.target))
    if tuning.bm25:
        click.echo(f"\nHybrid searches, and what BM25 counts beside the IEM: {tuning.bm25.queries} judged queries")
        echo_table(
            [
                [f"{row.weight}{' (default)' * (row.weight == tuning.bm25.default)}", f"{row.ndcg_10:.4f}",
                 f"{row.difference:+.4f}", f"{row.low:+.4f}", f"{row.high:+.4f}"]
                for row in tuning.bm25.figures
            ],
            header=["bm25_weight", f"nDCG@{DEPTH}", "difference", "low", "high"],
        )  # fmt: skip
        click.echo(_weight_in_words(tuning.bm25))
    click.echo(
        "\nrecall: the share found of the nearest passages by exact search; worst 5 %: its 5 % quantile over the "
        "queries. ms: of recall" + (" (and, in the last table, rescoring)." if tuning.overfetch else ".")
    )


def _why_nothing_to_tune(tuning: Tuning, vector_bytes: int) -> str:
    if tuning.passages <= tuning.candidates:
        return (
            "Every search fetches all of them, whatever hnsw_ef is. Lower --candidates, or tune when there are more "
            "passages."
        )
    if tuning.graph:
        return ""
    least = math.ceil(HNSW_MIN_KB * 1024 / vector_bytes)
    if tuning.passages < least:
        return (
            f"There is no graph yet, and hnsw_ef changes nothing: Qdrant makes one from {least:,} passages of this "
            "width on (10 MB of vectors in a segment), and compares all until then. Tune again when there are more."
        )
    return (
        "There are enough passages for a graph, but none is built, and hnsw_ef changes nothing: all are compared. "
        "Build it with QdrantIndex.optimize(), or wait until the server has, and tune again."
    )


def _effort_in_words(table: EffortTable, target: float) -> str:
    best, default = table.cheapest(target), table.of_default
    cost = f"recall {best.recall:.4f} in {best.ms.p50:.2f} ms (p50)"
    if best is not default:
        cost += f", {best.ms.p50 - default.ms.p50:+.2f} ms against the default"
    if best.recall < target:
        return (
            f"No hnsw_ef here reaches {target}. The best is {best.hnsw_ef}: {cost}. Exact search takes "
            f"{table.exact_ms.p50:.2f} ms."
        )
    if best is default:
        return f"The default, {best.hnsw_ef}, is the smallest here that reaches {target}: {cost}. Nothing to set."
    return f"{best.hnsw_ef} is the smallest hnsw_ef here that reaches {target}: {cost}."


def _overfetch_in_words(table: OverfetchTable, target: float) -> str:
    best, first = table.cheapest(target), table.figures[0]
    figures = (
        f"{best.candidates} hold {best.held:.4f} of the full encoder's top {DEPTH}, in {best.ms.p50:.2f} ms (p50) for "
        "recall and rescoring"
    )
    if best is not first:
        figures += f", {best.ms.p50 - first.ms.p50:+.2f} ms against {first.candidates}"
    if best.held < target:
        return f"No number of candidates here reaches {target}. The best: {figures}."
    return f"The fewest candidates here that reach {target}: {figures}."


def _weight_in_words(table: Bm25Table) -> str:
    best = table.best
    if best.weight == table.default:
        return f"The default, {table.default}, is the best here. Nothing to set."
    interval = f"(95 % interval {best.low:+.4f} to {best.high:+.4f})"
    figures = f"{best.weight} is the best here, by {best.difference:+.4f} {interval}"
    if table.suggestion is None:
        return f"{figures}: that may be chance. Nothing to set, or more queries to judge."
    return f"{figures}."


def _show_lines(tuning: Tuning, encoder: EncoderSize, model: Path, qdrant: Qdrant, collection: str) -> None:
    """Print the suggested command and call, unless they equal the defaults."""
    suggestion = tuning.suggest(encoder)
    chosen = {} if suggestion.hnsw_ef is None else {"hnsw_ef": suggestion.hnsw_ef}
    if not chosen and suggestion.candidates == tuning.candidates:
        return
    full = encoder == "full" and tuning.overfetch is not None  # without it, the small one is taken
    click.echo(f"\nFor the {encoder} query encoder" + (":" if suggestion.reached else ", the best that there is:"))
    more = ["--candidates", str(suggestion.candidates)]
    more += ["--hnsw-ef", str(suggestion.hnsw_ef)] if chosen else []
    more += ["--query-encoder", "full"] * full
    click.echo(f"  {shlex.join(search_words(model, qdrant, collection, *more))}")
    encoder_chosen = {"query_encoder": "full"} if full else {}
    click.echo(
        f"  Searcher({_call('d2llm.load', str(model), **encoder_chosen)}, "
        f"{_call('QdrantIndex', collection, str(qdrant), **reached_by(qdrant), **chosen)}).search("
        f"query, candidates={suggestion.candidates})"
    )


def _call(function: str, *values: Any, **named: Any) -> str:
    """A call in Python."""
    return f"{function}({', '.join([*map(repr, values), *(f'{name}={value!r}' for name, value in named.items())])})"
