"""A service for tests: uvicorn on a real socket, in a thread of this process."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator

import httpx

from d2llm.search import Searcher
from d2llm.serve import Judgements, Service, Serving, Settings, bind, run

TEXTS = {
    "refund": "Money is returned within ten days after the goods have arrived.",
    "delivery": "A parcel takes three days within the country, and two weeks to other continents.",
    "password": "To set a new password, follow the link in the letter that we send you.",
    "vitamin": "Vitamin D is made in the skin when it is exposed to the sun.",
    "median": "The median is the middle value of sorted numeric data.",
}
DOCUMENTS = [{"id": id_, "text": text, "lang": "en", "number": n} for n, (id_, text) in enumerate(TEXTS.items())]


@contextlib.contextmanager
def running(
    load: Callable[[Serving], Service] | Searcher,
    settings: Settings | None = None,
    *,
    judgements: Judgements | None = None,
    wait: bool = True,
    signals: int = 1,
) -> Iterator[str]:
    """Serve in a thread, and stop at the end. Yields the address. A searcher makes a service with `settings`.

    `signals` is how often the service is told to stop.
    """
    serving = Serving(settings, judgements=judgements)
    if isinstance(load, Searcher):
        searcher = load

        def load(serving: Serving) -> Service:
            return Service(searcher, serving.settings, metrics=serving.metrics, name="minilm")

    stops = queue.Queue[Callable[[], object]]()
    with bind("127.0.0.1", 0) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(
            target=run, args=(serving, lambda: load(serving), listener), kwargs={"started": stops.put}
        )
        thread.start()
        stop = stops.get(timeout=10)
        try:
            while wait and httpx.get(f"{address}/health").status_code == 503:
                pass
            yield address
        finally:
            for _ in range(signals):
                stop()
            thread.join()
