"""The same mixed traffic replayed to our daemon and to llama.cpp's server at three loads, and to ours while it is disturbed."""

from __future__ import annotations

import asyncio
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import models
from bench.processes import CONSOLE_SCRIPT, reach_tool
from bench.results import OURS, Result, Settings, kept
from bench.serve.served import NO_RATE, free_port, open_http
from bench.serve.servers import CONTEXT, PEER, Variant, llama_program, peers

REQUESTS, LOADS = 500, (1, 4, 8)
"""Requests of a trace, and how many are on their way at a time."""
FAULTS = ("5:kill-worker", "25:reload-rules", "40:freeze=2")
PEER_SETTING = Variant(flash=True, unified=False, repack=False)
"""The best of eight that serve-throughput found for this model."""
JUDGED = (
    "first_token_p50", "first_token_p95", "between_tokens_p50", "between_tokens_p99", "throughput", "completed", "goodput", "queueing_p95",
    "long_context_speed", "checks", "robustness", "errors", "memory_peak", "cold_start", "same_text",
)  # fmt: skip
"""Of the metrics of a replay, those that are shown."""


def run(settings: Settings) -> list[Result]:
    """A result for each load and metric, and for each fault. What was measured stays beside the results, for `edge-rt replay report`."""
    reach_tool()
    from edge_rt_distill.replay.driving import Load
    from edge_rt_distill.replay.generators import Wanted, make
    from edge_rt_distill.replay.trace import write_trace

    out = kept(settings, "replay")
    trace = make("mixed", Wanted(settings.items or settings.pick(REQUESTS, 16), 1.0, 1, "en", 1.0))
    write_trace(out / "trace.jsonl", trace)
    found: list[Result] = []
    programs = peers(settings)
    for load in settings.pick(LOADS, LOADS[-1:]):
        ours = _replay(settings, trace.requests, Load(concurrency=load), out / f"{OURS}-{load}.json", None)
        if programs:
            theirs = _replay(settings, trace.requests, Load(concurrency=load), out / f"{PEER}-{load}.json", programs[0])
            found += _compared(theirs, ours, trace, load)
    return found + _disturbed(settings, trace, out)


def _replay(settings: Settings, requests: Sequence[Any], load: Any, out: Path, program: Sequence[str] | None, *faults: str) -> Any:
    """Results of one run with a server of its own: ours, or a program that is llama.cpp's."""
    from edge_rt_distill.replay.faults import parse
    from edge_rt_distill.replay.results import write_results
    from edge_rt_distill.replay.running import whole
    from edge_rt_distill.replay.targets import Server

    path, port = models.smollm2(settings, "Q4_1"), free_port()
    with tempfile.TemporaryDirectory() as folder:
        if program is None:
            rules, config = Path(folder, "rules.toml"), Path(folder, "daemon.toml")
            rules.write_text('[redaction]\nkinds = ["email"]\n')
            config.write_text(NO_RATE + open_http(port))
            words = [
                str(CONSOLE_SCRIPT), "serve", "-m", str(path), "--ctx", str(CONTEXT), "--threads", str(settings.threads),
                "--config", str(config), "--listen", f"{folder}/d.sock", *(["--rules", str(rules)] if faults else []),
            ]  # fmt: skip
        else:
            words = llama_program(program, path, settings.threads, PEER_SETTING, port)
        results = asyncio.run(
            whole(
                lambda: Server(f"http://127.0.0.1:{port}"), requests, load, faults=[parse(one) for one in faults], start=shlex.join(words)
            )
        )  # fmt: skip
    write_results(out, results)
    return results


def _compared(theirs: Any, ours: Any, trace: Any, load: int) -> list[Result]:
    from edge_rt_distill.replay.comparing import compare
    from edge_rt_distill.replay.words import shown, shown_retention

    found = compare(theirs, ours, trace=trace)
    results = []
    for name in JUDGED:
        row = found.rows[name]
        values = [None if one.estimate is None else one.estimate.value for one in (row.candidate, row.baseline)]
        said = f"{shown(name, row.candidate)}; {PEER} {shown(name, row.baseline)}; kept {shown_retention(row.retention) or row.reason}"
        results.append(
            Result(
                f"replay of {len(trace.requests)} requests, {load} at a time: {name}", "", "", [v for v in values[:1] if v is not None],
                {PEER: [v for v in values[1:] if v is not None]}, shown=said,
            )
        )  # fmt: skip
    return results


def _disturbed(settings: Settings, trace: Any, out: Path) -> list[Result]:
    """What faults did, of a part of the trace at its own times: requests come however long the daemon is away."""
    from edge_rt_distill.replay.columns import columns
    from edge_rt_distill.replay.driving import Load
    from edge_rt_distill.replay.outages import outages

    some = trace.requests[: settings.pick(60, 8)]
    results = _replay(settings, some, Load(), out / "disturbed.json", None, *FAULTS)
    found = []
    for one in outages(columns(results)):
        back = "not" if one.back is None else f"{one.back:.2f} s"
        said = f"served again after {back}; no token for {one.silent:.2f} s; {one.cut} cut, {one.survived} survived, {one.failed} failed"
        values = [] if one.back is None else [one.back]
        found.append(Result(f"replay, disturbed: {one.name}", "", "s", values, shown=f"{said} ({one.fault.said})"))
    return found
