"""Checks whether a server or a client keeps to docs/protocol.md.

    python clients/conformance/conformance.py ADDRESS              a server, which has a model and nothing else to do
    python clients/conformance/conformance.py --client COMMAND...  a client: a program as docs/clients.md describes it

The checks need Python 3.10 and nothing else, and share no code with what they check.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

from client_checks import SCRIPTS, run_script
from protocol_peer import ConformanceError, Server
from server_checks import CHECKS

READY_SECONDS = 120.0
"""How long a server may take to open its model."""


def wait_until_ready(server: Server, seconds: float = READY_SECONDS) -> None:
    """Wait until the server's model is open. Raises ConformanceError if it has none, or after ``seconds``."""
    until = time.monotonic() + seconds
    with server.peer() as peer:
        while (worker := peer.ok("status").get("worker", {})).get("state") != "ready":
            if worker.get("state") in ("none", "failed") or time.monotonic() > until:
                raise ConformanceError(f"the server has no model that is ready: {worker}")
            time.sleep(0.1)


def server_checks(server: Server) -> dict[str, Callable[[], None]]:
    """All checks of a server, by name."""
    return {name: partial(check, server) for name, check in CHECKS.items()}


def client_checks(command: list[str], seconds: float) -> dict[str, Callable[[], None]]:
    """All checks of a client's program, by name. ``seconds``: longest wait for a message."""
    return {name: partial(run_script, script, command, seconds) for name, script in SCRIPTS.items()}


def run(checks: dict[str, Callable[[], None]]) -> Iterator[tuple[str, str | None]]:
    """Run checks one after another; yields the name of each and what is wrong, None if nothing is."""
    for name, check in checks.items():
        try:
            check()
        except (ConformanceError, OSError) as error:
            yield name, str(error) or type(error).__name__
        except (KeyError, TypeError, ValueError) as error:  # a message without what it must have
            yield name, f"a message is not as in the document: {type(error).__name__}: {error}"
        else:
            yield name, None


def main(argv: list[str] | None = None) -> int:
    """Print a line for each check. Returns the exit status: 0 if all hold, 1 if not, 2 if the server cannot be checked."""
    parser = argparse.ArgumentParser(prog="conformance.py", description="Check a server or a client of docs/protocol.md.")
    parser.add_argument("address", nargs="?", help="where the server listens: a path, abstract:NAME or tcp:127.0.0.1:PORT")
    parser.add_argument("--key", help="for TCP")
    parser.add_argument("--seconds", type=float, default=60.0, help="longest wait for a message (default 60)")
    parser.add_argument("--only", default="", help="run only the checks with this in their name")
    parser.add_argument("--client", nargs=argparse.REMAINDER, help="check this program instead")
    given = parser.parse_args(argv)
    if bool(given.address) == bool(given.client):
        parser.error("give an address, or --client and a command")
    if given.client:
        checks = client_checks(given.client, given.seconds)
    else:
        server = Server(given.address, given.key, given.seconds)
        checks = server_checks(server)
        try:
            wait_until_ready(server)
        except (ConformanceError, OSError) as error:
            print(f"cannot check {given.address}: {error}", file=sys.stderr)
            return 2
    results = {}
    for name, wrong in run({name: check for name, check in checks.items() if given.only in name}):
        print(f"ok      {name}" if wrong is None else f"FAILED  {name}: {wrong}", flush=True)
        results[name] = wrong
    failed = sum(wrong is not None for wrong in results.values())
    print(f"{len(results) - failed} of {len(results)} hold")
    return int(failed > 0 or not results)


if __name__ == "__main__":
    sys.exit(main())
