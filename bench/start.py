"""From starting a program to the first byte of the answer on its standard output."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from bench import models
from bench.processes import CONSOLE_SCRIPT, PROGRAMS, first_byte
from bench.results import OURS, Bound, Result, Settings, compare
from bench.timing import interleave

_PROMPT = "Name the capital of France."
_HIGH, _LOW = "a llama-cpp-python script", "a low-level script"


def run(settings: Settings) -> list[Result]:
    """The default model (Q4_1), and Q4_0, which libllama repacks at every start, and Q8_0, which only a CPU with AMX packs."""
    return [_run(settings, kind) for kind in ("Q4_1", "Q4_0", "Q8_0")]


def _run(settings: Settings, kind: str) -> Result:
    path = models.smollm2(settings, kind)
    commands = {
        OURS: [str(CONSOLE_SCRIPT), "run", "-m", str(path), "-n", "1", "--temp", "0", _PROMPT],
        _HIGH: _script("answer_high_level.py", path, settings.threads),
        _LOW: _script("answer_low_level.py", path, settings.threads),
    }
    answers = {name: first_byte(command)[1].strip() for name, command in commands.items()}
    rounds = settings.pick(15, 2)
    samples = interleave(
        {name: partial(_seconds, command) for name, command in commands.items()},
        rounds=rounds,
        most=settings.pick(30, 2),
        deadline=settings.deadline,
    )
    answer = answers[OURS].decode(errors="replace")
    same = len(set(answers.values())) == 1
    note = f"all answer {answer!r}" if same else "answers differ: " + ", ".join(f"{name} {text!r}" for name, text in answers.items())
    return compare(f"process start to first byte, {kind}", "s", samples, [Bound(_HIGH, "at most", 0.7)], [note])


def _script(name: str, path: Path, threads: int) -> list[str]:
    return [sys.executable, str(PROGRAMS / name), str(path), _PROMPT, str(threads)]


def _seconds(command: list[str]) -> float:
    return first_byte(command)[0]
