"""Indexing a corpus anew without a pause: a collection is built beside the one that is searched, and gets its alias.

Such a collection is a generation of the alias, and its metadata says so (`schema.Generation`). Only a collection that
is marked so is ever continued, pruned or dropped here. Any other with a name such as NAME-1 is left alone.
"""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from d2llm.deprecated import warn
from d2llm.errors import D2LLMError, MismatchError, StoreError
from d2llm.folder import ModelConfig

from . import manage
from .qdrant import QdrantIndex
from .schema import PAYLOAD_TYPES, CollectionOptions, Metadata, PayloadType

logger = logging.getLogger(__name__)


def open_generation_of(
    under_alias: QdrantIndex,
    config: ModelConfig,
    options: Mapping[str, Any] | None = None,
    payload_indexes: Mapping[str, PayloadType] | None = None,
    average_words: float | None = None,
) -> QdrantIndex:
    """See `Qdrant.open_generation`, whose alias is the name of the index `under_alias`."""
    alias = under_alias.name
    names, aliases = under_alias._collection.collections()
    if alias in names:
        raise StoreError(
            f"{alias!r} is a collection, so it cannot be an alias: choose another, or drop the collection first"
        )
    if alias in aliases and under_alias._engine.shared:
        _require_encoder(under_alias, alias, config)
    former = _peek(under_alias)
    indexes = {} if former is None else _payload_indexes(under_alias, aliases[alias])
    under_alias.close()
    named = dict(options or {})
    unfinished = _unfinished(under_alias, names, aliases)
    if unfinished is None and former is not None:
        named = asdict(_options_after(former, {"kept": {}, **named}, average_words))
    name = unfinished or _next_name(under_alias, aliases)
    generation = under_alias.beside(name, options=named, generation_of=alias)
    try:
        generation.open_for(config)
        if former is not None and former.scales is not None and former.fingerprint == config.fingerprint:
            generation.scales = generation.scales or former.scales
        indexes |= _payload_indexes(generation, name)
        generation.index_payload({**indexes, **(payload_indexes or {})})
    except BaseException as error:  # Ctrl-C too: nobody else will close what was opened here
        generation.close()
        if unfinished is None or not isinstance(error, MismatchError):
            raise
        raise MismatchError(
            f"{str(error).rstrip('.')}. An interrupted job left it unfinished. To begin anew, drop it: "
            f"{_drop_command(generation)}"
        ) from error
    return generation


def _drop_command(index: QdrantIndex) -> str:
    return shlex.join(["d2llm", "collection", "drop", index.name, "--qdrant", index._collection.place])


def _require_encoder(index: QdrantIndex, alias: str, config: ModelConfig) -> None:
    try:
        index.open_for(config, create=False)
    except MismatchError as error:
        raise MismatchError(
            f"{error} Under an alias: whatever has {alias!r} open would go on with its own model, and find nonsense. "
            "Let the new model search under another alias; or stop the searches, index with --collection, and move "
            "the alias by `d2llm collection alias`."
        ) from error


def _peek(index: QdrantIndex) -> Metadata | None:
    """What the collection remembers; None if it is missing or something else made it."""
    try:
        return index._collection.peek()
    except MismatchError:
        return None


def _number(alias: str, name: str) -> int | None:
    match = re.fullmatch(rf"{re.escape(alias)}-(\d+)", name)
    return int(match[1]) if match else None


def _unfinished(under_alias: QdrantIndex, names: list[str], aliases: Mapping[str, str]) -> str | None:
    """The name of the generation that is being built for the alias, if any; never one that has an alias."""
    alias = under_alias.name
    for name in names:
        if _number(alias, name) is not None and name not in aliases.values():
            with under_alias.beside(name) as index:
                metadata = _peek(index)
            generation = None if metadata is None else metadata.generation
            if generation is not None and generation.alias == alias and generation.job:
                return name
    return None


def _next_name(under_alias: QdrantIndex, aliases: Mapping[str, str]) -> str:
    """The first free name after that of the collection which has the alias."""
    alias = under_alias.name
    number = _number(alias, aliases.get(alias, "")) or 0
    while True:
        number += 1
        name = f"{alias}-{number}"
        if name not in aliases:
            with under_alias.beside(name) as index:
                try:
                    if index._collection.peek() is None:
                        return name
                except MismatchError:
                    pass


def _options_after(former: Metadata, named: Mapping[str, Any], average_words: float | None) -> CollectionOptions:
    options = former.options.changed(named)
    if options.bm25 is None or average_words is None:
        return options
    return replace(options, bm25=replace(options.bm25, average_words=average_words))


def _payload_indexes(index: QdrantIndex, name: str) -> dict[str, PayloadType]:
    """The payload indexes, of the types that d2llm makes; none, with a warning, if another process has the collection
    open."""
    try:
        indexes: dict[str, Any] = index.info().payload_indexes
    except StoreError as error:
        logger.warning("the payload indexes of %s are not taken over, name those that you need: %s", name, error)
        return {}
    return {field: kind for field, kind in indexes.items() if kind in PAYLOAD_TYPES}


def complete(index: QdrantIndex, alias: str, expected: int, keep_former: bool = False) -> str | None:
    """See `Qdrant.switch_over`."""
    if (stored := index.count()) != expected:
        raise StoreError(
            f"the new collection holds {stored} documents, the corpus {expected}: {alias!r} stays where it was. See "
            "that no id is in the corpus twice, and run the same command again"
        )
    former = manage.point_alias(index._collection, alias)
    _, aliases = index._collection.collections()
    if former in (None, aliases.get(alias)):
        return None
    with index.beside(former) as old:
        try:
            skipped = "rows of the corpus were skipped, and it may have their documents"
            if reason := skipped if keep_former else _why_it_stays(old, alias, aliases):
                logger.warning("%s stays: %s. To remove it: %s", former, reason, _drop_command(old))
                return None
            old.drop()
        except D2LLMError as error:
            logger.warning("%s stays: %s", former, error)
            return None
    return former


def _why_it_stays(old: QdrantIndex, alias: str, aliases: Mapping[str, str]) -> str | None:
    if others := sorted(other for other, name in aliases.items() if name == old.name):
        return f"the alias {others[0]!r} names it too"
    metadata = old._collection.peek()
    if metadata is None or metadata.generation is None or metadata.generation.alias != alias:
        return f"it was not made as a generation of {alias!r}"
    return None


def open_generation(
    open_index: Callable[[str], QdrantIndex], alias: str, config: ModelConfig, **more: Any
) -> QdrantIndex:
    """The old form of `Qdrant.open_generation`: `open_index` opens an index by name."""
    warn("reindex.open_generation", "Qdrant.open_generation")
    with open_index(alias) as under_alias:
        return open_generation_of(under_alias, config, **more)


def switch_over(open_index: Callable[[str], QdrantIndex], index: QdrantIndex, alias: str, expected: int) -> str | None:
    """The old form of `Qdrant.switch_over`."""
    warn("reindex.switch_over", "Qdrant.switch_over")
    return complete(index, alias, expected)
