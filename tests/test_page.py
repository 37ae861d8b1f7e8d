"""The page of `d2llm serve` in a real browser, against a real service: it shows and weighs what the library finds."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("selenium", reason="the page is driven by selenium: pip install selenium")

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service as Driver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from serving import running

import d2llm
from d2llm.beir import read_qrels
from d2llm.connectors import QdrantIndex
from d2llm.corpus import read_queries
from d2llm.search import Searcher
from d2llm.serve import Judgements, Service, Serving, Settings

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="no browser: apt-get install chromium chromium-driver"
)
QUERY = "the given list of numeric data and a JSON object"
TEXTS = {
    "join": "Join one or more path segments intelligently.",
    "split": "Split a pathname into directory and file name.",
    "sleep": "Suspend execution of the calling thread for the given number of seconds.",
    "dumps": "Serialise an object to a JSON formatted string.",
    "median": "Return the median of numeric data, using the mean of middle two.",
    "shuffle": "Shuffle a list in place, at random.",
    "emoji": "\N{ROCKET}\N{ROCKET} the JSON list <img src=x onerror=alert(1)> <b>of</b> things",
    "arabic": "قائمة عشوائية: list of data",
    "chinese": "東京の大人 the list",
    "long": "A paragraph about a list of numeric data, which goes on. " * 80,
}
DOCUMENTS = [
    {"id": id_, "text": text, "lang": "en" if text.isascii() else "other", **({"title": "A list"} if n == 6 else {})}
    for n, (id_, text) in enumerate(TEXTS.items())
]
SIZES = {"desktop": (1400, 900), "phone": (390, 800)}


@pytest.fixture(scope="module")
def searcher(model: d2llm.Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Searcher]:
    with QdrantIndex("kb", tmp_path_factory.mktemp("page") / "qdrant", options={"bm25": {}}) as index:
        index.add(model, DOCUMENTS)
        yield Searcher(model, index)


@pytest.fixture(scope="module")
def address(searcher: Searcher) -> Iterator[str]:
    with running(searcher) as address:
        yield address


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=Driver(str(CHROMEDRIVER)))
    yield driver
    driver.quit()


class Page:
    """What a user does with the page, and sees of it."""

    def __init__(self, chrome: Chrome, address: str) -> None:
        self.chrome, self.address = chrome, address

    def open(self, **fields: object) -> "Page":
        self.chrome.get("about:blank")
        self.chrome.get(f"{self.address}/#{urlencode(fields, quote_via=quote)}")
        if "query" in fields:
            self.until("return document.querySelector('#rescored > li') !== null && !document.body.className")
        return self

    def js(self, script: str, *arguments: object) -> Any:
        return self.chrome.execute_script(script, *arguments)

    def until(self, script: str) -> None:
        WebDriverWait(self.chrome, 10, 0.05).until(lambda _: self.js(script), f"never: {script}")

    def press(self, keys: str) -> None:
        self.chrome.switch_to.active_element.send_keys(keys)

    def order(self, column: str) -> list[str]:
        return [str(id_) for id_ in self.all(f"#{column} > li", "dataset.id")]

    def all(self, selector: str, value: str) -> list[Any]:
        """The values of all elements that fit."""
        values: list[Any] = self.js(
            f"return [...document.querySelectorAll(arguments[0])].map(x => x.{value})", selector
        )
        return values

    def weigh(self, part: str, weight: float) -> None:
        self.js("const e = document.getElementById(arguments[0]); e.value = arguments[1];"
                "e.dispatchEvent(new Event('input'))", f"weight-{part}", weight)  # fmt: skip

    def errors(self) -> list[str]:
        """What the console shows since the last call."""
        chrome: Any = self.chrome  # whose get_log has no types
        return [entry["message"] for entry in chrome.get_log("browser")]

    def filter(self, text: str) -> None:
        self.js("document.getElementById('filter').value = arguments[0]", text)
        self.js("document.getElementById('search').requestSubmit()")

    def text(self, selector: str) -> str:
        return self.chrome.find_element(By.CSS_SELECTOR, selector).text

    def shows(self, selector: str) -> bool:
        return self.chrome.find_element(By.CSS_SELECTOR, selector).is_displayed()

    def size(self, name: str, *, dark: bool = False) -> "Page":
        width, height = SIZES[name]
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": name == "phone"}
        self.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        return self


@pytest.fixture
def new_page(chrome: Chrome) -> Iterator[Callable[[str], Page]]:
    """A page without anything of an earlier one, which must leave no error in the console."""
    opened: list[Page] = []

    def new(address: str) -> Page:
        page = Page(chrome, address)
        page.chrome.get(f"{address}/page.css")
        page.js("localStorage.clear(); sessionStorage.clear()")
        page.errors()
        opened.append(page)
        return page.size("desktop")

    yield new
    errors = [message for page in opened for message in page.errors() if " 401 " not in message]
    assert not errors, "nothing broke, and the policy of the page allowed all that it does"


@pytest.fixture
def page(new_page: Callable[[str], Page], address: str) -> Page:
    return new_page(address)


def explained(searcher: Searcher, **options: Any) -> tuple[list[str], list[str]]:
    """The order of recall and the rescored one, by the library."""
    found = searcher.explain(QUERY, 10, candidates=20, reasons=True, **options)
    assert found.reasons is not None
    recall = list(dict.fromkeys(reason.hit.id for reason in found.reasons.candidates))
    return recall, [hit.id for hit in found.hits]


@pytest.mark.parametrize("hybrid", ["", "rrf"])
def test_both_orders_are_those_of_the_library(page: Page, searcher: Searcher, hybrid: str) -> None:
    page.open(query=QUERY, k=4, candidates=20, hybrid=hybrid)
    recall, rescored = explained(searcher, hybrid=hybrid or None)
    assert page.order("recall") == recall[:4]
    assert page.order("rescored") == rescored[:4]
    moves = page.all("#rescored .move", "title")
    for place, (id_, move) in enumerate(zip(rescored, moves, strict=False), 1):
        before = recall.index(id_) + 1
        assert move == ("same place as in recall" if before == place else
                        f"{'up' if before > place else 'down'} from {before}")  # fmt: skip
    gone = page.all("#recall > li.gone", "dataset.id")
    assert gone == [id_ for id_ in recall[:4] if id_ not in rescored[:4]]
    assert len(page.chrome.find_elements(By.CSS_SELECTOR, "#moves .arrow")) == 4 + len(gone)
    assert page.text("#collection") == f"{len(DOCUMENTS)} documents · minilm"


def test_a_query_is_typed_and_the_search_can_be_shared(page: Page, searcher: Searcher) -> None:
    page.open()
    page.press("numeric data" + Keys.ENTER)
    page.until("return document.querySelector('#rescored > li') !== null")
    assert page.order("rescored")[0] == searcher.search("numeric data")[0].id
    assert page.js("return location.hash") == "#query=numeric+data"
    assert "hits of" in page.js("return document.getElementById('status').textContent")
    stages = page.text("#times")
    assert all(stage in stages for stage in ("tokenise", "encode", "recall", "rescore", "round trip"))


def test_bars_and_words_show_what_adds_up_to_the_score(page: Page, searcher: Searcher) -> None:
    page.open(query=QUERY, candidates=20)
    found = searcher.explain(QUERY, 10, candidates=20, reasons=True).reasons
    assert found is not None
    reasons = {reason.hit.id: reason for reason in reversed(found.candidates)}
    for id_ in page.order("rescored"):
        if reasons[id_].hit.passage is not None:
            continue  # its best passage may be another one
        card = f"#rescored > li[data-id={id_}]"
        shown = [float(text.replace("\u2212", "-")) for text in page.all(f"{card} .legend b", "textContent")]
        assert shown == pytest.approx(list(reasons[id_].parts.values()), abs=0.006)
        assert float(page.text(f"{card} .score").replace("\u2212", "-")) == pytest.approx(sum(shown), abs=0.03)
        widths = page.all(f"{card} .bar span", "getBoundingClientRect().width")
        assert widths[0] == max(widths) > 100
        marks = page.all(f"{card} .text mark", "textContent")
        assert marks == [TEXTS[id_][mark.start : mark.end] for mark in reasons[id_].marks.get("text", [])]


def test_a_slider_sorts_at_once_without_a_new_search(page: Page, searcher: Searcher) -> None:
    page.open(query=QUERY, candidates=20)
    served = page.order("rescored")
    requests = "return performance.getEntriesByType('resource').filter(x => x.name.endsWith('/search')).length"
    before = page.js(requests)
    found = searcher.explain(QUERY, 10, candidates=20, reasons=True).reasons
    assert found is not None
    for part in found.scales:
        page.weigh(part, 0)
    page.weigh("words", 1.5)
    only_words = {r.hit.id: r.values["words"] for r in sorted(found.candidates, key=lambda r: r.values["words"])}
    shown = [only_words[id_] for id_ in page.order("rescored")]
    assert shown == sorted(shown, reverse=True) and page.order("rescored") != served
    assert page.js(requests) == before
    page.js("document.activeElement.blur()")
    page.chrome.find_element(By.TAG_NAME, "body").send_keys("r")
    assert page.order("rescored") == served
    assert not page.chrome.find_element(By.ID, "reset").is_enabled()


def test_a_hybrid_search_weighs_bm25_as_the_library_does(page: Page, searcher: Searcher) -> None:
    page.open(query=QUERY, candidates=20, hybrid="rrf")
    page.weigh("bm25", 0.8)
    weight = float(page.js("return document.getElementById('weight-bm25').value"))
    assert page.order("rescored") == explained(searcher, hybrid="rrf", bm25_weight=weight)[1]


def test_hits_are_judged_by_keyboard_and_measured(
    searcher: Searcher, new_page: Callable[[str], Page], tmp_path: Path
) -> None:
    with running(searcher, judgements=Judgements(tmp_path)) as address:
        page = new_page(address).open(query=QUERY, candidates=20)
        first, second = page.order("rescored")[:2]
        page.js("document.activeElement.blur()")
        page.chrome.find_element(By.TAG_NAME, "body").send_keys("j")
        page.press("j")
        page.press("u")
        page.until("return document.querySelectorAll('.thumb.right[aria-pressed=true]').length === 1")
        assert page.js("return document.activeElement.dataset.id") == second, "the focus stays where it was"
        page.press("k")
        page.press("d")
        page.until("return document.querySelectorAll('.thumb.wrong[aria-pressed=true]').length === 1")
        (query_id,) = read_queries(tmp_path)
        assert read_qrels(tmp_path / "qrels/test.tsv") == {query_id: {second: 1, first: 0}}
        recall, rescored = page.text("#ndcg").split(" → ")
        assert rescored == ".631", "1 / log2(3): the right one is second"
        place = page.order("recall").index(second)
        assert float(recall) == pytest.approx([1, 0.6309, 0.5, 0.4307, 0.3869, 0.3562, 0.3333, 0.3155][place], abs=1e-3)
        assert "2 judgements here" in page.text("#ndcg-all")
        page.press("d")
        page.until("return document.querySelectorAll('.thumb.wrong[aria-pressed=true]').length === 0")
        assert read_qrels(tmp_path / "qrels/test.tsv") == {query_id: {second: 1}}
        page.open(query="numeric data")
        assert "Search 1 more judged query" in page.text("#rerun")
        page.chrome.find_element(By.ID, "rerun").click()
        page.until("return document.getElementById('ndcg-all').textContent.includes('1 query')")
        assert not page.shows("#download"), "the server has them"


def test_without_a_folder_the_browser_keeps_judgements_and_offers_them(page: Page, tmp_path: Path) -> None:
    page.open(query=QUERY)
    id_ = page.order("rescored")[2]
    page.chrome.find_element(By.CSS_SELECTOR, f"#rescored > li[data-id={id_}] .thumb.right").click()
    page.open(query=QUERY)
    assert page.js("return document.querySelector('.thumb.right[aria-pressed=true]').closest('li').dataset.id") == id_
    page.chrome.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path), "eventsEnabled": False}
    )
    page.chrome.find_element(By.ID, "download").click()
    WebDriverWait(page.chrome, 10, 0.05).until(lambda _: len([*tmp_path.glob("q*[lv]")]) == 2)
    ((query_id, text),) = read_queries(tmp_path / "queries.jsonl").items()
    assert text == QUERY
    assert read_qrels(tmp_path / "qrels.tsv") == {query_id: {id_: 1}}


def test_a_server_with_a_key_asks_for_it_once(searcher: Searcher, new_page: Callable[[str], Page]) -> None:
    with running(searcher, Settings(read_key="sesame")) as address:
        page = new_page(address)
        page.open()
        page.until("return document.getElementById('key').open")
        page.press("wrong" + Keys.ENTER)
        page.until("return document.getElementById('key-problem').textContent === 'unknown key'")
        page.press(Keys.ESCAPE)
        page.until("return document.getElementById('problem').textContent.startsWith('This server needs a key')")
        page.chrome.find_element(By.ID, "open-key").click()
        page.press("sesame" + Keys.ENTER)
        page.until("return document.getElementById('collection').textContent.includes('documents')")
        page.open(query=QUERY)
        assert page.order("rescored")
        assert page.js("return Object.keys(localStorage).length") == 0


def test_judging_asks_for_the_key_for_writing_and_says_why(
    searcher: Searcher, new_page: Callable[[str], Page], tmp_path: Path
) -> None:
    settings = Settings(read_key="sesame", write_key="writer")
    with running(searcher, settings, judgements=Judgements(tmp_path)) as address:
        page = new_page(address)
        page.js("sessionStorage.setItem('d2llm.key', 'sesame')")
        page.open(query=QUERY)
        page.js("document.querySelector('#rescored .thumb.right').click()")
        page.until("return document.getElementById('key').open")
        assert page.text("#key-problem") == "Judging writes a file of the server: it needs the key for writing."
        page.press("writer" + Keys.ENTER)
        page.until("return document.querySelectorAll('.thumb.right[aria-pressed=true]').length === 1")
        page.errors()  # the browser notes the answer 403 as an error
    assert len(read_queries(tmp_path)) == 1


def test_filters_hold_and_errors_are_said(page: Page) -> None:
    page.open(query=QUERY, filter="lang=other")
    assert set(page.order("rescored")) == {"emoji", "arabic", "chinese"}
    page.js("document.querySelector('#rescored button.field').click()")
    page.until("return document.getElementById('filter').value === '{\"lang\":\"other\"}'")
    for wrong, message in (('{"lang"', "The filter is not JSON"), ('{"lang": {"like": "e"}}', "like")):
        page.filter(wrong)
        page.until(f"return document.getElementById('problem').textContent.includes('{message}')")
        assert page.shows("#problem")
    page.errors()  # the browser notes the refused search as an error
    page.open(query=QUERY, k=1)
    page.filter("lang=fr")
    page.until("return document.getElementById('problem').textContent === 'Nothing passes the filter.'")


def test_queries_are_saved_found_again_and_forgotten(page: Page) -> None:
    page.open(query=QUERY)
    page.js("document.activeElement.blur()")
    body = page.chrome.find_element(By.TAG_NAME, "body")
    body.send_keys("s")
    page.open(query="numeric data")
    page.js("document.activeElement.blur()")
    page.chrome.find_element(By.TAG_NAME, "body").send_keys("l")
    assert page.text("#query-list .pick") == QUERY
    page.chrome.find_element(By.CSS_SELECTOR, "#query-list .pick").click()
    page.until(f"return location.hash.includes({json.dumps(QUERY.split()[1])})")
    page.until("return document.getElementById('save').getAttribute('aria-pressed') === 'true'")
    page.chrome.find_element(By.ID, "open-queries").click()
    page.chrome.find_element(By.CSS_SELECTOR, "#query-list .icon").click()
    assert "None yet" in page.text("#query-list")
    assert page.js("return JSON.parse(localStorage.getItem('d2llm.queries.'))") == []


def test_texts_of_all_scripts_are_shown_as_they_are(page: Page) -> None:
    page.open(query="the list of data 大人")
    card = "#rescored > li[data-id=%s] .text"
    assert page.text(card % "emoji").startswith("\N{ROCKET}\N{ROCKET} the JSON list <img src=x onerror=alert(1)>")
    assert page.all(card % "emoji" + " mark", "textContent") == ["list"]
    assert page.all(card % "chinese" + " mark", "textContent")[:2] == ["大", "人"]
    direction = "return getComputedStyle(document.querySelector(arguments[0])).direction"
    assert page.js(direction, card % "arabic") == "rtl"
    assert page.js(direction, card % "chinese") == "ltr"
    assert page.js("return document.querySelectorAll('img').length") == 0


def test_a_long_document_is_opened_from_the_keyboard(page: Page) -> None:
    page.size("phone").open(query="a paragraph about numeric data, which goes on")
    height = "return document.querySelector('#rescored > li[data-id=long] .text').getBoundingClientRect().height"
    clamped = page.js(height)
    page.js("document.querySelector('#rescored > li[data-id=long]').focus()")
    page.press(Keys.ENTER)
    assert page.js(height) > clamped + 20
    assert "passage" in page.text("#rescored > li[data-id=long] .chips")
    page.press("?")
    assert page.js("return document.getElementById('help').open")
    page.press(Keys.ESCAPE)
    assert not page.js("return document.getElementById('help').open")


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_one_order_at_a_time(page: Page, dark: bool) -> None:
    page.size("phone", dark=dark).open(query=QUERY)
    assert page.shows("#rescored") and not page.shows("#recall") and not page.shows("#moves")
    page.chrome.find_element(By.ID, "tab-recall").click()
    assert page.shows("#recall") and not page.shows("#rescored")
    page.press(Keys.ARROW_RIGHT)
    assert page.shows("#rescored")
    assert page.js("return document.documentElement.scrollWidth <= innerWidth"), "nothing scrolls sideways"
    paper = page.js("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert all(channel < 60 if dark else channel > 200 for channel in paper)


def test_the_page_waits_for_the_model(searcher: Searcher, new_page: Callable[[str], Page]) -> None:
    go = threading.Event()

    def load(serving: Serving) -> Service:
        go.wait()
        return Service(searcher, serving.settings, metrics=serving.metrics)

    with running(load, wait=False) as address:
        try:
            page = new_page(address)
            page.chrome.get(f"{address}/#query=numeric")
            page.until("return document.getElementById('problem').textContent === 'The model is being loaded.'")
        finally:
            go.set()
        page.until("return document.querySelector('#rescored > li') !== null")
        assert not page.shows("#problem")
        page.errors()  # the browser notes the answer 503 as an error


def test_facts_are_those_of_the_service(page: Page, searcher: Searcher) -> None:
    page.open()
    page.until("return document.getElementById('collection').textContent.includes('documents')")
    page.chrome.find_element(By.ID, "open-facts").click()
    facts = page.text("#facts-list")
    assert searcher.model.config.fingerprint in facts and "documents\n10" in facts


def test_every_control_has_a_name(page: Page) -> None:
    page.open(query=QUERY)
    nodes = page.chrome.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = {"button", "textbox", "searchbox", "slider", "combobox", "checkbox", "spinbutton", "tab"}
    unnamed = [
        (node["role"]["value"], node.get("properties"))
        for node in nodes
        if not node.get("ignored") and node["role"]["value"] in roles and not node["name"]["value"]
    ]
    assert not unnamed
