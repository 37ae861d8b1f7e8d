"""Collect evidence for calibration from an index: by queries that people have judged, or by pseudo-queries.

Q queries, K candidates of a query.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from d2llm.calibration import FEWEST_JUDGED, Calibration, Evidence, calibrate, choices_around, ideal_dcg
from d2llm.errors import DataError, import_extra
from d2llm.index import Index
from d2llm.metrics import Qrels, itself
from d2llm.model import Model
from d2llm.payload import title_of
from d2llm.pseudo_queries import PseudoQuery, easy_queries, hard_queries
from d2llm.types import Candidates, Document, Embeddings, Task

logger = logging.getLogger(__name__)

IDS = 20_000
"""The ids among which passages are sampled, the first ones of the index. Qdrant orders documents at random: by a digest
of their ids."""
SPARE = 3
"""Passages that are sampled for each pseudo-query. Some are too short for one."""


def calibrate_index(
    model: Model,
    index: Index,
    queries: Mapping[str, str] | None = None,
    qrels: Qrels | None = None,
    *,
    most: int = 600,
    candidates: int = 100,
    hybrid: bool = False,
    task: Task = "asymmetric",
    progress: bool = False,
) -> Calibration:
    """Calibrate the scales of a branch for an index. Nothing is stored.

    The evidence is that of the judged `queries`, `{id: text}`, or else of at most `most` pseudo-queries of each family.
    `candidates` passages are recalled, by cosine and BM25 if `hybrid`.

    Raises:
        DataError: fewer than 20 judged queries, or the index has none of the documents that `qrels` judges.
        ArgumentError: the model has no part whose scale can be multiplied.
        StoreError: the index is missing, cannot be reached, or is in use.
        MismatchError: another passage encoder made the index, or it has no BM25 vectors for hybrid recall.
        MissingExtraError: the extra `eval` is not installed.

    Example:
        >>> index = d2llm.FlatIndex()
        >>> report = index.add(model, documents)
        >>> found = calibrate_index(model, index, queries, qrels)
        >>> index.scales = {"asymmetric": found.scales}
    """
    import_extra("scipy.stats", "eval")  # fail now if it is missing, not after minutes of encoding
    index.open_for(model.config, create=False)
    own, used = (
        dict(zip(model.config.parts, scales[task], strict=True))
        for scales in (model.config.scales, index.scales_for(model.config))
    )
    choices = choices_around(own)
    options: dict[str, Any] = {"candidates": candidates, "hybrid": hybrid, "task": task, "progress": progress}
    if queries is None or qrels is None:
        return calibrate(pseudo_evidence(model, index, queries=most, **options), used, choices)
    if len(queries) < 2 * FEWEST_JUDGED:
        raise DataError(
            f"calibration needs {2 * FEWEST_JUDGED} or more judged queries, found {len(queries)}: judge more, or leave "
            "them out to calibrate by pseudo-queries"
        )
    evidence = judged_evidence(model, index, queries, qrels, **options)
    return calibrate({"judged": evidence}, used, choices, fewest=FEWEST_JUDGED)


def judged_evidence(
    model: Model,
    index: Index,
    queries: Mapping[str, str],
    qrels: Qrels,
    *,
    candidates: int = 100,
    hybrid: bool = False,
    task: Task = "asymmetric",
    progress: bool = False,
) -> list[Evidence]:
    """Return the evidence of Q judged queries, `{id: text}`. Each has a relevant document in `qrels`.

    `candidates` passages are recalled, by cosine and BM25 if `hybrid`. A document that is the query `itself` is left
    out.

    Raises:
        DataError: the index has none of the documents that `qrels` judges.
        StoreError: the index is missing, cannot be reached, or is in use.
        MismatchError: another passage encoder made the index, or it has no BM25 vectors for hybrid recall.
    """
    index.open_for(model.config, create=False)
    encoded = model.encode_query(list(queries.values()), progress=progress)
    found = judged_candidates(index, queries, encoded, qrels, candidates, hybrid=hybrid)
    evidence = []
    with tqdm(total=len(queries), desc="judged queries", unit="query", disable=not progress) as bar:
        for row, (query, recalled) in enumerate(zip(queries, found, strict=True)):
            recalled = recalled.documents()
            grades = [qrels[query].get(id_, 0) for id_ in recalled.ids]
            evidence.append(_evidence(model, encoded, row, recalled, grades, ideal_dcg(qrels[query].values()), task))
            bar.update()
    return evidence


def judged_candidates(
    index: Index, queries: Mapping[str, str], encoded: Embeddings, qrels: Qrels, limit: int, *, hybrid: bool
) -> Iterator[Candidates]:
    """Yield the `limit` candidates of each judged query, `{id: text}`, without a document that is the query `itself`.

    Raises:
        DataError: the index has none of the documents that `qrels` judges for these queries.
    """
    judged = sorted({document for query in queries for document in qrels[query]})
    stored = index.digests(judged)
    if not stored:
        raise DataError(f"none of the {len(judged)} documents judged is in the collection, such as {judged[0]!r}")
    if missing := [document for document in judged if document not in stored]:
        logger.warning("%d of %d documents judged are not in the collection, such as %r: no search finds them",
                       len(missing), len(judged), missing[0])  # fmt: skip
    known = index.digests(list(queries))
    for row, (query, text) in enumerate(queries.items()):
        own = itself(query, qrels) if query in known else None
        yield _recall(index, encoded, row, text if hybrid else "", limit, own)


def pseudo_evidence(
    model: Model,
    index: Index,
    *,
    queries: int,
    candidates: int = 100,
    hybrid: bool = False,
    task: Task = "asymmetric",
    seed: int = 0,
    progress: bool = False,
) -> dict[str, list[Evidence]]:
    """Return the evidence of two families of pseudo-queries, `{"hard": ..., "easy": ...}`, at most `queries` of each.

    They are made of passages of the index, of which a payload has the text. The passage of a hard query is encoded
    without the query, and takes the place of the one in the index. As in a search, it must be near enough to be
    recalled. So must the passage of an easy query.

    Raises:
        StoreError: the index is missing, cannot be reached, or is in use.
        MismatchError: another passage encoder made the index, or it has no BM25 vectors for hybrid recall.
    """
    index.open_for(model.config, create=False)
    documents = _sampled(index, SPARE * queries, seed)
    hard, easy = hard_queries(documents, queries, seed), easy_queries(documents, queries, seed)
    families: dict[str, list[Evidence]] = {"hard": [], "easy": []}
    rests = model.encode_document([query.passage for query in hard], progress=progress)
    encoded = model.encode_query([query.text for query in [*hard, *easy]], progress=progress)
    for row, query in enumerate(tqdm([*hard, *easy], desc="pseudo-queries", disable=not progress)):
        family, own = ("hard", query.document.id) if row < len(hard) else ("easy", None)
        found = _recall(index, encoded, row, query.text if hybrid else "", candidates, own)
        if own is not None:
            found = _with_rest(found, query, encoded, rests, row, candidates)
        found = found.documents()
        grades = [float(id_ == query.document.id) for id_ in found.ids]
        families[family].append(_evidence(model, encoded, row, found, grades, 1.0, task))
    return families


def _sampled(index: Index, count: int, seed: int) -> list[Document]:
    ids = sorted(islice(index.ids(), IDS))  # the engine's own order may differ from run to run
    chosen = random.Random(seed).sample(ids, min(count, len(ids)))
    payloads = index.get(chosen)
    return [
        Document(id_, str(payloads[id_].get("text", "")), title_of(payloads[id_])) for id_ in chosen if id_ in payloads
    ]


def _recall(
    index: Index, encoded: Embeddings, row: int, query_text: str, limit: int, without: str | None
) -> Candidates:
    found = index.recall(encoded.vectors[row], limit + (without is not None), query_text=query_text)
    return found.without(without, limit)


def _with_rest(
    found: Candidates, query: PseudoQuery, encoded: Embeddings, rests: Embeddings, row: int, limit: int
) -> Candidates:
    """Add what is left of the passage of a hard query, if recall would find it among `limit` candidates."""
    cosine = np.float32(rests.vectors[row] @ encoded.vectors[row])
    if len(found) == limit and cosine < found.scores.min():
        return found
    return replace(
        found,
        ids=[*found.ids, query.document.id],
        scores=np.append(found.scores, cosine),
        features=np.concatenate([found.features, rests.features[None, row]]),
        payloads=[*found.payloads, {}],
        bm25_scores=None,
        passages=[*found.passages, None],
    )


def _evidence(
    model: Model,
    encoded: Embeddings,
    row: int,
    found: Candidates,
    grades: Iterable[float],
    ideal: float,
    task: Task,
) -> Evidence:
    parts_1KC = model.parts(encoded.features[None, row], found.features[None], found.scores[None], task)
    return Evidence(parts_1KC[0], np.array([*grades], np.float32), ideal)
