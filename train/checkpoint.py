"""The state of a run on disk, from which a killed run continues. Each file is written whole or not at all."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from accelerate import PartialState

from d2llm.backbone import Backbone
from d2llm.errors import DataError, OutputExistsError
from d2llm.files import replaced, sha256_of
from d2llm.folder import reading
from d2llm.lock import FileLock, Locked, lock_if_possible
from d2llm.saved import backbone_digest

from .config import Recipe

logger = logging.getLogger(__name__)

RECIPE, STATE, ENCODER, LOCK = "recipe.json", "state.pt", "encoder.pt", "lock"
REMEDY = "Remove the folder to start anew."
DIGESTS = "sha256"
EARLY = (LOCK, "log.jsonl", "tensorboard", "*.dev.run", ".*.part")
"""What a run writes before its first state. The recipe comes with that."""
WRITTEN = (*EARLY, RECIPE, "*.pt", "curves.png", "README.md")
"""All that runs write into their folder."""
_locks: WeakValueDictionary[Path, FileLock] = WeakValueDictionary()
"""The locks of this process. A run that failed may be tried again in the same process, where a traceback keeps it."""


def with_digests(recipe: Recipe, backbone: Backbone | None = None) -> dict[str, Any]:
    """The recipe as plain values, and the digests of each file that it names and of the backbone's weights: a run goes
    on with its own data and backbone alone."""
    digests = {} if backbone is None else {"student.backbone": backbone_digest(backbone)}
    for key, path in recipe.files():
        if path.is_file():
            name = f"{key}/{path.name}"  # two files of pairs may have one name
            digests[name] = digests.get(name, "") + sha256_of(path)
    return {**asdict(recipe), DIGESTS: digests}


class Checkpoint:
    """The folder of a run. Without a folder (`None`), nothing is saved and nothing is loaded.

    The recipe is written with the first state, so a run that failed earlier leaves nothing to remove. A run removes its
    folder when it is done, so a folder that somebody else made is refused. One process at a time uses the folder.

    Raises:
        OutputExistsError: the folder holds something, and no run.
        DataError: the folder holds a run of another recipe, or another process uses it. The error names the first key
            that differs.
        ModelError: a file is damaged.
    """

    def __init__(
        self, folder: Path | None, recipe: Mapping[str, Any], old_keys: Mapping[str, str] | None = None
    ) -> None:
        """`recipe` holds all that decides the run, as plain values. `old_keys` renames the keys of an older recipe."""
        self.folder, self.recipe = folder, json.loads(json.dumps(recipe))
        self._old_keys = old_keys or {}
        self._lock: FileLock | None = None
        self._held = False
        if folder is None or not folder.exists():
            return
        if not _is_of_a_run(folder):
            raise OutputExistsError(
                f"{folder} exists already, and is not an unfinished run. This run keeps its state there, and removes "
                "it at the end: rename it, or choose another name for the output"
            )
        self.hold()
        if (folder / RECIPE).is_file():
            self._require_same_run(folder)

    def add_digest(self, key: str, digest: str) -> None:
        """Add the digest of something that decides the run, and is loaded only after its start.

        Raises:
            DataError: the folder holds a run with another digest.
        """
        self.recipe[DIGESTS] = self.recipe.get(DIGESTS, {}) | {key: digest}
        if self.folder is not None and (self.folder / RECIPE).is_file():
            self._require_same_run(self.folder)

    def _require_same_run(self, folder: Path) -> None:
        with reading(folder, RECIPE, REMEDY) as path:
            recipe = json.loads(path.read_text(encoding="utf-8"))
        stored = {self._old_keys.get(key, key): value for key, value in _flat(recipe).items()}
        current = _flat(self.recipe)
        # A run that began before there were digests goes on without them.
        if others := {key for key in stored.keys() ^ current.keys() if not key.startswith(DIGESTS)}:
            raise DataError(
                f"{folder} holds an unfinished run of another version of d2llm, whose recipes differ in {min(others)}: "
                "finish it with that version, or remove that folder to start anew"
            )
        for key, value in current.items():
            if stored.get(key, value) != value:
                raise DataError(
                    f"{folder} holds an unfinished run with {key} = {stored[key]!r}, this one has {value!r}: "
                    "continue with the former settings, or remove that folder to start anew"
                )
        if DIGESTS in recipe:  # those of what is not loaded yet
            self.recipe[DIGESTS] = recipe[DIGESTS] | self.recipe.get(DIGESTS, {})

    def hold(self) -> None:
        """Make the folder, and keep other processes out of it until this one ends or the run is done.

        `save` does so too. A training calls it before its first step, so that another one cannot begin meanwhile.

        Raises:
            DataError: another process holds the folder.
        """
        if self.folder is None or self._held or not PartialState().is_main_process:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        place = self.folder.resolve()
        try:
            self._lock = _locks.get(place) or lock_if_possible(place / LOCK)
        except Locked as error:
            raise DataError(
                f"{self.folder} is in use: another process is at this run. Wait for it, or choose another name for the "
                "output"
            ) from error
        self._held = True
        if self._lock is not None:
            _locks[place] = self._lock

    def save(self, content: dict[str, Any], name: str = STATE) -> None:
        """Write `content` in the place of an earlier one."""
        if self.folder is not None:
            self.hold()
            with replaced(self.folder / RECIPE) as path:
                path.write_text(json.dumps(self.recipe, indent=2), encoding="utf-8")
            with replaced(self.folder / name) as path, open(path, "wb") as file:
                try:
                    torch.save(content, file)
                except RuntimeError:  # what torch makes of the system's error, such as a full disk
                    file.write(bytes(2**20))  # raises it again
                    raise

    def load(self, name: str = STATE) -> dict[str, Any] | None:
        """The content that was saved last, on the CPU. None before the first save.

        Raises:
            ModelError: the file is damaged.
        """
        if self.folder is None or not (self.folder / name).is_file():
            return None
        with reading(self.folder, name, REMEDY) as path:
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return content

    def remove(self) -> None:
        """Remove what the run wrote, since it is done, and the folder. A folder with other files stays, with them."""
        if self.folder is not None:
            for path in [path for pattern in WRITTEN for path in self.folder.glob(pattern)]:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            if any(self.folder.glob("*")):
                logger.warning("%s is kept: it holds files that the run did not write", self.folder)
            else:
                shutil.rmtree(self.folder, ignore_errors=True)
        self._lock, self._held = None, False


def _is_of_a_run(folder: Path) -> bool:
    """Whether a run can have made this folder. An empty one counts."""
    if not folder.is_dir() or (folder / RECIPE).is_file():
        return folder.is_dir()
    return all(any(path.match(pattern) for pattern in EARLY) for path in folder.iterdir())


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with keys as `--set` takes them, such as `student.backbone`."""
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        flat |= {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
    return flat
