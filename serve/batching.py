"""Work that waits together is done together: a queue, and threads that take what is equal out of it in one batch."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from d2llm.errors import D2LLMError, StoreError

Item = TypeVar("Item")
Result = TypeVar("Result")


class Busy(D2LLMError):
    """The queue is full."""

    def __init__(self, waiting: int, seconds: int) -> None:
        """`seconds` is when to try again."""
        super().__init__(f"{waiting} texts wait already: try again in {seconds} s")
        self.seconds = seconds


@dataclass(slots=True, eq=False)
class _Job:
    work: Callable[[Sequence[Any]], Sequence[Any]]
    items: Sequence[Any]
    size: int
    future: Future[list[Any]] = field(default_factory=Future)
    since: float = field(default_factory=time.perf_counter)


class Batcher:
    """Threads that do the work of a queue, so that an event loop never waits for it.

    Jobs that wait while a thread is busy are its next batch, if their work is equal. So one request at a time never
    waits for others, and many at a time are done with few calls. Close it at the end: what waits is still done.
    """

    def __init__(
        self, *, most: int, room: int, threads: int = 1, observe: Callable[[int, float], Any] = lambda *_: None
    ) -> None:
        """A batch has at most `most` texts, unless one job has more. At most `room` texts wait, unless one job has more
        and nothing else waits. `observe` is called with the size of each batch, and the seconds that its first job
        waited."""
        self._most, self._room, self._observe = most, room, observe
        self._jobs = deque[_Job]()
        self._waiting = 0
        self._seconds_per_item = 0.0
        self._closed = False
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """The number of texts that wait."""
        return self._waiting

    async def submit(
        self, work: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item], *, size: int | None = None
    ) -> list[Result]:
        """Await the result of `work` for each item. Works that compare equal may be called once for several requests.

        `size` is the number of texts in the items, by default that of the items.

        Raises:
            Busy: too many texts wait.
        """
        job = _Job(work, items, len(items) if size is None else size)
        with self._changed:
            if self._waiting and self._waiting + job.size > self._room:
                raise Busy(self._waiting, max(1, math.ceil(self._waiting * self._seconds_per_item)))
            self._jobs.append(job)
            self._waiting += job.size
            self._changed.notify()
        return await asyncio.wrap_future(job.future)

    def close(self) -> None:
        """Do what waits, then end the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while batch := self._next():
            start = time.perf_counter()
            size = max(1, sum(job.size for job in batch))
            self._observe(size, start - batch[0].since)
            _do(batch)
            pace = (time.perf_counter() - start) / size
            self._seconds_per_item += (pace - self._seconds_per_item) / 8  # a moving mean

    def _next(self) -> list[_Job]:
        """Wait for the next batch; an empty one ends the thread."""
        with self._changed:
            while not self._jobs:
                if self._closed:
                    return []
                self._changed.wait()
            first = self._jobs.popleft()
            batch, others, size = [first], deque[_Job](), first.size
            while self._jobs:
                job = self._jobs.popleft()
                if job.work == first.work and size + job.size <= self._most:
                    batch.append(job)
                    size += job.size
                else:
                    others.append(job)
            self._jobs = others
            self._waiting -= size
        return [job for job in batch if job.future.set_running_or_notify_cancel()] or self._next()


def _do(batch: list[_Job]) -> None:
    """Do the work of a batch in one call. If it fails for another reason than the index, do each job by itself: one of
    them may be to blame."""
    try:
        results = list(batch[0].work([item for job in batch for item in job.items]))
    except BaseException as error:
        if len(batch) == 1 or isinstance(error, StoreError):
            for job in batch:
                job.future.set_exception(error)
        else:
            for job in batch:
                _do([job])
        return
    for job in batch:
        job.future.set_result(results[: len(job.items)])
        results = results[len(job.items) :]
