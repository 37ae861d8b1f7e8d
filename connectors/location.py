"""Where collections are, as it may be shown."""

from __future__ import annotations

import re

_ADDRESS = re.compile(
    r"(https?://)"
    r"(?:[^/?#]*@)?"  # user and password
    r"((?:[\w.-]+|\[[\w.:]+\])(?::\d*)?(?:/[^@?#]*)?)"
    r"(?:[?#].*)?"  # a key may stand here
)


def shown(location: str) -> str:
    """The location of collections without what is secret in an address: its user and password, its query and fragment.
    (None of them is sent: qdrant-client leaves them out.) Of what only resembles an address, nothing after `://` is
    shown if a secret may stand there. Folders are shown as they are.
    """
    scheme, found, rest = location.partition("://")
    if not found or not re.search("[@?#]", rest):
        return location
    address = _ADDRESS.fullmatch(location)
    return address[1] + address[2] if address else f"{scheme}://[secure]"
