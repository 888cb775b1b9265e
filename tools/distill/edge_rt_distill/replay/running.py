"""A whole replay: the requests are sent, the server is watched, faults are injected, and all of it becomes Results."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from datetime import datetime, timezone
from typing import Any, TextIO

from edge_rt.hooks import DataError
from edge_rt_distill.replay.driving import Driver, Load
from edge_rt_distill.replay.faults import Injector, Planned, check
from edge_rt_distill.replay.live import Live, Tally
from edge_rt_distill.replay.results import Results
from edge_rt_distill.replay.starting import first_token, started
from edge_rt_distill.replay.targets import InProcess, Target
from edge_rt_distill.replay.trace import Request, digest
from edge_rt_distill.replay.watching import Watch


async def replay(
    requests: Sequence[Request],
    target: Target,
    load: Load,
    *,
    faults: Sequence[Planned] = (),
    pid: int | None = None,
    out: TextIO | None = None,
) -> Results:
    """Send requests to a target, which the caller closes; what it looks like meanwhile goes to ``out``, standard error unless said.

    ``pid``: of the server, if it does not say it. Raises UserError if the target does not answer at all, OptionError for faults that
    cannot be.
    """
    if not requests:
        raise DataError("there are no requests to send; name a trace that has some")
    facts = await target.look()
    facts = facts._replace(pid=facts.pid if pid is None else pid)
    check(faults, facts, own=isinstance(target, InProcess))
    tally = Tally(len(requests))
    driver = Driver(requests, target, load, tally)
    live = Live(tally, driver.now, out)
    watch, injector = Watch(facts.pid, driver.now, tally), Injector(faults, target, facts.pid, driver.now)
    begun = datetime.now(timezone.utc)
    driving = driver.drive()
    async with _meanwhile(watch.go_on(), injector.go_on(live.say), live.show()):
        driven = await driving
    await watch.read()
    live.close()
    about = {
        "begun": begun.isoformat(timespec="milliseconds"), "requests": len(requests), "timeout": load.timeout,
        "unfinished": driven.unfinished, "unsent": driven.unsent, "errors": dict(driven.messages), "left_out": dict(target.left_out),
        "unknown": watch.unknown, "missed_faults": [str(one) for one in injector.missed],
    }  # fmt: skip
    return Results(facts.name, str(load), digest(requests), driven.outcomes, tuple(watch.readings), tuple(injector.done), about=about)


async def whole(
    make: Callable[[], Target],
    requests: Sequence[Request],
    load: Load,
    *,
    faults: Sequence[Planned] = (),
    pid: int | None = None,
    start: str | None = None,
    within: float = 120.0,
) -> Results:
    """``replay`` with the target that ``make`` opens, of a server that the command ``start`` starts, which has so many seconds to answer.

    Raises what ``replay`` and ``first_token`` raise.
    """
    with contextlib.ExitStack() as stack:
        server = None if start is None else stack.enter_context(started(start))
        target = make()
        try:
            cold = None if server is None else await first_token(server, target, within)
            known = server.process.pid if pid is None and server is not None else pid
            return (await replay(requests, target, load, faults=faults, pid=known))._replace(cold_start=cold)
        finally:
            await target.close()


@contextlib.asynccontextmanager
async def _meanwhile(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Things that go on during the block and are cancelled at its end. Raises what one of them raised."""
    tasks = [asyncio.get_running_loop().create_task(one) for one in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    for end in ends:
        if isinstance(end, Exception):
            raise end


def summary(results: Results) -> list[str]:
    """What was measured and what was not, for people; docs/replay.md says how results are compared."""
    about, outcomes = results.about, results.outcomes
    counts = {status: sum(one.status == status for one in outcomes) for status in ("ok", "error", "cancelled")}
    seconds = max((one.ended for one in outcomes), default=0.0)
    late = max((one.sent - one.due for one in outcomes), default=0.0)
    lines = [
        f"{results.target}: {results.load}, {len(outcomes)} of {about['requests']} requests in {seconds:.1f} s",
        f"answered {counts['ok']}, failed {counts['error']}, cancelled {counts['cancelled']}; sent at most {late * 1e3:.0f} ms late",
    ]
    if judged := [one.passed for one in outcomes if one.passed is not None]:
        lines.append(f"checks of {len(judged)} answers held to {sum(judged) / len(judged):.0%}")
    if results.cold_start is not None:
        lines.append(f"from the server's start to the first token: {results.cold_start:.2f} s")
    if about["unfinished"] or about["unsent"]:
        lines.append(f"ended early: {about['unfinished']} requests were under way and {about['unsent']} not sent yet; they are left out")
    failed = [one.code for one in outcomes if one.status == "error"]
    lines += [f"error {code} ({failed.count(code)}): {about['errors'].get(code, 'no answer in time')}" for code in dict.fromkeys(failed)]
    lines += [f"left out of {count} requests, as the target does not know it: {name}" for name, count in about["left_out"].items()]
    lines += [f"the replay ended before the fault {one}" for one in about["missed_faults"]]
    return [*lines, *about["unknown"]]
