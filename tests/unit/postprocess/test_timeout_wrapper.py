"""Post-processors that stall hold up nobody."""

import threading
import time

import pytest

from edge_rt.errors import PluginError
from edge_rt.postprocess.pipeline import Pipeline, Stage, Stalled, TimeoutWrapper


class Slow:
    """Doubles text; waits for ``gate`` at the ``at``-th feed."""

    def __init__(self, at=0):
        self.at, self.calls, self.gate, self.held, self.threads = at, 0, threading.Event(), "", set()

    def feed(self, text):
        self.calls += 1
        self.threads.add(threading.current_thread())
        text, self.held = self.held + text[:-1], text[-1:]
        if self.calls == self.at:
            self.gate.wait(20)
        return text * 2

    def flush(self):
        held, self.held = self.held, ""
        return held * 2

    @property
    def counts(self):
        return {"calls": self.calls}


def test_calls_and_what_it_says_of_itself_pass_through():
    slow = Slow()
    aside = TimeoutWrapper(slow)
    assert (aside.feed("abc"), aside.held, dict(aside.counts)) == ("abab", "c", {"calls": 1})
    assert (aside.cut(""), aside.held) == ("cc", "")
    assert slow.threads.isdisjoint({threading.current_thread()})


def test_what_it_raises_is_raised_here():
    class Broken:
        def feed(self, text):
            raise ValueError("broken")

        flush = feed

    with pytest.raises(ValueError, match="broken"):
        TimeoutWrapper(Broken()).feed("x")


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_one_that_would_end_the_program_ends_only_itself(kind, capfd):
    class Ends:
        def feed(self, text):
            raise kind(text)

        def flush(self):
            return ""

    pipeline = Pipeline([Stage("ends", TimeoutWrapper(Ends()), fails_closed=True)])
    with pytest.raises(PluginError, match=r"ends failed .*: Quit at line"):
        pipeline.feed("secret")
    assert capfd.readouterr() == ("", "")


def test_one_that_stalls_is_left_out_and_its_text_goes_on():
    slow = Slow(at=2)
    pipeline = Pipeline([Stage("slow", TimeoutWrapper(slow, patience=0.05))])
    started = time.monotonic()
    assert [pipeline.feed("abc"), pipeline.feed("def"), pipeline.feed("ghi"), pipeline.flush()] == ["abab", "cdef", "ghi", ""]
    assert time.monotonic() - started < 10
    assert "Stalled: it did not come back within 0.05 seconds" in pipeline.notices[0]
    assert pipeline.use()[0].left_out
    slow.gate.set()


def test_one_that_stalls_and_must_not_be_left_out_stops_the_stream():
    slow = Slow(at=1)
    pipeline = Pipeline([Stage("slow", TimeoutWrapper(slow, patience=0.05), fails_closed=True)])
    with pytest.raises(PluginError, match="slow failed and the stream must not go on without it: Stalled"):
        pipeline.feed("secret")
    assert pipeline.flush() == ""
    slow.gate.set()


def test_its_thread_ends_with_it():
    slow = Slow()
    aside = TimeoutWrapper(slow)
    aside.feed("x")
    (thread,) = slow.threads
    del aside
    thread.join(5)
    assert not thread.is_alive()
    assert Stalled.__mro__[1] is Exception, "not an EdgeError: it is the plugin's failure"
