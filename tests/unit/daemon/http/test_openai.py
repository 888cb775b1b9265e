"""OpenAI's API: requests and what is refused, tool calls in text, chunks that add up to the completion."""

import ast
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_rt.daemon import protocol
from edge_rt.daemon.http import openai as body
from edge_rt.daemon.http import openai as request
from edge_rt.daemon.http.openai import STATUS, ApiError, CompletionBuilder, ToolCall, ToolCallParser, to_api_error
from edge_rt.daemon.http.routes import GenerationAnswer
from edge_rt.errors import ContextOverflow, ProtocolError

HELLO = [{"role": "user", "content": "Hello"}]


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}}


def options(**fields):
    return request.parse_chat({"messages": HELLO, **fields}).fields["options"]


def test_fields_become_options():
    assert options() == {}
    same = {"temperature": 0.5, "top_p": 0.9, "seed": 3, "presence_penalty": -1, "frequency_penalty": 1.5, "logit_bias": {"42": -100}}
    assert options(**same) == same
    assert options(max_tokens=3) == options(max_completion_tokens=3) == options(max_tokens=3, max_completion_tokens=3) == {"max_tokens": 3}
    assert options(stop="a") == options(stop=["a"]) == {"stop": ["a"]}
    assert options(tools=[TOOL]) == options(tools=[TOOL], tool_choice="auto") == {"tools": [TOOL]}
    assert options(tools=[TOOL], tool_choice="none") == options(tools=[]) == {}
    assert options(response_format={"type": "text"}) == options(response_format=None) == {}
    assert options(response_format={"type": "json_object"}) == {"json_schema": {"type": "object"}}
    assert options(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}) == {"json_schema": SCHEMA}
    assert options(logprobs=True) == {"logprobs": 1}
    assert options(logprobs=True, top_logprobs=5) == {"logprobs": 5}
    assert options(edge_rt={"top_k": 3, "post": [], "prune": {"budget": 9}}) == {"top_k": 3, "post": [], "prune": {"budget": 9}}
    assert options(**dict.fromkeys(request.CHAT_FIELDS.keys() - {"messages"}), n=None, anything=None) == {}
    protocol.check_options(options(**same, stop="x", logprobs=True, tools=[TOOL]))  # as the daemon takes them


def test_what_is_not_an_option():
    asked = request.parse_chat({"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}, "model": "m", "user": "u",
                          "tools": [TOOL], "edge_rt": {"session": "s", "priority": "low"}})  # fmt: skip
    assert asked.fields == {"messages": HELLO, "priority": "low", "options": {"tools": [TOOL]}, "model": "m"}
    assert (asked.stream, asked.include_usage, asked.model, asked.session, asked.ignored) == (True, True, "m", "s", ("user",))
    assert (asked.tools, asked.rivals) == ({"add"}, None)
    assert request.parse_chat({"messages": HELLO, "logprobs": True}).fields["pieces"] is True
    assert request.parse_completion({"prompt": "x", "logprobs": 0}).rivals == 0


def test_messages_as_templates_have_them():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    given = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "me"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": [], "audio": None},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
    ]
    assert request.parse_chat({"messages": given}).fields["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "ab", "name": "me"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
    ]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": "x"}, "messages", "invalid_type"),
        ({"messages": None}, "messages", "missing_required_parameter"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "invalid_type"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "invalid_value"),
        ({"messages": [{"role": "user", "content": "x", "audio": {}}]}, "messages[0].audio", "unknown_parameter"),
        ({"messages": [{"role": "user", "content": "x", "name": 3}]}, "messages[0].name", "invalid_type"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "x"}}]}]}, "messages[0].tool_calls", "invalid_type"),
        ({"messages": [{"role": "assistant", "tool_calls": {}}]}, "messages[0].tool_calls", "invalid_type"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"top_p": -0.1}, "top_p", "invalid_value"),
        ({"seed": True}, "seed", "invalid_type"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_type"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "invalid_value"),
        ({"stop": 3}, "stop", "invalid_type"),
        ({"stop": [3]}, "stop", "invalid_type"),
        ({"n": 2}, "n", "unsupported_value"),
        ({"n": True}, "n", "unsupported_value"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls", "unsupported_value"),
        ({"store": True}, "store", "unsupported_value"),
        ({"logprobs": 1}, "logprobs", "invalid_type"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice", "unsupported_value"),
        ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format", "invalid_value"),
        ({"response_format": {"type": "xml"}}, "response_format", "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"edge_rt": {"session": ""}}, "edge_rt.session", "invalid_value"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "unknown_parameter"),
    ],
)
def test_what_cannot_be_done_is_refused(fields, param, code):
    with pytest.raises(ApiError) as caught:
        request.parse_chat({"messages": HELLO, **fields})
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, param, code)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prompt", [None, 3, [], ["a", "b"], [[]], [[1], [2]], [1, "a"], [-1], [True], {}])
def test_prompts_that_are_none(prompt):
    with pytest.raises(ApiError) as caught:
        request.parse_completion({"prompt": prompt})
    assert caught.value.param == "prompt"


texts = st.text("ab1é😀\ud800", max_size=5)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


fields = st.sampled_from(
    sorted({*request.CHAT_FIELDS, *request.COMPLETION_FIELDS, *request.FIXED_VALUES, *request.IGNORED, "prompt", "stop", "tool_choice"})
)


"""Of requests, by name."""


@given(st.dictionaries(fields, json_values, max_size=6))
def test_any_body_is_a_request_or_an_error_of_the_clients(found):
    for read in (request.parse_chat, request.parse_completion):
        try:
            asked = read({"messages": HELLO, "prompt": "x", **found})
        except (ApiError, ProtocolError) as error:
            status = to_api_error(error).status
        else:
            status = 400
            json.dumps(asked.fields)
        assert status == 400


def test_every_code_of_the_protocol_has_a_status():
    """Or is none that a request over HTTP can end with, or a failure of ours."""
    others = {"session_file", "session_mismatch", "rule", "native", "failed", "internal"}
    assert {code for _, code in protocol.CODES} - set(STATUS) <= others
    found = to_api_error(ContextOverflow("too long", 30, 20))
    assert (found.status, found.code) == (400, "context_length_exceeded")
    assert (found.body()["error"]["needed"], found.body()["error"]["available"]) == (30, 20)
    found = to_api_error(ProtocolError("limit", "later", retry_after=2.2))
    assert (found.status, found.headers) == (429, (("Retry-After", "3"),))
    assert "retry_after" not in found.body()["error"]
    found = to_api_error(KeyError("secret"))
    assert (found.status, found.code, "secret" in str(found)) == (500, "internal", False)


def test_the_page_says_all_that_there_is():
    root = Path(__file__).parents[4]
    page = (root / "docs" / "http.md").read_text(encoding="utf-8")
    fields = {*request.CHAT_FIELDS, *request.COMPLETION_FIELDS, *request.FIXED_VALUES, *request.IGNORED, "prompt", "stop", "tool_choice"}
    deprecated = {"functions", "function_call"}
    assert [name for name in fields - deprecated if f"`{name}" not in page] == []
    codes = {code for _, code in STATUS.values()} | {"invalid_value"}
    for path in (root / "edge_rt" / "daemon" / "http").glob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        named = [node.args for node in calls if getattr(node.func, "id", "") in ("ApiError", "wrong") and len(node.args) == 3]
        codes |= {args[2].value for args in named if isinstance(args[2], ast.Constant)}
    assert len(codes) > 20
    assert [code for code in codes if f"`{code}`" not in page] == []


def test_bodies():
    assert body.parse_body('{"a": [1, 2.5, null, true, "é😀"]}'.encode()) == {"a": [1, 2.5, None, True, "é😀"]}
    assert body.parse_body(b'{"a": "\\ud83d\\ude00"}') == {"a": "😀"}
    deep = b'{"a": ' + b"[" * 29 + b"]" * 29 + b"}"
    assert body.parse_body(deep)
    for wrong in (deep.replace(b"[]", b"[[]]"), b'{"a": 9223372036854775808}', b'{"a": "\\udc00"}', b'{"a": -Infinity}', b"", b"1"):
        with pytest.raises(ApiError) as caught:
            body.parse_body(wrong)
        assert caught.value.code == "malformed_json"


@given(st.binary(max_size=60) | json_values.map(lambda value: json.dumps({"a": value}).encode()))
def test_any_bytes_are_a_body_that_a_frame_can_hold_or_an_error(data):
    from edge_rt.daemon.protocol import pack, unpack

    try:
        found = body.parse_body(data)
    except ApiError as error:
        code = error.code
    else:
        code = "malformed_json"
        assert unpack(pack(found)[4:]) == found
    assert code == "malformed_json"


def call(name="add", arguments='{"a": 1}'):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


ADD = ToolCall("add", '{"a": 1}')


def taken(parts, names=("add",)):
    """What came out, texts joined."""
    calls, found = ToolCallParser(frozenset(names)), []
    for piece in [piece for part in parts for piece in calls.feed(part)] + calls.flush():
        if isinstance(piece, str) and found and isinstance(found[-1], str):
            found[-1] += piece
        else:
            found.append(piece)
    return found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Hello.", ["Hello."]),
        (call(), [ADD]),
        (f"I add.\n{call()}\n", ["I add.", ADD]),
        (f"{call()}\n{call()}", [ADD, ADD]),
        (f"{call()} done", [ADD, " done"]),
        (call("other"), [call("other")]),
        (call(arguments="[1]"), [call(arguments="[1]")]),
        (call(arguments="{"), [call(arguments="{")]),
        ("<tool_call>\nnull\n</tool_call>", ["<tool_call>\nnull\n</tool_call>"]),
        (call()[:-3], [call()[:-3]]),
        ("a < b <tool", ["a < b <tool"]),
        ("blank at the end \n", ["blank at the end \n"]),
        (" \n", [" \n"]),
        (f"{call('other')} {call()}", [call("other"), ADD]),
    ],
)
def test_calls_in_a_text(text, found):
    assert taken([text]) == found
    assert taken(text) == found, "a character at a time"
    assert taken([text], names=()) == [text]


PIECES = ["a", " ", "\n", "<tool_", "<tool_call>", "</tool_call>", '{"name": "add", "arguments": {"a": 1}}', call(), call("other"), "é"]


@settings(max_examples=150)
@given(st.lists(st.sampled_from(PIECES), max_size=12), st.integers(0, 2**32))
def test_calls_are_the_same_however_the_text_is_split(pieces, seed):
    text, source = "".join(pieces), random.Random(seed)
    cuts = sorted(source.randrange(len(text) + 1) for _ in range(source.randrange(9)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    found = taken(parts)
    assert found == taken([text])
    calls = [one for one in found if isinstance(one, ToolCall)]
    assert calls == [ADD] * len(calls)
    if not calls:
        assert "".join(found) == text


DONE = {
    "event": "done", "reason": "end_of_generation", "stop": None, "seed": 1, "timings": {}, "context": {}, "post": (), "rules": "",
    "answer": None, "usage": {"prompt_tokens": 3, "completion_tokens": 4, "reused_tokens": 2},
}  # fmt: skip


def answered(texts, stream, **fields):
    asked = request.parse_chat({"messages": HELLO, "stream": stream, **fields})
    answer = CompletionBuilder(asked, "m")
    chunks = answer.first_chunks()
    for text in texts:
        chunks += answer.add_event({"event": "delta", "text": text, "tokens": (1,)})
    chunks += answer.add_event({"event": "notice", "message": "so"})
    chunks += answer.add_event(DONE)
    return answer, chunks


@pytest.mark.parametrize("stream", [True, False])
def test_who_waits_for_memory_gets_a_comment_in_the_stream(stream):
    said = []

    class Connection:
        def comment(self, text, headers=()):
            said.append(f": {text}")

        def stream(self, event, headers=()):
            said.append(event)

        def stream_end(self):
            said.append("end")

        def respond_json(self, found, headers=()):
            said.append(found["choices"][0]["message"]["content"])

    exchange = SimpleNamespace(connection=Connection())
    generation = GenerationAnswer(exchange, request.parse_chat({"messages": HELLO, "stream": stream}), "m", "m")
    queued = {"event": "queued", "reason": "so", "needed": 2, "available": 1}
    for message in (queued, {"event": "delta", "text": "a", "tokens": (1,)}, DONE, {"ok": {}}):
        generation._on_message(message)
    if stream:
        assert said[0] == ": queued: so"
        assert [json.loads(one)["choices"][0]["delta"].get("content") for one in said[1:-2]] == ["", "a", None]
    else:
        assert said == ["a"]


@given(st.lists(st.sampled_from(["I ", "add", "\n", call(), "<tool_call>"]), max_size=6))
def test_chunks_add_up_to_the_whole_answer(texts):
    _, chunks = answered(texts, True, tools=[TOOL])
    whole = answered(texts, False, tools=[TOOL])[0].completion()
    message, reason = whole["choices"][0]["message"], whole["choices"][0]["finish_reason"]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == (message["content"] or "")
    calls = [one for delta in deltas for one in delta.get("tool_calls", ())]
    assert [one["index"] for one in calls] == list(range(len(calls)))
    assert [one["function"] for one in calls] == [one["function"] for one in message.get("tool_calls", ())]
    assert reason == chunks[-1]["choices"][0]["finish_reason"] == ("tool_calls" if calls else "stop")
    assert chunks[-1]["edge_rt"]["notices"] == whole["edge_rt"]["notices"] == ["so"]
    assert whole["usage"] == {
        "prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7, "prompt_tokens_details": {"cached_tokens": 2},
    }  # fmt: skip


def test_reasons():
    for reason, said in (("stop_string", "stop"), ("max_tokens", "length"), ("context_full", "length")):
        answer, _ = answered([], False)
        answer.add_event({**DONE, "reason": reason})
        assert answer.completion()["choices"][0]["finish_reason"] == said
    with pytest.raises(ApiError, match="about to end") as caught:
        answered([], True)[0].add_event({**DONE, "reason": "cancelled"})
    assert caught.value.status == 503
