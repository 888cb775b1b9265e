"""Traces with several headers, as a daemon writes them that was started again, or whose files are put together."""

import json

import pytest
from edge_rt_distill.replay.trace import Request, Trace, read_trace, write_trace

from edge_rt.hooks import DataError

BODY = {"messages": [{"role": "user", "content": "Hello"}]}
FIRST, LATER = "2026-01-01T00:00:10.500Z", "2026-01-01T01:00:12.000+01:00"


def header(begun=None, **about):
    return {"edge_rt_trace": 1, **({} if begun is None else {"begun": begun}), **about}


def asked(at, session="s1"):
    return {"at": at, "request": BODY, "session": session, "client": "c1"}


@pytest.fixture
def read(tmp_path):
    def write_and_read(*records):
        (tmp_path / "t.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return read_trace(tmp_path / "t.jsonl")

    return write_and_read


def seen(trace):
    return [(one.at, one.session, one.client) for one in trace.requests]


def test_times_are_from_the_first_begin_and_sessions_of_another_run_are_others(read):
    trace = read(header(FIRST), asked(1), asked(2, None), header(LATER), asked(0.25))
    assert seen(trace) == [(1, "s1", "c1"), (1.75, "s1.2", "c1.2"), (2, None, "c1")]


def test_the_order_of_the_files_changes_nothing(read):
    one, other = [header(FIRST), asked(1)], [header(LATER), asked(2)]
    assert read(*one, *other) == read(*other, *one)


def test_a_file_that_was_begun_in_the_same_run_goes_on(read):
    trace = read(header(FIRST), asked(1), header(FIRST), asked(2))
    assert seen(trace) == [(1, "s1", "c1"), (2, "s1", "c1")]


def test_only_what_all_headers_say_is_said(read):
    trace = read(header(LATER, redacted=True, sample=1, by="a"), asked(1), header(FIRST, redacted=True, sample=0.5), asked(1))
    assert trace.about == {"begun": FIRST, "redacted": True}
    assert read(header(by="a"), asked(1)).about == {"by": "a"}


@pytest.mark.parametrize("begun", [None, "yesterday", 5, "2026-01-01T00:00:00"])
def test_a_begin_that_is_none_is_told_by_its_line(read, begun):
    with pytest.raises(DataError, match=r"t\.jsonl, line 3: a header has .* for begun; give a time as"):
        read(header(FIRST), asked(1), header(begun), asked(1))


def test_a_header_alone_need_not_say_when_it_was_begun(tmp_path):
    trace = Trace((Request(0.0, "/v1/chat/completions", BODY, session="s1"),), {"by": "me"})
    write_trace(tmp_path / "t.jsonl", trace)
    assert read_trace(tmp_path / "t.jsonl") == trace
