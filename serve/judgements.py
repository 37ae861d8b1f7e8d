"""Judgements of hits, made on the page: a folder in BEIR's form, which `d2llm tune` and `d2llm eval` read."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from d2llm.beir import read_qrels
from d2llm.corpus import read_queries
from d2llm.errors import ArgumentError, DataError
from d2llm.files import write_lines
from d2llm.types import strings

from .schemas import Body, ErrorAnswer

QUERIES, QRELS = "queries.jsonl", "qrels/test.tsv"
HEADER = "query-id\tcorpus-id\tscore"


class Judgements:
    """Which documents are right for which queries, kept in `queries.jsonl` and `qrels/test.tsv` of a folder.

    What the folder has already stays: its queries keep their ids, and judgements that were made elsewhere count too.
    Both files are replaced whole, so a reader never finds half of one. Thread-safe.

    Example:
        >>> from d2llm.serve import Judgements
        >>> judgements = Judgements(tmp_path / "judged")
        >>> judgements.judge("how long does a refund take?", "a", 1)
        >>> judgements.by_query()
        {'how long does a refund take?': {'a': 1}}
    """

    def __init__(self, folder: Path) -> None:
        """Read what is in `folder`, which is made if it is missing.

        Raises:
            DataError: a file of the folder is broken, or gzipped: plain ones beside it would hide it from all readers.
        """
        self.folder, self._lock = folder, threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        for packed in (folder / f"{name}.gz" for name in (QUERIES, QRELS)):
            if packed.exists():
                raise DataError(f"{packed} is gzipped, and judgements go into plain files. Unpack it: gunzip {packed}")
        self._read()

    def _read(self) -> None:
        """Read both files. Other programs may have added to them."""
        queries, qrels = self.folder / QUERIES, self.folder / QRELS
        text = queries.read_text(encoding="utf-8") if queries.exists() else ""
        self._lines = [line for line in text.split("\n") if line.strip()]  # splitlines() cuts within queries, at U+2028
        self._queries = read_queries(queries) if self._lines else {}
        self._qrels = read_qrels(qrels) if qrels.exists() else {}

    def by_query(self) -> dict[str, dict[str, int]]:
        """Return the judgements, `{text of the query: {document id: relevance}}`."""
        with self._lock:
            self._read()
            judged = [(self._queries.get(id_), judgements) for id_, judgements in self._qrels.items()]
        return {text: dict(judgements) for text, judgements in judged if text is not None and judgements}

    def judge(self, query: str, document: str, relevance: int | None) -> None:
        """Note whether a document is right for a query. None takes the judgement back.

        Raises:
            DataError: the query is empty or no UTF-8, or the file cannot hold the id of the document.
        """
        query, document = strings([query, document])
        if not query.strip():
            raise DataError("the query is empty: there is nothing to judge")
        if not document.strip() or any(mark in document for mark in "\t\r\n\v\f\x1c\x1d\x1e\x85\u2028\u2029"):
            raise DataError(f"a qrels file cannot hold the id {document!r}: it is blank, or has a tab or a line break")
        with self._lock:
            self._read()
            id_ = self._id_of(query)
            judged = dict(self._qrels.get(id_, {}))
            if relevance is None:
                judged.pop(document, None)
            else:
                judged[document] = relevance
            self._write({**self._qrels, id_: judged})

    def _id_of(self, query: str) -> str:
        """Return the id of a query. A new one is added to the file of queries first: judgements name no other."""
        known = next((id_ for id_, text in self._queries.items() if text == query), None)
        if known is not None:
            return known
        id_ = "q" + hashlib.sha256(query.encode()).hexdigest()[:12]
        lines = [*self._lines, json.dumps({"_id": id_, "text": query}, ensure_ascii=False)]
        write_lines(self.folder / QUERIES, lines)
        self._lines, self._queries[id_] = lines, query
        return id_

    def _write(self, qrels: dict[str, dict[str, int]]) -> None:
        rows = [
            f"{id_}\t{document}\t{relevance}" for id_, judged in qrels.items() for document, relevance in judged.items()
        ]
        write_lines(self.folder / QRELS, [HEADER, *rows])
        self._qrels = qrels


class JudgementBody(Body):
    """One judgement."""

    query: str = Field(min_length=1, max_length=100_000)
    id: str = Field(min_length=1, max_length=10_000, description="The id of the document.")
    relevance: Literal[0, 1] | None = Field(description="1 for right, 0 for wrong; null takes the judgement back.")


class JudgementsAnswer(BaseModel):
    """All judgements so far."""

    kept: bool = Field(description="Whether this service keeps judgements.")
    queries: dict[str, dict[str, int]] = Field(description="The relevance of documents by query and id.")


def judgements_router(judgements: Judgements | None) -> APIRouter:
    """Return the routes of `/judgements`. None keeps no judgements: the page keeps its own in the browser."""
    routes = APIRouter(responses={"4XX": {"model": ErrorAnswer}})

    def answer() -> Mapping[str, Any]:
        return {"kept": judgements is not None, "queries": judgements.by_query() if judgements else {}}

    @routes.get("/judgements", response_model=JudgementsAnswer)
    def read() -> Mapping[str, Any]:
        """Return all judgements that were made."""
        return answer()

    @routes.post("/judgements", response_model=JudgementsAnswer)
    def judge(body: JudgementBody) -> Mapping[str, Any]:
        """Note whether a document is right for a query, and return all judgements."""
        if judgements is None:
            raise ArgumentError("this service keeps no judgements: start it with --judgements FOLDER")
        judgements.judge(body.query, body.id, body.relevance)
        return answer()

    return routes
