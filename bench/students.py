"""A distilled student beside its teacher in llama.cpp's Q4_0: how fast it decodes, how many bytes it has, how well it knows other text."""

from __future__ import annotations

import random
from contextlib import closing
from pathlib import Path

import numpy as np

import edge_rt
from bench import models
from bench.compiled import log_probabilities
from bench.contenders import Ours, decode_seconds, in_turns
from bench.context.text import run_of_prose
from bench.results import OURS, Bound, Result, Settings, compare
from edge_rt.core.weights.error_correction import compensation_path

TEACHER, WHOLE = "the teacher's own Q4_0", "the teacher in F16"
LETTERS = 1200
"""Of a piece of prose, at least."""
MADE = Path(__file__).parents[1] / "tools" / "distill" / "runs" / "demo" / "compensate" / "smollm2-108m.gguf"
"""Where the demo run leaves its student."""


def run(settings: Settings) -> list[Result]:
    """Both in edge-rt, in turns, the student with its corrections. Raises RuntimeError if there is no student."""
    student = settings.student or MADE
    if not student.exists():
        made = "make it with `edge-rt distill run tools/distill/runs/demo.toml`, or name another with --student"
        raise RuntimeError(f"there is no student {student}; {made}")
    teacher = models.smollm2(settings, "Q4_0")
    files = {OURS: (student, compensation_path(student)), TEACHER: (teacher,)}
    sizes = {name: [sum(one.stat().st_size for one in some if one.exists()) / 1e6] for name, some in files.items()}
    return [
        _decode(student, teacher, settings),
        compare("bytes of a student, with its corrections", "MB", sizes, (Bound(TEACHER, "at most", 0.75),)),
        _on_prose({OURS: student, WHOLE: models.smollm2(settings, "F16"), TEACHER: teacher}, settings),
    ]


def _decode(student: Path, teacher: Path, settings: Settings) -> Result:
    opened = {OURS: Ours(student, 512), TEACHER: Ours(teacher, 512)}

    def rate(one: Ours) -> float:
        return 1.0 / decode_seconds(one, 50, settings.pick(96, 4))

    samples = in_turns(opened, 50, rate, rounds=settings.pick(15, 2), most=settings.pick(45, 2), deadline=settings.deadline)
    return compare("decode at 146 cells, a student", "tokens/s", samples, (Bound(TEACHER, "at least", 1.25),))


def _on_prose(files: dict[str, Path], settings: Settings) -> Result:
    """Text unlike what was learnt from, by its bytes: a student may write it with other tokens than its teacher."""
    prose, nats, tokens = run_of_prose(random.Random("students")), {name: list[float]() for name in files}, dict.fromkeys(files, 0)
    pieces = ["\n"] * settings.pick(32, 1)  # a token of its own in all, so that the first word is told from something, too
    for number in range(len(pieces)):
        while len(pieces[number]) < LETTERS:
            pieces[number] += next(prose) + "\n\n"
    for name, path in files.items():
        with closing(edge_rt.open(path, context=2 * LETTERS)) as model:
            for piece in pieces:
                written = model.tokenize(piece)
                said = log_probabilities(model, written)[np.arange(len(written) - 1), written[1:]]
                nats[name].append(-float(said.sum()) / (len(piece.encode()) - 1))
                tokens[name] += len(written)
    notes = [f"tokens of the prose to {name}: {count:,} ({count / tokens[WHOLE]:.3f})" for name, count in tokens.items()]
    return compare("nats a byte of other prose, a student", "nats a byte", nats, (), notes)
