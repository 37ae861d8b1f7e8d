"""Compare the gain that calibration predicts with the gain that real queries have.

    python benchmarks/calibration.py MODEL nl2bash scifact --split dev

The passages of each BEIR folder are stored in an embedded collection. The scales are then chosen and tested by

- pseudo-queries of both families, as `d2llm tune --calibrate` does without judgements;
- those of one family alone, which is not safe: a row shows what it would do;
- judged queries of the split `train`;
- the judged queries of the split `--split` that are measured: the most that any scales can gain there.

`predicted` is the gain in nDCG@10 on held-out queries of the same kind, `real` the gain of the same scales on all
queries of `--split`, both with their 95 % intervals. Only rows with `accepted` would be stored.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

import d2llm
from d2llm.beir import RetrievalData
from d2llm.calibration import FEWEST, FEWEST_JUDGED, Calibration, Evidence, calibrate, choices_around, ndcg
from d2llm.cli_options import echo_table
from d2llm.connectors import QdrantIndex
from d2llm.connectors.cli_corpus import Corpus, survey
from d2llm.evidence import judged_evidence, pseudo_evidence
from d2llm.metrics import Qrels, paired_test

TASK = "asymmetric"


@click.command()
@click.argument("model_folder", type=click.Path(path_type=Path, exists=True))
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--split", default="dev", show_default=True, help="The judged queries that stand for real ones.")
@click.option("--queries", default=600, show_default=True, help="Pseudo-queries of each family.")
@click.option("--judged", default=600, show_default=True, help="Judged training queries.")
@click.option("--candidates", default=100, show_default=True)
@click.option("--hybrid", is_flag=True, help="Recall by cosine and BM25.")
@click.option("--seed", default=0, show_default=True)
def main(
    model_folder: Path, folders: tuple[Path, ...], split: str, queries: int, judged: int, candidates: int, hybrid: bool,
    seed: int,
) -> None:  # fmt: skip
    """Calibrate MODEL_FOLDER on each of FOLDERS."""
    model, rows, found = d2llm.load(model_folder), list[list[str]](), dict[str, Any]()
    for folder in folders:
        data = RetrievalData.load(folder, split)
        bm25 = {"bm25": {"average_words": survey(Corpus(folder), None)[1]}} if hybrid else {}
        with tempfile.TemporaryDirectory() as qdrant, QdrantIndex("kb", qdrant, options=bm25) as index:
            index.add(model, data.documents.values(), progress=True)
            options: dict[str, Any] = {"candidates": candidates, "hybrid": hybrid, "progress": True}
            families: dict[str, Any] = pseudo_evidence(model, index, queries=queries, seed=seed, **options)
            asked, qrels = training_queries(folder, data, judged, seed)
            families["train"] = judged_evidence(model, index, asked, qrels, **options)
            real = judged_evidence(model, index, data.queries, data.qrels, **options)
        table = measured(model, families, real, seed)
        rows += [[folder.name, *row] for row in described(table)]
        found[folder.name] = table
    click.echo()
    echo_table(
        rows,
        header=["", "chosen by", "queries", "words x", "vectors x", "predicted", "accepted", "real gain", "of nDCG@10"],
    )
    print(json.dumps(found))


def training_queries(folder: Path, data: RetrievalData, most: int, seed: int) -> tuple[dict[str, str], Qrels]:
    """Return random queries of the split `train`, `{id: text}`, none of which is measured, and the judgements."""
    training, measured = RetrievalData.load(folder, "train"), {text.strip() for text in data.queries.values()}
    usable = [
        query
        for query, text in training.queries.items()
        if text.strip() not in measured and max(training.qrels[query].values()) > 0
    ]
    chosen = random.Random(seed).sample(usable, min(most, len(usable)))
    return {query: training.queries[query] for query in chosen}, training.qrels


def measured(
    model: d2llm.Model, families: Mapping[str, Sequence[Evidence]], real: Sequence[Evidence], seed: int
) -> dict[str, dict[str, Any]]:
    """Return what each way to calibrate chooses and predicts, and what it brings to the real queries."""
    current = dict(zip(model.config.parts, model.config.scales[TASK], strict=True))
    ways = {
        "hard and easy": {name: families[name] for name in ("hard", "easy")},
        **{name: {name: evidence} for name, evidence in families.items()},
    }
    table = {}
    for name, evidence in ways.items():
        fewest = FEWEST_JUDGED if name == "train" else FEWEST
        result = calibrate(evidence, current, choices_around(current), fewest=fewest, seed=seed)
        table[name] = {**asdict(result), "accepted": result.accepted, "real": gain(real, result)}
    choices = [current, *choices_around(current)]
    means_G = ndcg(real, np.array([list(scales.values()) for scales in choices], np.float32)).mean(1)
    best = Calibration(current, choices[int(means_G.argmax())], {"real": len(real)}, {})
    table["the real queries"] = {**asdict(best), "accepted": False, "real": gain(real, best)}
    return table


def gain(real: Sequence[Evidence], result: Calibration) -> dict[str, float]:
    """Return what the chosen scales bring to the real queries."""
    scales_2C = np.array([list(result.current.values()), list(result.chosen.values())], np.float32)
    before, after = ndcg(real, scales_2C)
    return {**paired_test(after.tolist(), before.tolist()), "ndcg_10": float(before.mean())}


def described(table: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Return the rows of the table that is printed."""
    return [
        [
            name,
            "/".join(map(str, result["queries"].values())),
            *(
                f"{result['chosen'][part] / result['current'][part]:.2f}" if result["current"].get(part) else "-"
                for part in ("words", "vectors")
            ),
            ", ".join(map(interval, result["gains"].values())) or "-",
            "yes" if result["accepted"] else "no",
            interval(result["real"]),
            f"{result['real']['ndcg_10']:.4f}",
        ]
        for name, result in table.items()
    ]


def interval(test: Mapping[str, float]) -> str:
    """Return a difference with its interval, in points of nDCG@10."""
    return f"{100 * test['difference']:+.1f} ({100 * test['low']:+.1f} to {100 * test['high']:+.1f})"


if __name__ == "__main__":
    main()
