"""Runs the application on a socket: loads the model meanwhile, and stops when what is in flight is answered."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]  # a module elsewhere

from d2llm.errors import ArgumentError

from .app import Serving
from .connection import Connection
from .door import Door
from .service import Service

logger = logging.getLogger(__name__)

GRACE = 30
"""Seconds that requests in flight have to be answered after a signal to stop. Writes have as long as they take."""
BACKLOG = 2048
FILES = 65536
"""Connections and files that may be open at once, if the system allows so many."""


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens on this address.

    Raises:
        ArgumentError: the address is in use, is not one of this machine, or needs other rights.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
        )[0]
        # With its protocol named (which socket.create_server does not do): asyncio turns off Nagle's algorithm only
        # then, which otherwise delays every answer on an open connection by 40 ms.
        listener = socket.socket(family, kind, protocol)
        try:
            if os.name == "posix":  # elsewhere it would allow two services on one port
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
        return listener
    except OSError as error:
        raise ArgumentError(
            f"cannot listen on port {port} of {host} ({error.strerror}): choose another with --host and --port"
        ) from error


def _allow_files() -> None:
    """Raise the number of connections that may be open, which is 1,024 on many systems."""
    if resource is not None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class _Server(uvicorn.Server):
    """uvicorn's server, without its handlers of signals: they would end the process before the index is closed."""

    def __init__(self, config: uvicorn.Config, door: Door) -> None:
        super().__init__(config)
        self._door = door

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer what is in flight, then end. uvicorn alone would give writes as little time as everything else."""
        ending = asyncio.create_task(self._lose_patience())
        await super().shutdown(sockets)
        ending.cancel()
        if self.force_exit:  # uvicorn leaves it out then, and logs a traceback about that
            await self.lifespan.shutdown()

    async def _lose_patience(self) -> None:
        await asyncio.sleep(GRACE)
        await self._door.interrupt()
        for connection in [*self.server_state.connections]:  # their clients do not read the answers
            connection.transport.abort()


def run(
    serving: Serving,
    load: Callable[[], Service],
    listener: socket.socket,
    *,
    started: Callable[[Callable[[], object]], object] = lambda _: None,
) -> None:
    """Serve on `listener` until SIGTERM or Ctrl-C, then answer what is in flight. A second signal ends at once.

    A request has `GRACE` seconds to be answered. Writes that have begun have as long as they take.

    `load` runs in a thread, while the server answers 503 already.

    `started` is called with a function that stops the server, for callers in another thread.

    Raises:
        D2LLMError: see `load`.
    """
    _allow_files()
    config = uvicorn.Config(
        serving.app, log_config=None, access_log=False, server_header=False, ws="none", http=Connection
    )
    server = _Server(config, serving.door)

    def stop() -> None:
        again = server.should_exit
        logger.info("stopping at once" if again else "stopping: writes are finished, and what is in flight is answered")
        server.force_exit, server.should_exit = server.should_exit, True

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, stop)
        started(lambda: loop.call_soon_threadsafe(stop))
        answering = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            serving.service = await asyncio.to_thread(load)
            logger.info("ready: the model is loaded")
        finally:
            if serving.service is None:
                stop()
            await answering
            if serving.service is not None and not server.force_exit:
                await asyncio.to_thread(serving.service.close)
            logger.info("stopped")

    asyncio.run(serve())
