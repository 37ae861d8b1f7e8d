"""The tools for agents, called by the client of the official SDK over stdio and over HTTP."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mcp")
pytest.importorskip("fastapi")

import httpx
import httpx2
from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamable_http_client
from serving import running

import d2llm
from d2llm.connectors import QdrantIndex
from d2llm.search import Searcher
from d2llm.serve import Settings
from d2llm.serve.mcp import LONGEST_TEXT, describe_fields

QUERY = "numeric data"
DOCUMENTS: list[dict[str, Any]] = [
    {"id": "median", "text": "The median is the middle value of sorted numeric data.", "lang": "en", "year": 2021,
     "title": "Median", "metadata": {"source": "wiki", "tags": ["math", "data"]}},
    {"id": "mean", "text": "The mean of numeric data is their sum divided by their number.", "lang": "en",
     "year": 2022, "metadata": {"source": "book"}},
    {"id": "mittel", "text": "Der Mittelwert von Zahlen ist numeric data.", "lang": "de", "year": 2023},
    {"id": "long", "text": "A long chapter about shuffled lists. " * 700, "lang": "en", "year": 1999},
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(model: d2llm.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mcp") / "qdrant"
    with QdrantIndex("kb", folder) as index:
        index.add(model, DOCUMENTS)
    return folder


@pytest.fixture
def searcher(model: d2llm.Model, folder: Path) -> Iterator[Searcher]:
    with QdrantIndex("kb", folder) as index:
        yield Searcher(model, index)


@asynccontextmanager
async def over_http(address: str, key: str | None = None, mode: Any = "auto") -> AsyncIterator[Client]:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    async with httpx2.AsyncClient(headers=headers) as http:
        async with Client(streamable_http_client(f"{address}/mcp", http_client=http), mode=mode) as client:
            yield client


async def content(client: Client, tool: str, **arguments: Any) -> Any:
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content
    return result.structured_content


async def error(client: Client, tool: str, **arguments: Any) -> str:
    result = await client.call_tool(tool, arguments)
    assert result.is_error
    return "".join(getattr(block, "text", "") for block in result.content)


async def use(client: Client) -> None:
    """What an agent does, and what it must see."""
    tools = {tool.name: tool for tool in (await client.list_tools()).tools}
    assert tools.keys() == {"search", "get"}
    assert tools["search"].annotations is not None and tools["search"].annotations.read_only_hint
    description = str(tools["search"].description)
    assert 'lang ("en", "de")' in description and "year (1999, 2021, 2022, 2023)" in description
    assert '.metadata.source ("book", "wiki")' in description and '.metadata.tags ("data", "math")' in description
    assert "gte" in str(tools["search"].input_schema["properties"]["filter"])

    hits = (await content(client, "search", query=QUERY, k=3))["hits"]
    assert sorted(hit["id"] for hit in hits) == ["mean", "median", "mittel"]
    median = next(hit for hit in hits if hit["id"] == "median")
    assert (median["title"], median["text"]) == ("Median", DOCUMENTS[0]["text"])
    assert median["fields"] == {"lang": "en", "year": 2021, "metadata": DOCUMENTS[0]["metadata"]}

    for filter, ids in (
        ({"lang": "de"}, ["mittel"]),
        ({"year": {"gte": 2022, "lt": 2023}}, ["mean"]),
        ({".metadata.source": ["wiki"]}, ["median"]),
    ):
        found = await content(client, "search", query=QUERY, filter=filter)
        assert [hit["id"] for hit in found["hits"]] == ids
    nothing = await content(client, "search", query=QUERY, filter={"lang": "fr"})
    assert nothing["hits"] == [] and 'lang ("en", "de")' in nothing["note"]
    number = await content(client, "search", query=QUERY, filter={"lang": 7})
    assert 'write it as {"lang": "7"}. Fields, with values' in number["note"]
    chapter = (await content(client, "search", query="shuffled lists", k=1))["hits"][0]
    assert chapter["id"] == "long" and " of " in chapter["passage"]

    assert "gte" in await error(client, "search", query=QUERY, filter={"year": {"from": 2020}})
    assert "empty" in await error(client, "search", query=" ")
    assert "k" in await error(client, "search", query=QUERY, k=1000)

    got = await content(client, "get", ids=["long", "nobody"])
    assert got["missing"] == ["nobody"]
    text, characters = got["documents"][0]["text"], got["documents"][0]["characters"]
    assert (len(text), characters) == (LONGEST_TEXT, len(DOCUMENTS[3]["text"]))
    rest = await content(client, "get", ids=["long"], offset=LONGEST_TEXT)
    assert text + rest["documents"][0]["text"] == DOCUMENTS[3]["text"]


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_an_agent_searches_over_http(searcher: Searcher, mode: str) -> None:
    async def work(address: str) -> None:
        async with over_http(address, mode=mode) as client:
            await use(client)

    with running(searcher) as address:
        asyncio.run(work(address))
        assert httpx.get(f"{address}/mcp").status_code == 405, "no stream is held open"


@pytest.fixture
def arguments(model_folder: Path, folder: Path) -> list[str]:
    return ["-m", "d2llm", "mcp", str(model_folder), "--qdrant", str(folder), "--collection", "kb"]


def test_an_agent_searches_over_stdio(arguments: list[str]) -> None:
    async def work() -> None:
        async with Client(stdio_client(StdioServerParameters(command=sys.executable, args=arguments))) as client:
            await use(client)

    asyncio.run(work())


def test_stdout_has_the_protocol_alone_and_the_end_of_stdin_ends_it(arguments: list[str]) -> None:
    about = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
    hello = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": about}
    command = [sys.executable, arguments[0], arguments[1], "--verbose", *arguments[2:]]
    done = subprocess.run(
        command, input=json.dumps(hello) + "\n", capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    (answer,) = map(json.loads, done.stdout.splitlines())
    assert answer["result"]["serverInfo"]["name"] == "d2llm"
    broken = subprocess.run([*command[:-1], "none"], capture_output=True, text=True, timeout=60, check=False)
    assert broken.returncode == 1 and broken.stdout == "" and "none" in broken.stderr
    assert "Traceback" not in broken.stderr


def test_the_tools_are_behind_the_key(searcher: Searcher) -> None:
    async def work(address: str) -> None:
        async with over_http(address, "sesame") as client:
            assert (await content(client, "search", query=QUERY))["hits"]

    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    with running(searcher, Settings(read_key="sesame")) as address:
        assert httpx.post(f"{address}/mcp", json=body).status_code == 401
        asyncio.run(work(address))


def test_pages_of_other_sites_may_not_call(searcher: Searcher) -> None:
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    headers = {"Accept": "application/json, text/event-stream"}
    with running(searcher, Settings(cors=("https://app.example.com",))) as address:
        for origin, status in (
            ("https://evil.example.com", 403),
            ("null", 403),
            ("https://app.example.com", 200),
            ("http://localhost:6274", 200),
        ):
            answer = httpx.post(f"{address}/mcp", json=body, headers={**headers, "Origin": origin})
            assert answer.status_code == status, (origin, answer.text)


def test_fields_of_new_documents_are_described_in_time(model: d2llm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2llm.serve.mcp.FRESH_SECONDS", 0)
    index = d2llm.FlatIndex()
    index.add(model, [{"id": "a", "text": "One."}])

    async def description(address: str) -> str:
        async with over_http(address) as client:
            return str((await client.list_tools()).tools[0].description)

    with running(Searcher(model, index)) as address:
        assert "no fields to filter by" in asyncio.run(description(address))
        index.add(model, [{"id": "b", "text": "Two.", "lang": "en"}])
        assert 'lang ("en")' in asyncio.run(description(address))


def test_many_agents_search_at_once(searcher: Searcher) -> None:
    async def agent(address: str) -> list[str]:
        async with over_http(address) as client:
            found = [await content(client, "search", query=QUERY, k=2) for _ in range(3)]
        return [hit["id"] for each in found for hit in each["hits"]]

    async def work(address: str) -> list[list[str]]:
        return await asyncio.gather(*(agent(address) for _ in range(8)))

    with running(searcher) as address:
        answers = asyncio.run(work(address))
    assert all(answer == answers[0] for answer in answers) and len(answers[0]) == 6


def test_fields_are_described_for_a_model_that_writes_filters(model: d2llm.Model) -> None:
    index = d2llm.FlatIndex()
    index.add(model, [{"id": "a", "text": "No fields."}])
    assert describe_fields(index) == "The documents have no fields to filter by."
    more = [
        {"id": f"d{n}", "text": "Some text.", "price": n / 2, "tag": [f"t{n}"], "ok": n % 2 == 0, "note": "long " * 20,
         "a.b": 1, "deep": {"x.y": 1, "z": None, "n": {"m": "é"}}}
        for n in range(8)
    ]  # fmt: skip
    index.add(model, more)
    assert describe_fields(index) == (
        'Fields, with values of some documents: .deep.n.m ("é"); a.b (1); note (...); ok (false, true); price '
        '(numbers from 0.0 to 3.5); tag ("t0", "t1", "t2", "t3", "t4", "t5", ...).'
    )
