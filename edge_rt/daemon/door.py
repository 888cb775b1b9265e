"""Lets clients in at a listening socket, a limited number a second.

Whoever connects in a loop is then kept waiting by the system, in the socket's queue. Let in as fast as they come, and be it to be sent
away, they cost a CPU, which those who compute lack: on two CPUs others' tokens took twice as long.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable

from edge_rt.daemon.bucket import Bucket
from edge_rt.daemon.tasks import Tasks

AT_ONCE = 16
"""Clients let in before others have a turn."""
LEAST_WAIT = 0.02
"""Seconds: several come in then, as waking for each costs, too."""
FULL_WAIT = 1.0
"""Seconds until the next try when the system has no descriptors or memory left."""
_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Door:
    """Open from the beginning; made within a loop."""

    def __init__(self, listening: socket.socket, speaks: Callable[[], asyncio.Protocol], rate: float, burst: int) -> None:
        """``rate``: clients a second on average, 0: any number; ``burst``: at once. ``speaks`` makes the protocol of each."""
        self._loop = asyncio.get_running_loop()
        self._socket, self._speaks = listening, speaks
        self._bucket = Bucket(rate, burst, self._loop.time())
        self._tasks = Tasks()
        self._waiting: asyncio.TimerHandle | None = None
        self._loop.add_reader(listening, self._let_in)

    def close(self) -> None:
        """Let nobody in any more. The socket stays open."""
        if self._waiting is not None:
            self._waiting.cancel()
        self._loop.remove_reader(self._socket)

    def _let_in(self) -> None:
        for _ in range(AT_ONCE):
            if wait := self._bucket.take(self._loop.time()):
                self._shut(max(wait, LEAST_WAIT))
                return
            try:
                client, _ = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                logging.getLogger("edge_rt.daemon").error("nobody can be let in: %s", error.strerror)
                self._shut(FULL_WAIT)
                return
            client.setblocking(False)
            if client.family in (socket.AF_INET, socket.AF_INET6):
                # asyncio does so only for sockets that say that they are TCP's, which those let in here do not: a small answer would wait
                # until the client has acknowledged what it had before, which it puts off for 40 ms.
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._tasks.spawn(self._enter(client))

    async def _enter(self, client: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._speaks, client)
        except OSError:  # gone already
            client.close()

    def _shut(self, seconds: float) -> None:
        """For a while: the queue is the system's meanwhile."""
        self._loop.remove_reader(self._socket)
        self._waiting = self._loop.call_later(seconds, self._open_again)

    def _open_again(self) -> None:
        self._loop.add_reader(self._socket, self._let_in)
        self._let_in()
