"""What the errors of qdrant-client, gRPC and httpx mean: a status, the server's own text, and what a user can do."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import Any

from d2llm.errors import StoreError, import_extra

SEARCH = frozenset({"UNAVAILABLE", "CANCELLED", "RESOURCE_EXHAUSTED", "INTERNAL", "ABORTED", "NOT_QDRANT"})
"""Failures that pass, so that a search is repeated (a server that stops cancels its calls; this side cancels none). A
timeout is not among them: somebody waits for the search."""
ANY = SEARCH | {"DEADLINE_EXCEEDED"}
"""Failures after which every other call is repeated."""

MEANING = {
    "UNAVAILABLE": "cannot reach {place}: is it running, and are its address{ports} right? ({text})",
    "CANCELLED": "{place} broke off a call, as servers do that stop: is it still running? ({text})",
    "NOT_QDRANT": "what answers at {url} is no Qdrant, a proxy in front of it, or of a version that qdrant-client does "
    "not understand: check the address ({text})",
    "DEADLINE_EXCEEDED": "{place} did not answer within {seconds} s: raise timeout, or see what keeps it busy ({text})",
    "UNAUTHENTICATED": "{place} refuses access{to_collection}: check the API key ({text})",
    "PERMISSION_DENIED": "{place} refuses access{to_collection}: check the API key ({text})",
    "NOT_FOUND": "{place} has no collection {name!r} any more: index the corpus again ({text})",
    "ALREADY_EXISTS": "{place}: another process just made the collection {name!r}: run this again",
    "RESOURCE_EXHAUSTED": "{place} asks for fewer requests (a rate limit): {text}",
    "FULL": "{place} is full (disk, memory or a quota): {text}",
    "NO_INDEX": "{where}: strict mode allows no filter on {field!r}, which has no payload index. "
    "Make one with: d2llm collection index-payload {name} FIELD=TYPE --qdrant {url} ({text})",
}

_HTTP = {
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    409: "ALREADY_EXISTS",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    500: "INTERNAL",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
    507: "FULL",
}
_FULL = {"RESOURCE_EXHAUSTED": r"disk|memory|storage|quota|space", "INTERNAL": r"no space left"}


def status_of(error: BaseException) -> str | None:
    """The status of the client's error, or of the one that led to a `StoreError`; None if it is no error of the client.

    qdrant-client raises unrelated families of exceptions; the statuses are those of gRPC, such as `ALREADY_EXISTS`. Two
    are added: NOT_QDRANT, and FULL, which looks like a rate limit or a failure of the server but does not pass.
    """
    if isinstance(error, StoreError):
        error = error.__cause__ or error
    status = _code(error)
    if status in _FULL and pause_of(error) is None and re.search(_FULL[status], text_of(error), re.IGNORECASE):
        return "FULL"
    return status


def _code(error: BaseException) -> str | None:
    import httpx
    from pydantic import ValidationError
    from qdrant_client.common.client_exceptions import QdrantException
    from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

    grpc = import_extra("grpc", "qdrant")
    if isinstance(error, grpc.RpcError):
        code = getattr(error, "code", None)
        return str(code().name) if code is not None else "UNKNOWN"
    if isinstance(error, QdrantException):  # 429 with a Retry-After, even one that the client cannot read
        return "RESOURCE_EXHAUSTED"
    if isinstance(error, UnexpectedResponse | httpx.HTTPStatusError):
        answer = _answer(error)
        if answer.status_code == 404 and b'"status"' not in answer.content:  # Qdrant says what it has not found
            return "NOT_QDRANT"
        return _HTTP.get(answer.status_code, "UNKNOWN")
    if isinstance(error, ResponseHandlingException):
        error = error.source
    if isinstance(error, httpx.TimeoutException):
        return "DEADLINE_EXCEEDED"
    if isinstance(error, httpx.TransportError):
        return "UNAVAILABLE"
    # A web page instead of an answer, JSON of another kind, or data that cannot be unpacked.
    return "NOT_QDRANT" if isinstance(error, json.JSONDecodeError | ValidationError | httpx.RequestError) else None


def _answer(error: BaseException) -> Any:
    """The object with the status, headers and content of the answer: the client's error itself, or what httpx's error
    holds."""
    return getattr(error, "response", error)


def pause_of(error: BaseException) -> float | None:
    """The pause in seconds that a server asks for, if any."""
    pause = getattr(error, "retry_after_s", None) or getattr(error, "headers", {}).get("retry-after", "")
    return float(pause) if str(pause).isdecimal() else None


def text_of(error: BaseException) -> str:
    """The server's own message, without what the client wraps it in."""
    details = getattr(error, "details", None)  # of gRPC
    text = details() if callable(details) else error
    with suppress(AttributeError, ValueError, TypeError, KeyError):
        text = json.loads(_answer(error).content)["status"]["error"]
    return " ".join(str(text).split())
