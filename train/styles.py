"""The styles of written queries, and examples of each that a language model is shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

Style = Literal["question", "keywords", "claim", "title"]
STYLES: tuple[Style, ...] = get_args(Style)
"""Kinds of queries. Several kinds teach more than the best one alone (CADET, arXiv 2505.19274)."""


def cue(style: Style) -> str:
    """The words before a query of a style."""
    return f"{style.capitalize()}:"


class Shown(NamedTuple):
    """An example that the language model is shown: a passage with a query of each style."""

    passage: str
    queries: Mapping[Style, str]


SHOWN = (
    Shown(
        "Photosynthesis in C4 plants. C4 plants concentrate carbon dioxide in bundle-sheath cells, which suppresses "
        "photorespiration and lets them grow faster than C3 plants in hot, dry places.",
        {
            "question": "why do C4 plants grow faster than C3 plants in hot climates?",
            "keywords": "C4 plants photorespiration bundle-sheath",
            "claim": "C4 plants suppress photorespiration by concentrating carbon dioxide.",
            "title": "Carbon concentration in C4 plants",
        },
    ),
    Shown(
        "tar -xzf backup.tar.gz -C /srv/data",
        {
            "question": "how do I extract a gzipped tar archive into another folder?",
            "keywords": "extract tar.gz to directory",
            "claim": "The command unpacks the archive backup.tar.gz into /srv/data.",
            "title": "Extract a tar archive into a directory",
        },
    ),
    Shown(
        "The lighthouse was built in 1874 after two ships were lost on the reef. It was automated in 1983, and its "
        "last keeper retired.",
        {
            "question": "when was the lighthouse automated?",
            "keywords": "lighthouse built after ships lost on reef",
            "claim": "The lighthouse has had no keeper since 1983.",
            "title": "History of the lighthouse",
        },
    ),
    Shown(
        "Iron tablets are best taken on an empty stomach. Tea, coffee and milk reduce how much iron the body absorbs, "
        "so wait two hours before you drink them.",
        {
            "question": "what should I not drink together with iron tablets?",
            "keywords": "iron tablets absorption tea coffee milk",
            "claim": "Tea and coffee lower the absorption of iron.",
            "title": "How to take iron tablets",
        },
    ),
)
"""Small language models follow examples. Asked in a chat, one of 135M parameters writes a usable question perhaps half
of the time."""
