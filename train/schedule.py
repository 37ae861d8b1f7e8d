"""What a training step takes, decided by its number alone: its batch and its learning rate.

A run that was killed and resumed therefore goes on with the batches and rates that it would have had.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

T = TypeVar("T")


def learning_rate(peak: float, step: int, steps: int) -> float:
    """The rate of step `step` of `steps`: it rises to `peak` over the first tenth, and decays linearly to zero."""
    return peak * min(1.0, (step + 1) / (0.1 * steps)) * (1 - step / steps)


def batch_at(items: Sequence[T], size: int, step: int, seed: str) -> list[T]:
    """The batch of a step. Each epoch shuffles `items` anew and gives whole batches of `size`; the rest is left out.

    If there are fewer items than `size`, every batch holds all of them.
    """
    size = min(size, len(items))
    epoch, position = divmod(step, len(items) // size)
    order = _order(len(items), f"{seed}/{epoch}")
    return [items[index] for index in order[position * size : (position + 1) * size]]


@lru_cache(maxsize=64)
def _order(count: int, seed: str) -> array[int]:
    """A random order of `count` items. Cached: all steps of an epoch read it."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return array("l", order)


@dataclass(frozen=True, slots=True)
class Batches:
    """The batches of one process of a run; the processes share each batch between them."""

    seed: int
    process: int = 0
    """Index of this process."""
    processes: int = 1

    def at(self, items: Sequence[T], size: int, step: int) -> list[T]:
        """This process's part of the batch of `step`: at least one item."""
        batch = batch_at(items, size, step, str(self.seed))
        return batch[self.process :: self.processes] or batch[:1]
