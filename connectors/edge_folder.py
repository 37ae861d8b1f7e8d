"""A folder of embedded collections on the disk: names, aliases, metadata, locks and snapshots. Calls no engine.

A collection is a folder with `collection.json` (ours) and a shard (the engine's), complete or absent.
`collection.json` names the shard, so that another shard, built aside, can take its place in one step. An alias is a
file `NAME.alias` beside the collections that holds the name of one.

Whoever opens, makes or removes a collection, or points an alias, holds the lock `.NAME.lock` beside it. The engine has
a lock too, but checks it last: by then it has already removed files of a collection that another process uses.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from d2llm.errors import ArgumentError, D2LLMError, MismatchError, StoreError
from d2llm.files import replaced, write_lines
from d2llm.lock import FileLock, Locked

from .schema import Metadata

METADATA = "collection.json"
SHARD = "shard"
ALIAS = ".alias"


def collections_in(location: Path) -> tuple[list[str], dict[str, str]]:
    """The names of all collections in the folder `location`, and `{alias: collection}`."""
    with engine_errors(location):
        if not location.is_dir():
            return [], {}
        # A name that begins with a dot belongs to something that was being written when a process was killed.
        names = sorted(path.parent.name for path in location.glob(f"[!.]*/{METADATA}"))
        aliases = sorted(path.stem for path in location.glob(f"[!.]*{ALIAS}") if path.is_file())
        return names, {alias: resolve(location, alias).name for alias in aliases}


def resolve(location: Path, name: str) -> Path:
    """The folder of a collection, by its name or an alias."""
    alias = location / f"{name}{ALIAS}"
    if (location / name).exists() or not alias.is_file():
        return location / name
    return location / alias.read_text(encoding="utf-8").strip()


def lock_name(location: Path, name: str) -> FileLock:
    """Lock the name of a collection, which need not exist, or of an alias.

    Raises:
        Locked: somebody else has the lock.
        StoreError: the file of the lock cannot be made, or its file system has no locks.
    """
    try:
        return FileLock(location / f".{name}.lock")
    except Locked as error:
        raise _in_use(location / name) from error
    except OSError as error:
        raise StoreError(
            f"{error.filename} cannot be locked ({error.strerror}): an embedded collection must write into its folder, "
            "for searches too. Use a copy on a local disk, or a Qdrant server (--qdrant http://...)"
        ) from error


class CollectionFolder:
    """The folder of one collection, and the lock on it.

    `path` is the folder that the name, or alias, led to at the last call of `look_up`.
    """

    def __init__(self, location: Path, name: str) -> None:
        self.location, self._name = location, name
        self.path = location / name
        self._lock: FileLock | None = None  # against other processes, and other engines in this one

    def look_up(self) -> Path:
        """Find the folder that the name leads to now."""
        self.path = resolve(self.location, self._name)
        return self.path

    def has_moved(self) -> bool:
        """Whether the name leads elsewhere by now."""
        return resolve(self.location, self._name) != self.path

    def missing(self) -> bool:
        """Whether nothing is at `path`, or only an empty folder."""
        return _is_missing(self.path)

    def metadata(self) -> Metadata | None:
        """What the collection remembers, read without the lock; None if there is no such collection."""
        folder = resolve(self.location, self._name)
        return None if _is_missing(folder) else Metadata.parse(read(folder), str(folder))

    def read(self) -> dict[str, Any]:
        """The content of `collection.json`."""
        return read(self.path)

    def write(self, content: Mapping[str, Any]) -> None:
        """Replace `collection.json`."""
        write(self.path, content)

    def used_bytes(self) -> int:
        """Bytes that the collection takes on the disk. Its files are longer, since they have holes."""
        files = [path.stat() for path in self.path.rglob("*") if path.is_file()]
        return int(sum(getattr(file, "st_blocks", file.st_size / 512) * 512 for file in files))

    def require_room(self, needed: int) -> None:
        """Raise `StoreError` unless the disk has `needed` bytes left.

        The engine writes into memory-mapped files with holes. If the disk has no room to fill a hole, the system ends
        the process at once, and no error can be caught.
        """
        place = self.path if self.path.exists() else self.location
        if (free := shutil.disk_usage(place).free) < needed:
            raise StoreError(
                f"the disk of {self.path} has {free / 2**20:,.0f} MiB left, and this needs up to "
                f"{needed / 2**20:,.0f}. What is stored stays; make room, and run this again"
            )

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Take the lock, unless it is held already, and keep it unless the block fails."""
        before = self._lock
        self._lock = before or lock_name(self.location, self.path.name)
        try:
            yield
        except BaseException:  # Ctrl-C too: a lock that nobody uses would keep the collection closed
            if before is None:
                self.release()
            raise

    @contextmanager
    def making(self, room: int) -> Iterator[None]:
        """`holding`, for a block that makes the collection. The disk must have `room` bytes left."""
        self.location.mkdir(parents=True, exist_ok=True)
        with self.holding():
            if not self.missing():
                raise StoreError(f"{self.path} exists already: another process has just made it. Run this again")
            self.require_room(room)
            yield

    def release(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.release(remove=not (self.path / METADATA).exists())
            self._lock = None

    def point_alias(self, alias: str) -> None:
        """Make `alias` a name of this collection."""
        lock = lock_name(self.location, alias)
        try:
            if (self.location / alias).exists():
                raise StoreError(f"{self.location / alias} is a collection: an alias needs a name of its own")
            write_lines(self.location / f"{alias}{ALIAS}", [self.path.name])
        finally:
            lock.release(remove=True)

    @contextmanager
    def aliases_locked(self) -> Iterator[list[str]]:
        """The aliases of this collection; nobody else points one elsewhere within the block."""
        aliases = [alias for alias, name in collections_in(self.location)[1].items() if name == self.path.name]
        locks = list[FileLock]()
        try:
            for alias in aliases:
                locks.append(lock_name(self.location, alias))
            yield aliases
        finally:
            for lock in locks:
                lock.release(remove=True)

    def remove(self, aliases: list[str]) -> None:
        """Remove the aliases, then the folder."""
        for alias in aliases:  # first: if this is killed in between, another drop removes the rest
            if resolve(self.location, alias) == self.path:
                (self.location / f"{alias}{ALIAS}").unlink()
        trash = self.path.with_name(f".{self.path.name}-dropped")
        shutil.rmtree(trash, ignore_errors=True)
        self.path.replace(trash)  # gone in one step, however long the removal takes
        shutil.rmtree(trash)

    def require_ours(self) -> None:
        """Raise unless d2llm made the collection, even if it is damaged by now."""
        try:
            Metadata.parse(self.read(), str(self.path))
        except StoreError:
            if not self.shards():
                raise

    def new_shard(self) -> Path:
        """A name for the shard of a build, which `shards` knows."""
        return self.path / f"{SHARD}-{uuid.uuid4().hex[:8]}"

    def shards(self) -> list[Path]:
        """The folders of shards that d2llm made: that of the collection, and those of builds. Others keep theirs."""
        return [path for path in self.path.glob(f"{SHARD}*") if re.fullmatch(rf"{SHARD}(-[0-9a-f]{{8}})?", path.name)]


def read(folder: Path) -> dict[str, Any]:
    """The content of `collection.json` in the folder of a collection.

    Raises:
        MismatchError: there is no such file.
        StoreError: it is damaged.
    """
    file = folder / METADATA
    if not file.is_file():
        raise MismatchError(
            f"{folder} was made by something else than d2llm (it holds no {METADATA}): choose another "
            "folder or collection name"
        )
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return content
    except ValueError as error:
        raise StoreError(f"{file} is damaged ({error}). {_way_out(folder)}") from error


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `collection.json`, complete or not at all."""
    write_lines(folder / METADATA, [json.dumps(content, indent=2)])


def pack(folder: Path, file: Path) -> None:
    """Write all files of `folder` into the snapshot `file`, complete or not at all.

    Raises:
        ArgumentError: `file` is in `folder`, and would go with the collection.
        StoreError: it cannot be written.
    """
    if file.resolve().is_relative_to(folder.resolve()):
        raise ArgumentError(f"{file} is in the folder of the collection, and would go with it: choose another place")
    try:
        with replaced(file) as staging:
            with zipfile.ZipFile(staging, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
                for path in sorted(folder.rglob("*")):
                    archive.write(path, path.relative_to(folder))
    except OSError as error:
        raise StoreError(f"{file}: {error.strerror}: the snapshot could not be written") from error


def unpack(file: Path, folder: Path) -> dict[str, Any]:
    """Write the files of the snapshot `file` into `folder`, and return the content of `collection.json`.

    Raises:
        StoreError: it is no snapshot, or cannot be read.
        MismatchError: something else than d2llm made the collection in it.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            archive.extractall(folder)  # never outside of it, whatever the names of the files are
    except OSError as error:
        raise StoreError(f"{file}: {error.strerror}: the snapshot could not be unpacked") from error
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise StoreError(f"{file} is no snapshot of an embedded collection ({error})") from error
    if not (folder / METADATA).is_file():
        raise StoreError(f"{file} is no snapshot of an embedded collection: it holds no {METADATA}")
    content = read(folder)
    Metadata.parse(content, f"the collection in {file}")
    return content


@contextmanager
def engine_errors(folder: Path, is_open: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Turn errors of the system and of the engine into a `StoreError` that names `folder`.

    The engine raises bare `Exception`s, and panics that derive from `BaseException` alone.
    """
    try:
        yield
    except D2LLMError:
        raise
    except BaseException as error:  # every kind of error is classified below
        if not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        if "WouldBlock" in str(error):
            raise _in_use(folder) from error
        stays = "What was stored stays in its log: see" if is_open() else "See"
        way_out = "" if is_open() or isinstance(error, OSError) else f" {_way_out(folder)}"
        raise StoreError(
            f"{folder}: {error}. {stays} that the disk has room and the folder can be written, and open it "
            f"again.{way_out}"
        ) from error


def _is_missing(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def _way_out(folder: Path) -> str:
    """What to do about a damaged collection."""
    command = shlex.join(["d2llm", "collection", "drop", folder.name, "--qdrant", str(folder.parent)])
    return f"If it stays so, remove it ({command}), and restore a snapshot or index the corpus again."


def _in_use(folder: Path) -> Locked:
    return Locked(
        f"{folder} is in use by another process, or by another index in this one. Close that one first; a Qdrant "
        "server (--qdrant http://...) serves several at once."
    )
