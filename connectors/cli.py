"""The commands `d2llm index`, `d2llm search` and `d2llm tune`."""

from __future__ import annotations

import json
import math
import random
import textwrap
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from d2llm.cli import echo_json, echo_table, query_encoder_option
from d2llm.data import corpus_file, read_documents, read_queries
from d2llm.errors import DataError
from d2llm.folder import read_config
from d2llm.model import QueryEncoder, load
from d2llm.search import Explanation, Searcher
from d2llm.sessions import Device
from d2llm.types import TASKS, Task

from .engine import HNSW_MIN_KB
from .qdrant import QdrantIndex
from .tune import DEPTH, EffortTable, OverfetchTable, Tuning, measure_effort, measure_overfetch


def _shared(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--threads", type=click.IntRange(1), help="CPU threads. [default: one a core]"),
        click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True),
        click.option("--api-key", envvar="QDRANT_API_KEY", help="Of a Qdrant server. [env: QDRANT_API_KEY]"),
        click.option("--collection", required=True, help="Name of the collection."),
        click.option("--qdrant", "location", required=True, metavar="PATH_OR_URL",
                     help="A folder (embedded Qdrant) or the http(s):// address of a server."),
    ):  # fmt: skip
        command = option(command)
    return command


@click.command("index")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("corpus", type=click.Path(path_type=Path))
@_shared
@click.option("--on-error", type=click.Choice(["stop", "skip"]), default="stop", show_default=True,
              help="What to do about a broken line or a bad document.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="The counts as one line of JSON on stdout.")
def index_command(
    model: Path, corpus: Path, location: str, collection: str, api_key: str | None, device: Device, threads: int | None,
    on_error: str, as_json: bool,
) -> None:  # fmt: skip
    """Encode CORPUS with MODEL into a Qdrant collection.

    CORPUS is a JSONL file with `_id` (or `id`), `text`, optionally `title`, and any other fields, which come back with
    each hit and can be filtered on; or a BEIR folder. The whole file is checked before anything is encoded. What is in
    the collection unchanged is left alone: after Ctrl-C or a crash, run the same command again.
    """
    rejected: list[str] = []
    on_reject = (lambda error: rejected.append(str(error))) if on_error == "skip" else None
    total = sum(1 for _ in read_documents(corpus, on_reject))
    if not total:
        raise DataError(f"{corpus_file(corpus)}: no documents" + (f" ({len(rejected)} skipped)" if rejected else ""))
    for message in rejected[:10]:
        click.echo(f"skipped {message}", err=True)
    if len(rejected) > 10:
        click.echo(f"... and {len(rejected) - 10} more", err=True)
    loaded = load(model, device, threads=threads, query_encoder="full")
    with QdrantIndex(collection, location, api_key=api_key) as index:
        documents = read_documents(corpus, (lambda _: None) if on_reject else None)
        try:
            report = index.add(loaded, documents, progress=not as_json, total=total)
        except KeyboardInterrupt:
            click.echo(
                f"\nInterrupted. {index.count()} documents are stored; run the same command again to go on.", err=True
            )
            raise click.exceptions.Exit(130) from None
        if report.added:
            index.optimize()
        stored = index.count()
    if as_json:
        echo_json({**asdict(report), "skipped": len(rejected), "stored": stored})
        return
    limit = loaded.config.document_max_length
    click.echo(
        f"{total} documents: {report.added} stored, {report.unchanged} unchanged, {len(rejected)} skipped; "
        f"{report.truncated} were longer than {limit} tokens and cut. The collection holds {stored}."
    )
    click.echo(f'Next: d2llm search {model} "your question" --qdrant {location} --collection {collection}')


@click.command("search")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("query")
@_shared
@click.option("--k", default=10, show_default=True, type=click.IntRange(1), help="Hits to show.")
@click.option("--recall", default=100, show_default=True, type=click.IntRange(1), help="Candidates the IEM rescores.")
@click.option("--hnsw-ef", type=click.IntRange(1), metavar="N",
              help="Nodes of the HNSW graph kept in view: more find more and take longer; `d2llm tune` says how many. "
                   "[default: 4 times --recall, at least 128]")  # fmt: skip
@click.option("--filter", "conditions", multiple=True, metavar="KEY=VALUE",
              help='Only documents whose field has this value, or JSON: {"year": {"gte": 2020}}.')  # fmt: skip
@click.option("--task", type=click.Choice(TASKS), default="asymmetric", show_default=True, help="IEM branch.")
@click.option("--no-rescore", is_flag=True, help="Order by recall alone.")
@query_encoder_option
@click.option(
    "--explain",
    is_flag=True,
    help="The time of each stage; for each hit its rank and score before and after rescoring.",
)
@click.option("--json", "as_json", is_flag=True, help="The hits (and the explanation) as one line of JSON.")
def search_command(
    model: Path, query: str, location: str, collection: str, api_key: str | None, device: Device, threads: int | None,
    k: int, recall: int, hnsw_ef: int | None, conditions: tuple[str, ...], task: Task, no_rescore: bool,
    query_encoder: QueryEncoder | None, explain: bool, as_json: bool,
) -> None:  # fmt: skip
    """Search a collection for QUERY: the nearest passages by cosine, reordered by the IEM."""
    if k > recall:
        raise click.BadParameter(f"{k} hits cannot come from {recall} candidates: raise --recall", param_hint="--k")
    loaded = load(model, device, threads=threads, query_encoder=query_encoder)
    with QdrantIndex(collection, location, hnsw_ef=hnsw_ef, api_key=api_key) as index:
        searcher = Searcher(loaded, index)
        if explain:  # the first call pays for opening the collection and warming up
            searcher.search(query, k, recall=recall, task=task)
        found = searcher.explain(
            query, k, recall=recall, filter=parse_filter(conditions), task=task, rescore=not no_rescore
        )
    if found.truncated:
        click.echo(f"the query is longer than {loaded.config.query_max_length} tokens and was cut", err=True)
    if as_json:
        stages = {"seconds": found.seconds, "candidates": found.candidates} if explain else {}
        echo_json({"query": query, "hits": [asdict(hit) for hit in found.hits], **stages})
    else:
        show(found, stages=explain)


def show(found: Explanation, *, stages: bool = False, width: int = 100) -> None:
    """Print hits for people: score, id, the rank and cosine they had in recall, the start of the text; with `stages`
    also the time that each stage took."""
    if not found.hits:
        click.echo("Nothing passes the filter.")
        return
    for rank, hit in enumerate(found.hits, 1):
        click.echo(
            f"{rank:>3}. {hit.score:7.3f}  {hit.id}  (recall: rank {hit.recall_rank}, cosine {hit.recall_score:.3f})"
        )
        text = " ".join(f"{hit.payload.get('title', '')} {hit.payload.get('text', '')}".split())
        click.echo(f"     {textwrap.shorten(text, width, placeholder=' ...')}")
    if stages:
        click.echo(f"\n{found.candidates} candidates, milliseconds by stage (second of two runs):")
        rows = [[stage, f"{seconds * 1e3:.2f}"] for stage, seconds in found.seconds.items()]
        echo_table([*rows, ["whole", f"{sum(found.seconds.values()) * 1e3:.2f}"]], header=["stage", "ms"])


def parse_filter(conditions: tuple[str, ...]) -> dict[str, Any]:
    """`key=value` pairs (values read as JSON where they are JSON, else as text) and JSON objects, as one filter."""
    merged: dict[str, Any] = {}
    for text in conditions:
        if text.lstrip().startswith("{"):
            try:
                merged.update(json.loads(text))
            except ValueError as error:
                raise click.BadParameter(f"{text}: not valid JSON ({error})", param_hint="--filter") from error
            continue
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{text}: expected KEY=VALUE or a JSON object", param_hint="--filter")
        try:
            merged[key] = json.loads(value)
        except ValueError:
            merged[key] = value
    return merged


@click.command("tune")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--queries", "source", required=True, metavar="FILE", type=click.Path(path_type=Path),
              help="JSONL with `_id` (or `id`) and `text`: queries as your users type them.")  # fmt: skip
@_shared
@click.option("--recall", default=100, show_default=True, type=click.IntRange(1), help="Candidates of your searches.")
@click.option("--target", default=0.99, show_default=True, type=click.FloatRange(0, 1, min_open=True),
              help="The share that is to be found: of the nearest passages; of the full encoder's hits.")  # fmt: skip
@click.option("--sample", default=200, show_default=True, type=click.IntRange(1), metavar="N",
              help="Use N of the queries, drawn at random, each time the same.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="All figures as one line of JSON on stdout.")
def tune_command(
    model: Path, location: str, collection: str, api_key: str | None, device: Device, threads: int | None,
    source: Path, recall: int, target: float, sample: int, as_json: bool,
) -> None:  # fmt: skip
    """Measure how hard a collection must be searched with MODEL, and say what to set.

    In a large collection Qdrant walks a graph (HNSW) to the nearest passages instead of comparing them all, and misses
    some. How many depends on the vectors and on hnsw_ef, the nodes that it keeps in view. This searches with several
    values and exactly, and names the smallest one whose recall reaches --target. Nothing in the collection changes.

    A model with a small query encoder (d2llm-export onnx --query-encoder) is measured with both encoders. The small
    one's vectors lie somewhat beside the passages', which makes them harder to find neighbours for, and its candidates
    are others: the second table says how many it must fetch to hold the full one's top 10.

    Run it when a collection is loaded and whenever it has grown several times, on the machine that serves, with queries
    of your users: those of a test set may be easier.

    \b
    d2llm tune MODEL --queries queries.jsonl --qdrant ./qdrant --collection kb
    d2llm tune MODEL --queries queries.jsonl --qdrant http://localhost:6333 --collection kb --recall 50 --target 0.95
    """
    texts = list(read_queries(source).values())
    if not texts:
        raise DataError(f"{source}: no queries")
    texts = random.Random(0).sample(texts, min(sample, len(texts)))
    config = read_config(model)
    encoders: list[QueryEncoder] = ["full", "small"] if config.query_encoder else ["full"]
    queries, efforts, overfetch = {}, {}, None
    index = QdrantIndex(collection, location, api_key=api_key)
    with index:
        index.open_for(config, create=False)  # what does not belong together is said before the work
        passages, graph = index.count(), index.has_graph()
        for encoder in encoders:
            loaded = load(model, device, threads=threads, query_encoder=encoder)
            queries[encoder] = loaded.encode_query(texts, progress=not as_json)
            efforts[encoder] = measure_effort(index, queries[encoder].vectors, recall, progress=not as_json)
        if "small" in efforts:
            overfetch = measure_overfetch(
                index, loaded, queries["full"], queries["small"], recall, progress=not as_json,
                hnsw_ef=efforts["small"].cheapest(target).hnsw_ef if graph else None,
            )  # fmt: skip
    tuning = Tuning(passages, graph, len(texts), recall, target, efforts, overfetch)
    if as_json:
        suggestions = {encoder: asdict(tuning.suggest(encoder)) for encoder in encoders}
        echo_json({"model": str(model), "collection": collection, **asdict(tuning), "suggestions": suggestions})
        return
    show_tuning(tuning, config.embedding_dim)
    for encoder in encoders:
        _show_lines(tuning, encoder, model, location, collection)


def show_tuning(tuning: Tuning, embedding_dim: int) -> None:
    """Print, for each query encoder and for the small one's over-fetching, a table and in a sentence what it says."""
    click.echo(
        f"{tuning.passages:,} passages, {tuning.queries} queries, the nearest {tuning.recall}; target {tuning.target}"
    )
    if note := _why_nothing_to_tune(tuning, embedding_dim):
        click.echo(note)
    for encoder, table in tuning.efforts.items():
        click.echo(f"\n{encoder.capitalize()} query encoder")
        echo_table(
            [
                *([f"{one.hnsw_ef}{' (default)' * (one is table.of_default)}", f"{one.recall:.4f}", f"{one.worst:.4f}",
                   f"{one.ms.p50:.2f}", f"{one.ms.p95:.2f}"] for one in table.figures),
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
                [str(one.candidates), f"{one.held:.4f}", f"{one.overlap:.4f}", f"{one.ms.p50:.2f}", f"{one.ms.p95:.2f}"]
                for one in tuning.overfetch.figures
            ],
            header=["candidates", "held", f"overlap@{DEPTH}", "ms p50", "ms p95"],
        )
        click.echo(_overfetch_in_words(tuning.overfetch, tuning.target))
    click.echo(
        "\nrecall: the share found of the nearest passages by exact search; worst 5 %: its 5 % quantile over the "
        "queries. ms: of recall" + (" (and, in the last table, rescoring)." if tuning.overfetch else ".")
    )


def _why_nothing_to_tune(tuning: Tuning, embedding_dim: int) -> str:
    if tuning.passages <= tuning.recall:
        return (
            "That is no more than is asked for: every search returns all passages, whatever is set. Lower --recall, or "
            "tune when there are more."
        )
    if tuning.graph:
        return ""
    least = math.ceil(HNSW_MIN_KB * 1024 / (4 * embedding_dim))
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


def _show_lines(tuning: Tuning, encoder: QueryEncoder, model: Path, location: str, collection: str) -> None:
    """Print what to type, unless it is what one types anyway."""
    suggestion = tuning.suggest(encoder)
    chosen = "" if suggestion.hnsw_ef is None else f", hnsw_ef={suggestion.hnsw_ef}"
    if not chosen and suggestion.recall == tuning.recall:
        return
    full = encoder == "full" and tuning.overfetch is not None  # without it, the small one is taken
    click.echo(f"\nFor the {encoder} query encoder" + (":" if suggestion.reached else ", the best that there is:"))
    flags = "" if suggestion.hnsw_ef is None else f" --hnsw-ef {suggestion.hnsw_ef}"
    flags += " --query-encoder full" * full
    click.echo(
        f'  d2llm search {model} "your question" --qdrant {location} --collection {collection} '
        f"--recall {suggestion.recall}{flags}"
    )
    other = ', query_encoder="full"' * full
    click.echo(
        f'  Searcher(d2llm.load("{model}"{other}), QdrantIndex("{collection}", "{location}"{chosen})).search('
        f"query, recall={suggestion.recall})"
    )
