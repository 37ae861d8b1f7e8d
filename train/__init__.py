"""Training: teachers, hard negatives, the paper's losses, and the run that puts them together."""

from .config import Recipe, read_recipe
from .trainer import Result, train

__all__ = ["Recipe", "Result", "read_recipe", "train"]
