"""Errors as answers: which status each has, and its body."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
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


HTTP = {
    400: ("validation", "the body cannot be read: send JSON in UTF-8"),
    404: ("not_found", "there is nothing at this address: /openapi.json describes the API"),
    405: ("method_not_allowed", "this address does not take this method: /openapi.json describes the API"),
}
"""The type and the message of an error that the framework raises, by its status."""


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


KINDS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "string": "a text", "list": "a list",
    "dict": "an object", "model": "an object",
}  # fmt: skip
"""What a field of each kind holds, by the first word of pydantic's types of errors."""
RULES = {
    "greater_than_equal": "at least {ge:g}",
    "finite_number": "a finite number",
    "literal_error": "{expected}",
    "too_short": "{min_length} or more",
    "string_too_short": "{min_length} or more characters",
    "string_too_long": "at most {max_length} characters",
}
"""What is expected, by pydantic's type of error."""
ALTERNATIVES = {"str", "list[str]", "TextDocument"}
"""What pydantic adds to the place of a value that may be of several types."""


def what_is_wrong(errors: Sequence[Mapping[str, Any]]) -> str:
    """Say what is wrong with the values of a body: the place of each, what was found, and what is expected."""
    wrong: dict[str, list[Mapping[str, Any]]] = {}
    for error in errors:
        place = ".".join(str(name) for name in error["loc"][1:] if name not in ALTERNATIVES)
        if error["type"] == "json_invalid":
            return f"the body is not valid JSON, at character {place}"
        if not place and error["type"] in ("model_attributes_type", "missing"):
            return "the body is no JSON object: send one, with the header Content-Type: application/json"
        wrong.setdefault(place, []).append(error)
    return "; ".join(
        _sentence(place, of_place)
        for place, of_place in wrong.items()
        if not any(other.startswith(f"{place}.") for other in wrong)  # of several types it may have, the nearest counts
    )


def _sentence(place: str, errors: Sequence[Mapping[str, Any]]) -> str:
    """Say what is wrong with one value. Several errors are about the types that it may have."""
    first = errors[0]
    if first["type"] == "value_error":  # of a validator of ours
        return str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{place} is missing: add it"
    return f"{place}: found {_in_words(first['input'])}, expected {' or '.join(map(_expected, errors))}"


def _expected(error: Mapping[str, Any]) -> str:
    if error["type"] in RULES:
        return RULES[error["type"]].format(**error.get("ctx", {})).replace("True", "true")
    return KINDS.get(error["type"].partition("_")[0], str(error["msg"]))


def _in_words(value: Any) -> str:
    """Return a short description of a value of JSON. Texts may be long, or no UTF-8."""
    if isinstance(value, list | dict):
        return f"a list of {len(value)}" if isinstance(value, list) else "an object"
    return reprlib.repr(value) if isinstance(value, str) else reprlib.repr(json.dumps(value))[1:-1]


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
        return problem(422, "validation", what_is_wrong(error.errors()), request.state.id)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        kind, message = HTTP.get(error.status_code, ("http", str(error.detail)))
        return problem(error.status_code, kind, message, request.state.id, error.headers)

    @app.exception_handler(Exception)
    async def other(request: Request, error: Exception) -> JSONResponse:  # raised again then, for the log of the door
        return unexpected(request.state.id)
