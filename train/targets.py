"""The targets of an alignment: queries and passages with the vectors and features that the student gives them.

N queries, M passages, K nearest passages, E recall width, H feature width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from d2llm.beir import RetrievalData
from d2llm.corpus import read_query_log
from d2llm.files import replaced
from d2llm.folder import reading
from d2llm.student import Encoded, Student

from .mining import nearest
from .precision import ComputeDtype, autocast, compute_dtype

NEAREST = 64
"""The number of nearest passages kept for each query. Its candidates are drawn from them."""


def read_query_texts(path: Path, split: str = "train") -> list[str]:
    """The distinct texts of a query log: a file that `read_query_log` reads, or a BEIR folder.

    Of a BEIR folder only the queries with judgements in `split` are read, so that other splits stay unseen.

    Raises:
        DataError: the file or folder cannot be read (see `read_query_log` and `RetrievalData.load`).
    """
    if path.is_dir():
        return list(dict.fromkeys(RetrievalData.load(path, split).queries.values()))
    return read_query_log(path)


@dataclass(frozen=True, slots=True)
class Targets:
    """The student's vectors (float32) and features (float16) of N queries and M passages, on the CPU."""

    vectors_NE: Tensor
    features_NH: Tensor
    passages_ME: Tensor
    passage_features_MH: Tensor
    near_NK: Tensor
    """The indices of each query's nearest passages, int64. Without passages there are no columns."""


def compute_targets(
    student: Student,
    queries: Sequence[str],
    passages: Sequence[str],
    cache: Path | None,
    *,
    precision: ComputeDtype = "auto",
    progress: bool = False,
) -> Targets:
    """Encode all texts, or read the result from the folder `cache` if it is there.

    The name of the file in `cache` is a digest of the student, its prompts and lengths, the precision and the texts.

    Raises:
        DataError: a text is empty.
        ModelError: the file in `cache` is damaged.
    """
    config = student.config
    sides = config.query_prompt, config.query_max_length, config.document_prompt, config.document_max_length
    parts = student.weights_sha256(whole=True), sides, precision, queries, passages
    key = hashlib.sha256(json.dumps(parts).encode())
    path = None if cache is None else cache / f"{key.hexdigest()[:32]}.safetensors"
    names = [entry.name for entry in fields(Targets)]
    if path is not None and path.is_file():
        with reading(path.parent, path.name, "Remove the file: it is computed again.") as whole:
            found = load_file(whole)
        return Targets(**{name: found[name] for name in names})
    with tqdm(total=len(queries) + len(passages), desc="targets", unit="text", disable=not progress) as bar:
        query = _encode(student, queries, "query", precision, bar)
        passage = _encode(student, passages, "document", precision, bar)
    vectors_NE, passages_ME = query.vectors_BE, passage.vectors_BE
    near_NK = torch.empty(len(queries), 0, dtype=torch.long)
    if len(passages):
        near_NK = nearest(vectors_NE, passages_ME, NEAREST, student.device)
    targets = Targets(
        vectors_NE, query.query_features_BH.half(), passages_ME, passage.passage_features_BH.half(), near_NK
    )
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as staging:
            save_file({name: getattr(targets, name).contiguous() for name in names}, staging)
    return targets


def _encode(student: Student, texts: Sequence[str], side: Any, precision: ComputeDtype, bar: Any) -> Encoded:
    size, parts = 1024, list[Encoded]()
    with autocast(student.device, compute_dtype(precision, student.device)):
        for start in range(0, len(texts), size):
            parts.append(student.encode(texts[start : start + size], side))
            bar.update(len(parts[-1].vectors_BE))
    if not parts:
        widths = (student.embedding_dim, *(layout.width for layout in student.iem.layouts))
        return Encoded(*(torch.empty(0, width) for width in widths))
    return Encoded(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
