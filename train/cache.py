"""What a teacher said, kept on disk under the content of what it was asked.

A key is a hash of teacher, task, query and passage, so order, batch size and machine may change. Each process appends
to a segment of its own, any number of them at once:

    FOLDER/<nanoseconds>-<random>.index       one RECORD a pair, each with its checksum
    FOLDER/<nanoseconds>-<random>.features    float16, where the index says; written before the record that names them

A record that a crash left torn does not match its checksum and counts as never asked. Features stay on disk.
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
from typing import NamedTuple, Protocol

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
        ("crc", "<u4"),  # of all that stands before it
    ]
)
_CHECKED = RECORD.itemsize - 4  # bytes that `crc` is of

Half = npt.NDArray[np.float16]


def key_of(identity: str, task: Task, query: str, passage: str) -> bytes:
    """Key of a pair, 16 bytes."""
    content = json.dumps([FORMAT_VERSION, identity, task, query, passage])
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


class Entry(NamedTuple):
    """What is kept of a pair."""

    log_odds: float
    features_T: Half | None


class _Place(NamedTuple):
    """Where an entry is kept."""

    log_odds: float
    width: int
    segment: Path
    offset: int
    features_crc: int


class TeacherCache:
    """Log-odds and features by key, in a folder that any number of processes may fill at the same time.

    What others write after this was made is seen after `refresh`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._places: dict[bytes, _Place] = {}
        self._read: dict[Path, int] = {}
        """Records read of each segment."""
        self._own: Path | None = None
        self._pid = os.getpid()
        self.refresh()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def refresh(self) -> None:
        """Take in what has been written since; where a pair was written twice, the later segment counts."""
        for path in sorted(self.folder.glob("*.index")):
            self._take_in(path)

    def _take_in(self, path: Path) -> None:
        done = self._read.get(path, 0)
        records = np.fromfile(path, RECORD, offset=done * RECORD.itemsize)  # a half-written last one is left out
        data, damaged = records.tobytes(), 0
        for row, (key, log_odds, width, offset, features_crc, crc) in enumerate(records.tolist()):
            start = row * RECORD.itemsize
            if zlib.crc32(data[start : start + _CHECKED]) == crc:
                self._places[key] = _Place(log_odds, width, path.with_suffix(".features"), offset, features_crc)
            else:
                damaged += 1
        if damaged:
            logger.warning("%s: %d of %d records are damaged: they will be asked again", path, damaged, len(records))
        self._read[path] = done + len(records)

    def get(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """What is kept of each key; None of a key that is unknown, or whose features are damaged on disk."""
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
            logger.warning("%s: features at byte %d are damaged: asking again", place.segment, place.offset)
            del self._places[key]
            return None
        return Entry(place.log_odds, np.frombuffer(data, "<f2"))

    def put(self, keys: Sequence[bytes], entries: Sequence[Entry]) -> None:
        """Keep entries under their keys, at the end of this process's segment."""
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
            _append(features, blob)  # first: a record must never name features that are not there
            _append(index, records.tobytes())
        except BaseException:  # a full disk, an interrupt: half a record may lie there, and none may follow it
            self._own = None
            raise
        self._take_in(index)

    def _segment(self) -> Path:
        """The index file of this process (after a fork, of the child), made when there is something to write."""
        if self._own is None or self._pid != os.getpid():
            # The time in front, so that later segments are read later.
            self._own = self.folder / f"{time.time_ns():020d}-{secrets.token_hex(8)}.index"
            self._pid = os.getpid()
            for path in (self._own.with_suffix(".features"), self._own):
                path.open("xb").close()
        return self._own


def _append(path: Path, data: bytes) -> None:
    with open(path, "ab") as file:
        file.write(data)


class Identified(Teacher, Protocol):
    """A teacher that can be told from others by what it would say."""

    @property
    def identity(self) -> str:
        """Equal for two teachers only if they judge every pair alike."""


class Cached:
    """A teacher that is asked only what `cache` does not know. `hits` and `misses` count pairs."""

    def __init__(self, teacher: Identified, cache: TeacherCache) -> None:
        self.teacher, self.cache = teacher, cache
        self.hits = self.misses = 0

    def missing(self, query: str, candidates: Sequence[str], task: Task = "asymmetric") -> int:
        """How many of these pairs would be asked."""
        return len({key for key in self._keys(query, candidates, task) if key not in self.cache})

    def judge(self, query: str, candidates: Sequence[str], task: Task = "asymmetric") -> Judgement:
        """As the teacher, features in float16."""
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
        identity = self.teacher.identity  # asked anew: it changes when the teacher is fine-tuned
        return [key_of(identity, task, query, passage) for passage in candidates]
