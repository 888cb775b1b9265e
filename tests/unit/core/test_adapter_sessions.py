"""Sessions and their adapters: cells made with one are never gone on from with another, wherever they come from."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import edge_rt
from edge_rt.core.generate.scheduler import Scheduler
from edge_rt.core.gguf.reader import read_header
from edge_rt.errors import ModelFileError, OptionError, SessionFileError
from edge_rt.model import Model
from edge_rt.plugin_host.registry import Registry
from edge_rt.testing.null_device import NullPlugin
from edge_rt.testing.random_models import write_random_adapter
from edge_rt.types import Delta, Done

PROMPT = "A prompt that is long enough to be worth sharing. "


@pytest.fixture(scope="module")
def files(random_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters for the model of ``model``."""
    raw, folder = random_model().read_bytes(), tmp_path_factory.mktemp("adapters")
    header = read_header(raw, len(raw))
    return {name: write_random_adapter(folder / f"{name}.gguf", header, seed=seed) for seed, name in enumerate(("law", "tales"))}


def opened(path: Path, **options: Any) -> Model:
    registry = Registry.load(entry_points=False, plugins={"null": NullPlugin()})
    return edge_rt.open(path, engine="null", device="null", context=512, registry=registry, **options)


@pytest.fixture
def model(random_model: Callable[..., Path], files: dict[str, Path]) -> Iterator[Model]:
    with opened(random_model(), adapters=files) as found:
        yield found


def ask(session: Any, prompt: Any = PROMPT, **options: Any) -> tuple[str, Done]:
    events = list(session.generate(prompt, temperature=0, max_tokens=12, ignore_eos=True, **options))
    return "".join(event.text for event in events if isinstance(event, Delta)), events[-1]


def alone(model: Model, prompt: str = PROMPT, **options: Any) -> str:
    model.prefixes.clear()
    with model.session() as session:
        return ask(session, prompt, **options)[0]


def test_each_adapter_and_each_scale_answers_in_its_own_way(model: Model) -> None:
    asked = [{}, {"adapter": "law"}, {"adapter": "law", "adapter_scale": 0.5}, {"adapter": "tales"}]
    answers = [alone(model, **options) for options in asked]
    assert len(set(answers)) == len(asked)
    assert answers == [alone(model, **options) for options in asked]
    assert alone(model, adapter="law", adapter_scale=0) == answers[0], "applied no times it is none"


def test_a_session_that_changes_its_adapter_computes_its_cells_again(model: Model) -> None:
    order: list[dict[str, Any]] = [{}, {"adapter": "law"}, {"adapter": "tales"}, {"adapter": "tales", "adapter_scale": 2.0}, {}]
    expected = [alone(model, **options) for options in order]
    model.prefixes.clear()
    with model.session() as session:
        for options, answer in zip(order, expected, strict=True):
            found, done = ask(session, **options)
            assert (found, done.usage.reused_tokens) == (answer, 0)
            held = model.memory().cache
            found, done = ask(session, **options)
            assert (found, done.usage.reused_tokens) == (answer, done.usage.prompt_tokens - 1)
            assert model.memory().cache == held, "the cells of another adapter are gone"


def test_beginnings_are_shared_by_requests_of_one_adapter_alone(model: Model) -> None:
    expected = {name: alone(model, PROMPT + "And?", adapter=name) for name in (None, "law", "tales")}
    model.prefixes.clear()
    with model.session() as session:
        ask(session, adapter="law")
    for name in (None, "tales", "law"):
        with model.session() as session:
            found, done = ask(session, PROMPT + "And?", adapter=name)
        assert found == expected[name]
        assert (done.usage.reused_tokens > 0) == (name == "law")


def test_a_clone_keeps_it(model: Model) -> None:
    expected = alone(model, PROMPT + "And?", adapter="law")
    with model.session() as session:
        ask(session, adapter="law")
        with session.clone() as other:
            found, done = ask(other, PROMPT + "And?", adapter="law")
            assert found == expected
            assert done.usage.reused_tokens >= len(PROMPT) - 1
            assert ask(other, PROMPT + "And?")[0] == alone(model, PROMPT + "And?")


def test_a_saved_session_remembers_it_by_its_content(
    model: Model, random_model: Callable[..., Path], files: dict[str, Path], tmp_path: Path
) -> None:
    path, longer = tmp_path / "s.session", PROMPT + "And?"
    with model.session() as session:
        ask(session, adapter="law", adapter_scale=0.5)
        session.save(path)
    expected, plain = alone(model, longer, adapter="law", adapter_scale=0.5), alone(model, longer)
    with opened(random_model(), adapters={"renamed": files["law"], "law": files["tales"]}) as other:
        with other.restore(path) as session:
            found, done = ask(session, longer, adapter="renamed", adapter_scale=0.5)
            assert found == expected
            assert done.usage.reused_tokens > len(PROMPT) // 2
        with other.restore(path) as session:
            found, done = ask(session, longer)
            assert (found, done.usage.reused_tokens) == (plain, 0)
    for adapters in ({}, {"law": files["tales"]}):
        with (
            opened(random_model(), adapters=adapters) as other,
            pytest.raises(SessionFileError, match="another adapter, then called 'law'"),
        ):
            other.restore(path)
    with opened(random_model()) as other:
        other.adapters.declare({"law": files["law"]})  # opened for the session
        other.restore(path).close()


def test_what_left_the_context_under_one_adapter_does_not_come_back_under_another(model: Model) -> None:
    turns = [{"role": "user", "content": f"Fact {i}: the {word} is in room {i}. " * 3} for i, word in enumerate(("lamp", "chair", "book"))]
    talk: Any = [*turns, {"role": "user", "content": "Where is the lamp?"}]
    with model.session(context=260) as session:
        for name in ("law", "tales", "law", None):
            found, done = ask(session, talk, adapter=name)
            assert done.context.absent_tokens, "it all fits, and nothing is shown"
            model.prefixes.clear()
            with model.session(context=260) as fresh:
                assert found == ask(fresh, talk, adapter=name)[0]
            model.prefixes.clear()


@pytest.mark.parametrize("seed", range(4))
def test_a_batch_of_several_gives_each_what_it_would_get_alone(model: Model, seed: int) -> None:
    chance = random.Random(seed)
    asked = [
        ("".join(chance.choices("abc ", k=chance.randrange(1, 90))), {"adapter": chance.choice((None, "law", "tales"))}) for _ in range(9)
    ]
    batch, text, sessions = Scheduler(model.engine, model.lock), [""] * len(asked), [model.session() for _ in asked]
    for i, (prompt, options) in enumerate(asked):
        job, steps = sessions[i].begin(prompt, temperature=0, max_tokens=10, ignore_eos=True, **options)

        def deliver(event: Any, i: int = i) -> bool:
            text[i] += event.text if isinstance(event, Delta) else ""
            return True

        def ended(error: Exception | None, i: int = i, job: Any = job) -> None:
            sessions[i].end(job)
            assert error is None

        batch.add(job, steps, deliver, ended)
        for _ in range(chance.randrange(3)):
            batch.step()
    while batch.step():
        pass
    for session in sessions:
        session.close()
    for found, (prompt, options) in zip(text, asked, strict=True):
        model.prefixes.clear()
        with model.session() as session:
            events = session.generate(prompt, temperature=0, max_tokens=10, ignore_eos=True, **options)
            assert found == "".join(event.text for event in events if isinstance(event, Delta))


def test_bad_choices_are_refused_and_leave_the_session_usable(model: Model) -> None:
    expected = alone(model)
    with model.session() as session:
        for bad, said in (
            ({"adapter": "nonsense"}, "there is no adapter 'nonsense'; this model has law, tales"),
            ({"adapter": "law", "adapter_scale": 1e9}, "give -1000 to 1000"),
            ({"adapter": "law", "adapter_scale": float("nan")}, "adapter_scale is nan"),
            ({"adapter_scale": 2.0}, "give an adapter too"),
        ):
            with pytest.raises(OptionError, match=said):
                ask(session, **bad)
        assert ask(session)[0] == expected


def test_bad_files_are_refused_and_leave_the_model_usable(
    model: Model, random_model: Callable[..., Path], files: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ModelFileError, match="is no adapter"):
        model.adapters.open("itself", random_model())
    with pytest.raises(ModelFileError, match="does not exist"):
        model.adapters.open("none", tmp_path / "none.gguf")
    with pytest.raises(OptionError, match="already"):
        model.adapters.open("law", files["tales"])
    assert model.adapters.names == ("law", "tales")
    with pytest.raises(ModelFileError, match="a LoRA adapter and no model"):
        opened(files["law"])
    with pytest.raises(ModelFileError, match="is no adapter"):
        opened(random_model(), adapters={"law": files["law"], "bad": random_model()})
    model.adapters.declare({"late": tmp_path / "none.gguf"})
    with model.session() as session:
        with pytest.raises(ModelFileError, match="does not exist"):
            ask(session, adapter="late")
        ask(session, adapter="law")


class Without:
    """An engine that applies no adapters."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def __getattr__(self, name: str) -> Any:
        if name in ("adapt", "open_adapter"):
            raise AttributeError(name)
        return getattr(self.engine, name)


def test_an_engine_that_applies_none_says_so(model: Model, files: dict[str, Path]) -> None:
    model.engine = Without(model.engine)  # type: ignore[assignment]
    model.adapters.declare({"late": files["law"]})
    with model.session() as session:
        with pytest.raises(OptionError, match="the engine null applies no adapters"):
            ask(session, adapter="late")
        ask(session)
