"""What a request may ask for: keywords over options, and values that are out of range."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from edge_rt.errors import OptionError
from edge_rt.types import GenerateOptions, Pruning, SamplingParams

_SAMPLING_FIELDS = frozenset(SamplingParams._fields)


def override(options: GenerateOptions, overrides: dict[str, Any]) -> GenerateOptions:
    """Apply keywords to options and to their sampling parameters. Raises OptionError for an unknown one."""
    sampling = {k: overrides.pop(k) for k in list(overrides) if k in _SAMPLING_FIELDS}
    unknown = sorted(set(overrides) - set(GenerateOptions._fields))
    if unknown:
        raise OptionError(f"generate has no option {unknown[0]!r}; see edge_rt.types.GenerateOptions")
    chosen = options._replace(**overrides)
    return chosen._replace(sampling=chosen.sampling._replace(**sampling)) if sampling else chosen


def check_opening(
    context: int | None, threads: int | None, memory: int | None, power: float | None = None, celsius: float | None = None
) -> None:
    """Raise OptionError for what no model can be opened with."""
    if context is not None and context < 1:
        raise OptionError(f"a context of {context} tokens is too small; give at least 1")
    if threads is not None and not 1 <= threads <= 512:
        raise OptionError(f"{threads} threads are out of range; give 1 to 512")
    if memory is not None and memory < 1:
        raise OptionError(f"a memory limit of {memory} bytes is too small; give e.g. 500M")
    if power is not None and not 0 < power <= 10_000:
        raise OptionError(f"a power cap of {power:g} W is out of range; give more than 0 and up to 10000")
    if celsius is not None and not 0 <= celsius <= 150:
        raise OptionError(f"a temperature limit of {celsius:g} degrees Celsius is out of range; give 0 to 150")


def check_context(context: int | None, most: int) -> None:
    """Raise OptionError for a context that the model cannot give."""
    if context is not None and not 1 <= context <= most:
        raise OptionError(f"a context of {context} tokens is out of range; give 1 to {most}, or open the model with a larger one")


def _check_pruning(pruning: Pruning) -> None:
    """Raise OptionError for a budget or an interval that is none."""
    if not 0 < pruning.budget < math.inf or (pruning.unit == "share" and pruning.budget > 1):
        most = "up to 1" if pruning.unit == "share" else "more than 0"
        raise OptionError(f"a pruning budget of {pruning.budget} {pruning.unit} is out of range; give {most}")
    if pruning.every < 0:
        raise OptionError(f"pruning every {pruning.every} tokens makes no sense; give at least 1, or 0 for never")


def check(options: GenerateOptions, max_context: int) -> None:
    """Raise OptionError for values out of range (sampling parameters are checked by the sampler)."""
    check_context(options.context, max_context)
    if options.prune is not None:
        _check_pruning(options.prune)
    if options.max_tokens is not None and options.max_tokens < 1:
        raise OptionError(f"max_tokens is {options.max_tokens}; give at least 1, or leave it out")
    if not 0 <= options.logprobs <= 100:
        raise OptionError(f"logprobs is {options.logprobs}; give 0 to 100")
    if not 0 <= options.speculate <= 64:
        raise OptionError(f"speculate is {options.speculate}; give 0 to 64")
    if isinstance(options.post, str):
        raise OptionError(f"post is the text {options.post!r}; give a list of names")
    if isinstance(options.rules, (str, Path)):
        raise OptionError(f"rules is the name {str(options.rules)!r}; open it with edge_rt.rules.RuleFile")
    if options.grammar is not None and options.json_schema is not None:
        raise OptionError("a grammar and a JSON schema contradict each other; give one of them")
