"""What was checked how often, and what was wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from bench.results import Result

_EXAMPLES = 5


class Tally:
    """Counts checks by kind. Those that failed are kept as examples; every one counts."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.examples: list[str] = []

    def check(self, kind: str, true: bool, otherwise: str = "") -> bool:
        """Count a check; ``otherwise`` tells what was the case instead."""
        self.counts[kind] += 1
        if not true:
            self.failures[kind] += 1
            if self.failures[kind] <= _EXAMPLES:
                self.examples.append(f"{kind}: {otherwise}"[:600])
                print(f"    wrong: {self.examples[-1]}", flush=True)
        return true

    def result(self, name: str, requirement: str, kinds: Sequence[str], notes: Sequence[str] = ()) -> Result:
        """Whether all checks of these kinds were right, each of which was made at least once."""
        shown = ", ".join(f"{kind} {self.counts[kind] - self.failures[kind]} of {self.counts[kind]}" for kind in kinds)
        ok = all(self.counts[kind] and not self.failures[kind] for kind in kinds)
        wrong = [example for example in self.examples if example.partition(":")[0] in kinds]
        missed = float(sum(self.failures[kind] for kind in kinds))
        return Result(name, requirement, "failures", [missed], ok=ok, shown=shown, notes=[*notes, *wrong])
