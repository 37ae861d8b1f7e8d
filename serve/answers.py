"""Results of the library as JSON, in the forms of several APIs."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from d2llm.reasons import Reason
from d2llm.search import Explanation
from d2llm.types import Floats, Hit

from .schemas import RerankBody
from .work import Embedded


def search_answer(explanation: Explanation, warnings: Sequence[str]) -> dict[str, Any]:
    """Return the answer to one query; each hit is as `d2llm search --json` prints it.

    If the search was explained, the hits are all candidates in the order of recall, each with its reasons.
    """
    reasons = explanation.reasons
    hits = [*map(_hit, explanation.hits)] if reasons is None else [*map(_explained, reasons.candidates)]
    return {
        "hits": hits,
        "candidates": explanation.candidates,
        "truncated": explanation.truncated,
        "warnings": warnings,
        "seconds": explanation.seconds,
        **({} if reasons is None else {"scales": reasons.scales}),
    }


def _explained(reason: Reason) -> dict[str, Any]:
    why = {name: getattr(reason, name) for name in ("parts", "values", "words", "marks")}
    return {**_hit(reason.hit), **why}


def _hit(hit: Hit) -> dict[str, Any]:
    """Return what `dataclasses.asdict` does, which copies the payloads."""
    fields = {name: getattr(hit, name) for name in Hit.__dataclass_fields__}
    return fields if hit.passage is None else {**fields, "passage": asdict(hit.passage)}


def vectors_json(vectors: Sequence[Embedded]) -> str:
    """Return vectors as a JSON list of lists. One by one, so that other threads run in between."""
    return f"[{','.join(_numbers(each.vector) for each in vectors)}]"


def openai_json(vectors: Sequence[Embedded], model: str, encoding: Literal["float", "base64"]) -> str:
    """Return vectors as OpenAI does. base64 holds float32, little endian."""
    write = _numbers if encoding == "float" else _base64
    data = ",".join(
        f'{{"object":"embedding","index":{number},"embedding":{write(each.vector)}}}'
        for number, each in enumerate(vectors)
    )
    tokens = sum(each.tokens for each in vectors)
    usage = f'{{"prompt_tokens":{tokens},"total_tokens":{tokens}}}'
    return f'{{"object":"list","data":[{data}],"model":{json.dumps(model)},"usage":{usage}}}'


def _numbers(vector: Floats) -> str:
    return json.dumps(vector.tolist())


def _base64(vector: Floats) -> str:
    return f'"{base64.b64encode(vector.astype("<f4").tobytes()).decode()}"'


@dataclass(frozen=True)
class Ranked:
    """A text or stored document with its score."""

    index: int
    """Its place in the request."""
    score: float
    text: str
    id: str | None = None


def by_score(texts: Sequence[str], scores: Sequence[float]) -> list[Ranked]:
    """Return the texts of a request, best first."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    return [Ranked(index, scores[index], texts[index]) for index in order]


def by_hits(ids: Sequence[str], hits: Sequence[Hit]) -> list[Ranked]:
    """Return the stored documents among those of a request, in the order of the hits."""
    places = {id_: index for index, id_ in reversed([*enumerate(ids)])}
    return [Ranked(places[hit.id], hit.score, hit.payload["text"], hit.id) for hit in hits]


def tei_ranking(ranked: Sequence[Ranked], body: RerankBody) -> list[dict[str, Any]]:
    """Return a ranking as text-embeddings-inference does."""
    return [
        {"index": each.index, "score": each.score, **_id(each), **({"text": each.text} if body.return_text else {})}
        for each in ranked[: body.top_n]
    ]


def cohere_ranking(ranked: Sequence[Ranked], body: RerankBody, request_id: str) -> dict[str, Any]:
    """Return a ranking as Cohere does."""
    results = [
        {
            "index": each.index,
            "relevance_score": each.score,
            **_id(each),
            **({"document": {"text": each.text}} if body.return_documents else {}),
        }
        for each in ranked[: body.top_n]
    ]
    return {"id": request_id, "results": results, "meta": {"api_version": {"version": "2"}}}


def _id(ranked: Ranked) -> dict[str, str]:
    return {} if ranked.id is None else {"id": ranked.id}
