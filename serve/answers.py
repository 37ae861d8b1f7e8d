"""Results of the library as JSON, in the forms of several APIs."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from d2llm.reasons import Reason
from d2llm.search import Explanation
from d2llm.types import Floats

from .schemas import RerankBody
from .work import Embedded


def search_answer(explanation: Explanation) -> dict[str, Any]:
    """Return the answer to one query; each hit is as `d2llm search --json` prints it.

    If the search was explained, the hits are all candidates in the order of recall, each with its reasons.
    """
    reasons = explanation.reasons
    hits = [asdict(hit) for hit in explanation.hits] if reasons is None else [*map(_explained, reasons.candidates)]
    return {
        "hits": hits,
        "candidates": explanation.candidates,
        "truncated": explanation.truncated,
        "seconds": explanation.seconds,
        **({} if reasons is None else {"scales": reasons.scales}),
    }


def _explained(reason: Reason) -> dict[str, Any]:
    why = {name: getattr(reason, name) for name in ("parts", "values", "words", "marks")}
    return {**asdict(reason.hit), **why}


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


def tei_ranking(body: RerankBody, scores: Sequence[float]) -> list[dict[str, Any]]:
    """Return the texts by score, best first, as text-embeddings-inference does."""
    texts = body.all_texts
    return [
        {"index": index, "score": scores[index], **({"text": texts[index]} if body.return_text else {})}
        for index in _best(body, scores)
    ]


def cohere_ranking(body: RerankBody, scores: Sequence[float], request_id: str) -> dict[str, Any]:
    """Return the documents by score, best first, as Cohere does."""
    texts = body.all_texts
    results = [
        {
            "index": index,
            "relevance_score": scores[index],
            **({"document": {"text": texts[index]}} if body.return_documents else {}),
        }
        for index in _best(body, scores)
    ]
    return {"id": request_id, "results": results, "meta": {"api_version": {"version": "2"}}}


def _best(body: RerankBody, scores: Sequence[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n]
