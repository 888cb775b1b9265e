"""A grade for a segment: how much would be lost with it, from what it is made of (features.py) and weights from a file.

A feature adds ``weight * x / (x + half)`` points, where x is its density: more of the same tells less and less. The score is
``1 - exp(-points)``, so that many features can add up without ever reaching a limit, where all would be equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from edge_rt.core.context.features import Features, features
from edge_rt.core.context.segments import Segment
from edge_rt.errors import OptionError

DEFAULT_WEIGHTS = Path(__file__).with_name("grading.ini")
SMOOTHING = 20
"""Words added to a segment's own before densities are taken, or one name would make a two-word message the densest of all."""


class Weight(NamedTuple):
    """``points``: what a feature adds at most (less than 0: takes away). ``half``: the density at which it adds half of that."""

    points: float
    half: float


class Contribution(NamedTuple):
    """A feature's part in a grade. ``value``: occurrences, or for ``words`` their number. ``points``: what it adds to the sum."""

    feature: str
    value: float
    points: float


class Grade(NamedTuple):
    """``score`` from 0 (first to go) to 1, and what makes it, the weightiest first."""

    score: float
    contributions: tuple[Contribution, ...] = ()


def grade(segment: Segment, weights: Mapping[str, Weight]) -> Grade:
    """The grade of a segment, by the weights of ``load_weights``."""
    counts = features(segment.text)
    found = [
        Contribution(name, value, _points(name, value, counts.words, weights[name])) for name, value in counts._asdict().items() if value
    ]
    found.sort(key=lambda contribution: -abs(contribution.points))  # stable: of equals, in the order of Features
    return Grade(max(0.0, -math.expm1(-sum(contribution.points for contribution in found))), tuple(found))


def _points(name: str, value: float, words: float, weight: Weight) -> float:
    density = value if name == "words" else 100 * value / (words + SMOOTHING)
    return weight.points * density / (density + weight.half)


def content_grader(weights: Path | None = None) -> Callable[[Segment], Grade]:
    """``grade`` with the weights of a file, or the default ones. Raises OptionError."""
    table = load_weights(weights)
    return lambda segment: grade(segment, table)


def load_weights(path: Path | None = None) -> dict[str, Weight]:
    """Every feature's weight: the default ones, changed by what a file (grading.ini shows its form) says. Raises OptionError."""
    table = _read(DEFAULT_WEIGHTS)
    if path is not None:
        for section, values in _read(path).items():
            table[section].update(values)
    return {name: Weight(table["weight"][name], table["half"][name]) for name in Features._fields}


def _read(path: Path) -> dict[str, dict[str, float]]:
    """Section -> feature -> number."""
    import configparser  # only where weights are read

    parser = configparser.ConfigParser(interpolation=None, default_section="", inline_comment_prefixes=("#",))
    try:
        parser.read_string(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"cannot read weights from {path}: {(error.strerror or str(error)).lower()}") from error
    except (configparser.Error, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split()).replace("'<string>'", "the file")
        raise OptionError(f"{path} is no file of weights ({reason}); write lines such as `names = 0.5` under [weight] or [half]") from error
    table: dict[str, dict[str, float]] = {"weight": {}, "half": {}}
    for section in parser.sections():
        if section not in table:
            raise OptionError(f"{path} has a section [{section}]; weights have [weight] and [half]")
        for name, text in parser.items(section):
            table[section][name] = _number(path, section, name, text)
    return table


def _number(path: Path, section: str, name: str, text: str) -> float:
    if name not in Features._fields:
        raise OptionError(f"{path} has a weight for {name}, which is no feature; features are {', '.join(Features._fields)}")
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or (section == "half" and number <= 0):
        wanted = "a number above 0" if section == "half" else "a number"
        raise OptionError(f"{path} has {name} = {text} in [{section}]; give {wanted}")
    return number
