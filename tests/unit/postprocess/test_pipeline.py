"""Chains of post-processors: order, flush, and what happens when one fails."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rt.errors import PluginError
from edge_rt.postprocess.pipeline import MAX_PENDING, Pipeline, Stage


class Replace:
    """Replaces a word, holding back what may be its beginning."""

    def __init__(self, old, new):
        self.old, self.new, self.kept = old, new, ""

    def feed(self, text):
        text = (self.kept + text).replace(self.old, self.new)
        keep = next(n for n in range(min(len(self.old) - 1, len(text)), -1, -1) if text.endswith(self.old[:n]))
        self.kept = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self):
        kept, self.kept = self.kept, ""
        return kept


class Delay:
    """Gives everything back ``n`` characters late, unchanged; fails at the ``at``-th call."""

    def __init__(self, n=0, at=0, wrong=None):
        self.n, self.at, self.wrong, self.text, self.calls = n, at, wrong, "", 0

    def _count(self):
        self.calls += 1
        if self.calls == self.at:
            if self.wrong is not None:
                return self.wrong
            raise ValueError("broken")
        return None

    def feed(self, text):
        if (wrong := self._count()) is not None:
            return wrong
        self.text += text
        out, self.text = self.text[: len(self.text) - self.n], self.text[max(0, len(self.text) - self.n) :]
        return out if len(out) else ""

    def flush(self):
        if (wrong := self._count()) is not None:
            return wrong
        return self.text


def chain(*processors, closed=()):
    return Pipeline([Stage(f"p{i}", p, fails_closed=i in closed) for i, p in enumerate(processors)])


def run(pipeline, pieces):
    return "".join(pipeline.feed(piece) for piece in pieces) + pipeline.flush()


@given(st.lists(st.text("abc", max_size=5), max_size=8))
def test_the_order_is_kept_and_splitting_changes_nothing(pieces):
    expected = "".join(pieces).replace("ab", "c").replace("cc", "b")
    assert run(chain(Replace("ab", "c"), Replace("cc", "b")), pieces) == expected


def test_flush_goes_through_those_that_come_after():
    assert run(chain(Replace("ab", "!"), Replace("a", "xy")), ["za"]) == "zxy"  # the a comes out of the first at its flush only
    assert run(chain(Delay(3), Delay(2), Replace("efg", "E")), ["abcd", "efg"]) == "abcdE"


def test_an_empty_chain_passes_everything():
    pipeline = Pipeline([])
    assert (pipeline.feed("text"), pipeline.flush(), pipeline.held) == ("text", "", ())


def test_after_flush_there_is_nothing_more():
    pipeline = chain(Delay(2))
    assert run(pipeline, ["abc"]) == "abc"
    assert (pipeline.flush(), pipeline.feed("x")) == ("", "")


def test_what_is_held_back_is_reported():
    pipeline = chain(Delay(2), Replace("xy", "-"))
    pipeline.feed("abcx")
    assert pipeline.held == (("p0", 2), ("p1", 0))
    pipeline.feed("yz.")
    pipeline.feed("....")
    assert pipeline.held == (("p0", 2), ("p1", None))  # it has rewritten something


@pytest.mark.parametrize("wrong", [None, 3, b"bytes"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_failing_processor_is_left_out_and_loses_nothing(at, wrong):
    pipeline = chain(Replace("b", "B"), Delay(2, at, wrong), Replace("c", "C"))
    assert run(pipeline, ["abc", "abcd"]) == "aBCaBCd"
    (notice,) = pipeline.notices
    assert "p1" in notice
    assert ("broken" in notice) if wrong is None else ("not text" in notice)
    assert "missing" not in notice
    assert [name for name, _ in pipeline.held] == ["p0", "p2"]


def test_a_failing_processor_that_rewrote_text_may_have_held_some_back():
    class Odd(Delay):
        def feed(self, text):
            return super().feed(text).upper()

    pipeline = chain(Odd(1, at=3))
    assert [pipeline.feed("ab"), pipeline.feed("cd"), pipeline.feed("ef")] == ["A", "BC", "ef"]
    assert "may be missing" in pipeline.notices[0]


def test_one_that_only_swallows_is_not_remembered_for_ever():
    pipeline = chain(Delay(10 * MAX_PENDING))
    for _ in range(100):
        pipeline.feed("x" * 100)
    assert pipeline.held == (("p0", None),)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_one_that_fails_closed_stops_the_stream(at):
    pipeline = chain(Delay(1), Delay(1, at), closed={1})
    with pytest.raises(PluginError, match=r"p1.*without it: ValueError at line \d+ of test_pipeline.py$"):
        run(pipeline, ["abc", "def"])
    assert (pipeline.feed("more"), pipeline.flush()) == ("", "")


def test_a_plugin_error_keeps_its_own_words():
    class Named(Delay):
        def feed(self, text):
            raise PluginError("plugin tidy: post-processor p0: feed raised OSError")

    pipeline = chain(Named())
    assert pipeline.feed("text") == "text"
    assert "plugin tidy" in pipeline.notices[0]


def test_interrupts_are_not_the_processors_fault():
    class Interrupted(Delay):
        def feed(self, text):
            raise KeyboardInterrupt

    pipeline = chain(Interrupted())
    with pytest.raises(KeyboardInterrupt):
        pipeline.feed("text")


def test_the_text_to_go_on_from_has_what_is_concealed_out_and_nothing_else_changed():
    pipeline = chain(Replace("a", "A"), Replace("b", "-"), Replace("c", "C"), closed={1})
    assert (run(pipeline, ["abc", "cba"]), pipeline.text) == ("A-CC-A", "A-cc-A")
    pipeline = chain(Replace("a", "A"))
    assert (run(pipeline, ["abc", "a"]), pipeline.text) == ("AbcA", "abca")
    assert Pipeline([]).text is None


def test_the_failure_of_one_before_what_conceals_does_not_tell_the_text():
    class Quotes(Delay):
        def feed(self, text):
            raise self.wrong(f"cannot do {text}")

    for wrong in (ValueError, PluginError):
        pipeline = chain(Quotes(wrong=wrong), Replace("secret", "-"), Quotes(wrong=wrong), closed={1})
        assert run(pipeline, ["a secret"]) == "a -"
        first, second = pipeline.notices
        assert (first.partition(": ")[2][: len(wrong.__name__) + 8], "secret" in first) == (f"{wrong.__name__} at line", False)
        assert second.endswith("cannot do a -")  # what comes to the third was seen by the second


def test_after_an_interrupt_nothing_more_comes_out():
    class Interrupted(Delay):
        def feed(self, text):
            self.calls += 1
            if self.calls == 1:
                raise KeyboardInterrupt
            return text

    pipeline = chain(Delay(2), Interrupted())
    with pytest.raises(KeyboardInterrupt):
        pipeline.feed("abcd")
    assert (pipeline.cut(""), pipeline.flush(), pipeline.feed("e")) == ("", "", "")


def test_one_that_holds_what_is_no_text_is_left_out():
    class Odd(Delay):
        held = b"c"

    pipeline = chain(Odd(1))
    assert run(pipeline, ["abc"]) == "abc"
    assert "not text" in pipeline.notices[0]
