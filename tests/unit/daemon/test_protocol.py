"""The protocol: frames, requests, options, error codes, and docs/protocol.md, which lists them."""

import math
import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rt import errors
from edge_rt.daemon import operations, protocol
from edge_rt.daemon.config import Limits
from edge_rt.daemon.protocol import MAX_BYTES, MAX_DEPTH, FrameReader, pack, unpack
from edge_rt.errors import ContextOverflow, ProtocolError, RuleError
from edge_rt.types import (
    PRIORITIES,
    ContextUse,
    Delta,
    Done,
    GenerateOptions,
    Notice,
    PostUse,
    PromptProgress,
    Pruning,
    Queued,
    SamplingParams,
    Timings,
    TokenLogprob,
    Usage,
    event,
    record,
)

ANY_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


MESSAGES = st.dictionaries(st.text(), ANY_VALUES, max_size=4)


@given(st.lists(MESSAGES, max_size=5), st.randoms())
def test_messages_come_out_whole_however_they_were_cut(messages, chance):
    data, frames, found = b"".join(map(pack, messages)), FrameReader(), []
    while data:
        n = chance.randrange(1, 40)
        found += frames.feed(data[:n])
        data = data[n:]
    assert (found, frames.pending) == (messages, 0)


@pytest.mark.parametrize("length", [MAX_BYTES + 1, 2**32 - 1])
def test_a_giant_length_is_refused_before_anything_is_kept(length):
    with pytest.raises(ProtocolError, match="is too long") as caught:
        list(FrameReader().feed(struct.pack(">I", length)))
    assert caught.value.code == "frame_too_long"
    with pytest.raises(ProtocolError, match=r"a message of .* is too long"):
        pack({"text": "x" * MAX_BYTES})


def nested(depth):
    return b"\x81\xa1a" * (depth - 1) + b"\x80"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x93",
        b"\x01",
        b"\x90",
        b"\x81\x01\x02",  # a key that is no text
        b"\x81\xa1a\xa2\xff\xfe",  # text that is not UTF-8
        b"\x80\x80",
        b"\xdf\xff\xff\xff\xff",
        b"\x81\xa1a\xdd\xff\xff\xff\xff",
        b"\x81\xa1a\xc7\x01\x05x",  # an extension type
        nested(MAX_DEPTH + 1),
        nested(2000),
        b"\x91" * 100_000,
    ],
)
def test_what_is_no_message_is_refused(body):
    with pytest.raises(ProtocolError) as caught:
        unpack(body)
    assert caught.value.code == "bad_frame"


def test_depth_up_to_the_limit_is_allowed():
    assert unpack(nested(MAX_DEPTH))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=3) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.binary(max_size=2), inner, max_size=3),
    max_leaves=5,
)


def attempt(check, given_):
    """(what it gives, None) or (None, the code of the error)"""
    try:
        return check(given_), None
    except ProtocolError as error:
        return None, error.code


@given(st.sampled_from(list(protocol.OPS)), st.data())
def test_any_message_is_a_request_of_the_right_types_or_an_error(op, data):
    message = {"id": data.draw(st.just(1) | VALUES), "op": data.draw(st.just(op) | VALUES)}
    for name in protocol.OPS[op]:
        message[name] = data.draw(VALUES)
    if data.draw(st.booleans()):
        message[data.draw(st.text(max_size=3))] = 1
    request, code = attempt(protocol.parse_request, message)
    if request is None:
        assert code in ("bad_request", "unknown_op")
        return
    for name, value in request.fields.items():
        assert protocol.KINDS[protocol.OPS[request.op][name].rstrip("!")].fits(value)


@given(st.dictionaries(st.sampled_from(list(protocol.OPTIONS)) | st.text(max_size=4), VALUES, max_size=4))
def test_any_options_are_keywords_or_an_error(options):
    found, code = attempt(protocol.check_options, options)
    assert code in (None, "option")
    assert set(found or ()) <= (set(GenerateOptions._fields) | set(SamplingParams._fields)) - {"rules", "sampling"}


def test_every_option_is_there_and_every_operation_is_done():
    assert set(protocol.OPTIONS) == (set(GenerateOptions._fields) | set(SamplingParams._fields)) - {"rules", "sampling"}
    assert {f"_do_{op}" for op in protocol.OPS} == {name for name in dir(operations.Operations) if name.startswith("_do_")}


def test_options_become_keywords():
    given_ = {"logit_bias": {"7": -math.inf}, "prune": {"budget": 0.5, "unit": "share"}, "stop": ["a"], "seed": None}
    assert protocol.check_options(given_) == {"logit_bias": {7: -math.inf}, "prune": Pruning(0.5, "share"), "stop": ["a"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_token": 3}, "the options has no 'max_token'"),
        ({"max_tokens": "3"}, "max_tokens of the options is not a whole number"),
        ({"rules": {}}, "has no 'rules'"),
        ({"logit_bias": {"x": 1}}, "logit_bias is not as"),
        ({"prune": {}}, "prune has no budget; give a number"),
        ({"prune": {"budget": 1, "unit": "rods"}}, "the unit of prune is none"),
        ({"json_schema": {"a": b"x"}}, "json_schema of the options is not a map as JSON has it"),
    ],
)
def test_options_that_are_none(options, message):
    with pytest.raises(ProtocolError, match=message):
        protocol.check_options(options)


def test_errors_have_codes():
    assert protocol.describe_error(ContextOverflow("too long", 9, 8)) == {
        "code": "context_overflow",
        "message": "too long",
        "needed": 9,
        "available": 8,
    }
    assert protocol.describe_error(ProtocolError("limit", "slower", retry_after=0.5)) == {
        "code": "limit",
        "message": "slower",
        "retry_after": 0.5,
    }
    assert protocol.describe_error(RuleError("no"))["code"] == "rule"
    assert protocol.describe_error(errors.UnsupportedModel("no"))["code"] == "model_file"
    found = protocol.describe_error(ZeroDivisionError("secret text of a user"))
    assert found["code"] == "internal"
    assert "secret" not in found["message"]
    for name in dir(errors):
        kind = getattr(errors, name)
        if isinstance(kind, type) and issubclass(kind, errors.EdgeError) and kind not in (errors.EdgeError, ContextOverflow):
            made = kind("code", "message") if kind in (ProtocolError, errors.DaemonError) else kind("message")
            assert protocol.describe_error(made)["code"] != "internal", kind


EVENTS = [
    PromptProgress(3, 4, 1),
    Delta("a\n", (1, 2), (TokenLogprob(1, "a", -0.5, ((1, -0.5), (2, -math.inf))),)),
    Delta(""),
    Delta("b", concealed=1),
    Notice("note"),
    Queued("memory", 1 << 40, 0),
    Done(
        "stop_string", Usage(1, 2, 3, 4, 5, 6), Timings(0.5, 0.25, 2.0), ContextUse(4, 5, "slide", 1), 7, "x",
        (PostUse("redaction", {"mail": 2}, None, conceals=True),), "abcd", "text",
    ),
]  # fmt: skip


@pytest.mark.parametrize("one", EVENTS)
def test_events_survive_the_wire(one):
    from edge_rt.daemon.protocol import pack, unpack

    message = unpack(pack(record(one))[4:])
    assert event({**message, "id": 3, "new": [1]}) == one


ROOT = Path(__file__).parents[3]


PAGE = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")


def rows(heading):
    """First cells of the table under a heading."""
    part = PAGE.split(f"\n{heading}\n", 1)[1]
    table = re.search(r"(?:^\|.*\n)+", part, re.MULTILINE)
    return [line.split("|")[1] for line in table[0].splitlines()[2:]]


def test_operations_and_their_fields():
    assert {re.search(r"`(\w+)`", cell)[1] for cell in rows("## Operations")} == set(protocol.OPS)
    for op, fields in protocol.OPS.items():
        (line,) = (line for line in PAGE.splitlines() if re.match(rf"\| \[?`{op}`", line))
        assert [name for name in fields if f"`{name}`" not in line] == [], op


def test_options():
    assert {name for cell in rows("### generate") for name in re.findall(r"`(\w+)`", cell)} == set(protocol.OPTIONS)


def test_priorities_and_their_shares():
    names, shares = re.search(r"`priority` is (.*): shares of ([\d, and]+) ", PAGE).groups()
    assert {name: float(share) for name, share in zip(re.findall(r"`(\w+)`", names), re.findall(r"\d+", shares), strict=True)} == PRIORITIES


def test_codes():
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "edge_rt" / "daemon").rglob("*.py"))
    said = set(re.findall(r"(?:ProtocolError|WorkerExit|Cancelled)\(\s*\"([a-z_]+)\"", sources))
    codes = said | {code for _, code in protocol.CODES} | {"internal"}
    assert len(codes) > 25
    assert {re.search(r"`(\w+)`", cell)[1] for cell in rows("## Errors")} == codes


def test_limits_are_in_the_daemons_page():
    page = (ROOT / "docs" / "daemon.md").read_text(encoding="utf-8")
    for name, value in Limits()._asdict().items():
        assert re.search(rf"^{name} = {value:.0f}\b", page, re.MULTILINE), name
