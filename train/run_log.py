"""The records of a run: a log as JSON lines and for TensorBoard, rankings of dev, curves as a picture, a model card."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from d2llm.beir import write_run
from d2llm.errors import DataError, import_extra
from d2llm.files import write_lines

from .config import Recipe

logger = logging.getLogger(__name__)

LOG, CURVES, CARD = "log.jsonl", "curves.png", "README.md"
TEACHER_RUN, BACKBONE_RUN = "teacher.dev.run", "backbone.dev.run"
STAGES = ("encoder", "distillation")


class RunLog:
    """Appends events `{"stage", "step", name: value ...}` to a log. `step` is the number of steps done.

    Each stage begins with `rewind`, so that a resumed run logs no step twice. The files of TensorBoard hold the same
    events. Without a folder nothing is written.
    """

    def __init__(self, folder: Path | None, encoder_steps: int = 0, stages: Sequence[str] = STAGES) -> None:
        """`stages` are the stages of the run in their order; the first of two takes `encoder_steps` steps."""
        self.path = None if folder is None else folder / LOG
        self.stages = stages
        self._offset = {stage: encoder_steps if place else 0 for place, stage in enumerate(stages)}
        self._tensorboard = None if folder is None else import_extra("torch.utils.tensorboard", "train")
        self._board: Any = None

    def rewind(self, stage: str, step: int) -> None:
        """Remove the events after `step` of `stage`, which will be done again. -1 removes the whole stage."""
        if self.path is None:
            return
        reached = self.stages.index(stage), step
        events = read_log(self.path) if self.path.is_file() else []
        kept = [event for event in events if (self.stages.index(event["stage"]), event["step"]) <= reached]
        write_lines(self.path, map(json.dumps, kept))
        if self._board is None or kept != events:
            self._replay(kept)

    def _replay(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Write the files of TensorBoard anew: they may hold removed events, or lack what a killed process lost."""
        assert self.path is not None and self._tensorboard is not None
        self.close()
        folder = self.path.with_name("tensorboard")
        shutil.rmtree(folder, ignore_errors=True)
        # `purge_step` makes a TensorBoard that is open drop the events it has read.
        self._board = self._tensorboard.SummaryWriter(str(folder), purge_step=0)
        for event in events:
            self._show(event)

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a step."""
        if self.path is None:
            return
        event = {"stage": stage, "step": step, **values}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
        self._show(event)

    def _show(self, event: Mapping[str, Any]) -> None:
        stage, step = event["stage"], event["step"]
        for name in event.keys() - {"stage", "step"}:
            self._board.add_scalar(f"{stage}/{name}", event[name], self._offset[stage] + step)

    def write_run(self, name: str, run: Mapping[str, Mapping[str, float]]) -> None:
        """Write a ranking of dev beside the log, unless it is empty."""
        if self.path is None or not run:
            return
        try:
            write_run(self.path.with_name(name), run, name.split(".")[0])
        except DataError as error:  # an id that the format cannot hold is no reason to lose a student
            logger.warning("%s is not kept: %s", name, error)

    def close(self) -> None:
        """Flush the buffers of TensorBoard."""
        if self._board is not None:
            self._board.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The events of a log, without a last line that a crash cut off."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            break
    return events


def write_report(
    recipe: Recipe, name: str, dev: Mapping[str, float], facts: Mapping[str, str], folder: Path
) -> list[Path]:
    """Write curves and model card of the student `name` into the run's folder. Gives the files to keep with it."""
    reference = {name: value for name, value in dev.items() if name == "teacher"}
    draw_curves(read_log(folder / LOG) if (folder / LOG).is_file() else [], reference, folder / CURVES)
    (folder / CARD).write_text(model_card(recipe, name, dev, facts), encoding="utf-8")
    return [path for file in (LOG, CURVES, CARD, TEACHER_RUN, BACKBONE_RUN) if (path := folder / file).is_file()]


def draw_curves(
    events: list[dict[str, Any]], reference: Mapping[str, float], target: Path, stages: Sequence[str] = STAGES
) -> None:
    """Draw the losses of the stages and dev during the last one as a PNG, with `reference` values as level lines."""
    figure_module = import_extra("matplotlib.figure", "train")
    figure = figure_module.Figure(figsize=(4 * len(stages) + 4, 3.6), layout="constrained")
    for place, stage in enumerate(stages):
        axes = figure.add_subplot(1, len(stages) + 1, place + 1)
        rows = [e for e in events if e["stage"] == stage and "loss" in e]
        steps, values = [e["step"] for e in rows], [e["loss"] for e in rows]
        axes.plot(steps, values, color="tab:blue", linewidth=0.8, alpha=0.3)
        axes.plot(steps, _smoothed(values), color="tab:blue")
        axes.set(title=f"{stage} loss", xlabel="step", ylabel="loss" if not place else None)
    axes = figure.add_subplot(1, len(stages) + 1, len(stages) + 1)
    measured = [e for e in events if e["stage"] == stages[-1] and any(name.startswith("dev ") for name in e)]
    for name in sorted({key for event in measured for key in event if key.startswith("dev ")}):
        rows = [e for e in measured if name in e]
        axes.plot([e["step"] for e in rows], [e[name] for e in rows], marker=".", label=name)
    for color, (name, value) in zip(("tab:gray", "black"), reference.items(), strict=False):
        axes.axhline(value, linestyle="--", color=color, label=name)
    axes.set(title="dev", xlabel=f"{stages[-1]} step")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    figure.savefig(target, dpi=120)


def _smoothed(values: list[float]) -> list[float]:
    """A running mean whose window is a tenth of the run."""
    width = max(1, len(values) // 10)
    return [sum(part := values[max(0, end - width) : end]) / len(part) for end in range(1, len(values) + 1)]


def model_card(recipe: Recipe, name: str, dev: Mapping[str, float], facts: Mapping[str, Any]) -> str:
    """A model card in Markdown: the student, its data and teacher, its figures on dev, and how to use it."""
    student, data, loss = recipe.student, recipe.data, recipe.loss
    base = Path(student.backbone).name
    sources = [f"retrieval: `{Path(data.folder).name}`"] if data.folder else []
    sources += [f"tuples: `{Path(data.examples).name}`"] if data.examples else []
    sources += [f"pairs: `{Path(path).name}`" for path in data.pairs]
    weights = {key: value for key, value in asdict(loss).items() if isinstance(value, float) and value}
    del weights["temperature"]
    if not data.pairs:
        weights.pop("pairs", None)
    versions = {package: metadata.version(package) for package in ("d2llm", "torch", "transformers")}
    teacher = " + ".join(recipe.teacher.members) + (f" ({recipe.teacher.model})" if recipe.teacher.model else "")
    rows = "\n".join(f"| {key} | {value:.4f} |" for key, value in dev.items())
    return f"""# {name}

A d2llm student: it encodes queries and passages apart, finds candidates by cosine, and rescores them with an
interaction emulation module (D2LLM, ACL 2024).

| | |
|---|---|
| backbone | {base}, tuning `{student.tuning}`, pooling `{student.pooling}` |
| features of a passage | at most {student.feature_bytes} bytes, interaction `{student.interaction}` |
| data | {", ".join(sources)} |
| teacher | {teacher if data.folder else "none: learned from labels"} |
| losses | {", ".join(f"{key} {value:g}" for key, value in weights.items())} |
| steps | {recipe.recall.steps} of the encoder, {recipe.distil.steps} of distillation |
| run | {", ".join(f"{key} {value}" for key, value in facts.items())} |
| versions | {", ".join(f"{package} {version}" for package, version in versions.items())} |

On dev, nDCG@10 (for pairs Spearman, or AP if they have labels):

| | |
|---|---|
{rows}

![losses and dev](curves.png)

```
d2llm-export onnx {name} MODEL
d2llm eval MODEL DATASET
```
"""
