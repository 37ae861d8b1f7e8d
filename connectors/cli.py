"""The commands `d2llm index` and `d2llm search`."""

from __future__ import annotations

import functools
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import click

from d2llm.bad_rows import OnError
from d2llm.beir import run_lines
from d2llm.cli_options import (
    TEXT,
    RenamedOptions,
    candidates_option,
    device_option,
    echo_json,
    echo_next,
    echo_table,
    finite,
    json_option,
    query_encoder_option,
    shorten,
    task_option,
    threads_option,
)
from d2llm.corpus import read_queries
from d2llm.errors import DataError
from d2llm.filters import why_nothing_passes
from d2llm.folder import ModelConfig, read_config
from d2llm.indexing import AddReport
from d2llm.model import EncoderSize, load
from d2llm.payload import title_of
from d2llm.search import BM25_WEIGHT, MAX_BM25_WEIGHT, Explanation, Searcher
from d2llm.sessions import Device
from d2llm.types import Fusion, Task

from .cli_corpus import JOB_PATIENCE, Corpus, Rejects, corpus_options, some, survey
from .cli_options import (
    collection_option,
    hybrid_options,
    name_given_once,
    parse_filter,
    payload_type,
    place_option,
    search_words,
)
from .distributed import add_on_ray, require_shared
from .place import Qdrant
from .qdrant import QdrantIndex
from .schema import MOST, Datatype, PayloadType, Quantization

AT_A_TIME = 512
"""Queries of a file that are searched at a time. Their hits are then printed."""
WORD_TOKENS = 2
"""Tokens for each word of English that is no stop word, roughly."""


@click.command("index")
@click.argument("model", type=click.Path(path_type=Path))
@place_option
@corpus_options
@click.option("--collection", multiple=True, metavar="NAME", callback=name_given_once,
              help="Name of the collection. It is made if it does not exist.")  # fmt: skip
@click.option("--alias", multiple=True, metavar="ALIAS", callback=name_given_once,
              help="Build a new collection (ALIAS-1, ALIAS-2, ...) beside the one that has the alias, with the same "
                   "options. When it is complete, give it the alias and drop the former one.")  # fmt: skip
@click.option("--chunk/--no-chunk", default=True, show_default=True,
              help="Split documents that are longer than the model's limit into passages, or cut them.")  # fmt: skip
@click.option(
    "--prune",
    is_flag=True,
    help="Remove documents from the collection that the corpus does not have. Those of bad rows stay.",
)
@click.option("--on-error", type=click.Choice(["stop", "skip"]),
              help="What to do at a broken line or bad document. [default: stop; with --rejects, skip]")  # fmt: skip
@click.option("--rejects", "reject_file", type=click.Path(path_type=Path), metavar="FILE",
              help="Skip bad rows, and write each with its reason into FILE, as JSON lines.")  # fmt: skip
@hybrid_options
@click.option("--payload-index", "payload_indexes", type=TEXT, multiple=True, metavar="FIELD=TYPE",
              callback=payload_type,
              help="Index a field that filters use. TYPE is keyword, integer, float or bool. Repeatable.")  # fmt: skip
@click.option("--quantization", type=click.Choice(get_args(Quantization)),
              help="Type of the vectors that are searched in RAM. [default: int8]")  # fmt: skip
@click.option("--datatype", type=click.Choice(get_args(Datatype)),
              help="Type of the full vectors, on disk. [default: float32]")  # fmt: skip
@click.option("--hnsw-m", type=click.IntRange(0, MOST), metavar="N",
              help="Links of each passage in the HNSW graph; 0 for no graph. [default: 16]")  # fmt: skip
@click.option("--hnsw-ef-construct", type=click.IntRange(1, MOST), metavar="N",
              help="Neighbours considered for each passage when the graph is built. [default: 100]")  # fmt: skip
@click.option("--shards", type=click.IntRange(1, MOST), metavar="N", help="Shards of the collection in a cluster.")
@click.option("--replicas", type=click.IntRange(1, MOST), metavar="N", help="Copies of each shard in a cluster.")
@click.option("--write-consistency", type=click.IntRange(1, MOST), metavar="N",
              help="Copies in a cluster that must confirm a write.")  # fmt: skip
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True,
              help="Encode in this process, or on a Ray cluster (which needs a Qdrant server).")  # fmt: skip
@click.option(
    "--workers", type=click.IntRange(1), metavar="N", help="Encoders of --engine ray. [default: one per device]"
)
@device_option
@threads_option
@json_option
def index_command(
    model: Path, corpus: Corpus, qdrant: Qdrant, collection: str | None, alias: str | None, chunk: bool, prune: bool,
    on_error: str | None, reject_file: Path | None, hybrid: dict[str, Any], payload_indexes: dict[str, PayloadType],
    engine: str, workers: int | None, device: Device, threads: int | None, as_json: bool, **storage: Any,
) -> None:  # fmt: skip
    """Encode CORPUS with MODEL into a Qdrant collection.

    CORPUS is a file of JSON lines, CSV, TSV (all three may be .gz) or Parquet; or a BEIR folder; or JSON lines on stdin
    (-) or from a pipe. Each document has `_id` (or `id`), `text`, optionally `title`, and any other fields, which come
    back with each hit and can be filtered on.

    CORPUS can also be a folder of text, Markdown, HTML and PDF files, or one such file. Each file is a document. Its
    `_id` and `path` are the path in the folder, and it has a `date` if the file states one.

    A file or folder is checked before anything is encoded.

    A document that is longer than the model's limit is split into passages, along headings, paragraphs and sentences.
    A search returns documents, each with its best passage.

    With --from-collection, the documents are those of a collection that something else made, with their ids and
    payloads. They go into a new collection beside it; the text goes to the field `text`. With --keep-vectors, which
    must be given at each run, the new collection has the old vectors too.

    Documents that the collection has already, with the same content, are left alone. After Ctrl-C or a crash, run the
    same command again.

    The options --hybrid and --quantization to --write-consistency are fixed when the collection is made. For an
    existing collection, leave them out, or give the same values. A new collection of --alias has the options of the
    former one, except for those that you give.

    \b
    d2llm index MODEL corpus.jsonl --qdrant ./qdrant --collection kb --prune
    d2llm index MODEL corpus.parquet --qdrant http://localhost:6333 --alias kb --hybrid --payload-index year=integer
    zcat corpus.jsonl.gz | d2llm index MODEL - --qdrant ./qdrant --collection kb
    d2llm index MODEL --from-collection docs --from-qdrant ./langchain --qdrant ./qdrant --collection kb
    """
    _check_options(qdrant, collection, alias, on_error, reject_file, storage)
    skip = on_error == "skip" or reject_file is not None
    corpus.check(engine, prune, skip, reject_file)
    options = {name: value for name, value in storage.items() if value is not None} | hybrid | corpus.options()
    config = read_config(model)
    _check_place(corpus, qdrant, collection, alias, config, options, engine)
    rejects = Rejects(reject_file)
    total, average = None, None
    if not corpus.once:
        most_words = config.document_max_length // WORD_TOKENS if chunk else None
        total, average = survey(corpus, rejects if skip else None, payload_indexes, most_words)
    rejects.show()
    if prune and rejects.without_id:
        raise DataError(
            f"{rejects.without_id} bad rows of {corpus.name} state no id, and --prune would remove their documents: "
            "mend the rows, or leave --prune out"
        )
    if prune and rejects.count:
        click.echo("what the collection has of the skipped documents stays", err=True)
    if options.get("bm25") is not None and average is not None:
        options["bm25"] = {**options["bm25"], "average_words": average}
    load_here = functools.partial(load, model, device, threads=threads, query_encoder="full")
    loaded = load_here() if engine == "local" else None  # raises for a broken model before a collection is made
    patient = replace(qdrant, patience=JOB_PATIENCE)
    report_bad_row = _on_bad_row(rejects, corpus, prune, engine) if skip else None
    documents = some(corpus.documents(report_bad_row), corpus.name, rejects) if engine == "local" else iter(())
    job: dict[str, Any] = {
        "chunk": chunk, "prune": prune or alias is not None, "keep": () if alias else rejects.ids,
        "progress": not as_json, "total": total,
    }  # fmt: skip
    if alias is None:
        index = patient.index(str(collection), options=options)
    else:
        index = patient.open_generation(
            alias, config, options=options, payload_indexes=payload_indexes, average_words=average
        )
    with index:
        index.open_for(config)
        index.index_payload({**corpus.payload_indexes(), **payload_indexes})
        is_hybrid = index.info().metadata.options.bm25 is not None
        with _interruptible(index), index.bulk_load():
            if loaded is not None:
                report = index.add(loaded, documents, **job)
            else:
                report = add_on_ray(
                    patient,
                    index.name,
                    model,
                    corpus.path,
                    report_bad_row,
                    workers=workers,
                    device=device,
                    threads=threads,
                    **job,
                )
        read, stored = report.added + report.unchanged, index.count()
        dropped = None if alias is None else patient.switch_over(index, alias, read, keep_former=bool(rejects.count))
    rejects.show()
    if as_json:
        names = {"collection": index.name, "alias": alias, "dropped": dropped}
        echo_json({**names, **asdict(report), "skipped": rejects.count, "stored": stored})
        return
    click.echo(
        f"{read} documents: {report.added} stored, {report.unchanged} unchanged, {rejects.count} skipped, "
        f"{report.pruned} removed; {_too_long(report, config.document_max_length)}. "
        f"The collection {index.name} holds {stored}."
    )
    if alias is not None:
        click.echo(f"{alias} is now {index.name}" + (f"; {dropped} is dropped." if dropped else "."))
    echo_next(*search_words(model, qdrant, alias or index.name, *["--hybrid"] * is_hybrid))
    for line in corpus.next_steps(qdrant, index.name):
        click.echo(line)


def _on_bad_row(rejects: Rejects, corpus: Corpus, prune: bool, engine: str) -> OnError:
    """What to do at a bad row while the documents are stored. A corpus that was checked may have changed since."""
    if prune and not corpus.once:
        return rejects.or_raise("--prune would remove its document")
    if engine == "ray":
        return rejects.or_raise("another process reads it now, which cannot tell that it was skipped")
    return rejects


def _too_long(report: AddReport, limit: int) -> str:
    if report.split:
        passages = report.passages - (report.added - report.split)
        return f"{report.split} were longer than {limit} tokens and split into {passages} passages"
    return f"{report.truncated} were longer than {limit} tokens" + " and cut" * (report.truncated > 0)


def _check_options(
    qdrant: Qdrant,
    collection: str | None,
    alias: str | None,
    on_error: str | None,
    reject_file: Path | None,
    storage: Mapping[str, Any],
) -> None:
    """Refuse options that contradict one another."""
    if (collection is None) == (alias is None):
        raise click.UsageError("name either the collection (--collection), or an alias for a new one (--alias)")
    if on_error == "stop" and reject_file is not None:
        raise click.UsageError("--on-error stop contradicts --rejects, which skips bad rows: leave one of them out")
    for name in ("shards", "replicas", "write_consistency"):
        if storage[name] is not None and not qdrant.shared:
            option = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{option} is for a cluster, and {qdrant} is a folder: leave it out")


def _check_place(
    corpus: Corpus,
    qdrant: Qdrant,
    collection: str | None,
    alias: str | None,
    config: ModelConfig,
    options: Mapping[str, Any],
    engine: str,
) -> None:
    """Check that the place can be reached, and that an existing collection fits the model and the options."""
    if engine == "ray":
        require_shared(qdrant)
    names, aliases = qdrant.collections()
    if collection is not None:
        corpus.require_other(qdrant, collection)
    if collection in {*names, *aliases}:
        with qdrant.index(str(collection), options=options) as index:
            index.open_for(config, create=False)


@contextmanager
def _interruptible(index: QdrantIndex) -> Iterator[None]:
    """Tell how many documents are stored if Ctrl-C ends the block."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(
            f"\nInterrupted. {index.count()} documents are stored; run the same command again to go on.", err=True
        )
        raise click.exceptions.Exit(128 + signal.SIGINT) from None


@click.command("search", cls=RenamedOptions, renamed={"--recall": "--candidates", "--words-weight": "--bm25-weight"})
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("query", type=TEXT, required=False)
@click.option("--queries", "source", type=click.Path(path_type=Path), metavar="FILE",
              help="Search for the queries of a file, in place of QUERY: a text file with one per line, JSONL with "
                   "`text` and `_id`, CSV, TSV, Parquet, or a BEIR folder. A query without an id has the number of its "
                   "line; blank lines count. Prints a TREC run, or with --json a line for each query.")  # fmt: skip
@place_option
@collection_option
@click.option("--k", default=10, show_default=True, type=click.IntRange(1), metavar="N", help="Hits to show.")
@candidates_option
@click.option("--hnsw-ef", type=click.IntRange(1), metavar="N",
              help="Nodes of the HNSW graph to keep in view. More find more and take longer; `d2llm tune` suggests a "
                   "number. [default: 4 times --candidates, at least 128]")  # fmt: skip
@click.option("--filter", type=TEXT, multiple=True, metavar="KEY=VALUE", callback=parse_filter,
              help='Only documents whose field has this value, or JSON: {"year": {"gte": 2020}}.')  # fmt: skip
@task_option
@click.option("--no-rescore", is_flag=True, help="Keep the order of recall; do not rescore by the IEM.")
@click.option("--hybrid", is_flag=True, help="Recall by BM25 too, in a collection made with `d2llm index --hybrid`.")
@click.option("--fusion", type=click.Choice(get_args(Fusion)),
              help="How --hybrid merges the rankings: by ranks (rrf) or by scores (dbsf). [default: rrf]")  # fmt: skip
@click.option("--bm25-weight", type=click.FloatRange(0, MAX_BM25_WEIGHT), metavar="WEIGHT", callback=finite,
              help="Weight of BM25 beside the IEM in --hybrid searches: higher where the model was not trained. "
                   f"[default: 0 if the model scores words itself, otherwise {BM25_WEIGHT}]")  # fmt: skip
@query_encoder_option
@device_option
@threads_option
@click.option(
    "--explain",
    is_flag=True,
    help="Show how long each stage takes.",
)
@json_option
def search_command(
    model: Path, query: str | None, source: Path | None, qdrant: Qdrant, collection: str, device: Device,
    threads: int | None, k: int, candidates: int, hnsw_ef: int | None, filter: dict[str, Any] | None, task: Task,
    no_rescore: bool, hybrid: bool, fusion: Fusion | None, bm25_weight: float | None,
    query_encoder: EncoderSize | None, explain: bool, as_json: bool,
) -> None:  # fmt: skip
    """Search a collection for QUERY, or for each of many queries: the nearest passages by cosine, reordered by the IEM.

    Search with the MODEL that indexed the collection.

    \b
    d2llm search MODEL "how long does a refund take?" --qdrant ./qdrant --collection kb
    d2llm search MODEL "refunds" --qdrant ./qdrant --collection kb --filter lang=en --filter '{"year": {"gte": 2024}}'
    d2llm search MODEL "error E1234" --qdrant http://localhost:6333 --collection kb --hybrid --explain
    d2llm search MODEL --queries queries.jsonl --qdrant ./qdrant --collection kb --k 100 > model.run
    """
    if (query is None) == (source is None):
        raise click.UsageError("give either one QUERY, or a file of queries (--queries)")
    if source is not None and explain:
        raise click.UsageError("--explain is for one QUERY: leave it out, or give one of the queries")
    _check_numbers(k, candidates, hybrid, {"--fusion": fusion, "--bm25-weight": bm25_weight})
    queries = None if source is None else _read_queries(source)
    fusion_used: Fusion | None = (fusion or "rrf") if hybrid else None
    with qdrant.index(collection, hnsw_ef=hnsw_ef) as index:
        index.open_for(read_config(model), create=False)  # raises for another model before the work begins
        loaded = load(model, device, threads=threads, query_encoder=query_encoder)
        searcher = Searcher(
            loaded, index, candidates=candidates, task=task, rescore=not no_rescore, hybrid=fusion_used,
            bm25_weight=bm25_weight,
        )  # fmt: skip
        if queries is not None:
            _search_all(searcher, queries, k, filter, as_json)
            return
        assert query is not None  # checked above
        if explain:  # the first call pays for opening the collection and warming up
            searcher.search(query, k)
        explanation = searcher.explain(query, k, filter=filter)
        warnings = [] if explanation.hits else why_nothing_passes(filter or {}, index)
    if explanation.truncated:
        click.echo(f"the query is longer than {loaded.config.query_max_length} tokens and was cut", err=True)
    for warning in warnings:
        click.echo(warning, err=True)
    if as_json:
        stages = {"seconds": explanation.seconds, "candidates": explanation.candidates} if explain else {}
        hits = [asdict(hit) for hit in explanation.hits]
        echo_json({"query": query, "hits": hits, **({"warnings": warnings} if warnings else {}), **stages})
    else:
        show(explanation, stages=explain)


def _check_numbers(k: int, candidates: int, hybrid: bool, of_hybrid: Mapping[str, Any]) -> None:
    """Refuse options of a search that contradict one another. `of_hybrid` are those of hybrid searches alone."""
    if k > candidates:
        raise click.BadParameter(
            f"{k} hits cannot come from {candidates} candidates: raise --candidates", param_hint="--k"
        )
    for name, value in of_hybrid.items():
        if value is not None and not hybrid:
            raise click.UsageError(f"{name} is for hybrid searches: add --hybrid, or leave {name} out")


def _read_queries(source: Path) -> dict[str, str]:
    """Read the queries of a file, `{id: text}`, without empty ones."""
    found = read_queries(source, keep_empty=True, numbered=True)
    queries = {id_: text for id_, text in found.items() if text.strip()}
    if not queries:
        raise DataError(f"{source}: no queries")
    if len(queries) < len(found):
        click.echo(f"{source}: {len(found) - len(queries)} empty queries are left out", err=True)
    return queries


def _search_all(
    searcher: Searcher, queries: Mapping[str, str], k: int, filter: dict[str, Any] | None, as_json: bool
) -> None:
    """Search for all queries, `{id: text}`, and print the hits of each as soon as they are there."""
    ids, truncated, nothing = list(queries), 0, False
    for start in range(0, len(ids), AT_A_TIME):
        chunk = ids[start : start + AT_A_TIME]
        found = searcher.explain_many([queries[id_] for id_ in chunk], k, filter=filter)
        truncated += sum(explanation.truncated for explanation in found)
        nothing = not found[0].hits  # a filter is the same for all queries
        for id_, explanation in zip(chunk, found, strict=True):
            if as_json:
                echo_json({"id": id_, "query": queries[id_], "hits": [asdict(hit) for hit in explanation.hits]})
            else:
                for line in run_lines(id_, [(hit.id, hit.score) for hit in explanation.hits], "d2llm"):
                    click.echo(line)
    for warning in why_nothing_passes(filter or {}, searcher.index) if nothing else ():
        click.echo(warning, err=True)
    if truncated:
        limit = searcher.model.config.query_max_length
        click.echo(f"{truncated} of {len(ids)} queries are longer than {limit} tokens and were cut", err=True)


def show(explanation: Explanation, *, stages: bool = False, width: int = 100) -> None:
    """Print the hits: score, id, rank and cosine in recall, the passage and the start of its text; with `stages` also
    the time of each stage."""
    if not explanation.hits:
        click.echo("Nothing passes the filter.")
        return
    for rank, hit in enumerate(explanation.hits, 1):
        place = "" if hit.passage is None else f"; passage {hit.passage.number + 1} of {hit.passage.of}"
        click.echo(
            f"{rank:>3}. {hit.score:7.3f}  {hit.id}  "
            f"(recall: rank {hit.recall_rank}, cosine {hit.recall_score:.3f}{place})"
        )
        text = f"{title_of(hit.payload)} {hit.payload.get('text', '')}"
        click.echo(f"     {shorten(text, width)}")
    if stages:
        click.echo(f"\n{explanation.candidates} candidates, milliseconds by stage (second of two runs):")
        rows = [[stage, f"{seconds * 1e3:.2f}"] for stage, seconds in explanation.seconds.items()]
        echo_table([*rows, ["whole", f"{sum(explanation.seconds.values()) * 1e3:.2f}"]], header=["stage", "ms"])
