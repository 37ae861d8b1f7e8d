"""Training: teachers, hard negatives, the paper's losses, and the run that puts them together."""

from .config import Recipe, read_recipe
from .kale import Alignment, align
from .mining import FalseNegativeFilter, Mined, mine
from .trainer import Result, train

__all__ = ["Alignment", "FalseNegativeFilter", "Mined", "Recipe", "Result", "align", "mine", "read_recipe", "train"]
