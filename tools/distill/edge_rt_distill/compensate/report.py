"""What was chosen and why, as data and as a table; and how the gain grows with the text that corrections are fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from edge_rt_distill.compensate.choose import Options, Result, choose
from edge_rt_distill.compensate.cost import Budget
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.rows import beginning
from edge_rt_distill.progress import Told, quiet


class Saturation(NamedTuple):
    """KL on held-out text, nats a token, with corrections fitted to so many tokens, and without any."""

    tokens: int
    kl: float
    kl_none: float


def saturation(
    teacher: Decoder, student: Decoder, fitting: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]], budget: Budget,
    counts: Sequence[int], options: Options | None = None, told: Told = quiet,
) -> list[Saturation]:  # fmt: skip
    """`choose.choose` anew on the first so many tokens of the text. ``told``: called with points done and in all. Raises as that does."""
    found: list[Saturation] = []
    for number, count in enumerate(counts, 1):
        some = beginning(fitting, count, len)
        result = choose(teacher, student, some, held_out, budget, options)
        found.append(Saturation(sum(map(len, some)), result.kl, result.kl_none))
        told(number, len(counts))
    return found


def as_json(result: Result) -> dict[str, Any]:
    """All but the tensors."""
    sites = [{name: value for name, value in one._asdict().items() if name != "tensors"} for one in result.sites]
    return {
        "kl_none": result.kl_none, "kl_fitted": result.kl_fitted, "kl": result.kl,
        "bytes": result.bytes, "microseconds": result.microseconds, "budget": result.budget._asdict(),
        "norms": sorted(result.norms), "tuning": [{"step": step, "kl": kl} for step, kl in result.history], "sites": sites,
    }  # fmt: skip


def table(result: Result, *, all_sites: bool = False) -> str:
    """Markdown: a line for each site that has a correction (``all_sites``: of the others too), most gain first."""
    lines = [
        f"KL on held-out text {result.kl_none:.4f} without corrections, {result.kl_fitted:.4f} with each fitted by itself, {result.kl:.4f}"
        f" in the end; {result.bytes} of {result.budget.bytes} bytes, {result.microseconds:.0f} of {result.budget.microseconds:.0f} µs a"
        " token.",
        "",
        "| site | correction | bytes | µs | gain (nats a token) | why |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one in sorted(result.sites, key=lambda one: -one.gain):
        if one.kinds or all_sites:
            what = " + ".join(one.kinds) or "none"
            lines.append(f"| {one.site} | {what} | {one.bytes} | {one.microseconds:.1f} | {one.gain:.5f} | {one.reason} |")
    return "\n".join(lines) + "\n"
