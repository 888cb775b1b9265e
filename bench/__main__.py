"""``python -m bench [NAMES] [--quick] [--json FILE]`` measures; ``python -m bench report`` writes the pages in docs."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench.results import RESULTS, Result, Settings, load_all, save, to_json
from edge_rt.errors import EdgeError

BENCHMARKS = {
    "small": ("sizes", "small"),
    "large": ("sizes", "large"),
    "equality": ("equality", "run"),
    "decode": ("decode", "short"),
    "decode-4096": ("decode", "long"),
    "prefill": ("prefill", "run"),
    "opening": ("opening", "run"),
    "cold": ("cold", "run"),
    "limited": ("limited", "run"),
    "start": ("start", "run"),
    "speculation": ("speculation", "run"),
    "contention": ("contention", "run"),
    "pruning": ("pruning", "run"),
    "predictions": ("predictions", "run"),
    "compiled": ("compiled", "run"),
    "compiled-quality": ("compiled", "quality"),
    "quantised": ("distilled", "quantised"),
    "saturation": ("distilled", "saturation"),
    "compensation": ("distilled", "overhead"),
    "student": ("students", "run"),
    "sandbox": ("sandbox", "run"),
    "harness": ("harness", "run"),
    "replay": ("serve.replayed", "run"),
    "context-retrieval": ("context.retrieval", "run"),
    "context-conversations": ("context.conversing", "run"),
    "context-perplexity": ("context.perplexity", "run"),
    "pruning-retrieval": ("context.pruned", "retrieval"),
    "pruning-unasked": ("context.unasked", "run"),
    "pruning-perplexity": ("context.pruned", "perplexity"),
    "redaction-leaks": ("post.leaking", "run"),
    "redaction-presidio": ("post.presidio", "run"),
    "post-overhead": ("post.overhead", "run"),
    "serve-start": ("serve.starting", "run"),
    "serve-idle": ("serve.idle", "run"),
    "serve-faults": ("serve.faults", "run"),
    "serve-isolation": ("serve.isolation", "run"),
    "serve-hostile": ("serve.hostile", "run"),
    "serve-soak": ("serve.soak", "run"),
    "serve-throughput": ("serve.throughput", "run"),
    "serve-fairness": ("serve.fairness", "run"),
}
"""Name -> module and function. Each ends by itself within ten minutes, or within its limit of ``LIMITS``."""
QUALITY = (
    "context-conversations", "context-retrieval", "context-perplexity", "pruning-retrieval", "pruning-unasked", "pruning-perplexity",
    "pruning",
)  # fmt: skip
"""Those of context handling."""
POST = ("redaction-leaks", "redaction-presidio", "post-overhead")
"""Those of post-processing."""
DISTILLED = ("quantised", "saturation", "compensation", "student")
"""Those of quantisation, its compensation, and a student."""
EVALUATION = ("sandbox", "harness", "replay")
"""What docs/evaluation.md and docs/replay.md tell of."""
ADAPTATION = ("contention", "predictions", "compiled", "compiled-quality")
"""Those of the compiler and the governor."""
SERVE = tuple(name for name in BENCHMARKS if name.startswith("serve-"))
"""Those of the daemon."""
SPEED = tuple(name for name in BENCHMARKS if name not in QUALITY + POST + SERVE + ADAPTATION + DISTILLED + EVALUATION)
"""The others."""
SCORES = (*QUALITY[:-1], POST[0], "serve-isolation", "quantised", "saturation", "sandbox", "harness")
"""Those whose figures are scores, which a busy machine does not change."""
LIMITS = {
    "small": 1200, "large": 1800, "predictions": 1800, "quantised": 3600, "saturation": 5400, "sandbox": 5400, "harness": 1800,
    "replay": 5400, "serve-isolation": 3600, "serve-faults": 1800, "serve-soak": 3600,
}  # fmt: skip
"""Seconds of those that take longer than others by what they are to show."""
_SECONDS, _QUICK_SECONDS = 400.0, 30.0
"""After this long a benchmark begins no further round."""
_LIMIT = 590
"""After this many seconds a benchmark is ended, whatever it is doing."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and return the exit status: 1 if a requirement was not met."""
    options = _parser().parse_args(arguments)
    if options.names == ["report"]:
        return _report()
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        print(f"error: there is no benchmark {unknown[0]}; choose from {', '.join(BENCHMARKS)}, or report", file=sys.stderr)
        return 2
    stored: dict[str, Any] = {}
    failed = False
    for name in options.names or BENCHMARKS:
        try:
            with _at_most(LIMITS.get(name, _LIMIT)):
                found = _measure(name, options)
        except (TimeoutError, RuntimeError, OSError, EdgeError) as error:  # one benchmark that cannot run must not cost the others
            print(f"FAIL {name}: {error}", file=sys.stderr)
            failed = True
            continue
        stored[name] = found
        failed |= any(result["ok"] is False for result in found["results"])
        if not options.quick:
            save(RESULTS / f"{name}.json", found)
    if options.json:
        save(options.json, stored)
    if not options.names and not options.quick:
        _report()
    return int(failed)


@contextlib.contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the block after this long. Processes it started end with it."""

    def give_up(_signal: int, _frame: object) -> None:
        raise TimeoutError(f"ended after {seconds} s; is the machine busy?")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Compare edge-rt with llama-cpp-python on this machine.")
    parser.add_argument("names", nargs="*", help=f"{', '.join(BENCHMARKS)} (default: all), or report")
    parser.add_argument("--quick", action="store_true", help="prove that everything runs; the figures mean nothing and are not stored")
    parser.add_argument("--json", type=Path, help="write the results to this file too")
    parser.add_argument("--model", type=Path, help="SmolLM2-135M-Instruct Q4_1, instead of the one that edge-rt pull fetches")
    parser.add_argument("--student", type=Path, help="a student that `edge-rt distill run` made (default: that of the demo run)")
    parser.add_argument("--memory-group", type=Path, help="directory of a memory cgroup in which `limited` may make groups")
    parser.add_argument("--items", type=int, help="texts, conversations or secrets that a benchmark of scores uses")
    parser.add_argument("--minutes", type=float, help="how long the daemon is soaked (default: 20)")
    parser.add_argument("--peer-python", type=Path, help="a Python with the package xllamacpp, whose llama-server stands beside the daemon")
    parser.add_argument("--ik-python", type=Path, help="a Python with the package ik-llama-cpp-python, a peer of `small` and `large`")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's own llama-server, to stand there too (default: the one on PATH)")
    parser.add_argument("--harness-python", type=Path, help="a Python with lm_eval[api] and llama-cpp-python, for `harness`")
    parser.add_argument("--wait", type=float, default=60.0, help="seconds to wait for a quiet machine before each benchmark")
    return parser


def _measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one benchmark and print what it found."""
    from bench import machine
    from bench.timing import wait_until_quiet
    from edge_rt.config import available_cpus

    module, function = BENCHMARKS[name]
    run: Callable[[Settings], list[Result]] = getattr(importlib.import_module(f"bench.{module}"), function)
    warning = None if options.quick or name in SCORES else wait_until_quiet(options.wait)
    print(f"--- {name}" + (f" ({warning})" if warning else ""), flush=True)
    started = time.monotonic()
    seconds = _QUICK_SECONDS if options.quick else _SECONDS
    settings = Settings(options.quick, available_cpus(), started + seconds, options.model, options.memory_group, options.items)
    servers = {"peer_python": options.peer_python, "ik_python": options.ik_python, "llama_server": options.llama_server}
    results = run(replace(settings, minutes=options.minutes, student=options.student, harness_python=options.harness_python, **servers))
    if warning:
        results = [replace(result, notes=[*result.notes, warning]) for result in results]
    from bench.report import plain

    print(plain(results))
    print(f"    {time.monotonic() - started:.0f} s", flush=True)
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return to_json(name, results, machine.describe(), quick=options.quick, when=when)


def _report() -> int:
    """Write the pages of which something was measured."""
    from bench.report import DOCS, Kinds, pages, render

    stored = load_all()
    for page in pages(Kinds(QUALITY, POST, SPEED, SERVE, ADAPTATION, DISTILLED)):
        if not any(name in stored for name in page.benchmarks):
            continue
        try:
            text = render(stored, page)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        (DOCS / page.file).write_text(text, encoding="utf-8")
        print(f"wrote docs/{page.file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
