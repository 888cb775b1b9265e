"""The daemon's life: from its start to the signal that ends it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from edge_rt.daemon import address as addresses
from edge_rt.daemon.address import Listener
from edge_rt.daemon.config import Config
from edge_rt.daemon.server import Server

if TYPE_CHECKING:
    from edge_rt.daemon.traffic.recorder import Recorder

LEAST_SECONDS = 1.0
"""That are left for recorded traffic to be written, however the daemon ends."""


async def serve(
    config: Config, listeners: Sequence[Listener], ready: Callable[[], object], recorder: Recorder | None = None
) -> None:  # fmt: skip
    """Serve until a signal says to stop; ``ready`` is called when clients may come. ``recorder`` is closed at the end.

    Raises UserError if the model is not to be found.
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
        addresses.notify("READY=1")
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
            await asyncio.to_thread(recorder.close, max(LEAST_SECONDS, until - loop.time()))


async def _watchdog() -> None:
    """Tell systemd that the loop turns, if it asks to be told (sd_watchdog_enabled(3))."""
    micro = os.environ.get("WATCHDOG_USEC", "")
    if not micro.isdigit() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return
    while True:
        addresses.notify("WATCHDOG=1")
        await asyncio.sleep(int(micro) / 2e6)
