"""Indexing a corpus anew without a pause: a collection is built beside the one that is searched, and gets its alias.

Such a collection is a generation of the alias, and its metadata says so (`schema.Generation`). Only what is marked like
that is ever continued, pruned or dropped here: whatever else has a name such as NAME-1 is left alone.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from d2llm.errors import D2LLMError, MismatchError, StoreError
from d2llm.folder import ModelConfig

from .qdrant import QdrantIndex
from .schema import PAYLOAD_TYPES, CollectionOptions, Metadata, PayloadType

logger = logging.getLogger(__name__)

OpenIndex = Callable[..., QdrantIndex]
"""Opens a collection by name, with the options of `QdrantIndex`."""


def open_generation(
    open_index: OpenIndex,
    alias: str,
    config: ModelConfig,
    *,
    options: Mapping[str, Any] | None = None,
    payload_indexes: Mapping[str, PayloadType] | None = None,
    average_words: float | None = None,
) -> QdrantIndex:
    """The collection to fill for `alias` with a model: NAME-2 beside NAME-1, or the next number that is free.

    A generation that an interrupted job left unfinished is continued. A new one has the options and payload indexes of
    the collection that the alias names now, except for the `options` (as of `QdrantIndex`) and `payload_indexes` given
    here. `average_words` are those of a passage in the new corpus, if they are known: for words that are taken over.

    Raises:
        StoreError: there is a collection called `alias`.
        MismatchError: open searches would follow the alias to vectors of another passage encoder than theirs; or an
            unfinished generation has another encoder, or other options than those given.
    """
    with open_index(alias) as index:
        names, aliases = index.collections()
        if alias in names:
            raise StoreError(
                f"{alias!r} is a collection, so it cannot be an alias: choose another, or drop the collection first"
            )
        if alias in aliases and index.follows_aliases:
            _require_encoder(index, alias, config)
        former = _peek(index)
        indexes = {} if former is None else _payload_indexes(index, aliases[alias])
    named = dict(options or {})
    unfinished = _unfinished(open_index, alias, names, aliases)
    if unfinished is None and former is not None:
        named = asdict(_options_after(former, named, average_words))
    name = unfinished or _next_name(open_index, alias, aliases)
    generation = open_index(name, options=named, generation_of=alias)
    try:
        generation.open_for(config)
        indexes |= _payload_indexes(generation, name)
        generation.index_payload({**indexes, **(payload_indexes or {})})
    except BaseException as error:  # Ctrl-C too: nobody else will close what was opened here
        generation.close()
        if unfinished is None or not isinstance(error, MismatchError):
            raise
        raise MismatchError(
            f"{str(error).rstrip('.')}. An interrupted job left it unfinished. To begin anew, drop it: d2llm "
            f"collection drop {name} --qdrant PLACE"
        ) from error
    return generation


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
    """What d2llm knows of the collection: nothing, if something else made it."""
    try:
        return index.peek()
    except MismatchError:
        return None


def _number(alias: str, name: str) -> int | None:
    found = re.fullmatch(rf"{re.escape(alias)}-(\d+)", name)
    return int(found[1]) if found else None


def _unfinished(open_index: OpenIndex, alias: str, names: list[str], aliases: Mapping[str, str]) -> str | None:
    """The generation that is being built for the alias, if any; never one that some alias names."""
    for name in names:
        if _number(alias, name) is not None and name not in aliases.values():
            with open_index(name) as index:
                found = _peek(index)
            if found is not None and (made := found.generation) is not None and made.alias == alias and made.job:
                return name
    return None


def _next_name(open_index: OpenIndex, alias: str, aliases: Mapping[str, str]) -> str:
    """The first free name after that of the collection which the alias names."""
    number = _number(alias, aliases.get(alias, "")) or 0
    while True:
        number += 1
        name = f"{alias}-{number}"
        if name not in aliases:
            with open_index(name) as index:
                try:
                    if index.peek() is None:
                        return name
                except MismatchError:
                    pass


def _options_after(former: Metadata, named: Mapping[str, Any], average_words: float | None) -> CollectionOptions:
    options = former.options.changed(named)
    if options.words is None or average_words is None:
        return options
    return replace(options, words=replace(options.words, average_words=average_words))


def _payload_indexes(index: QdrantIndex, name: str) -> dict[str, PayloadType]:
    """Those that d2llm makes; none, with a warning, of a collection that another process has open."""
    try:
        there: dict[str, Any] = index.info().payload_indexes
    except StoreError as error:
        logger.warning("the payload indexes of %s are not taken over, name those that you need: %s", name, error)
        return {}
    return {field: kind for field, kind in there.items() if kind in PAYLOAD_TYPES}


def switch_over(open_index: OpenIndex, index: QdrantIndex, alias: str, expected: int) -> str | None:
    """See that `index` holds what it should, give it the alias, and drop the collection that had it; return its name.

    That collection stays, with a warning, unless it is a generation of this alias which nothing else uses: while it is
    open in another process, while another alias names it, or if it was made in another way.

    Raises:
        StoreError: `index` holds another number of documents than `expected`, or another job goes on with it; the alias
            stays where it was.
    """
    if (stored := index.count()) != expected:
        raise StoreError(
            f"the new collection holds {stored} documents, the corpus {expected}: {alias!r} stays where it was. Run "
            "the same command again"
        )
    former = index.point_alias(alias)
    _, aliases = index.collections()
    if former in (None, aliases.get(alias)):
        return None
    with open_index(former) as old:
        try:
            if reason := _why_it_stays(old, alias, aliases):
                logger.warning("%s stays: %s. To remove it: d2llm collection drop %s", former, reason, former)
                return None
            old.drop()
        except D2LLMError as error:
            logger.warning("%s stays: %s", former, error)
            return None
    return former


def _why_it_stays(old: QdrantIndex, alias: str, aliases: Mapping[str, str]) -> str | None:
    if others := sorted(other for other, name in aliases.items() if name == old.name):
        return f"the alias {others[0]!r} names it too"
    made = old.peek()
    if made is None or made.generation is None or made.generation.alias != alias:
        return f"it was not made as a generation of {alias!r}"
    return None
