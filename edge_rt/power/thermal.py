"""How warm a device gets by what it does: a thermal model that is learnt from readings, and what heat it allows.

A board is a Foster network, as data sheets give the thermal impedance of chips: temperature is that of the surroundings and a sum of rises,
each of which follows heat as a first-order system with a time constant of its own. The time constants are fixed here, from the chip's
seconds to the case's minutes; what each adds is found by recursive least squares (a Kalman filter over parameters that drift; Ljung,
System Identification, 2nd ed., ch. 11). The surroundings drift fastest, so that they take up what the model does not know: a sun that
comes out, a neighbour that computes. That is the integral correction of what is controlled by it.
"""

from __future__ import annotations

import math

SECONDS = (2.0, 8.0, 30.0, 120.0, 480.0)
"""Time constants."""
_NOISE = 0.5
"""Standard deviation of a temperature, in degrees: sensors tell whole or half ones."""
_DRIFT = 0.06
"""Of the surroundings in a second, in degrees."""
_KEEP = 1e-5
"""Of what each time constant adds, in a second, as a share of its variance at first."""


class Thermal:
    """Heat is in any unit in which it adds up. Time begins with the first temperature, of a device at rest or not."""

    def __init__(self, full: float) -> None:
        """``full``: degrees by unit of heat that are to be expected, to begin with."""
        share = full / len(SECONDS)
        self._levels = [0.0] * len(SECONDS)
        self._found = [0.0, *[share] * len(SECONDS)]  # the surroundings' temperature, and degrees by unit of heat for each time constant
        size = len(self._found)
        self._first = [0.0, *[(1.5 * share) ** 2] * len(SECONDS)]
        self._variance = [[self._first[i] if i == j else 0.0 for j in range(size)] for i in range(size)]
        self._begun = False

    def passed(self, seconds: float, heat: float, temperature: float | None) -> None:
        """So much heat was made, on average, for so many seconds, in which the temperature was this on average, None: not known."""
        halfway = self._after(seconds / 2, heat)
        self._levels = self._after(seconds, heat)
        if temperature is None:
            return
        if not self._begun:
            self._begun = True
            self._found[0] = temperature - sum(rise * level for rise, level in zip(self._found[1:], halfway, strict=True))
            self._variance[0][0] = 4.0
        self._drift(seconds)
        self._correct([1.0, *halfway], temperature)

    def _after(self, seconds: float, heat: float) -> list[float]:
        return [level + (heat - level) * (1 - math.exp(-seconds / one)) for level, one in zip(self._levels, SECONDS, strict=True)]

    def _drift(self, seconds: float) -> None:
        variance = self._variance
        variance[0][0] = min(25.0, variance[0][0] + _DRIFT**2 * seconds)
        for i in range(1, len(variance)):
            variance[i][i] = min(self._first[i], variance[i][i] + _KEEP * self._first[i] * seconds)

    def _correct(self, inputs: list[float], temperature: float) -> None:
        """A step of recursive least squares. Nothing cools by being heated: what comes out below 0 is measured to be 0, which corrects the
        others with it; to cut it off alone would let them run away.
        """
        self._measure(inputs, temperature, _NOISE)
        for i in range(1, len(inputs)):
            if self._found[i] < 0:
                self._measure([float(i == j) for j in range(len(inputs))], 0.0, 0.05 * self._first[i] ** 0.5)

    def _measure(self, inputs: list[float], value: float, noise: float) -> None:
        variance, size = self._variance, len(inputs)
        spread = [sum(row[j] * inputs[j] for j in range(size)) for row in variance]
        total = noise**2 + sum(one * given for one, given in zip(spread, inputs, strict=True))
        wrong = value - sum(found * given for found, given in zip(self._found, inputs, strict=True))
        self._found = [found + one / total * wrong for found, one in zip(self._found, spread, strict=True)]
        self._variance = [[variance[i][j] - spread[i] * spread[j] / total for j in range(size)] for i in range(size)]

    def heat_for(self, target: float, horizon: float) -> float:
        """The heat with which the temperature is ``target`` so many seconds on. It may be below 0, or infinite."""
        stays = [math.exp(-horizon / constant) for constant in SECONDS]
        left = self._found[0] + sum(rise * level * stay for rise, level, stay in zip(self._found[1:], self._levels, stays, strict=True))
        gain = sum(max(0.0, rise) * (1 - stay) for rise, stay in zip(self._found[1:], stays, strict=True))
        return (target - left) / gain if gain > 1e-9 else math.inf
