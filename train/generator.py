"""Queries written for passages by a language model of the hub: what `d2llm adapt` learns from, without any label.

P passages of a batch, S styles, L tokens of a prompt.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForSeq2SeqLM, DynamicCache

from d2llm.backbone import pad
from d2llm.errors import DataError, ModelError
from d2llm.files import require_new
from d2llm.lock import Locked, lock_if_possible
from d2llm.pretrained import is_gguf, load_causal_lm, load_chat_tokenizer, load_complete
from d2llm.readers import read_jsonl
from d2llm.saved import sampled_digest

from .precision import compute_dtype
from .styles import SHOWN, STYLES, Style, cue

PASSAGE_TOKENS, QUERY_TOKENS = 160, 32
"""Most tokens of a passage that the generator reads, and of a query that it writes."""
FACTS = "generator.json"
"""What a folder of a fine-tuned generator holds beside the files of transformers."""
TEMPERATURE, TOP_P, TOP_K = 0.4, 0.9, 256
"""How tokens are drawn. At a temperature of 0.4 a language model of 135M parameters writes queries that find their
passage more often than at 0.7: of 256 queries each, 35 instead of 27 % on shell commands, and 60 instead of 50 % on
abstracts. At 0.1 it is no better."""
BATCH = 16
"""Passages written for at a time. Whole batches are kept when a run is killed."""


@dataclass(frozen=True, slots=True)
class Written:
    """A query, its style, and the id of the passage that it was written for."""

    text: str
    style: Style
    passage: str


class Generator(Protocol):
    """Writes queries for passages."""

    @property
    def identity(self) -> str:
        """A digest of its weights: two generators with the same one write the same queries."""

    @property
    def learned(self) -> Style | None:
        """The one style that it writes, whatever style it is asked for. None: it writes all styles."""

    def write(self, passages: Sequence[str], styles: Sequence[Style]) -> list[list[str]]:
        """Write a query of each style for each passage. A query may be empty."""


class CausalGenerator:
    """A causal language model that continues a passage with its query.

    It reads examples first, passages with queries of each style. If it was fine-tuned on the queries of one `learned`
    style, it reads no examples, of which it would copy words, and all its queries are of that style. The examples are
    read once, and each passage once for all styles: what the model has read is kept, and shared.
    """

    def __init__(self, model: Any, tokenizer: Any, learned: Style | None = None) -> None:
        self.model, self.tokenizer, self.learned = model.eval(), tokenizer, learned
        self._line_end = self.ids("\n")  # a tokenizer that drops white space has none
        encoding = tokenizer("a", return_special_tokens_mask=True)
        self.start: list[int] = encoding["input_ids"][: encoding["special_tokens_mask"].index(0)]
        """What the tokenizer puts before a text (BOS). Some models, such as Gemma, write nonsense without it."""
        self._stops = [*self._line_end, *_stops(model)]
        self._read: dict[tuple[Style, ...], tuple[list[int], Any]] = {}

    @property
    def identity(self) -> str:
        """As of every generator."""
        return sampled_digest(self.model.named_parameters())

    @torch.inference_mode()
    def write(self, passages: Sequence[str], styles: Sequence[Style]) -> list[list[str]]:
        """Sample the first line after `Question:` and the like, for each passage and style.

        A generator that has `learned` a style samples as many queries of that one.
        """
        # transformers 5.24 wants the name `cache`, earlier versions know only this one.
        warnings.filterwarnings("ignore", message="`past_key_values` is deprecated", category=FutureWarning)
        device, count = self.model.device, len(styles)
        shown, cache = self._examples(tuple(styles))
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(len(passages))
        ids_PL, mask_PL = pad([self.passage_ids(text) for text in passages], device, "left")
        ids_PL, mask_PL = _behind(shown, ids_PL, mask_PL)
        new = slice(len(shown), None)
        positions_PL = (mask_PL.cumsum(-1) - 1).clamp(min=0)
        self.model(
            input_ids=ids_PL[:, new],
            attention_mask=mask_PL,
            position_ids=positions_PL[:, new],
            past_key_values=cache,
            use_cache=True,
        )
        cache.batch_repeat_interleave(count)
        cues_SL, cue_mask_SL = pad([self.ids(cue(self.learned or style)) for style in styles], device, "left")
        mask_BL = torch.cat([mask_PL.repeat_interleave(count, 0), cue_mask_SL.repeat(len(passages), 1)], dim=1)
        tokens = self._lines(cues_SL.repeat(len(passages), 1), mask_BL, cache)
        lines = [line.strip().split("\n")[0].strip() for line in _decoded(self.tokenizer, tokens)]
        return [lines[start : start + count] for start in range(0, len(lines), count)]

    def _lines(self, ids_BL: torch.Tensor, mask_BL: torch.Tensor, cache: Any) -> list[list[int]]:
        """Sample tokens [B rows] behind `ids_BL` until the line ends. A row that is done leaves the batch: most lines
        are much shorter than the longest."""
        lines: list[list[int]] = [[] for _ in ids_BL]
        rows_B = torch.arange(len(ids_BL), device=ids_BL.device)
        stops = torch.tensor(self._stops, device=ids_BL.device)
        for _ in range(QUERY_TOKENS):
            positions_BL = (mask_BL.cumsum(-1) - 1).clamp(min=0)[:, -ids_BL.shape[1] :]
            logits_BLV = self.model(
                input_ids=ids_BL,
                attention_mask=mask_BL,
                position_ids=positions_BL,
                past_key_values=cache,
                use_cache=True,
            ).logits
            tokens_B = _sampled(logits_BLV[:, -1])
            left = (~torch.isin(tokens_B, stops)).nonzero().squeeze(1)
            rows_B, tokens_B = rows_B[left], tokens_B[left]
            for row, token in zip(rows_B.tolist(), tokens_B.tolist(), strict=True):
                lines[row].append(token)
            if not len(left):
                break
            if len(left) < len(mask_BL):
                cache.batch_select_indices(left)
            mask_BL = torch.nn.functional.pad(mask_BL[left], (0, 1), value=1)
            ids_BL = tokens_B[:, None]
        return lines

    def _examples(self, styles: tuple[Style, ...]) -> tuple[list[int], Any]:
        """The tokens before the first passage, BOS and the examples, and the model's cache of them."""
        if self.learned is not None:
            return self.start, self._cache_of(self.start)
        if styles not in self._read:
            lines = [[f"Passage: {text}", *(f"{cue(s)} {queries[s]}" for s in styles), ""] for text, queries in SHOWN]
            ids = [*self.start, *self.ids("\n".join(line for example in lines for line in example) + "\n")]
            self._read[styles] = ids, self._cache_of(ids)
        return self._read[styles]

    def _cache_of(self, ids: list[int]) -> Any:
        cache = DynamicCache(config=self.model.config)
        if ids:
            ids_1L = torch.tensor([ids], device=self.model.device)
            self.model(input_ids=ids_1L, past_key_values=cache, use_cache=True)
        return cache

    def passage_ids(self, text: str) -> list[int]:
        """The tokens of a passage in the prompt, with its line end."""
        return [*self.ids(f"Passage: {' '.join(text.split())}")[:PASSAGE_TOKENS], *self._line_end]

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, without special ones."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids


class DocToQuery:
    """An encoder-decoder that was trained to write a question for a passage, such as doc2query."""

    learned: Style | None = "question"

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer

    @property
    def identity(self) -> str:
        """As of every generator."""
        return sampled_digest(self.model.named_parameters())

    @torch.inference_mode()
    def write(self, passages: Sequence[str], styles: Sequence[Style]) -> list[list[str]]:
        """Sample as many queries as there are styles."""
        ids_PL, mask_PL = pad(self.tokenizer(list(passages))["input_ids"], self.model.device)
        ids_PL, mask_PL = ids_PL[:, :PASSAGE_TOKENS], mask_PL[:, :PASSAGE_TOKENS]
        tokens = self.model.generate(
            input_ids=ids_PL, attention_mask=mask_PL, num_return_sequences=len(styles), **_sampling(_stops(self.model))
        )
        lines = [line.strip() for line in _decoded(self.tokenizer, tokens)]
        return [lines[start : start + len(styles)] for start in range(0, len(lines), len(styles))]


def load_generator(name: str, device: torch.device) -> Generator:
    """Load a generator: any causal or encoder-decoder language model of the hub, a folder, or a GGUF file.

    Raises:
        ModelError: the model or its tokenizer cannot be loaded.
        MissingExtraError: a GGUF file needs the extra `gguf`.
    """
    dtype = compute_dtype("auto", device) or torch.float32
    tokenizer = load_chat_tokenizer(name, role="generator")
    if not is_gguf(name) and _is_encoder_decoder(name):
        model = load_complete(AutoModelForSeq2SeqLM, name, dtype, role="generator").to(device)
        return DocToQuery(model, tokenizer)
    facts = read_fine_tuning(Path(name))
    model = load_causal_lm(name, dtype, role="generator").to(device)
    return CausalGenerator(model, tokenizer, None if facts is None else facts.learned)


class FineTuning(NamedTuple):
    """The one style that a generator has learned, and all that decided its fine-tuning."""

    learned: Style
    about: dict[str, Any]


def save_generator(generator: CausalGenerator, facts: FineTuning, folder: Path) -> None:
    """Write a generator into an existing folder, from which `load_generator` and transformers load it."""
    generator.model.save_pretrained(folder)
    generator.tokenizer.save_pretrained(folder)
    (folder / FACTS).write_text(json.dumps(facts._asdict()), encoding="utf-8")


def read_fine_tuning(folder: Path) -> FineTuning | None:
    """What `save_generator` noted of the generator in this folder. None if `save_generator` did not write it.

    Raises:
        ModelError: the note is damaged.
    """
    path = folder / FACTS
    if not path.is_file():
        return None
    try:
        facts = FineTuning(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"{path} is damaged, expected an object with learned and about: fine-tune the generator again"
        ) from error
    if facts.learned not in STYLES:
        known = ", ".join(STYLES)
        raise ModelError(f"{path}: expected one of {known}, found {facts.learned!r}: fine-tune the generator again")
    return facts


def write_queries(
    generator: Generator,
    passages: Mapping[str, str],
    out: Path,
    *,
    styles: Sequence[Style] = STYLES,
    seed: int = 0,
    progress: bool = False,
) -> list[Written]:
    """Write a query of each style for each passage, `{id: text}`, into the new file `out`, and return them. A generator
    that has `learned` one style writes as many queries of that style.

    A row is `{"_id", "text", "style", "passage"}`. The file appears when it is whole. Until then its rows are in a file
    beside it that ends in `.part`, from which the same call goes on after a kill; the result is the same. A call
    with anything else has a `.part` of its own.

    Raises:
        OutputExistsError: `out` exists.
        DataError: another process writes the same queries.
    """
    require_new(out, file=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f"{out.name}.{digest_of(generator, passages, styles, seed)}.part")
    with _alone(part, out):
        _write(generator, passages, part, styles, seed, progress=progress)
        rows = read_written(part)
        os.replace(part, out)
    return rows


@contextmanager
def _alone(part: Path, out: Path) -> Iterator[None]:
    """Keep other processes from the file `part`, which they would begin as well."""
    try:
        lock = lock_if_possible(part)
    except Locked as error:
        raise DataError(f"{out}: another process writes these queries. Wait for it, or choose another name") from error
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _write(
    generator: Generator,
    passages: Mapping[str, str],
    part: Path,
    styles: Sequence[Style],
    seed: int,
    *,
    progress: bool,
) -> None:
    """Write the rows that `part` does not have yet."""
    done, ids = _kept_passages(part, len(styles)), list(passages)
    with (
        open(part, "a", encoding="utf-8") as file,
        tqdm(total=len(ids), initial=done, desc="queries", unit="passage", disable=not progress) as bar,
    ):
        for start in range(done, len(ids), BATCH):
            batch = ids[start : start + BATCH]
            with torch.random.fork_rng():
                torch.manual_seed(random.Random(f"{seed}/{start}").getrandbits(63))
                written = generator.write([passages[id_] for id_ in batch], styles)
            for id_, texts in zip(batch, written, strict=True):
                for number, (style, text) in enumerate(zip(styles, texts, strict=True)):
                    facts = {"style": generator.learned or style, "passage": id_}
                    row = {"_id": f"{id_}/{number}", "text": text, **facts}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(batch))


def digest_of(generator: Generator, passages: Mapping[str, str], styles: Sequence[Style], seed: int) -> str:
    """A short name of all that decides the queries."""
    content = json.dumps([generator.identity, list(passages.items()), list(styles), seed])
    return hashlib.sha256(content.encode()).hexdigest()[:8]


def read_written(path: Path) -> list[Written]:
    """Read the queries that `write_queries` wrote.

    Raises:
        DataError: a field is missing or wrong; names file and line. Or there are no queries.
    """
    queries = []
    for where, row in read_jsonl(path):
        text, style, passage = row.get("text"), row.get("style"), row.get("passage")
        if not isinstance(text, str) or not isinstance(passage, str):
            raise DataError(f'{where}: expected "text" and "passage" to be strings, found {text!r} and {passage!r}')
        if style not in STYLES:
            raise DataError(f'{where}: expected "style" to be one of {", ".join(STYLES)}, found {style!r}')
        queries.append(Written(text, style, passage))
    if not queries:
        raise DataError(f"{path}: no queries")
    return queries


def _kept_passages(part: Path, styles: int) -> int:
    """Cut a file that a killed run left to its whole batches. Gives the number of passages that are done."""
    # As bytes: strings are also split at characters that a query may hold, and a kill can cut a character in two.
    lines = part.read_bytes().splitlines(keepends=True) if part.is_file() else []
    done = sum(line.endswith(b"\n") for line in lines) // (BATCH * styles) * BATCH
    if lines:
        os.truncate(part, sum(map(len, lines[: done * styles])))
    return done


def _behind(shown: Sequence[int], ids_PL: torch.Tensor, mask_PL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the tokens of the examples before those of each passage."""
    shown_PL = ids_PL.new_tensor([shown]).expand(len(ids_PL), -1)
    return torch.cat([shown_PL, ids_PL], dim=1), torch.cat([torch.ones_like(shown_PL), mask_PL], dim=1)


def _sampling(stops: Sequence[int]) -> dict[str, Any]:
    return {
        "max_new_tokens": QUERY_TOKENS, "do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P, "top_k": TOP_K,
        "eos_token_id": list(stops) or None, "pad_token_id": stops[-1] if stops else 0,
    }  # fmt: skip


def _sampled(logits_BV: torch.Tensor) -> torch.Tensor:
    """Draw one token [B] from the smallest set of tokens whose probability reaches `TOP_P`, of the `TOP_K` best."""
    best = logits_BV.float().topk(min(TOP_K, logits_BV.shape[1]))
    share_BK = (best.values / TEMPERATURE).softmax(-1)
    share_BK[share_BK.cumsum(-1) - share_BK >= TOP_P] = 0
    return best.indices.gather(-1, share_BK.multinomial(1)).squeeze(-1)


def _stops(model: Any) -> list[int]:
    end = model.generation_config.eos_token_id
    return [end] if isinstance(end, int) else list(end or [])


def _decoded(tokenizer: Any, tokens: torch.Tensor | list[list[int]]) -> list[str]:
    lines: list[str] = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return lines


def _is_encoder_decoder(name: str) -> bool:
    try:
        return bool(AutoConfig.from_pretrained(name).is_encoder_decoder)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"generator {name!r} cannot be loaded from the hub or a folder: {error}") from error
