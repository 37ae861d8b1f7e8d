"""Indexing a corpus with many encoders at once, on a Ray cluster: each worker calls `Index.add` with its share."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from d2llm.bad_rows import OnError
from d2llm.corpus import read_documents
from d2llm.errors import ArgumentError, D2LLMError, StoreError, import_extra
from d2llm.indexing import AddReport
from d2llm.model import load
from d2llm.readers import is_stream
from d2llm.sessions import Device
from d2llm.types import Document

from .place import Qdrant

SHARE = 2048
"""Documents that the reader collects for a worker at a time."""


def add_on_ray(
    qdrant: Qdrant,
    collection: str,
    model_folder: Path,
    corpus: Path,
    on_error: OnError | None = None,
    *,
    workers: int | None = None,
    device: Device = "cpu",
    threads: int | None = None,
    chunk: bool = True,
    prune: bool = False,
    keep: Iterable[str] = (),
    progress: bool = False,
    total: int | None = None,
) -> AddReport:
    """`Index.add` of a corpus by several `workers`, with the same result: one encoder each, on `cuda` with a GPU of its
    own. The default number of workers is that of the GPUs on `cuda`, otherwise that of the machines.

    The `collection` must exist. Corpus and model must be at the same path on each machine. Uses the cluster at
    RAY_ADDRESS, or one made of this machine.

    Raises:
        ArgumentError: the collection is embedded, or the corpus is standard input or a pipe: only one process may open
            it.
        StoreError: a worker was lost for good; and what else `Index.add` raises.
        MissingExtraError: Ray is not installed.
    """
    ray = import_extra("ray", "ray")
    data = import_extra("ray.data", "ray")
    require_shared(qdrant)
    if is_stream(corpus):
        raise ArgumentError("stdin or a pipe can be read by one process alone: give --engine ray a file")
    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS"), logging_level=logging.WARNING, log_to_driver=False)
    workers = workers or int(ray.cluster_resources().get("GPU", 0) if device == "cuda" else len(ray.nodes()))
    report = AddReport()
    with qdrant.index(collection) as index, _quiet(data), tqdm(total=total, unit="doc", disable=not progress) as bar:
        shares = data.read_datasource(_source(corpus.absolute(), on_error)).map_batches(
            _Worker,
            fn_constructor_args=(qdrant, collection, model_folder.absolute(), device, threads, chunk),
            batch_size=SHARE,
            batch_format="numpy",
            compute=data.ActorPoolStrategy(size=workers),
            num_gpus=1 if device == "cuda" else 0,
            num_cpus=0,  # onnxruntime has threads of its own; `workers` says how many there are
        )
        try:
            for done in shares.iter_rows():
                report.added += done["added"]
                report.unchanged += done["unchanged"]
                report.truncated += done["truncated"]
                report.split += done["split"]
                report.passages += done["passages"]
                bar.update(done["added"] + done["unchanged"])
        except ray.exceptions.RayError as error:
            raise _cause(error) from error
        if prune:
            ids = (document.id for document in read_documents(corpus, on_error))
            report.pruned = index.prune(chain(ids, keep))
    return report


def require_shared(qdrant: Qdrant) -> None:
    """Raise an `ArgumentError` for a folder, where only one process may open a collection."""
    if not qdrant.shared:
        raise ArgumentError(f"several processes cannot write into {qdrant} at once: --engine ray needs a Qdrant server")


@contextmanager
def _quiet(data: Any) -> Iterator[None]:
    """Switch off Ray's own progress bars and plans, which would mix with ours."""
    context, logger = data.DataContext.get_current(), logging.getLogger("ray.data")
    shown, level = context.enable_progress_bars, logger.level
    context.enable_progress_bars = False
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = shown
        logger.setLevel(level)


class _Worker:
    """One encoder, in a process of its own."""

    def __init__(
        self, qdrant: Qdrant, collection: str, model_folder: Path, device: Device, threads: int | None, chunk: bool
    ) -> None:
        self._index, self._chunk = qdrant.index(collection), chunk
        self._model = load(model_folder, device, threads=threads, query_encoder="full")

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        documents = [Document(*json.loads(text)) for text in batch["document"]]
        report = self._index.add(self._model, documents, chunk=self._chunk)
        return {name: [count] for name, count in asdict(report).items()}


def _source(corpus: Path, on_error: OnError | None) -> Any:
    """The corpus as Ray reads it: one task that yields blocks, since one reader keeps many encoders busy."""
    data = import_extra("ray.data", "ray")
    block = import_extra("ray.data.block", "ray")
    arrow = import_extra("pyarrow", "ray")

    class Corpus(data.Datasource):  # type: ignore[misc, name-defined]  # Ray has no types and is imported late
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, *_: Any, **__: Any) -> list[Any]:
            def read() -> Iterator[Any]:
                for share in _shares(read_documents(corpus, on_error)):
                    yield arrow.table({"document": share})

            return [data.ReadTask(read, block.BlockMetadata(None, None, None))]

    return Corpus()


def _shares(documents: Iterable[Document]) -> Iterator[list[str]]:
    share: list[str] = []
    for document in documents:
        share.append(json.dumps([document.id, document.text, document.title, dict(document.payload)]))
        if len(share) == SHARE:
            yield share
            share = []
    if share:
        yield share


def _cause(error: BaseException) -> D2LLMError:
    """The error of a worker, without Ray's wrappers."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, D2LLMError):
            return inner
        inner = getattr(inner, "cause", None) or inner.__cause__
    return StoreError(f"Ray lost a worker or could not start one: {error}. Run the same command again to go on.")
