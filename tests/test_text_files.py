"""Folders of text, Markdown, HTML and PDF files as corpora: what becomes a document, and what becomes a bad row."""

import gzip
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from d2llm.bad_rows import BadRow
from d2llm.cli import main
from d2llm.corpus import read_contents, read_documents
from d2llm.errors import DataError, MissingExtraError
from d2llm.indexing import digest_of
from d2llm.readers import read_rows
from d2llm.text_files import MOST_READ
from d2llm.types import Document

PAGE = """<!doctype html><html lang="en"><head><title>Refunds &amp;
 returns</title><meta property="article:published_time" content="2024-03-01T09:00:00Z"></head>
<body><header><a href="/">ACME</a><nav><ul><li><a href="/shop">Shop</a></li></ul></nav></header>
<div class="layout"><aside>Popular articles</aside><main>
<h1>Refunds<a class="headerlink" href="#refunds">¶</a></h1><p>A refund takes <b>five days</b>, see <a href="/faq">the
FAQ</a>.</p><h2>What you need</h2><ul><li>the receipt</li><li>the goods</li></ul>
<table><tr><th>Country</th><th>Days</th></tr><tr><td>France</td><td>14</td></tr></table>
<pre><code>refund --order 7</code></pre><script>track()</script></main></div><footer>© ACME</footer></body></html>"""

PAGE_TEXT = """# Refunds

A refund takes **five days**, see the
FAQ.

## What you need

- the receipt
- the goods

| Country | Days |
| --- | --- |
| France | 14 |

```
refund --order 7
```"""


def pdf(*pages: str, about: str = "", encrypted: bool = False) -> bytes:
    """A PDF file. Each page is a stream of drawing operators."""
    first = 5
    kids = " ".join(f"{first + 2 * number} 0 R" for number in range(len(pages)))
    objects = [
        "<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Kids[{kids}]/Count {len(pages)}>>",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
        f"<<{about}>>",
    ]
    for number, page in enumerate(pages):
        objects += [
            f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 600 800]/Contents {first + 2 * number + 1} 0 R"
            "/Resources<</Font<</F1 3 0 R>>>>>>",
            f"<</Length {len(page)}>>stream\n{page}\nendstream",
        ]
    trailer = f"/Size {len(objects) + 1}/Root 1 0 R/Info 4 0 R"
    if encrypted:  # by a password that nobody knows
        secret = "ab" * 32
        trailer += f"/ID[<{secret}><{secret}>]/Encrypt<</Filter/Standard/V 1/R 2/O<{secret}>/U<{secret}>/P -4>>"
    content, places = b"%PDF-1.4\n", list[int]()
    for number, item in enumerate(objects, 1):
        places.append(len(content))
        content += f"{number} 0 obj{item}endobj\n".encode()
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    return (
        content
        + (
            f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer<<{trailer}>>\n"
            f"startxref\n{len(content)}\n%%EOF"
        ).encode()
    )


def page(*lines: str) -> str:
    return "BT /F1 12 Tf 72 700 Td " + " 0 -14 Td ".join(f"({line}) Tj" for line in lines) + " ET"


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    about = "/Title(Terms of sale)/CreationDate(D:20240102030405+01'00')"
    return write(
        tmp_path / "docs",
        {
            "shop/refunds.html": PAGE,
            "guide.md": "---\ntitle: 'The guide'\ndate: 2023-05-06\ntags: [a, b]\n---\n\n# Start\n\nRead this.\n",
            "note.txt": "We ship on Mondays.\r\nAlways.\r\n",
            "terms.PDF": pdf(page("Page one, line one", "line two"), page("Page two"), about=about),
            ".git/config.txt": "hidden",
            ".draft.md": "hidden too",
        },
    )


def read_one(path: Path, content: str | bytes) -> Document:
    """The document of a single file."""
    write(path.parent, {path.name: content})
    (document,) = read_documents(path)
    assert document.id == document.payload["path"] == path.name
    return document


def bad_rows(source: Path) -> list[BadRow]:
    errors: list[BadRow] = []
    assert not list(read_documents(source, errors.append))
    return errors


def test_each_file_is_a_document_with_path_title_and_date(folder: Path) -> None:
    assert list(read_documents(folder)) == [
        Document("guide.md", "# Start\n\nRead this.", "The guide", {"path": "guide.md", "date": "2023-05-06"}),
        Document("note.txt", "We ship on Mondays.\nAlways.", "note", {"path": "note.txt"}),
        Document(
            "terms.PDF",
            "Page one, line one\nline two\n\nPage two",
            "Terms of sale",
            {"path": "terms.PDF", "date": "2024-01-02T03:04:05+01:00"},
        ),
        Document(
            "shop/refunds.html",
            PAGE_TEXT,
            "Refunds & returns",
            {"path": "shop/refunds.html", "date": "2024-03-01T09:00:00+00:00"},
        ),
    ]
    assert next(where for where, _ in read_rows(folder)) == str(folder / "guide.md")
    assert read_contents(folder)[1] == "note We ship on Mondays.\nAlways."


def test_a_copy_of_a_folder_gives_the_same_documents_whatever_their_times(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "elsewhere" / "copy")
    for path in copy.rglob("*.*"):
        os.utime(path, (0, 0))
    assert list(map(digest_of, read_documents(copy))) == list(map(digest_of, read_documents(folder)))


def test_a_single_file_is_a_corpus(folder: Path) -> None:
    (document,) = read_documents(folder / "shop" / "refunds.html")
    assert document.id == document.payload["path"] == "refunds.html"
    assert document.text == PAGE_TEXT


def test_a_text_file_that_begins_with_a_brace_still_holds_json_lines(tmp_path: Path) -> None:
    write(tmp_path, {"corpus.txt": '\n{"_id": "a", "text": "x"}\n{"_id": "b", "text": "y"}\n'})
    assert [document.id for document in read_documents(tmp_path / "corpus.txt")] == ["a", "b"]


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.jsonl.gz"])
def test_a_beir_folder_stays_one(folder: Path, name: str) -> None:
    row = b'{"_id": "a", "text": "x"}\n'
    write(folder, {name: gzip.compress(row) if name.endswith(".gz") else row})
    assert list(read_documents(folder)) == [Document("a", "x")]


def test_what_is_left_out_is_counted_once(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(folder, {"a.png": b"", "b.PNG": b"", "data.jsonl": "{}", "LICENSE": "free"})
    write(tmp_path / "outside", {"secret.txt": "never read"})
    (folder / "link.txt").symlink_to(tmp_path / "outside" / "secret.txt")
    (folder / "shop" / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe.txt")
    for _ in range(2):
        assert len(list(read_documents(folder))) == 4
    (message,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert message.startswith(f"{folder}: 7 files are left out: ")
    counts = {".png (2)", "links (2)", ".jsonl (1)", ".txt (1)", "no suffix (1)"}  # the .txt is the pipe
    assert set(message.rpartition(": ")[2].split(", ")) == counts


def test_a_folder_without_a_file_to_read_names_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"/corpus\.jsonl: no such file, and .* no file to read \(\.txt, \.md, .*\.pdf\)$"
    ):
        list(read_documents(tmp_path))
    write(tmp_path, {"docs.jsonl": "{}", ".hidden.txt": "x"})
    with pytest.raises(DataError, match=r"\): found \.jsonl \(1\)$"):
        list(read_documents(tmp_path, lambda error: None))


@pytest.mark.parametrize(
    ("content", "title", "date"),
    [
        ('+++\ntitle = "TOML\'s"\ndate = 2024-01-02T03:04:05Z\n+++\n# H', "TOML's", "2024-01-02T03:04:05+00:00"),
        ("---\ndate: 2024-01-02 03:04:05 -0500\n---\n# H", "H", "2024-01-02T03:04:05-05:00"),
        ("---\ntitle: |\n  several\n  lines\ndate: last May\n---\n# H", "H", None),
        ("---\ntitle: ''\n---\n# H #\n\n# Other", "H", None),
        ("---\n\nA rule, not front matter\n\n---\n", "page", None),
        ("```sh\n# a comment\n```\n\n## In C#\n", "In C#", None),
        ("Underlined\n==========\n\n# Later", "Underlined", None),
        ("no heading\n#hashtag", "page", None),
    ],
)
def test_titles_and_dates_of_markdown(tmp_path: Path, content: str, title: str, date: str | None) -> None:
    document = read_one(tmp_path / "page.markdown", content)
    assert (document.title, document.payload.get("date")) == (title, date)
    assert "title" not in document.text


@pytest.mark.parametrize(
    ("html", "text", "title"),
    [
        ("<title> </title><p>text</p>", "text", "page"),
        ("<h1>The\n one</h1><p>text</p>", "# The one\n\ntext", "The one"),
        ("<article>one</article><article>two</article>", "one\n\ntwo", "page"),
        ("<main></main><div>outside</div>", "outside", "page"),
        ("<aside>links</aside><div>text</div>", "text", "page"),
        ("<main><aside>a warning</aside><p>text</p></main>", "a warning\n\ntext", "page"),
        ("<form><p>all of it</p><input></form>", "all of it", "page"),
        ("just words &lt;b&gt;", "just words <b>", "page"),
    ],
)
def test_the_main_part_of_pages_of_every_kind(tmp_path: Path, html: str, text: str, title: str) -> None:
    document = read_one(tmp_path / "page.htm", html)
    assert (document.text, document.title) == (text, title)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "\ufeffGrüße 漢字".encode()),
        ("a.txt", "Grüße 漢字".encode("utf-16")),
        ("a.txt", b"\xfe\xff" + "Grüße 漢字".encode("utf-16-be")),
        ("a.md", "Grüße 漢字".encode("utf-32")),
        ("a.html", "<p>Grüße 漢字".encode("utf-16")),
        ("a.html", '<meta charset="gb18030"><p>Grüße 漢字'.encode("gb18030")),
        ("a.html", '<meta charset="utf-16"><p>Grüße 漢字'.encode()),
    ],
)
def test_an_encoding_that_is_stated_is_used(tmp_path: Path, name: str, content: bytes) -> None:
    assert read_one(tmp_path / name, content).text == "Grüße 漢字"


def test_pages_that_say_latin_1_are_read_as_browsers_do(tmp_path: Path) -> None:
    head = '<meta http-equiv="Content-Type" content="text/html; charset=ISO-8859-1">'
    assert read_one(tmp_path / "a.html", (head + "<p>5 €").encode("cp1252")).text == "5 €"
    xml = '<?xml version="1.0" encoding="latin1"?><html xmlns="http://www.w3.org/1999/xhtml"><p>naïve</p></html>'
    assert read_one(tmp_path / "b.html", xml.encode("latin-1")).text == "naïve"


BAD = {
    "latin.txt": (b"caf\xe9 au lait", r"not valid UTF-8 \(.* byte 0xe9 in position 3: .*\): save it as UTF-8"),
    "half.txt": (b"\xff\xfea", r"not valid UTF-16 \(.* in position 2: truncated data\)"),
    "odd.html": (b"<meta charset=klingon><p>x", r"not valid KLINGON \(unknown encoding: klingon\)"),
    "program.txt": (b"\x7fELF\0\0", r"a zero byte at character 5\. It is binary, or UTF-16 without a mark"),
    "empty.txt": (b"", r"document 'sub/empty\.txt' is empty: neither text nor title"),
    "blank.md": (b"---\ntitle: x\n---\n \n", r"document 'sub/blank\.md' is empty"),
    "app.html": (b"<title>App</title><div id=root></div><script>run()</script>", r"document 'sub/app\.html' is empty"),
    "frames.html": (b"<frameset><frame src=a></frameset>", r"document 'sub/frames\.html' is empty"),
    "deep.html": (b"<div>" * 2000 + b"text", r"nested more than 1024 deep"),
    "scan.pdf": (pdf("0 0 10 10 re f", ""), r"no text on any page \(2 in all\)\. If they are scans, .* \(OCR\)"),
    "secret.pdf": (pdf(page("x"), encrypted=True), r"encrypted: save it without a password"),
    "broken.pdf": (pdf(page("x"))[:200], r"not a PDF file, or damaged \(.*Data format error"),
    "empty.pdf": (b"", r"not a PDF file, or damaged"),
    "big.txt": (b"word " * (2 * 2**20), r"it takes 10\.0 MB, and a document may take 8 MB: split it"),
    "huge.md": (b" " * (MOST_READ + 2**20), r"it takes 33\.0 MB, and at most 32 MB are read: split it"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_used_is_a_bad_row(tmp_path: Path, name: str) -> None:
    content, reason = BAD[name]
    write(tmp_path, {f"sub/{name}": content, "a.txt": "good", "z.txt": "good"})
    with pytest.raises(BadRow, match=reason) as caught:
        list(read_documents(tmp_path))
    assert caught.value.where == str(tmp_path / "sub" / name)
    errors: list[BadRow] = []
    assert [document.id for document in read_documents(tmp_path, errors.append)] == ["a.txt", "z.txt"]
    assert [error.where for error in errors] == [str(tmp_path / "sub" / name)]


@pytest.fixture
def readable_by_all() -> Iterator[Path]:
    """A folder outside root's own. While the test runs, root has the rights of any other user."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)
        if os.getuid() == 0:
            os.seteuid(0)


def test_files_and_folders_beyond_our_rights_are_bad_rows(readable_by_all: Path) -> None:
    names = ["a.txt", "b.pdf", "c/inside.txt", "d.txt"]
    folder = write(readable_by_all, dict.fromkeys(names, "good"))
    for name in ("a.txt", "b.pdf", "c"):
        (folder / name).chmod(0)
    if os.getuid() == 0:
        os.seteuid(65534)
    errors: list[BadRow] = []
    assert [document.id for document in read_documents(folder, errors.append)] == ["d.txt"]
    assert {error.where for error in errors} == {str(folder / name) for name in ("a.txt", "b.pdf", "c")}
    assert {error.reason for error in errors} == {"cannot be read (Permission denied)"}
    with pytest.raises(BadRow, match=r"a\.txt: cannot be read \(Permission denied\)"):
        list(read_documents(folder / "a.txt"))


def test_a_name_that_is_not_utf_8_is_a_bad_row(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "wb") as file:
        file.write(b"good")
    (error,) = bad_rows(tmp_path)
    assert error.reason == "its name is not valid UTF-8: rename it"
    assert error.where == f"{tmp_path}/caf\\xe9.txt"


def test_pages_that_may_be_scans_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, {"half.pdf": pdf(page("text"), ""), "cover.pdf": pdf("", page("one"), page("two"))})
    for _ in range(2):  # as a job reads its corpus
        assert [document.text for document in read_documents(tmp_path)] == ["one\n\ntwo", "text"]
    (message,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert message == (
        f"{tmp_path}/half.pdf: no text on 1 of its 2 pages. If they are scans, recognise their text first (OCR)"
    )


def test_without_the_extra_only_html_and_pdf_cannot_be_read(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "sys.modules.update(dict.fromkeys(['selectolax', 'html_to_markdown', 'pypdfium2']))\n"
        "from d2llm.corpus import read_documents\n"
        "print([document.id for document in read_documents(Path(sys.argv[1]))])"
    )
    words = write(folder.parent / "words", {"a.txt": "x", "b.md": "y"})
    done = subprocess.run([sys.executable, "-c", code, words], capture_output=True, text=True, check=True)
    assert done.stdout == "['a.txt', 'b.md']\n"
    failed = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    assert MissingExtraError.__name__ in failed.stderr
    assert "pypdfium2 is not installed. Install it with: pip install 'd2llm[files]'" in failed.stderr


def test_a_folder_is_indexed_searched_and_indexed_again(folder: Path, tmp_path: Path, model_folder: Path) -> None:
    def d2llm(*arguments: str | Path) -> str:
        done = CliRunner().invoke(main, [*map(str, arguments), "--qdrant", str(tmp_path / "q"), "--collection", "kb"])
        assert done.exit_code == 0, done.stderr
        return done.stdout

    write(folder, {"scan.pdf": pdf("")})
    index, rejects = ("index", model_folder, folder, "--json"), tmp_path / "rejects.jsonl"
    report = json.loads(d2llm(*index, "--rejects", rejects))
    assert (report["added"], report["skipped"]) == (4, 1)
    (rejected,) = map(json.loads, rejects.read_text().splitlines())
    assert rejected["where"] == str(folder / "scan.pdf")
    hits = json.loads(d2llm("search", model_folder, "when do you ship?", "--filter", "path=note.txt", "--json"))["hits"]
    assert [(hit["id"], hit["payload"]["title"]) for hit in hits] == [("note.txt", "note")]
    (folder / "terms.PDF").unlink()
    write(folder, {"note.txt": "We ship on Tuesdays."})
    report = json.loads(d2llm(*index, "--prune", "--on-error", "skip"))  # nobody can read scan.pdf
    assert (report["added"], report["unchanged"], report["pruned"], report["stored"]) == (1, 2, 1, 3)
