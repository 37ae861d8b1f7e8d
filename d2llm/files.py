"""Write files and folders atomically: they appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from d2llm.errors import ArgumentError, OutputExistsError
from d2llm.lock import FileLock, Locked

_PART, _LOCK = ".part", ".lock"


def require_new(path: Path, *, file: bool = False) -> None:
    """Check before the work that its result can be written: `path` does not exist, or it is an empty folder.

    `file`: the result is a file, so `path` is no folder either.

    Raises:
        OutputExistsError: `path` is a file, a link, or a folder that is not empty.
        ArgumentError: `path` has no name of its own, as `.` has none, or nothing can be written where it is to be.
    """
    if path.is_symlink() or (path.exists() and (file or not path.is_dir() or any(path.iterdir()))):
        raise OutputExistsError(f"{path} exists already. Choose another name or remove it first.")
    require_writable(path, file=file)


def require_writable(path: Path, *, file: bool = False) -> None:
    """Check before the work that its result can be written as `path`, whether or not there is such a `file` or folder.

    Raises:
        ArgumentError: `path` has no name of its own, as `.` has none, or nothing can be written where it is to be.
    """
    if path.name in ("", ".."):
        raise ArgumentError(f"{path} is no name for an output: name a new {'file' if file else 'folder'}")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise ArgumentError(f"{path} cannot be written: {parent} is no folder. Choose another place")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ArgumentError(f"{path} cannot be written: {parent} permits no new files. Choose another place")


@contextlib.contextmanager
def _named(target: Path) -> Iterator[None]:
    """Name `target` where there is no room for it: the system's error names nothing."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            error.filename = str(target)
        raise


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` at the end of the block, or is removed if the block raises.

    The content is on the disk before `target` appears: what it was made from may be removed next. Other users cannot
    read the temporary folder. `target` gets the usual permissions of new folders.

    Raises:
        OutputExistsError: `target` exists and is not an empty folder.
    """
    require_new(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _named(target), folder_beside(target) as staging:
        yield staging
        set_ordinary_permissions(staging)
        for path in staging.rglob("*"):
            if path.is_file() and not path.is_symlink():
                _sync(path)
        staging.replace(target)  # atomic; replaces an empty folder


@contextlib.contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target`, which is removed at the end of the block.

    Such folders of processes that were killed, perhaps for want of memory, are removed first. The system releases the
    lock of a process that has ended.
    """
    for left in target.parent.glob(f".{glob.escape(target.name)}-*{_PART}{_LOCK}"):
        with contextlib.suppress(Locked, OSError):
            abandoned = FileLock(left)
            shutil.rmtree(left.with_suffix(""), ignore_errors=True)
            abandoned.release(remove=True)
    folder = Path(tempfile.mkdtemp(_PART, f".{target.name}-", target.parent))
    lock = None
    try:
        with contextlib.suppress(OSError):  # without locks in the file system, the folder stays after a kill
            lock = FileLock(folder.with_name(folder.name + _LOCK))
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            lock.release(remove=True)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield an empty file that replaces `path` at the end of the block, or is removed if the block raises.

    The replacement is atomic, and the content is on the disk before it. `path` gets the usual permissions of new files.
    """
    staging = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with _named(path):
            staging.touch()
            mode = stat.S_IMODE(staging.stat().st_mode)
            yield staging
            _sync(staging)
        if stat.S_IMODE(staging.stat().st_mode) != mode:  # some libraries make files that only their owner can read
            staging.chmod(mode)
        staging.replace(path)
    finally:
        with contextlib.suppress(OSError):
            staging.unlink(missing_ok=True)  # does nothing after the step above


def _sync(path: Path) -> None:
    """Wait until the content of a file is on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file atomically. Its folder is created; an earlier file is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as staging, open(staging, "w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def set_ordinary_permissions(folder: Path) -> None:
    """Give a folder and everything in it the permissions that the umask gives to new files and folders.

    Some libraries make files that only their owner can read. Another user could not serve such a model.
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
    """Return the hexadecimal SHA-256 digest of a file. The file is read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
