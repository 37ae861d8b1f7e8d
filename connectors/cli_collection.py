"""The commands `d2llm collection ...`."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import click

from d2llm.cli_options import TEXT, echo_json, echo_table, json_option
from d2llm.errors import MismatchError, StoreError
from d2llm.indexing import payload_of
from d2llm.lock import Locked
from d2llm.payload import title_of

from .cli_calibrate import in_words
from .cli_corpus import Rejects, text_field_option
from .cli_options import (
    GRPC_PORT,
    SAMPLE,
    PayloadCheck,
    average_words,
    collection_name,
    hybrid_options,
    parse_filter,
    payload_type,
    place_flags,
    place_option,
)
from .collection import PAGE
from .place import Qdrant
from .qdrant import QdrantIndex
from .schema import CollectionInfo, PayloadType, in_one_line
from .take_over import ForeignCollection

name_argument = click.argument("name", callback=collection_name)
yes_option = click.option("--yes", is_flag=True, help="Do not ask.")


@click.group("collection", context_settings={"help_option_names": ["-h", "--help"]})
def collection_group() -> None:
    """Look at collections, name, save, copy and remove them.

    \b
    d2llm collection info --qdrant ./qdrant
    d2llm collection info kb --qdrant http://localhost:6333
    """


@collection_group.command("info")
@click.argument("name", required=False, callback=collection_name)
@place_option
@json_option
def info_command(name: str | None, qdrant: Qdrant, as_json: bool) -> None:
    """Show the collection NAME: size, state, options. Without NAME, list the collections.

    \b
    d2llm collection info --qdrant ./qdrant
    d2llm collection info kb --qdrant ./qdrant --json
    """
    if name is None:
        _show_names(qdrant, as_json)
        return
    with qdrant.index(name) as index:
        info = index.info()
    if as_json:
        echo_json(asdict(info))
    else:
        echo_table([[key, value] for key, value in _described(info).items()], header=["", info.name])


def _show_names(qdrant: Qdrant, as_json: bool) -> None:
    names, aliases = qdrant.collections()
    if as_json:
        echo_json({"collections": names, "aliases": aliases})
        return
    for name in names:
        known = sorted(alias for alias, to in aliases.items() if to == name)
        click.echo(name + (f"  (alias {', '.join(known)})" if known else ""))
    if not names:
        click.echo(f"No collections at {qdrant}.")


def _described(info: CollectionInfo) -> dict[str, str]:
    made, options = info.metadata, info.metadata.options
    rows = {
        "at": info.location,
        "aliases": ", ".join(info.aliases) or "-",
        "status": info.status,
        "documents": f"{info.documents:,}",
        "passages": f"{info.passages:,}",
        "in the graph": f"{info.indexed:,}",
        "vectors": f"{made.embedding_dim} x {options.datatype}, in RAM: {options.quantization}",
        "features": f"{made.feature_bytes} bytes a passage",
        "BM25": "-"
        if options.bm25 is None
        else f"{options.bm25.language}, {options.bm25.average_words:.0f} words a passage",
        "kept vectors": in_one_line(options.kept),
        "payload indexes": ", ".join(f"{key}={kind}" for key, kind in info.payload_indexes.items()) or "-",
        "passage encoder": made.fingerprint,
        "made": f"{made.created.get('at', '?')} by d2llm {made.created.get('d2llm', '?')}",
    }
    for task, scales in (made.scales or {}).items():
        rows[f"scales, {task}"] = in_words(scales)
    if made.generation is not None:
        rows["generation of"] = made.generation.alias + ", unfinished" * (made.generation.job is not None)
    if info.bytes is not None:
        rows["on disk"] = f"{info.bytes / 2**20:,.1f} MiB"
    return rows


@collection_group.command("documents")
@click.argument("name", type=TEXT)
@place_option
@text_field_option
def documents_command(name: str, qdrant: Qdrant, text_field: str | None) -> None:
    """Print the documents of the collection NAME as JSON lines, which `d2llm index` and `d2llm-export --corpus` read.

    The collection may be d2llm's, or one that LangChain, LlamaIndex, Haystack, fastembed, mcp-server-qdrant or your own
    program made: on a server, or in a folder of QdrantClient(path=...) that you trust. Points without a text are left
    out.

    \b
    d2llm collection documents docs --qdrant http://localhost:6333 > corpus.jsonl
    """
    rejects = Rejects(None)
    for document in _documents(name, qdrant, text_field, rejects):
        echo_json(document)
    rejects.show()


def _documents(name: str, qdrant: Qdrant, text_field: str | None, rejects: Rejects) -> Iterator[dict[str, Any]]:
    try:
        ours = qdrant.peek(name) is not None
    except MismatchError:
        ours = False
    if not ours:
        with ForeignCollection(name, qdrant, text_field) as source:
            for document in source.documents(rejects):
                yield _row(document.id, payload_of(document))
        return
    with qdrant.index(name) as index:
        ids = index.ids()
        while page := list(islice(ids, PAGE)):
            yield from itertools.starmap(_row, index.get(page).items())


def _row(id_: str, payload: dict[str, Any]) -> dict[str, Any]:
    """A document as `d2llm index` reads it: the id comes first, and is `_id` whatever the payload has there."""
    return {"_id": id_} | payload | {"_id": id_}


@collection_group.command("drop")
@name_argument
@place_option
@yes_option
def drop_command(name: str, qdrant: Qdrant, yes: bool) -> None:
    """Remove the collection NAME. Its documents and aliases go with it.

    \b
    d2llm collection drop kb --qdrant ./qdrant
    """
    aliases = sorted(alias for alias, to in qdrant.collections()[1].items() if to == name)
    shown = f"alias{'es' * (len(aliases) > 1)} {', '.join(aliases)}"
    with qdrant.index(name) as index:
        if not yes:
            also = f" and its {shown}" if aliases else ""
            click.confirm(f"Remove {name} {_content(qdrant, index)}{also} from {qdrant}?", abort=True)
        index.drop()
    click.echo(f"{name} is gone" + (f", and with it the {shown}." if aliases else "."))


def _content(qdrant: Qdrant, index: QdrantIndex) -> str:
    """What the collection holds. One that cannot be opened can be dropped, but for one that somebody else has open."""
    try:
        return f"with {index.count():,} documents"
    except Locked:
        raise
    except StoreError as error:
        if qdrant.shared or index.name not in qdrant.collections()[0]:
            raise
        return f"(it cannot be opened: {error})"


@collection_group.command("alias")
@name_argument
@click.argument("alias", callback=collection_name)
@place_option
def alias_command(name: str, alias: str, qdrant: Qdrant) -> None:
    """Make ALIAS another name of the collection NAME.

    Searches can use it in place of the name. If another collection has the alias, it moves in one step: each search
    goes to the one or the other.

    \b
    d2llm collection alias kb answers --qdrant ./qdrant
    d2llm search MODEL "a question" --qdrant ./qdrant --collection answers
    """
    former = qdrant.point_alias(alias, name)
    click.echo(f"{alias} is now {name}" + (f", it was {former}." if former not in (None, name) else "."))


@collection_group.command("index-payload")
@name_argument
@click.argument("fields", type=TEXT, nargs=-1, required=True, metavar="FIELD=TYPE...", callback=payload_type)
@place_option
def index_payload_command(name: str, fields: dict[str, PayloadType], qdrant: Qdrant) -> None:
    """Index payload fields of the collection NAME. Filters on them are then fast.

    TYPE is keyword (for text), integer, float or bool. Documents with a value of another type in the field are not in
    the index.

    \b
    d2llm collection index-payload kb lang=keyword year=integer --qdrant ./qdrant
    """
    with qdrant.index(name) as index:
        _require_values(index, fields)
        index.index_payload(fields)
    click.echo(f"Indexed: {', '.join(fields)}.")


def _require_values(index: QdrantIndex, fields: dict[str, PayloadType]) -> None:
    """Raise a `DataError` if documents have values in a field, but none of the type of its index.

    It reads documents until each field has a value of that type. A field that no document has is accepted.
    """
    check, ids = PayloadCheck(fields), index.ids()
    while check.empty and (page := list(islice(ids, PAGE))):
        for id_, payload in index.get(page).items():
            check.see(id_, payload)
    check.require()


@collection_group.command("delete")
@name_argument
@place_option
@click.option("--id", "ids", type=TEXT, multiple=True, metavar="ID", help="Remove this document. Repeatable.")
@click.option("--filter", type=TEXT, multiple=True, metavar="KEY=VALUE", callback=parse_filter,
              help='Remove the documents whose field has this value, or JSON: {"year": {"lt": 2020}}.')  # fmt: skip
@yes_option
def delete_command(name: str, qdrant: Qdrant, ids: tuple[str, ...], filter: dict[str, Any] | None, yes: bool) -> None:
    """Remove documents from the collection NAME. Select them by id or by a filter.

    \b
    d2llm collection delete kb --id kb-1 --id kb-3 --qdrant ./qdrant
    d2llm collection delete kb --filter '{"year": {"lt": 2020}}' --qdrant ./qdrant
    """
    if bool(ids) == (filter is not None):
        raise click.UsageError("name the documents to remove: either --id or --filter")
    if filter == {}:
        command = shlex.join(["d2llm", "collection", "drop", name, *place_flags(qdrant)])
        raise click.BadParameter(f"an empty filter would remove every document. To remove the collection: {command}",
                                 param_hint="--filter")  # fmt: skip
    with qdrant.index(name) as index:
        if filter is None:
            removed = len(index.get(ids))
            index.delete(ids)
        else:
            if not yes:
                click.confirm(f"Remove {index.count(filter):,} of {index.count():,} documents?", abort=True)
            removed = index.delete_where(filter)
        click.echo(f"{removed} documents removed, {index.count()} are left.")


@collection_group.command("snapshot")
@name_argument
@click.argument("file", type=click.Path(path_type=Path))
@place_option
def snapshot_command(name: str, file: Path, qdrant: Qdrant) -> None:
    """Save the collection NAME in FILE.

    `restore` makes it again in the same kind of place: a folder or a server. To go from one to the other, use
    `migrate`.

    \b
    d2llm collection snapshot kb kb.snapshot --qdrant ./qdrant
    """
    if file.exists():
        raise click.BadParameter(f"{file} exists already", param_hint="FILE")
    qdrant.snapshot(name, file)
    click.echo(f"{file}: {file.stat().st_size / 2**20:,.1f} MiB")


@collection_group.command("restore")
@name_argument
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@place_option
def restore_command(name: str, file: Path, qdrant: Qdrant) -> None:
    """Make the collection NAME from a snapshot. FILE must come from the same kind of place: a folder or a server.

    \b
    d2llm collection restore kb kb.snapshot --qdrant ./elsewhere
    """
    qdrant.restore(name, file)
    with qdrant.index(name) as index:
        click.echo(f"{name} holds {index.count():,} documents.")


def _texts(index: QdrantIndex) -> list[str]:
    """The texts of some documents."""
    payloads = index.get(list(islice(index.ids(), SAMPLE))).values()
    return [f"{title_of(payload)} {payload.get('text', '')}" for payload in payloads]


@collection_group.command("migrate")
@name_argument
@place_option
@click.option(
    "--to",
    "target",
    required=True,
    metavar="PATH_OR_URL",
    help="Place of the copy: a folder, or the address of a server.",
)
@click.option("--to-api-key", envvar="D2LLM_TO_API_KEY", metavar="KEY",
              help="API key of the server at --to. [env: D2LLM_TO_API_KEY]")  # fmt: skip
@click.option("--to-grpc-port", type=click.IntRange(0, 65535), default=GRPC_PORT, show_default=True, metavar="N",
              help="gRPC port of the server at --to. 0 sends everything through its address.")  # fmt: skip
@click.option("--as", "new_name", metavar="NAME", callback=collection_name, help="Name of the copy. [default: NAME]")
@click.option(
    "--replace", "replace_others", is_flag=True, help="Replace documents that the copy has in other versions."
)
@click.option("--no-keep-vectors", is_flag=True, help="Leave out the vectors of `d2llm index --keep-vectors`.")
@hybrid_options
def migrate_command(
    name: str, qdrant: Qdrant, target: str, to_api_key: str | None, to_grpc_port: int, new_name: str | None,
    replace_others: bool, no_keep_vectors: bool, hybrid: dict[str, Any],
) -> None:  # fmt: skip
    """Copy the collection NAME to another place. It may go from a folder to a server or back. Nothing is encoded again.

    If it is interrupted, run it again: documents that the copy has already are left alone. A collection that holds
    other documents, or other versions of them, is not written to.

    \b
    d2llm collection migrate kb --qdrant ./qdrant --to http://localhost:6333
    d2llm collection migrate kb --qdrant ./qdrant --to ./qdrant --as kb-hybrid --hybrid
    """
    there = replace(qdrant, location=target, api_key=to_api_key, grpc_port=to_grpc_port or None)
    with qdrant.index(name) as index:
        if hybrid.get("bm25") is not None:
            info = index.info()  # the average is that of passages
            hybrid["bm25"]["average_words"] = average_words(_texts(index)) * info.documents / max(info.passages, 1)
        options = {**hybrid, **({"kept": {}} if no_keep_vectors else {})}
        with there.index(new_name or name, options=options) as copy:
            copied = qdrant.copy(index, copy, replace_others=replace_others, progress=True)
            click.echo(f"{copied:,} documents copied; {new_name or name} at {there} holds {copy.count():,}.")
