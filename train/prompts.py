"""Prompts of an LLM teacher: a question about a query and a passage that one token answers, yes or no.

A `Template` is the wording. `Prompts` turns texts into token ids, by a template and a tokenizer. Neither needs the
model.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from tokenizers import Encoding, Tokenizer

from d2llm.errors import DataError
from d2llm.settings import build, check
from d2llm.types import TASKS, Task

Chat: TypeAlias = Callable[[list[dict[str, str]]], str]
"""A chat template: renders messages (`{"role", "content"}`) as text that ends where the assistant's turn begins."""

QUERY, PASSAGE = "{query}", "{passage}"
_MARKUP = re.compile(r"<\|[^|<>\s]+\|>")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """The question for one task, and its two answers.

    Raises:
        ValueError: a placeholder is missing or doubled, or the answers are empty or equal.
    """

    text: str
    """The question, with `{query}` and `{passage}` once each."""
    yes: str
    """The answer yes. It must be one token after the cue, with a leading space if the cue ends in a word or colon."""
    no: str
    """The answer no, likewise one token."""

    def __post_init__(self) -> None:
        for name in (QUERY, PASSAGE):
            if (count := self.text.count(name)) != 1:
                raise ValueError(f"text must contain {name} once, found it {count} times: {self.text!r}")
        if not self.yes.strip() or not self.no.strip() or self.yes == self.no:
            raise ValueError(f"yes and no must be two different answers, found {self.yes!r} and {self.no!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """The wording of a prompt: system text, then the task's text, then the answer cue.

    Example:
        >>> question = Prompt(text="Does {passage} answer {query}? ", yes="yes", no="no")
        >>> template = Template(symmetric=question, asymmetric=question, cue="Answer: ")
        >>> template.render("asymmetric")
        'Does {passage} answer {query}? Answer: '
    """

    symmetric: Prompt
    """Are two texts alike?"""
    asymmetric: Prompt
    """Does a passage answer a query?"""
    system: str = ""
    """The system turn of a chat. Without a chat template it stands before the text, unchanged."""
    cue: str = ""
    """Text after which the answer comes. In a chat it begins the assistant's turn."""

    def prompt(self, task: Task) -> Prompt:
        """The prompt of `task`."""
        return self.symmetric if task == "symmetric" else self.asymmetric

    def render(self, task: Task, chat: Chat | None = None) -> str:
        """The whole prompt of `task`, with the placeholders `{query}` and `{passage}`.

        Raises:
            DataError: a placeholder is lost or doubled, or the template has chat markup and `chat` adds its own.
        """
        text = self.prompt(task).text
        rendered = self.system + text + self.cue
        if chat is not None:
            if markup := _MARKUP.search(rendered):
                raise DataError(
                    f"the template has chat markup of its own ({markup[0]}): set teacher.chat_template = false"
                )
            system = [{"role": "system", "content": self.system}] if self.system else []
            rendered = chat([*system, {"role": "user", "content": text}]) + self.cue
        for name in (QUERY, PASSAGE):
            if (count := rendered.count(name)) != 1:
                raise DataError(f"the whole prompt must contain {name} once, found it {count} times: {rendered!r}")
        return rendered


# The paper's prompts (Figure 1) in the order of the authors' code: instruction, texts, answer cue.
_ENGLISH = Template(
    symmetric=Prompt(
        text="#Q and #P will each describe an event or problem, they may not be related. Based solely on these "
        "descriptions and your understanding of the world, judge whether #P is absolutely correct about the event in "
        "#Q, or whether #Q is absolutely correct about the event or problem in #P, please answer yes or no.\n"
        "#Q: {query}\n#P: {passage}\n",
        yes=" yes",
        no=" no",
    ),
    asymmetric=Prompt(
        text="#Q will describe a query, #P will describe a passage, they may not be related. Based solely on these "
        "descriptions and your understanding of the world, judge whether #P can correctly answer the question asked in "
        "#Q. Please answer yes or no.\n#Q: {query}\n#P: {passage}\n",
        yes=" yes",
        no=" no",
    ),
    cue="Answer:",
)
# The prompts of the authors' code. The full-width punctuation is part of the wording.
_CHINESE = Template(
    symmetric=Prompt(
        text="#P和#H将分别描述一种事件或问题，它们可能并无关系。仅使用此描述和您对世界的了解，判断#H是不是一个关于#P中的事件绝对正确的句子，"
        "或者#H是不是绝对正确地描述了#P的事件或问题，请回答是或不是，若您不确定，请回答不是。\n#P：{query}\n#H：{passage}\n",
        yes="是",
        no="不是",
    ),
    asymmetric=Prompt(
        text="#Q将描述一个问题，#A将描述一个网络段落，它们可能并没有关系。仅依据这些描述和您对世界的了解，判断#A能不能正确地回答#Q中提出的问题，"
        "请回答能或不能。\n#Q：{query}\n#A：{passage}\n",
        yes="能",
        no="不能",
    ),
    cue="回答：",
)


def _qwen3(instruction: str) -> Prompt:
    return Prompt(
        text=f"<Instruct>: {instruction}\n<Query>: {QUERY}\n<Document>: {PASSAGE}",
        yes="yes",
        no="no",
    )


# As in its model card, markup included: the reranker was trained on exactly these tokens.
_QWEN3_RERANKER = Template(
    symmetric=_qwen3("Given a sentence, retrieve sentences that mean the same"),
    asymmetric=_qwen3("Given a web search query, retrieve relevant passages that answer the query"),
    system="<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n',
    cue="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
)
TEMPLATES = {"paper-en": _ENGLISH, "paper-zh": _CHINESE, "qwen3-reranker": _QWEN3_RERANKER}


def read_template(name: str) -> Template:
    """One of `TEMPLATES` by its name, or the template of a TOML file.

    The file has the tables `symmetric` and `asymmetric`, each with `text`, `yes` and `no`, and optionally the keys
    `system` and `cue`.

    Raises:
        DataError: no such name or file, broken TOML, an unknown or missing key, a missing placeholder; names it.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name)
    if not path.is_file():
        raise DataError(f"teacher.template: {name!r} is neither {', '.join(TEMPLATES)} nor a TOML file")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        for task in TASKS:
            if not isinstance(values.get(task), dict):
                raise ValueError(f"expected a table [{task}] with text, yes and no")
            check(values[task], Prompt, f"{task}.")
            try:
                values[task] = Prompt(**values[task])
            except ValueError as error:
                raise ValueError(f"{task}.{error}") from error
        return build(Template, values)
    except (ValueError, UnicodeDecodeError) as error:  # TOMLDecodeError is a ValueError
        raise DataError(f"{path}: {error}") from error


class Prompts:
    """Makes token ids of texts, by a template and a tokenizer. The answer is the token that comes after the last id.

    If a query or passage spells out a special token, it is read as plain text, so that no passage can end the prompt.

    Raises:
        DataError: an answer is not one token after the prompt, or the tokenizer does not know the template's markup.
    """

    def __init__(self, template: Template, tokenizer: Tokenizer, max_length: int, chat: Chat | None = None) -> None:
        self.template, self.tokenizer, self.max_length, self.chat = template, tokenizer, max_length, chat
        special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
        self.texts = {task: template.render(task, chat) for task in TASKS}
        self._start = [] if chat else _leading(tokenizer)  # a chat template writes its own first token
        for markup in _MARKUP.findall("".join(self.texts.values())):
            if tokenizer.token_to_id(markup) is None:
                raise DataError(
                    f"the template contains {markup}, which this tokenizer does not know: it is for another model. "
                    "Choose another teacher.template."
                )
        self.answers = {task: self._answers(task) for task in TASKS}
        """Token ids of yes and no for each task."""

    def ids(self, query: str, passages: Sequence[str], task: Task) -> list[list[int]]:
        """Token ids of the prompt of each pair, at most `max_length` of them. Only the passage is cut.

        Raises:
            DataError: query and prompt alone leave no room for the passage.
        """
        before, after = self.texts[task].split(PASSAGE)
        query = self._plain(query)
        before, after = before.replace(QUERY, query), after.replace(QUERY, query)
        passages = [self._plain(passage) for passage in passages]
        encodings = self._encode([before + passage + after for passage in passages])
        return [
            [*self._start, *self._cut(before, passage, after, encoding).ids]
            for passage, encoding in zip(passages, encodings, strict=True)
        ]

    def _cut(self, before: str, passage: str, after: str, encoding: Encoding) -> Encoding:
        """Shorten the passage to the limit. Its text is cut, not its tokens: one token may hold both the passage's last
        letter and the template's newline."""
        while (excess := len(self._start) + len(encoding.ids) - self.max_length) > 0:
            first, last = len(before), len(before) + len(passage)
            starts = [start for start, end in encoding.offsets if first <= start < end <= last]
            if excess >= len(starts):
                rest = len(self._start) + len(self._encode([before + after])[0].ids)
                raise DataError(
                    f"query and prompt alone are {rest} tokens, which leaves no room for the passage within "
                    f"teacher.max_length = {self.max_length}: raise it, or shorten the query ({before[-80:]!r})"
                )
            passage = passage[: starts[-excess] - first]
            (encoding,) = self._encode([before + passage + after])
        return encoding

    def _answers(self, task: Task) -> tuple[int, int]:
        prompt = self.template.prompt(task)
        text = self.texts[task].replace(QUERY, "a").replace(PASSAGE, "a")
        asked, *answered = self._encode([text, text + prompt.yes, text + prompt.no])
        for answer, encoding in zip((prompt.yes, prompt.no), answered, strict=True):
            read = self.tokenizer.decode(encoding.ids[-1:]).strip()  # nothing, if the tokenizer does not know it
            if encoding.ids[:-1] != asked.ids or read.casefold() != answer.strip().casefold():
                same = itertools.takewhile(lambda ids: ids[0] == ids[1], zip(asked.ids, encoding.ids, strict=False))
                raise DataError(
                    f"the {task} answer {answer!r} is not one token after the prompt {text[-20:]!r}: this tokenizer "
                    f"makes {encoding.tokens[len(list(same)) :]} of it. Write a template whose answers are one token "
                    "each (such as yes and no, 是 and 否), or move a space between the cue and the answers."
                )
        yes, no = (encoding.ids[-1] for encoding in answered)
        if yes == no:
            raise DataError(f"the {task} answers {prompt.yes!r} and {prompt.no!r} are the same token to this tokenizer")
        return yes, no

    def _encode(self, texts: list[str]) -> list[Encoding]:
        encodings: list[Encoding] = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        return encodings

    def _plain(self, text: str) -> str:
        """The text with a space after the first character of each special token, which makes it plain text."""
        return self._special.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)


def _leading(tokenizer: Tokenizer) -> list[int]:
    """Ids that the tokenizer puts before a text (BOS). Those that it puts after a text are left out: they would stand
    between the cue and the answer."""
    encoding = tokenizer.encode("a")
    return encoding.ids[: encoding.special_tokens_mask.index(0)]
