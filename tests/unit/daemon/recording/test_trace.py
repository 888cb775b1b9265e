"""The trace file and its lines: private, whole, redacted, and asking the same again."""

import copy
import errno
import json
import os
from types import SimpleNamespace

import pytest
from edge_rt_distill.replay.trace import read_trace
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_rt.daemon import protocol
from edge_rt.daemon.http import openai as request
from edge_rt.daemon.recording import trace as files
from edge_rt.daemon.recording import trace as redactions
from edge_rt.daemon.recording.trace import MAX_SESSIONS, FinishedRequest, LineBuilder, NotExpressible, SessionTracker, TraceFile, as_line
from edge_rt.errors import OptionError, PluginError, RuleError

HEADER = b'{"edge_rt_trace":1,"begun":"2026-01-01T00:00:00.000Z"}\n'


LATER = b'{"edge_rt_trace":1,"begun":"2026-01-01T00:01:00.000Z"}\n'


def trace_line(number):
    return json.dumps({"at": number, "request": {"messages": [{"role": "user", "content": "x" * 20}]}}).encode() + b"\n"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "traffic.jsonl"


def opened(path, header=HEADER, max_bytes=1 << 20, keep=2):
    return TraceFile(path, header, max_bytes, keep)


def write(file, *numbers):
    """The numbers of the lines before which a header was written."""
    begun = []
    for number in numbers:
        begun += [number] * file.prepare()
        file.append(trace_line(number))
    return begun


def test_a_file_is_private_and_begins_with_its_header(path):
    file = opened(path)
    assert write(file, 1, 2) == [1]
    assert path.read_bytes() == HEADER + trace_line(1) + trace_line(2)
    assert path.stat().st_mode & 0o777 == 0o600
    file.close()


@pytest.mark.parametrize("cut", range(1, len(HEADER + trace_line(1)) + 1))
def test_a_torn_last_line_is_cut_off(path, cut, caplog):
    whole = HEADER + trace_line(1)
    file = opened(path)
    write(file, 1)
    file.close()
    os.truncate(path, len(whole) - cut)
    file = opened(path, LATER)
    write(file, 2)
    file.close()
    kept = HEADER if len(whole) - cut >= len(HEADER) else b""
    assert path.read_bytes() == kept + LATER + trace_line(2)
    torn = len(whole) - cut - len(kept)
    assert [record.message for record in caplog.records] == (
        [f"the last line of {path} was not whole: {torn} bytes were cut off"] if torn else []
    )


def test_a_torn_line_longer_than_what_is_read_at_once_is_cut_off(path, monkeypatch):
    monkeypatch.setattr(files, "_BLOCK", 7)
    path.write_bytes(HEADER + trace_line(1) + trace_line(2)[:-1])
    path.chmod(0o600)
    file = opened(path)
    write(file, 3)
    file.close()
    assert path.read_bytes() == HEADER + trace_line(1) + HEADER + trace_line(3)


def test_full_files_are_renamed_and_the_oldest_goes(path):
    file = opened(path, max_bytes=len(HEADER) + 2 * len(trace_line(1)), keep=2)
    assert write(file, *range(9)) == [0, 2, 4, 6, 8]
    file.close()
    assert sorted(one.name for one in path.parent.iterdir()) == ["traffic.jsonl", "traffic.jsonl.1", "traffic.jsonl.2"]
    assert (path.parent / "traffic.jsonl.1").read_bytes() == HEADER + trace_line(6) + trace_line(7)
    assert (path.parent / "traffic.jsonl.2").read_bytes() == HEADER + trace_line(4) + trace_line(5)
    assert {one.stat().st_mode & 0o777 for one in path.parent.iterdir()} == {0o600}
    whole = b"".join((path.parent / name).read_bytes() for name in ("traffic.jsonl.2", "traffic.jsonl.1", "traffic.jsonl"))
    (path.parent / "all.jsonl").write_bytes(whole)
    assert [one.at for one in read_trace(path.parent / "all.jsonl").requests] == [4, 5, 6, 7, 8]


@pytest.mark.parametrize("taken", ["removed", "renamed", "emptied", "replaced"])
def test_a_file_that_was_taken_away_is_begun_anew(path, taken):
    file = opened(path)
    write(file, 1)
    if taken == "removed":
        path.unlink()
    elif taken == "renamed":
        path.rename(path.parent / "old")
    elif taken == "emptied":
        os.truncate(path, 0)
    else:
        path.unlink()
        path.touch(0o600)
    assert write(file, 2, 3) == [2]
    assert path.read_bytes() == HEADER + trace_line(2) + trace_line(3)
    file.close()


def test_nothing_is_left_of_a_line_that_the_disk_did_not_take(path, monkeypatch):
    file = opened(path)
    write(file, 1)
    whole = os.write

    def full(descriptor, data):
        return whole(descriptor, data[:10]) if len(data) > 10 else _fail()

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            file.append(b"x" * 15)
    assert path.read_bytes() == HEADER + trace_line(1)
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda descriptor, data: whole(descriptor, data[:3]))
        file.append(trace_line(2))
    assert path.read_bytes() == HEADER + trace_line(1) + trace_line(2)
    file.close()


def test_a_line_that_cannot_be_taken_back_is_cut_off_before_the_next(path, monkeypatch):
    file = opened(path)
    write(file, 1)
    with monkeypatch.context() as patched:
        whole = os.write
        patched.setattr(os, "write", lambda descriptor, data: whole(descriptor, data[:10]) if len(data) > 10 else _fail())
        patched.setattr(os, "ftruncate", lambda descriptor, size: _fail())
        with pytest.raises(OSError, match="No space"):
            file.append(b"x" * 15)
    assert path.read_bytes() == HEADER + trace_line(1) + b"x" * 10
    assert write(file, 2) == [2]
    assert path.read_bytes() == HEADER + trace_line(1) + HEADER + trace_line(2)
    file.close()


def test_a_header_that_the_disk_did_not_take_is_written_later(path, monkeypatch):
    file = opened(path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda descriptor, data: _fail())
        with pytest.raises(OSError, match="No space"):
            file.prepare()
    assert write(file, 1) == [1]
    assert path.read_bytes() == HEADER + trace_line(1)
    file.close()


def _fail():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_text(HEADER.decode()) and path.chmod(0o640), "others may read .*; chmod 600 it"),
        (lambda path: path.write_text("notes\n") and path.chmod(0o600), "is something else than recorded traffic"),
        (lambda path: os.mkfifo(path, 0o600), "is no file"),
    ],
)
def test_files_that_are_not_written_to(path, spoil, message):
    spoil(path)
    before = path.stat().st_size
    with pytest.raises(OptionError, match=message):
        opened(path).prepare()
    with pytest.raises(OptionError, match=message):
        files.check_trace_file(path)
    assert path.stat().st_size == before


def test_two_do_not_write_to_the_same_file(path):
    file = opened(path)
    write(file, 1)
    with pytest.raises(OptionError, match="another daemon records traffic in"):
        opened(path).prepare()
    file.close()
    files.check_trace_file(path)
    assert path.read_bytes() == HEADER + trace_line(1)


SECRETS = ("john.smith@example.com", "4111 1111 1111 1111")


HELLO = [{"role": "user", "content": "Hello"}]


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 4.5}}, "required": ["n"]}


@pytest.fixture(scope="module")
def redaction():
    return redactions.load_redaction(None)


def recorded(fields, **more):
    found = FinishedRequest(1.23456, fields, "c1", None, "ok", None, "end_of_generation", None, 5, 2, 0.1, 0.2, None, None)
    return found._replace(**more)


def line(redaction, fields, answers=True, **more):
    return json.loads(LineBuilder(redaction, answers).line(recorded(fields, **more)))


texts = st.text("ab é😀\n\ud800", max_size=6)


call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(sorted(request.ROLES)), "content": texts}, optional={"name": texts})
    | st.just({"role": "assistant", "content": None, "tool_calls": [call]})
    | st.builds(lambda parts: {"role": "user", "content": [{"type": "text", "text": part} for part in parts]}, st.lists(texts, max_size=3)),
    min_size=1,
    max_size=4,
)


shared = {
    "temperature": st.floats(0, 2), "top_p": st.floats(0, 1), "seed": st.integers(), "presence_penalty": st.floats(-2, 2),
    "max_tokens": st.integers(1, 99), "stop": texts | st.lists(texts, max_size=3), "logit_bias": st.just({"42": -1.5}), "model": texts,
    "stream": st.booleans(), "user": texts,
    "edge_rt": st.fixed_dictionaries({}, optional={"top_k": st.integers(), "grammar": texts, "post": st.lists(texts, max_size=2),
        "priority": st.just("low"), "prune": st.just({"budget": 0.5, "unit": "share"}), "adapter": texts, "ignore_eos": st.booleans()}),
}  # fmt: skip


chats = st.fixed_dictionaries({"messages": messages}, optional={
    **shared, "logprobs": st.booleans(), "tools": st.lists(st.just(TOOL), max_size=2), "max_completion_tokens": st.none(),
}) | st.fixed_dictionaries({"messages": messages}, optional={**shared, "response_format": st.sampled_from(
    [{"type": "text"}, {"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}])})  # fmt: skip


completions = st.fixed_dictionaries(
    {"prompt": texts | st.lists(texts, min_size=1, max_size=1)}, optional={**shared, "logprobs": st.integers(0, 5)}
)


@given(chats | completions)
def test_a_line_asks_the_same_again(redaction, body):
    read = request.parse_chat if "messages" in body else request.parse_completion
    asked = read(copy.deepcopy(body))
    fields = {name: value for name, value in asked.fields.items() if name != "pieces"}
    found = line(redaction, fields)
    again = (request.parse_chat if found["path"] == "/v1/chat/completions" else request.parse_completion)(found["request"])
    assert again.fields == asked.fields
    assert (again.tools, again.model) == (asked.tools, asked.model)


def test_what_came_over_the_protocol_is_a_body_of_openais(redaction):
    options = {"max_tokens": 9, "stop": ["x"], "logprobs": 3, "top_k": 5, "json_schema": SCHEMA, "seed": None, "tools": []}
    protocol.check_options(options)
    found = line(redaction, {"messages": HELLO, "options": options, "priority": "high", "model": "m"})
    assert (found["path"], found["at"], found["client"]) == ("/v1/chat/completions", 1.235, "c1")
    assert found["request"] == {
        "model": "m", "messages": HELLO, "max_tokens": 9, "stop": ["x"], "tools": [], "logprobs": True, "top_logprobs": 3,
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}},
        "edge_rt": {"top_k": 5, "priority": "high"},
    }  # fmt: skip
    assert line(redaction, {"prompt": "x", "options": {"logprobs": 2}})["request"] == {"prompt": "x", "logprobs": 2}


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "x", "options": {"json_schema": SCHEMA}},
        {"prompt": "x", "options": {"tools": [TOOL]}},
        {"messages": HELLO, "options": {"tools": [TOOL], "json_schema": SCHEMA}},
        {"messages": HELLO, "options": {"temperature": 3.0}},
        {"tokens": [1, 2]},
        {"messages": HELLO, "options": {"logprobs": 21}},
        {"messages": HELLO, "options": {"min_p": float("nan")}},
        {"messages": [{"role": "narrator", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x", "mood": "good"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
    ],
)
def test_what_openais_api_cannot_ask_is_no_line(redaction, fields):
    with pytest.raises(NotExpressible):
        line(redaction, fields)


def test_a_line_is_json_in_one_line_whatever_the_text():
    text = 'a\nb\u2028c\ud800d"e\\ud800'
    written = as_line({"text": text})
    assert (written.count(b"\n"), json.loads(written.decode())) == (1, {"text": text})


@pytest.mark.parametrize(
    ("more", "outcome"),
    [
        ({}, {"status": "ok", "finish_reason": "stop", "prompt_tokens": 5, "completion_tokens": 2, "first_token": 0.1, "total": 0.2}),
        ({"reason": "max_tokens"}, {"finish_reason": "length"}),
        ({"reason": "stop_string", "stop": "x"}, {"finish_reason": "stop"}),
        ({"reason": "cancelled", "status": "cancelled"}, {"status": "cancelled", "finish_reason": None}),
        ({"reason": None, "status": "error", "code": "option", "prompt_tokens": None, "first_token": None},
         {"status": "error", "code": "option", "finish_reason": None, "prompt_tokens": None, "first_token": None}),
    ],
)  # fmt: skip
def test_what_became_of_it_as_openai_names_it(redaction, more, outcome):
    found = line(redaction, {"messages": HELLO}, **more)["outcome"]
    assert {name: found.get(name) for name in outcome} == outcome


def test_a_call_is_told_by_the_answer_which_is_written_only_if_wanted(redaction):
    text = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    fields = {"messages": HELLO, "options": {"tools": [TOOL]}}
    found = line(redaction, fields, answers=False, text=text)
    assert (found["outcome"]["finish_reason"], "answer" in found) == ("tool_calls", False)
    assert line(redaction, fields, text=text)["answer"] == text
    assert line(redaction, {"messages": HELLO}, text=text)["outcome"]["finish_reason"] == "stop", "nothing was offered"


@pytest.mark.parametrize(
    ("reason", "stop", "answer"),
    [("end_of_generation", None, "my card is 4111 1111 11"), ("max_tokens", None, "my card is …"), (None, None, "my card is …"),
     ("stop_string", "\n", "my card is 4111 1111 11")],
)  # fmt: skip
def test_half_a_secret_at_the_end_of_an_answer_is_one_if_it_was_cut_off(redaction, reason, stop, answer):
    assert line(redaction, {"messages": HELLO}, reason=reason, stop=stop, text="my card is 4111 1111 11")["answer"] == answer


secret = st.sampled_from(SECRETS)


around = st.text("ab ,.é", max_size=4)


spoilt = st.builds(lambda before, one, after: f"{before} {one} {after}", around, secret, around)


values = st.recursive(spoilt | st.integers(0, 9), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(spoilt, inner, max_size=1))


told = st.fixed_dictionaries({"role": st.just("user"), "content": spoilt}, optional={"name": spoilt, "tool_call_id": spoilt})


calls = st.builds(lambda name, text: {"role": "assistant", "content": None, "tool_calls": [{**call, "function": {
    "name": name, "arguments": json.dumps({"to": text})}}]}, spoilt, spoilt)  # fmt: skip


options = st.fixed_dictionaries({}, optional={"stop": st.lists(spoilt, max_size=2), "grammar": spoilt, "adapter": spoilt,
    "post": st.lists(spoilt, max_size=2), "max_tokens": st.just(3), "seed": st.just(3)})  # fmt: skip


bound = st.fixed_dictionaries({}, optional={"json_schema": st.dictionaries(spoilt, values, max_size=1)})


offered = st.lists(st.builds(lambda name, rest: {"type": "function", "function": {"name": name, **rest}}, spoilt,
                             st.dictionaries(spoilt, values, max_size=1)), max_size=2)  # fmt: skip


@settings(deadline=None)
@given(st.lists(told | calls, min_size=1, max_size=3), options, bound, offered, st.none() | spoilt, spoilt)
def test_no_secret_is_in_a_line_wherever_it_was(redaction, said, given_options, binding, tools, model, answer):
    asked = {**given_options, **(binding or {"tools": tools})}
    fields = {"messages": said, "options": asked, **({} if model is None else {"model": model})}
    written = LineBuilder(redaction, True).line(recorded(fields, text=answer)).decode()
    assert not [one for one in SECRETS if one in written]
    assert "[EMAIL]" in written or "[CARD]" in written


@pytest.mark.parametrize("at", [redactions.CHARACTERS_AT_ONCE - 9, redactions.CHARACTERS_AT_ONCE, 3 * redactions.CHARACTERS_AT_ONCE - 1])
def test_a_secret_across_the_pieces_of_a_long_text_is_found(redaction, at):
    text = "word " * redactions.CHARACTERS_AT_ONCE
    assert redaction.text(f"{text[:at]} {SECRETS[0]} {text}") == f"{text[:at]} [EMAIL] {text}"
    assert redaction.text("") == ""


def test_numbers_that_read_as_secrets_are_told_from_options(redaction):
    schema = {"enum": [4111111111111111, 7, 2.5, True, None]}
    found = line(redaction, {"messages": HELLO, "options": {"seed": 4111111111111111, "json_schema": schema}})["request"]
    assert found["response_format"]["json_schema"]["schema"] == {"enum": ["[CARD]", 7, 2.5, True, None]}
    assert found["seed"] == 4111111111111111


def test_rules_of_a_file_that_conceal_are_used_and_no_others(tmp_path):
    rules = tmp_path / "r.toml"
    rules.write_text('[terminology.terms]\n"Hello" = "Goodbye"\n[redaction]\nnames = ["Ada Lovelace"]\n')
    found = redactions.load_redaction(rules)
    assert found.names == ("redaction",)
    assert found.by == f"redaction by r.toml, version {found.rules.version}"
    assert line(found, {"prompt": "Hello Ada Lovelace"})["request"] == {"prompt": "Hello [NAME]"}


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("[punctuation]\n", OptionError, "has no rules that conceal anything"),
        ("pipeline = []\n", OptionError, "has no rules that conceal anything"),
        ("[redaction]\nkind = 3\n", RuleError, r"r\.toml, line 2"),
        ("", RuleError, "it has no rules"),
        (None, RuleError, "cannot be read"),
    ],
)
def test_rules_by_which_nothing_would_be_concealed(tmp_path, text, kind, message):
    if text is not None:
        (tmp_path / "r.toml").write_text(text)
    with pytest.raises(kind, match=message):
        redactions.load_redaction(tmp_path / "r.toml")


def test_without_the_plugin_nothing_is_recorded(monkeypatch):
    from edge_rt.plugin_host.registry import Registry

    whole = Registry.load(entry_points=False, disabled=["redaction"])
    monkeypatch.setattr(Registry, "load", lambda: whole)
    with pytest.raises(OptionError, match="not recorded without redaction, which cannot be loaded: there is no post-processor redaction"):
        redactions.load_redaction(None)


def test_a_post_processor_that_fails_gives_no_text_and_does_not_say_it():
    from edge_rt.hooks import PostProcessorFactory
    from edge_rt.plugin_host.registry import Registry
    from edge_rt.postprocess.rules import Ruleset

    class Bad:
        def feed(self, text):
            raise RuntimeError(text)

        def flush(self):
            return ""

    factory = PostProcessorFactory("bad", lambda rules: Bad, fails_closed=True)
    plugin = SimpleNamespace(EDGE_RT_API=1, edge_rt_post_processors=_hook(lambda: [factory]))
    rules = Ruleset({"bad": {}}, Registry.load(entry_points=False, plugins={"bad": plugin}))
    with pytest.raises(PluginError, match="bad failed") as caught:
        redactions.Redaction("bad", rules, ("bad",)).text("a secret")
    assert "secret" not in str(caught.value)


def _hook(function):
    from edge_rt.hooks import hookimpl

    def edge_rt_post_processors():
        return function()

    return hookimpl(edge_rt_post_processors)


def said(*contents):
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


class Trace:
    """What conversations write."""

    def __init__(self):
        self.conversations = SessionTracker()

    def write(self, session, *contents):
        messages = said(*contents)
        found = self.conversations.locate(session, messages)
        self.conversations.note_written(session, messages)
        return found


def test_of_a_session_only_what_is_new_is_written():
    trace = Trace()
    assert trace.write("x", "a") == ("s1", said("a"))
    assert trace.write("y", "a") == ("s2", said("a"))
    assert trace.write("x", "a", "b", "c") == ("s1", said("c"))
    assert trace.write("x", "a", "b", "c", "d", "e") == ("s1", said("e"))
    assert trace.write("y", "a", "b", "c") == ("s2", said("c"))


def test_what_was_not_written_is_in_the_next_line_and_a_new_file_begins_anew():
    trace = Trace()
    trace.write("x", "a")
    trace.conversations.locate("x", said("a", "b", "c"))  # and dropped
    assert trace.write("x", "a", "b", "c", "d", "e") == ("s1", said("a", "b", "c", "d", "e")[2:])
    trace.conversations.forget()
    assert trace.write("x", "a", "b", "c", "d", "e", "f", "g") == ("s2", said("a", "b", "c", "d", "e", "f", "g"))


def test_no_more_sessions_are_known_than_may_be():
    trace = Trace()
    for number in range(MAX_SESSIONS + 1):
        trace.write(str(number), "a")
    assert trace.write("1", "a", "b", "c")[0] == "s2"
    assert trace.write("0", "a", "b", "c") == (f"s{MAX_SESSIONS + 2}", said("a", "b", "c"))


def test_sessions_are_written_by_their_aliases_and_prompts_without(redaction):
    lines = LineBuilder(redaction, False)
    first, second = (recorded({"messages": said(*one)}, session="real-id") for one in [("a",), ("a", "b", "c")])
    assert json.loads(lines.line(first))["session"] == "s1"
    lines.note_written(first)
    written = lines.line(second)
    assert b"real-id" not in written
    assert (json.loads(written)["session"], json.loads(written)["request"]["messages"]) == ("s1", [{"role": "user", "content": "c"}])
    assert "session" not in json.loads(lines.line(recorded({"prompt": "x"}, session="real-id")))
