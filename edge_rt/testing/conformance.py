"""Suites that plugin authors subclass, with pytest: what every engine, device, embedder and post-processor must do.

    class TestMyEngine(EngineConformance):
        @pytest.fixture
        def engine_factory(self): return MyEngineFactory()

        @pytest.fixture
        def model(self): return ModelFile.open("tiny.gguf")

They need pytest and hypothesis (``pip install "edge-rt[dev]"``).
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_rt.hardware.profile import health_faults, profile_faults, told
from edge_rt.hooks import (
    CountsWork,
    Device,
    Embedder,
    HandlesCut,
    HasProfile,
    HoldsText,
    Offer,
    PostProcessor,
    PostProcessorFactory,
    Refusal,
    Rules,
    TellsHealth,
)
from edge_rt.plugin_host.guard import PluginEmbedder
from edge_rt.testing.engine_conformance import EngineConformance

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["DeviceConformance", "EmbedderConformance", "EngineConformance", "PostProcessorConformance"]

TEXTS = ("", "a", "The quick brown fox.\n", "naïve café — 12,5 %", "你好，世界。", "👩‍👩‍👧 e\u0301", "\r\n\t  \0")
"""Texts of many kinds."""


# ---- devices ---------------------------------------------------------------------------------------------------------

_T = TypeVar("_T")
_WARM_UP, _CALLS = 2, 20


class DeviceConformance:
    """Subclass with a fixture ``device``. It passes with and without the hardware, and says which it saw.

    What only some devices can (HasProfile, TellsHealth) is tested of those that can, and only where the hardware is there.
    """

    probe_seconds: ClassVar[float] = 1.0
    profile_seconds: ClassVar[float] = 2.0
    """The contract is half a second; a machine that runs tests is busy."""
    health_seconds: ClassVar[float] = 0.010

    @pytest.fixture
    def device(self) -> Device:
        """The device under test."""
        raise NotImplementedError("define the fixture device in your subclass")

    # ---- probe -------------------------------------------------------------------------------------------------------

    def test_probe_offers_or_refuses(self, device: Device) -> None:
        assert isinstance(device, Device)
        assert device.name
        assert device.name == device.name.strip().lower()
        _check_answer(device.probe())

    def test_probing_is_quick_repeatable_and_leaves_no_trace(self, device: Device, capfd: pytest.CaptureFixture[str]) -> None:
        first = device.probe()
        before = _traces()
        start = time.perf_counter()
        second = device.probe()
        assert time.perf_counter() - start < self.probe_seconds
        assert first == second, "two probes in a row must give equal answers"
        assert _left_behind(before) == []
        assert capfd.readouterr() == ("", "")

    def test_probing_without_tools_and_a_home_offers_or_refuses(self, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
        """A driver's tool that is not on the PATH, or cannot be run, is no reason to raise."""
        _poor_environment(monkeypatch)
        _check_answer(device.probe())

    def test_probing_on_several_threads_at_once(self, device: Device) -> None:
        assert len(set(map(repr, _at_once(device.probe)))) == 1, "threads disturb each other"

    # ---- profile -----------------------------------------------------------------------------------------------------

    def test_a_profile_says_what_can_be_true(self, device: Device) -> None:
        able = _with_profile(device)
        offer, profile = device.probe(), able.profile()
        assert list(profile_faults(profile)) == []
        assert isinstance(offer, Offer)
        assert profile.name == device.name
        assert profile.memory == offer.memory_bytes, "the offer and the profile must agree on the memory"

    def test_a_profile_says_what_its_figures_rest_on(self, device: Device) -> None:
        profile = _with_profile(device).profile()
        assert [figure for figure in told(profile) if figure not in profile.basis] == [], "without a basis"
        assert [figure for figure in profile.basis if figure not in told(profile)] == [], "a basis of what is not told"

    def test_a_profile_is_quick_repeatable_and_leaves_no_trace(self, device: Device, capfd: pytest.CaptureFixture[str]) -> None:
        able = _with_profile(device)
        first = able.profile()
        before = _traces()
        start = time.perf_counter()
        second = able.profile()
        assert time.perf_counter() - start < self.profile_seconds
        # What is measured varies, and may be left out when there was no time for it.
        assert (first.name, first.kind, first.cores, first.memory) == (second.name, second.kind, second.cores, second.memory)
        assert _left_behind(before) == []
        assert capfd.readouterr() == ("", "")

    # ---- health ------------------------------------------------------------------------------------------------------

    def test_health_says_what_can_be_true(self, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
        able = _with_health(device)
        for _ in range(3):  # the first may know nothing of counters
            assert list(health_faults(able.health())) == []
        _poor_environment(monkeypatch)
        assert list(health_faults(able.health())) == []

    def test_health_is_quick_and_leaves_no_trace(self, device: Device, capfd: pytest.CaptureFixture[str]) -> None:
        able = _with_health(device)
        for _ in range(_WARM_UP):
            able.health()
        before = _traces()
        times = []
        for _ in range(_CALLS):
            start = time.perf_counter()
            able.health()
            times.append(time.perf_counter() - start)
        # The quicker ones: on a busy machine any of them may have to wait for its turn.
        assert sorted(times)[_CALLS // 4] < self.health_seconds
        assert _left_behind(before, settle=1.0) == []
        assert capfd.readouterr() == ("", "")

    def test_health_on_several_threads_at_once(self, device: Device) -> None:
        able = _with_health(device)
        assert [fault for health in _at_once(able.health) for fault in health_faults(health)] == []


def _check_answer(answer: object) -> None:
    """An offer or a refusal that has what it must have."""
    if isinstance(answer, Refusal):
        assert answer.reason.strip()
        assert answer.remedy.strip(), "a refusal must say what the user can do"
        assert not answer.remedy.rstrip().endswith("."), "a remedy is a clause, without a full stop"
        return
    assert isinstance(answer, Offer)
    assert math.isfinite(answer.score)
    assert answer.description
    assert answer.memory_bytes > 0
    assert answer.engines
    assert answer.basis in ("measured", "simulated", "projected", "unknown")
    assert all(feature and feature == feature.lower() for feature in answer.features)
    assert len(set(answer.features)) == len(answer.features)


def _with_profile(device: Device) -> HasProfile:
    if isinstance(device.probe(), Refusal):
        pytest.skip(f"device {device.name} is not here: only a device that makes an offer is asked for its profile")
    if not isinstance(device, HasProfile):
        pytest.skip(f"device {device.name} does not say what it is like")
    return device


def _with_health(device: Device) -> TellsHealth:
    if isinstance(device.probe(), Refusal):
        pytest.skip(f"device {device.name} is not here")
    if not isinstance(device, TellsHealth):
        pytest.skip(f"device {device.name} does not say how it is")
    return device


def _poor_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setenv("LC_ALL", "C")


def _traces(settle: float = 0.2) -> dict[str, Any]:
    """What a call could leave behind in this process; it waits a little for threads that are about to end."""
    process, deadline = psutil.Process(), time.monotonic() + settle
    at_first = threading.active_count()
    while at_first > 1 and threading.active_count() >= at_first and time.monotonic() < deadline:
        time.sleep(0.01)
    files = Path("/proc/self/fd")
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "its files": sorted(os.listdir(".")),
        "open files": len(os.listdir(files)) if files.is_dir() else None,
        "threads of Python": threading.active_count(),
        "children": [child.pid for child in process.children()],
    }


def _left_behind(before: dict[str, Any], settle: float = 0.2) -> list[str]:
    """What is there now and was not before, in words. What others leave meanwhile, as threads that end, is no fault of the device."""
    now = _traces(settle)
    found = [what for what in ("environment", "folder", "its files") if now[what] != before[what]]
    found += [what for what in ("open files", "threads of Python") if now[what] is not None and now[what] > before[what]]
    return found + ["children"] * bool(set(now["children"]) - set(before["children"]))


def _at_once(function: Callable[[], _T]) -> list[_T]:
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda _: function(), range(8)))


# ---- post-processors -------------------------------------------------------------------------------------------------

Make = Callable[[], PostProcessor]

_suite = settings(
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.function_scoped_fixture],
)


class PostProcessorConformance:
    """Subclass with a fixture ``factory``, and ``examples``: texts that make the processor do all it does, and what they become.

    ``rules`` are those it is tested with, as its table of a rule file: subclass once for each set that matters.
    """

    examples: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Input and output. The suite also feeds them in every division, in parts and mixed, where it can only compare."""
    rules: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Its table of the rule file."""
    max_held: ClassVar[int] = 256
    """Characters of output the processor may hold back, at most."""

    @pytest.fixture
    def factory(self) -> PostProcessorFactory:
        """The factory under test."""
        raise NotImplementedError("define the fixture factory in your subclass")

    @pytest.fixture
    def make(self, factory: PostProcessorFactory) -> Make:
        """What makes a post-processor for one stream."""
        rules = Rules(self.rules)
        make = factory.compile(rules)
        rules.finish()
        return make

    @_suite
    @given(data=st.data())
    def test_every_split_gives_the_same_text(self, make: Make, data: st.DataObject) -> None:
        text = data.draw(self._texts())
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert _transform(make, pieces) == _transform(make, [text])

    def test_examples(self, make: Make) -> None:
        assert self.examples, "define examples in your subclass"
        assert {text: _transform(make, [text]) for text in self.examples} == dict(self.examples)

    def test_character_by_character(self, make: Make) -> None:
        for text in (*self.examples, *TEXTS, "".join(self.examples)):
            assert _transform(make, text) == _transform(make, [text])

    @_suite
    @given(data=st.data())
    def test_streams_do_not_touch_each_other(self, make: Make, data: st.DataObject) -> None:
        texts = [data.draw(self._texts()) for _ in range(2)]
        streams, outputs = [make() for _ in texts], ["", ""]
        for i in range(max(map(len, texts))):
            for number, text in enumerate(texts):
                outputs[number] += streams[number].feed(text[i : i + 1])
        for number, text in enumerate(texts):
            outputs[number] += streams[number].flush()
            assert outputs[number] == _transform(make, [text])

    def test_flush_gives_the_rest_once(self, make: Make) -> None:
        assert _transform(make, []) == _transform(make, [""])
        for text in (*self.examples, *TEXTS):
            processor = make()
            processor.feed(text)
            processor.flush()
            assert processor.flush() == "", "the second flush returned text again"

    @_suite
    @given(data=st.data())
    def test_a_cut_text_is_the_same_however_it_was_split(self, make: Make, data: st.DataObject) -> None:
        text, following = data.draw(self._texts()), data.draw(st.sampled_from(("", "\n\n", "###")))
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert _cut(make, pieces, following) == _cut(make, [text], following)

    @_suite
    @given(data=st.data())
    def test_what_it_says_of_itself_is_true(self, make: Make, data: st.DataObject) -> None:
        processor, fed = make(), ""
        before: dict[str, int] = {}
        for piece in data.draw(st.lists(self._texts(), max_size=4)):
            processor.feed(piece)
            fed += piece
            if isinstance(processor, HoldsText):
                assert fed.endswith(processor.held), "what is held is not the end of the text"
                assert len(processor.held) <= self.max_held
            if isinstance(processor, CountsWork):
                counts = dict(processor.counts)
                assert all(counts.get(kind, 0) >= count for kind, count in before.items()), "counts went down"
                before = counts
        processor.flush()
        assert not isinstance(processor, HoldsText) or processor.held == "", "something is held after the end"

    def test_what_is_held_back_is_bounded(self, make: Make) -> None:
        for text in self._long_texts(4000):
            processor, sent = make(), 0
            for start in range(0, len(text), 16):
                sent += len(processor.feed(text[start : start + 16]))
                if start % 512 == 0:
                    so_far = text[: start + 16]
                    held = len(_transform(make, [so_far])) - sent
                    assert held <= self.max_held, f"{held} characters are held back after {so_far[-40:]!r}"

    def test_time_is_linear(self, make: Make) -> None:
        for text in self._long_texts(16_000):
            short, long = _best_time(make, _pieces(text[:2_000], 4)), _best_time(make, _pieces(text, 4))
            # Eight times the text: linear takes 8 times as long, quadratic 64 times.
            assert long < 24 * short + 0.01, f"8 times the text took {long / short:.0f} times as long"

    def _texts(self) -> st.SearchStrategy[str]:
        """Examples, parts of them and other characters, in any order."""
        known = [text for text in (*self.examples, *TEXTS) if text]
        part = st.sampled_from(known).flatmap(lambda text: st.tuples(st.integers(0, len(text)), st.integers(0, len(text))).map(_part(text)))
        return st.lists(st.one_of(st.sampled_from(known), part, st.text(max_size=4)), max_size=6).map("".join)

    def _long_texts(self, length: int) -> Iterator[str]:
        """The examples over and over, and single characters of theirs repeated, which is where holding back goes wrong."""
        yield _repeat("".join((*self.examples, *TEXTS)), length)
        for character in sorted(set("".join(self.examples)))[:40]:
            yield character * length


def _part(text: str) -> Callable[[tuple[int, int]], str]:
    return lambda ends: text[min(ends) : max(ends)]


def _repeat(text: str, length: int) -> str:
    return (text * (length // len(text) + 1))[:length]


def _pieces(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


def _transform(make: Make, pieces: Sequence[str]) -> str:
    processor = make()
    return "".join([*map(processor.feed, pieces), processor.flush()])


def _cut(make: Make, pieces: Sequence[str], following: str) -> str:
    processor = make()
    return "".join([*map(processor.feed, pieces), processor.cut(following) if isinstance(processor, HandlesCut) else processor.flush()])


def _best_time(make: Make, pieces: Sequence[str]) -> float:
    """Seconds of processor time of the quickest of three runs."""
    times = []
    for _ in range(3):
        start = time.process_time()
        _transform(make, pieces)
        times.append(time.process_time() - start)
    return min(times)


# ---- embedders -------------------------------------------------------------------------------------------------------


class EmbedderConformance:
    """Subclass with a fixture ``embedder``, and ``examples``: questions, each with a text about it and one that is not."""

    examples: ClassVar[Mapping[str, tuple[str, str]]] = MappingProxyType({})
    """The cosine of a question and the first text must be ``relevant`` or more, that with the second less."""

    @pytest.fixture
    def embedder(self) -> Embedder:
        """The embedder under test."""
        raise NotImplementedError("define the fixture embedder in your subclass")

    def test_a_vector_for_every_text(self, embedder: Embedder) -> None:
        guarded = PluginEmbedder("the plugin under test", embedder)
        assert 0 < guarded.relevant < 1
        embed = guarded.start()  # which raises for what a session would not take
        for texts in (TEXTS, TEXTS[:1], ["The quick brown fox. 你好，世界。 " * 800]):
            assert len(embed(texts)) == len(texts)

    def test_examples(self, embedder: Embedder) -> None:
        assert self.examples, "define examples in your subclass"
        for question, texts in self.examples.items():
            asked, near, far = _directions(embedder, [question, *texts])
            assert asked @ near >= embedder.relevant, f"{texts[0]!r} is not found close to {question!r}: {asked @ near:.2f}"
            assert asked @ far < embedder.relevant, f"{texts[1]!r} is found close to {question!r}: {asked @ far:.2f}"

    def test_the_same_text_has_the_same_vector(self, embedder: Embedder) -> None:
        texts = (*self.examples, *TEXTS)
        together = _directions(embedder, texts)
        for text, vector in zip(texts, together, strict=True):
            assert _apart(_directions(embedder, [text]), vector) < _ROUNDING, f"{text!r} has another vector when it is alone"
        assert _apart(_directions(embedder, texts[::-1])[::-1], together) < _ROUNDING, "the order of texts matters"

    def test_on_several_threads_at_once(self, embedder: Embedder) -> None:
        texts = (*self.examples, *TEXTS)
        alone = _directions(embedder, texts)
        with ThreadPoolExecutor(4) as threads:
            for n, found in enumerate(threads.map(lambda n: _directions(embedder, texts[n % len(texts) :]), range(16))):
                assert _apart(found, alone[n % len(texts) :]) < _ROUNDING, "threads disturb each other"


_ROUNDING = 0.03
"""How far apart vectors of length 1 of the same text may be, because other texts were in the same call: a cosine of 0.9995."""


def _apart(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    return float(np.linalg.norm(a - b, axis=-1).max())


def _directions(embedder: Embedder, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """Vectors of length 1."""
    return PluginEmbedder("the plugin under test", embedder).start()(texts)
