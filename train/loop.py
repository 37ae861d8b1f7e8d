"""The training loop of all stages: steps, optimizer, log, checkpoints, and going on after a run was killed."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeAlias, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm.auto import tqdm

from d2llm.errors import DataError

from . import losses
from .checkpoint import Checkpoint
from .run_log import RunLog
from .schedule import Batches, learning_rate

logger = logging.getLogger(__name__)

Losses: TypeAlias = dict[str, Tensor]
"""The weighted loss terms of a step by name."""
Weights: TypeAlias = dict[str, Tensor]
"""Trained weights by name."""

T = TypeVar("T")
R = TypeVar("R")

SCALES = ("iem.scales", "scale")
WEIGHTS = "student"
"""Key of the trained weights in a checkpoint, as the last release wrote it."""


class Stage(Protocol):
    """A stage of training, as `Loop.run` takes it."""

    @property
    def name(self) -> str:
        """Its name in log and checkpoint."""

    @property
    def steps(self) -> int:
        """How many steps it has."""

    def losses(self, step: int) -> Losses:
        """The loss terms of step `step`.

        The step decides the batch and all random draws (the loop seeds `random` and torch by it), so a resumed run
        repeats them. A stage whose graph is too large for the memory adds the gradients itself, part by part, and gives
        terms without gradients.
        """

    def measure(self, done: int) -> float | None:
        """The model's score on dev after `done` steps; None if no measurement is due. The best state is kept."""


class Loop:
    """Takes a model through a stage, in each process of the run."""

    def __init__(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        checkpoint: Checkpoint,
        run_log: RunLog,
        seed: int,
        save_every: int,
        *,
        progress: bool = False,
    ) -> None:
        self.model, self.accelerator, self.checkpoint, self.run_log = model, accelerator, checkpoint, run_log
        self.seed, self.save_every, self.progress = seed, save_every, progress
        self.batches = Batches(seed, accelerator.process_index, accelerator.num_processes)

    def run(self, stage: Stage, optimizer: torch.optim.Optimizer) -> Weights:
        """All steps of `stage` that are still to be done. Gives the state that measured best; empty if none was.

        Raises:
            DivergedError: a loss is not finite.
            DataError: another process holds the folder of the checkpoint.
        """
        self.checkpoint.hold()
        first, best = self._resume(stage, optimizer)
        if not first:
            best = self.measure_before(stage)
        self.model.train()
        self.model.zero_grad()  # the stage before leaves gradients on parts that it does not train
        bar = tqdm(total=stage.steps, initial=first, desc=stage.name, unit="step", disable=not self.progress)
        for step in range(first, stage.steps):
            self._step(stage, optimizer, step)
            best = self._better(best, stage.measure(step + 1))
            if (step + 1) % self.save_every == 0 and self.accelerator.is_main_process:
                state = {"stage": stage.name, "step": step + 1, WEIGHTS: trained_weights(self.model), "best": best}
                self.checkpoint.save({**state, "optimizer": optimizer.state_dict()})
            bar.update()
        bar.close()
        return {} if best is None else best[1]

    def save_weights(self, name: str) -> None:
        """Save the model's trainable weights in the checkpoint `name`. The first process does it for all."""
        if self.accelerator.is_main_process:
            self.checkpoint.save(trained_weights(self.model), name)

    def split_over_processes(self, items: Sequence[T], work: Callable[[Sequence[T]], list[R]]) -> list[R]:
        """The results of `work` for all items. Each process does its part of them, and gets the results of all."""
        results = work(items[self.accelerator.process_index :: self.accelerator.num_processes])
        return results if self.accelerator.num_processes == 1 else list(gather_object(results))

    def measure_before(self, stage: Stage) -> tuple[float, Weights] | None:
        """Measure the model before the first step of `stage`, and keep its state."""
        self.run_log.rewind(stage.name, -1)
        return self._better(None, stage.measure(0))

    def _resume(self, stage: Stage, optimizer: torch.optim.Optimizer) -> tuple[int, tuple[float, Weights] | None]:
        """Load the checkpoint if it is of this stage. Gives the steps done and the best state so far."""
        state = self.checkpoint.load()
        if state is None or state["stage"] != stage.name:
            return 0, None
        done: int = state["step"]
        best: tuple[float, Weights] | None = state["best"]
        self.model.load_state_dict(state[WEIGHTS], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        logger.info("%s goes on at step %d of %d", stage.name, done, stage.steps)
        self.run_log.rewind(stage.name, done)
        return done, best

    def _step(self, stage: Stage, optimizer: torch.optim.Optimizer, step: int) -> None:
        """One update of the model, with its losses in the run_log."""
        random.seed(f"{self.seed}/{stage.name}/{step}/{self.accelerator.process_index}")
        torch.manual_seed(random.getrandbits(63))
        terms = stage.losses(step)
        loss = losses.total(terms, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(group["initial_lr"], step, stage.steps)
        if loss.requires_grad:
            loss.backward()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self.accelerator.num_processes > 1:
            self._share_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        values = {name: term.item() for name, term in terms.items()} if len(terms) > 1 else {}
        self.run_log.write(stage.name, step + 1, {"loss": loss.item(), **values})

    def _share_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Give every process the mean gradient of all.

        Done by hand, since the parts of a model are called one by one: DistributedDataParallel wants one forward.
        """
        for parameter in parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self.accelerator.reduce(gradient, "mean")

    def _better(self, best: tuple[float, Weights] | None, score: float | None) -> tuple[float, Weights] | None:
        """`best`, or `score` with a copy of the trained weights if `score` is higher than the score of `best`."""
        if score is not None and score > (-1.0 if best is None else best[0]):
            return score, trained_weights(self.model)
        return best


def make_optimizer(model: nn.Module, parts: Mapping[str, float], scale_lr: float | None = None) -> torch.optim.AdamW:
    """AdamW over the trainable parameters whose names start with a key of `parts`, each at its learning rate.

    The scales of the parts of a score learn at `scale_lr` and without weight decay, or not at all without one.

    Raises:
        DataError: there are no such parameters.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = []
    for part, lr in parts.items():
        chosen = [p for name, p in trainable.items() if name.startswith(part) and name not in SCALES]
        groups.append({"params": chosen, "lr": lr, "initial_lr": lr})
    if scale_lr is not None:
        chosen = [p for name, p in trainable.items() if name in SCALES]
        groups.append({"params": chosen, "lr": scale_lr, "initial_lr": scale_lr, "weight_decay": 0.0})
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise DataError("the recipe leaves nothing to train: the backbone is frozen and there are no heads")
    return torch.optim.AdamW(groups, weight_decay=0.01)


def trained_weights(model: nn.Module) -> Weights:
    """A copy of the weights that are trained."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: value.detach().clone() for name, value in model.state_dict().items() if name in trainable}
