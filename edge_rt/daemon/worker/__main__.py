"""The worker process: ``python -m edge_rt.daemon.worker DESCRIPTOR``, started by the daemon with one end of a pair of sockets.

A thread reads commands, and applies at once what cannot wait for a step: cancelling, credits, the question whether anything moves. The
main thread owns the model. When the daemon is gone, the process ends, whatever it is at.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from queue import Empty, SimpleQueue

from edge_rt.daemon.protocol import FrameReader, Message, pack_answer
from edge_rt.daemon.worker.engine import WorkerEngine

BETWEEN_STEPS = 0.005  # seconds for commands between two steps, while somebody generates; what is left over then waits for the next
SWITCH_EVERY = 0.0005
"""Seconds that a thread may hold Python's lock while another wants it. A step lets go of it some ten times, and would wait as often for
a thread that chooses what stays of a long prompt: by default 0.005 seconds each time, which is as long as a step.
"""


class WorkerLoop:
    """Carries out commands between the engine's steps, and writes the answers."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._held_back: list[bytes] | None = None  # what a step has to say, until it is over
        self._thread = threading.get_ident()
        self._queue: SimpleQueue[Message] = SimpleQueue()
        self._idle = False
        self._engine = WorkerEngine(self._send, self._queue.put)

    def run(self) -> None:
        """Work until the daemon is gone; does not return."""
        threading.Thread(target=self._read, name="edge-rt commands", daemon=True).start()
        while True:
            self._handle_commands(wait=not self._step())

    def _step(self) -> bool:
        """A step; whether there was one to take. What it has to say goes out in one write."""
        self._held_back = []
        try:
            return self._engine.step()
        finally:
            said, self._held_back = self._held_back, None
            if said:
                self._write(b"".join(said))

    def _handle_commands(self, *, wait: bool) -> None:
        """Carry out commands that have come; with ``wait``, at least one, unless it is time for something else."""
        until = time.monotonic() + BETWEEN_STEPS
        if wait:
            self._idle = True
            try:
                command = self._queue.get(timeout=self._engine.wait_seconds())
            except Empty:
                return
            finally:
                self._idle = False
            self._engine.handle(command)
        try:
            while time.monotonic() < until:
                self._engine.handle(self._queue.get_nowait())
        except Empty:
            return

    def _send(self, message: Message) -> None:
        """On any thread. What the main thread says in a step goes out with its end: each write would wake the daemon, beside the threads
        that compute.
        """
        data = pack_answer(message)
        if self._held_back is not None and threading.get_ident() == self._thread:
            self._held_back.append(data)
        else:
            self._write(data)

    def _write(self, data: bytes) -> None:
        try:
            with self._sending:
                self._connection.sendall(data)
        except OSError:
            os._exit(0)

    def _read(self) -> None:
        frames = FrameReader()
        while True:
            try:
                data = self._connection.recv(1 << 18)
            except OSError:
                data = b""
            if not data:
                os._exit(0)
            for command in frames.feed(data):
                self._receive(command)

    def _receive(self, command: Message) -> None:
        """A command has come, on the reading thread. ``ping`` is for it, some are for both, the rest for the main thread."""
        engine, requests = self._engine, self._engine.requests
        match command["op"]:
            case "ping":
                idle = self._idle and self._queue.empty()
                beats = engine.beats + resource.getrusage(resource.RUSAGE_SELF).ru_majflt  # who waits for a disk gets on, too
                self._send({"beats": beats, "idle": idle, "expected": engine.expected})
                return
            case "generate" | "embed" | "score":
                requests.register(command)
            case "cancel":
                requests.cancel(command["request"])
            case "resume":
                requests.add_credits(command["request"], command["events"])
            case "drop":
                requests.mark_unwanted(command["request"])
        self._queue.put(command)


def main() -> None:
    """Serve the daemon at the other end of the descriptor that is the first argument."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # sent to the whole group; the daemon says what becomes of us
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # writing gigabytes of weights would hide our death from the daemon for long
    logging.basicConfig(level=(os.environ.get("EDGE_RT_LOG") or "warning").upper(), format="%(levelname)s %(name)s: %(message)s")
    from edge_rt.native.memory import steady_malloc

    steady_malloc()
    sys.setswitchinterval(SWITCH_EVERY)
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    WorkerLoop(connection).run()


if __name__ == "__main__":
    main()
