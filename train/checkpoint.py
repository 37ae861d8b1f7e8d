"""Where a run stands, on disk: written whole or not at all, so that a killed run goes on where it was."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from d2llm.errors import DataError

from .config import Recipe

RECIPE, STATE, ENCODER = "recipe.json", "state.pt", "encoder.pt"


class Checkpoint:
    """The run's folder. Without one (`None`), nothing is kept and nothing found.

    Raises:
        DataError: the folder holds a run of another recipe; names the first key that differs.
    """

    def __init__(self, folder: Path | None, recipe: Recipe) -> None:
        self.folder = folder
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        wanted = json.loads(json.dumps(asdict(recipe)))
        path = folder / RECIPE
        if not path.is_file():
            staging = folder / f".{RECIPE}.{os.getpid()}"  # several processes of one run may be here at once
            staging.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
            staging.replace(path)
            return
        found = json.loads(path.read_text(encoding="utf-8"))
        for key, value in wanted.items():
            if found.get(key) != value:
                raise DataError(
                    f"{folder} holds an unfinished run with {key} = {found.get(key)!r}, this recipe has {value!r}: "
                    "go on with the same recipe, or remove that folder to start anew"
                )

    def save(self, content: dict[str, Any], name: str = STATE) -> None:
        """Keep `content`, in place of what was kept before."""
        if self.folder is not None:
            staging = self.folder / f".{name}"
            with open(staging, "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            staging.replace(self.folder / name)

    def load(self, name: str = STATE) -> dict[str, Any] | None:
        """What was kept last, on the CPU; None before the first save."""
        if self.folder is None or not (self.folder / name).is_file():
            return None
        content: dict[str, Any] = torch.load(self.folder / name, map_location="cpu", weights_only=True)
        return content
