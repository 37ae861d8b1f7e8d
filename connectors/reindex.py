"""Indexing a corpus anew without a pause: a collection is built beside the one that is searched, and gets its alias."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

from d2llm.errors import D2LLMError, MismatchError, StoreError
from d2llm.folder import ModelConfig

from .qdrant import QdrantIndex

logger = logging.getLogger(__name__)


def next_generation(open_index: Callable[[str], QdrantIndex], alias: str, config: ModelConfig) -> str:
    """The collection to build for `alias` with a model: NAME-2 beside NAME-1. One whose building was interrupted is
    gone on with.

    `open_index` opens a collection by name.

    Raises:
        StoreError: there is a collection called `alias`.
        MismatchError: open searches would follow the alias to vectors of another passage encoder than theirs.
    """
    with open_index(alias) as index:
        names, aliases = index.collections()
        if alias in names:
            raise StoreError(
                f"{alias!r} is a collection, so it cannot be an alias: choose another, or drop the collection first"
            )
        if alias in aliases and index.follows_aliases:
            _require_encoder(index, alias, config)
    found = re.fullmatch(rf"{re.escape(alias)}-(\d+)", aliases.get(alias, ""))
    return f"{alias}-{int(found[1]) + 1 if found else 1}"


def _require_encoder(index: QdrantIndex, alias: str, config: ModelConfig) -> None:
    try:
        index.open_for(config, create=False)
    except MismatchError as error:
        raise MismatchError(
            f"{error} Under an alias: whatever has {alias!r} open would go on with its own model, and find nonsense. "
            "Let the new model search under another alias; or stop the searches, index with --collection, and move "
            "the alias by `d2llm collection alias`."
        ) from error


def switch_over(open_index: Callable[[str], QdrantIndex], index: QdrantIndex, alias: str, expected: int) -> str | None:
    """See that `index` holds what it should, give it the alias, and drop the collection that had it; return its name.

    One that is still open elsewhere, or that something else made, stays, with a warning.

    Raises:
        StoreError: `index` holds another number of documents than `expected`; the alias stays where it was.
    """
    if (stored := index.count()) != expected:
        raise StoreError(
            f"the new collection holds {stored} documents, the corpus {expected}: {alias!r} stays where it was. Run "
            "the same command again"
        )
    former = index.point_alias(alias)
    if former is None or former == index.info().name:
        return None
    with open_index(former) as old:
        try:
            old.drop()
        except D2LLMError as error:
            logger.warning("%s stays: %s", former, error)
            return None
    return former
