"""The settings of the service: keys and limits."""

from __future__ import annotations

from dataclasses import dataclass

from d2llm.errors import ArgumentError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What one service allows.

    Raises:
        ArgumentError: writing is allowed without a key for it, or a key is empty.
    """

    read_key: str | None = None
    """The key that every request needs, except for the page and `/health`. None: none is needed."""
    write_key: str | None = None
    """The key that writing documents and judgements needs. It also reads. Without it, who may read may also judge."""
    writable: bool = False
    """Whether documents can be added and removed."""
    max_body: int = 2 * 2**20
    """Bytes of the body of a request. Reading JSON makes all others wait: 2 MB take up to 100 ms."""
    max_texts: int = 2048
    """Queries, texts, ids or documents of a request."""
    max_length: int = 100_000
    """Characters of a query or a text. Documents to store may be longer, since they are split."""
    max_k: int = 1000
    """The largest `k`, and the largest number of candidates."""
    max_queue: int = 256
    """Queries that may wait, and as many texts of other requests. More are refused with the status 429."""
    body_seconds: float = 30.0
    """How long a client may take to send a request."""
    log_texts: bool = False
    """Whether the log has the queries and texts."""
    cors: tuple[str, ...] = ()
    """Origins whose pages may use the service, such as `https://app.example.com`."""

    def __post_init__(self) -> None:
        if self.writable and not self.write_key:
            raise ArgumentError("a writable service needs a key for writing: give --write-key, or D2LLM_WRITE_KEY")
        if self.write_key is not None and self.read_key == self.write_key:
            raise ArgumentError("the keys for reading and writing are the same: whoever reads could write; give two")
        if "" in (self.read_key, self.write_key):
            raise ArgumentError("a key of the service is empty, which would let in everyone: give a longer one")
