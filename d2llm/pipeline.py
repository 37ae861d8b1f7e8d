"""Stages of a job that work at the same time. Knows nothing of what they do."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
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
    try:
        ahead = deque(thread.submit(next, iterator, _END) for _ in range(depth))
        while (item := ahead.popleft().result()) is not _END:
            ahead.append(thread.submit(next, iterator, _END))
            yield item
    finally:
        thread.shutdown(wait=True, cancel_futures=True)
