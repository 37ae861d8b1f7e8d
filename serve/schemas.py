"""The bodies of requests and answers. They make the OpenAPI description."""

from __future__ import annotations

import reprlib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Body(BaseModel):
    """A body of ours: a field that it does not know is an error, and so is a value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _has_these_fields(cls, body: Any) -> Any:
        unknown = [name for name in body if name not in cls.model_fields] if isinstance(body, dict) else []
        if unknown:
            known = ", ".join(cls.model_fields)
            raise ValueError(f"there is no field {reprlib.repr(unknown[0])}: leave it out, or use one of {known}")
        return body


Texts = Annotated[list[str], Field(fail_fast=True)]
"""One wrong value refuses a list: a million of them are not listed."""


Ids = Annotated[list[Annotated[str, BeforeValidator(lambda id_: str(id_) if type(id_) is int else id_)]],
                Field(fail_fast=True)]  # fmt: skip
"""Ids of documents. Whole numbers are taken as POST /documents takes them."""


class SearchBody(Body):
    """One query or several, and the options of `d2llm.SearchOptions`."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["query"], "properties": {"query": {"type": "string", "pattern": "[a-zA-Z]"}}},
                {"required": ["queries"], "properties": {"queries": {"type": "array"}}},
            ]
        }
    )
    query: str | None = None
    queries: Texts | None = Field(None, min_length=1)
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
    def _fits_together(self) -> SearchBody:
        if (self.query is None) == (self.queries is None):
            raise ValueError("give either query or queries")
        if self.bm25_weight is not None and self.hybrid is None:
            raise ValueError("bm25_weight is for hybrid searches: add hybrid, or leave bm25_weight out")
        return self

    def texts(self) -> list[str]:
        """The queries."""
        return self.queries or [self.query or ""]

    def options(self) -> dict[str, Any]:
        """The options that are given, by the names of `SearchOptions`."""
        return self.model_dump(exclude={"query", "queries", "explain"}, exclude_none=True)


class ForeignBody(BaseModel):
    """A body that other servers defined: fields that we do not use are ignored."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


Side = Literal["query", "passage", "document"]
SIDE = Field(None, description="Whether the texts are queries or passages. Default: passages.")


class EmbedBody(ForeignBody):
    """The body of text-embeddings-inference, and `input_type`."""

    inputs: str | Texts
    input_type: Side | None = SIDE
    prompt_name: Side | None = Field(None, description="As input_type.")
    normalize: Literal[True] | None = Field(None, description="Vectors always have the length 1.")
    truncate: bool | None = Field(None, description="false refuses texts above the model's limit. Default: cut them.")
    truncation_direction: Literal["right", "Right"] | None = None
    dimensions: int | None = Field(None, description="Only the width of the model's vectors.")

    @property
    def texts(self) -> list[str]:
        """The inputs as a list."""
        return [self.inputs] if isinstance(self.inputs, str) else self.inputs

    @property
    def side(self) -> Literal["query", "passage"]:
        """The side of the model that encodes the texts."""
        return "query" if "query" in (self.input_type, self.prompt_name) else "passage"


class OpenAIEmbedBody(ForeignBody):
    """OpenAI's body, and `input_type`. Texts as token ids are not understood: they are of another model."""

    input: str | Texts
    model: str = ""
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, description="Only the width of the model's vectors.")
    input_type: Side | None = SIDE

    @property
    def texts(self) -> list[str]:
        """The inputs as a list."""
        return [self.input] if isinstance(self.input, str) else self.input

    @property
    def side(self) -> Literal["query", "passage"]:
        """The side of the model that encodes the texts."""
        return "query" if self.input_type == "query" else "passage"


class TextDocument(ForeignBody):
    """A document of Cohere's first API."""

    text: str


class RerankBody(ForeignBody):
    """The body of text-embeddings-inference (`texts`) or Cohere (`documents`); with `ids`, stored documents are ranked.

    Then only the query is encoded. Documents that are not stored are not in the answer.
    """

    query: str
    texts: Texts | None = Field(None, min_length=1)
    documents: Annotated[list[str | TextDocument], Field(fail_fast=True)] | None = Field(None, min_length=1)
    ids: Ids | None = Field(None, min_length=1, description="Ids of stored documents, in place of texts.")
    task: Literal["symmetric", "asymmetric"] | None = None
    truncate: bool | None = Field(None, description="false refuses texts above the model's limit. Default: cut them.")
    return_text: bool = False
    return_documents: bool = False
    top_n: int | None = Field(None, ge=1)
    raw_scores: bool = Field(False, description="Scores are the same with both: those of searches.")

    @model_validator(mode="after")
    def _one_of_them(self) -> RerankBody:
        if [self.texts, self.documents, self.ids].count(None) != 2:
            raise ValueError("give either texts, documents or ids")
        return self

    @property
    def all_texts(self) -> list[str]:
        """The texts of either body."""
        return self.texts or [each if isinstance(each, str) else each.text for each in self.documents or []]


class DocumentsBody(Body):
    """Documents to store, as lines of a corpus: `_id` (or `id`), `text`, optionally `title`, and any other fields."""

    documents: Annotated[list[dict[str, Any]], Field(fail_fast=True)] = Field(min_length=1)
    chunk: bool = Field(True, description="Split documents that are longer than the model's limit, or cut them.")


class DeleteBody(Body):
    """The ids of documents to remove."""

    ids: Ids = Field(min_length=1)


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
    warnings: list[str] = Field(
        description="Why nothing passes: keys of the filter that no document has, or whose values are of other kinds."
    )
    seconds: dict[str, float]
    scales: dict[str, float] | None = Field(None, description="With `explain`: the weights of the parts.")


class SearchesAnswer(BaseModel):
    """The answers to several queries."""

    results: list[SearchAnswer]


class Vector(BaseModel):
    """A vector of OpenAI's answer."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """The number of tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class OpenAIEmbedAnswer(BaseModel):
    """OpenAI's answer."""

    object: Literal["list"] = "list"
    data: list[Vector]
    model: str
    usage: Usage


class RankedText(BaseModel):
    """A text of the answer of text-embeddings-inference."""

    index: int
    score: float
    text: str | None = None
    id: str | None = Field(None, description="With `ids`: the document.")


class RankedDocument(BaseModel):
    """A text of Cohere's answer."""

    index: int
    relevance_score: float
    document: dict[str, str] | None = None
    id: str | None = Field(None, description="With `ids`: the document.")


class CohereAnswer(BaseModel):
    """Cohere's answer."""

    id: str
    results: list[RankedDocument]
    meta: dict[str, Any]


class AddAnswer(BaseModel):
    """What was stored, see `d2llm.indexing.AddReport`. It is on the disk."""

    added: int
    unchanged: int
    truncated: int
    split: int
    passages: int


class DeleteAnswer(BaseModel):
    """How many of the documents were there."""

    deleted: int


class Problem(BaseModel):
    """What was wrong."""

    type: str
    message: str


class ErrorAnswer(BaseModel):
    """The answer to a request that failed."""

    error: Problem
    request_id: str
