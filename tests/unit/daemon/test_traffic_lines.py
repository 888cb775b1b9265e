"""Lines of recorded traffic: they ask the same again, say what became of it, and have no secret in them, wherever it was."""

import copy
import json
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_rt.daemon import protocol
from edge_rt.daemon.http import openai as request
from edge_rt.daemon.recording import trace as redactions
from edge_rt.daemon.recording.trace import MAX_SESSIONS, FinishedRequest, LineBuilder, NotExpressible, SessionTracker, as_line
from edge_rt.errors import OptionError, PluginError, RuleError

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


# ---- the same again --------------------------------------------------------------------------------------------------

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


# ---- outcomes --------------------------------------------------------------------------------------------------------


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


# ---- redaction -------------------------------------------------------------------------------------------------------

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


def test_two_names_that_become_one_are_no_line(redaction):
    with pytest.raises(ValueError, match="two names became one"):
        line(redaction, {"messages": HELLO, "options": {"json_schema": {"a@example.com": {}, "b@example.com": {}}}})


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


# ---- conversations ---------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("next_one", [("a",), ("a", "b"), ("A", "b", "c"), ("c",), ()])
def test_what_does_not_go_on_begins_anew(next_one):
    trace = Trace()
    trace.write("x", "a")
    assert trace.write("x", *next_one) == ("s2", said(*next_one))


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
