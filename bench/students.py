"""A distilled student beside its teacher in llama.cpp's Q4_0: how fast it decodes, and how many bytes it has."""

from __future__ import annotations

from pathlib import Path

from bench import models
from bench.contenders import Ours, decode_seconds, in_turns
from bench.results import OURS, Bound, Result, Settings, compare
from edge_rt.core.load.compensation import beside

TEACHER = "the teacher's own Q4_0"
MADE = Path(__file__).parents[1] / "tools" / "distill" / "runs" / "demo" / "compensate" / "smollm2-108m.gguf"
"""Where the demo run leaves its student."""


def run(settings: Settings) -> list[Result]:
    """Both in edge-rt, in turns, the student with its corrections. Raises RuntimeError if there is no student."""
    student = settings.student or MADE
    if not student.exists():
        made = "make it with `edge-rt distill run tools/distill/runs/demo.toml`, or name another with --student"
        raise RuntimeError(f"there is no student {student}; {made}")
    teacher = models.smollm2(settings, "Q4_0")
    files = {OURS: (student, beside(student)), TEACHER: (teacher,)}
    sizes = {name: [sum(one.stat().st_size for one in some if one.exists()) / 1e6] for name, some in files.items()}
    return [
        _decode(student, teacher, settings),
        compare("bytes of a student, with its corrections", "MB", sizes, (Bound(TEACHER, "at most", 0.75),)),
    ]


def _decode(student: Path, teacher: Path, settings: Settings) -> Result:
    opened = {OURS: Ours(student, 512), TEACHER: Ours(teacher, 512)}

    def rate(one: Ours) -> float:
        return 1.0 / decode_seconds(one, 50, settings.pick(96, 4))

    samples = in_turns(opened, 50, rate, rounds=settings.pick(15, 2), most=settings.pick(45, 2), deadline=settings.deadline)
    return compare("decode at 146 cells, a student", "tokens/s", samples, (Bound(TEACHER, "at least", 1.25),))
