"""Where collections are and what they are called: what can be a location or a name, and how a location is shown."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from d2llm.errors import ArgumentError
from d2llm.types import is_utf8

_ADDRESS = re.compile(
    r"(https?://)"
    r"(?:[^/?#]*@)?"  # user and password
    r"((?:[\w.-]+|\[[\w.:]+\])(?::\d*)?(?:/[^@?#]*)?)"
    r"(?:[?#].*)?"  # may hold a key
)


LONGEST_NAME = 200
"""Characters of a name. A file name takes 255, and the files of an embedded collection add some."""


def shown(location: str) -> str:
    """The location without the parts of an address that may be secret: user, password, query and fragment.

    (qdrant-client sends none of them.) If the location only resembles an address and may hold a secret, nothing after
    `://` is shown. Folders are shown unchanged.
    """
    scheme, separator, rest = location.partition("://")
    if not separator or not re.search("[@?#]", rest):
        return location
    address = _ADDRESS.fullmatch(location)
    return address[1] + address[2] if address else f"{scheme}://[secure]"


def check_location(location: str) -> None:
    """Raise an `ArgumentError` unless `location` can be a folder, or the address of a server."""
    expected = f"location {shown(location)!r}: expected a folder, or an address with http:// or https://"
    scheme, is_address, _ = location.partition("://")
    if location == ":memory:":
        raise ArgumentError("location ':memory:': collections live in folders. An index in memory is d2llm.FlatIndex")
    if re.fullmatch(r"([\w.-]+|\[[\da-fA-F:]+\]):\d+", location):
        raise ArgumentError(f"location {location!r}: a server is http://{location}, a folder ./{location}")
    if is_address and scheme in ("http", "https"):
        if reason := _why_no_address(location):
            raise ArgumentError(f"location {shown(location)!r}: {reason}: expected an address such as http://HOST:6333")
        return
    if is_address or not location or "\0" in location or not is_utf8(location) or re.match("https?:", location):
        raise ArgumentError(expected)
    existing = next((path for path in (Path(location), *Path(location).parents) if os.path.exists(path)), None)
    if existing is not None and not os.path.isdir(existing):
        raise ArgumentError(f"{expected}; {existing} is a file")


def _why_no_address(url: str) -> str:
    if re.search(r"[\s\x00-\x1f\x7f]", url):
        return "it holds a space or a control character"
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        host = ""
    if not re.fullmatch(r"[\w.-]+|[\da-fA-F:.]+(%\w+)?", host):
        return "it has no host, or no valid one"
    try:
        port = urlsplit(url).port
    except ValueError:
        port = 0
    return "its port is no number from 1 to 65535" if port == 0 else ""


def check_name(name: str) -> None:
    """Raise an `ArgumentError` unless `name` can be the name of a collection or an alias: letters, digits, `_`, `-` and
    `.`, the first neither `-` nor `.`, and at most `LONGEST_NAME` characters."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise ArgumentError(
            f"collection name {name!r}: use letters, digits, '_', '-' and '.', starting with none of '-' '.'"
        )
    if len(name) > LONGEST_NAME:
        raise ArgumentError(f"collection name {name!r} is {len(name)} long: use at most {LONGEST_NAME} characters")
