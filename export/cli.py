"""The command `d2llm-export onnx`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import get_args

import click

from d2llm.cli import echo_json

from .onnx import DEFAULT_OPSET, Precision, export
from .verify import FLOORS, TOLERANCE


@click.command("onnx")
@click.argument("student", type=click.Path(path_type=Path))
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--precision", type=click.Choice(get_args(Precision)), default="fp32", show_default=True,
              help="Of the encoder's weights. int8 is for CPUs, fp16 for GPUs.")  # fmt: skip
@click.option("--opset", default=DEFAULT_OPSET, show_default=True, type=click.IntRange(18), help="ONNX opset.")
@click.option("--json", "as_json", is_flag=True, help="The content of d2llm.json as one line on stdout.")
def onnx_command(student: Path, model: Path, precision: Precision, opset: int, as_json: bool) -> None:
    """Export the STUDENT folder to the new MODEL folder: encoder and IEM as ONNX graphs, and the tokenizer.

    LoRA is merged. Before the folder appears, both graphs are run on real text in many shapes (batches of 1 to 33,
    lengths of 1 to the maximum) against torch: fp32 must agree within 1e-4; fp16 and int8 must stay above floors of
    cosine and score correlation, and what was measured is kept in MODEL/d2llm.json. A failed export leaves nothing.
    """
    config = export(student, model, precision=precision, opset=opset)
    if as_json:
        echo_json(asdict(config))
        return
    measured = config.agreement
    size = sum(file.stat().st_size for file in model.iterdir()) / 2**20
    click.echo(f"{model}: {size:.0f} MiB, {precision}, passage encoder {config.fingerprint}")
    click.echo(f"  recall vector {config.embedding_dim} wide, features {config.feature_dim} wide")
    bound = f"at most {TOLERANCE:.0e}" if precision == "fp32" else f"floors {FLOORS[precision]}"
    click.echo(
        f"  against torch: largest difference {measured['max_abs_difference']:.1e}, worst cosine "
        f"{measured['min_cosine']:.5f}, worst score correlation {measured['score_correlation']:.5f} ({bound})"
    )
    click.echo(f"Next: d2llm index {model} CORPUS.jsonl --qdrant ./qdrant --collection docs")
