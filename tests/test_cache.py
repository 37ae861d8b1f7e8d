"""The teacher's cache: what is asked once, what survives a kill, what several processes may do at once."""

import logging
import os
import random
import resource
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import processes
import pytest
import torch

from d2llm.train.cache import RECORD, Cached, Entry, TeacherCache, key_of
from d2llm.train.teacher import Judgement

WIDTH = 1000


class Counting:
    """A teacher whose log-odds are the lengths of the texts, with the texts it was asked."""

    def __init__(self, identity: str = "counting", *, features: bool = True) -> None:
        self.identity, self.features, self.asked = identity, features, list[str]()

    def judge(self, query: str, candidates: Sequence[str], task: str = "asymmetric") -> Judgement:
        self.asked += candidates
        log_odds_K = torch.tensor([len(query) - len(text) / 3 for text in candidates])
        features_KT = torch.tensor([[len(text), len(query), 0.1] for text in candidates])
        return Judgement(log_odds_K, features_KT if self.features else None)


def write(folder: Path, names: Sequence[str], most: int = 10**9) -> dict[str, tuple[BaseProcess, Connection]]:
    """Processes that write at the same time, begun when all are ready. Each sends how many rows it has written."""
    writers: dict[str, tuple[BaseProcess, Connection]] = {}
    for name in names:
        here, there = processes.FORKS.Pipe()
        process = processes.FORKS.Process(target=writer, args=(folder, name, most, there), daemon=True)
        process.start()
        there.close()  # so that the end of the process is the end of what it sends
        writers[name] = process, here
    for _, sent in writers.values():
        assert sent.recv() == 0
    for _, sent in writers.values():
        sent.send("go")
        assert sent.recv() == 7
    return writers


def writer(folder: Path, name: str, most: int, acknowledged: Connection) -> None:
    """Write pairs of one query. What is written of a pair follows from the pair, so a reader can check it."""
    cache = TeacherCache(folder)
    acknowledged.send(0)
    acknowledged.recv()
    for start in range(0, most, 7):
        rows = range(start, start + 7)
        entries = [Entry(row / 7, np.full(WIDTH, row % 2048, np.float16)) for row in rows]
        cache.put([key_of(name, "asymmetric", "a query", str(row)) for row in rows], entries)
        acknowledged.send(start + 7)


def last_sent(sent: Connection) -> int:
    """The last number that a process sent before its end."""
    last = 7
    while True:
        try:
            last = sent.recv()
        except (EOFError, ConnectionResetError):
            return last


def check(cache: TeacherCache, name: str, rows: int) -> None:
    keys = [key_of(name, "asymmetric", "a query", str(row)) for row in range(rows)]
    for row, entry in enumerate(cache.get(keys)):
        assert entry is not None, f"{name}: pair {row} of {rows} was acknowledged and is lost"
        assert entry.log_odds == np.float32(row / 7)
        assert entry.features_T is not None
        assert entry.features_T.shape == (WIDTH,) and (entry.features_T == row % 2048).all()


def test_only_what_is_missing_is_asked(tmp_path: Path) -> None:
    teacher = Counting()
    cached = Cached(teacher, TeacherCache(tmp_path))
    plain = Counting().judge("query", ["a", "bcd", "ef"])
    first = cached.judge("query", ["a", "bcd"])
    assert (cached.hits, cached.misses) == (0, 2)
    assert cached.missing("query", ["ef", "a", "bcd", "ef"]) == 1
    again = cached.judge("query", ["ef", "bcd", "a", "ef"])
    assert teacher.asked == ["a", "bcd", "ef"]
    assert (cached.hits, cached.misses) == (3, 3)
    assert again.log_odds_K.tolist() == plain.log_odds_K[[2, 1, 0, 2]].tolist()
    assert torch.equal(again.features_KT, plain.features_KT[[2, 1, 0, 2]].half())
    assert torch.equal(first.log_odds_K, plain.log_odds_K[:2])


def test_another_process_later_asks_nothing(tmp_path: Path) -> None:
    Cached(Counting(), TeacherCache(tmp_path)).judge("query", ["a", "bcd"])
    teacher = Counting()
    judged = Cached(teacher, TeacherCache(tmp_path)).judge("query", ["bcd", "a"])
    assert teacher.asked == []
    assert judged.log_odds_K.tolist() == pytest.approx([4.0, 5 - 1 / 3])
    assert judged.features_KT.dtype == torch.float16


def test_a_teacher_without_features_is_kept_without(tmp_path: Path) -> None:
    cached = Cached(Counting(features=False), TeacherCache(tmp_path))
    for _ in range(2):
        assert cached.judge("query", ["a", "b"]).features_KT is None
    assert cached.judge("query", []).log_odds_K.shape == (0,)
    assert (cached.hits, cached.misses) == (2, 2)


def test_every_part_of_the_question_is_part_of_the_key(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path)
    one = Counting()
    Cached(one, cache).judge("ab", ["c"])
    for teacher, query, passage, task in (
        (Counting("another"), "ab", "c", "asymmetric"),
        (Counting(), "a", "bc", "asymmetric"),
        (Counting(), "ab", "c", "symmetric"),
    ):
        Cached(teacher, cache).judge(query, [passage], task)
        assert teacher.asked == [passage]
    one.identity = "fine-tuned since"
    Cached(one, cache).judge("ab", ["c"])
    assert one.asked == ["c", "c"]


def test_what_was_acknowledged_survives_a_kill_at_any_moment(tmp_path: Path) -> None:
    """Four writers in one folder, killed one after the other while the rest go on."""
    rng = random.Random(0)
    acknowledged: dict[str, int] = {}
    for name, (process, sent) in write(tmp_path, [f"writer {number}" for number in range(4)]).items():
        time.sleep(rng.random() * 0.05)
        process.kill()
        acknowledged[name] = last_sent(sent)
        check(TeacherCache(tmp_path), name, acknowledged[name])
    cache = TeacherCache(tmp_path)
    for name, rows in acknowledged.items():
        check(cache, name, rows)
    assert len(cache) >= sum(acknowledged.values())
    assert max(acknowledged.values()) > 100


def test_two_processes_fill_one_folder_at_once(tmp_path: Path) -> None:
    writers = write(tmp_path, ["one", "two"], 700)
    for process, sent in writers.values():
        assert last_sent(sent) == 700
        process.join()
        assert process.exitcode == 0
    cache = TeacherCache(tmp_path)
    assert len(cache) == 1400
    for name in writers:
        check(cache, name, 700)
    assert len(list(tmp_path.glob("*.index"))) == 2


def test_what_others_write_is_seen_after_a_refresh(tmp_path: Path) -> None:
    cache, other = TeacherCache(tmp_path), TeacherCache(tmp_path)
    keys = [key_of("t", "symmetric", "q", text) for text in "abc"]
    for written, key in enumerate(keys):
        other.put([key], [Entry(1.5, None)])
        assert sum(k in cache for k in keys) == written
        cache.refresh()
        assert cache.get([key]) == [Entry(1.5, None)]


def test_a_child_after_a_fork_writes_a_segment_of_its_own(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path)
    cache.put([b"a" * 16], [Entry(1.0, None)])
    child = os.fork()
    if child == 0:
        cache.put([b"b" * 16], [Entry(2.0, None)])
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    cache.put([b"c" * 16], [Entry(3.0, None)])
    assert len(list(tmp_path.glob("*.index"))) == 2
    found = TeacherCache(tmp_path).get([letter * 16 for letter in (b"a", b"b", b"c")])
    assert [entry.log_odds for entry in found if entry] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("lost", [1, 39, 40, 41, 100])
def test_a_torn_index_loses_its_torn_records_and_no_others(tmp_path: Path, lost: int) -> None:
    texts = [str(number) for number in range(20)]
    Cached(Counting(), TeacherCache(tmp_path)).judge("query", texts)
    (index,) = tmp_path.glob("*.index")
    index.write_bytes(index.read_bytes()[:-lost])
    teacher = Counting()
    cached = Cached(teacher, TeacherCache(tmp_path))
    judged = cached.judge("query", texts)
    torn = -(-lost // RECORD.itemsize)
    assert teacher.asked == texts[-torn:]
    assert torch.equal(judged.log_odds_K, Counting().judge("query", texts).log_odds_K)
    assert len(TeacherCache(tmp_path)) == 20, "asked again, kept for good"


@pytest.mark.parametrize("place", [0, 16, 20, 24, 36])
def test_a_changed_byte_of_a_record_costs_that_record(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, place: int
) -> None:
    texts = [str(number) for number in range(20)]
    Cached(Counting(), TeacherCache(tmp_path)).judge("query", texts)
    (index,) = tmp_path.glob("*.index")
    data = bytearray(index.read_bytes())
    data[7 * RECORD.itemsize + place] ^= 0x10
    index.write_bytes(data)
    teacher = Counting()
    Cached(teacher, TeacherCache(tmp_path)).judge("query", texts)
    assert teacher.asked == ["7"]
    assert "1 of 20 records are damaged" in caplog.text


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_damaged_features_are_asked_again_and_then_known(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    texts = [str(number) for number in range(20)]
    Cached(Counting(), TeacherCache(tmp_path)).judge("query", texts)
    (features,) = tmp_path.glob("*.features")
    data = bytearray(features.read_bytes())
    data[-1] ^= 0x10
    if damage == "gone":
        features.unlink()
    else:
        features.write_bytes(data if damage == "changed" else data[:-3])
    teacher = Counting()
    judged = Cached(teacher, TeacherCache(tmp_path)).judge("query", texts)
    assert teacher.asked == (texts if damage == "gone" else ["19"])
    assert torch.equal(judged.features_KT, Counting().judge("query", texts).features_KT.half())
    assert "damaged: judging again" in caplog.text
    caplog.clear()
    later = Counting()
    Cached(later, TeacherCache(tmp_path)).judge("query", texts)
    assert later.asked == [] and not caplog.text


def test_nothing_follows_half_a_record(tmp_path: Path) -> None:
    """A disk that was full for a moment: what is written afterwards must be found."""
    here, there = processes.FORKS.Pipe()
    process = processes.FORKS.Process(target=write_to_a_full_disk, args=(tmp_path, there))
    process.start()
    assert "too large" in here.recv().lower()
    process.join()
    assert process.exitcode == 0
    assert sorted(path.stat().st_size % RECORD.itemsize for path in tmp_path.glob("*.index")) == [0, 15]
    found = TeacherCache(tmp_path).get([letter * 16 for letter in (b"a", b"b", b"c")])
    assert [entry and entry.log_odds for entry in found] == [1.0, None, 3.0]


def write_to_a_full_disk(folder: Path, said: Connection) -> None:
    """Write a record, one of which 15 bytes find a place, and one when there is room again."""
    cache = TeacherCache(folder)
    cache.put([b"a" * 16], [Entry(1.0, None)])
    resource.setrlimit(resource.RLIMIT_FSIZE, (RECORD.itemsize + 15, resource.RLIM_INFINITY))
    with pytest.raises(OSError) as error:
        cache.put([b"b" * 16], [Entry(2.0, None)])
    said.send(str(error.value))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    cache.put([b"c" * 16], [Entry(3.0, None)])


def test_reading_a_cache_leaves_nothing_behind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert TeacherCache(tmp_path / "new").get([b"a" * 16]) == [None]
    assert list((tmp_path / "new").iterdir()) == []
