"""Search as a service: an HTTP API over a `Searcher`, and a page."""

from .app import Serving
from .judgements import Judgements
from .running import bind, run
from .service import Service
from .settings import Settings

__all__ = ["Judgements", "Service", "Serving", "Settings", "bind", "run"]
