"""Stages of a job that work at the same time. Knows nothing of what they do."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

T = TypeVar("T")
_END: Any = object()


def prefetched(items: Iterable[T], depth: int = 2) -> Generator[T, None, None]:
    """Yield `items` while a thread draws the next `depth` of them: what makes them and who takes them overlap.

    No more than that is held. What `items` raises is raised here, in its place. Closed early, it waits for the item in
    work and drops the rest.
    """
    iterator = iter(items)
    thread = ThreadPoolExecutor(1, thread_name_prefix="d2llm-stage")
    ahead: deque[Future[T]] = deque()
    try:
        ahead.extend(thread.submit(next, iterator, _END) for _ in range(depth))
        while (item := ahead[0].result()) is not _END:
            ahead.popleft()
            ahead.append(thread.submit(next, iterator, _END))
            yield item
    finally:
        for future in ahead:
            future.cancel()
        # Not for the thread: a wait for that, interrupted by another Ctrl-C, makes Python 3.11 take it for ended, and
        # crash at exit while it still works.
        wait(ahead)
        thread.shutdown()
