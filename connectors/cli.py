"""The commands `d2llm index` and `d2llm search`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from d2llm.cli import echo_json, echo_table
from d2llm.data import corpus_file, read_documents
from d2llm.errors import DataError
from d2llm.model import load
from d2llm.search import Explanation, Searcher
from d2llm.types import TASKS, Task

from .qdrant import QdrantIndex


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
    model: Path, corpus: Path, location: str, collection: str, api_key: str | None, device: str, threads: int | None,
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
    loaded = load(model, device, threads=threads)  # type: ignore[arg-type]  # click's choice
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
@click.option("--filter", "conditions", multiple=True, metavar="KEY=VALUE",
              help='Only documents whose field has this value, or JSON: {"year": {"gte": 2020}}.')  # fmt: skip
@click.option("--task", type=click.Choice(TASKS), default="asymmetric", show_default=True, help="IEM branch.")
@click.option("--no-rescore", is_flag=True, help="Order by recall alone.")
@click.option(
    "--explain",
    is_flag=True,
    help="The time of each stage; for each hit its rank and score before and after rescoring.",
)
@click.option("--json", "as_json", is_flag=True, help="The hits (and the explanation) as one line of JSON.")
def search_command(
    model: Path, query: str, location: str, collection: str, api_key: str | None, device: str, threads: int | None,
    k: int, recall: int, conditions: tuple[str, ...], task: Task, no_rescore: bool, explain: bool, as_json: bool,
) -> None:  # fmt: skip
    """Search a collection for QUERY: the nearest passages by cosine, reordered by the IEM."""
    if k > recall:
        raise click.BadParameter(f"{k} hits cannot come from {recall} candidates: raise --recall", param_hint="--k")
    loaded = load(model, device, threads=threads)  # type: ignore[arg-type]  # click's choice
    with QdrantIndex(collection, location, api_key=api_key) as index:
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
