"""What faults did to the service: from each to when a request was served again that was sent after it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from edge_rt_distill.replay.columns import Flags, Run
from edge_rt_distill.replay.results import Fault


class Outage(NamedTuple):
    """``back``: seconds from the fault to the first token of a request that was sent after it and answered, None: none was.

    ``silent``: the longest time without any token between the two, seconds. ``failed``: requests that were on their way in it and failed.
    ``survived``: requests that were on their way when it came, and were answered all the same. ``cut``: and were not.
    """

    fault: Fault
    back: float | None
    silent: float
    failed: int
    survived: int
    cut: int

    @property
    def name(self) -> str:
        """What it was and when."""
        return f"{self.fault.what} at {self.fault.at:.1f} s"


def outages(run: Run) -> tuple[Outage, ...]:
    """One for each fault of the run, in their order."""
    return tuple(_outage(run, fault) for fault in sorted(run.results.faults))


def touched(run: Run, outage: Outage) -> Flags:
    """Which requests were on their way between the fault and when the service was back."""
    end = np.inf if outage.back is None else outage.fault.at + outage.back
    return np.array([one.sent <= end and one.ended >= outage.fault.at for one in run.outcomes])


def _outage(run: Run, fault: Fault) -> Outage:
    served = [(one.pieces or (one.ended,))[0] for one in run.outcomes if one.status == "ok" and one.sent > fault.at]
    back = min(served) - fault.at if served else None
    last = max(one.ended for one in run.outcomes) if back is None else fault.at + back
    tokens = [piece for one in run.outcomes for piece in one.pieces if fault.at < piece < last]
    moments = np.sort([fault.at, *tokens, max(last, fault.at)])
    found = Outage(fault, back, float(np.diff(moments).max()), 0, 0, 0)
    during = [one for one in run.outcomes if one.sent < fault.at < one.ended]
    survived = sum(one.status == "ok" for one in during)
    return found._replace(failed=int(run.failed[touched(run, found)].sum()), survived=survived, cut=len(during) - survived)
