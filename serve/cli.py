"""The command `d2llm serve`. Here a service is put together: only this file knows which engine holds the collection."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from pathlib import Path

import click

from d2llm.cli_options import device_option, query_encoder_option, threads_option
from d2llm.connectors.cli_options import collection_option, place_option
from d2llm.connectors.place import Qdrant
from d2llm.folder import read_config
from d2llm.model import EncoderSize, load
from d2llm.search import Searcher
from d2llm.sessions import Device

from .app import Serving
from .judgements import Judgements
from .logs import log_as_json
from .mcp import serve_stdio
from .running import bind, logger, run
from .service import Service
from .settings import Settings

PATIENCE = 2.0
"""Seconds that a request waits for a server that is not there."""


@click.command("serve")
@click.argument("model", type=click.Path(path_type=Path))
@place_option
@collection_option
@click.option("--host", default="127.0.0.1", show_default=True, envvar="D2LLM_HOST", show_envvar=True,
              help="Address to listen on. 0.0.0.0 is every address of this machine.")  # fmt: skip
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), envvar="D2LLM_PORT",
              show_envvar=True, help="Port to listen on. 0 takes a free one.")  # fmt: skip
@click.option("--read-key", metavar="KEY", envvar="D2LLM_READ_KEY", show_envvar=True,
              help="Key that every request needs. [default: none is needed]")  # fmt: skip
@click.option("--write-key", metavar="KEY", envvar="D2LLM_WRITE_KEY", show_envvar=True,
              help="Key that writing documents and judgements needs. It also reads.")  # fmt: skip
@click.option(
    "--writable",
    is_flag=True,
    help="Let clients with the write key add and remove documents. The collection is made if it is missing. "
    "Needs --write-key.",
)
@click.option("--max-body", type=click.IntRange(1), default=Settings.max_body, show_default=True, metavar="BYTES",
              help="Largest body of a request.")  # fmt: skip
@click.option("--max-texts", type=click.IntRange(1), default=Settings.max_texts, show_default=True, metavar="N",
              help="Most queries, texts, ids or documents of a request.")  # fmt: skip
@click.option("--max-length", type=click.IntRange(1), default=Settings.max_length, show_default=True, metavar="N",
              help="Most characters of a query or text.")  # fmt: skip
@click.option("--max-k", type=click.IntRange(1), default=Settings.max_k, show_default=True, metavar="N",
              help="Most hits and candidates of a search.")  # fmt: skip
@click.option("--max-queue", type=click.IntRange(1), default=Settings.max_queue, show_default=True, metavar="N",
              help="Most queries that wait; more are refused with the status 429.")  # fmt: skip
@click.option("--log-texts", is_flag=True, help="Write queries and texts into the log.")
@click.option("--cors", multiple=True, metavar="ORIGIN",
              help="Origin whose pages may use the service, such as https://app.example.com. Repeatable.")  # fmt: skip
@click.option("--judgements", type=click.Path(path_type=Path, file_okay=False), metavar="FOLDER",
              help="Keep what is judged on the page in this folder, as queries.jsonl and qrels/test.tsv. [default: the "
                   "browser keeps it]")  # fmt: skip
@click.option("--hnsw-ef", type=click.IntRange(1), metavar="N",
              help="Nodes of the HNSW graph to keep in view; see `d2llm search`.")  # fmt: skip
@query_encoder_option
@device_option
@threads_option
def serve_command(
    model: Path, qdrant: Qdrant, collection: str, host: str, port: int, read_key: str | None, write_key: str | None,
    writable: bool, max_body: int, max_texts: int, max_length: int, max_k: int, max_queue: int, log_texts: bool,
    cors: tuple[str, ...], judgements: Path | None, hnsw_ef: int | None, query_encoder: EncoderSize | None,
    device: Device, threads: int | None,
) -> None:  # fmt: skip
    """Serve searches of a collection over HTTP, with a page at /.

    Serve with the MODEL that indexed the collection. The log has one JSON object a line, on stderr. SIGTERM and Ctrl-C
    stop the service when what is in flight is answered.

    \b
    d2llm serve MODEL --qdrant ./qdrant --collection kb
    d2llm serve MODEL --qdrant http://localhost:6333 --collection kb --host 0.0.0.0 --read-key KEY
    curl localhost:8080/search -H 'Content-Type: application/json' -d '{"query": "how long does a refund take?"}'
    """
    settings = Settings(
        read_key=read_key, write_key=write_key, writable=writable, max_body=max_body, max_texts=max_texts,
        max_length=max_length, max_k=max_k, max_queue=max_queue, log_texts=log_texts, cors=cors,
    )  # fmt: skip
    index = replace(qdrant, patience=PATIENCE).index(collection, hnsw_ef=hnsw_ef)
    try:
        # Raises for another model before the work begins. Who writes may begin with an empty collection.
        index.open_for(read_config(model), create=writable)
        serving = Serving(settings, judgements=None if judgements is None else Judgements(judgements))

        def load_service() -> Service:
            searcher = Searcher(load(model, device, threads=threads, query_encoder=query_encoder), index)
            usual = searcher.options
            searcher.options = replace(usual, k=min(usual.k, max_k), candidates=min(usual.candidates, max_k))
            searcher.model.encode_query(["a first query takes longer"])
            logger.info("reading vectors and features of the collection into memory")
            index.warm()
            return Service(searcher, settings, metrics=serving.metrics, name=model.resolve().name, collection=facts)

        def facts() -> dict[str, object]:
            info = index.info()
            return {"name": collection, "place": "server" if qdrant.shared else "folder", "status": info.status}

        with bind(host, port) as listener:
            log_as_json()
            address, number = listener.getsockname()[:2]
            logger.info(f"listening on http://{address}:{number}")
            if not qdrant.shared:
                logger.info(
                    f"this process alone holds the collection in {qdrant}: for several processes, put it on a Qdrant "
                    "server (d2llm collection migrate)"
                )
            if not index.count():
                logger.info(f"the collection {collection} is empty: searches have no hits until documents are added")
            run(serving, load_service, listener)
    finally:
        index.close()


@click.command("mcp")
@click.argument("model", type=click.Path(path_type=Path))
@place_option
@collection_option
@query_encoder_option
@device_option
@threads_option
def mcp_command(
    model: Path, qdrant: Qdrant, collection: str, query_encoder: EncoderSize | None, device: Device,
    threads: int | None,
) -> None:  # fmt: skip
    """Offer searches of a collection to an agent: the tools `search` and `get` of the Model Context Protocol.

    The agent's program starts this command and talks to it over stdin and stdout. A running `d2llm serve` has the same
    tools at /mcp.

    \b
    d2llm mcp MODEL --qdrant ./qdrant --collection kb
    claude mcp add kb -- d2llm mcp MODEL --qdrant http://localhost:6333 --collection kb
    """
    with replace(qdrant, patience=PATIENCE).index(collection) as index:
        index.open_for(read_config(model), create=False)
        loaded = load(model, device, threads=threads, query_encoder=query_encoder)
        with contextlib.closing(Service(Searcher(loaded, index), name=model.resolve().name)) as service:
            asyncio.run(serve_stdio(service))
