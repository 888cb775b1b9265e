"""What a run learns from: everything as it comes, or in shares."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from edge_rt_distill.data.samples import Sample, make_sample
from edge_rt_distill.model.rows import count_tokens
from edge_rt_distill.run.config import Config, DataConfig, DistilConfig, RunConfig, TeacherConfig
from edge_rt_distill.run.mixture import Mixed, check_weights, held_out, write_sets
from edge_rt_distill.run.workshop import HELD_OUT, KEPT, ROLLOUTS, TRAIN, VOCABULARY, Workshop, write_samples

from edge_rt.hooks import DataError, OptionError


def texts(name: str, count: int, words: int) -> list[Sample]:
    return [make_sample(text=f"{name} {number} " + " ".join(f"w{number}{i}" for i in range(words)), source=name) for number in range(count)]


BUSINESS, GENERAL, WRITTEN = texts("business", 12, 6), texts("general", 60, 12), texts("written", 20, 8)


@pytest.fixture
def place(tmp_path: Path) -> SimpleNamespace:
    """The folders that the steps before left."""
    write_samples(tmp_path / TRAIN, BUSINESS[:8] + GENERAL[:50])
    write_samples(tmp_path / HELD_OUT, BUSINESS[8:] + GENERAL[50:])
    write_samples(tmp_path / ROLLOUTS, WRITTEN)
    write_sets(tmp_path, [BUSINESS, [*GENERAL, BUSINESS[0]]])
    (tmp_path / VOCABULARY).mkdir()
    (tmp_path / VOCABULARY / KEPT).write_text("null")
    return SimpleNamespace(need=lambda name: tmp_path)


def shop(tiny: Path, place: SimpleNamespace, weights: tuple[int, ...], rollouts: int = 20) -> Workshop:
    data = DataConfig(samples=("business.jsonl", "general.jsonl"), weights=weights, rollouts=rollouts, length=64)
    distil = DistilConfig(held_out=8)
    return Workshop(Config(RunConfig(), TeacherConfig(str(tiny)), data, distil=distil), place.need("data"), tiny.parent)


def shares(mixed: Mixed, epoch: int) -> dict[str, float]:
    source = {one.id: one.source for one in BUSINESS + GENERAL + WRITTEN}
    tokens = Counter[str]()
    for one in mixed.epoch(epoch):
        tokens[source[one.sample]] += count_tokens(one)
    return {name: count / tokens.total() for name, count in tokens.items()}


def test_weights_are_shares_of_the_tokens_in_every_epoch(tiny: Path, place: SimpleNamespace) -> None:
    mixed = Mixed(shop(tiny, place, (3, 2, 1)), place)
    for epoch in (0, 1, 5):
        assert shares(mixed, epoch) == pytest.approx({"business": 3 / 6, "general": 2 / 6, "written": 1 / 6}, abs=0.03)
    assert sum(map(count_tokens, mixed.epoch(2))) == pytest.approx(sum(map(count_tokens, mixed.all)), rel=0.05)
    assert mixed.mixture(0).shares["business.jsonl"].passes > 3, "few samples of much weight come again"
    whole, later = (list(mixed.batches(64, 0)(1, start)) for start in (0, 3))
    assert [rows.numbers for rows in whole[3:]] == [rows.numbers for rows in later] != []
    once = mixed.once(1)
    assert len({id(one) for one in once}) == len(once) < len(mixed.epoch(0))
    assert once != mixed.once(2)


def test_without_weights_all_is_learnt_from_as_it_comes(tiny: Path, place: SimpleNamespace) -> None:
    mixed = Mixed(shop(tiny, place, ()), place)
    assert mixed.epoch(0) is mixed.epoch(3) is mixed.all
    assert len(mixed.all) == 8 + 50 + 20
    assert len(Mixed(shop(tiny, place, (), rollouts=0), place).all) == 8 + 50
    assert shares(Mixed(shop(tiny, place, (0, 1, 0)), place), 0) == {"general": 1.0}


def test_students_are_measured_on_the_same_shares(tiny: Path, place: SimpleNamespace) -> None:
    business, folder = {one.id for one in BUSINESS}, place.need("data")

    def counted(weights: tuple[int, ...]) -> tuple[int, int]:
        found = [one.sample in business for one in held_out(shop(tiny, place, weights), folder)]
        return sum(found), len(found) - sum(found)

    assert counted((1, 3, 9)) == (2, 6)
    assert counted((1, 0, 0)) == (4, 0), "there are no more"
    assert sum(counted(())) == 8
    assert sum(counted((0, 0, 1))) == 8, "nothing is held out of what the teacher writes"


@pytest.mark.parametrize(
    ("config", "allowed"),
    [
        (DataConfig(samples=("demo", "a.txt"), weights=(1, 2)), True),
        (DataConfig(samples=("demo", "a.txt"), weights=(1, 2), chats=3), False),
        (DataConfig(samples=("demo", "a.txt"), weights=(1, 2, 3), chats=3), True),
        (DataConfig(samples=("demo",), weights=(1, 2, 3), rollouts=3), False),
        (DataConfig(samples=("demo",), weights=(0,)), False),
        (DataConfig(samples=("demo", "demo"), weights=(1, 1)), False),
        (DataConfig(), True),
    ],
)
def test_there_is_a_weight_for_each(config: DataConfig, allowed: bool) -> None:
    if allowed:
        check_weights(config)
        return
    with pytest.raises(OptionError, match=r"give one, not all 0, for each of demo"):
        check_weights(config)


def test_a_source_without_samples_is_said(tiny: Path, place: SimpleNamespace) -> None:
    write_sets(place.need("data"), [BUSINESS + GENERAL, []])
    mixed = Mixed(shop(tiny, place, (1, 1, 1)), place)
    with pytest.raises(DataError, match=r"general\.jsonl is empty"):
        mixed.epoch(0)
