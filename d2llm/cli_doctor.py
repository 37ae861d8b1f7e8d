"""The command `d2llm doctor`."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import click

from d2llm.cli_options import device_option
from d2llm.errors import D2LLMError, MissingExtraError, import_extra
from d2llm.model import load
from d2llm.sessions import installed_runtimes, why_no_cuda

EXTRAS = {
    "cpu or gpu": ["onnxruntime"],
    "qdrant": ["qdrant_client", "qdrant_edge"],
    "eval": ["ir_measures", "bm25s", "scipy"],
    "train": ["torch", "transformers", "peft", "rank_bm25"],
    "export": ["onnx", "onnxscript", "optimum"],
}
DISTRIBUTIONS = {"qdrant_client": "qdrant-client", "qdrant_edge": "qdrant-edge-py", "rank_bm25": "rank-bm25",
                 "ir_measures": "ir-measures"}  # fmt: skip


@click.command("doctor")
@click.argument("model", type=click.Path(path_type=Path), required=False)
@device_option
def doctor_command(model: Path | None, device: str) -> None:
    """Check the installation: show which extras are installed, which work, and how to repair the others.

    Use it when a command fails to import something, or when CUDA is not used. With MODEL, it opens the model folder on
    --device and encodes a sentence: only this proves that the device works. The exit status is 1 if MODEL or --device
    does not work.

    \b
    d2llm doctor
    d2llm doctor model/ --device cuda
    """
    click.echo(f"d2llm {metadata.version('d2llm')}, Python {sys.version.split()[0]}")
    for extra, modules in EXTRAS.items():
        for module in modules:
            click.echo(f"  {extra:<12}{module:<16}{_state(module, extra.split()[0])}")
    runtimes = installed_runtimes()
    if len(runtimes) == 2:
        click.echo(f"PROBLEM: {why_no_cuda(runtimes)}")
    problem = _cuda_problem()
    if problem and device == "cuda":
        raise click.ClickException(f"CUDA: {problem}")
    click.echo(f"CUDA: {problem or 'compiled in. To prove that it works: d2llm doctor MODEL --device cuda'}")
    if model is not None:
        try:
            loaded = load(model, device)  # type: ignore[arg-type]  # a str to mypy; click has checked it
            vectors = loaded.encode_query(["does it work?"]).vectors
            loaded.encode_document(["It does."])  # uses the full encoder, even if a small one encodes queries
            graph = loaded.document.graph
        except D2LLMError as error:
            raise click.ClickException(f"{model} on {device}: {error}") from error
        click.echo(f"{model} on {device}: works ({vectors.shape[1]} dimensions, {loaded.config.precision}"
                   f"{', small query encoder' if loaded.query_encoder == 'small' else ''})")  # fmt: skip
        click.echo(
            f"Documents are encoded in batches of up to {graph.batch_tokens:,} tokens, {graph.batches_at_a_time} at a "
            f"time, with {graph.threads} threads"
        )


def _state(module: str, extra: str) -> str:
    """Return the version of a module, or the reason why it cannot be imported."""
    try:
        import_extra(module, extra)
        return _version(module)
    except MissingExtraError as error:
        return f"missing: {error}"
    except Exception as error:  # a broken installation may raise anything; show the other modules too
        return f"BROKEN ({type(error).__name__}: {error}): pip install --force-reinstall 'd2llm[{extra}]'"


def _version(module: str) -> str:
    if module == "onnxruntime":
        return ", ".join(f"{name} {version}" for name, version in installed_runtimes().items())
    return metadata.version(DISTRIBUTIONS.get(module, module))


def _cuda_problem() -> str | None:
    try:
        available = "CUDAExecutionProvider" in import_extra("onnxruntime", "gpu").get_available_providers()
    except Exception as error:  # a broken installation may raise anything; it is reported as the reason
        return str(error)
    return None if available else f"not available. {why_no_cuda(installed_runtimes())}"
