"""lm-evaluation-harness against our daemon, and against llama-cpp-python in its own process: the same tasks, item by item."""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import models
from bench.processes import PROGRAMS, TOOL, reach_tool
from bench.results import Result, Settings
from bench.serve.served import Served, free_port, open_http

ROOT = Path(__file__).parents[1]
PEER = "llama-cpp-python"
TASKS = ("edge_rt_finance_text", "edge_rt_finance_chat", "edge_rt_finance_answer")
"""Choices behind texts, choices as answers to messages, free answers: the three ways in which the harness asks."""


def run(settings: Settings) -> list[Result]:
    """Each task on both. Raises RuntimeError without a Python that has lm_eval and llama-cpp-python."""
    if settings.harness_python is None:
        raise RuntimeError("lm-evaluation-harness is not here; --harness-python names a Python with lm_eval[api] and llama-cpp-python")
    path, port = models.smollm2(settings, "Q4_1"), free_port()
    tasks = settings.pick(TASKS, TASKS[:1])
    with tempfile.TemporaryDirectory() as folder:
        reach_tool()
        from edge_rt_distill.sandbox.harness import export
        from edge_rt_distill.sandbox.suites import built_in

        export(built_in(["finance"]), Path(folder), ("steer",))
        with Served(path, "--threads", str(settings.threads), "--ctx", "2048", config=open_http(port)) as daemon:
            daemon.ready().close()
            ours = _asked(settings.harness_python, Path(folder), f"http://127.0.0.1:{port}", *tasks)
        theirs = _asked(settings.harness_python, Path(folder), str(path), *tasks)
    return [_result(task, ours[task], theirs[task]) for task in tasks]


def _asked(python: Path, folder: Path, target: str, *tasks: str) -> dict[str, Any]:
    out = folder / "out.json"
    path = f"{ROOT}:{TOOL}"
    command = [str(python), str(PROGRAMS / "harness.py"), str(folder), str(out), target, *tasks]
    done = subprocess.run(command, env={"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HOME": str(folder)}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the harness failed: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def _result(task: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Result:
    """Alike if the mean difference of the items is within two of its standard errors."""
    pairs = [(ours["documents"][one], theirs["documents"][one]) for one in ours["documents"]]
    differences = [mine - other for mine, other in pairs]
    mean = sum(differences) / len(differences)
    error = math.sqrt(sum((one - mean) ** 2 for one in differences) / max(1, len(pairs) - 1) / len(pairs))
    alike = sum(mine == other for mine, other in pairs)
    shown = f"{ours['metric']} {ours['value']:.3f} and {theirs['value']:.3f}; {alike} of {len(pairs)} items alike"
    return Result(
        f"lm-evaluation-harness, {task}", f"as {PEER}, within two standard errors", ours["metric"], [ours["value"]],
        {PEER: [theirs["value"]]}, ok=abs(mean) <= 2 * error + 1e-12, shown=shown,
    )  # fmt: skip
