"""The post-processor suite passes a correct processor, and finds each way to break the contract."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from edge_rt.hooks import PostProcessor, PostProcessorFactory
from edge_rt.testing.conformance import PostProcessorConformance


class Arrows:
    """Writes ``->`` as an arrow."""

    def __init__(self) -> None:
        self.held = ""

    def feed(self, text: str) -> str:
        text = self.held + text
        self.held = "-" if text.endswith("-") else ""
        return text[: len(text) - len(self.held)].replace("->", "→")

    def flush(self) -> str:
        rest, self.held = self.held, ""
        return rest


class TestArrows(PostProcessorConformance):
    examples = {"a -> b": "a → b", "--->->": "--→→", "- >": "- >", "-": "-"}  # noqa: RUF012
    max_held = 1

    @pytest.fixture
    def factory(self) -> PostProcessorFactory:
        return PostProcessorFactory("arrows", lambda rules: Arrows)


class SplitsWrongly(Arrows):
    def feed(self, text: str) -> str:
        return text.replace("->", "→")


class FlushesTwice(Arrows):
    def flush(self) -> str:
        return self.held


class LosesTheRest(Arrows):
    """Does so in every division, so that comparing divisions does not tell."""

    def flush(self) -> str:
        self.held = ""
        return ""


class HoldsEverything(Arrows):
    def feed(self, text: str) -> str:
        self.held += text
        return ""

    def flush(self) -> str:
        rest, self.held = self.held.replace("->", "→"), ""
        return rest


class SharesState(Arrows):
    shared = [""]  # noqa: RUF012  # the fault

    def feed(self, text: str) -> str:
        self.held = self.shared[0]
        sent = super().feed(text)
        self.shared[0] = self.held
        return sent

    def flush(self) -> str:
        rest, self.shared[0] = self.shared[0], ""
        return rest


class Quadratic(Arrows):
    def __init__(self) -> None:
        super().__init__()
        self.seen = ""

    def feed(self, text: str) -> str:
        self.seen = text + self.seen  # reads all of it again
        self.seen.count("zz")
        sum(map(ord, self.seen[::8]))
        return super().feed(text)


FAULTS = {
    SplitsWrongly: "test_character_by_character",
    FlushesTwice: "test_flush_gives_the_rest_once",
    LosesTheRest: "test_examples",
    HoldsEverything: "test_what_is_held_back_is_bounded",
    SharesState: "test_streams_do_not_touch_each_other",
    Quadratic: "test_time_is_linear",
}


def _passes(test: str, make: Callable[[], PostProcessor]) -> bool:
    try:
        getattr(TestArrows(), test)(make=make)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize(("fault", "test"), FAULTS.items())
def test_the_suite_finds_the_fault(fault: type[Arrows], test: str) -> None:
    assert _passes(test, Arrows)
    assert not _passes(test, fault)


def test_the_character_test_finds_a_bad_split() -> None:
    assert not _passes("test_character_by_character", SplitsWrongly)
