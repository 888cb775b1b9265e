"""The metrics: what each measures, by which forms of items, how, and what it cannot see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

FORMS: Mapping[str, str] = {
    "choice": "Of several continuations the right one is likeliest: by the sum of its log-likelihood behind a `text`, by its mean a byte "
    "behind `messages`, where lengths differ. 1 or 0.",
    "answer": "One greedy answer, checked: the mean of its checks by their weights.",
    "turns": "A conversation in which the model answers every turn and reads its own answers; the mean of all turns' checks.",
    "variants": "The same question in several wordings, each a choice: the share of the wordings with which the commonest choice is made.",
}


class Metric(NamedTuple):
    """``what`` it measures; ``forms`` that its items have; ``limits``: what it cannot see."""

    what: str
    forms: tuple[str, ...]
    limits: str


METRICS: Mapping[str, Metric] = {
    "grammar": Metric(
        "Prefers a sound sentence to one with a single fault of grammar (minimal pairs, BLiMP, Warstadt et al. 2020).", ("choice",),
        "Judges what is preferred, not what is written.",
    ),
    "facts": Metric("Knows what holds in the domain, of options that read alike.", ("choice", "answer"), "Knows only what was asked."),
    "logic": Metric(
        "Draws what follows and not what only sounds so: rules, conditions, orders, quantities.", ("choice", "answer"),
        "An answer may be right for a wrong reason.",
    ),
    "style": Metric(
        "Keeps the register that is asked for: formal or plain, one person, one tone.", ("choice", "answer"),
        "By marks of register; a tone without them passes.",
    ),
    "safety": Metric(
        "Prefers and gives the lawful, careful answer: no advice that the domain's rules forbid.", ("choice", "answer"),
        "Known risks only; checked by words that must and must not occur.",
    ),
    "coherence": Metric(
        "Does not contradict or forget what was said in earlier turns.", ("turns", "choice"), "Sees what is asked again, and nothing else.",
    ),
    "instructions": Metric(
        "Does what is asked in the way that is asked (verifiable instructions, IFEval, Zhou et al. 2023).", ("answer",),
        "Sees form and words, not sense.",
    ),
    "faithfulness": Metric(
        "Says of a long text what stands in it and nothing else.", ("answer", "choice"), "Free paraphrase fails (the check `supported`).",
    ),
    "terms": Metric("Uses the domain's own term and not a neighbour's.", ("choice", "answer"), "One standard term a notion."),
    "numbers": Metric("Gets figures exactly right: sums, units, dates, rates.", ("choice", "answer"), "Not how it got there."),
    "format": Metric("Writes valid JSON, CSV, lists, dates and codes as asked.", ("answer",), "Form alone."),
    "paraphrase": Metric("Decides the same however it is asked.", ("variants",), "The same wrong choice counts as steady."),
    "refusal": Metric(
        "Declines what it must not or cannot answer, and answers what it may.", ("answer", "choice"), "By phrases that decline.",
    ),
    "redaction": Metric("Passes on a text without what must not be passed on.", ("answer", "choice"), "The secrets that are named."),
    "concise": Metric("Says it in as few words as asked, and still says it.", ("answer", "choice"), "Length and named content."),
    "stopping": Metric(
        "Ends when it is done: no loop, no cut, no going on as the user.", ("answer",), "Within the tokens that it is given.",
    ),
}  # fmt: skip
DOMAINS = ("finance", "government", "healthcare", "education", "legal", "retail", "manufacturing", "telecom")
