"""Redaction against a hundred thousand secrets: what leaks across tokens and at every kind of end, and what else is taken for a secret."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections import Counter
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Literal, NamedTuple

from bench import models
from bench.post.clean import TOKEN_LIKE, clean
from bench.post.rules import HASHING, PLACEHOLDER, REDACTION
from bench.post.scoring import REPLACED, Leak, hidden, leaks, replaced, strict
from bench.post.secret import Sample
from bench.post.streaming import Stream, Tokenise, at_random, said, stream
from bench.post.texts import sample
from bench.results import Result, Settings

SECRETS = 100_000
CHUNK = 250
"""Texts that one process is given at a time."""
_EXAMPLES = 2
"""Leaks that are told of a kind of secret."""


class Examined(NamedTuple):
    """One text that was said and what became of it. ``output``: with ``REPLACED`` in place of placeholders."""

    sample: Sample
    spoken: Stream
    output: str
    found: list[Leak]


class Redaction:
    """The pipeline under test and the tokenizer whose tokens it gets, once for each process."""

    def __init__(self, model: Path | None) -> None:
        from edge_rt.plugin_host.registry import Registry
        from edge_rt.postprocess.rules import Ruleset

        registry = Registry.load()
        self._rules = (Ruleset(REDACTION, registry), Ruleset(HASHING, registry))
        self.tokenise: Tokenise | None = None
        if model is not None:
            from edge_rt.native.llama import Vocab

            vocab = Vocab.load(model)
            self.tokenise = lambda text: [vocab.piece(token) for token in vocab.tokenize(text, bos=False)]

    def said(self, spoken: Stream, seed: int) -> str:
        """What comes out, with placeholders or hashes by turns."""
        return PLACEHOLDER.sub(REPLACED, said(spoken, self._rules[seed % 2].pipeline(["redaction"])))

    def secrets(self, seed: int) -> tuple[Examined, Counter[str]]:
        """Say the text of a seed, and count; keys of the counts are as ``summary`` reads them."""
        text = sample(seed)
        spoken = stream(random.Random(f"stream {seed}"), text, self.tokenise)
        output = self.said(spoken, seed)
        must, short = hidden(text.spans, spoken.shown)
        shown = spoken.text[: spoken.shown]
        found = leaks(shown, must, output)
        whole = [span for span in must if span in text.spans]
        count = Counter({"texts": 1, "cut": len(must) - len(whole), f"ended {spoken.end}": 1})
        for span in must:
            count[f"secrets {span.kind}"] += 1
        for leak in found:
            count[f"leaks {leak.span.kind}"] += 1
        exact = strict(shown, must, output, open_end=spoken.end == "cancel")
        for span in whole:
            count["significant"] += sum(c.isalnum() for c in shown[span.start : span.end])
        for kind, kept in exact.kept.items():
            count[f"kept {kind}"] += kept
        count["beside"] += exact.beside
        count["characters beside"] += len(shown) - sum(span.end - span.start for span in must)
        for span in short:
            count["short stumps"] += 1
            count["short stumps shown"] += bool(leaks(shown, [span], output))
        return Examined(text, spoken, output, found), count

    def innocent(self, seed: int) -> Counter[str]:
        """Say a text without secrets, to its end and cut at a random place."""
        text = clean(seed)
        rng = random.Random(f"stream {seed}")
        output = self.said(_whole(rng, text.text, "whole"), seed)
        changed = replaced(text.text, output)
        name = "token-like" if text.layout in TOKEN_LIKE else "clean"
        count = Counter(
            {f"{name} texts": 1, f"{name} characters": len(text.text), f"{name} changed": changed > 0, f"{name} replaced": changed}
        )
        count.update({f"class {text.layout}": 1, f"class changed {text.layout}": changed > 0})
        shown = text.text[: rng.randrange(len(text.text) + 1)]
        if name == "clean" and not changed:
            count.update({"cut texts": 1, "cut changed": replaced(shown, self.said(_whole(rng, shown, "limit"), seed)) > 0})
        return count


def _whole(rng: random.Random, text: str, end: Literal["whole", "limit"]) -> Stream:
    return Stream(text, at_random(rng, text), end, "", len(text))


_redaction: Redaction | None = None
"""Of this process."""


def _begin(model: Path | None) -> None:
    global _redaction
    _redaction = Redaction(model)


def _chunk(task: tuple[str, int]) -> tuple[Counter[str], list[tuple[str, str]]]:
    """A run of seeds; also some of the leaks, each with the kind of secret."""
    assert _redaction is not None, "every process begins with it"
    what, first = task
    counts: Counter[str] = Counter()
    examples: list[tuple[str, str]] = []
    for seed in range(first, first + CHUNK):
        if what == "clean":
            counts += _redaction.innocent(seed)
            continue
        examined, count = _redaction.secrets(seed)
        counts += count
        examples += [(leak.span.kind, _told(seed, examined, leak)) for leak in examined.found]
    return counts, examples


def _told(seed: int, examined: Examined, leak: Leak) -> str:
    text, _, end, stop, shown = examined.spoken
    came = f"{leak.window!r} of {text[:shown]!r} came out: {examined.output!r}"
    return f"seed {seed}, {leak.span.kind}, {end} {stop!r}: {came}"


def run(settings: Settings) -> list[Result]:
    """Secrets until there were enough, then clean texts. Seeds are 0, 1, 2, ..."""
    wanted = settings.items or settings.pick(SECRETS, 3000)
    model = models.smollm2(settings, "Q4_1")
    Redaction(None)  # rules that cannot be are told here, not by each process
    counts: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    # A text has one secret at least, and more than every other is reached by its end: so many seeds are enough.
    with closing(_chunks("secrets", 4 * wanted, model, settings.threads)) as chunks:
        for number, (count, told) in enumerate(chunks, start=1):
            counts += count
            for kind, example in told:
                examples.setdefault(kind, []).append(example)
            done = _sum(counts, "secrets ")
            if done >= wanted or time.monotonic() > settings.deadline:
                break
            if number % 40 == 0:
                print(f"    {done:,} secrets, {_sum(counts, 'leaks '):,} leaked", flush=True)
    with closing(_chunks("clean", wanted // 5, model, settings.threads)) as chunks:
        for count, _ in chunks:
            counts += count
    return summary(counts, [example for _, found in sorted(examples.items()) for example in found[:_EXAMPLES]], wanted)


def _chunks(what: str, seeds: int, model: Path, threads: int) -> Generator[tuple[Counter[str], list[tuple[str, str]]], None, None]:
    """Results of runs of seeds in their order, from as many processes as there are threads. Closed, it drops what is not begun."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(threads, mp_context=context, initializer=_begin, initargs=(model,)) as pool:
        try:
            yield from pool.map(_chunk, [(what, first) for first in range(0, seeds, CHUNK)])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _sum(counts: Counter[str], prefix: str) -> int:
    return sum(n for key, n in counts.items() if key.startswith(prefix))


def _listed(counts: Counter[str], prefix: str) -> str:
    """Counts of a kind by what follows the prefix."""
    return ", ".join(f"{key.removeprefix(prefix)} {n:,}" for key, n in sorted(counts.items()) if key.startswith(prefix) and n)


def summary(counts: Counter[str], examples: list[str], wanted: int) -> list[Result]:
    """What was counted: leaks, secrets by characters, and false alarms twice."""
    done, leaked = _sum(counts, "secrets "), _sum(counts, "leaks ")
    ends = ", ".join(f"{counts[f'ended {end}']:,} {end}" for end in ("whole", "limit", "stop", "cancel"))
    notes = [f"ends: {ends}; secrets: {_listed(counts, 'secrets ')}"]
    if leaked:
        notes.append(f"leaks: {_listed(counts, 'leaks ')}")
    if done < wanted:
        notes.append(f"ended before {wanted:,}: the time was up")
    shown = f"{leaked:,} of {done:,} secrets in {counts['texts']:,} texts leaked, {counts['cut']:,} of them cut off in the middle"
    leaks_ = Result(
        "secrets that leaked", "none", "secrets", [float(leaked)], ok=leaked == 0 and done > 0, shown=shown, notes=[*notes, *examples]
    )
    return [leaks_, _exact(counts), *_false_alarms(counts)]


def _exact(counts: Counter[str]) -> Result:
    """By characters, and what came out of secrets that were cut off before they could be told."""
    kept = _sum(counts, "kept ")
    whole, beside, rest = counts["significant"], counts["beside"], counts["characters beside"]
    notes = [f"{counts['short stumps shown']:,} of {counts['short stumps']:,} stumps too short to tell were shown, at least in part"]
    if kept:
        notes.append(f"kept: {_listed(counts, 'kept ')}")
    notes.append(f"{beside / max(rest, 1):.2%} of the other characters were replaced too, what may begin a secret at a cut included")
    shown = f"{1 - kept / max(whole, 1):.4%} of {whole:,} letters and digits of whole secrets were replaced"
    ok = kept == 0 and whole > 0
    return Result("letters and digits of whole secrets that came out", "none", "of them", [float(kept)], ok=ok, shown=shown, notes=notes)


def _false_alarms(counts: Counter[str]) -> list[Result]:
    """Clean texts in which something was replaced: those whose look-alikes are no secrets, and those that are as random as keys."""
    classes = {key.removeprefix("class changed "): n for key, n in sorted(counts.items()) if key.startswith("class changed ") and n}
    where = ", ".join(f"{name} {n} of {counts[f'class {name}']}" for name, n in classes.items())
    cut = counts["cut changed"] / max(counts["cut texts"], 1)
    found = []
    for name, notes in (
        ("clean", [f"changed: {where or 'none'}", f"cut at a random place, {cut:.2%} of the unchanged lose their end"]),
        ("token-like", []),
    ):
        texts, changed = max(counts[f"{name} texts"], 1), counts[f"{name} changed"]
        share = 10_000 * counts[f"{name} replaced"] / max(counts[f"{name} characters"], 1)
        shown = f"{changed / texts:.2%} of {texts:,} texts changed, {share:.1f} of 10,000 characters replaced"
        what = "false alarms" if name == "clean" else f"false alarms, {' and '.join(TOKEN_LIKE)}"
        found.append(Result(what, "", "of texts", [changed / texts], shown=shown, notes=notes))
    return found
