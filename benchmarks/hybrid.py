"""What words are worth in candidates: by cosine, by words, and by both, each with and without the IEM.

    python benchmarks/hybrid.py MODEL medquad --split dev

The passages of a BEIR folder go into an embedded collection with words. By cosine and by words alone, passages are
ranked exactly; both together are fused by the engine (RRF and DBSF), and rescored by the IEM alone, or by the IEM and
the words as `Searcher` does. Differences are tested against cosine + IEM.
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
from d2llm.connectors.cli import survey
from d2llm.connectors.points import Bm25Encoder
from d2llm.connectors.schema import Words
from d2llm.evaluate import Ranking, significance
from d2llm.indexing import digest_of, payload_of
from d2llm.metrics import evaluate, overlap
from d2llm.search import BM25_WEIGHT, add_bm25
from d2llm.types import Embeddings, Floats, Fusion, Point

BASELINE = "cosine + IEM"


class WordsAlone:
    """BM25 over all passages, from the sparse vectors that the engine has, weighed as it does."""

    def __init__(self, encoder: Bm25Encoder, texts: list[str]) -> None:
        self.encoder, self.size = encoder, len(texts)
        self.postings: dict[int, list[tuple[int, float]]] = {}
        for row, text in enumerate(texts):
            for word, value in zip(*encoder.document({"text": text}), strict=True):
                self.postings.setdefault(word, []).append((row, value))

    def scores(self, query: str) -> Floats:
        """Scores [N] of every passage."""
        scores_N = np.zeros(self.size, np.float32)
        for word in self.encoder.query(query).indices:
            found = self.postings.get(word, [])
            idf = np.log1p((self.size - len(found) + 0.5) / (len(found) + 0.5))
            for row, value in found:
                scores_N[row] += idf * value
        return scores_N


@click.command()
@click.argument("model_folder", type=click.Path(path_type=Path, exists=True))
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--split", default="dev", show_default=True)
@click.option("--candidates", "depths", multiple=True, default=[100], show_default=True, help="May be repeated.")
@click.option("--weight", "weights", multiple=True, type=float, default=[BM25_WEIGHT], show_default=True,
              help="What words count beside the IEM. May be repeated.")  # fmt: skip
def main(model_folder: Path, folder: Path, split: str, depths: list[int], weights: list[float]) -> None:
    """Measure MODEL_FOLDER on FOLDER."""
    model, data = d2llm.load(model_folder), RetrievalData.load(folder, split)
    ids, texts = list(data.documents), [document.content for document in data.documents.values()]
    documents = model.encode_document(texts, progress=True)
    queries = model.encode_query(list(data.queries.values()))
    words = Words(average_words=survey(folder, None)[1])
    alone = WordsAlone(Bm25Encoder(words), texts)
    with tempfile.TemporaryDirectory() as place:
        with QdrantIndex("kb", place, options={"words": words}) as index:
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
                measure(model, data, index, documents, queries, alone, candidates, split, weights)


def measure(
    model: d2llm.Model,
    data: RetrievalData,
    index: QdrantIndex,
    documents: Embeddings,
    queries: Embeddings,
    alone: WordsAlone,
    candidates: int,
    split: str,
    weights: list[float],
) -> None:
    """Print what each way of recall is worth with so many candidates."""
    ids, place = list(data.documents), {id_: row for row, id_ in enumerate(data.documents)}
    names = ("cosine", "words", "hybrid (rrf)", "hybrid (dbsf)")
    rankings = {name: Ranking([]) for pair in ((name, f"{name} + IEM") for name in names) for name in pair}
    exhaustive: list[list[str]] = []
    for row, text in enumerate(tqdm(data.queries.values(), unit="query")):
        vector = queries.vectors[row]
        cosine_N = documents.vectors @ vector
        query = Embeddings(queries.vectors[row : row + 1], queries.features[row : row + 1])
        iem_N = model.score_all(query, documents)[0]
        exhaustive.append([ids[i] for i in np.argsort(-iem_N, kind="stable")[:10]])

        scores_N = alone.scores(text)
        by_words = [i for i in np.argsort(-scores_N, kind="stable")[:candidates].tolist() if scores_N[i] > 0]
        found = {"cosine": np.argsort(-cosine_N, kind="stable")[:candidates].tolist(), "words": by_words}
        for fusion in get_args(Fusion):
            fused = index.recall(vector, candidates, query_text=text, fusion=fusion)
            found[f"hybrid ({fusion})"] = [place[id_] for id_ in fused.ids]
        for name, rows in found.items():
            rankings[name].ids.append([ids[i] for i in rows])
            rankings[f"{name} + IEM"].ids.append([ids[i] for i in sorted(rows, key=lambda i: -iem_N[i])])
            if not name.startswith("hybrid"):
                continue
            for weight in weights:
                scores = add_bm25(iem_N[rows], scores_N[rows], weight)
                best = np.argsort(-scores, kind="stable")
                rankings.setdefault(f"{name} + IEM + {weight} words", Ranking([])).ids.append(
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
