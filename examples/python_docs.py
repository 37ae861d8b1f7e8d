"""The demo's corpus: the documentation of Python's standard library, numpy and torch.

Every machine that can run the demo has it. A docstring starts with a one-line summary, and details follow (PEP 257).
The summary is the query, and the details are the passage that answers it.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import pkgutil
import random
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

# The import of these opens a window, prints a poem, starts a server or needs a display.
SKIP = {"antigravity", "this", "idlelib", "turtledemo", "test", "lib2to3", "tkinter", "turtle", "__main__"}
MIN_SUMMARY_WORDS, MIN_BODY_CHARS, MAX_BODY_CHARS = 3, 60, 500


def public_modules() -> Iterator[ModuleType]:
    """Yield the importable public modules of the standard library (by name), numpy and torch."""
    names = {name for name in sys.stdlib_module_names if not name.startswith("_") and name not in SKIP}
    for package in [*sorted(names), "numpy", "torch"]:
        module = _import(package)
        if module is None:
            continue
        yield module
        for info in pkgutil.iter_modules(getattr(module, "__path__", [])):
            if not info.name.startswith("_") and info.name not in {"tests", "test", "conftest", "testing", "utils"}:
                submodule = _import(f"{package}.{info.name}")
                if submodule is not None:
                    yield submodule


def _import(name: str) -> ModuleType | None:
    # sys.stdlib_module_names has modules of all platforms (msilib, winreg). Their import fails on other platforms.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError:
            return None


def documented(module: ModuleType) -> Iterator[tuple[str, str]]:
    """Yield (qualified name, docstring) of a module, its public classes and functions, and their public methods."""
    yield module.__name__, module.__doc__ or ""
    for name, thing in _members(module):
        home = getattr(thing, "__module__", None) or ""
        if not (inspect.isclass(thing) or callable(thing)) or home.split(".")[0] != module.__name__.split(".")[0]:
            continue
        yield f"{module.__name__}.{name}", inspect.getdoc(thing) or ""
        if inspect.isclass(thing):
            for method_name, method in _members(thing):
                if method_name in vars(thing) and callable(method):
                    yield f"{module.__name__}.{name}.{method_name}", inspect.getdoc(method) or ""


def _members(thing: Any) -> list[tuple[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [(name, value) for name, value in inspect.getmembers(thing) if not name.startswith("_")]


def split_docstring(docstring: str) -> tuple[str, str] | None:
    """Split into (summary, body). None if there is no summary line, or not enough text after it."""
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", docstring.strip()) if part.strip()]
    if paragraphs and re.match(r"^[\w.]+\(.*\)(\s*->.*)?$", paragraphs[0]):  # a signature before the summary
        paragraphs = paragraphs[1:]
    if len(paragraphs) < 2:
        return None
    summary = " ".join(paragraphs[0].split())
    body = re.sub(r"[ \t]+", " ", "\n".join(paragraphs[1:])).strip()[:MAX_BODY_CHARS]
    if (
        not summary[0].isalpha()
        or len(summary.split()) < MIN_SUMMARY_WORDS
        or len(summary) > 300
        or len(body) < MIN_BODY_CHARS
    ):
        return None
    return summary, body


def collect(modules: Iterable[ModuleType]) -> list[dict[str, str]]:
    """Passages with their query: `{"id", "summary", "text"}`. No id, summary or text occurs twice."""
    seen: set[str] = set()
    entries = []
    for module in modules:
        for name, docstring in documented(module):
            parts = split_docstring(docstring)
            if parts is None or not seen.isdisjoint({name, *parts}):
                continue
            seen.update({name, *parts})
            entries.append({"id": name, "summary": parts[0], "text": parts[1]})
    return entries


def write_dataset(folder: Path, *, dev: int = 300, test: int = 500, seed: int = 0) -> dict[str, int]:
    """Write a BEIR folder (`corpus.jsonl`, `queries.jsonl`, `qrels/{train,dev,test}.tsv`); return the counts."""
    entries = collect(public_modules())
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    with open(folder / "corpus.jsonl", "w", encoding="utf-8") as file:
        for entry in entries:
            module = entry["id"].split(".")[0]
            file.write(json.dumps({"_id": entry["id"], "title": "", "text": entry["text"], "module": module}) + "\n")
    with open(folder / "queries.jsonl", "w", encoding="utf-8") as file:
        for entry in entries:
            file.write(json.dumps({"_id": f"q:{entry['id']}", "text": entry["summary"]}) + "\n")
    ids = [entry["id"] for entry in entries]
    random.Random(seed).shuffle(ids)
    splits = {"test": ids[:test], "dev": ids[test : test + dev], "train": ids[test + dev :]}
    for split, members in splits.items():
        rows = "".join(f"q:{member}\t{member}\t1\n" for member in members)
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows, encoding="utf-8")
    return {"passages": len(entries), **{split: len(members) for split, members in splits.items()}}


if __name__ == "__main__":
    print(json.dumps(write_dataset(Path(sys.argv[1]))))
