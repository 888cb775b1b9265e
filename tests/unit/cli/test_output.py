"""What the commands write, and where."""

import errno
import io
import json
import sys
from types import MappingProxyType

import pytest

from edge_rt import model_hub
from edge_rt.cli import output
from edge_rt.cli.generation import check_text, read_text, show_json, show_text, summary
from edge_rt.cli.interrupts import cancelling
from edge_rt.errors import OptionError, UserError
from edge_rt.types import ContextUse, Delta, Done, Notice, PostUse, PromptProgress, Timings, TokenLogprob, Usage, record


def done(**changes):
    parts = {
        "reason": "max_tokens",
        "usage": Usage(prompt_tokens=10, completion_tokens=5, reused_tokens=4, drafted_tokens=3, accepted_tokens=2, computed_tokens=6),
        "timings": Timings(first_token=0.5, prompt=0.25, decode=2.0),
        "context": ContextUse(used=15, allowed=64),
        "seed": 9,
    }
    return Done(**{**parts, **changes})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Broken(io.StringIO):
    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


def test_text_goes_to_stdout_and_everything_else_to_stderr(capsys):
    events = [PromptProgress(1, 2, 0), Notice("a fallback"), Delta("Hel", (1,)), Delta("", (2,)), Delta("lo", (3,)), done()]
    assert show_text(iter(events)) == ("Hello", events[-1])
    assert capsys.readouterr() == ("Hello", "note: a fallback\n")


def test_events_as_json_lines(capsys):
    rivals = ((5, -0.5), (6, float("-inf")))
    events = [
        PromptProgress(1, 2, 0),
        Delta("é", (5,), (TokenLogprob(5, "é", -0.5, rivals),)),
        Delta("l", (6,)),
        Notice("so"),
        done(stop="END", post=(PostUse("redaction", MappingProxyType({"phone": 2}), 11),), rules="1a2b3c4d"),
    ]
    assert show_json(iter(events)) == ("él", events[-1])
    out, err = capsys.readouterr()
    assert err == ""
    lines = [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()]
    assert lines == [
        {"event": "prompt", "done": 1, "total": 2, "reused": 0},
        {"event": "delta", "text": "é", "tokens": [5],
         "logprobs": [{"token": 5, "text": "é", "logprob": -0.5, "top": [[5, -0.5], [6, None]]}]},
        {"event": "delta", "text": "l", "tokens": [6]},
        {"event": "notice", "message": "so"},
        {"event": "done", "reason": "max_tokens", "seed": 9, "stop": "END",
         "usage": {"prompt_tokens": 10, "completion_tokens": 5, "reused_tokens": 4, "drafted_tokens": 3, "accepted_tokens": 2,
                   "computed_tokens": 6},
         "timings": {"first_token": 0.5, "prompt": 0.25, "decode": 2.0, "total": 2.5, "tokens_per_second": 2.0},
         "context": {"used": 15, "allowed": 64, "policy": "graded", "evicted_segments": 0, "evicted_tokens": 0, "absent_tokens": 0,
                     "recalled_segments": 0, "recalled_tokens": 0, "pruned_cells": 0, "missing_cells": 0, "released_bytes": 0},
         "post": [{"name": "redaction", "counts": {"phone": 2}, "most_held": 11, "left_out": False, "conceals": False}],
         "rules": "1a2b3c4d", "answer": None},
    ]  # fmt: skip


def test_a_rate_needs_two_tokens():
    assert record(done(usage=Usage(10, 1)))["timings"]["tokens_per_second"] is None
    assert record(done(timings=Timings(0.5, 0.25, 0.0)))["timings"]["tokens_per_second"] is None


def test_facts_are_one_line():
    assert summary(done()) == (
        "[context 15 of 64; prompt 10 tokens, 4 of them reused (24/s); answer 5 tokens (2.0/s); 2 of 3 drafted tokens right; "
        "first token after 0.500 s; max tokens; seed 9]"
    )


def test_facts_say_what_left_the_context():
    post = (PostUse("redaction", {"phone": 2, "card": 0, "e-mail": 1}), PostUse("punctuation", {}))
    assert "; redaction 2 phone, 1 e-mail; max tokens; seed 9]" in summary(done(post=post))
    found = summary(done(context=ContextUse(15, 64, evicted_segments=1, evicted_tokens=7, absent_tokens=30)))
    assert found.startswith("[context 15 of 64, 30 tokens left it; prompt 10 tokens")


def test_why_an_answer_ended_early_is_said(capsys):
    show_text([done(reason="context_full", context=ContextUse(64, 64, "graded", evicted_segments=2))])
    assert capsys.readouterr().err.splitlines() == [
        "note: the answer ends because the context of 64 tokens is full; --ctx N allows more, where the model does",
    ]


def test_a_closed_pipe_and_a_full_disk_are_told_apart(monkeypatch):
    monkeypatch.setattr(output, "abandon_stdout", lambda: None)
    monkeypatch.setattr(sys, "stdout", Broken(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    with pytest.raises(output.OutputClosed):
        output.write("x")
    monkeypatch.setattr(sys, "stdout", Broken(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(UserError, match="cannot write to standard output: no space left"):
        output.write("x")
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(UserError, match="standard output is closed"):
        output.write("x")


def test_a_letter_the_terminal_cannot_show_does_not_end_the_answer(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    output.write("naïve 🙂\n")
    assert raw.getvalue() == b"na?ve ?\n"


def test_nobody_reading_stderr_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Broken(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    output.write_stderr("anyone?")
    monkeypatch.setattr(sys, "stderr", None)
    output.write_stderr("anyone?")


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves: ``clock[0]`` seconds."""
    now = [100.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    return now


def test_progress_on_a_terminal_is_a_bar_that_goes_away(monkeypatch, clock):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    bar = output.ProgressBar()
    bar("downloading", 1, 100_000_000)
    assert screen.getvalue() == ""  # what is over in no time is not shown
    clock[0] += 0.2
    bar("downloading", 50_000_000, 100_000_000)
    assert "downloading" in screen.getvalue()
    assert "[" + "#" * 15 + " " * 15 + "]  50%  50.0 MB of 100.0 MB" in screen.getvalue()
    bar("downloading", 50_000_001, 100_000_000)  # at once: too soon to draw
    clock[0] += 0.2
    bar("downloading", 100_000_000, 100_000_000)
    bar.__exit__()
    assert screen.getvalue().count("\r") == 3
    assert screen.getvalue().endswith("\r\x1b[K")
    assert "\n" not in screen.getvalue()
    clock[0] += 9
    bar("prefetch", 5, 10)  # from another thread, while the answer is on the screen
    assert screen.getvalue().endswith("\r\x1b[K")


def test_progress_elsewhere_is_one_line_for_a_phase_that_takes_a_while(capsys, clock):
    bar = output.ProgressBar()
    for seconds in (0, 0.5, 0.6):
        clock[0] += seconds
        bar("packing", 5, 2_000_000)
    clock[0] += 60
    bar("packing", 6, 2_000_000)
    bar("reading", 0, 0)
    bar("reading", 1, 0)
    bar.__exit__()
    assert capsys.readouterr().err == "packing 2.0 MB ...\n"


def test_progress_on_a_terminal_that_went_away_is_no_error(monkeypatch, clock):
    screen = Broken(OSError(errno.EIO, "Input/output error"))
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    bar = output.ProgressBar()
    bar("packing", 1, 2)
    clock[0] += 1
    bar("packing", 1, 2)
    bar.__exit__()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (98_362_432, "98.4 MB"), (999_960, "1.0 MB"), (2e9, "2.0 GB"), (5e15, "5000.0 TB")],
)
def test_sizes(count, text):
    assert model_hub.format_size(count) == text


def test_tables_align():
    assert output.table([("A", "B"), ("long", "x"), ("", "y", "more")]) == "A     B\nlong  x\n      y  more\n"
    assert output.table([]) == ""


@pytest.mark.parametrize("text", ["", " \n\t", "caf\udce9"])
def test_prompts_that_cannot_be_answered(text):
    with pytest.raises(OptionError, match=r"the prompt is (empty|not UTF-8)"):
        check_text(text, "the prompt")


def test_reading_text(tmp_path, monkeypatch):
    path = tmp_path / "p.txt"
    path.write_bytes("größe\n".encode())
    assert read_text(str(path), "the prompt") == "größe\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("中\n".encode())))
    assert read_text("-", "the prompt") == "中\n"
    path.write_bytes(b"abc\xff")
    with pytest.raises(OptionError, match=r"is not UTF-8 \(byte 3\)"):
        read_text(str(path), "the prompt")
    with pytest.raises(OptionError, match=r"cannot read the prompt from .*: is a directory"):
        read_text(str(tmp_path), "the prompt")


def test_the_first_ctrl_c_cancels_and_the_second_interrupts():
    import signal

    calls = []
    before = signal.getsignal(signal.SIGINT)
    with cancelling(lambda: calls.append(1)) as seen:
        signal.raise_signal(signal.SIGINT)
        assert (calls, len(seen)) == ([1], 1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
