"""The forms in which other programs write documents into Qdrant: which one a collection has, and where its text is.

Knows payloads alone, no engine. The forms are those of the programs' own writers, named beside each.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TEXT, TITLE = "text", "title"
"""The keys under which d2llm stores text and title."""
SOURCE = "source_"
"""Begins the key for what a payload had under `TEXT` or `TITLE`, if that is not its text, or no title."""
KNOWN = 30
"""Fields that a message names."""


@dataclass(frozen=True)
class Form:
    """A form of payloads. The text is in `field`: a key, or the names of a path with dots between them. A payload of
    this form also has the keys `others`. `writer` is the program that writes it; empty if the user has named the
    field."""

    writer: str
    field: str
    others: tuple[str, ...] = ()

    def fits(self, payload: Mapping[str, Any]) -> bool:
        """Whether `payload` has this form."""
        try:
            self.split(payload)
        except ValueError:
            return False
        return payload.keys() >= set(self.others)

    def split(self, payload: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """The text of `payload`, and its other fields. Another text, and a title that is no string, get the prefix
        `SOURCE`.

        Raises:
            ValueError: the text is missing or no string, or there is no room for the other text or title.
        """
        text, names = self._find(payload)
        if not isinstance(text, str):
            raise ValueError(f"expected a string in the field {self.field!r}, found {reprlib.repr(text)}")
        fields = _without(payload, names)
        others = {TEXT: fields.get(TEXT, text) != text, TITLE: not isinstance(fields.get(TITLE, ""), str)}
        for key in (key for key, other in others.items() if other):
            if SOURCE + key in fields:
                raise ValueError(f"besides its text in {self.field!r}, it has the fields {key!r} and {SOURCE + key!r}")
            fields[SOURCE + key] = fields.pop(key)
        fields.pop(TEXT, None)
        return text, fields

    def _find(self, payload: Mapping[str, Any]) -> tuple[Any, Sequence[str]]:
        """The text, and the names that lead to it. No names: it stays where it is."""
        names = [self.field] if self.field in payload else self.field.removeprefix(".").split(".")
        value: Any = payload
        for name in names:
            if not isinstance(value, Mapping) or name not in value:
                raise ValueError(f"no field {self.field!r}. It has: {_listed(list(payload)) or 'no fields'}")
            value = value[name]
        return value, names


class NodeForm(Form):
    """The form of LlamaIndex: a field holds the whole node as JSON. Its first version kept the text beside it."""

    def _find(self, payload: Mapping[str, Any]) -> tuple[Any, Sequence[str]]:
        content, _ = super()._find(payload)
        try:
            node = json.loads(content)
            text = node.get("text") or (node.get("text_resource") or {}).get("text")
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"the field {self.field!r} is no node of LlamaIndex ({error})") from error
        return (text, ()) if text else (payload.get(TEXT, ""), (TEXT,) if TEXT in payload else ())


FORMS = (
    NodeForm("LlamaIndex", "_node_content"),  # llama_index.core.vector_stores.utils.node_to_metadata_dict
    Form("LangChain", "page_content", ("metadata",)),  # langchain_qdrant.QdrantVectorStore._build_payloads
    Form("Haystack", "content", ("meta",)),  # haystack.Document.to_dict, by qdrant-haystack's converters
    Form("mcp-server-qdrant", "document", ("metadata",)),  # mcp_server_qdrant.qdrant.QdrantConnector.store
    Form("fastembed", "document"),  # qdrant_client.QdrantClient.add, of earlier clients
    Form("hand", TEXT),
)
"""All forms. A payload that has several is of the first."""


def recognised(payloads: Sequence[Mapping[str, Any]]) -> Form | None:
    """The first form that more than half of `payloads` have; None if there is no such form.

    Not the one that most have: a few bad payloads of LlamaIndex may still have the field of another form, as all do.
    """
    return next((form for form in FORMS if 2 * sum(map(form.fits, payloads)) > len(payloads)), None)


_TYPES = {str: "string", bool: "boolean", int: "number", float: "number", dict: "object", list: "list"}


def fields_of(payloads: Iterable[Mapping[str, Any]]) -> str:
    """The fields of `payloads` and of the objects in them, with the types of their values, for a message."""
    types: dict[str, set[str]] = {}
    for payload in payloads:
        for name, value in payload.items():
            types.setdefault(name, set()).add(_TYPES.get(type(value), "null"))
            for within, inner in value.items() if isinstance(value, Mapping) else ():
                types.setdefault(f"{name}.{within}", set()).add(_TYPES.get(type(inner), "null"))
    return _listed([f"{name} ({' or '.join(sorted(kinds))})" for name, kinds in types.items()]) or "none"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - KNOWN} more" if len(names) > KNOWN else ""
    return ", ".join(names[:KNOWN]) + more


def _without(fields: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A copy of `fields` without the field that `names` lead to."""
    if not names:
        return dict(fields)
    first, *more = names
    within = {first: _without(fields[first], more)} if more else {}
    return {**{name: value for name, value in fields.items() if name != first or more}, **within}
