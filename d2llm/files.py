"""Files that are written whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file, whole or not at all, in the place of an earlier one; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as staging:
        file = Path(staging) / path.name
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        file.replace(path)
