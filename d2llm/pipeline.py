"""Let the stages of a job overlap in time."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

T = TypeVar("T")
_END: Any = object()


def prefetched(items: Iterable[T], depth: int = 2) -> Generator[T, None, None]:
    """Yield `items` while a thread computes the next `depth` items, so that producer and consumer overlap.

    At most `depth` items are held. An exception of `items` is raised here in its turn. If the generator is closed
    early, it waits for the item that the thread is computing and drops the rest.
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
        # Wait for the items, not for the thread. If a second Ctrl-C interrupts a wait for the thread, Python 3.11
        # believes that the thread has ended, and crashes at exit because the thread still works.
        wait(ahead)
        thread.shutdown()
