"""A cache on disk for the judgements of a teacher, keyed by content.

A key is a hash of teacher, task, query and passage, so order, batch size and machine may change. Any number of
processes can write at the same time, since each appends to its own segment:

    FOLDER/<nanoseconds>-<random>.index       a RECORD with a checksum for each judgement
    FOLDER/<nanoseconds>-<random>.features    float16 at the offset in the record; written before the record

A record that a crash left incomplete fails its checksum, and the judgement is made again. Features stay on disk.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from d2llm.types import Task

from .teacher import Judgement, Teacher

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
RECORD = np.dtype(
    [
        ("key", "V16"),
        ("log_odds", "<f4"),
        ("width", "<u4"),  # T; 0 without features
        ("offset", "<u8"),  # of the features, in bytes
        ("features_crc", "<u4"),
        ("crc", "<u4"),  # of all fields before it
    ]
)
_CHECKED = RECORD.itemsize - 4  # bytes that `crc` covers

Half = npt.NDArray[np.float16]


def key_of(identity: str, task: Task, query: str, passage: str) -> bytes:
    """The key of a query with a passage, 16 bytes."""
    content = json.dumps([FORMAT_VERSION, identity, task, query, passage])
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


class Entry(NamedTuple):
    """A cached judgement of one passage."""

    log_odds: float
    features_T: Half | None


class _Place(NamedTuple):
    """The content of a record: the log-odds, and where the features are."""

    log_odds: float
    width: int
    segment: Path
    offset: int
    features_crc: int


class TeacherCache:
    """Log-odds and features by key, in a folder that any number of processes may fill at the same time.

    `refresh` reads what other processes have written since.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._places: dict[bytes, _Place] = {}
        self._read: dict[Path, int] = {}
        """The number of records read from each segment."""
        self._own: Path | None = None
        self._pid = os.getpid()
        self.refresh()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def refresh(self) -> None:
        """Read new records. If a key was written twice, the later segment counts."""
        for path in sorted(self.folder.glob("*.index")):
            self._read_segment(path)

    def _read_segment(self, path: Path) -> None:
        done = self._read.get(path, 0)
        records = np.fromfile(path, RECORD, offset=done * RECORD.itemsize)  # leaves out an incomplete last record
        data, damaged = records.tobytes(), 0
        for row, (key, log_odds, width, offset, features_crc, crc) in enumerate(records.tolist()):
            start = row * RECORD.itemsize
            if zlib.crc32(data[start : start + _CHECKED]) == crc:
                self._places[key] = _Place(log_odds, width, path.with_suffix(".features"), offset, features_crc)
            else:
                damaged += 1
        if damaged:
            logger.warning(
                "%s: %d of %d records are damaged: these judgements will be made again", path, damaged, len(records)
            )
        self._read[path] = done + len(records)

    def get(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """The entry of each key. None if the key is unknown, or its features are damaged on disk."""
        return [self._entry(key) for key in keys]

    def _entry(self, key: bytes) -> Entry | None:
        place = self._places.get(key)
        if place is None or not place.width:
            return None if place is None else Entry(place.log_odds, None)
        try:
            with open(place.segment, "rb") as file:
                file.seek(place.offset)
                data = file.read(2 * place.width)
        except FileNotFoundError:
            data = b""
        if zlib.crc32(data) != place.features_crc:
            logger.warning("%s: features at byte %d are damaged: judging again", place.segment, place.offset)
            del self._places[key]
            return None
        return Entry(place.log_odds, np.frombuffer(data, "<f2"))

    def put(self, keys: Sequence[bytes], entries: Sequence[Entry]) -> None:
        """Append entries to the segment of this process."""
        index = self._segment()
        features = index.with_suffix(".features")
        records = np.zeros(len(keys), RECORD)
        blob = b""
        start = features.stat().st_size
        for row, (key, entry) in enumerate(zip(keys, entries, strict=True)):
            data = b"" if entry.features_T is None else entry.features_T.astype("<f2").tobytes()
            records[row] = (key, entry.log_odds, len(data) // 2, start + len(blob), zlib.crc32(data), 0)
            records[row]["crc"] = zlib.crc32(records[row].tobytes()[:_CHECKED])
            blob += data
        try:
            _append(features, blob)  # first, so that no record names features that do not exist
            _append(index, records.tobytes())
        except BaseException:  # the file may end in half a record, so nothing may follow it
            self._own = None
            raise
        self._read_segment(index)

    def _segment(self) -> Path:
        """The index file of this process, made at the first write. A forked child makes its own."""
        if self._own is None or self._pid != os.getpid():
            # The name starts with the time, so that later segments are read later.
            self._own = self.folder / f"{time.time_ns():020d}-{secrets.token_hex(8)}.index"
            self._pid = os.getpid()
            for path in (self._own.with_suffix(".features"), self._own):
                path.open("xb").close()
        return self._own


def _append(path: Path, data: bytes) -> None:
    with open(path, "ab") as file:
        file.write(data)


@runtime_checkable
class Identified(Teacher, Protocol):
    """A teacher with weights of its own. Its judgements can be cached under its name."""

    @property
    def identity(self) -> str:
        """Equal for two teachers only if all their judgements are equal."""


class Cached:
    """A teacher behind a cache. `hits` and `misses` count the passages that were found and judged."""

    def __init__(self, teacher: Identified, cache: TeacherCache) -> None:
        self.teacher, self.cache = teacher, cache
        self.hits = self.misses = 0

    @property
    def identity(self) -> str:
        """That of the teacher."""
        return self.teacher.identity

    def missing(self, query: str, candidates: Sequence[str], task: Task = "asymmetric") -> int:
        """How many of these candidates are not in the cache."""
        return len({key for key in self._keys(query, candidates, task) if key not in self.cache})

    def judge(self, query: str, candidates: Sequence[str], task: Task = "asymmetric") -> Judgement:
        """The judgement of the teacher, with features in float16."""
        keys = self._keys(query, candidates, task)
        known = dict(zip(keys, self.cache.get(keys), strict=True))
        missing = {key: passage for key, passage in zip(keys, candidates, strict=True) if known[key] is None}
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        if missing:
            log_odds_K, features_KT = self.teacher.judge(query, list(missing.values()), task)
            features = [None] * len(missing) if features_KT is None else list(features_KT.half().cpu().numpy())
            fresh = [Entry(*entry) for entry in zip(log_odds_K.tolist(), features, strict=True)]
            self.cache.put(list(missing), fresh)
            known |= zip(missing, fresh, strict=True)
        entries = [entry for entry in (known[key] for key in keys) if entry is not None]
        features_of = [entry.features_T for entry in entries if entry.features_T is not None]
        return Judgement(
            torch.tensor([entry.log_odds for entry in entries]),
            torch.from_numpy(np.stack(features_of)) if len(features_of) == len(keys) > 0 else None,
        )

    def _keys(self, query: str, candidates: Sequence[str], task: Task) -> list[bytes]:
        identity = self.teacher.identity  # read each time, since fine-tuning changes it
        return [key_of(identity, task, query, passage) for passage in candidates]
