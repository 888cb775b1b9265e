"""The daemon process: listening sockets, start, and graceful end. An asyncio loop, without NumPy or native libraries."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from edge_rt.daemon.address import Listener, notify_systemd
from edge_rt.daemon.config import Config, HttpConfig
from edge_rt.daemon.connection import FramedConnection, TokenBucket
from edge_rt.daemon.models import check_model_name
from edge_rt.daemon.operations import Operations
from edge_rt.daemon.supervisor import TaskSet, WorkerExit, now

if TYPE_CHECKING:
    from edge_rt.daemon.recording import Recorder

ACCEPTED_AT_ONCE = 16  # clients accepted before other work has its turn
MIN_PAUSE = 0.02  # seconds between two batches of clients above the rate: waking up for each would cost more
EXHAUSTED_PAUSE = 1.0  # seconds until the next attempt when the system has no descriptors or memory left
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
CANCEL_SECONDS = 2.0  # for requests to end after they were cancelled because the daemon ends
MIN_WRITE_SECONDS = 1.0  # at least, for recorded traffic to be written at the end


class RateLimitedAcceptor:
    """Accepts clients of a listening socket at a limited rate, from its creation to ``close``.

    Clients that reconnect in a loop wait in the socket's backlog. Without a limit they occupy a CPU even if each is refused: on two CPUs,
    tokens of other requests took twice as long.
    """

    def __init__(self, listening: socket.socket, protocol: Callable[[], asyncio.Protocol], rate: float, burst: int) -> None:
        """``rate``: clients per second, 0 for no limit. ``protocol`` makes the asyncio protocol of a client."""
        self._loop = asyncio.get_running_loop()
        self._socket, self._protocol = listening, protocol
        self._bucket = TokenBucket(rate, burst, self._loop.time())
        self._tasks = TaskSet()
        self._paused: asyncio.TimerHandle | None = None
        self._loop.add_reader(listening, self._accept)

    def close(self) -> None:
        if self._paused is not None:
            self._paused.cancel()
        self._loop.remove_reader(self._socket)

    def _accept(self) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            if wait := self._bucket.take(self._loop.time()):
                self._pause(max(wait, MIN_PAUSE))
                return
            try:
                client, _ = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                logging.getLogger("edge_rt.daemon").error("nobody can be let in: %s", error.strerror)
                self._pause(EXHAUSTED_PAUSE)
                return
            client.setblocking(False)
            if client.family in (socket.AF_INET, socket.AF_INET6):
                # asyncio does so only if ``socket.proto`` is TCP, which it is not for accepted sockets. Without it a small answer waits
                # up to 40 ms for the delayed acknowledgement of the one before.
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._tasks.spawn(self._connect(client))

    async def _connect(self, client: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._protocol, client)
        except OSError:  # disconnected already
            client.close()

    def _pause(self, seconds: float) -> None:
        self._loop.remove_reader(self._socket)
        self._paused = self._loop.call_later(seconds, self._resume)

    def _resume(self) -> None:
        self._loop.add_reader(self._socket, self._accept)
        self._accept()


class Server(Operations):
    """Operations with listening sockets: ``listen``, optionally ``drain``, then ``close``."""

    def __init__(self, config: Config, recorder: Recorder | None = None) -> None:
        super().__init__(config, recorder)
        self._listeners: list[tuple[Listener, RateLimitedAcceptor]] = []

    async def listen(self, listeners: Sequence[Listener]) -> None:
        """Accept clients, and load the configured model. Raises UserError."""
        protocols: dict[bool, Callable[[], asyncio.Protocol]] = {False: partial(FramedConnection, self)}
        if any(one.http for one in listeners):
            from edge_rt.daemon.http.routes import connection_factory

            protocols[True] = connection_factory(self, self.config.http or HttpConfig())
        limits = self.config.limits
        for one in listeners:
            one.socket.setblocking(False)
            acceptor = RateLimitedAcceptor(one.socket, protocols[one.http], limits.connections_per_second, limits.connections)
            self._listeners.append((one, acceptor))
        for name, (model, options) in self.config.models.items():
            self.models.add(name, self.worker_spec(model, options))
        if self.config.model is not None:
            spec = self.worker_spec(self.config.model, self.config.model_options)
            check_model_name(self.config.model, spec, self.config.models)
            self.models.load(self.models.add_default(self.config.model, spec))

    async def drain(self) -> None:
        """Stop accepting clients and wait up to ``drain_seconds`` for pending requests; then cancel them."""
        self.draining = True
        notify_systemd("STOPPING=1")
        self.stop_listening()
        for stream in [one for one in self._running if one.connection is None]:
            self._abandon(stream)
        await self._wait_until_idle(self.config.drain_seconds)
        for stream in list(self._running):
            stream.hosted.supervisor.cancel(stream.number)
        await self._wait_until_idle(CANCEL_SECONDS)

    async def _wait_until_idle(self, seconds: float) -> None:
        until = now() + seconds
        while (self.quotas.requests or self.tasks) and now() < until:
            await asyncio.sleep(0.02)

    def stop_listening(self) -> None:
        for one, acceptor in self._listeners:
            acceptor.close()
            one.close()
        self._listeners.clear()

    async def close(self) -> None:
        self.draining = True
        self.stop_listening()
        await self.models.close(WorkerExit("draining", "the daemon has ended; ask again when it is back"))
        for connection in list(self._connections):
            connection.close()
        until = now() + 1.0
        while self._connections and now() < until:
            await asyncio.sleep(0.01)


async def serve(
    config: Config, listeners: Sequence[Listener], ready: Callable[[], object], recorder: Recorder | None = None
) -> None:  # fmt: skip
    """Serve until SIGTERM or SIGINT; a second one skips draining. ``ready`` is called when clients can connect. Closes ``recorder``.

    Raises UserError if the model is not found.
    """
    import signal

    server = Server(config, recorder)
    until = 0.0
    stop: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.put_nowait, int(number))
    loop.add_signal_handler(signal.SIGHUP, server.reload_rules)
    try:
        await server.listen(listeners)
        notify_systemd("READY=1")
        ready()
        beat = loop.create_task(_watchdog())
        await stop.get()
        until = loop.time() + config.drain_seconds
        draining, again = loop.create_task(server.drain()), loop.create_task(stop.get())
        await asyncio.wait((draining, again), return_when=asyncio.FIRST_COMPLETED)
        if again.done():
            until = 0.0
        for task in (draining, again, beat):
            task.cancel()
    finally:
        await server.close()
        if recorder is not None:
            await asyncio.to_thread(recorder.close, max(MIN_WRITE_SECONDS, until - loop.time()))


async def _watchdog() -> None:
    """Notify systemd's watchdog, if it is enabled (sd_watchdog_enabled(3))."""
    micro = os.environ.get("WATCHDOG_USEC", "")
    if not micro.isdigit() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return
    while True:
        notify_systemd("WATCHDOG=1")
        await asyncio.sleep(int(micro) / 2e6)
