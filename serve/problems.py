"""Errors as answers: which status each has, and its body."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from d2llm.errors import ArgumentError, D2LLMError, DataError, MismatchError, StoreError

from .batching import Busy
from .service import TooLarge


class NotReady(D2LLMError):
    """The model is not loaded yet."""


class ForeignOrigin(D2LLMError):
    """A page of another site calls, in the browser of a user."""


STATUS: dict[type[D2LLMError], tuple[int, str]] = {
    TooLarge: (413, "too_large"),
    Busy: (429, "overloaded"),
    NotReady: (503, "not_ready"),
    ForeignOrigin: (403, "origin"),
    StoreError: (503, "index_unavailable"),
    MismatchError: (422, "mismatch"),
    ArgumentError: (422, "validation"),
    DataError: (422, "validation"),
}
"""The status and the type of an error, by its class. The first that fits counts."""


def problem(
    status: int, kind: str, message: str, request_id: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Return the answer to a request that failed."""
    content = {"error": {"type": kind, "message": message}, "request_id": request_id}
    return JSONResponse(content, status, headers)


def unexpected(request_id: str) -> JSONResponse:
    """Return the answer for an error that the log tells about, not the client."""
    return problem(500, "internal", f"an unexpected error: the log has it under {request_id}", request_id)


def interrupted(request_id: str) -> JSONResponse:
    """Return the answer to a request that was in flight when the service ended."""
    message = (
        "the service stops before this request is answered. Documents that were acknowledged are stored; if these were "
        "not, send them again"
    )
    return problem(503, "stopping", message, request_id, {"Connection": "close"})


def _what_is_wrong(error: Mapping[str, Any]) -> str:
    """Return a sentence about one wrong value, without the value: it may be a text, and may have no UTF-8."""
    place = ".".join(map(str, error["loc"][1:]))
    if error["type"] == "json_invalid":
        return f"the body is not valid JSON, at character {place}"
    if not place and error["type"] in ("model_attributes_type", "missing"):
        return "the body is no JSON object: send one, with the header Content-Type: application/json"
    return f"{place or 'body'}: {error['msg'].removeprefix('Value error, ')}"


def handle_problems(app: FastAPI) -> None:
    """Answer every error of `app` in one form."""

    @app.exception_handler(D2LLMError)
    async def known(request: Request, error: D2LLMError) -> JSONResponse:
        status, kind = next((answer for of, answer in STATUS.items() if isinstance(error, of)), (500, "internal"))
        headers = {"Retry-After": str(error.seconds)} if isinstance(error, Busy) else {}
        if isinstance(error, NotReady):
            headers = {"Retry-After": "1"}
        return problem(status, kind, str(error), request.state.id, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return problem(422, "validation", "; ".join(map(_what_is_wrong, error.errors())), request.state.id)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        kinds = {400: "validation", 404: "not_found", 405: "method_not_allowed"}
        return problem(
            error.status_code, kinds.get(error.status_code, "http"), str(error.detail), request.state.id, error.headers
        )

    @app.exception_handler(Exception)
    async def other(request: Request, error: Exception) -> JSONResponse:  # raised again then, for the log of the door
        return unexpected(request.state.id)
