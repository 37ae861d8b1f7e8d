"""Training: teachers, hard negatives, the losses of the paper, and the run that combines them."""

from .config import Recipe, read_recipe
from .examples import Example
from .kale import Alignment, align
from .mining import FalseNegativeFilter, Mined, mine
from .trainer import Result, train

__all__ = [
    "Alignment",
    "Example",
    "FalseNegativeFilter",
    "Mined",
    "Recipe",
    "Result",
    "align",
    "mine",
    "read_recipe",
    "train",
]
