"""Let the stages of a job overlap in time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from itertools import islice, repeat
from typing import Any, TypeVar

S = TypeVar("S")
T = TypeVar("T")
_END: Any = object()


def prefetched(items: Iterable[T], depth: int = 2) -> Generator[T, None, None]:
    """Yield `items` while a thread computes the next `depth` items, so that producer and consumer overlap.

    At most `depth` items are held. An exception of `items` is raised here in its turn. If the generator is closed
    early, it waits for the item that the thread is computing and drops the rest.
    """
    iterator = iter(items)
    return _in_turn(repeat(partial(next, iterator, _END)), 1, depth)


def mapped(function: Callable[[S], T], items: Iterable[S], threads: int) -> Generator[T, None, None]:
    """Yield `function(item)` of each item, in the order of `items`, while `threads` threads compute the next ones.

    At most two results for each thread are held. Exceptions and closing are as in `prefetched`. With one thread, the
    caller's thread computes each item when it is asked for.
    """
    if threads == 1:
        return (function(item) for item in items)
    return _in_turn((partial(function, item) for item in items), threads, 2 * threads)


def _in_turn(calls: Iterable[Callable[[], T]], threads: int, depth: int) -> Generator[T, None, None]:
    """Yield the results of `calls` in their order, up to a result `_END`; `threads` compute the next `depth`."""
    calls = iter(calls)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="d2llm-stage")
    ahead: deque[Future[T]] = deque()
    try:
        ahead.extend(pool.submit(call) for call in islice(calls, depth))
        while ahead and (item := ahead[0].result()) is not _END:
            ahead.popleft()
            ahead.extend(pool.submit(call) for call in islice(calls, 1))
            yield item
    finally:
        for future in ahead:
            future.cancel()
        # Wait for the items, not for the threads. If a second Ctrl-C interrupts a wait for a thread, Python 3.11
        # believes that the thread has ended, and crashes at exit because the thread still works.
        wait(ahead)
        pool.shutdown()
