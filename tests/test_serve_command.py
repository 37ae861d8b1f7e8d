"""The command `d2llm serve` as users start it: in a process of its own."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from serving import DOCUMENTS

import d2llm
from d2llm.cli import main
from d2llm.connectors import QdrantIndex

QUERY = "how long does a refund take?"
KEYS = {"D2LLM_READ_KEY": "reader", "D2LLM_WRITE_KEY": "writer"}


@pytest.fixture
def place(model: d2llm.Model, tmp_path: Path) -> Path:
    with QdrantIndex("kb", tmp_path / "qdrant") as index:
        index.add(model, DOCUMENTS)
    return tmp_path / "qdrant"


def command(model_folder: Path, place: Path | str, *more: str) -> list[str]:
    serve = [sys.executable, "-m", "d2llm", "serve", str(model_folder), "--threads", "1", "--port", "0"]
    return [*serve, "--qdrant", str(place), "--collection", "kb", *more]


class Process:
    """A running service, with the lines of its log."""

    def __init__(self, arguments: list[str], **environment: str) -> None:
        self.process = subprocess.Popen(
            arguments, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )  # fmt: skip
        self.lines: list[dict[str, Any]] = []
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        assert self._ready.wait(60), self.lines
        self.url = next(line for line in self.messages() if line.startswith("listening on ")).split()[-1]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(json.loads(line))
            if self.lines[-1].get("message", "").startswith("ready"):
                self._ready.set()

    def messages(self) -> list[str]:
        return [line["message"] for line in self.lines if "message" in line]

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        status = self.process.wait(30)
        self._thread.join()
        return status


@pytest.fixture
def start(model_folder: Path) -> Iterator[Callable[..., Process]]:
    with contextlib.ExitStack() as stack:

        def started(place: Path, *more: str, **environment: str) -> Process:
            process = Process(command(model_folder, place, *more), **environment)
            stack.callback(process.process.kill)
            return process

        yield started


def refused(arguments: list[str]) -> str:
    """What the command says when it does not start. In this process: each import of all parts takes seconds."""
    done = CliRunner().invoke(main, arguments[3:])
    assert done.exit_code in (1, 2) and isinstance(done.exception, SystemExit), done
    return " ".join(done.stderr.split())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_it_serves_logs_lines_of_json_and_stops_when_it_is_told(
    start: Callable[..., Process], place: Path, number: int, model: d2llm.Model
) -> None:
    service = start(place, **KEYS)
    body = {"query": QUERY, "k": 1}
    answer = httpx.post(f"{service.url}/search", json=body, headers={"api-key": "reader", "X-Request-ID": "one"})
    assert answer.json()["hits"][0]["id"] == "refund"
    assert httpx.post(f"{service.url}/search", json=body).status_code == 401
    info = httpx.get(f"{service.url}/info", headers={"api-key": "reader"}).json()
    assert info["collection"] == {"documents": 5, "name": "kb", "place": "folder", "status": "ready"}
    assert service.end(number) == 0
    assert any("this process alone holds the collection" in message for message in service.messages())
    line = next(line for line in service.lines if line.get("request_id") == "one")
    assert line["status"] == 200 and line["seconds"] > 0 and line["time"].endswith("+00:00")
    assert QUERY not in json.dumps(service.lines)
    with QdrantIndex("kb", place) as index:  # the folder is free again
        assert index.count() == len(DOCUMENTS)


def test_a_small_most_of_candidates_is_what_a_search_takes(start: Callable[..., Process], place: Path) -> None:
    service = start(place, "--max-k", "3", **KEYS)
    answer = httpx.post(f"{service.url}/search", json={"query": QUERY}, headers={"api-key": "reader"})
    assert answer.status_code == 200 and len(answer.json()["hits"]) == answer.json()["candidates"] == 3
    too_many = {"query": QUERY, "candidates": 4}
    answer = httpx.post(f"{service.url}/search", json=too_many, headers={"api-key": "reader"})
    assert answer.status_code == 422 and "at most 3 candidates, found 4" in answer.json()["error"]["message"]


def test_what_was_acknowledged_is_there_after_kill_9(start: Callable[..., Process], place: Path) -> None:
    service = start(place, "--writable", **KEYS)
    acknowledged: list[str] = []

    def write(worker: int) -> None:
        with contextlib.suppress(httpx.HTTPError):
            for number in range(1000):
                id_ = f"{worker}-{number}"
                documents = [{"id": id_, "text": f"The text of document {id_}."}]
                answer = httpx.post(
                    f"{service.url}/documents", json={"documents": documents}, headers={"api-key": "writer"}
                )
                assert answer.json()["added"] == 1
                acknowledged.append(id_)

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(3)]
    for thread in threads:
        thread.start()
    while len(acknowledged) < 30:
        pass
    service.end(signal.SIGKILL)
    for thread in threads:
        thread.join()
    with QdrantIndex("kb", place) as index:
        assert not set(acknowledged) - set(index.ids())


def test_who_may_write_can_begin_with_nothing(start: Callable[..., Process], tmp_path: Path) -> None:
    service = start(tmp_path / "new", "--writable", **KEYS)
    assert any("the collection kb is empty" in message for message in service.messages())
    httpx.post(f"{service.url}/documents", json={"documents": DOCUMENTS}, headers={"api-key": "writer"})
    found = httpx.post(f"{service.url}/search", json={"query": QUERY, "k": 1}, headers={"api-key": "reader"})
    assert found.json()["hits"][0]["id"] == "refund"


def test_what_cannot_be_served_is_said_at_once(
    start: Callable[..., Process], model_folder: Path, place: Path, tmp_path: Path, model: d2llm.Model
) -> None:
    assert "--collection" in refused(command(model_folder, place)[:-2])
    missing = [*command(model_folder, place)[:-1], "other"]
    assert "other" in refused(missing) and "d2llm index" in refused(missing)
    assert "is not a d2llm model" in refused(command(tmp_path, place))
    assert "needs a key for writing" in refused(command(model_folder, place, "--writable"))
    with QdrantIndex("strange", place) as index:
        index.open_for(replace(model.config, fingerprint="0123456789abcdef"))
    assert "made with passage encoder 0123456789abcdef" in refused([*command(model_folder, place)[:-1], "strange"])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        message = refused(command(model_folder, place, "--port", str(taken.getsockname()[1])))
        assert "cannot listen on port" in message and "--port" in message
    assert "cannot reach Qdrant" in refused(command(model_folder, "http://127.0.0.1:9", "--grpc-port", "0"))
    service = start(place)
    assert "in use" in refused(command(model_folder, place))
    assert httpx.get(f"{service.url}/health").status_code == 200
