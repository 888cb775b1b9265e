"""Level 4's material: the teacher's answers to each prompt, scored; the good ones to imitate, best against worst as pairs.

- ``trajectories``: k answers a prompt, each with its reward. Written to a file as they come, a run that was stopped goes on in it.
- ``imitation``: answers above a quantile and a threshold (rejection sampling: RAFT, Dong et al. 2023, arXiv 2304.06767), weighed by
  how far they are above their prompt's mean (advantage-weighted regression, Peng et al. 2019, arXiv 1910.00177).
- ``pairs``: best against worst of a prompt (for DPO, Rafailov et al. 2023, arXiv 2305.18290).
Equal calls give equal answers, in whatever order the samples come and wherever a run was stopped: what is sampled side by side
depends on the samples alone, and of a group that was not finished nothing is used.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from edge_rt.hooks import DataError, OptionError
from edge_rt_distill.behaviour.examples import Example, Pair, example
from edge_rt_distill.behaviour.journal import Journal
from edge_rt_distill.behaviour.rewards import RewardFunction, reward
from edge_rt_distill.data import batches
from edge_rt_distill.data.samples import Sample
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.generate import Rollout, generate
from edge_rt_distill.model.tokens import Tokeniser
from edge_rt_distill.progress import Told, quiet

Generate = Callable[..., list[Rollout]]


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled. ``tokens``: of an answer at most. ``reward``: MODULE:FUNCTION, "" for the checks.

    ``rows``: answers written side by side. Reading the weights once for many is what makes it fast; each row has a cache of its own.
    """

    per_prompt: int = 4
    tokens: int = 160
    temperature: float = 0.8
    top_k: int = 0
    seed: int = 0
    rows: int = 32
    reward: str = ""

    def __post_init__(self) -> None:
        if self.per_prompt < 1 or self.rows < 1 or self.tokens < 1 or self.temperature < 0 or self.top_k < 0:
            raise OptionError(
                "an answer and a token at least are sampled, at a temperature and top-k not below 0; mend the sampling options"
            )
        if self.per_prompt > 1 and self.temperature == 0:
            raise OptionError(f"{self.per_prompt} answers at temperature 0 are all the same; raise the temperature, or sample one")


@dataclass(frozen=True)
class Choice:
    """What is learnt from. An answer is imitated if its reward is at least ``threshold`` and in the best ``1 - quantile`` of all.

    ``sharpness``: its weight is exp((reward - mean of its prompt) / sharpness), at most ``largest``; weights have mean 1.
    ``heavier``: times that for the end of the turn and tokens of format. ``margin``: reward between the two of a pair, at least.
    """

    threshold: float = 0.6
    quantile: float = 0.5
    sharpness: float = 0.5
    largest: float = 3.0
    heavier: float = 2.0
    margin: float = 0.2

    def __post_init__(self) -> None:
        if not (0 <= self.threshold <= 1 and 0 <= self.quantile < 1 and 0 < self.margin <= 1):
            raise OptionError("threshold is from 0 to 1, quantile below 1, margin above 0 and at most 1; mend the options of level 4")
        if not (self.sharpness > 0 and self.largest > 0 and 0 <= self.heavier < math.inf):
            raise OptionError("sharpness and the largest weight are above 0, heavier is not negative; mend the options of level 4")


@dataclass(frozen=True)
class Trajectory:
    """One answer of the teacher. ``answer``: its tokens, with the end of the turn if it ``ended`` by itself; ``text``: in words."""

    sample: str
    number: int
    seed: int
    prompt: list[int]
    answer: list[int]
    text: str
    ended: bool
    logprob: float
    """Of the whole answer under the teacher, nats."""
    reward: float
    parts: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def from_json(data: dict[str, object]) -> Trajectory:
        """Raises ``DataError`` if a field is missing."""
        try:
            return Trajectory(**{item.name: data[item.name] for item in fields(Trajectory)})  # type: ignore[arg-type]
        except (KeyError, TypeError) as error:
            raise DataError(f"a recorded answer lacks {error}; delete the file to sample anew") from None


def seed_of(seed: int, what: str) -> int:
    """A seed for one part of a run, 0 <= . < 2^62."""
    return int.from_bytes(hashlib.sha256(f"rollouts {seed} {what}".encode()).digest()[:8], "big") >> 2


def trajectories(
    model: Decoder,
    tokeniser: Tokeniser,
    samples: Sequence[Sample],
    sampling: Sampling,
    *,
    file: Path | None = None,
    origin: str = "",
    score: RewardFunction = reward,
    sample_with: Generate = generate,
    told: Told = quiet,
) -> list[Trajectory]:
    """The answers of ``model`` to the last question of each of ``samples``, scored; passages and prompts too long are left out.

    ``file``: JSONL that is written on the way; what it has of the same ``origin`` (the model's digest), samples and ``sampling`` is not
    sampled again. ``told``: prompts done and in all. Raises ``DataError`` if no sample has a question, or the file is of other settings.
    """
    prompts = _prompts(samples, tokeniser, model.architecture.context - sampling.tokens)
    groups = _groups(prompts, max(1, sampling.rows // sampling.per_prompt))
    asked = hashlib.sha256(" ".join(sorted(prompts)).encode()).hexdigest()[:16]
    journal = Journal(file, {"kind": "trajectories", "version": 1, "origin": origin, "samples": asked, **asdict(sampling)})
    known = _known(journal.records(), sampling.per_prompt)
    end, by_id = batches.turn_end(tokeniser), {sample.id: sample for sample in samples}
    found: dict[str, list[Trajectory]] = {}
    for group in groups:
        if not all(name in known for name in group):
            seed = seed_of(sampling.seed, group[0])
            rollouts = sample_with(
                model, [prompts[name] for name in group for _ in range(sampling.per_prompt)], tokens=sampling.tokens,
                temperature=sampling.temperature, seed=seed, end=end, top_k=sampling.top_k, batch=sampling.rows,
            )  # fmt: skip
            for name, own in zip(group, _cut(rollouts, sampling.per_prompt), strict=True):
                known[name] = list(_scored(own, tokeniser, end, by_id[name], prompts[name], seed, score))
            journal.add(asdict(one) for name in group for one in known[name])
        found.update((name, known[name]) for name in group)
        told(len(found), len(prompts))
    return [one for name in prompts for one in found[name]]


def _prompts(samples: Sequence[Sample], tokeniser: Tokeniser, room: int) -> dict[str, list[int]]:
    """Sample -> the tokens of its prompt, for those that ask something and fit into ``room`` tokens, in their order."""
    asking = {sample.id: batches.question(sample, tokeniser) for sample in samples if sample.prompt}
    fitting = {name: prompt for name, prompt in asking.items() if 0 < len(prompt) <= room}
    if not fitting:
        why = f"none of their questions fits into {room} tokens" if asking else "none of them asks anything"
        raise DataError(f"{len(samples)} samples, but {why}; add chat samples, or sample fewer tokens")
    return fitting


def _groups(prompts: Mapping[str, list[int]], size: int) -> list[list[str]]:
    """The samples that are answered side by side: alike in length, so that little is filled up."""
    order = sorted(prompts, key=lambda name: (len(prompts[name]), name))
    return [order[at : at + size] for at in range(0, len(order), size)]


def _cut(rollouts: Sequence[Rollout], size: int) -> list[Sequence[Rollout]]:
    return [rollouts[at : at + size] for at in range(0, len(rollouts), size)]


def _known(records: Sequence[dict[str, object]], per_prompt: int) -> dict[str, list[Trajectory]]:
    """Sample -> its answers, where all are there. Of a sample that was sampled again the later ones count."""
    groups: dict[str, dict[int, Trajectory]] = {}
    for record in records:
        one = Trajectory.from_json(record)
        groups.setdefault(one.sample, {})[one.number] = one
    return {name: [group[i] for i in range(per_prompt)] for name, group in groups.items() if sorted(group) == list(range(per_prompt))}


def _scored(
    rollouts: Sequence[Rollout], tokeniser: Tokeniser, end: int, sample: Sample, prompt: list[int], seed: int, score: RewardFunction
) -> Iterator[Trajectory]:
    for number, rollout in enumerate(rollouts):
        words = rollout.tokens[:-1] if rollout.ended and rollout.tokens[-1:] == [end] else rollout.tokens
        text = tokeniser.decode(words)
        value = score(sample, text, rollout.ended)
        answer = [*words, end] if rollout.ended else list(words)
        logprob = sum(rollout.logprobs)
        yield Trajectory(sample.id, number, seed, list(prompt), answer, text, rollout.ended, logprob, value.value, value.parts)


FORMAT = frozenset("{}[]()<>\"'`:;,.|#*-_=+•·、。，：；！？!?（）【】「」“”\n\t ")
"""What layout and format are written with; a token that is made of nothing else is one of format."""


def format_tokens(tokeniser: Tokeniser, used: Sequence[int]) -> frozenset[int]:
    """The end of the turn and those of ``used`` that are of format: punctuation, brackets and line ends."""
    marks = {token for token in set(used) if (text := tokeniser.decode([token])) and set(text) <= FORMAT and text.strip(" ")}
    return frozenset(marks | {batches.turn_end(tokeniser)})


def imitation(found: Sequence[Trajectory], tokeniser: Tokeniser, choice: Choice) -> list[Example]:
    """The answers worth imitating, in the order of ``found``, equal answers to a prompt once. Empty if none is good enough."""
    if not found:
        return []
    line = max(choice.threshold, _quantile([one.reward for one in found], choice.quantile))
    means = {name: sum(group) / len(group) for name, group in _rewards(found).items()}
    kept: dict[tuple[str, tuple[int, ...]], Trajectory] = {}
    for one in found:
        if one.reward >= line and one.answer:
            kept.setdefault((one.sample, tuple(one.answer)), one)
    weights = [min(choice.largest, math.exp((one.reward - means[one.sample]) / choice.sharpness)) for one in kept.values()]
    mean = sum(weights) / len(weights) if weights else 1.0
    heavy = format_tokens(tokeniser, [token for one in kept.values() for token in one.answer])
    return [_example(one, weight / mean, heavy, choice) for one, weight in zip(kept.values(), weights, strict=True)]


def pairs(found: Sequence[Trajectory], tokeniser: Tokeniser, choice: Choice) -> list[Pair]:
    """The best against the worst answer of each prompt where at least ``margin`` lies between; of equals the first sampled."""
    groups: dict[str, list[Trajectory]] = {}
    for one in found:
        if one.answer:
            groups.setdefault(one.sample, []).append(one)
    made = []
    for group in groups.values():
        best, worst = max(group, key=lambda one: one.reward), min(group, key=lambda one: one.reward)
        if best.reward - worst.reward >= choice.margin and best.reward >= choice.threshold:
            heavy = format_tokens(tokeniser, [*best.answer, *worst.answer])
            made.append(Pair(_example(best, 1.0, heavy, choice), _example(worst, 1.0, heavy, choice), best.reward - worst.reward))
    return made


def _example(one: Trajectory, weight: float, heavy: frozenset[int], choice: Choice) -> Example:
    return example(one.prompt, one.answer, weight=weight, heavy=heavy, heavier=choice.heavier, sample=one.sample, reward=one.reward)


def _rewards(found: Sequence[Trajectory]) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = {}
    for one in found:
        groups.setdefault(one.sample, []).append(one.reward)
    return groups


def _quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of ``values`` do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
