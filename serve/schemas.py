"""The bodies of requests and answers. They make the OpenAPI description."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Body(BaseModel):
    """A body of ours: a field that it does not know is an error, and so is a value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class SearchBody(Body):
    """One query or several, and the options of `d2llm.SearchOptions`."""

    query: str | None = None
    queries: list[str] | None = Field(None, min_length=1)
    k: int | None = Field(None, ge=1, description="Hits to return. Default: 10.")
    candidates: int | None = Field(None, ge=1, description="Passages that recall fetches and the IEM rescores.")
    filter: dict[str, Any] | None = Field(
        None, description="A condition on the fields of documents.", examples=[{"lang": "en", "year": {"gte": 2024}}]
    )
    task: Literal["symmetric", "asymmetric"] | None = None
    rescore: bool | None = Field(None, description="Whether the IEM rescores the candidates. Default: true.")
    hybrid: Literal["rrf", "dbsf"] | None = Field(None, description="Recall by BM25 too, merged in this way.")
    bm25_weight: float | None = Field(None, ge=0)
    explain: bool = Field(False, description="Return all candidates in recall order, with reasons for their scores.")

    @model_validator(mode="after")
    def _one_of_both(self) -> SearchBody:
        if (self.query is None) == (self.queries is None):
            raise ValueError("give either query or queries")
        return self

    def texts(self) -> list[str]:
        """The queries."""
        return self.queries or [self.query or ""]

    def options(self) -> dict[str, Any]:
        """The options that are given, by the names of `SearchOptions`."""
        return self.model_dump(exclude={"query", "queries", "explain"}, exclude_none=True)


class PassageAnswer(BaseModel):
    """The place of a passage in its document."""

    number: int
    of: int
    start: int
    end: int
    heading: str


class HitAnswer(BaseModel):
    """One hit, as `d2llm search --json` prints it. The rest is there with `explain`."""

    id: str
    score: float
    recall_score: float
    recall_rank: int
    payload: dict[str, Any]
    passage: PassageAnswer | None
    parts: dict[str, float] | None = Field(None, description="What each part adds to the score.")
    values: dict[str, float] | None = Field(None, description="Each part before its weight (see `d2llm.reasons`).")
    words: dict[str, float] | None = Field(None, description="The shared words, and what each adds to the score.")
    marks: dict[str, list[tuple[int, int, float]]] | None = Field(
        None, description="Where the shared words are in text and title: first character, end, what it adds."
    )


class SearchAnswer(BaseModel):
    """The answer to one query."""

    hits: list[HitAnswer]
    candidates: int
    truncated: bool
    seconds: dict[str, float]
    scales: dict[str, float] | None = Field(None, description="With `explain`: the weights of the parts.")


class SearchesAnswer(BaseModel):
    """The answers to several queries."""

    results: list[SearchAnswer]


class Problem(BaseModel):
    """What was wrong."""

    type: str
    message: str


class ErrorAnswer(BaseModel):
    """The answer to a request that failed."""

    error: Problem
    request_id: str
