"""A compiled model against the file it was made of: answers, speed and opening; and types by sensitivity against one type for all."""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

import numpy as np

import edge_rt
from bench import models, pages
from bench.contenders import Contender, Ours, decode_seconds, random_prompt
from bench.context.text import run_of_prose
from bench.processes import CONSOLE_SCRIPT, run_program, run_tool
from bench.results import OURS, Bound, Result, Settings, compare
from bench.timing import interleave
from edge_rt import deployment
from edge_rt.compiler.gguf_file import write_gguf
from edge_rt.compiler.sensitivity import groups
from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.deployment import Plan
from edge_rt.hooks import SequenceBatch

SOURCE = "as it was"
"""The peer: edge-rt with the file that was compiled, its packed weights made already."""
PIECE = 256
"""Tokens of held-out text that are fed at once, each piece in a context of its own."""


def run(settings: Settings) -> list[Result]:
    """For two types of the same model: equal logits, prompts, tokens and opening."""
    results = []
    for kind in settings.pick(("Q4_1", "Q4_0"), ("Q4_0",)):
        path = models.smollm2(settings, kind)
        with _compiled(path, "--target", "auto") as folder:
            results += [_equal(path, folder, kind), *_speed(path, folder, kind, settings), _opening(path, folder, kind, settings)]
    return results


@contextmanager
def _compiled(path: Path, *options: str) -> Iterator[Path]:
    """A directory by the command, for as long as it is needed."""
    place = Path(tempfile.mkdtemp(prefix="edge-rt-bench-"))
    try:
        run_tool([str(CONSOLE_SCRIPT), "compile", str(path), *options, "--output", str(place / "model")])
        yield place / "model"
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _equal(path: Path, folder: Path, kind: str) -> Result:
    """The logits of a prompt's every token, from both."""
    found = []
    for one in (folder, path):
        ours = Ours(one, 512)
        try:
            found.append(ours.feed_all(random_prompt(200)))
        finally:
            ours.close()
    most = float(np.abs(found[0] - found[1]).max())
    return Result(f"compiled, {kind}: logits of 200 tokens", "equal", "", [most], ok=most == 0, shown=f"at most {most:g} apart")


def _speed(path: Path, folder: Path, kind: str, settings: Settings) -> Iterator[Result]:
    prompt = random_prompt(settings.pick(512, 64))
    opened: dict[str, Ours] = {OURS: Ours(folder, 1024), SOURCE: Ours(path, 1024)}

    def prefill(contender: Contender) -> float:
        contender.truncate(0)
        started = time.perf_counter()
        contender.feed(prompt)
        return len(prompt) / (time.perf_counter() - started)

    def decode(contender: Contender) -> float:
        return 1.0 / decode_seconds(contender, 50, settings.pick(96, 4))

    measures: dict[str, Callable[[Contender], float]] = {f"prefill of {len(prompt)} tokens": prefill, "decode at 146 cells": decode}
    try:
        for name, measure in measures.items():
            contenders: dict[str, Callable[[], float]] = {who: partial(measure, contender) for who, contender in opened.items()}
            samples = interleave(contenders, rounds=settings.pick(15, 2), most=settings.pick(45, 2), deadline=settings.deadline, wide=0.03)
            yield compare(f"compiled, {kind}: {name}", "tokens/s", samples, (Bound(SOURCE, "at least", 1.0),))
    finally:
        for ours in opened.values():
            ours.close()


def _opening(path: Path, folder: Path, kind: str, settings: Settings) -> Result:
    """In fresh processes, with all pages in memory: a directory's own packed weights against those of the cache."""
    pages.warm(path, models.packed(path), folder / "model.gguf", folder / "model.pack")
    contenders = {who: partial(_open_seconds, one) for who, one in ((OURS, folder), (SOURCE, path))}
    samples = interleave(contenders, rounds=settings.pick(11, 2), most=settings.pick(33, 2), deadline=settings.deadline)
    return compare(f"compiled, {kind}: opening", "s", samples, (Bound(SOURCE, "at most", 1.05),))


def _open_seconds(path: Path) -> float:
    return float(run_program("ours.py", path, 4, 1)["open"])


# ---- types by sensitivity --------------------------------------------------------------------------------------------


def quality(settings: Settings) -> list[Result]:
    """Files of the same bytes made of one with half-precision weights, and how far each is from that on text it never saw."""
    source = models.smollm2(settings, "F16")
    with tempfile.TemporaryDirectory(prefix="edge-rt-bench-") as place, ModelFile.open(source) as file:
        names = [name for group in groups(file.header) for name in group.tensors]
        files: dict[str, Path] = {}
        for kind in ("Q4_0", "IQ4_NL"):
            files[f"all {kind}"] = Path(place) / f"{kind}.gguf"
            _uniform(file, files[f"all {kind}"], dict.fromkeys(names, kind))
        size = _weights(files["all Q4_0"])
        with _compiled(source, "--target", "auto", "--weights", str(size)) as folder:
            found = _divergences(source, {OURS: folder / "model.gguf", **files}, settings)
            ours, plan = _weights(folder / "model.gguf"), deployment.read(folder).plan
    mixed = ", ".join(f"{kind} {list(plan.types.values()).count(kind)}" for kind in sorted(set(plan.types.values())))
    notes = [f"weights of {ours / 1e6:.1f} MB against {size / 1e6:.1f} MB; tensors by type: {mixed}"]
    bounds = (Bound("all Q4_0", "at most", 1.0),)
    return [compare("KL divergence to F16 at the same bytes, types by sensitivity", "nats a token", found, bounds, notes)]


def _uniform(file: ModelFile, path: Path, types: Mapping[str, str]) -> None:
    with open(path, "wb") as out:
        write_gguf(file, out, Plan("", types=types))


def _weights(path: Path) -> int:
    """Bytes of a file's tensors."""
    with ModelFile.open(path) as file:
        return sum(info.nbytes for info in file.header.tensors.values())


def _divergences(source: Path, files: Mapping[str, Path], settings: Settings) -> dict[str, list[float]]:
    """Of each file to the source, for each piece of held-out prose: the mean over its tokens, nats."""
    return divergences(source, {name: (path, "auto") for name, path in files.items()}, settings, "compiled")


def divergences(source: Path, files: Mapping[str, tuple[Path, str]], settings: Settings, seed: str) -> dict[str, list[float]]:
    """Of each file, with a compensation as ``edge_rt.open`` takes it, to the source: for each piece of held-out prose the mean over its
    tokens, nats.
    """
    prose, values = run_of_prose(random.Random(seed)), {name: list[float]() for name in files}
    with ExitStack() as stack:
        chosen = ((source, "off"), *files.values())
        opened = [stack.enter_context(closing(edge_rt.open(path, context=PIECE + 1, compensation=how))) for path, how in chosen]
        for _ in range(settings.pick(16, 1)):
            tokens: list[int] = []
            while len(tokens) < PIECE:
                tokens += opened[0].tokenize(next(prose) + "\n\n")
            p, *others = (log_probabilities(model, tokens[:PIECE]) for model in opened)
            for name, q in zip(files, others, strict=True):
                values[name].append(float((np.exp(p) * (p - q)).sum(-1).mean()))
    return values


def log_probabilities(model: edge_rt.Model, tokens: list[int]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Of the token behind each of some [n_tokens, n_vocab], in nats."""
    sequence = model.engine.new_sequence()
    try:
        (logits,) = model.engine.step([SequenceBatch(sequence, tokens, "all")])
        shifted = np.array(logits, np.float64)
        shifted -= shifted.max(-1, keepdims=True)
        found: np.ndarray[tuple[int, int], np.dtype[np.float64]] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        return found
    finally:
        model.engine.free_sequence(sequence)
