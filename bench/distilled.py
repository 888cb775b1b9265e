"""INT4 with importance, GPTQ and corrections against plain types: how far each file is from the model it was made of, and what it costs."""

from __future__ import annotations

import hashlib
from functools import cache, partial
from pathlib import Path
from typing import Any

from bench import models
from bench.compiled import divergences
from bench.contenders import Ours, decode_seconds, in_turns
from bench.processes import TOOL, reach_tool
from bench.results import OURS, Bound, Result, Settings, compare
from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.core.weights.error_correction import compensation_path
from edge_rt.testing.random_models import write_random_compensation

CALIBRATION, TUNING = 8_192, 20_480
"""Tokens of technical text, to which the prose that is measured on is not related."""
COUNTS = (512, 1024, 2048, 4096, 8192, 16_384)
"""Tokens of calibration that are compared."""
BILLION = {"n_layer": 22, "n_embd": 2048, "n_head": 32, "n_head_kv": 4, "head_dim": 64, "n_ff": 5632, "n_vocab": 32000}
"""TinyLlama's measures, 1.1 billion weights."""
PLAIN = "plain Q4_0"
OTHERS = ("Q4_1", "IQ4_NL", "Q5_0", "Q5_1")
"""Types of more bits, or another grid."""


def quantised(settings: Settings) -> list[Result]:
    """Divergence in the running product, on prose that has nothing to do with the text that was calibrated with."""
    reach_tool()
    source = models.smollm2(settings, "F16")
    files = {
        OURS: (_corrected(settings), "auto"),
        "the same without its corrections": (_corrected(settings), "off"),
        "GPTQ": (_quantised(settings, "Q4_0", "gptq"), "off"),
        "importance-weighted Q4_0": (_quantised(settings, "Q4_0", "importance"), "off"),
        **{f"importance-weighted {kind}": (_quantised(settings, kind, "importance"), "off") for kind in settings.pick(OTHERS, ())},
        "llama.cpp's Q4_K_M": (models.smollm2(settings, "Q4_K_M", keep_embedding=True), "off"),
        PLAIN: (_quantised(settings, "Q4_0", "plain"), "off"),
    }
    found = divergences(source, files, settings, "quantised")
    side = compensation_path(files[OURS][0])
    sizes = {name: path.stat().st_size + (side.stat().st_size if how == "auto" else 0) for name, (path, how) in files.items()}
    notes = [f"bytes of {name}: {size:,} ({size / sizes[PLAIN]:.3f})" for name, size in sizes.items()]
    bounds = (Bound(PLAIN, "at most", 0.4),)
    return [compare("KL divergence to F16, embedding F16 in all", "nats a token", found, bounds, notes)]


def saturation(settings: Settings) -> list[Result]:
    """How divergence falls with the tokens of calibration: GPTQ, and corrections that are fitted to them and not trained."""
    reach_tool()
    counts = settings.pick(COUNTS, (512,))
    files = {f"GPTQ, {count:,} tokens": (_quantised(settings, "Q4_0", "gptq", count), "off") for count in counts}
    corrected = {f"corrected, {count:,} tokens": (_corrected(settings, count, 0), "auto") for count in counts}
    *most, last = {**files, **corrected}.items()
    found = divergences(models.smollm2(settings, "F16"), {OURS: last[1], **dict(most)}, settings, "quantised")
    return [compare(f"KL divergence to F16, {last[0]}", "nats a token", found)]


def overhead(settings: Settings) -> list[Result]:
    """Decoding with corrections against without, on SmolLM2 and on a model of a billion weights with corrections of 3 % of its bytes."""
    reach_tool()
    results = [_overhead(_corrected(settings), "135M", 1.04, settings)]
    large = models.random("Q4_0", settings.pick(BILLION, models.SMALL))
    with ModelFile.open(large) as file:
        # As many as a hundredth of a step's time allows, by the costs that sites are chosen with.
        sites = r"blk\.(0|4|8|12|16)\.(attn_v|ffn_down)\.weight"
        write_random_compensation(compensation_path(large), file, rank=32, rows=0, bias=False, target=sites, type="Q8_0")
    try:
        results.append(_overhead(large, "1B", 1.01, settings))
    finally:
        compensation_path(large).unlink()
    return results


def _overhead(path: Path, what: str, most: float, settings: Settings) -> Result:
    opened = {OURS: Ours(path, 512, compensation="auto"), "without": Ours(path, 512, compensation="off")}
    measure = partial(decode_seconds, start=100, tokens=settings.pick(64, 4))
    samples = in_turns(opened, 100, measure, rounds=settings.pick(25, 2), most=settings.pick(75, 2), deadline=settings.deadline, wide=0.02)
    notes = [f"the side file has {compensation_path(path).stat().st_size / path.stat().st_size:.1%} of the file's bytes"]
    return compare(f"a token, {what}, with compensation", "s", samples, (Bound("without", "at most", most),), notes)


# ---- the files, made once ----------------------------------------------------------------------------------------------


@cache
def _version() -> str:
    """Of the code that makes them."""
    found = hashlib.sha256()
    for folder in ("quantise", "compensate"):
        for path in sorted((TOOL / "edge_rt_distill" / folder).glob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()[:8]


@cache
def _teacher(source: Path) -> Any:
    from edge_rt_distill.model.load import load

    return load(source)


@cache
def _sequences(source: Path) -> list[list[int]]:
    """Technical text, 256 tokens a piece, in an order of its own."""
    from edge_rt_distill.data.batches import encode
    from edge_rt_distill.data.sources import technical_text
    from edge_rt_distill.run.workshop import shuffled

    return [one.tokens for one in shuffled(encode(technical_text(), _teacher(source).tokeniser, 256), 0)]


def _first(sequences: list[list[int]], tokens: int) -> list[list[int]]:
    return sequences[: tokens // 256]


def _quantised(settings: Settings, kind: str, method: str, tokens: int = CALIBRATION) -> Path:
    """SmolLM2 in a type, by a method of the tool that was calibrated with so many tokens; embedding F16."""
    source = settings.model or models.smollm2(settings, "Q4_1")

    def make(path: Path) -> None:
        from edge_rt_distill.export import export
        from edge_rt_distill.quantise.matrices import QuantiseOptions, quantise_model

        teacher = _teacher(source)
        calibration = _first(_sequences(source), settings.pick(tokens, 512))
        found = quantise_model(teacher.model, calibration, QuantiseOptions(kind, method=method))  # type: ignore[arg-type]
        export(path, teacher.model, teacher.tokeniser, matrices=kind, embedding="F16", how=found.tensors)

    quick = "-quick" if settings.quick else "" if tokens == CALIBRATION else f"-{tokens}"
    return models.made_once(models.folder() / f"distilled-{_version()}-{method}-{kind}{quick}.gguf", make)


def _corrected(settings: Settings, tokens: int = CALIBRATION, tuning: int = TUNING) -> Path:
    """SmolLM2 by GPTQ with corrections of 3 % of its bytes, as a run makes them; its side file is beside it."""
    reach_tool()
    plain = _quantised(settings, "Q4_0", "gptq", tokens)
    target = plain.with_name(plain.name.replace("gptq-Q4_0", "corrected" if tuning else "untuned"))
    if target.exists() and compensation_path(target).exists():
        return target
    from edge_rt_distill.compensate.choose import choose
    from edge_rt_distill.model.load import read_gguf
    from edge_rt_distill.run.config import CompensateConfig
    from edge_rt_distill.run.corrected import budget_of, options_of, write_corrected

    source = settings.model or models.smollm2(settings, "Q4_1")
    teacher, sequences = _teacher(source), _sequences(source)
    config = CompensateConfig(tune_tokens=settings.pick(tuning, 0))
    fitting = _first(sequences, settings.pick(tokens, 1024))
    apart = max(1, len(fitting) // 8)
    model = read_gguf(plain)
    budget = budget_of(plain, len(model.layers), config)
    found = choose(teacher.model, model, fitting[apart:], fitting[:apart], budget, options_of(config, 0))
    write_corrected(plain, target, found, teacher.tokeniser, {"teacher": teacher.digest})
    return target
