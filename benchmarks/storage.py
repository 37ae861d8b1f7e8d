"""Measure the storage options of collections and the payload indexes, in the embedded engine.

    python benchmarks/storage.py MODEL BEIR_FOLDER

For each variant: recall and time of a search, disk, memory, and the time to load and to build. A variant is a list of
`CollectionOptions` that differ from the defaults; `bm25` (BM25 vectors) and `payload_indexes` are switches. For each
filter: hits, recall and time, without and with payload indexes.

A collection contains the folder's passages and, up to the size, others drawn around them, each with two fields to
filter on. The queries are a sample of the split. Memory is what opening and searching the collection adds to a new
process that has searched another collection before. Every query goes through all collections in turn in one process,
so ratios are more reliable than times. Prints tables for people and one line of JSON for machines.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

import d2llm
from d2llm.beir import RetrievalData
from d2llm.cli_options import echo_table
from d2llm.connectors import QdrantIndex
from d2llm.connectors.cli_options import average_words
from d2llm.connectors.engine import Effort
from d2llm.connectors.tune import EXACT, Latency, in_turns
from d2llm.indexing import digest_of
from d2llm.metrics import overlap
from d2llm.types import Document, Filter, Point

DEFAULTS = "defaults"
INDEXED = "payload_indexes"
VARIANTS = (
    DEFAULTS,
    "quantization=turbo4",
    "quantization=turbo2",
    "quantization=binary",
    "quantization=none",
    "datatype=float16",
    "hnsw_m=0",
    "hnsw_m=0,quantization=turbo4",
    "hnsw_m=8",
    "hnsw_m=32",
    "hnsw_ef_construct=200",
    "bm25",
    INDEXED,
)
FILTERS: dict[str, dict[str, Any]] = {
    "no filter": {},
    "keyword": {"kind": "k7"},
    "any of 10 keywords": {"kind": [f"k{kind}" for kind in range(10)]},
    "integer range": {"number": {"gte": 300, "lt": 400}},
}
ROUNDS = 3
"""How often each query is asked."""
FILES = {
    "copy": "/quantized.",
    "vectors": "vector_storage-recall/",
    "graph": "vector_index-recall/",
    "payload": "payload_storage/",
    "bm25": "-words/",
    "payload indexes": "payload_index/",
    "ids": "id_tracker",
    "log": "wal/",
}
"""Kinds of files, by a part of their path; the first match counts."""
EXACTLY = "exact search"
WARM = "warm"


class Questions:
    """The queries of the benchmark, from a file that every process reads. A call searches an index with the query of a
    number; numbers beyond the last query start again at the first."""

    def __init__(self, file: Path, limit: int) -> None:
        saved = np.load(file)
        self._vectors, self._texts, self._limit = saved["vectors"], saved["texts"].tolist(), limit

    def __len__(self) -> int:
        return len(self._vectors)

    def __call__(
        self, index: QdrantIndex, query: int, *, effort: Effort | None = None, filter: Filter | None = None,
        hybrid: bool = False,
    ) -> list[str]:  # fmt: skip
        """The ids of the hits."""
        row = query % len(self)
        text = self._texts[row] if hybrid else ""
        ids: list[str] = index.recall(
            self._vectors[row], self._limit, effort=effort, filter=filter, query_text=text
        ).ids
        return ids


class TimedIndex(QdrantIndex):  # type: ignore[misc]  # mypy does not find d2llm.connectors by its name
    """Gives each point two fields and a digest, and measures loading and building: seconds on the clock, and seconds of
    the processors, which depend less on other work of the machine."""

    def __init__(self, collection: str, location: Path, options: Mapping[str, Any]) -> None:
        super().__init__(collection, location, options=options)
        self.seconds = dict.fromkeys(["load", "load cpu", "build", "build cpu"], 0.0)
        self.own_bytes = 0

    def upsert(self, points: Sequence[Point]) -> None:
        """Store the points, each with its fields."""
        points = [_with_fields(point) for point in points]
        self.own_bytes += sum(len(json.dumps(point.payload, ensure_ascii=False).encode()) for point in points)
        start, used = time.perf_counter(), time.process_time()
        super().upsert(points)
        self.seconds["load"] += time.perf_counter() - start
        self.seconds["load cpu"] += time.process_time() - used

    def optimize(self) -> None:
        """Build the graph, in another process as always."""
        start, used = time.perf_counter(), _children_seconds()
        super().optimize()
        self.seconds["build"] += time.perf_counter() - start
        self.seconds["build cpu"] += _children_seconds() - used


def _with_fields(point: Point) -> Point:
    """The point with a number below 1,000 and one of 100 kinds, which its id decides."""
    rng = random.Random(int(point.id))
    payload = {**point.payload, "number": rng.randrange(1000), "kind": f"k{rng.randrange(100)}"}
    return replace(point, payload=payload, digest=digest_of(Document(point.id, payload["text"])))


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@dataclass(slots=True)
class Figures:
    """Figures of one collection."""

    passages: int
    own_bytes: float
    """Bytes of text and fields of a passage."""
    seconds: dict[str, float]
    """Seconds to load and to build, on the clock and of the processors."""
    disk_mib: dict[str, float]
    """MiB on disk, by kind of file."""
    mapped_mib: dict[str, float]
    """MiB of its files in the memory of a process that has searched it, by kind; the system may evict them."""
    memory_mib: dict[str, float]
    """MiB that opening and searching it adds to a process."""
    recall: float | None = None
    """Mean share of the exact nearest passages that a search finds."""
    ms: Latency | None = None


@dataclass(slots=True)
class Workshop:
    """Makes collections of any size and variant in `folder`, each once, and measures everything but searches."""

    folder: Path
    model: d2llm.Model
    real: d2llm.Embeddings
    texts: list[str]
    queries: Path
    limit: int
    made: dict[str, Figures] = field(default_factory=dict)

    def build(self, variant: str, size: int) -> str:
        """Make the collection, if it does not exist, and return its name."""
        name = f"{size}-{variant.replace('=', '-').replace(',', '-')}"
        if name in self.made:
            return name
        click.echo(f"{size:,} passages, {variant} ...", err=True)
        with TimedIndex(name, self.folder, self._options(variant)) as index:
            index.open_for(self.model.config)
            if INDEXED in variant:
                index.index_payload({"number": "integer", "kind": "keyword"})
            self._fill(index, size)
        command = [sys.executable, __file__, "--child", str(self.folder), name, str(self.queries), str(self.limit)]
        answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        self.made[name] = Figures(
            size, index.own_bytes / size, index.seconds, disk_mib(self.folder / name), answer["mapped"],
            answer["memory"],
        )  # fmt: skip
        return name

    def warm_up(self) -> None:
        """Make the collection that a process searches before its memory is measured."""
        with TimedIndex(WARM, self.folder, {"bm25": {}}) as index:
            self._fill(index, 1000)

    def _fill(self, index: TimedIndex, size: int) -> None:
        sys.path.insert(0, str(Path(__file__).parent))
        from search_latency import (
            fill,
        )  # imported here: it brings torch, and processes whose memory is measured must not

        fill(index, self.model, self.real, self.texts, size)

    def _options(self, variant: str) -> dict[str, Any]:
        options: dict[str, Any] = {}
        for setting in variant.split(","):
            name, given, value = setting.partition("=")
            if given:
                options[name] = int(value) if value.isdecimal() else value
            elif name == "bm25":
                options["bm25"] = {"average_words": average_words(self.texts)}
            elif name not in (DEFAULTS, INDEXED):
                raise click.BadParameter(f"{variant!r}: expected KEY=VALUE, bm25 or {INDEXED}", param_hint="--variant")
        return options


def disk_mib(folder: Path) -> dict[str, float]:
    """MiB that the files of a collection take on disk (without holes), by kind."""
    files = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*") if path.is_file()}
    return _by_kind({path: file.st_blocks * 512 / 2**20 for path, file in files.items()})


def mapped_mib(folder: Path) -> dict[str, float]:
    """MiB of the files of a collection in the memory of this process, by kind."""
    resident: dict[str, float] = {}
    path = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):  # the first line of a mapping: its addresses, ..., its file
            path = rest[-1]
        elif name == "Rss:" and path.startswith(f"{folder}/"):
            file = str(Path(path).relative_to(folder))
            resident[file] = max(resident.get(file, 0.0), int(rest[0]) / 1024)  # some files are mapped twice
    return _by_kind(resident)


def _by_kind(mib: Mapping[str, float]) -> dict[str, float]:
    sizes = dict.fromkeys([*FILES, "other"], 0.0)
    for path, size in mib.items():
        sizes[next((kind for kind, part in FILES.items() if part in path), "other")] += size
    return sizes


@click.command()
@click.argument("model_folder", type=click.Path(path_type=Path, exists=True))
@click.argument("dataset", type=click.Path(path_type=Path, exists=True))
@click.option("--split", default="dev", show_default=True)
@click.option("--size", default=100_000, show_default=True, help="Passages.")
@click.option("--queries", default=200, show_default=True, help="Size of the sample of queries.")
@click.option("--candidates", default=100, show_default=True, help="Passages that a search finds.")
@click.option("--variant", "variants", multiple=True, default=VARIANTS, metavar="KEY=VALUE,...",
              help="Options that differ from the defaults. Repeatable. [default: one option at a time]")  # fmt: skip
@click.option(
    "--filter-sizes",
    default="20000,100000",
    show_default=True,
    help="Passages of the collections for filters; empty: no filters.",
)
def main(
    model_folder: Path, dataset: Path, split: str, size: int, queries: int, candidates: int, variants: tuple[str, ...],
    filter_sizes: str,
) -> None:  # fmt: skip
    """Measure collections of the passages of DATASET, a BEIR folder, encoded by MODEL_FOLDER."""
    data = RetrievalData.load(dataset, split)
    sampled = random.Random(0).sample(list(data.queries.values()), min(queries, len(data.queries)))
    texts = [document.content for document in data.documents.values()]
    model = d2llm.load(model_folder)
    click.echo(f"encoding {len(texts)} passages ...", err=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        np.savez(folder / "queries.npz", vectors=model.encode_query(sampled).vectors, texts=np.array(sampled))
        workshop = Workshop(folder, model, model.encode_document(texts), texts, folder / "queries.npz", candidates)
        workshop.warm_up()
        names = {variant: workshop.build(variant, size) for variant in variants}
        others = measure_searches(workshop, names)
        rows = {variant: workshop.made[name] for variant, name in names.items()}
        show(rows, size, candidates, others)
        filters = {n: measure_filters(workshop, n) for n in map(int, filter(None, filter_sizes.split(",")))}
        show_filters(filters)
    print(
        json.dumps({
            "size": size, "candidates": candidates, "queries": len(sampled), "cores": os.cpu_count(),
            "rows": {variant: asdict(figures) for variant, figures in rows.items()},
            "others": {what: asdict(ms) for what, ms in others.items()},
            "filters": {n: {what: asdict(figures) for what, figures in table.items()} for n, table in filters.items()},
        })
    )  # fmt: skip


def measure_searches(workshop: Workshop, names: Mapping[str, str]) -> dict[str, Latency]:
    """Set recall and milliseconds of each collection. Returns milliseconds of exact search and of hybrid searches."""
    with ExitStack() as stack:
        indexes = {v: stack.enter_context(QdrantIndex(name, workshop.folder)) for v, name in names.items()}
        ask = Questions(workshop.queries, workshop.limit)
        searches = {v: partial(ask, index) for v, index in indexes.items()}
        exactly = partial(ask, next(i for v, i in indexes.items() if "float16" not in v), effort=EXACT)
        for variant, index in indexes.items():
            if "bm25" in variant:
                searches[f"{variant}, hybrid search"] = partial(ask, index, hybrid=True)
        ms: dict[str, Latency]
        ids, ms = in_turns(searches, ROUNDS * len(ask), progress=False)
        # Exact search runs alone: it would leave the vectors of one collection in the processor's caches.
        exact, exact_ms = in_turns({EXACTLY: exactly}, len(ask), progress=False)
    for variant, name in names.items():
        workshop.made[name].ms = ms.pop(variant)
        workshop.made[name].recall = overlap(ids[variant][: len(ask)], exact[EXACTLY], workshop.limit)
    return {**exact_ms, **ms}


@dataclass(frozen=True, slots=True)
class FilterFigures:
    """Figures of one filter; the mappings have an entry for the collection without and with payload indexes."""

    passing: float
    """Share of the documents that pass."""
    hits: dict[str, float]
    """Mean number of hits."""
    recall: dict[str, float]
    """Against exact search."""
    ms: dict[str, Latency]


def measure_filters(workshop: Workshop, size: int) -> dict[str, FilterFigures]:
    """Measure the filters in collections of `size` passages: `{filter: figures}`."""
    names = {variant: workshop.build(variant, size) for variant in (DEFAULTS, INDEXED)}
    with ExitStack() as stack:
        indexes = {v: stack.enter_context(QdrantIndex(name, workshop.folder)) for v, name in names.items()}
        ask = Questions(workshop.queries, workshop.limit)
        searches = {
            (what, variant): partial(ask, index, filter=condition)
            for what, condition in FILTERS.items()
            for variant, index in indexes.items()
        }
        ids, ms = in_turns(searches, len(ask), progress=False)
        figures = {}
        for what, condition in FILTERS.items():
            exactly = partial(ask, indexes[INDEXED], filter=condition, effort=EXACT)
            exact = [exactly(query) for query in range(len(ask))]
            figures[what] = FilterFigures(
                indexes[INDEXED].count(condition) / size,
                {variant: float(np.mean([len(hits) for hits in ids[what, variant]])) for variant in indexes},
                {variant: overlap(ids[what, variant], exact, workshop.limit) for variant in indexes},
                {variant: ms[what, variant] for variant in indexes},
            )
    return figures


def show(rows: Mapping[str, Figures], size: int, limit: int, others: Mapping[str, Latency]) -> None:
    """Print what each variant costs, and which files take its disk and memory."""

    def timed(ms: Latency | None) -> str:
        return "-" if ms is None else f"{ms.p50:.2f} / {ms.p95:.2f}"

    texts = np.mean([figures.own_bytes for figures in rows.values()])
    click.echo(f"\n{size:,} passages of {texts:.0f} bytes of text and fields\n")
    table = [
        [
            variant, f"{figures.recall:.4f}", timed(figures.ms), f"{sum(figures.disk_mib.values()):.0f}",
            f"{figures.memory_mib['RssAnon']:.1f}", f"{figures.memory_mib['RssFile']:.0f}",
            *(f"{figures.seconds[kind]:.0f}" for kind in ("load cpu", "build cpu")),
        ]
        for variant, figures in rows.items()
    ]  # fmt: skip
    table += [[what, "1.0000" if what == EXACTLY else "-", timed(ms), *"-----"] for what, ms in others.items()]
    echo_table(table, header=["", f"recall@{limit}", "ms (p50 / p95)", "disk MiB", "RAM MiB", "mapped MiB",
                              "load CPU s", "build CPU s"])  # fmt: skip
    kinds = [*FILES, "other"]
    for what in ("disk", "mapped"):
        click.echo(f"\n{what} MiB\n")
        mib = {variant: figures.disk_mib if what == "disk" else figures.mapped_mib for variant, figures in rows.items()}
        echo_table(
            [[v, *(f"{by_kind[kind]:.1f}" for kind in kinds)] for v, by_kind in mib.items()], header=["", *kinds]
        )


def show_filters(tables: Mapping[int, Mapping[str, FilterFigures]]) -> None:
    """Print hits, recall and times of searches with a filter."""
    for size, table in tables.items():
        click.echo(f"\n{size:,} passages, without and with payload indexes: hits, recall, ms (p50 / p95)\n")
        echo_table(
            [
                [what, f"{100 * row.passing:.1f} %",
                 *(cell for v in (DEFAULTS, INDEXED) for cell in (
                     f"{row.hits[v]:.0f}", f"{row.recall[v]:.4f}", f"{row.ms[v].p50:.2f} / {row.ms[v].p95:.2f}"))]
                for what, row in table.items()
            ],
            header=["", "passing", "without: hits", "recall", "ms", "with: hits", "recall", "ms"],
        )  # fmt: skip


def child(folder: str, name: str, queries: str, limit: str) -> None:
    """Print the MiB that opening and searching a collection adds to the memory of this process."""
    ask = Questions(Path(queries), int(limit))

    def search(index: QdrantIndex) -> None:
        hybrid = index.info().metadata.options.bm25 is not None
        for query in range(len(ask)):
            ask(index, query, hybrid=hybrid)

    with QdrantIndex(WARM, folder) as warm, QdrantIndex(name, folder) as index:
        search(warm)
        before = _memory_mib()
        search(index)  # opens it
        memory = {kind: mib - before[kind] for kind, mib in _memory_mib().items()}
        print(json.dumps({"memory": memory, "mapped": mapped_mib(Path(folder) / name)}))


def _memory_mib() -> dict[str, float]:
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # free memory would hide what is allocated from it next
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {kind: int(status[kind].split()[0]) / 1024 for kind in ("RssAnon", "RssFile")}


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main()
