"""Check that `d2llm index --from-collection` takes over collections of other programs: ids, payloads, filters.

    python benchmarks/take_over.py [--points 20000] [--server http://localhost:6333]

Each program's own writer makes a collection, with vectors that cost nothing. (What fastembed and mcp-server-qdrant
write is written by hand, in their form.) `d2llm index --from-collection` takes it over twice, with a tiny random model.
Then ids, payloads, and the points that pass a filter are compared with those of the old collection.

Without --server, the old collections are in folders of qdrant-client's local mode.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from qdrant_client import QdrantClient, models

from d2llm.cli_options import echo_table
from d2llm.connectors import QdrantIndex

WIDTH = 8
Fields = Sequence[Mapping[str, Any]]
Write = Callable[[Mapping[str, Any], str, Sequence[str], Fields], None]
"""Writes texts with their fields into a new collection. The first argument says where, as `QdrantClient` takes it."""


def vector_of(text: str) -> list[float]:
    """A vector that depends on the text alone."""
    return [byte / 255 + 0.01 for byte in hashlib.blake2b(text.encode(), digest_size=WIDTH).digest()]


def uuid_of(number: int) -> str:
    """The id of a point."""
    return str(uuid.UUID(int=number + 2**100))


@contextmanager
def client_at(where: Mapping[str, Any]) -> Iterator[QdrantClient]:
    """A client that is closed after the block. In a folder, one can be open at a time."""
    client = QdrantClient(**where)
    try:
        yield client
    finally:
        client.close()


def make(client: QdrantClient, name: str, vector: str = "") -> None:
    """Make a collection, with vectors of this name."""
    params = models.VectorParams(size=WIDTH, distance=models.Distance.COSINE)
    client.create_collection(name, {vector: params} if vector else params)


def write_langchain(where: Mapping[str, Any], name: str, texts: Sequence[str], fields: Fields) -> None:
    """Write as LangChain does."""
    from langchain_core.embeddings import Embeddings
    from langchain_qdrant import QdrantVectorStore

    class Hashed(Embeddings):
        def embed_query(self, text: str) -> list[float]:
            return vector_of(text)

        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return [vector_of(text) for text in texts]

    with client_at(where) as client:
        make(client, name)
        store = QdrantVectorStore(client, name, Hashed())
        store.add_texts(list(texts), [dict(one) for one in fields], ids=[uuid_of(i) for i in range(len(texts))])


def write_llama_index(where: Mapping[str, Any], name: str, texts: Sequence[str], fields: Fields) -> None:
    """Write as LlamaIndex does. It also makes a payload index on a server."""
    from llama_index.core.schema import TextNode
    from llama_index.vector_stores.qdrant import QdrantVectorStore

    nodes: list[Any] = [
        TextNode(id_=uuid_of(i), text=text, metadata=dict(one), embedding=vector_of(text))
        for i, (text, one) in enumerate(zip(texts, fields, strict=True))
    ]
    with client_at(where) as client:
        QdrantVectorStore(name, client=client).add(nodes)


def write_haystack(where: Mapping[str, Any], name: str, texts: Sequence[str], fields: Fields) -> None:
    """Write as Haystack does. Its ids are digests of the documents."""
    from haystack import Document
    from haystack_integrations.document_stores.qdrant import QdrantDocumentStore

    documents = [
        Document(content=text, meta=dict(one), embedding=vector_of(text))
        for text, one in zip(texts, fields, strict=True)
    ]
    store = QdrantDocumentStore(**where, index=name, embedding_dim=WIDTH, progress_bar=False)
    store.write_documents(documents)
    store.close()


def _write_by_hand(payload_of: Callable[[str, Mapping[str, Any]], dict[str, Any]], vector: str = "") -> Write:
    def write(where: Mapping[str, Any], name: str, texts: Sequence[str], fields: Fields) -> None:
        ids: list[int | str] = [i if i % 2 else uuid_of(i) for i in range(len(texts))]
        points = [
            models.PointStruct(
                id=id_, vector={vector: vector_of(text)} if vector else vector_of(text), payload=payload_of(text, one)
            )
            for id_, text, one in zip(ids, texts, fields, strict=True)
        ]
        with client_at(where) as client:
            make(client, name, vector)
            for start in range(0, len(points), 1000):
                client.upsert(name, points[start : start + 1000])

    return write


WRITERS: dict[str, tuple[Write, str]] = {
    "LangChain": (write_langchain, "metadata."),
    "LlamaIndex": (write_llama_index, ""),
    "Haystack": (write_haystack, "meta."),
    # qdrant_client/qdrant_fastembed.py of clients that had `QdrantClient.add`: `payload = {"document": doc, **meta}`.
    "fastembed": (_write_by_hand(lambda text, one: {"document": text, **one}, "fast-all-minilm-l6-v2"), ""),
    # mcp_server_qdrant/qdrant.py: `payload = {"document": entry.content, METADATA_PATH: entry.metadata}`. Its package
    # would bring a server of its own, so it is written by hand.
    "mcp-server-qdrant": (
        _write_by_hand(lambda text, one: {"document": text, "metadata": dict(one)}, "fast-all-minilm-l6-v2"),
        "metadata.",
    ),
    "hand": (_write_by_hand(lambda text, one: {"text": text, **one}), ""),
}
"""What writes each form, and where it puts the fields of a document."""
TEXT_FIELDS = {"LangChain": "page_content", "Haystack": "content", "fastembed": "document",
               "mcp-server-qdrant": "document", "hand": "text"}  # fmt: skip
"""The field with the text, which is `text` in a taken-over collection."""


def expected_payload(writer: str, payload: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The payload of a document that was taken over from a point with `payload`."""
    moved = TEXT_FIELDS.get(writer)
    return {**{key: value for key, value in payload.items() if key != moved}, "text": text}


def points_at(where: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """The payloads of all points by id, as string."""
    found, offset = dict[str, dict[str, Any]](), None
    with client_at(where) as client:
        while True:
            records, offset = client.scroll(name, limit=20_000, offset=offset)
            found |= {str(record.id): record.payload or {} for record in records}
            if offset is None:
                return found


def count_at(where: Mapping[str, Any], name: str, key: str, value: Any) -> int:
    """How many points have this value."""
    match = models.FieldCondition(key=key, match=models.MatchValue(value=value))
    with client_at(where) as client:
        return client.count(name, count_filter=models.Filter(must=[match])).count


def corpus(number: int) -> tuple[list[str], list[dict[str, Any]]]:
    """Texts, all different, and their fields."""
    texts = [f"Passage {i}: refunds of order {i * 7} take {i % 30} days." for i in range(number)]
    fields = [
        {"source": f"site-{i % 7}", "year": 2000 + i % 25, "price": i / 4, "draft": i % 3 == 0, "note": f"n{i}"}
        for i in range(number)
    ]
    return texts, fields


def tiny_model(folder: Path) -> Path:
    """A model of random weights, small enough to encode thousands of passages a second."""
    from tokenizers import Tokenizer, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import BertConfig, BertModel

    from d2llm.export import export
    from d2llm.student import Student, StudentConfig

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus(200)[0], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    backbone, student, model = folder / "backbone", folder / "student", folder / "model"
    BertModel(
        BertConfig(
            vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=128,
        )
    ).save_pretrained(backbone)  # fmt: skip
    tokenizer.save(str(backbone / "tokenizer.json"))
    Student.create(StudentConfig(backbone=str(backbone), document_max_length=64, query_max_length=64)).save(student)
    export(student, model)
    return model


def index_command(model: Path, name: str, source: str, grpc_port: int, target: Path) -> tuple[dict[str, Any], float]:
    """Run `d2llm index --from-collection`. Returns its report, and the seconds it took."""
    command = [sys.executable, "-m", "d2llm", "index", str(model), "--from-collection", name, "--from-qdrant", source]
    command += ["--from-grpc-port", str(grpc_port)]
    began = time.perf_counter()
    done = subprocess.run(
        [*command, "--qdrant", str(target), "--collection", "kb", "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise click.ClickException(done.stderr)
    return json.loads(done.stdout), time.perf_counter() - began


@click.command()
@click.option("--points", default=20_000, show_default=True, help="Points of each collection.")
@click.option("--server", metavar="URL", help="Server for the old collections. [default: folders of local mode]")
@click.option("--grpc-port", default=6334, show_default=True, help="gRPC port of the server; 0 for none.")
@click.option("--model", "model_folder", type=click.Path(path_type=Path), help="Model. [default: a tiny random one]")
@click.option("--writer", "writers", type=click.Choice([*WRITERS]), multiple=True, default=[*WRITERS])
def main(points: int, server: str | None, grpc_port: int, model_folder: Path | None, writers: Sequence[str]) -> None:
    """Take over a collection of each writer."""
    rows = []
    texts, fields = corpus(points)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = model_folder or tiny_model(folder)
        for number, writer in enumerate(writers):
            write, prefix = WRITERS[writer]
            place, name = server or str(folder / f"local-{number}"), f"take-over-{uuid.uuid4().hex[:8]}"
            where: dict[str, Any] = {"url": server} if server else {"path": place}
            write(where, name, texts, fields)
            old = points_at(where, name)
            target = folder / f"new-{number}"
            first, seconds = index_command(model, name, place, grpc_port, target)
            again, seconds_again = index_command(model, name, place, grpc_port, target)
            text_of = {one["note"]: text for one, text in zip(fields, texts, strict=True)}
            with QdrantIndex("kb", target) as index:
                new = index.get(list(index.ids()))
                key = f".{prefix}source" if prefix else "source"
                counts = index.count({key: "site-3"}), count_at(where, name, f"{prefix}source", "site-3")
            outer = prefix.removesuffix(".")
            same = sum(
                new.get(id_)
                == expected_payload(writer, payload, text_of[(payload[outer] if outer else payload)["note"]])
                for id_, payload in old.items()
            )
            if server:
                with client_at(where) as client:
                    client.delete_collection(name)
            ids = len(new.keys() & old.keys())
            rows.append([writer, f"{len(old):,}", f"{first['added']:,}", f"{ids:,}", f"{same:,}",
                         f"{counts[0]:,} of {counts[1]:,}", f"{seconds:.1f}", f"{again['added']:,}",
                         f"{seconds_again:.1f}"])  # fmt: skip
            print(f"{writer}: done", file=sys.stderr)
    echo_table(rows, header=["written by", "points", "stored", "same id", "same payload", "pass the filter", "s",
                             "stored again", "s again"])  # fmt: skip


if __name__ == "__main__":
    main()
