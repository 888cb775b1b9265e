"""Error cases: answers that fail their sample's check, references the model finds very unlikely, and what in the model carried them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from edge_rt.hooks import DataError
from edge_rt_distill.library.attribution import Aim, explain_answer
from edge_rt_distill.library.catalogue import Record
from edge_rt_distill.library.measure import each_output, measure
from edge_rt_distill.library.record import draft, jsonl
from edge_rt_distill.library.recorded import Trajectory
from edge_rt_distill.library.shards import Merged, Part, digest_of, record_shards
from edge_rt_distill.library.store import Library
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.load import Teacher
from edge_rt_distill.model.rows import TokenSequence
from edge_rt_distill.progress import Told, quiet

Check = Callable[[str, str, bool], Sequence[str]]
"""What is wrong with an answer: (sample id, its text, whether it ended by itself) -> reasons, none if it is right."""

_WORST = 8


class Case(NamedTuple):
    """An error. ``tokens``: prompt and answer; ``first``: where the answer begins. ``reasons``: what is wrong. ``aim``: what to explain."""

    sample: str
    tokens: list[int]
    first: int
    reasons: tuple[str, ...]
    aim: Aim


def failures(answers: Iterable[Trajectory], check: Check) -> list[Case]:
    """The recorded answers that fail their sample's check; the log-probability of the answer is explained."""
    found = []
    for answer in answers:
        reasons = tuple(check(answer.sample, answer.text, answer.ended))
        if reasons and answer.answer:
            first, tokens = len(answer.prompt), [*answer.prompt, *answer.answer]
            aim = Aim(range(first - 1, len(tokens) - 1), answer.answer)
            found.append(Case(answer.sample, tokens, first, reasons, aim))
    return found


def improbable(
    model: Decoder, sequences: Sequence[TokenSequence], *, below: float = -4.0, batch_tokens: int = 2048, told: Told = quiet
) -> list[Case]:
    """The samples whose reference has a mean log-probability under ``below`` (nats a token).

    Explained is by how much the model liked its own first choice better, at the up to 8 tokens where that is most.
    Raises DataError for sequences without tokens.
    """
    if not all(sequence.tokens for sequence in sequences):
        raise DataError("a sample has no tokens; leave it out")
    found: dict[int, Case] = {}
    for i, out in each_output(model, [sequence.tokens for sequence in sequences], batch_tokens, told=told):
        sequence = sequences[i]
        places = torch.tensor([t for t in range(1, len(sequence.tokens)) if sequence.targets[t]], dtype=torch.long)
        if not len(places):
            continue
        right = torch.tensor(list(sequence.tokens))[places]
        said = measure(model, out.hidden[places - 1], right, 1)
        mean = float(said.chosen.mean())
        if mean >= below:
            continue
        gap = said.top[:, 0] - said.chosen
        worst = gap.argsort(descending=True)[:_WORST].sort().values
        worst = worst[gap[worst] > 0]
        if len(worst):
            aim = Aim((places[worst] - 1).tolist(), said.top_ids[worst, 0].tolist(), right[worst].tolist())
            reason = f"the reference has {mean:.2f} nats a token"
            found[i] = Case(sequence.sample, list(sequence.tokens), int(places[0]), (reason,), aim)
    return [found[i] for i in sorted(found)]


def record_errors(
    library: Library, teacher: Teacher, cases: Sequence[Case], *, domain: str = "", heads: int | None = 16, told: Told = quiet
) -> Record:
    """Explain each case (``attribution.explain_answer``) and keep it. Raises DataError without cases, and what that raises."""
    aims = digest_of([case.reasons, [None if part is None else list(part) for part in case.aim]] for case in cases)
    drafted = draft("errors", teacher, domain, None, cases, {"heads": heads, "aims": aims})

    def work(indices: range, tell: Told) -> Part:
        case = cases[indices.start]
        explained = library.put(jsonl([explain(teacher, case, heads)]))
        return Part({f"errors-{indices.start:08d}.jsonl": explained}, {"reasons": list(case.reasons)})

    def merge(parts: Sequence[Part]) -> Merged:
        reasons = Counter(reason.split(":")[0] for part in parts for reason in part.facts["reasons"])
        objects = {name: digest for part in parts for name, digest in part.objects.items()}
        return Merged(objects, {"cases": len(parts), "reasons": dict(reasons.most_common(20))})

    return record_shards(library, drafted, len(cases), 1, work, merge, told)


def explain(teacher: Teacher, case: Case, heads: int | None) -> dict[str, Any]:
    """A case as plain data: texts by token, and what carried it (``attribution.Carried``), to six digits."""
    carried = explain_answer(teacher.model, case.tokens, case.aim, heads)
    pieces = [teacher.tokeniser.piece(token) for token in case.tokens]
    decode = teacher.tokeniser.decode
    return {
        "sample": case.sample, "reasons": list(case.reasons), "first": case.first, "tokens": case.tokens, "pieces": pieces,
        "positions": list(case.aim.positions), "wrong": list(case.aim.wrong), "right": case.aim.right and list(case.aim.right),
        "prompt": decode(case.tokens[: case.first]), "answer": decode(case.tokens[case.first :]), "value": carried.value,
        "token_scores": _short(carried.tokens), "layers": _short(carried.layers),
        "heads": [_short(row) for row in carried.heads], "head_gradients": [_short(row) for row in carried.head_gradients],
    }  # fmt: skip


def _short(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else float(f"{value:.6g}") for value in values]
