"""What was chosen and why, as data and as a table."""

from __future__ import annotations

from typing import Any

from edge_rt_distill.compensate.choose import Result


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
