"""What each way to store a collection costs: what a search finds and how long it takes, disk, memory, and time to load
and to build; and what a payload index is worth to a filter. In the embedded engine.

    python benchmarks/storage.py MODEL BEIR_FOLDER

A collection has the folder's passages and, up to the size, others drawn around them, each with two fields to filter
on. The queries are those of the split. A variant is what differs from the defaults of `CollectionOptions`; `words` and
`payload_indexes` are switched on. Memory is what opening a collection and searching it adds to a fresh process that has
searched another one before. Every query goes through all collections in turn in one process, so that the ratios count.
Prints tables for people and one line of JSON for machines.
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
    "words",
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
    "words": "-words/",
    "payload indexes": "payload_index/",
    "ids": "id_tracker",
    "log": "wal/",
}
"""What a file is, by what its path holds; the first that fits."""
EXACTLY = "exact search"
WARM = "warm"


class Questions:
    """The queries of the benchmark, from a file that every process reads; called with an index and a number, of
    which those past the last begin anew."""

    def __init__(self, file: Path, limit: int) -> None:
        saved = np.load(file)
        self._vectors, self._texts, self._limit = saved["vectors"], saved["texts"].tolist(), limit

    def __len__(self) -> int:
        return len(self._vectors)

    def __call__(
        self, index: QdrantIndex, query: int, *, effort: Effort | None = None, filter: Filter | None = None,
        hybrid: bool = False,
    ) -> list[str]:  # fmt: skip
        """The ids found."""
        row = query % len(self)
        words = self._texts[row] if hybrid else ""
        found: list[str] = index.recall(
            self._vectors[row], self._limit, effort=effort, filter=filter, query_text=words
        ).ids
        return found


class TimedIndex(QdrantIndex):  # type: ignore[misc]  # mypy does not know our satellites by name
    """Gives each point two fields and a digest, and keeps how long it stores and builds: seconds on the clock, and of
    processors, which other work on the machine stretches less."""

    def __init__(self, collection: str, location: Path, options: Mapping[str, Any]) -> None:
        super().__init__(collection, location, options=options)
        self.seconds = dict.fromkeys(["load", "load cpu", "build", "build cpu"], 0.0)
        self.own_bytes = 0

    def upsert(self, points: Sequence[Point]) -> None:
        """Store the points, each with its fields."""
        made = [_with_fields(point) for point in points]
        self.own_bytes += sum(len(json.dumps(point.payload, ensure_ascii=False).encode()) for point in made)
        start, used = time.perf_counter(), time.process_time()
        super().upsert(made)
        self.seconds["load"] += time.perf_counter() - start
        self.seconds["load cpu"] += time.process_time() - used

    def optimize(self) -> None:
        """Build in another process, as ever."""
        start, used = time.perf_counter(), _children_seconds()
        super().optimize()
        self.seconds["build"] += time.perf_counter() - start
        self.seconds["build cpu"] += _children_seconds() - used


def _with_fields(point: Point) -> Point:
    """A number below 1,000 and one of 100 kinds, settled by the id."""
    rng = random.Random(int(point.id))
    payload = {**point.payload, "number": rng.randrange(1000), "kind": f"k{rng.randrange(100)}"}
    return replace(point, payload=payload, digest=digest_of(Document(point.id, payload["text"])))


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@dataclass(slots=True)
class Figures:
    """Of one collection: `own_bytes` of text and fields a passage; MiB that its files take on the disk, and that they
    have in a process that has searched it (`mapped`: pages that the system may evict), by what they are; what that
    process itself came to hold; `recall` is the mean share of the exact nearest."""

    passages: int
    own_bytes: float
    seconds: dict[str, float]
    disk_mib: dict[str, float]
    mapped_mib: dict[str, float]
    memory_mib: dict[str, float]
    recall: float | None = None
    ms: Latency | None = None


@dataclass(slots=True)
class Workshop:
    """Makes collections of any size and variant in `place`, each once, and measures them but for searches."""

    place: Path
    model: d2llm.Model
    real: d2llm.Embeddings
    texts: list[str]
    queries: Path
    limit: int
    made: dict[str, Figures] = field(default_factory=dict)

    def build(self, variant: str, size: int) -> str:
        """The name of the collection."""
        name = f"{size}-{variant.replace('=', '-').replace(',', '-')}"
        if name in self.made:
            return name
        click.echo(f"{size:,} passages, {variant} ...", err=True)
        with TimedIndex(name, self.place, self._options(variant)) as index:
            index.open_for(self.model.config)
            if INDEXED in variant:
                index.index_payload({"number": "integer", "kind": "keyword"})
            self._fill(index, size)
        command = [sys.executable, __file__, "--child", str(self.place), name, str(self.queries), str(self.limit)]
        answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        self.made[name] = Figures(
            size, index.own_bytes / size, index.seconds, disk_mib(self.place / name), answer["mapped"],
            answer["memory"],
        )  # fmt: skip
        return name

    def warm_up(self) -> None:
        """Make the collection that a process searches before its memory is taken."""
        with TimedIndex(WARM, self.place, {"bm25": {}}) as index:
            self._fill(index, 1000)

    def _fill(self, index: TimedIndex, size: int) -> None:
        sys.path.insert(0, str(Path(__file__).parent))
        from search_latency import fill  # here, since it brings torch: too much for a process whose memory is measured

        fill(index, self.model, self.real, self.texts, size)

    def _options(self, variant: str) -> dict[str, Any]:
        options: dict[str, Any] = {}
        for setting in variant.split(","):
            name, given, value = setting.partition("=")
            if given:
                options[name] = int(value) if value.isdecimal() else value
            elif name == "words":
                options["bm25"] = {"average_words": average_words(self.texts)}
            elif name not in (DEFAULTS, INDEXED):
                raise click.BadParameter(f"{variant!r}: expected KEY=VALUE, words or {INDEXED}", param_hint="--variant")
        return options


def disk_mib(folder: Path) -> dict[str, float]:
    """What the files of a collection take on the disk (holes take nothing), by what they are."""
    files = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*") if path.is_file()}
    return _by_kind({path: file.st_blocks * 512 / 2**20 for path, file in files.items()})


def mapped_mib(folder: Path) -> dict[str, float]:
    """How much of the files of a collection is in the memory of this process, by what they are."""
    resident: dict[str, float] = {}
    path = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):  # the first line of a mapping: its addresses, ..., its file
            path = rest[-1]
        elif name == "Rss:" and path.startswith(f"{folder}/"):
            where = str(Path(path).relative_to(folder))
            resident[where] = max(resident.get(where, 0.0), int(rest[0]) / 1024)  # some are mapped twice
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
@click.option("--queries", default=200, show_default=True)
@click.option("--candidates", default=100, show_default=True)
@click.option("--variant", "variants", multiple=True, default=VARIANTS, metavar="KEY=VALUE,...",
              help="What differs from the defaults. Repeatable. [default: one option at a time]")  # fmt: skip
@click.option("--filter-sizes", default="20000,100000", show_default=True, help="Passages for filters; empty for none.")
def main(
    model_folder: Path, dataset: Path, split: str, size: int, queries: int, candidates: int, variants: tuple[str, ...],
    filter_sizes: str,
) -> None:  # fmt: skip
    """Measure collections of the passages of DATASET, encoded by MODEL_FOLDER."""
    data = RetrievalData.load(dataset, split)
    asked = random.Random(0).sample(list(data.queries.values()), min(queries, len(data.queries)))
    texts = [document.content for document in data.documents.values()]
    model = d2llm.load(model_folder)
    click.echo(f"encoding {len(texts)} passages ...", err=True)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        np.savez(place / "queries.npz", vectors=model.encode_query(asked).vectors, texts=np.array(asked))
        workshop = Workshop(place, model, model.encode_document(texts), texts, place / "queries.npz", candidates)
        workshop.warm_up()
        names = {variant: workshop.build(variant, size) for variant in variants}
        others = measure_searches(workshop, names)
        rows = {variant: workshop.made[name] for variant, name in names.items()}
        show(rows, size, candidates, others)
        filters = {n: measure_filters(workshop, n) for n in map(int, filter(None, filter_sizes.split(",")))}
        show_filters(filters)
    print(
        json.dumps({
            "size": size, "candidates": candidates, "queries": len(asked), "cores": os.cpu_count(),
            "rows": {variant: asdict(one) for variant, one in rows.items()},
            "others": {what: asdict(ms) for what, ms in others.items()},
            "filters": {n: {what: asdict(one) for what, one in table.items()} for n, table in filters.items()},
        })
    )  # fmt: skip


def measure_searches(workshop: Workshop, names: Mapping[str, str]) -> dict[str, Latency]:
    """Recall and milliseconds of each collection into its figures; those of exact and of hybrid search are returned."""
    with ExitStack() as stack:
        indexes = {v: stack.enter_context(QdrantIndex(name, workshop.place)) for v, name in names.items()}
        ask = Questions(workshop.queries, workshop.limit)
        searches = {v: partial(ask, index) for v, index in indexes.items()}
        exactly = partial(ask, next(i for v, i in indexes.items() if "float16" not in v), effort=EXACT)
        for variant, index in indexes.items():
            if "words" in variant:
                searches[f"{variant}, hybrid search"] = partial(ask, index, hybrid=True)
        ms: dict[str, Latency]
        found, ms = in_turns(searches, ROUNDS * len(ask), progress=False)
        # On its own: it would leave the vectors of one collection in the processor's caches.
        exact, exact_ms = in_turns({EXACTLY: exactly}, len(ask), progress=False)
    for variant, name in names.items():
        workshop.made[name].ms = ms.pop(variant)
        workshop.made[name].recall = overlap(found[variant][: len(ask)], exact[EXACTLY], workshop.limit)
    return {**exact_ms, **ms}


@dataclass(frozen=True, slots=True)
class FilterFigures:
    """Of one filter: the share of the documents that pass, and of searches in a collection without and with payload
    indexes, how many hits they give, the recall against exact search, and the milliseconds."""

    passing: float
    hits: dict[str, float]
    recall: dict[str, float]
    ms: dict[str, Latency]


def measure_filters(workshop: Workshop, size: int) -> dict[str, FilterFigures]:
    """`{filter: figures}` of collections of `size` passages."""
    names = {variant: workshop.build(variant, size) for variant in (DEFAULTS, INDEXED)}
    with ExitStack() as stack:
        indexes = {v: stack.enter_context(QdrantIndex(name, workshop.place)) for v, name in names.items()}
        ask = Questions(workshop.queries, workshop.limit)
        searches = {
            (what, variant): partial(ask, index, filter=condition)
            for what, condition in FILTERS.items()
            for variant, index in indexes.items()
        }
        found, ms = in_turns(searches, len(ask), progress=False)
        figures = {}
        for what, condition in FILTERS.items():
            exactly = partial(ask, indexes[INDEXED], filter=condition, effort=EXACT)
            exact = [exactly(query) for query in range(len(ask))]
            figures[what] = FilterFigures(
                indexes[INDEXED].count(condition) / size,
                {variant: float(np.mean([len(ids) for ids in found[what, variant]])) for variant in indexes},
                {variant: overlap(found[what, variant], exact, workshop.limit) for variant in indexes},
                {variant: ms[what, variant] for variant in indexes},
            )
    return figures


def show(rows: Mapping[str, Figures], size: int, limit: int, others: Mapping[str, Latency]) -> None:
    """Print what each variant costs, and where its bytes on the disk are."""

    def timed(ms: Latency | None) -> str:
        return "-" if ms is None else f"{ms.p50:.2f} / {ms.p95:.2f}"

    texts = np.mean([one.own_bytes for one in rows.values()])
    click.echo(f"\n{size:,} passages of {texts:.0f} bytes of text and fields\n")
    table = [
        [
            variant, f"{one.recall:.4f}", timed(one.ms), f"{sum(one.disk_mib.values()):.0f}",
            f"{one.memory_mib['RssAnon']:.1f}", f"{one.memory_mib['RssFile']:.0f}",
            *(f"{one.seconds[kind]:.0f}" for kind in ("load cpu", "build cpu")),
        ]
        for variant, one in rows.items()
    ]  # fmt: skip
    table += [[what, "1.0000" if what == EXACTLY else "-", timed(ms), *"-----"] for what, ms in others.items()]
    echo_table(table, header=["", f"recall@{limit}", "ms (p50 / p95)", "disk MiB", "RAM MiB", "mapped MiB",
                              "load CPU s", "build CPU s"])  # fmt: skip
    kinds = [*FILES, "other"]
    for what in ("disk", "mapped"):
        click.echo(f"\n{what} MiB\n")
        mib = {variant: one.disk_mib if what == "disk" else one.mapped_mib for variant, one in rows.items()}
        echo_table(
            [[v, *(f"{by_kind[kind]:.1f}" for kind in kinds)] for v, by_kind in mib.items()], header=["", *kinds]
        )


def show_filters(tables: Mapping[int, Mapping[str, FilterFigures]]) -> None:
    """Print what searches with a filter take and find."""
    for size, table in tables.items():
        click.echo(f"\n{size:,} passages, without and with payload indexes: hits, recall, ms (p50 / p95)\n")
        echo_table(
            [
                [what, f"{100 * one.passing:.1f} %",
                 *(cell for v in (DEFAULTS, INDEXED) for cell in (
                     f"{one.hits[v]:.0f}", f"{one.recall[v]:.4f}", f"{one.ms[v].p50:.2f} / {one.ms[v].p95:.2f}"))]
                for what, one in table.items()
            ],
            header=["", "passing", "without: hits", "recall", "ms", "with: hits", "recall", "ms"],
        )  # fmt: skip


def child(place: str, name: str, queries: str, limit: str) -> None:
    """What opening a collection and searching it adds to the memory of this process, in MiB."""
    ask = Questions(Path(queries), int(limit))

    def search(index: QdrantIndex) -> None:
        hybrid = index.info().metadata.options.bm25 is not None
        for query in range(len(ask)):
            ask(index, query, hybrid=hybrid)

    with QdrantIndex(WARM, place) as warm, QdrantIndex(name, place) as index:
        search(warm)
        before = _memory_mib()
        search(index)  # opens it
        memory = {kind: mib - before[kind] for kind, mib in _memory_mib().items()}
        print(json.dumps({"memory": memory, "mapped": mapped_mib(Path(place) / name)}))


def _memory_mib() -> dict[str, float]:
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free would hide what is taken from it next
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {kind: int(status[kind].split()[0]) / 1024 for kind in ("RssAnon", "RssFile")}


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main()
