"""`edge-rt bench`: how fast one model reads and writes here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from edge_rt.cli.generation import answer, opened
from edge_rt.cli.options import JsonOption, ModelOptions, option
from edge_rt.cli.output import table, write, write_json, write_stderr
from edge_rt.errors import Cancelled, ContextError
from edge_rt.types import Done, Event, GenerateOptions, SamplingParams, decode_rate

if TYPE_CHECKING:
    from edge_rt.model import Model


class BenchCommand(ModelOptions, JsonOption):
    """Measure a model's speed here.

    How fast it reads a prompt (prefill) and writes an answer (decode), in tokens a second.
    Each repetition starts from an empty context. Figures are the median with the smallest and the largest; other programs on the
    machine lower them.

    Examples:
      edge-rt bench
      edge-rt bench -m model.gguf -p 1024 -n 64 -r 5
      edge-rt bench --json --threads 2
    """

    prompt_tokens: int = option(256, "-p --prompt-tokens N", "Tokens of the prompt.", low=1)
    max_tokens: int = option(64, "-n --max-tokens N", "Tokens of the answer.", low=2)
    repeat: int = option(3, "-r --repeat N", "Repetitions; one more before them does not count.", low=1, high=100)

    def run(self) -> int:
        started = time.perf_counter()
        with opened(self) as model:
            open_seconds = time.perf_counter() - started
            needed, allowed = self.prompt_tokens + self.max_tokens, model.info.max_context
            if needed > allowed:
                raise ContextError(f"the test needs {needed} tokens of context and has {allowed}; lower -p or -n, or raise --ctx")
            for notice in model.new_notices():
                write_stderr(f"note: {notice}")
            results = [_measure(model, self, number) for number in range(self.repeat + 1)][1:]
            found: dict[str, Any] = {
                "model": str(model.file.path),
                "engine": model.info.engine,
                "device": model.info.device,
                "open_seconds": open_seconds,
                "prompt_tokens": results[0]["prompt_tokens"],
                "answer_tokens": self.max_tokens,
                "repetitions": self.repeat,
            }
            for name in ("prefill", "decode", "first_token"):
                values = [result[name] for result in results]
                found[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        if self.json:
            write_json(found, indent=2)
            return 0
        write_stderr(f"{found['model']}: {found['engine']} on {found['device']}, opened in {open_seconds:.3f} s, {self.repeat} repetitions")
        rows: list[tuple[str, ...]] = [("", "TOKENS", "MEDIAN", "FROM", "TO")]
        for name, tokens, unit, digits in (
            ("prefill", found["prompt_tokens"], "tokens/s", 1),
            ("decode", self.max_tokens, "tokens/s", 1),
            ("first_token", found["prompt_tokens"], "s", 3),
        ):
            median, least, most = (f"{value:.{digits}f}" for value in found[name].values())
            rows.append((name.replace("_", " "), str(tokens), f"{median} {unit}", least, most))
        write(table(rows))
        return 0


def _measure(model: Model, options: BenchCommand, number: int) -> dict[str, Any]:
    """One repetition in an empty session: rates in tokens a second, time to the first token in seconds."""
    # The text differs from its beginning in every repetition, so that nothing of the last one is reused.
    text = f"{number} times: " + "the quick brown fox jumps over the lazy dog and runs back home. " * options.prompt_tokens
    prompt = model.detokenize(model.tokenize(text)[: options.prompt_tokens])
    request = GenerateOptions(max_tokens=options.max_tokens, ignore_eos=True, sampling=SamplingParams(temperature=0, seed=1))
    with model.session() as session:
        _, done, interrupted = answer(session, prompt, request, _show_nothing)
    if interrupted:
        raise Cancelled("the measurement was stopped")
    computed = done.usage.prompt_tokens - done.usage.reused_tokens
    return {
        "prompt_tokens": computed,
        "prefill": computed / done.timings.prompt,
        "decode": decode_rate(done),
        "first_token": done.timings.first_token,
    }


def _show_nothing(events: Iterable[Event]) -> tuple[str, Done]:
    return "", next(event for event in events if isinstance(event, Done))
