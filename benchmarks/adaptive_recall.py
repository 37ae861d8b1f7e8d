"""Compare one round of recall with two rounds, where the IEM scores of the first round correct the query vector.

    python benchmarks/adaptive_recall.py MODEL medquad --split dev

This follows AXN (Yadav et al., ICLR 2024). The first round gives candidates X [K, E] with IEM scores s [K]. Ridge
regression finds the vector u close to a multiple of the query whose inner products with X are close to s. The second
round fetches the passages nearest to u, and the IEM rescores all candidates. The baseline is one round with the same
number of candidates. Search and scores are exact. A second round costs another query, and fetching the vectors of the
candidates.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
from tqdm.auto import tqdm

import d2llm
from d2llm.beir import RetrievalData
from d2llm.cli_options import echo_table
from d2llm.metrics import evaluate, overlap
from d2llm.types import Embeddings, Floats


def corrected(query_E: Floats, candidates_KE: Floats, scores_K: Floats, ridge: float) -> Floats:
    """The vector [E] that fits the scores: u = a q + X' (X X' + ridge I)^-1 (s - a X q), a the slope of s on Xq."""
    cosine_K = candidates_KE @ query_E
    centred_K = scores_K - scores_K.mean()
    slope = float(centred_K @ (cosine_K - cosine_K.mean()) / max(1e-9, float(np.var(cosine_K) * len(cosine_K))))
    residual_K = centred_K - slope * (cosine_K - cosine_K.mean())
    gram_KK = candidates_KE @ candidates_KE.T + ridge * np.eye(len(scores_K), dtype=np.float32)
    vector_E: Floats = (slope * query_E + candidates_KE.T @ np.linalg.solve(gram_KK, residual_K)).astype(np.float32)
    return vector_E


@click.command()
@click.argument("model_folder", type=click.Path(path_type=Path, exists=True))
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--split", default="dev", show_default=True)
def main(model_folder: Path, folder: Path, split: str) -> None:
    """Measure MODEL_FOLDER on FOLDER, a BEIR folder."""
    model, data = d2llm.load(model_folder), RetrievalData.load(folder, split)
    ids = list(data.documents)
    documents = model.encode_document([document.content for document in data.documents.values()], progress=True)
    queries = model.encode_query(list(data.queries.values()))
    budgets, ridges = (20, 50, 100), (0.1, 1.0, 10.0)
    rankings: dict[tuple[int, str], list[list[str]]] = {}
    exhaustive: list[list[str]] = []
    for row in tqdm(range(len(data.queries)), unit="query"):
        query = Embeddings(queries.vectors[row : row + 1], queries.features[row : row + 1])
        iem_N, cosine_N = model.score_all(query, documents)[0], documents.vectors @ queries.vectors[row]
        exhaustive.append([ids[i] for i in np.argsort(-iem_N, kind="stable")[:10]])
        order = np.argsort(-cosine_N, kind="stable")
        for budget in budgets:
            rows = {"one round": order[:budget]}
            first = order[: budget // 2]
            for ridge in ridges:
                u_E = corrected(queries.vectors[row], documents.vectors[first], iem_N[first], ridge)
                second_N = documents.vectors @ u_E
                second_N[first] = -np.inf
                rows[f"two rounds, ridge {ridge}"] = np.concatenate(
                    [first, np.argsort(-second_N, kind="stable")[: budget - len(first)]]
                )
            for name, candidates in rows.items():
                best = candidates[np.argsort(-iem_N[candidates], kind="stable")]
                rankings.setdefault((budget, name), []).append([ids[i] for i in best])
    table: list[tuple[int, str, float, float]] = []
    for (budget, name), ranking in rankings.items():
        run = {
            query: {id_: -rank for rank, id_ in enumerate(row)}
            for query, row in zip(data.queries, ranking, strict=True)
        }
        measures = evaluate(run, data.qrels)
        table.append((budget, name, measures["nDCG@10"], overlap(ranking, exhaustive)))
    click.echo(f"{len(data.queries)} queries ({split}), {len(ids)} passages")
    echo_table(
        [[name, str(budget), f"{ndcg:.4f}", f"{share:.4f}"] for budget, name, ndcg, share in table],
        header=["", "candidates", "nDCG@10", "overlap@10 with the exhaustive IEM"],
    )
    print(json.dumps(table))


if __name__ == "__main__":
    main()
