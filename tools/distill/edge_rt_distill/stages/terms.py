"""The loss terms of a training step, and the held-out errors that gates look at: both made of the same losses."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from edge_rt_distill.losses.balance import Name
from edge_rt_distill.losses.behaviour import answer_logprobs, imitation_loss, on_policy_loss, preference_loss, weighted
from edge_rt_distill.losses.token import TokenOptions, token_loss
from edge_rt_distill.model.decoder import Decoder, Output
from edge_rt_distill.model.generate import generate
from edge_rt_distill.model.rows import Rows, fill
from edge_rt_distill.stages.guides import Guides
from edge_rt_distill.stages.levels import Level, Term
from edge_rt_distill.stages.material import Material, rows_of_examples
from edge_rt_distill.stages.schedule import taid_mix
from edge_rt_distill.stages.teachers import TeacherView


class Scene(NamedTuple):
    """Who learns from whom, from what."""

    student: Decoder
    teacher: TeacherView
    guides: Guides
    material: Material


def groups(scene: Scene, level: Level, rows: Rows, step: int, number: int) -> Iterator[dict[Term, Tensor]]:
    """The level's terms for one batch, in groups that share a forward pass: go backward before asking for the next.

    ``step``: of the level. ``number``: of the batch in the level; it decides which examples, pairs and prompts come with it.
    """
    wanted = [term for term, weight in level.terms.items() if weight]
    corpus = [term for term in wanted if term in ("token", "hidden", "attention")]
    if corpus:
        yield corpus_terms(scene, rows, corpus, level.token._replace(mix=taid_mix(level, step)))
    if "imitation" in wanted:
        batch = rows_of_examples(scene.material.turn(scene.material.examples, number))
        yield {"imitation": imitation_loss(scene.student(batch.tokens).hidden, scene.student.head_weight, batch)}
    if "preference" in wanted:
        yield {"preference": _preference(scene, number)}
    if "on_policy" in wanted and number % level.on_policy_every == 0:
        answered = own_answers(scene, number // level.on_policy_every)
        if answered is not None:
            yield {"on_policy": _on_policy(scene, answered, level.token)}


def corpus_terms(scene: Scene, rows: Rows, wanted: Collection[Term], options: TokenOptions) -> dict[Term, Tensor]:
    """Terms of a batch of the corpus, in the order of ``wanted``."""
    ours, theirs = observe(scene, rows, wanted)
    known = scene.teacher.knows(rows)
    found: dict[Term, Tensor] = {}
    for term in wanted:
        if term == "token":
            found[term] = _tokens(scene, ours.hidden, theirs.hidden, rows, known, options)
        elif term == "hidden":
            found[term] = scene.guides.hidden_term(ours, theirs, known)
        else:
            found[term] = scene.guides.attention_term(ours, theirs, rows)
    return found


def _tokens(scene: Scene, ours: Tensor, theirs: Tensor, rows: Rows, known: Tensor, options: TokenOptions) -> Tensor:
    """The token level's loss. Within a word that only the student writes in pieces the next piece is no question to the teacher, which
    has said how likely the word is: there it is learnt from the text, as a share of the loss that positions have.
    """
    weight, labels = scene.student.head_weight, rows.labels.flatten()
    told, spelt = rows.mask * known, rows.mask * ~known
    loss = token_loss(
        ours.flatten(0, 1), weight, scene.teacher.says(theirs.flatten(0, 1)), weights=told.flatten(), labels=labels,
        prior=scene.material.prior, options=options,
    ).loss  # fmt: skip
    if not bool(spelt.any()):
        return loss
    from_text = TokenOptions(cross_entropy=1.0, chunk=options.chunk)
    spelling = token_loss(ours.flatten(0, 1), weight, None, weights=spelt.flatten(), labels=labels, options=from_text).loss
    share = spelt.sum() / rows.mask.sum()
    return (1 - share) * loss + share * spelling


def observe(scene: Scene, rows: Rows, wanted: Collection[Term]) -> tuple[Output, Output]:
    """What student and teacher make of a batch, with the states and maps that some terms need."""
    matches = scene.guides.matches if "hidden" in wanted else []
    heads = scene.guides.heads if "attention" in wanted else []
    ours: Output = scene.student(rows.tokens, states=[m.student for m in matches], attention=[h.student for h in heads])
    if matches or heads:
        theirs = scene.teacher.observe(rows, [m.teacher for m in matches], [h.teacher for h in heads])
    else:
        theirs = Output(scene.teacher.hidden(rows), {}, {})
    return ours, theirs


def _preference(scene: Scene, number: int) -> Tensor:
    pairs = scene.material.turn(scene.material.pairs, number)
    batch = rows_of_examples([pair.chosen for pair in pairs] + [pair.rejected for pair in pairs])
    # Both weigh whole answers, each token the same: with the weights of imitation a pair could be won by its format tokens alone.
    answers = (batch.mask > 0).float()
    batch = where_known(scene, batch._replace(mask=answers / answers.sum(1, keepdim=True).clamp_min(1)))
    ours = answer_logprobs(scene.student(batch.tokens).hidden, scene.student.head_weight, batch)
    return preference_loss(ours.view(2, -1), taught_logprobs(scene, batch).view(2, -1))


@torch.no_grad()
def taught_logprobs(scene: Scene, batch: Rows) -> Tensor:
    """``answer_logprobs`` [B], to the teacher."""
    at = batch.mask > 0
    return weighted(scene.teacher.says(scene.teacher.hidden(batch)[at]).of(batch.labels[at]), batch)


def where_known(scene: Scene, rows: Rows) -> Rows:
    """Rows in which only those predictions count that the teacher says something of."""
    return rows._replace(mask=rows.mask * scene.teacher.knows(rows))


def own_answers(scene: Scene, number: int) -> Rows | None:
    """The student's answers to the ``number``-th handful of prompts, as rows whose answers count; None if all are empty.

    Drawn from a seed made of the number: they depend on the student's weights and on nothing else.
    """
    prompts = scene.material.turn(scene.material.prompts, number)
    how = scene.material.answers
    seed = scene.material.seed * 1_000_003 + number
    with torch.no_grad():
        answers = generate(scene.student, prompts, tokens=how.tokens, temperature=how.temperature, seed=seed, end=how.end)
    both = [(list(prompt), answer.tokens) for prompt, answer in zip(prompts, answers, strict=True) if answer.tokens]
    if not both:
        return None
    return fill([prompt + answer for prompt, answer in both], [[0] * len(prompt) + [1] * len(answer) for prompt, answer in both])


def _on_policy(scene: Scene, rows: Rows, options: TokenOptions) -> Tensor:
    teacher = scene.teacher.says(scene.teacher.observe(rows, (), ()).hidden.flatten(0, 1))  # never seen again: not cached
    hidden, rows = scene.student(rows.tokens).hidden, where_known(scene, rows)
    return on_policy_loss(hidden, scene.student.head_weight, teacher, rows, TokenOptions("reverse", chunk=options.chunk)).loss


# ---- held-out errors -------------------------------------------------------------------------------------------------------------------


def errors(scene: Scene, names: Sequence[str]) -> dict[str, float]:
    """The held-out reconstruction error of some levels, where the teacher knows what the student has read.

    ``token``: KL(teacher||student) in nats a token. ``hidden``: mean 1 - weighted cosine of the matched states. ``attention``: weighted
    divergence of the matched heads' rows, in nats. ``behaviour``: how much less likely than to the teacher the kept answers of the
    teacher are to the student, in nats a (weighted) token.
    """
    terms: list[Term] = [name for name in ("token", "hidden", "attention") if name in names]
    sums, total = dict.fromkeys(terms, 0.0), 0.0
    with torch.no_grad():
        for rows in scene.material.held_out if terms else ():
            rows = where_known(scene, rows)
            amount = float(rows.mask.sum())
            total += amount
            for term, value in corpus_terms(scene, rows, terms, TokenOptions()).items():
                sums[term] += float(value) * amount
        found: dict[str, float] = {term: value / total for term, value in sums.items()}
        if "behaviour" in names:
            found["behaviour"] = _excess(scene)
    return found


def _excess(scene: Scene) -> float:
    examples, excess, total = scene.material.held_out_examples, 0.0, 0.0
    for start in range(0, len(examples), scene.material.beside):
        rows = where_known(scene, rows_of_examples(examples[start : start + scene.material.beside]))
        ours = answer_logprobs(scene.student(rows.tokens).hidden, scene.student.head_weight, rows)
        theirs = taught_logprobs(scene, rows)
        excess, total = excess + float((theirs - ours).sum()), total + float(rows.mask.sum())
    return excess / total


def say(values: Mapping[Name, float]) -> str:
    """Numbers by name, for messages."""
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())
