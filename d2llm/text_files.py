"""Read text, Markdown, HTML and PDF files: each is one document, with path, title, and date if it states one.

The libraries were compared on 125 pages of six sites and on 40 PDF files (one core):

- HTML: `selectolax` finds the main part of a page and `html-to-markdown` writes it as Markdown. They took 3 ms a page,
  kept all words and 99 % of the headings of the main part, and 22 % of the words around it. `trafilatura` took 19 ms
  and kept 84 %, 40 % and 4 %. `markitdown` took 61 ms and kept 100 %, 88 % and 100 %.
- PDF: `pypdfium2` took 1 ms a page and joined words that a line end divides. `pypdf` took 13 ms and `pdfminer.six`
  23 ms. Neither of them joined words, and neither could read one file that `pypdfium2` read.

None of the three needs another package. Their licences are MIT, BSD and Apache.
"""

from __future__ import annotations

import codecs
import functools
import logging
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import date, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from d2llm.errors import DataError, import_extra
from d2llm.payload import MAX_BYTES
from d2llm.types import is_utf8

logger = logging.getLogger(__name__)

Reject: TypeAlias = Callable[[str, str, Mapping[str, Any]], None]
"""A function that gets the place of a bad file, what is wrong with it, and its id. If it returns, reading goes on."""

MOST_READ = 4 * MAX_BYTES
"""The largest text, Markdown or HTML file, in bytes. A larger one cannot be a document, even if it is UTF-32."""

_BOMS = (  # the longer ones first: that of UTF-16 begins that of UTF-32
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip

_CHARSET = re.compile(
    rb"""<(?:meta[^>]{1,200}?charset|\?xml[^>]{1,99}?encoding)\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE
)

_FRONT_MATTER = re.compile(
    r"\A(?:---[ \t]*\n(?=[\w-]+[ \t]*:)(.*?\n)(?:---|\.\.\.)|\+\+\+[ \t]*\n(.*?\n)\+\+\+)[ \t]*(?:\n|\Z)", re.DOTALL
)
_FIELD = re.compile(r"^(title|date)[ \t]*[:=](.*)$", re.MULTILINE)
_FENCED = re.compile(r"^ {0,3}(```+|~~~+).*?(?:^ {0,3}\1[`~]*[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^ {0,3}#{1,6}[ \t]+(\S.*)$|^(\S.*)\n=+[ \t]*$", re.MULTILINE)

MAIN = ("main", "[role=main]", "article")
"""Where the text of a page is. The first selector with exactly one element counts; without one, the whole body does."""

_CLUTTER = [
    "nav", "footer", "button", "select", "dialog", "svg", "[hidden]", "[aria-hidden=true]", "[role=navigation]",
    "[role=banner]", "[role=contentinfo]", "[role=search]", "[role=complementary]",
    ".navheader", ".navfooter", ".docnav",  # DocBook
    ".headerlink", ".header-anchor", ".hash-link", "a.anchor",  # links of headings to themselves
]  # fmt: skip

_DATES = (
    "article:published_time", "datepublished", "date", "dc.date", "dc.date.issued", "dcterms.date", "dcterms.issued",
    "dcterms.created", "article:modified_time", "datemodified", "dcterms.modified", "last-modified",
)  # fmt: skip

_CONTROL = {**dict.fromkeys([*range(9), *range(11, 32), *range(127, 160), 0xFFFE]), ord("\f"): "\n", ord("\r"): "\n"}
"""Control characters in the text of a PDF. PDFium writes one where it joins a word that a line end divides."""

_SCANS = "If they are scans, recognise their text first (OCR)"
_PDFIUM = threading.Lock()
"""PDFium may be called by one thread at a time."""


class _Content(NamedTuple):
    text: str
    title: str = ""
    date: str = ""


def holds_documents(source: Path) -> bool:
    """Return whether `read_files` reads `source`: a folder, or a file with one of the suffixes `SUFFIXES`.

    A file `*.txt` that begins with a brace holds JSON lines.
    """
    if not os.path.isfile(source):
        return os.path.isdir(source)
    suffix = source.suffix.lower()
    if suffix != ".txt":
        return suffix in _PARSERS
    try:
        with open(source, "rb") as file:
            return not file.read(100).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{")
    except OSError:
        return True  # the reader reports it


def read_files(source: Path, reject: Reject) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (path, fields) for each file in a folder and its subfolders, or for the single file `source`.

    Files are read one at a time: those of a folder by name, then its subfolders by name. Hidden files and folders,
    links, and files with other suffixes are left out; a warning says how many there are of each suffix.

    The fields are `_id` and `path`, which are the path in the folder with forward slashes, `text`, `title`, and `date`
    (ISO 8601) if the file states one. The time when the file was changed is no date: a copy would be another document.

    - `*.txt`, `*.md`, `*.markdown`: UTF-8, or what the byte-order mark says. The title of Markdown is that of its front
      matter, or else its first heading. The front matter is no part of the text.
    - `*.html`, `*.htm`: as Markdown, the main part alone, without navigation. A page may also state its encoding. The
      title is that of the page, or else its first `h1`. Needs the extra `files`.
    - `*.pdf`: the pages in their order, with a blank line between them. Needs the extra `files`.

    A file that states no title has its name as title, without the suffix. An empty file has no title.

    Raises:
        DataError: the folder has no such file.
        MissingExtraError: a file needs the extra `files`.
    """
    for path, id_ in _files(source, reject) if os.path.isdir(source) else [(source, source.name)]:
        if not is_utf8(id_):
            reject(_shown(path), "its name is not valid UTF-8: rename it", {"_id": _shown(id_)})
            continue
        try:
            text, title, stated = _PARSERS[path.suffix.lower()](path)
        except (OSError, ValueError) as error:
            reject(_shown(path), _reason(error), {"_id": id_})
            continue
        title = (title or path.stem) if text else ""
        fields = {"_id": id_, "text": text, "title": title, "path": id_}
        yield _shown(path), {**fields, "date": stated} if stated else fields


def _files(folder: Path, reject: Reject) -> Iterator[tuple[Path, str]]:
    """Yield the path and the id of each file to read."""

    def unreadable(error: OSError) -> None:
        reject(_shown(error.filename), _reason(error), {})

    left_out, found = Counter[str](), False
    for place, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        left_out["links"] += sum(os.path.islink(os.path.join(place, name)) for name in folders)
        for name in sorted(name for name in names if not name.startswith(".")):
            path = Path(place, name)
            suffix = path.suffix.lower()
            if os.path.islink(path):
                left_out["links"] += 1
            elif suffix in _PARSERS and (os.path.isfile(path) or not os.path.lexists(path)):  # or is beyond our rights
                found = True
                yield path, path.relative_to(folder).as_posix()
            else:
                left_out[suffix or "no suffix"] += 1
    counts = ", ".join(f"{_shown(suffix)} ({count:,})" for suffix, count in left_out.most_common() if count)
    if not found:
        raise DataError(
            f"{folder / 'corpus.jsonl'}: no such file, and the folder has no file to read ({', '.join(SUFFIXES)})"
            + (f": found {counts}" if counts else "")
        )
    if counts:
        _warn(f"{folder}: {left_out.total():,} files are left out: {counts}")


@functools.cache
def _warn(message: str) -> None:
    """Log a warning once: a job reads its corpus twice."""
    logger.warning(message)


def _shown(path: Path | str) -> str:
    """A path for a message. Bytes that are not UTF-8 are escaped."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _reason(error: OSError | ValueError) -> str:
    return f"cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)


def _decoded(path: Path, *, is_html: bool = False) -> str:
    """Return the text of a file, with line ends "\\n".

    Raises:
        ValueError: the file is too large, or not in the encoding that it states, or not UTF-8.
    """
    if (size := path.stat().st_size) > MOST_READ:
        raise ValueError(f"it takes {size / 2**20:,.1f} MB, and at most {MOST_READ // 2**20} MB are read: split it")
    raw = path.read_bytes()
    encoding = next((name for bom, name in _BOMS if raw.startswith(bom)), None)
    if encoding is None and is_html and (stated := _CHARSET.search(raw[:4096])):
        encoding = stated[1].decode()
        if encoding.lower() in ("iso-8859-1", "latin1", "us-ascii", "ascii"):
            encoding = "cp1252"  # what browsers read under these names
        elif encoding.lower().startswith("utf-16"):
            encoding = None  # the tag could not be read
    try:
        text = raw.decode(encoding or "utf-8")
    except (LookupError, ValueError) as error:
        raise ValueError(f"not valid {(encoding or 'utf-8').upper()} ({error}): save it as UTF-8") from error
    if (place := text.find("\0")) >= 0:
        raise ValueError(f"no text: a zero byte at character {place + 1}. It is binary, or UTF-16 without a mark")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _text(path: Path) -> _Content:
    return _Content(_decoded(path).strip())


def _markdown(path: Path) -> _Content:
    text = _decoded(path)
    fields: dict[str, str] = {}
    if front := _FRONT_MATTER.match(text):
        fields = {name: _plain(value.strip()) for name, value in _FIELD.findall(front[1] or front[2])}
        text = text[front.end() :]
    title = fields.get("title", "")
    if not title and (heading := _HEADING.search(_FENCED.sub("", text))):
        title = (heading[1] or heading[2]).strip()
        start, _, end = title.rpartition(" ")
        title = title if end.strip("#") else start.strip()  # "# A heading #"
    return _Content(text.strip(), title, _iso_date(fields.get("date", "")))


def _plain(value: str) -> str:
    """The text of a plain or quoted value of YAML or TOML; empty for any other value."""
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        return value[1:-1].strip()
    return "" if value[:1] in tuple("\"'|>[{&*!") else value


def _html(path: Path) -> _Content:
    lexbor, markdown = import_extra("selectolax.lexbor", "files"), import_extra("html_to_markdown", "files")
    page = lexbor.LexborHTMLParser(_decoded(path, is_html=True))
    found = (page.css(selector) for selector in MAIN)
    main = next((nodes[0] for nodes in found if len(nodes) == 1 and nodes[0].text().strip()), None)
    body = main or page.body  # a page of frames has no body
    options = markdown.ConversionOptions(
        strip_tags=["a", "img"],  # keeps the text of links
        skip_images=True,
        autolinks=False,
        compact_tables=True,
        extract_metadata=False,
        exclude_selectors=_CLUTTER if main else [*_CLUTTER, "aside"],
        preprocessing=markdown.PreprocessingOptions(enabled=False),
    )
    result = markdown.convert(body.html if body else "", options)
    if any(str(warning.kind) == "depth_limit_exceeded" for warning in result.warnings):
        raise ValueError("its elements are nested more than 1024 deep")
    heading = page.css_first("head > title") or page.css_first("h1")
    title = " ".join(heading.text().split()) if heading else ""
    return _Content(result.content.strip(), title, _stated_date(page))


def _stated_date(page: Any) -> str:
    stated: dict[str, str] = {}
    for tag in page.css("meta[content]"):
        name = tag.attributes.get("name") or tag.attributes.get("property") or tag.attributes.get("itemprop") or ""
        stated.setdefault(name.lower(), tag.attributes["content"] or "")
    return next(filter(None, (_iso_date(stated.get(name, "")) for name in _DATES)), "")


def _pdf(path: Path) -> _Content:
    pdfium = import_extra("pypdfium2", "files")
    with open(path, "rb"):  # raises an OSError that names the reason
        pass
    with _PDFIUM:
        try:
            document = pdfium.PdfDocument(path)
        except pdfium.PdfiumError as error:
            if "password" in str(error):
                raise ValueError("encrypted: save it without a password") from error
            raise ValueError(f"not a PDF file, or damaged ({error})") from error
        try:
            about, pages = document.get_metadata_dict(), [_page(document, index) for index in range(len(document))]
        except pdfium.PdfiumError as error:
            raise ValueError(f"damaged ({error})") from error
        finally:
            document.close()
    text, without = "\n\n".join(filter(None, pages)), pages.count("")
    if not text:
        raise ValueError(f"no text on any page ({len(pages):,} in all). {_SCANS}")
    if 2 * without >= len(pages):  # more than a cover and blank pages
        _warn(f"{_shown(path)}: no text on {without:,} of its {len(pages):,} pages. {_SCANS}")
    return _Content(text, " ".join(about["Title"].split()), _pdf_date(about["CreationDate"] or about["ModDate"]))


def _page(document: Any, index: int) -> str:
    page = document[index]
    textpage = page.get_textpage()
    text: str = textpage.get_text_bounded()
    textpage.close()
    page.close()
    return text.replace("\r\n", "\n").translate(_CONTROL).strip()


def _pdf_date(text: str) -> str:
    """The ISO date of a PDF's date, such as D:20240102030405+01'00'."""
    digits = re.sub("Z.*", "Z", text.removeprefix("D:").replace("'", ""))
    return _iso_date(f"{digits[:8]}T{digits[8:]}" if digits[8:] else digits)


def _iso_date(text: str) -> str:
    """The date, or date and time, in its full ISO 8601 form; empty if `text` is none."""
    text = re.sub(r"\s+(?=[+-])", "", text.strip())
    for kind in (date, datetime):
        try:
            return kind.fromisoformat(text).isoformat()
        except ValueError:
            continue
    return ""


_PARSERS: Mapping[str, Callable[[Path], _Content]] = {
    ".txt": _text, ".md": _markdown, ".markdown": _markdown, ".html": _html, ".htm": _html, ".pdf": _pdf,
}  # fmt: skip
SUFFIXES = tuple(_PARSERS)
"""The suffixes of the files that are documents."""
