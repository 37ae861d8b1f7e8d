"""Files and folders that appear whole or not at all, and what is asked of a path before anything is written."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from d2llm.errors import OutputExistsError


def require_new(path: Path) -> None:
    """See that `path` is free: nothing is there, or an empty folder.

    Raises:
        OutputExistsError: a file or a folder with content is there.
    """
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise OutputExistsError(f"{path} exists already. Choose another name or remove it first.")


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` when the block ends well, and is removed otherwise.

    Until then nobody else can read it. `target` has the permissions of any new folder.

    Raises:
        OutputExistsError: `target` exists and is not an empty folder.
    """
    require_new(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield staging
        set_ordinary_permissions(staging)
        staging.replace(target)  # atomic; takes the place of an empty folder
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # gone already when all went well


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield an empty file that takes the place of `path` when the block ends well, and is removed otherwise.

    The step is atomic, and the content is on the disk before it. `path` has the permissions of any new file.
    """
    staging = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        staging.touch()
        mode = stat.S_IMODE(staging.stat().st_mode)
        yield staging
        with open(staging, "rb+") as file:
            os.fsync(file.fileno())
        if stat.S_IMODE(staging.stat().st_mode) != mode:  # some libraries make files that their owner alone can read
            staging.chmod(mode)
        staging.replace(path)
    finally:
        with contextlib.suppress(OSError):
            staging.unlink(missing_ok=True)  # gone already when all went well


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file in the place of an earlier one, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as staging, open(staging, "w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def set_ordinary_permissions(folder: Path) -> None:
    """Give a folder and all in it the permissions that the umask gives to new files and folders.

    Some libraries make files that their owner alone can read, and a model would be unreadable to the user that serves
    it.
    """
    with tempfile.TemporaryDirectory(dir=folder) as private:
        new_file, inner = Path(private) / "file", Path(private) / "folder"
        new_file.touch()
        inner.mkdir()
        file_mode, folder_mode = (stat.S_IMODE(path.stat().st_mode) for path in (new_file, inner))
    for path in [folder, *folder.rglob("*")]:
        mode = folder_mode if path.is_dir() else file_mode
        if not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
