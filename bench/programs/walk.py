"""Takes a walk that `bench.walks` traces: opens its gate, does one thing, shuts it; prints what is to be told of it as JSON.

Usage: walk.py token|open|run MODEL
"""

import io
import json
import mmap
import os
import sys

TOKENS = 8
"""How many tokens are traced, each a walk of its own."""
PROMPT = "Write a long story about a river."


class Gate:
    """The file by which all traced processes know which walk is under way."""

    def __init__(self) -> None:
        with open(os.path.join(os.environ["BENCH_WALK"], "gate"), "r+b") as file:
            self._byte = mmap.mmap(file.fileno(), 1)

    def set(self, walk: int) -> None:
        """0: none."""
        self._byte[0] = walk


class FirstWrite(io.RawIOBase):
    """Standard output, whose first byte ends the walk."""

    def __init__(self, gate: Gate) -> None:
        self._gate, self.modules = gate, None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1

    def write(self, data) -> int:
        self._gate.set(0)
        if self.modules is None:
            self.modules = modules()
        return len(data)


def modules() -> int:
    """Modules of edge_rt that are imported now."""
    return sum(name.split(".")[0] == "edge_rt" for name in sys.modules)


def token(model: str) -> dict:
    """Tokens of an answer, each one ``next``."""
    import edge_rt
    from edge_rt.types import Delta

    gate = Gate()
    with edge_rt.open(model) as opened, opened.session() as session:
        events = session.generate([{"role": "user", "content": PROMPT}], temperature=0, ignore_eos=True, max_tokens=8 * TOKENS)
        deltas = 0
        while deltas < TOKENS:  # the first steps measure, and import
            deltas += isinstance(next(events), Delta)
        walks = []
        for walk in range(1, TOKENS + 1):
            gate.set(walk)
            event = next(events)
            gate.set(0)
            if isinstance(event, Delta) and len(event.tokens) == 1:
                walks.append(walk)
        events.close()
        return {"walks": walks, "engine": opened.info.engine, "modules": modules()}


def opening(model: str) -> dict:
    """Until ``edge_rt.open`` returns."""
    import edge_rt

    gate = Gate()
    gate.set(1)
    opened = edge_rt.open(model)
    gate.set(0)
    with opened:
        return {"walks": [1], "engine": opened.info.engine, "modules": modules()}


def run(model: str) -> dict:
    """`edge-rt run`, until the first byte of the answer."""
    gate = Gate()
    out = FirstWrite(gate)
    kept, sys.stdout = sys.stdout, io.TextIOWrapper(io.BufferedWriter(out), encoding="utf-8")
    gate.set(1)
    from edge_rt.cli.main import main

    status = main(["run", "-m", model, "-n", "8", "--temp", "0", PROMPT])
    gate.set(0)
    sys.stdout = kept
    if status:
        raise SystemExit(status)
    return {"walks": [1], "modules": out.modules}


print(json.dumps({"token": token, "open": opening, "run": run}[sys.argv[1]](sys.argv[2])))
