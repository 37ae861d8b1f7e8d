"""Measure what HNSW misses for queries of the full and of the small encoder, in the embedded engine.

    python benchmarks/search_effort.py MODEL BEIR_FOLDER

MODEL has a small query encoder. At each size, the collection contains the folder's passages and, up to the size, others
drawn around them. The queries are a sample of the split. Prints what `d2llm tune` prints for a collection.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import click

import d2llm
from d2llm.beir import RetrievalData
from d2llm.connectors import QdrantIndex
from d2llm.connectors.cli_tune import show_tuning
from d2llm.connectors.tune import EffortTable, Tuning, measure_effort, measure_overfetch
from d2llm.model import ENCODER_SIZES

sys.path.insert(0, str(Path(__file__).parent))
from search_latency import fill


@click.command()
@click.argument("model_folder", type=click.Path(path_type=Path, exists=True))
@click.argument("dataset", type=click.Path(path_type=Path, exists=True))
@click.option("--split", default="dev", show_default=True)
@click.option("--sizes", default="10000,100000", show_default=True, help="Passages, comma-separated.")
@click.option("--queries", default=200, show_default=True, help="Size of the sample of queries.")
@click.option("--candidates", default=100, show_default=True, help="Passages that recall fetches.")
@click.option("--target", default=0.99, show_default=True, help="Recall to reach.")
def main(
    model_folder: Path, dataset: Path, split: str, sizes: str, queries: int, candidates: int, target: float
) -> None:
    """Measure MODEL_FOLDER on DATASET, a BEIR folder."""
    data = RetrievalData.load(dataset, split)
    texts = random.Random(0).sample(list(data.queries.values()), min(queries, len(data.queries)))
    passages = [document.content for document in data.documents.values()]
    models = {encoder: d2llm.load(model_folder, query_encoder=encoder) for encoder in ENCODER_SIZES}
    encoded = {encoder: model.encode_query(texts) for encoder, model in models.items()}
    click.echo(f"encoding {len(passages)} passages ...", err=True)
    real = models["full"].encode_document(passages)
    for size in map(int, sizes.split(",")):
        click.echo(f"indexing {size} passages ...", err=True)
        with tempfile.TemporaryDirectory() as folder, QdrantIndex("benchmark", folder) as index:
            fill(index, models["full"], real, passages, size)
            efforts: dict[d2llm.model.EncoderSize, EffortTable] = {
                encoder: measure_effort(index, encoded[encoder].vectors, candidates) for encoder in ENCODER_SIZES
            }
            overfetch = measure_overfetch(
                index, models["small"], encoded["full"], encoded["small"], candidates,
                hnsw_ef=efforts["small"].cheapest(target).hnsw_ef,
            )  # fmt: skip
            tuning = Tuning(size, index.has_graph(), len(texts), candidates, target, efforts, overfetch)
            show_tuning(tuning, index.info().metadata.vector_bytes)
            click.echo()


if __name__ == "__main__":
    main()
