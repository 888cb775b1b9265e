"""The daemon's life: from its start to the signal that ends it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence

from edge_rt.daemon import address as addresses
from edge_rt.daemon.address import Listener
from edge_rt.daemon.config import Config
from edge_rt.daemon.server import Server


async def serve(config: Config, listeners: Sequence[Listener], ready: Callable[[], object]) -> None:
    """Serve until a signal says to stop; ``ready`` is called when clients may come. Raises UserError if the model is not to be found."""
    import signal

    server = Server(config)
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
        draining, again = loop.create_task(server.drain()), loop.create_task(stop.get())
        await asyncio.wait((draining, again), return_when=asyncio.FIRST_COMPLETED)
        for task in (draining, again, beat):
            task.cancel()
    finally:
        await server.close()


async def _watchdog() -> None:
    """Tell systemd that the loop turns, if it asks to be told (sd_watchdog_enabled(3))."""
    micro = os.environ.get("WATCHDOG_USEC", "")
    if not micro.isdigit() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return
    while True:
        addresses.notify("WATCHDOG=1")
        await asyncio.sleep(int(micro) / 2e6)
