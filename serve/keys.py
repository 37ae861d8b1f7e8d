"""API keys: who may read, and who may write."""

from __future__ import annotations

import hmac
from collections.abc import Mapping

from starlette.types import Scope

from .settings import Settings

OPEN_PATHS = ("/health",)
"""What needs no key, beside the page."""
DOCUMENTS = "/documents"
WRITES = {("POST", DOCUMENTS), ("DELETE", DOCUMENTS), ("POST", "/judgements")}


def writes(scope: Scope) -> bool:
    """Whether a request changes what the service keeps."""
    return (scope["method"], scope["path"]) in WRITES


class Refused(Exception):
    """A request that may not pass: with the status of its answer, and the type of the error."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


class Keys:
    """Checks the key of a request. Keys are compared in constant time."""

    def __init__(self, settings: Settings) -> None:
        self._read = _encoded(settings.read_key)
        self._write = _encoded(settings.write_key)
        self._writable = settings.writable

    def check(self, scope: Scope, headers: Mapping[bytes, bytes]) -> None:
        """Let a request for a path of the API pass, or raise `Refused`. The headers have lower-case names."""
        if scope["path"] in OPEN_PATHS:
            return
        if scope["path"] == DOCUMENTS and not self._writable:
            raise Refused(403, "key", "this service only reads: start it with --writable to add and remove documents")
        # Without a key for writing, whoever may read may judge: the service was started to keep judgements.
        write = writes(scope) and self._write is not None
        if not write and self._read is None:
            return
        given = _given(headers)
        # Both are always compared, so that the time does not tell which one is near.
        may_write = self._write is not None and hmac.compare_digest(given, self._write)
        may_read = self._read is not None and hmac.compare_digest(given, self._read)
        if may_write or (may_read and not write):
            return
        if may_read:
            raise Refused(403, "key", "this key only reads: use the key for writing")
        problem = "unknown key" if given else "a key is needed: send it as Authorization: Bearer KEY"
        raise Refused(401, "key", problem)


def _encoded(key: str | None) -> bytes | None:
    return None if key is None else key.encode()


def _given(headers: Mapping[bytes, bytes]) -> bytes:
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else headers.get(b"api-key", b"")
