"""What can be done to a whole collection: give it an alias, save it, restore it, copy it, remove it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm.auto import tqdm

from d2llm.errors import ArgumentError, MismatchError, StoreError
from d2llm.types import StrPath

from .bm25 import with_sparse
from .collection import PAGE, Collection
from .documents import Documents
from .engine import StoredPoint
from .filters import of_documents
from .location import check_name
from .points import HEAD_KEYS, check_stored, is_head, read_digests, tail_ids, versions
from .schema import PAYLOAD_TYPES, Generation, Metadata


def point_alias(collection: Collection, alias: str) -> str | None:
    """See `Qdrant.point_alias`. A generation of `alias` is then complete."""
    check_name(alias)
    metadata = collection.open()
    names, aliases = collection.engine.collections()
    if alias in names:
        raise StoreError(f"{alias!r} at {collection.place} is a collection: an alias needs a name of its own")
    if alias == collection.name:
        raise ArgumentError(f"{alias!r} is an alias already: name the collection that is to have it, then the alias")
    collection.require_own_generation()
    collection.engine.point_alias(alias)
    if metadata.generation is not None and metadata.generation.alias == alias:
        # After the alias has moved: a job that takes over meanwhile looks for the alias last, see `_take_over`.
        collection.remember(generation=Generation(alias))
        collection.generation = None
    return aliases.get(alias)


def snapshot(collection: Collection, file: StrPath) -> None:
    """See `Qdrant.snapshot`."""
    collection.open()
    collection.engine.snapshot(Path(file))


def restore(collection: Collection, file: StrPath) -> None:
    """See `Qdrant.restore`."""
    if collection.try_open() is not None:
        raise StoreError(f"{collection.where} exists already: drop it first, or restore under another name")
    collection.engine.restore(Path(file))
    try:
        metadata = collection.open()
    except MismatchError:
        collection.engine.drop()
        raise
    if metadata.generation is not None:  # it is restored for another purpose
        collection.remember(generation=None)


def drop(collection: Collection) -> None:
    """See `Qdrant.drop`."""
    if collection.engine.shared:
        collection.open()
    aliases, name = collection.collections()[1], collection.name
    if name in aliases:
        raise StoreError(f"{name!r} is an alias of {aliases[name]!r}: drop that one")
    collection.engine.drop()
    collection.close()


def copy(source: Collection, target: Collection, *, replace_others: bool = True, progress: bool = False) -> int:
    """See `Qdrant.copy`."""
    metadata = source.open()
    if source.identity() == target.identity():
        raise ArgumentError(f"{source.where} would be copied onto itself: give the copy another place or name")
    _prepare(target, metadata, source.where)
    _require_kept(source, target, replace_others)
    indexed = source.engine.state().payload_indexes
    target.engine.index_payload({path: kind for path, kind in indexed.items() if kind in PAYLOAD_TYPES})
    total, copied = source.engine.count(of_documents(None, source.engine.models)), 0
    with target.deferred(), tqdm(total=total, unit="doc", disable=not progress) as bar:
        # The first passage makes the others count (see `point_id`). So a copy that is interrupted has whole documents.
        for page in _tails_first(source):
            wanted = versions([point.payload for point in page])
            there = target.engine.retrieve([*wanted], only=HEAD_KEYS)
            stored = versions(there)
            new = [point for point in page if stored.get(point.id) != wanted[point.id]]
            if new:
                check_stored(new)
                target.engine.upsert(_as_in(target, new))
                replaced = [old for old, id_ in zip(there, stored, strict=True) if stored[id_] != wanted[id_]]
                if tails := [id_ for old in replaced for id_ in tail_ids(old)]:
                    target.engine.delete(tails)  # they do not count any more
            copied += sum(map(is_head, new))
            bar.update(sum(map(is_head, page)))
    target.engine.optimize()
    expected = source.engine.count(None)
    if target.engine.count(None) != expected:
        Documents(target).sweep()  # of a copy that was interrupted before its source changed
    if (count := target.engine.count(None)) != expected:
        raise StoreError(
            f"{target.where} holds {count} passages, {source.where} {expected}: one of the two changed meanwhile, or "
            "the target has passages of a copy that was interrupted"
        )
    return copied


def _require_kept(source: Collection, target: Collection, replace_others: bool) -> None:
    """Refuse a copy that would mix documents of two collections, or, without `replace_others`, replace some."""
    for page in target.engine.scroll(PAGE, only=HEAD_KEYS):
        heads = [point for point in page if is_head(point)]
        found = read_digests(source.engine.retrieve([head.id for head in heads], only=HEAD_KEYS) if heads else [])
        for document, digest in read_digests([head.payload for head in heads]).items():
            if document not in found:
                raise StoreError(
                    f"{target.where} holds documents that {source.where} does not have, such as {document!r}: nothing "
                    "was copied. Give the copy another name"
                )
            if found[document] != digest and not replace_others:
                raise StoreError(
                    f"{target.where} holds another version of documents of {source.where}, such as {document!r}: "
                    "nothing was copied. Replace them (--replace), or give the copy another name"
                )


def _tails_first(source: Collection) -> Iterator[list[StoredPoint]]:
    """All points in pages, those last that are the first passages of documents of several."""
    put_off = 0
    for page in source.engine.scroll(PAGE, vectors=True):
        now = [point for point in page if not (is_head(point) and tail_ids(point.payload))]
        put_off += len(page) - len(now)
        if now:
            yield now
    for page in source.engine.scroll(PAGE, vectors=True) if put_off else ():
        if heads := [point for point in page if is_head(point) and tail_ids(point.payload)]:
            yield heads


def _prepare(target: Collection, metadata: Metadata, source: str) -> None:
    """Open the target of a copy, or make it like the source, whose `metadata` these are."""
    existing = target.try_open()
    if existing is None:
        options = metadata.options.changed(target.options)
        existing = target.make(replace(metadata, options=options, generation=None, split_words=True))
    existing.require_options(target.options, target.where)
    wanted, found = (
        f"encoder {each.fingerprint} ({each.embedding_dim} numbers and {each.feature_bytes} bytes a passage, format "
        f"{each.format})"
        for each in (metadata, existing)
    )
    own = metadata.options.kept
    if others := [name for name, kept in existing.options.kept.items() if own.get(name, kept) != kept]:
        raise MismatchError(f"{target.where} keeps other vectors {others[0]!r} than {source}: name another collection")
    if wanted != found:
        raise MismatchError(f"{target.where} holds vectors of {found}, {source} of {wanted}")


def _as_in(target: Collection, points: Sequence[StoredPoint]) -> list[StoredPoint]:
    """The points with the sparse vectors, made anew, and the kept vectors that the target has, and no others."""
    kept, encoder = target.open().options.kept, target.bm25_encoder
    points = [
        point._replace(sparse=None, kept={name: vector for name, vector in point.kept.items() if name in kept})
        for point in points
    ]
    return points if encoder is None else with_sparse(points, encoder)
