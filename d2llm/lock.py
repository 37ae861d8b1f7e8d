"""Locks between processes: on an embedded collection, the folder of a run, a file that is being written."""

from __future__ import annotations

import errno
import logging
import os
import weakref
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import portalocker

from d2llm.errors import StoreError

logger = logging.getLogger(__name__)


class Locked(StoreError):
    """Another process, or another part of this one, holds the lock."""


class FileLock:
    """An exclusive lock on a file that is made for it.

    The system releases the lock when the process ends, however it ends. A forked child shares it, and keeps it until it
    ends too. The lock of the embedded engine behaves in the same way, so this one is never free while that is held.

    Raises:
        Locked: somebody else holds it.
        OSError: the file cannot be made, or its file system has no locks.
    """

    def __init__(self, path: Path) -> None:
        self._path, file = path, _open_locked(path)
        # Closed, not unlocked: unlocking would take the lock from a forked child too.
        self._close = weakref.finalize(self, file.close)

    def release(self, *, remove: bool = False) -> None:
        """Release the lock. `remove` its file first, if what it protects is gone."""
        if remove:
            with suppress(OSError):  # Windows removes no open file
                self._path.unlink()
        self._close()


def lock_if_possible(path: Path) -> FileLock | None:
    """The lock on `path`, for work that is safe without one as long as nobody else does it too. None, with a warning,
    if the file cannot be made or its file system has no locks.

    Raises:
        Locked: somebody else holds it.
    """
    try:
        return FileLock(path)
    except OSError as error:
        logger.warning("%s cannot be locked (%s): let no second process work there", path, error.strerror)
        return None


def _is_at(path: Path, file: BinaryIO) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _open_locked(path: Path) -> BinaryIO:
    while True:
        file = open(path, "ab")
        try:
            portalocker.lock(file, portalocker.LOCK_EX | portalocker.LOCK_NB)
            if _is_at(path, file):
                return file
        except portalocker.AlreadyLocked as error:
            file.close()
            raise Locked(f"{path} is locked") from error
        except portalocker.LockException as error:
            file.close()
            raise OSError(errno.ENOLCK, f"its file system has no locks: {error}", str(path)) from error
        file.close()  # its last holder has removed the file: this one is not the lock any more
