"""``python -m bench.walks [--markdown] [--json FILE] [--model FILE]``: which files and functions of edge_rt run.

Four walks:
- `token`: one greedy token of the native engine, from ``next(stream)`` to its event, after the first tokens. Of eight tokens the
  commonest walk is told.
- `open`: ``edge_rt.open`` of a model that was opened before, until it returns.
- `run`: `edge-rt run` in a fresh process, from its arguments to the first byte of the answer.
- `request`: a daemon that has answered before, from the client's request to the first event: up to the write that brought it, in the
  daemon's process, and up to the write before that in the worker's. The same model answers as in `run`: what is held to the target is
  the files that are not on that walk.

A function counts when its code runs: where the body of a module, or what it calls, runs because it is imported, it does not; such are
counted apart. Lambdas and comprehensions belong to the function around them. Exit status 1 if a walk has more than its target.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.checkouts import Daemon, Wire, default_model, environment
from bench.processes import PROGRAMS
from bench.results import save

TARGETS = {"token": 9, "open": 15, "run": 40, "request": 12}
"""Files that a walk may pass through; of `request`, those that `run` does not."""
REQUESTS = 3
"""Requests of which the last is traced."""
_TITLES = {
    "token": "One greedy token",
    "open": "Opening a model that was opened before",
    "run": "`edge-rt run`, from its arguments to the first byte",
    "request": "A request to the daemon, up to the write of its first event",
}
_TREE = Path(__file__).parents[1]
_INNER = re.compile(r"(\.<locals>)?\.<(lambda|listcomp|setcomp|dictcomp|genexpr)>.*")
_MESSAGES = [{"role": "user", "content": "Write a long story about a river."}]


@dataclass(frozen=True, slots=True)
class Place:
    """A file with its functions in the order of their first calls. ``process``: whose, where there are several."""

    process: str
    file: str
    functions: list[str]


@dataclass(frozen=True, slots=True)
class Walk:
    """``places`` in the order of first calls. ``importing``: functions that ran for an import. ``modules``: imported at the end, None where
    there are several processes. ``alike``: share of the tokens that were traced whose walk this is. ``known``: files that do not count
    against the target.
    """

    name: str
    target: int
    places: list[Place]
    importing: int
    modules: int | None = None
    alike: float = 1.0
    known: frozenset[str] = frozenset()

    @property
    def files(self) -> int:
        """Distinct ones."""
        return len({place.file for place in self.places})

    @property
    def counted(self) -> int:
        """Those that are held to the target."""
        return len({place.file for place in self.places} - self.known)

    @property
    def functions(self) -> int:
        """Distinct ones."""
        return len({(place.file, name) for place in self.places for name in place.functions})

    @property
    def folders(self) -> dict[str, int]:
        """Distinct files by the folder of edge_rt in which they are, most first; the package's own is ``.``."""
        files = {place.file for place in self.places}
        return dict(Counter(file.split("/")[0] if "/" in file else "." for file in files).most_common())


def main(arguments: Sequence[str] | None = None) -> int:
    """Take all walks, print them, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.walks", description="Trace what a token, an opening, a run and a request execute."
    )
    parser.add_argument("--markdown", action="store_true", help="print the lists of docs/architecture.md")
    parser.add_argument("--json", type=Path, help="write what was found to this file too")
    parser.add_argument("--model", type=Path, help="a GGUF file, instead of the SmolLM2 that edge-rt pull fetches")
    parser.add_argument("--tree", type=Path, default=_TREE, help="a checkout, instead of this one")
    options = parser.parse_args(arguments)
    tree = options.tree.resolve()
    walks = take(tree, options.model or default_model(tree))
    for walk in walks:
        print(markdown(walk) if options.markdown else listed(walk))
    if not options.markdown:
        print(table(walks))
    if options.json:
        save(options.json, [as_json(walk) for walk in walks])
    return int(any(walk.counted > walk.target for walk in walks))


def take(tree: Path, model: Path) -> list[Walk]:
    """All four. Raises RuntimeError if one cannot be taken."""
    _program(tree, "open", model)  # what a first opening finds out, later ones know
    token, opening, run = (_alone(tree, name, model) for name in ("token", "open", "run"))
    return [token, opening, run, replace(_request(tree, model), known=frozenset(place.file for place in run.places))]


# ---- tracing ---------------------------------------------------------------------------------------------------------


def _program(tree: Path, name: str, model: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the program of a walk tells, and what was traced of it."""
    with tempfile.TemporaryDirectory() as folder:
        env = _traced(tree, Path(folder))
        words = [sys.executable, str(PROGRAMS / "walk.py"), name, str(model)]
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the walk {name} failed with status {done.returncode}: {done.stderr.strip()[-1000:]}")
        lines = [line for part in read(Path(folder)).values() for line in part]
        return json.loads(done.stdout), lines


def _traced(tree: Path, folder: Path) -> dict[str, str]:
    """The environment of a process that is traced."""
    (folder / "gate").write_bytes(b"\0")
    return environment(tree, PROGRAMS / "traced", BENCH_WALK=str(folder), BENCH_WALK_PACKAGE=str(tree / "edge_rt"))


def read(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """What each process wrote down, by its id."""
    return {int(path.stem): [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in folder.glob("*.jsonl")}


def _alone(tree: Path, name: str, model: Path) -> Walk:
    """A walk of one process."""
    told, lines = _program(tree, name, model)
    if name != "run" and told["engine"] != "ggml":
        raise RuntimeError(f"the engine is {told['engine']}, and the walk is one of the native engine; what does `edge-rt inspect` say?")
    if not told["walks"]:
        raise RuntimeError("no step gave exactly one token")
    found = [(places([("", [line for line in lines if line["walk"] == walk])]), walk) for walk in told["walks"]]
    kinds = Counter(_key(one) for one, _ in found)
    chosen, times = kinds.most_common(1)[0]
    here, walk = next((one, walk) for one, walk in found if _key(one) == chosen)
    importing = _importing(line for line in lines if line["walk"] == walk)
    return Walk(name, TARGETS[name], here, importing, told["modules"], times / len(found))


def _key(found: Iterable[Place]) -> frozenset[tuple[str, str]]:
    return frozenset((place.file, name) for place in found for name in place.functions)


def _request(tree: Path, model: Path) -> Walk:
    """The last of a few requests, each on a connection that is open."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        daemon = stack.enter_context(Daemon(model, _traced(tree, folder)))
        wire = stack.enter_context(Wire(daemon.socket))
        gate = folder / "gate"
        for number in range(1, REQUESTS + 1):
            if number == REQUESTS:
                time.sleep(1.5)  # what the requests before have set going, watchdogs too, is over
                _set(gate, 1)
            wire.ask("generate", messages=_MESSAGES, options={"temperature": 0, "max_tokens": 8})
            answers = wire.answers()
            next(answers)
            arrived = time.monotonic_ns()
            _set(gate, 0)
            for _ in answers:
                pass
        server = read(folder).pop(daemon.pid)
        workers = {pid: lines for pid, lines in read(folder).items() if pid != daemon.pid and lines}
    if len(workers) != 1:
        raise RuntimeError(f"{len(workers)} processes beside the daemon's worked for the request, and not one")
    (worker,) = workers.values()
    brought = last_send(server, arrived)
    server = [line for line in server if line["t"] <= brought]
    worker = [line for line in worker if line["t"] <= last_send(worker, brought)]
    return Walk("request", TARGETS["request"], places([("daemon", server), ("worker", worker)]), _importing([*server, *worker]))


def _set(gate: Path, walk: int) -> None:
    with open(gate, "r+b") as file:  # in place: others have it mapped
        file.write(bytes([walk]))


def last_send(lines: Iterable[dict[str, Any]], before: int) -> int:
    """When the last write to a socket before a time began. Raises RuntimeError without one."""
    sends = [line["t"] for line in lines if line.get("sent") and line["t"] < before]
    if not sends:
        raise RuntimeError("the event came, and nothing was seen that sent it")
    return int(max(sends))


def places(processes: Iterable[tuple[str, Iterable[dict[str, Any]]]]) -> list[Place]:
    """Files with their functions in the order of first calls, over all processes."""
    called = [
        (line["t"], process, line) for process, lines in processes for line in lines if line.get("function") and not line["importing"]
    ]
    found: dict[tuple[str, str], dict[str, None]] = {}
    for _, process, line in sorted(called, key=lambda one: one[0]):
        found.setdefault((process, line["file"]), {})[outer(line["function"])] = None
    return [Place(process, file, list(functions)) for (process, file), functions in found.items()]


def outer(function: str) -> str:
    """The function to whose text a lambda or a comprehension belongs; itself if it is none, or belongs to no function."""
    return _INNER.sub("", function)


def _importing(lines: Iterable[dict[str, Any]]) -> int:
    return len({(line["file"], outer(line["function"])) for line in lines if line.get("importing")})


# ---- showing ---------------------------------------------------------------------------------------------------------


def listed(walk: Walk) -> str:
    """Every file with its functions."""
    lines = [f"--- {walk.name}"]
    for number, place in enumerate(walk.places, 1):
        where = f"{place.process}: {place.file}" if place.process else place.file
        lines.append(f"{number:3} {where}: {', '.join(place.functions)}")
    return "\n".join(lines) + "\n"


def markdown(walk: Walk) -> str:
    """A numbered list for docs/architecture.md: at most four functions of a file, and how many there are."""
    lines = [f"### {_TITLES[walk.name]}", ""]
    for number, place in enumerate(walk.places, 1):
        shown = ", ".join(f"`{name}`" for name in place.functions[:4])
        more = f" and {len(place.functions) - 4} more" if len(place.functions) > 4 else ""
        process = f"{place.process}: " if place.process else ""
        lines.append(f"{number}. {process}[{place.file}](../edge_rt/{place.file}): {shown}{more}")
    return "\n".join(lines) + "\n"


def as_json(walk: Walk) -> dict[str, Any]:
    """With its counts."""
    counts = {"files": walk.files, "counted": walk.counted, "functions": walk.functions, "folders": walk.folders}
    return {**asdict(walk), "known": sorted(walk.known), **counts}


def table(walks: Iterable[Walk]) -> str:
    """A line for each walk."""
    rows = [("walk", "files", "counted", "target", "met", "functions", "run by imports", "modules", "files by folder")]
    for walk in walks:
        name = walk.name if walk.alike == 1 else f"{walk.name} ({walk.alike:.0%} of the tokens)"
        met = "yes" if walk.counted <= walk.target else "no"
        modules = "" if walk.modules is None else str(walk.modules)
        folders = ", ".join(f"{folder} {count}" for folder, count in walk.folders.items())
        rows.append(
            (name, str(walk.files), str(walk.counted), str(walk.target), met, str(walk.functions), str(walk.importing), modules, folders)
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


if __name__ == "__main__":
    sys.exit(main())
