"""Whether a server, or a client, keeps to docs/protocol.md, as a program: ``python -m edge_rt.testing.protocol_conformance``.

    ... ADDRESS             checks the server there, which has a model and nothing else to do
    ... --client COMMAND... checks a client: a program as docs/clients.md asks for it

It needs nothing but Python, and shares no code with what it checks.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

from edge_rt.testing import protocol_checks, protocol_embedding_checks, protocol_scripts, protocol_stream_checks
from edge_rt.testing.protocol_checks import Server
from edge_rt.testing.protocol_peer import Broken

READY_SECONDS = 120.0
"""For a model that is being opened."""


def wait_until_ready(server: Server, seconds: float = READY_SECONDS) -> None:
    """Until its model is open. Raises Broken."""
    until = time.monotonic() + seconds
    with server.peer() as peer:
        while (worker := peer.ok("status").get("worker", {})).get("state") != "ready":
            if worker.get("state") in ("none", "failed") or time.monotonic() > until:
                raise Broken(f"the server has no model that is ready: {worker}")
            time.sleep(0.1)


def server_checks(server: Server) -> dict[str, Callable[[], None]]:
    """What a server must do, by name."""
    checks = (*protocol_checks.CHECKS, *protocol_stream_checks.CHECKS, *protocol_embedding_checks.CHECKS)
    return {check.__name__.replace("_", " "): partial(check, server) for check in checks}


def client_checks(command: list[str], seconds: float) -> dict[str, Callable[[], None]]:
    """What a client must do, by name."""
    return {name: partial(protocol_scripts.play, script, command, seconds) for name, script in protocol_scripts.SCRIPTS.items()}


def run(checks: dict[str, Callable[[], None]]) -> Iterator[tuple[str, str | None]]:
    """Each check with what is wrong, None if nothing is."""
    for name, check in checks.items():
        try:
            check()
        except (Broken, OSError) as error:
            yield name, str(error) or type(error).__name__
        except (KeyError, TypeError, ValueError) as error:  # a message without what it must have
            yield name, f"a message is not as in the document: {type(error).__name__}: {error}"
        else:
            yield name, None


def main(words: list[str] | None = None) -> int:
    """The program; its exit status: 0 if all is well, 1 if not, 2 if it could not be checked."""
    parser = argparse.ArgumentParser(prog="protocol_conformance", description="Check a server or a client of docs/protocol.md.")
    parser.add_argument("address", nargs="?", help="where the server listens: a path, abstract:NAME or tcp:127.0.0.1:PORT")
    parser.add_argument("--key", help="for TCP")
    parser.add_argument("--seconds", type=float, default=60.0, help="of one wait")
    parser.add_argument("--only", default="", help="checks with this in their name")
    parser.add_argument("--client", nargs=argparse.REMAINDER, help="check this program instead")
    given = parser.parse_args(words)
    if bool(given.address) == bool(given.client):
        parser.error("give an address, or --client and a command")
    if given.client:
        checks = client_checks(given.client, given.seconds)
    else:
        server = Server(given.address, given.key, given.seconds)
        checks = server_checks(server)
        try:
            wait_until_ready(server)
        except (Broken, OSError) as error:
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
