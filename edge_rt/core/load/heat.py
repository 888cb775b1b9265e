"""Heat: how much something was used of late, for what is touched unevenly (experts, embedding rows, whole models)."""

from __future__ import annotations

from collections.abc import Iterable


class Heat:
    """Exponentially weighted access counts."""

    def __init__(self, half_life: float = 64.0) -> None:
        self._decay = 0.5 ** (1.0 / half_life)
        self._heat: dict[str, tuple[float, int]] = {}
        self._clock = 0

    def tick(self) -> None:
        """A step passed."""
        self._clock += 1

    def touch(self, key: str, amount: float = 1.0) -> None:
        """``key`` was used in this step."""
        self._heat[key] = (self.value(key) + amount, self._clock)

    def value(self, key: str) -> float:
        """Heat now: every past touch, halved for each half-life (in steps) since."""
        heat, when = self._heat.get(key, (0.0, self._clock))
        return float(heat * self._decay ** (self._clock - when))

    def coldest(self, keys: Iterable[str]) -> list[str]:
        """Keys by rising heat."""
        return sorted(keys, key=self.value)
