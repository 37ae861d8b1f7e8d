"""The command `d2llm init`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from d2llm.cli_options import echo_json, echo_next, json_option, max_length_option, words_option
from d2llm.corpus import read_contents
from d2llm.embedder import create_student
from d2llm.files import require_new


@click.command("init")
@click.argument("embedder")
@click.argument("student", type=click.Path(path_type=Path))
@words_option
@max_length_option
@json_option
def init_command(embedder: str, student: Path, corpus: Path | None, max_length: int | None, as_json: bool) -> None:
    """Make an untrained student of EMBEDDER and write it to the new folder STUDENT.

    EMBEDDER is the hub id or the folder of a sentence-transformers model, or of a plain transformer, or a GGUF file.
    The student computes the very vectors of sentence-transformers: with the embedder's pooling, Dense layers, length
    limit, and prompts for queries and passages. A plain transformer and a GGUF file get mean pooling.

    Nothing is trained. Without --corpus, rescoring ranks as the cosine does. With it, the words and vectors of both
    texts count too, with the same weights for every corpus. `d2llm tune --calibrate` finds out whether others are
    better for yours: give it a few dozen queries that you have judged.

    STUDENT refers to EMBEDDER: keep it where it is until the export.

    \b
    From an embedder to a search, without training:
      d2llm init sentence-transformers/all-MiniLM-L6-v2 STUDENT
      d2llm-export onnx STUDENT MODEL
      d2llm index MODEL CORPUS.jsonl --qdrant ./qdrant --collection docs

    d2llm-export onnx takes EMBEDDER too, if you need no STUDENT.
    """
    require_new(student)  # before the work, not after it
    made = create_student(embedder, max_length=max_length, corpus=read_contents(corpus))
    made.save(student)
    config = made.config
    facts: dict[str, Any] = {
        "student": str(student),
        "pooling": config.pma_start if config.pooling == "pma" else config.pooling,
        "embedding_dim": made.embedding_dim,
        "max_length": config.query_max_length,
        "query_prompt": config.query_prompt,
        "document_prompt": config.document_prompt,
        "lexical_slots": config.lexical_slots,
        "vectors": config.vectors,
        "feature_bytes": made.iem.layouts[1].bytes,
        "scales": {part: round(scale, 6) for part, scale in made.iem.scales_of("asymmetric").items()},
    }
    if as_json:
        echo_json(facts)
        return
    click.echo(
        f"{student}: {facts['pooling']} pooling, vectors of {made.embedding_dim} numbers, texts of at most "
        f"{config.query_max_length} tokens"
    )
    click.echo(f"  prompt of queries: {config.query_prompt!r}, of passages: {config.document_prompt!r}")
    scales = ", ".join(f"{part} {scale:g}" for part, scale in facts["scales"].items())
    click.echo(f"  scales of the score: {scales}")
    if not config.lexical_slots:
        click.echo("  no words and no vectors in the score: they are fitted to a corpus (--corpus)")
    echo_next("d2llm-export", "onnx", student, "MODEL")
    if config.lexical_slots:
        click.echo(
            "Later, with a few dozen judged queries: d2llm tune MODEL --calibrate --queries FILE --qrels FILE ..."
        )
