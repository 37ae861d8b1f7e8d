"""Calibration of a collection, as `d2llm tune --calibrate` does it, and its output."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import click

from d2llm.calibration import FEWEST, Calibration
from d2llm.cli_options import echo_json, echo_table
from d2llm.evidence import calibrate_index
from d2llm.folder import read_config
from d2llm.metrics import Qrels
from d2llm.model import load
from d2llm.sessions import Device
from d2llm.types import Task

from .cli_options import place_flags
from .place import Qdrant

CALIBRATING = 600
"""Judged queries, or pseudo-queries of each family, that calibration uses by default."""
TASK: Task = "asymmetric"
KINDS = {
    "judged": "queries that you have judged",
    "hard": "titles and sentences, searched for what is left of their passages without them",
    "easy": "keywords and runs of words, searched for their passages",
}
"""What the queries of each family are."""


def calibrate_collection(
    model: Path,
    qdrant: Qdrant,
    collection: str,
    judged: tuple[Mapping[str, str], Qrels] | None,
    as_json: bool,
    *,
    most: int,
    candidates: int,
    device: Device,
    threads: int | None,
) -> None:
    """Calibrate a collection by `judged` queries and their judgements, or by pseudo-queries; store scales that are
    accepted, and print what was found."""
    queries, qrels = judged or (None, None)
    with qdrant.index(collection) as index:
        index.open_for(read_config(model), create=False)  # raises for another model before the work begins
        hybrid = index.info().metadata.options.bm25 is not None
        found = calibrate_index(
            load(model, device, threads=threads), index, queries, qrels,
            most=most, candidates=candidates, hybrid=hybrid, task=TASK, progress=not as_json,
        )  # fmt: skip
        if found.accepted:
            index.scales = {**(index.scales or {}), TASK: found.scales}
    if as_json:
        facts = {"model": str(model), "collection": collection, "candidates": candidates, "hybrid": hybrid}
        echo_json({**facts, **asdict(found), "accepted": found.accepted, "scales": found.scales})
        return
    show_calibration(found)
    if found.accepted:
        place = [*place_flags(qdrant), "--collection", collection]
        click.echo(
            f"Stored in {collection}: searches that are opened from now on use them. To remove them:\n"
            f"  {shlex.join(['d2llm', 'tune', str(model), '--calibrate', '--reset', *place])}"
        )


def reset_scales(qdrant: Qdrant, collection: str, as_json: bool) -> None:
    """Remove the scales that a collection remembers, and say which they were."""
    with qdrant.index(collection) as index:
        former = index.scales
        if former is not None:
            index.scales = None
    if as_json:
        echo_json({"collection": collection, "removed": former})
    elif former is None:
        click.echo(f"{collection} has no scales of its own: searches use the model's.")
    else:
        click.echo(
            f"Removed from {collection}: {'; '.join(f'{task}: {in_words(former[task])}' for task in former)}. Searches "
            "that are opened from now on use the model's."
        )


def show_calibration(found: Calibration) -> None:
    """Print the held-out gain in each family of queries, and what follows from it."""
    for name, count in found.queries.items():
        click.echo(f"{name}: {count} {KINDS[name]}")
    click.echo(f"\nScales: {in_words(found.current)}")
    if not found.gains:
        click.echo(
            f"They stay: calibration without judgements needs {2 * FEWEST} queries of each kind, and the passages are "
            "too few or too short. Judge 20 or more queries: --queries with --qrels."
        )
        return
    if found.chosen == found.current:
        click.echo("They stay: on one half of the queries, no others are better for every kind.")
        return
    click.echo(f"Chosen: {in_words(found.chosen)}\n")
    echo_table(
        [
            [name, str(gain.queries), f"{gain.ndcg_10:.4f}", f"{gain.difference:+.4f}", f"{gain.low:+.4f}",
             f"{gain.high:+.4f}", f"{gain.p:.4f}"] for name, gain in found.gains.items()
        ],
        header=["held-out queries", "number", "nDCG@10", "gain", "low", "high", "p"],
    )  # fmt: skip
    click.echo("low and high: the 95 % interval of the gain.\n")
    if not found.accepted:
        doubtful = [name for name, gain in found.gains.items() if not gain.sure]
        click.echo(
            f"The scales stay as they are: the gain of {' and '.join(doubtful)} queries may be chance. "
            + ("Judge more queries." if "judged" in found.gains else "Judged queries say more: --queries with --qrels.")
        )


def in_words(scales: Mapping[str, float]) -> str:
    """Return the scales of one branch as text."""
    return ", ".join(f"{part} {scale:.4g}" for part, scale in scales.items())
