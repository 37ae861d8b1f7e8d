"""Try a running `d2llm serve` with odd requests, and with hostile clients while honest ones search.

    d2llm serve MODEL --qdrant ./qdrant --collection kb --writable --write-key KEY &
    python benchmarks/serve_fuzz.py http://localhost:8080 --key KEY --examples 300 --seconds 60

schemathesis draws requests from the service's own description, valid and damaged ones. No answer may be a server error,
and each must be as described. Then ten hostile clients work at once: slow bodies, half requests, silent connections,
wrong keys, huge and deep JSON, many connections, clients that leave, that do not read, and noise. Honest clients must
be answered meanwhile. Documents are added and removed: use a collection that is made for it. Prints a table for people,
and one line of JSON for machines. Exits with 1 if anything fails.
"""

from __future__ import annotations

import json
import os
import random
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import click
import httpx
import hypothesis
import numpy as np
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from d2llm.cli_options import echo_table

CHECKS = [not_a_server_error, response_schema_conformance, content_type_conformance, status_code_conformance]
QUERY = {"query": "how long does a refund take?"}


def odd_requests(address: str, key: str, examples: int) -> dict[str, Counter[int]]:
    """Send `examples` valid and as many damaged requests to each operation. Returns the statuses by operation.

    Raises:
        Failure: an answer is a server error or not as described; shows the smallest such request.
    """
    headers = {"Authorization": f"Bearer {key}"}
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json", headers=headers)
    statuses = dict[str, Counter[int]]()
    for found in schema.get_all_operations():
        operation: Any = found.ok()  # type: ignore[union-attr]  # an error raises here
        seen = statuses.setdefault(operation.label, Counter())
        for mode in schemathesis.GenerationMode:
            with suppress(hypothesis.errors.Unsatisfiable):  # nothing of the operation can be damaged
                _try(operation.as_strategy(generation_mode=mode), headers, seen, examples)
    return statuses


def _try(cases: Any, headers: dict[str, str], seen: Counter[int], examples: int) -> None:
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(cases)
    def attempt(case: Any) -> None:
        answer = case.call(headers=headers)
        seen[answer.status_code] += 1
        case.validate_response(answer, checks=CHECKS)

    attempt()


class Hostile:
    """Clients that mean no good, each until `stop` is set."""

    def __init__(self, address: str) -> None:
        self.address, self.stop = address, threading.Event()
        host, _, port = address.removeprefix("http://").partition(":")
        self._place = host, int(port or 80)

    def clients(self) -> list[Callable[[], None]]:
        """One function for each kind."""
        return [
            self.slow_bodies, self.half_requests, self.silent_connections, self.wrong_keys, self.huge_bodies,
            self.deep_json, self.many_connections, self.clients_that_leave, self.clients_that_do_not_read, self.noise,
        ]  # fmt: skip

    def slow_bodies(self) -> None:
        """A byte of the body a second."""
        with self._connection() as client:
            client.sendall(_head(10_000))
            while not self.stop.wait(1):
                client.sendall(b"a")

    def half_requests(self) -> None:
        """A header that never ends."""
        with self._connection() as client:
            client.sendall(b"POST /search HTTP/1.1\r\nHost: d2llm\r\n")
            while not self.stop.wait(0.5):
                client.sendall(b"X-More: more\r\n")

    def silent_connections(self) -> None:
        """A connection that says nothing."""
        with self._connection() as client:
            while not self.stop.is_set() and client.recv(10) != b"":
                pass

    def wrong_keys(self) -> None:
        """Keys that are guessed, as fast as possible."""
        with httpx.Client(base_url=self.address) as client:
            while not self.stop.is_set():
                client.post("/documents", json={"documents": []}, headers={"api-key": random.randbytes(16).hex()})

    def huge_bodies(self) -> None:
        """Bodies above every limit, with and without their length."""
        with httpx.Client(base_url=self.address, timeout=60) as client:
            while not self.stop.is_set():
                with suppress(httpx.TransportError):
                    client.post("/search", content=b'{"query": "' + b"a" * 50_000_000)
                with suppress(httpx.TransportError):
                    client.post("/search", content=iter([b"a" * 1_000_000] * 50))

    def deep_json(self) -> None:
        """JSON that is nested without end, or is all numbers."""
        bodies = [
            b"[" * 1_000_000,
            b'{"filter":' * 100_000,
            b'{"k":' + b"9" * 1_000_000 + b"}",
            b'{"queries":[' + b"1," * 500_000,
        ]
        with httpx.Client(base_url=self.address, timeout=60) as client:
            while not self.stop.is_set():
                for body in bodies:
                    client.post("/search", content=body, headers={"Content-Type": "application/json"})

    def many_connections(self) -> None:
        """500 connections at once, then as many again."""
        while not self.stop.wait(1):
            clients = [self._connection() for _ in range(500)]
            self.stop.wait(5)
            for client in clients:
                client.close()

    def clients_that_leave(self) -> None:
        """Searches whose answer nobody waits for."""
        while not self.stop.wait(0.05):
            with self._connection() as client:
                body = json.dumps(QUERY).encode()
                client.sendall(_head(len(body)) + body)

    def clients_that_do_not_read(self) -> None:
        """Requests one after another, whose answers fill every buffer."""
        with self._connection() as client:
            client.settimeout(1)
            body = json.dumps({**QUERY, "k": 100}).encode()
            while not self.stop.wait(0.05):
                with suppress(TimeoutError):
                    client.sendall(_head(len(body)) + body)

    def noise(self) -> None:
        """Bytes that are no HTTP."""
        while not self.stop.wait(0.05):
            with self._connection() as client:
                client.sendall(os.urandom(1000))

    def _connection(self) -> socket.socket:
        return socket.create_connection(self._place, timeout=30)

    def until_stopped(self, client: Callable[[], None]) -> None:
        """Be this client again and again: the service may close its connection."""
        while not self.stop.is_set():
            with suppress(OSError, httpx.HTTPError):
                client()
            self.stop.wait(0.1)


def _head(length: int) -> bytes:
    lines = ["POST /search HTTP/1.1", "Host: d2llm", "Content-Type: application/json", f"Content-Length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode()


def beside_hostile_clients(address: str, key: str, seconds: float, honest: int = 2) -> dict[str, float]:
    """Search by `honest` clients beside hostile ones of each kind. Returns how many were answered, and how fast.

    Raises:
        AssertionError: an answer is not 200.
    """
    hostile, times, failed = Hostile(address), list[float](), list[str]()

    def search() -> None:
        with httpx.Client(base_url=address, headers={"api-key": key}, timeout=60) as client:
            while not hostile.stop.is_set():
                start = time.perf_counter()
                try:
                    answer = client.post("/search", json=QUERY)
                except httpx.HTTPError as error:
                    failed.append(repr(error))
                    continue
                times.append(time.perf_counter() - start)
                if answer.status_code != 200:
                    failed.append(answer.text)

    threads = [threading.Thread(target=search) for _ in range(honest)]
    threads += [threading.Thread(target=hostile.until_stopped, args=(client,)) for client in hostile.clients()]
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    hostile.stop.set()
    for thread in threads:
        thread.join()
    assert not failed, f"{len(failed)} of {len(times)} honest requests failed: {failed[0]}"
    p50, p99 = np.percentile(times, [50, 99]) * 1e3
    return {"answered": len(times), "p50_ms": float(p50), "p99_ms": float(p99), "longest_ms": max(times) * 1e3}


@click.command()
@click.argument("address")
@click.option("--key", default="", help="The write key of the service.")
@click.option("--examples", default=200, show_default=True, help="Requests of each kind for each operation.")
@click.option("--seconds", default=30.0, show_default=True, help="How long the hostile clients work.")
def main(address: str, key: str, examples: int, seconds: float) -> None:
    """Try the service at ADDRESS."""
    statuses = odd_requests(address, key, examples)
    rows = [
        [label, ", ".join(f"{n} x {status}" for status, n in sorted(seen.items()))] for label, seen in statuses.items()
    ]
    echo_table(rows, header=["operation", "statuses"])
    beside = beside_hostile_clients(address, key, seconds)
    echo_table([[name, f"{value:.1f}"] for name, value in beside.items()], header=["beside hostile clients", ""])
    by_operation = {label: dict(seen) for label, seen in statuses.items()}
    print(json.dumps({"statuses": by_operation, "beside": beside}))
    if any(status >= 500 for seen in statuses.values() for status in seen):
        sys.exit(1)


if __name__ == "__main__":
    main()
