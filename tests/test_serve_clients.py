"""Clients of other servers work with `d2llm serve` unchanged, and their answers are the library's."""

from collections.abc import Iterator

import cohere
import httpx
import numpy as np
import openai
import pytest
from huggingface_hub import InferenceClient
from serving import DOCUMENTS, TEXTS, running

import d2llm
from d2llm.search import Searcher

QUERY = "how long does a refund take?"
KEY = "a key that only reads"


@pytest.fixture(scope="module")
def searcher(model: d2llm.Model) -> Searcher:
    index = d2llm.FlatIndex()
    index.add(model, DOCUMENTS)
    return Searcher(model, index)


@pytest.fixture(scope="module")
def address(searcher: Searcher) -> Iterator[str]:
    with running(searcher) as address:
        yield address


@pytest.mark.parametrize("encoding", ["float", "base64 that the client asks for and decodes"])
@pytest.mark.parametrize("side", ["query", "passage"])
def test_openai(address: str, model: d2llm.Model, encoding: str, side: str) -> None:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY)
    texts = list(TEXTS.values())
    answer = client.embeddings.create(
        model="any",
        input=texts,
        encoding_format="float" if encoding == "float" else openai.omit,
        extra_body={"input_type": side},
    )
    encoder = model.query if side == "query" else model.document
    vectors = [each.embedding for each in answer.data]
    np.testing.assert_array_equal(np.array(vectors, np.float32), encoder.encode(texts).vectors)
    assert [each.index for each in answer.data] == list(range(len(texts)))
    assert answer.usage.prompt_tokens == sum(len(each.ids) for each in encoder.tokenize(texts))


def test_openai_with_one_text_that_is_a_passage_if_nothing_is_said(address: str, model: d2llm.Model) -> None:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY)
    (vector,) = client.embeddings.create(model="any", input=QUERY).data
    np.testing.assert_array_equal(np.array(vector.embedding, np.float32), model.encode_document([QUERY]).vectors[0])


def test_openai_shows_what_was_wrong(address: str) -> None:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)
    with pytest.raises(openai.UnprocessableEntityError, match="vectors of 384 dimensions, not of 256"):
        client.embeddings.create(model="any", input=QUERY, dimensions=256)
    with pytest.raises(openai.UnprocessableEntityError, match="input"):
        client.embeddings.create(model="any", input=[[1, 2, 3]])


@pytest.mark.parametrize("prompt", ["query", "passage", None])
def test_text_embeddings_inference(
    address: str, model: d2llm.Model, prompt: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client of Hugging Face, which sends TEI's body."""
    # A test of a hub out of reach may have been the first to import the client, which then stays offline.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    client = InferenceClient(model=f"{address}/embed")
    texts = list(TEXTS.values())
    vectors = client.feature_extraction(texts, normalize=True, truncate=True, prompt_name=prompt)
    encoder = model.query if prompt == "query" else model.document
    np.testing.assert_array_equal(vectors, encoder.encode(texts).vectors)
    assert client.feature_extraction(QUERY).shape == (1, model.config.embedding_dim)


def test_text_embeddings_inference_refuses_what_it_may_not_cut(address: str, model: d2llm.Model) -> None:
    long = "word " * 1000
    cut = httpx.post(f"{address}/embed", json={"inputs": long})
    assert cut.json()[0] == model.encode_document([long]).vectors[0].tolist()
    refused = httpx.post(f"{address}/embed", json={"inputs": ["short", long], "truncate": False})
    assert refused.status_code == 413
    assert refused.json()["error"]["message"].startswith("text 1 has more than 128 tokens")


def expected(model: d2llm.Model) -> list[tuple[int, float]]:
    """The texts by score, as the library scores them."""
    scores = model.score_all(model.encode_query([QUERY]), model.encode_document(TEXTS.values()))[0].tolist()
    return sorted(enumerate(scores), key=lambda pair: -pair[1])


def test_rerank_in_the_body_of_text_embeddings_inference(address: str, model: d2llm.Model) -> None:
    body = {"query": QUERY, "texts": list(TEXTS.values()), "raw_scores": True, "return_text": True}
    answer = httpx.post(f"{address}/rerank", json=body).json()
    order, scores = zip(*expected(model), strict=True)
    assert tuple(each["index"] for each in answer) == order
    assert [each["score"] for each in answer] == pytest.approx(scores, abs=1e-4)
    assert answer[0]["text"] == TEXTS["refund"]


@pytest.mark.parametrize("version", [1, 2])
def test_cohere(address: str, model: d2llm.Model, version: int) -> None:
    client = cohere.ClientV2(KEY, base_url=address) if version == 2 else cohere.Client(KEY, base_url=address)
    answer = client.rerank(model="any", query=QUERY, documents=list(TEXTS.values()), top_n=3)
    order, scores = zip(*expected(model)[:3], strict=True)
    assert tuple(each.index for each in answer.results) == order
    assert [each.relevance_score for each in answer.results] == pytest.approx(scores, abs=1e-4)


def test_cohere_with_documents_as_objects(address: str) -> None:
    client = cohere.Client(KEY, base_url=address)
    documents = [{"text": text} for text in TEXTS.values()]
    answer = client.rerank(query=QUERY, documents=documents, return_documents=True)
    assert answer.results[0].document is not None and answer.results[0].document.text == TEXTS["refund"]


@pytest.mark.parametrize("path", ["/rerank", "/v2/rerank"])
def test_stored_documents_are_ranked_without_their_texts(
    address: str, searcher: Searcher, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searcher.model.document, "encode_tokens", None)  # no passage is encoded
    ids = ["vitamin", "never stored", "refund", "delivery", "refund"]
    answer = httpx.post(f"{address}{path}", json={"query": QUERY, "ids": ids}).json()
    ranked = answer if path == "/rerank" else answer["results"]
    scores = {hit.id: hit.score for hit in searcher.search(QUERY)}
    assert [each["id"] for each in ranked] == ["refund", "delivery", "vitamin"]
    assert [each["index"] for each in ranked] == [2, 3, 0]
    found = [each["score" if path == "/rerank" else "relevance_score"] for each in ranked]
    assert found == pytest.approx([scores[each["id"]] for each in ranked], abs=1e-4)


def test_a_rerank_needs_texts(address: str) -> None:
    answer = httpx.post(f"{address}/rerank", json={"query": QUERY})
    assert answer.status_code == 422 and "give either texts, documents or ids" in answer.json()["error"]["message"]
