"""Compare recall by cosine, by BM25 and by both (hybrid), each with and without the IEM.

    python benchmarks/hybrid.py MODEL medquad --split dev

The passages of a BEIR folder are stored in an embedded collection with BM25 vectors. Cosine and BM25 alone rank all
passages exactly. For hybrid recall, the engine fuses both (RRF and DBSF). Hybrid candidates are rescored by the IEM
alone, and by the IEM and BM25 as in `Searcher`. Differences are tested against cosine + IEM.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import get_args

import click
import numpy as np
from tqdm.auto import tqdm

import d2llm
from d2llm.beir import RetrievalData
from d2llm.cli_options import echo_measures, echo_table
from d2llm.connectors import QdrantIndex
from d2llm.connectors.bm25 import Bm25Encoder
from d2llm.connectors.cli_corpus import Corpus, survey
from d2llm.connectors.schema import Bm25Options
from d2llm.evaluate import Ranking, significance
from d2llm.indexing import digest_of, payload_of
from d2llm.metrics import evaluate, overlap
from d2llm.search import BM25_WEIGHT, add_bm25
from d2llm.types import Embeddings, Floats, Fusion, Point

BASELINE = "cosine + IEM"


class ExactBm25:
    """BM25 over all passages, from the sparse vectors that the engine stores and with the engine's idf."""

    def __init__(self, encoder: Bm25Encoder, texts: list[str]) -> None:
        self.encoder, self.size = encoder, len(texts)
        self.postings: dict[int, list[tuple[int, float]]] = {}
        for row, text in enumerate(texts):
            for word, value in zip(*encoder.document({"text": text}), strict=True):
                self.postings.setdefault(word, []).append((row, value))

    def scores(self, query: str) -> Floats:
        """BM25 scores [N] of all passages."""
        scores_N = np.zeros(self.size, np.float32)
        for word in self.encoder.query(query).indices:
            postings = self.postings.get(word, [])
            idf = np.log1p((self.size - len(postings) + 0.5) / (len(postings) + 0.5))
            for row, value in postings:
                scores_N[row] += idf * value
        return scores_N


@click.command()
@click.argument("model_folder", type=click.Path(path_type=Path, exists=True))
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--split", default="dev", show_default=True)
@click.option("--candidates", "depths", multiple=True, default=[100], show_default=True,
              help="Passages that recall fetches and the IEM rescores. Repeatable.")  # fmt: skip
@click.option("--weight", "weights", multiple=True, type=float, default=[BM25_WEIGHT], show_default=True,
              help="Weight of the BM25 score beside the IEM score. Repeatable.")  # fmt: skip
def main(model_folder: Path, folder: Path, split: str, depths: list[int], weights: list[float]) -> None:
    """Measure MODEL_FOLDER on FOLDER."""
    model, data = d2llm.load(model_folder), RetrievalData.load(folder, split)
    ids, texts = list(data.documents), [document.content for document in data.documents.values()]
    documents = model.encode_document(texts, progress=True)
    queries = model.encode_query(list(data.queries.values()))
    options = Bm25Options(average_words=survey(Corpus(folder), None)[1])
    bm25 = ExactBm25(Bm25Encoder(options), texts)
    with tempfile.TemporaryDirectory() as qdrant:
        with QdrantIndex("kb", qdrant, options={"bm25": options}) as index:
            index.open_for(model.config)
            for start in range(0, len(ids), 1000):
                index.upsert([
                    Point(document.id, vector, features, payload_of(document), digest_of(document))
                    for document, vector, features in zip(
                        list(data.documents.values())[start : start + 1000], documents.vectors[start : start + 1000],
                        documents.features[start : start + 1000], strict=True,
                    )
                ])  # fmt: skip
            index.optimize()
            for candidates in depths:
                measure(model, data, index, documents, queries, bm25, candidates, split, weights)


def measure(
    model: d2llm.Model,
    data: RetrievalData,
    index: QdrantIndex,
    documents: Embeddings,
    queries: Embeddings,
    bm25: ExactBm25,
    candidates: int,
    split: str,
    weights: list[float],
) -> None:
    """Print the measures of each way of recall with this number of candidates."""
    ids, row_of = list(data.documents), {id_: row for row, id_ in enumerate(data.documents)}
    names = ("cosine", "BM25", "hybrid (rrf)", "hybrid (dbsf)")
    rankings = {name: Ranking([]) for pair in ((name, f"{name} + IEM") for name in names) for name in pair}
    exhaustive: list[list[str]] = []
    for row, text in enumerate(tqdm(data.queries.values(), unit="query")):
        vector = queries.vectors[row]
        cosine_N = documents.vectors @ vector
        query = Embeddings(queries.vectors[row : row + 1], queries.features[row : row + 1])
        iem_N = model.score_all(query, documents)[0]
        exhaustive.append([ids[i] for i in np.argsort(-iem_N, kind="stable")[:10]])

        bm25_N = bm25.scores(text)
        by_bm25 = [i for i in np.argsort(-bm25_N, kind="stable")[:candidates].tolist() if bm25_N[i] > 0]
        recalled = {"cosine": np.argsort(-cosine_N, kind="stable")[:candidates].tolist(), "BM25": by_bm25}
        for fusion in get_args(Fusion):
            fused = index.recall(vector, candidates, query_text=text, fusion=fusion)
            recalled[f"hybrid ({fusion})"] = [row_of[id_] for id_ in fused.ids]
        for name, rows in recalled.items():
            rankings[name].ids.append([ids[i] for i in rows])
            rankings[f"{name} + IEM"].ids.append([ids[i] for i in sorted(rows, key=lambda i: -iem_N[i])])
            if not name.startswith("hybrid"):
                continue
            for weight in weights:
                scores = add_bm25(iem_N[rows], bm25_N[rows], weight)
                best = np.argsort(-scores, kind="stable")
                rankings.setdefault(f"{name} + IEM + {weight} BM25", Ranking([])).ids.append(
                    [ids[rows[i]] for i in best]
                )
    table = {
        name: {**evaluate(ranking.run(data.queries), data.qrels), "overlap@10": overlap(ranking.ids, exhaustive)}
        for name, ranking in rankings.items()
    }
    click.echo(f"\n{len(data.queries)} queries ({split}), {len(ids)} passages, candidates={candidates}\n")
    echo_measures(table)
    tested = significance(rankings, data, BASELINE)
    click.echo()
    echo_table(
        [[name, *(f"{value:+.4f}" for value in row.values())] for name, row in tested.items()],
        header=[f"nDCG@10 against {BASELINE}", *next(iter(tested.values()))],
    )
    print(json.dumps({"split": split, "candidates": candidates, "rows": table, "significance": tested}))


if __name__ == "__main__":
    main()
