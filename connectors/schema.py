"""What a collection is made of and remembers: its vectors, their storage, its words, the model that made it. Knows no
engine: each engine turns this into its own terms when it makes a collection.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias, get_args

from d2llm.errors import ArgumentError, MismatchError
from d2llm.folder import ModelConfig

VECTOR = "recall"
"""Name of the vector that is searched."""
SPARSE = "words"
"""Name of the sparse vector of BM25, in a collection for hybrid searches."""
HNSW_MIN_KB = 10_000
"""Full vectors in a segment, in units of 1024 bytes, below which the engines make no graph of it."""
MOST = 2**31 - 1
"""Of anything that the engines are given a number of: more points than a collection holds, and no more than fits."""
FORMAT = 1

Quantization: TypeAlias = Literal["int8", "turbo4", "turbo2", "binary", "none"]
Datatype: TypeAlias = Literal["float32", "float16"]
PayloadType: TypeAlias = Literal["keyword", "integer", "float", "bool"]
PAYLOAD_TYPES: tuple[PayloadType, ...] = get_args(PayloadType)


@dataclass(frozen=True, kw_only=True, slots=True)
class Words:
    """BM25 inside the engine: each passage's words with their saturated counts, as a sparse vector. The engine weighs
    them by the idf in the collection. Words are split, stemmed and hashed as by Qdrant's own `qdrant/bm25` model, so
    that other clients can search them too.
    """

    language: str = "english"
    """Of stop words and stems."""
    k: float = 1.2
    b: float = 0.75
    average_words: float = field(default=256.0, compare=False)
    """Of a passage, stop words left out: measured when the collection is made, and then kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectionOptions:
    """How a collection is stored, from its making on. What each choice costs was measured: docs/collections.md.

    Raises:
        ArgumentError: an unknown choice, or a number out of range.

    Example:
        >>> from d2llm.connectors import CollectionOptions
        >>> options = CollectionOptions(quantization="turbo4")
        >>> (options.quantization, options.datatype, options.hnsw_m)
        ('turbo4', 'float32', 16)
    """

    quantization: Quantization = "int8"
    """The copy of the vectors that is searched in RAM: a byte, 4, 2 or 1 bits a number. What it finds is compared again
    by the full vectors."""
    datatype: Datatype = "float32"
    """Of the full vectors."""
    on_disk: bool = True
    """Full vectors are memory-mapped files. False keeps them in RAM (a server; the embedded engine always maps)."""
    hnsw_m: int = 16
    """Links of each passage in the HNSW graph; 0 makes no graph, and every search compares all passages."""
    hnsw_ef_construct: int = 100
    """Neighbours looked at when the graph is built."""
    words: Words | None = None
    """Keep words for hybrid recall."""
    shards: int | None = None
    """Parts that a server cluster spreads a collection over. None: the server's choice."""
    replicas: int | None = None
    """Copies of each part in a cluster. None: the server's choice."""
    write_consistency: int | None = None
    """Copies that must have a write before it is acknowledged. None: the server's choice."""

    def __post_init__(self) -> None:
        for name, choices in (("quantization", get_args(Quantization)), ("datatype", get_args(Datatype))):
            if getattr(self, name) not in choices:
                raise ArgumentError(f"unknown {name} {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        for name, least in (("hnsw_m", 0), ("hnsw_ef_construct", 1), ("shards", 1), ("replicas", 1),
                            ("write_consistency", 1)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not least <= value <= MOST:
                raise ArgumentError(f"{name} must be from {least} to {MOST}, found {value}")

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> CollectionOptions:
        """Those that `asdict` made JSON of; what a later version may have added is left out."""
        known = _known(cls, content)
        if known.get("words") is not None:
            known["words"] = _known(Words, known["words"])
        return cls().changed(known)

    def changed(self, named: Mapping[str, Any]) -> CollectionOptions:
        """These options, with the values that `named` gives for some of them. Words may be given in part too, as
        `{"words": {"language": "german"}}`: the rest comes from the words here, or from the defaults.

        Raises:
            ArgumentError: an unknown name, or a value that cannot be.
            TypeError: `named` is no mapping.
        """
        _require_names(CollectionOptions, named)
        values = dict(named)
        if isinstance(words := values.get("words"), Mapping):
            _require_names(Words, words)
            values["words"] = replace(self.words or Words(), **words)
        return replace(self, **values)

    def differences(self, other: CollectionOptions) -> list[str]:
        """Where the two differ, in words."""
        return [
            f"{entry.name} {getattr(other, entry.name)!r}, not {getattr(self, entry.name)!r}"
            for entry in fields(self)
            if getattr(self, entry.name) != getattr(other, entry.name)
        ]


def _known(of: type[CollectionOptions | Words], content: Mapping[str, Any]) -> dict[str, Any]:
    return {entry.name: content[entry.name] for entry in fields(of) if entry.name in content}


def _require_names(of: type[CollectionOptions | Words], named: Mapping[str, Any]) -> None:
    if not isinstance(named, Mapping):
        raise TypeError(f"options {named!r}: expected a mapping, such as {{'quantization': 'turbo4'}}")
    known = [entry.name for entry in fields(of)]
    if unknown := [name for name in named if name not in known]:
        raise ArgumentError(f"unknown option {unknown[0]!r} of {of.__name__}: choose from {', '.join(known)}")


@dataclass(frozen=True, slots=True)
class Generation:
    """Marks a collection that was made to be what an alias names, in the place of the one before it."""

    alias: str
    job: str | None = None
    """The job that builds it. None: the alias has named it, so it was complete."""

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> Generation:
        """Read what `asdict` made JSON of."""
        return cls(content["alias"], content.get("job"))


@dataclass(frozen=True, slots=True)
class Metadata:
    """What a collection remembers of the model that made it, and how."""

    fingerprint: str
    embedding_dim: int
    feature_dim: int
    created: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT
    options: CollectionOptions = CollectionOptions()
    generation: Generation | None = None

    @classmethod
    def of(cls, config: ModelConfig, options: CollectionOptions, generation: Generation | None = None) -> Metadata:
        """That of a collection made now, for the vectors of this model."""
        created = {"d2llm": importlib.metadata.version("d2llm"), "at": datetime.now(UTC).isoformat(timespec="seconds")}
        return cls(
            config.fingerprint, config.embedding_dim, config.feature_dim, created, options=options,
            generation=generation,
        )  # fmt: skip

    @classmethod
    def parse(cls, content: Any, where: str) -> Metadata:
        """Read what `to_json` made.

        Raises:
            MismatchError: `content` is something else, or of another format; names `where`.
        """
        names = {entry.name for entry in fields(cls)} - {"options", "generation"}  # the first version had neither
        if not isinstance(content, dict) or not names <= content.keys():
            raise MismatchError(f"{where} was made by something else than d2llm: choose another collection name")
        if content["format"] != FORMAT:
            raise MismatchError(
                f"{where} has format {content['format']}, this d2llm reads {FORMAT}: index the corpus again"
            )
        options = CollectionOptions.parse(content.get("options") or {})
        generation = Generation.parse(content["generation"]) if content.get("generation") else None
        return cls(**{name: content[name] for name in names}, options=options, generation=generation)

    @property
    def vector_bytes(self) -> int:
        """Of a full vector: what the engines go by when they index."""
        return self.embedding_dim * {"float32": 4, "float16": 2}[self.options.datatype]

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def require(self, config: ModelConfig, where: str) -> None:
        """Raise `MismatchError` unless the collection `where` holds vectors of this model's passage side."""
        config.require_fingerprint(self.fingerprint, where)
        config.require_dimensions(self.embedding_dim, self.feature_dim, where)

    def require_options(self, named: Mapping[str, Any], where: str) -> None:
        """Raise `MismatchError` unless the collection `where` was made with the options that are `named`."""
        if differences := self.options.changed(named).differences(self.options):
            raise MismatchError(
                f"{where} exists already, with {'; '.join(differences)}. What is stored is not changed: leave these "
                "options out, or index the corpus beside it (d2llm index --alias) or into another collection"
            )


@dataclass(frozen=True, slots=True)
class CollectionInfo:
    """What `QdrantIndex.info` tells of a collection."""

    name: str
    location: str
    aliases: list[str]
    passages: int
    indexed: int
    """Passages in HNSW graphs; the others are compared one by one."""
    status: str
    """`ready`, `building` (the graph), `waiting` (to build it: a server that was started again begins with the next
    write, or with `QdrantIndex.optimize`), `deferred` (a load is going on, or was killed: index again to end it) or a
    server's complaint."""
    payload_indexes: dict[str, str]
    metadata: Metadata
    bytes: int | None = None
    """On disk; a server does not tell."""
