"""Locks between processes. Knows no engine."""

from __future__ import annotations

import os
import weakref
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from d2llm.errors import StoreError, import_extra


class Locked(StoreError):
    """Another process, or another part of this one, holds the lock."""


class FileLock:
    """An exclusive lock on a file that is made for it.

    The system releases the lock when the process ends, however it ends. A forked child shares it, and keeps it until it
    ends too. The engine's own lock behaves in the same way, so this one is never free while the engine's is held.

    Raises:
        Locked: somebody else holds it.
        StoreError: the file cannot be made, or its file system has no locks.
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


def _is_at(path: Path, file: BinaryIO) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _open_locked(path: Path) -> BinaryIO:
    locker = import_extra("portalocker", "qdrant")
    while True:
        try:
            file = open(path, "ab")
        except OSError as error:
            raise StoreError(
                f"{path} cannot be written ({error.strerror}): an embedded collection must write into its folder, for "
                "searches too. Search a copy, or use a Qdrant server (--qdrant http://...)"
            ) from error
        try:
            locker.lock(file, locker.LOCK_EX | locker.LOCK_NB)
            if _is_at(path, file):
                return file
        except locker.AlreadyLocked as error:
            file.close()
            raise Locked(f"{path} is locked") from error
        except locker.LockException as error:
            file.close()
            raise StoreError(f"{path} cannot be locked ({error}): choose a folder on a local disk") from error
        file.close()  # its last holder has removed the file: this one is not the lock any more
