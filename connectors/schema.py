"""What a collection stores and remembers: vectors, options, BM25, the model that made it. Knows no engine: each engine
translates this when it makes a collection.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias, get_args

from d2llm.deprecated import renamed
from d2llm.errors import ArgumentError, MismatchError
from d2llm.folder import ModelConfig
from d2llm.types import Scales

VECTOR = "recall"
"""Name of the dense vector."""
SPARSE = "words"
"""Name of the sparse vector of BM25, in a collection for hybrid searches."""
HNSW_MIN_KB = 10_000
"""Size of the full vectors in a segment, in units of 1024 bytes, from which on the engines build a graph of it."""
MOST = 2**31 - 1
"""The largest number that the engines accept for anything: more than the points of a collection."""
FORMAT = 2
"""Collections of format 1 keep float16 features of an earlier IEM. No model reads them, but they can be managed."""
_STORED = {"bm25": "words"}
_CURRENT = {stored: name for name, stored in _STORED.items()}
"""Options whose name in stored collections is that of version 0.1."""

Quantization: TypeAlias = Literal["int8", "turbo4", "turbo2", "binary", "none"]
Datatype: TypeAlias = Literal["float32", "float16"]
PayloadType: TypeAlias = Literal["keyword", "integer", "float", "bool"]
PAYLOAD_TYPES: tuple[PayloadType, ...] = get_args(PayloadType)
Distance: TypeAlias = Literal["Cosine", "Dot", "Euclid", "Manhattan"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bm25Options:
    """BM25 in the engine, for hybrid recall.

    Each passage has a sparse vector of its words with their saturated counts. The engine weighs them by the idf in the
    collection. Texts are split as by `d2llm.bm25.split_words`: in scripts without spaces, such as Chinese, into
    characters and pairs of characters. Words are stemmed and hashed as by Qdrant's own `qdrant/bm25` model, so that
    other clients can search them too.

    Example:
        >>> from d2llm.connectors import CollectionOptions, Bm25Options
        >>> CollectionOptions(bm25=Bm25Options(language="german")).bm25
        Bm25Options(language='german', k=1.2, b=0.75, average_words=256.0)
    """

    language: str = "english"
    """The language of stop words and stems."""
    k: float = 1.2
    """How fast the count of a word saturates."""
    b: float = 0.75
    """How much long passages are penalized, from 0 to 1."""
    average_words: float = field(default=256.0, compare=False)
    """Mean number of words of a passage, without stop words. Measured when the collection is made, and then fixed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptVector:
    """What a collection must know of vectors of another program, to keep them for its searches."""

    size: int
    distance: Distance


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectionOptions:
    """How a collection is stored. This is fixed when it is made. docs/collections.md says what each choice costs.

    Raises:
        ArgumentError: an unknown choice, or a number out of range.

    Example:
        >>> from d2llm.connectors import CollectionOptions
        >>> options = CollectionOptions(quantization="turbo4")
        >>> (options.quantization, options.datatype, options.hnsw_m)
        ('turbo4', 'float32', 16)
    """

    quantization: Quantization = "int8"
    """The copy of the vectors that is searched in RAM: 8, 4, 2 or 1 bits per number. Its candidates are compared again
    by their full vectors."""
    datatype: Datatype = "float32"
    """The type of the full vectors."""
    on_disk: bool = True
    """Whether the full vectors are memory-mapped files. False keeps them in RAM, on servers only."""
    hnsw_m: int = 16
    """Links of each passage in the HNSW graph. With 0 there is no graph, and every search compares all passages."""
    hnsw_ef_construct: int = 100
    """Neighbours considered for each passage when the graph is built."""
    bm25: Bm25Options | None = None
    """BM25 for hybrid recall. None: no BM25."""
    kept: Mapping[str, KeptVector] = field(default_factory=dict)
    """Vectors of another program by name (`Document.vectors`), which d2llm keeps and does not search. They have full
    precision, on disk, and a graph with the same `hnsw_m`."""
    shards: int | None = None
    """Shards of the collection in a cluster. None: the server's choice."""
    replicas: int | None = None
    """Copies of each shard in a cluster. None: the server's choice."""
    write_consistency: int | None = None
    """Copies that must confirm a write before it is acknowledged. None: the server's choice."""

    def __post_init__(self) -> None:
        for name, choices in (("quantization", get_args(Quantization)), ("datatype", get_args(Datatype))):
            if getattr(self, name) not in choices:
                raise ArgumentError(f"unknown {name} {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        for name, least in (("hnsw_m", 0), ("hnsw_ef_construct", 1), ("shards", 1), ("replicas", 1),
                            ("write_consistency", 1)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not least <= value <= MOST:
                raise ArgumentError(f"{name} must be from {least} to {MOST}, found {value}")
        for name, vector in self.kept.items():
            sized = isinstance(vector.size, int) and vector.size > 0
            if name in ("", VECTOR, SPARSE) or not sized or vector.distance not in get_args(Distance):
                raise ArgumentError(
                    f"kept vectors {name!r} ({vector.size}, {vector.distance}): expected a name other than {VECTOR!r} "
                    f"and {SPARSE!r}, a size from 1 on, and one of {', '.join(get_args(Distance))}"
                )

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> CollectionOptions:
        """Read what `asdict` made. Leaves out what a later version may have added."""
        known = _known(cls, {_CURRENT.get(name, name): value for name, value in content.items()})
        if known.get("bm25") is not None:
            known["bm25"] = _known(Bm25Options, known["bm25"])
        known["kept"] = {name: _known(KeptVector, vector) for name, vector in known.get("kept", {}).items()}
        return cls().changed(known)

    def changed(self, named: Mapping[str, Any]) -> CollectionOptions:
        """These options with the values in `named`. `bm25` may be given in part too, as
        `{"bm25": {"language": "german"}}`: its other values come from these options, or from the defaults.

        Raises:
            ArgumentError: an unknown name, or a value that is not possible.
            TypeError: `named` is no mapping.
        """
        values = renamed(named, _CURRENT) if isinstance(named, Mapping) else named
        _require_names(CollectionOptions, values)
        if isinstance(bm25 := values.get("bm25"), Mapping):
            _require_names(Bm25Options, bm25)
            values["bm25"] = replace(self.bm25 or Bm25Options(), **bm25)
        elif not isinstance(bm25, Bm25Options | None):
            raise ArgumentError(f'bm25 must be a mapping such as {{"language": "english"}}, or None; found {bm25!r}')
        if "kept" in values:
            values["kept"] = _kept(values["kept"])
        return replace(self, **values)

    def differences(self, other: CollectionOptions) -> list[str]:
        """The options in which the two differ, for a message: the value of `other`, and that of this one."""
        return [
            f"{entry.name} {_shown(getattr(other, entry.name))}, not {_shown(getattr(self, entry.name))}"
            for entry in fields(self)
            if getattr(self, entry.name) != getattr(other, entry.name)
        ]


def _kept(named: Any) -> dict[str, KeptVector]:
    try:
        return {name: one if isinstance(one, KeptVector) else KeptVector(**one) for name, one in named.items()}
    except (AttributeError, TypeError) as error:
        raise ArgumentError(
            f'kept must be a mapping such as {{"old": {{"size": 384, "distance": "Cosine"}}}}; found {named!r}'
        ) from error


def in_one_line(kept: Mapping[str, KeptVector]) -> str:
    """Kept vectors, for a message."""
    return ", ".join(f"{name!r} ({one.size}, {one.distance})" for name, one in kept.items()) or "none"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return in_one_line(value)
    if not isinstance(value, Bm25Options):
        return "none" if value is None else repr(value)
    numbers = [
        f"{name}={getattr(value, name)}" for name in ("k", "b") if getattr(value, name) != getattr(Bm25Options(), name)
    ]
    return f"{value.language} ({', '.join(numbers)})" if numbers else value.language


def _known(of: type[CollectionOptions | Bm25Options | KeptVector], content: Mapping[str, Any]) -> dict[str, Any]:
    return {entry.name: content[entry.name] for entry in fields(of) if entry.name in content}


def _require_names(of: type[CollectionOptions | Bm25Options], named: Mapping[str, Any]) -> None:
    if not isinstance(named, Mapping):
        raise TypeError(f"options {named!r}: expected a mapping, such as {{'quantization': 'turbo4'}}")
    known = [entry.name for entry in fields(of)]
    if unknown := [name for name in named if name not in known]:
        raise ArgumentError(f"unknown option {unknown[0]!r} of {of.__name__}: choose from {', '.join(known)}")


@dataclass(frozen=True, slots=True)
class Generation:
    """Marks a collection that was made as the next one of an alias."""

    alias: str
    job: str | None = None
    """The job that builds it. None: it is complete, and got the alias."""

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> Generation:
        """Read what `asdict` made JSON of."""
        return cls(content["alias"], content.get("job"))


@dataclass(frozen=True, slots=True)
class Metadata:
    """What a collection remembers: the model that made it, and its options."""

    fingerprint: str
    embedding_dim: int
    feature_bytes: int
    created: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT
    options: CollectionOptions = CollectionOptions()
    generation: Generation | None = None
    scales: Scales | None = None
    """The calibrated scales that searches use. None: the model's."""
    untidy: bool = False
    """Whether a job that replaces documents of several passages has begun and not ended. If it was killed, it may have
    left passages of versions that do not count."""
    split_words: bool = True
    """Whether BM25 reads texts as `d2llm.bm25.split_words` splits them. Collections of earlier versions gave it the
    text as it is, and go on so."""

    @classmethod
    def of(cls, config: ModelConfig, options: CollectionOptions, generation: Generation | None = None) -> Metadata:
        """The metadata of a collection that is made now for the vectors of this model."""
        created = {"d2llm": importlib.metadata.version("d2llm"), "at": datetime.now(UTC).isoformat(timespec="seconds")}
        return cls(
            config.fingerprint, config.embedding_dim, config.feature_bytes, created, options=options,
            generation=generation,
        )  # fmt: skip

    @classmethod
    def parse(cls, content: Any, where: str) -> Metadata:
        """Read what `to_json` made.

        Raises:
            MismatchError: `content` is something else, or of another format; names `where`.
        """
        later = {"options", "generation", "scales", "untidy", "split_words"}  # the first version had none of these
        names = {entry.name for entry in fields(cls)} - later
        if isinstance(content, dict) and content.get("format") == 1 and isinstance(content.get("feature_dim"), int):
            content = {**content, "feature_bytes": 2 * content["feature_dim"]}
        if not isinstance(content, dict) or not names <= content.keys():
            raise MismatchError(f"{where} was made by something else than d2llm: choose another collection name")
        if content["format"] not in (1, FORMAT):
            raise MismatchError(
                f"{where} has format {content['format']}, this d2llm reads {FORMAT}: index the corpus again"
            )
        options = CollectionOptions.parse(content.get("options") or {})
        generation = Generation.parse(content["generation"]) if content.get("generation") else None
        known = {name: content[name] for name in names}
        return cls(**known, options=options, generation=generation, scales=content.get("scales"),
                   untidy=content.get("untidy", False), split_words=content.get("split_words", False))  # fmt: skip

    @property
    def vector_bytes(self) -> int:
        """The size of a full vector, which decides when the engines build graphs."""
        return self.embedding_dim * {"float32": 4, "float16": 2}[self.options.datatype]

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON, by the names that collections store."""
        content = asdict(self)
        content["options"] = {_STORED.get(name, name): value for name, value in content["options"].items()}
        return content

    def require_made_by(self, config: ModelConfig, where: str) -> None:
        """Raise `MismatchError` unless the passage encoder of this model made the collection called `where`."""
        if self.format != FORMAT:
            raise MismatchError(
                f"{where} was made by d2llm {self.created.get('d2llm', '?')} and has features of format {self.format}, "
                f"this d2llm makes format {FORMAT}: index the corpus again into another collection."
            )
        config.require_fingerprint(self.fingerprint, where)
        config.require_dimensions(self.embedding_dim, self.feature_bytes, where)

    def require_options(self, named: Mapping[str, Any], where: str) -> None:
        """Raise `MismatchError` unless the collection `where` was made with the options that are `named`."""
        if differences := self.options.changed(named).differences(self.options):
            way_out = "leave these options out"
            if self.options.changed(named).kept != self.options.kept:
                way_out = "give --keep-vectors if it was given when the collection was made, and only then"
            if self.generation is None:
                way_out += ", or index the corpus beside it (d2llm index --alias) or into another collection"
            raise MismatchError(
                f"{where} exists already, with {'; '.join(differences)}. What is stored is not changed: {way_out}"
            )


@dataclass(frozen=True, slots=True)
class CollectionInfo:
    """The description of a collection that `QdrantIndex.info` returns.

    Example:
        >>> import tempfile
        >>> from d2llm.connectors import QdrantIndex
        >>> from d2llm.folder import ModelConfig
        >>> config = ModelConfig(embedding_dim=2, feature_bytes=1, precision="fp32", fingerprint="0123")
        >>> with QdrantIndex("kb", tempfile.mkdtemp()) as index:
        ...     index.open_for(config)
        ...     info = index.info()
        >>> (info.name, info.documents, info.status, info.metadata.options.quantization)
        ('kb', 0, 'ready', 'int8')
    """

    name: str
    location: str
    aliases: list[str]
    documents: int
    passages: int
    """Documents that are longer than the model's limit have several."""
    indexed: int
    """Passages in HNSW graphs. The others are compared one by one."""
    status: str
    """`ready`; `building` the graph; `waiting` to build it (a restarted server begins with the next write, or with
    `QdrantIndex.optimize`); `deferred` (a load runs, or was killed: index again to end it); or an error of the
    server."""
    payload_indexes: dict[str, str]
    metadata: Metadata
    bytes: int | None = None
    """Bytes on the disk. None for a server, which does not report them."""
