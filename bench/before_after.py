"""``python -m bench.before_after OLD NEW [--rounds N] [--model FILE] [--json FILE]``: is one checkout slower or larger than another?

Each round measures each thing with both, a process of one after a process of the other; every other round runs backwards, and one round
before them does not count. What is told is the median of the ratios new / old, with their spread (inter-quartile range / median) and the
uncertainty of the median that follows (1.57 × spread / √rounds, about 95 %). A median that is more than 2 % worse is flagged, and the exit
status is 1; where the uncertainty reaches the limit from either side, the flag says so, and more rounds or a quieter machine decide.

- `import edge_rt`, and `edge-rt --help` from the process's start to its end
- `first token`: `edge-rt run` with a short prompt, from the process's start to the first byte of the answer
- `prefill`, `decode`, `peak memory`: of one `edge-rt run` with a prompt of some 700 tokens and 128 tokens of an answer
- `request`, `http request`: a daemon that has answered before, from a request on a connection that is open to the first event, or chunk;
  the median of many requests to two daemons in turn. The prompt's cells are there already, so that the engine has little to do.

Both are driven by the command line and the daemon's sockets alone, so any two checkouts can be compared that have these.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from bench.checkouts import Daemon, Web, Wire, command, default_model, environment, run
from bench.results import save
from bench.timing import ratios, spread, wait_until_quiet

LIMIT = 0.02
"""By how much a median ratio may be worse."""
OLD, NEW = "old", "new"
REQUESTS = 40
"""Requests to a daemon whose median is one sample, after WARM ones that do not count."""
WARM = 5
_NOTCH = 1.57
"""Times the inter-quartile range, by the root of how many there are: half the width of a 95 % interval of a median (McGill)."""
_SHORT = "Name the capital of France."
_LONG = (
    "The river runs from the hills to the sea, and on its banks stand villages whose people mend nets, bake bread and tell old stories. "
    * 24
)
_ANSWER = 128
_IMPORT = "import time; t = time.perf_counter(); import edge_rt; print(time.perf_counter() - t)"
_MESSAGES = [{"role": "user", "content": _SHORT}]
_GREEDY: Mapping[str, Any] = {"temperature": 0, "max_tokens": 2}


class Checkout(NamedTuple):
    """What is measured: a tree, with a model."""

    tree: Path
    model: Path

    @property
    def env(self) -> dict[str, str]:
        """Of its processes."""
        return environment(self.tree)


class Quantity(NamedTuple):
    """Its name, its unit, and whether more of it is better."""

    name: str
    unit: str
    more: bool = False


class Row(NamedTuple):
    """A quantity of both: medians, the median ratio new / old and its spread, whether that is worse by more than LIMIT, and whether the
    uncertainty of the median leaves that open.
    """

    name: str
    unit: str
    old: float
    new: float
    ratio: float
    spread: float
    error: float
    worse: bool
    unsure: bool


Samples = dict[Quantity, float]


def _imports(checkout: Checkout) -> Samples:
    took = run([sys.executable, "-c", _IMPORT], checkout.env)
    return {Quantity("import edge_rt", "ms"): float(took.output) * 1e3}


def _help(checkout: Checkout) -> Samples:
    return {Quantity("edge-rt --help", "ms"): run(command("--help"), checkout.env).end * 1e3}


def _first_token(checkout: Checkout) -> Samples:
    words = command("run", "-m", str(checkout.model), "-n", "1", "--temp", "0", _SHORT)
    return {Quantity("first token", "ms"): run(words, checkout.env).first * 1e3}


def _answer(checkout: Checkout) -> Samples:
    """A long prompt and a long answer, by what `run --json` tells of them. Raises RuntimeError if the answer ended early."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(_LONG)
        file.flush()
        words = command("run", "-m", str(checkout.model), "-n", str(_ANSWER), "--temp", "0", "--raw", "--json", "-f", file.name)
        ran = run(words, checkout.env)
    done = next(event for event in map(json.loads, ran.output.splitlines()) if event["event"] == "done")
    use, times = done["usage"], done["timings"]
    if use["completion_tokens"] < _ANSWER // 2:
        raise RuntimeError(f"the answer ended after {use['completion_tokens']} tokens ({done['reason']}), and its rate says nothing")
    return {
        Quantity("prefill", "tokens/s", more=True): use["computed_tokens"] / times["prompt"],
        Quantity("decode", "tokens/s", more=True): (use["completion_tokens"] - 1) / times["decode"],
        Quantity("peak memory", "MB"): ran.peak / 1e6,
    }


def _daemons(checkouts: Mapping[str, Checkout], order: Sequence[str]) -> dict[str, Samples]:
    """A daemon of each, which are asked in turn: what disturbs one disturbs the other, and who is not asked computes nothing."""
    with contextlib.ExitStack() as stack:
        asked: dict[str, dict[Quantity, Callable[[], float]]] = {}
        for name in order:
            daemon = stack.enter_context(Daemon(checkouts[name].model, checkouts[name].env))
            wire = stack.enter_context(Wire(daemon.socket))
            web = stack.enter_context(contextlib.closing(Web(daemon.http)))
            http = partial(web.first_chunk, messages=_MESSAGES, **_GREEDY)
            asked[name] = {Quantity("request", "ms"): partial(_first_event, wire), Quantity("http request", "ms"): http}
        took: dict[str, dict[Quantity, list[float]]] = {name: {} for name in order}
        for number in range(WARM + REQUESTS):
            for quantity in asked[order[0]]:
                for name in order if number % 2 else order[::-1]:
                    took[name].setdefault(quantity, []).append(asked[name][quantity]())
        return {name: {quantity: median(values[WARM:]) * 1e3 for quantity, values in of.items()} for name, of in took.items()}


def _first_event(wire: Wire) -> float:
    """Seconds to the first event; the others are taken too."""
    started = time.perf_counter()
    wire.ask("generate", messages=_MESSAGES, options=_GREEDY)
    answers = wire.answers()
    next(answers)
    seconds = time.perf_counter() - started
    for _ in answers:
        pass
    return seconds


MEASURES: Sequence[tuple[Callable[[Checkout], Samples], int]] = ((_imports, 3), (_help, 3), (_first_token, 3), (_answer, 1))
"""Each is a process of one checkout; and how often in a round, in turn: short ones are easily disturbed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, and return the exit status."""
    options = _parser().parse_args(arguments)
    old, new = options.old.resolve(), options.new.resolve()
    for tree in (old, new):
        if not (tree / "edge_rt" / "__init__.py").exists():
            print(f"error: {tree} is no checkout of edge-rt: it has no edge_rt/__init__.py", file=sys.stderr)
            return 2
    model = (options.model or default_model(old)).resolve()
    warning = wait_until_quiet(options.wait)
    found = measure({OLD: Checkout(old, model), NEW: Checkout(new, model)}, options.rounds)
    rows = compared(found)
    print(table(rows))
    if warning:
        print(f"note: {warning}")
    if options.json:
        when = datetime.now(timezone.utc).isoformat(timespec="seconds")
        named = {name: {quantity.name: values for quantity, values in samples.items()} for name, samples in found.items()}
        told = {"when": when, "model": model.name, "rounds": options.rounds, "limit": LIMIT, "note": warning}
        save(options.json, {**told, "rows": [row._asdict() for row in rows], "samples": named})
    return int(any(row.worse for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.before_after", description="Compare the speed and memory of two checkouts.")
    parser.add_argument("old", type=Path, help="the checkout to compare with")
    parser.add_argument("new", type=Path, help="the checkout that must not be worse")
    parser.add_argument("--rounds", type=_rounds, default=15, help="how often each is measured (default: 15, at 10 to 20 s for both)")
    parser.add_argument("--model", type=Path, help="a GGUF file, instead of the SmolLM2 that edge-rt pull fetches")
    parser.add_argument("--json", type=Path, help="write every sample to this file too")
    parser.add_argument("--wait", type=float, default=60.0, help="seconds to wait for a quiet machine (default: 60)")
    return parser


def _rounds(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError("there must be one")
    return number


def measure(checkouts: Mapping[str, Checkout], rounds: int) -> dict[str, dict[Quantity, list[float]]]:
    """Samples of each checkout: one a round, or as many as the measure takes."""
    found: dict[str, dict[Quantity, list[float]]] = {name: {} for name in checkouts}
    for number in range(rounds + 1):
        order = list(checkouts) if number % 2 else list(checkouts)[::-1]
        for one, times in MEASURES:
            for name in order * times:
                samples = one(checkouts[name])
                if number:  # the round before fills caches
                    for quantity, value in samples.items():
                        found[name].setdefault(quantity, []).append(value)
        for name, samples in _daemons(checkouts, order).items():
            if number:
                for quantity, value in samples.items():
                    found[name].setdefault(quantity, []).append(value)
        print(f"round {number} of {rounds}", file=sys.stderr)
    return found


def compared(found: Mapping[str, Mapping[Quantity, Sequence[float]]]) -> list[Row]:
    """A row for each quantity. Raises ValueError if the checkouts' rounds do not match."""
    rows = []
    for quantity, before in found[OLD].items():
        after = found[NEW][quantity]
        ratio = spread(ratios(after, before))
        error = _NOTCH * ratio.spread * ratio.median / len(before) ** 0.5
        beyond = (1 - LIMIT) - ratio.median if quantity.more else ratio.median - (1 + LIMIT)
        medians = spread(before).median, spread(after).median
        rows.append(Row(*quantity[:2], *medians, ratio.median, ratio.spread, error, beyond > 0, abs(beyond) < error))
    return rows


def table(rows: Sequence[Row]) -> str:
    """A line for each row."""
    cells = [("what", "unit", OLD, NEW, "new / old", "±", "spread", "")]
    for row in rows:
        flag = f"worse by more than {LIMIT:.0%}" if row.worse else ""
        flag = ("perhaps " + flag if flag else "not shown to be within the limit") if row.unsure else flag
        medians = f"{row.old:.4g}", f"{row.new:.4g}"
        cells.append((row.name, row.unit, *medians, f"{row.ratio:.3f}", f"{row.error:.3f}", f"{row.spread:.1%}", flag))
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells)


if __name__ == "__main__":
    sys.exit(main())
