"""Tools for agents by the Model Context Protocol (MCP): `search` and `get`, over stdio or at `/mcp`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping
from itertools import islice
from typing import Annotated, Any
from urllib.parse import urlsplit

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.transport_security import TransportSecuritySettings
from mcp.types import ToolAnnotations
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

import d2llm
from d2llm.errors import D2LLMError
from d2llm.index import Index
from d2llm.payload import title_of
from d2llm.types import Hit

from .problems import ForeignOrigin
from .service import Service

SAMPLE = 100
"""Documents whose fields the description of `search` shows."""
EXAMPLES = 6
"""Most example values of a field there."""
LONGEST_EXAMPLE = 40
LONGEST_PASSAGE, LONGEST_TEXT = 4_000, 20_000
"""Most characters of a hit's text, and of a document's text in one answer of `get`."""
MOST_HITS, MOST_IDS = 50, 20
FRESH_SECONDS = 300
"""How long a description of the fields is used."""
FILTERS = (
    "Only documents whose fields match. Every key must match: a value {'lang': 'en'}, any of several values "
    "{'lang': ['en', 'de']}, bounds of a number {'year': {'gte': 2020, 'lt': 2024}}, or any value {'year': {'exists': "
    "True}}. A key that begins with a dot is a path into objects: {'.metadata.source': 'wiki'}."
)


class Found(BaseModel):
    """One hit."""

    id: str
    score: float = Field(description="Orders the hits of one search. It is no probability.")
    title: str | None = None
    text: str = Field(description="The document, or the best passage of a long one.")
    passage: str | None = Field(None, description="Which passage of its document this is.")
    fields: dict[str, Any] = Field(description="The document's own fields, which filters can name.")


class Hits(BaseModel):
    """The hits of one search, best first."""

    hits: list[Found]
    note: str | None = None


class Stored(BaseModel):
    """One document."""

    id: str
    title: str | None = None
    text: str
    characters: int = Field(description="Length of the whole text. For what is missing, call again with an offset.")
    fields: dict[str, Any]


class Documents(BaseModel):
    """Documents, and the ids that the collection does not have."""

    documents: list[Stored]
    missing: list[str]


def make_server() -> MCPServer[Any]:
    """Return a server of MCP without tools."""
    return MCPServer(
        "d2llm",
        version=d2llm.__version__,
        instructions="Search a collection of documents with `search`, and read whole documents with `get`.",
        log_level="WARNING",
    )


def set_tools(server: MCPServer[Any], service: Service, fields: str) -> None:
    """Give a server the tools of a service, in place of those that it had. `fields` are those of `describe_fields`."""

    async def search(
        query: Annotated[str, Field(description="What to look for: a question or a few words, in any language.")],
        k: Annotated[int, Field(ge=1, le=MOST_HITS, description="Most hits to return.")] = 10,
        filter: Annotated[dict[str, Any] | None, Field(description=FILTERS)] = None,
    ) -> Hits:
        options = {"k": k, "candidates": max(k, service.searcher.options.candidates)}
        with _for_the_model():
            found = (await service.search([query], {**options, "filter": filter or None}))[0]
        if not filter or found.hits:
            return Hits(hits=[_found(hit) for hit in found.hits], note=None)
        with _for_the_model():
            why = await asyncio.to_thread(service.why_nothing, filter)
        return Hits(hits=[], note=". ".join(["Nothing passes the filter", *why, fields]))

    async def get(
        ids: Annotated[list[str], Field(min_length=1, max_length=MOST_IDS, description="Ids of documents, from hits.")],
        offset: Annotated[int, Field(ge=0, description="The first character of each text to return.")] = 0,
    ) -> Documents:
        with _for_the_model():
            payloads = await asyncio.to_thread(service.index.get, ids)
        documents = [_stored(id_, payload, offset) for id_, payload in payloads.items()]
        return Documents(documents=documents, missing=[id_ for id_ in ids if id_ not in payloads])

    reads = ToolAnnotations(read_only_hint=True, open_world_hint=False)
    for tool in (search, get):
        with contextlib.suppress(ToolError):  # there is none at first
            server.remove_tool(tool.__name__)
    server.add_tool(search, annotations=reads, description=(
        f"Search the documents by meaning and words, best first. A hit has the text of its best passage: read the "
        f"whole document with `get` if that is not enough. Use the filter when the question names a value of a field. "
        f"{fields}"
    ))  # fmt: skip
    server.add_tool(get, annotations=reads, description=(
        f"Read whole documents by id, with their fields. A text comes in pieces of {LONGEST_TEXT} characters."
    ))  # fmt: skip


@contextlib.contextmanager
def _for_the_model() -> Iterator[None]:
    """Tell the model what was wrong: it can ask in another way."""
    try:
        yield
    except D2LLMError as error:
        raise ToolError(str(error)) from error


def _found(hit: Hit) -> Found:
    passage = None
    if hit.passage is not None:
        passage = ": ".join(filter(None, [f"{hit.passage.number + 1} of {hit.passage.of}", hit.passage.heading]))
    text = str(hit.payload.get("text", ""))
    return Found(
        id=hit.id, score=round(hit.score, 4), title=title_of(hit.payload) or None, passage=passage,
        text=text if len(text) <= LONGEST_PASSAGE else f"{text[:LONGEST_PASSAGE]}...", fields=_own(hit.payload),
    )  # fmt: skip


def _stored(id_: str, payload: Mapping[str, Any], offset: int) -> Stored:
    text = str(payload.get("text", ""))
    return Stored(
        id=id_, title=title_of(payload) or None, text=text[offset : offset + LONGEST_TEXT], characters=len(text),
        fields=_own(payload),
    )  # fmt: skip


def _own(payload: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in payload.items() if name not in ("text", "title")}


def describe_fields(index: Index) -> str:
    """Return the fields of some documents with example values, in a sentence for a model that writes filters."""
    payloads = index.get(islice(index.ids(), SAMPLE)).values()
    values: dict[str, list[Any]] = {}
    for payload in payloads:
        for name, value in _leaves(_own(payload)):
            values.setdefault(name, []).append(value)
    if not values:
        return "The documents have no fields to filter by."
    most_used = sorted(values.items(), key=lambda field: (-len(field[1]), field[0]))
    return f"Fields, with values of some documents: {'; '.join(_described(*field) for field in most_used)}."


def _leaves(payload: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the key of a filter and the value, for each value that a filter can name."""
    for name, value in payload.items():
        if isinstance(value, Mapping):
            if "." not in name:  # a path has no way to name a field with a dot
                yield from _leaves(value, f"{path or '.'}{name}.")
        elif not path or "." not in name:
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, str | int | float):
                    yield f"{path}{name}", item


def _described(name: str, values: list[Any]) -> str:
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    counts = Counter(values)
    distinct = sorted(counts, key=lambda value: (-counts[value], str(value)))
    if len(numbers) == len(values) and len(distinct) > EXAMPLES:
        return f"{name} (numbers from {min(numbers)} to {max(numbers)})"
    short = [value for value in distinct if len(str(value)) <= LONGEST_EXAMPLE]
    shown = [json.dumps(value, ensure_ascii=False) for value in short[:EXAMPLES]]
    return f"{name} ({', '.join(shown if len(shown) == len(distinct) else [*shown, '...'])})"


class McpEndpoint:
    """The ASGI application of `/mcp`: MCP over HTTP, one request and one JSON answer at a time, without sessions."""

    PATH = "/mcp"

    def __init__(self, service: Callable[[], Service], origins: Collection[str]) -> None:
        """`service` returns the service, or raises an error while it is not loaded. Pages of `origins`, and of this
        machine, may call."""
        self._service, self._origins = service, origins
        self._server: MCPServer[Any] | None = None
        self._lock, self._described_at = asyncio.Lock(), -math.inf

    @contextlib.asynccontextmanager
    async def running(self, app: object) -> AsyncIterator[None]:
        """Run while the application `app` runs."""
        server = make_server()
        # The origin is checked here, and the host is any name of the server.
        free = TransportSecuritySettings(enable_dns_rebinding_protection=False)
        server.streamable_http_app(stateless_http=True, json_response=True, transport_security=free)
        async with server.session_manager.run():
            self._server = server
            yield

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. There are no sessions, so there is no stream to GET and none to DELETE."""
        if scope["method"] != "POST":
            raise HTTPException(405, headers={"Allow": "POST"})
        self._check_origin(scope["headers"])
        service, server = self._service(), self._server
        assert server is not None, "the application has begun"
        async with self._lock:
            if time.monotonic() - self._described_at > FRESH_SECONDS:
                set_tools(server, service, await asyncio.to_thread(describe_fields, service.index))
                self._described_at = time.monotonic()
        await server.session_manager.handle_request(scope, receive, send)

    def _check_origin(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Refuse the pages of other sites, which could reach a server on this machine through a browser."""
        origin = dict(headers).get(b"origin", b"").decode("latin-1")
        local = urlsplit(origin).hostname in ("localhost", "127.0.0.1", "::1")
        if origin and not local and origin not in self._origins:
            raise ForeignOrigin(f"pages of {origin} may not call this service: start it with --cors {origin}")


async def serve_stdio(service: Service) -> None:
    """Answer MCP on stdin and stdout until stdin ends. Whatever else is printed meanwhile goes to stderr."""
    server = make_server()
    set_tools(server, service, await asyncio.to_thread(describe_fields, service.index))
    await server.run_stdio_async()
