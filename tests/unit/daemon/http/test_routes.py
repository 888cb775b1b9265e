"""The HTTP routes with the null engine: completions, embeddings, errors, sessions, health and metrics."""

import base64
import concurrent.futures
import json
import socket
import struct
import time

import pytest
from daemons import Daemon, write_plugin
from http_peer import Peer, connect, events
from hypothesis import given
from hypothesis import strategies as st

from edge_rt.daemon.http.openai import ApiError
from edge_rt.daemon.http.routes import MAX_EMBEDDING_TEXTS, pack_base64, parse_embedding_request
from edge_rt.errors import ProtocolError
from edge_rt.types import singles

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


HELLO = [{"role": "user", "content": "Hello"}]


SHORT = {"max_tokens": 12, "temperature": 0, "edge_rt": {"ignore_eos": True}}


LONG = {"max_tokens": 3500, "edge_rt": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory, random_model):
    folder = tmp_path_factory.mktemp("http")
    write_plugin(folder)
    config = "keep_sessions = 0.5\nlimits.requests_per_second = 0\nlimits.held_bytes = 40_000\n"
    words = ("--http", str(folder / "h.sock"), "--policy", "strict")
    with Daemon(folder, *words, config=config, model=str(random_model()), delay=0.001) as found:
        assert f"http at unix:{folder}/h.sock".encode() in found.said
        found.ready().close()
        yield found


@pytest.fixture(scope="module")
def peer(daemon):
    return Peer(str(daemon.folder / "h.sock"))


def quiet(daemon, seconds=5.0):
    """Wait until the daemon has nothing to do; how long that took."""
    started = time.monotonic()
    with daemon.client() as client:
        while client.status()["server"]["requests"]:
            assert time.monotonic() - started < seconds, client.status()
            time.sleep(0.005)
    return time.monotonic() - started


def content(chunks):
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"])


def test_an_answer_is_the_same_by_both_protocols_and_in_one_piece_or_many(daemon, peer):
    with daemon.client() as client:
        options = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
        expected = "".join(event.text for event in client.generate(HELLO, **options) if hasattr(event, "tokens"))
    whole = peer.post(CHAT, {"messages": HELLO, **SHORT}).json
    assert whole["object"] == "chat.completion"
    (choice,) = whole["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected, "refusal": None}
    assert (choice["finish_reason"], choice["index"], choice["logprobs"]) == ("length", 0, None)
    usage = whole["usage"]
    assert (usage["completion_tokens"], usage["total_tokens"]) == (12, usage["prompt_tokens"] + 12)
    assert (whole["edge_rt"]["reason"], whole["edge_rt"]["context"]["used"] > 12) == ("max_tokens", True)
    *chunks, done = peer.stream(CHAT, {"messages": HELLO, **SHORT})
    assert (done, content(chunks)) == ("[DONE]", expected)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert (chunks[-1]["choices"][0]["delta"], "usage" in chunks[-1]) == ({}, False)
    assert chunks[-1]["edge_rt"]["usage"]["completion_tokens"] == 12
    assert quiet(daemon) < 1


def test_a_prompt_may_be_its_tokens_as_they_are(daemon, peer):
    text = peer.post(COMPLETION, {"prompt": "Once upon", **SHORT}).json["choices"][0]["text"]
    tokens = peer.post("/tokenize", {"prompt": "Once upon"}).json["tokens"]
    for prompt in (tokens, [tokens]):
        found = peer.post(COMPLETION, {"prompt": prompt, **SHORT}).json
        assert (found["choices"][0]["text"], found["usage"]["prompt_tokens"]) == (text, len(tokens))
    assert peer.post(COMPLETION, {"prompt": tokens[1:], **SHORT}).json["usage"]["prompt_tokens"] == len(tokens) - 1, "nothing is added"


def test_log_probabilities(peer):
    asked = {"messages": HELLO, **SHORT, "logprobs": True, "top_logprobs": 3}
    whole = peer.post(CHAT, asked).json["choices"][0]
    entries = whole["logprobs"]["content"]
    assert len(entries) == 12
    for entry in entries:
        assert [one["logprob"] for one in entry["top_logprobs"]] == sorted((one["logprob"] for one in entry["top_logprobs"]), reverse=True)
        assert (len(entry["top_logprobs"]), entry["logprob"] <= 0) == (3, True)
        assert bytes(entry["bytes"]).decode(errors="replace") == entry["token"]
    *chunks, _ = peer.stream(CHAT, asked)
    streamed = [entry for chunk in chunks if (found := chunk["choices"][0]["logprobs"]) for entry in found["content"]]
    assert streamed == entries
    assert peer.post(CHAT, {**asked, "top_logprobs": 0}).json["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    old = peer.post(COMPLETION, {"prompt": "Once", **SHORT, "logprobs": 2}).json["choices"][0]["logprobs"]
    assert [len(old[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")] == [12] * 4
    assert old["text_offset"][0] == 0
    assert old["text_offset"] == sorted(old["text_offset"])


def test_the_seed_and_the_stop_are_told(peer):
    found = [peer.post(CHAT, {"messages": HELLO, **SHORT, "temperature": 1.5, "seed": 7}).json for _ in range(2)]
    assert found[0]["choices"] == found[1]["choices"]
    assert found[0]["edge_rt"]["seed"] == 7
    text = peer.post(CHAT, {"messages": HELLO, **SHORT}).json["choices"][0]["message"]["content"]
    choice = peer.post(CHAT, {"messages": HELLO, **SHORT, "stop": text[4]}).json["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text[: text.index(text[4])], "stop")


def test_a_session_is_made_when_it_is_named_and_goes_on(daemon, peer):
    messages = [{"role": "user", "content": "tell me " * 20}]
    named = {**SHORT, "edge_rt": {"ignore_eos": True, "session": "mine", "priority": "high"}}
    assert peer.post(CHAT, {"messages": messages, **named}).status == 200
    with daemon.client() as client:
        assert client.status()["server"]["sessions"] == 1
    again = peer.post(CHAT, {"messages": messages, **named}).json
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= again["usage"]["prompt_tokens"] - 1
    time.sleep(0.8)
    with daemon.client() as client:
        assert client.status()["server"]["sessions"] == 0
    assert peer.post(CHAT, {"messages": messages, **named}).status == 200, "its name is free again"


def test_a_session_that_the_worker_lost_is_made_again_and_two_at_once_are_one(daemon, peer):
    time.sleep(0.6)  # those of other tests end
    named = {"messages": HELLO, **SHORT, "edge_rt": {"ignore_eos": True, "session": "lost"}}
    assert peer.post(CHAT, named).status == 200
    assert peer.post(COMPLETION, {"prompt": "\x01 at once"}).code == "worker_died"
    daemon.ready().close()
    assert peer.post(CHAT, named).status == 200
    with daemon.client() as client:
        assert client.status()["server"]["sessions"] == 1
    slow = {**named, "max_tokens": 300, "edge_rt": {"ignore_eos": True, "session": "new"}}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda _: peer.post(CHAT, slow), range(4)))
    assert sorted(reply.status for reply in found) == [200, 429, 429, 429], [reply.json for reply in found]
    with daemon.client() as client:
        assert client.status()["server"]["sessions"] <= 2


def test_models(daemon, peer, random_model):
    name = random_model().stem
    (model,) = peer.get("/v1/models").json["data"]
    assert (model["id"], model["object"], model["owned_by"]) == (name, "model", "edge-rt")
    assert peer.get(f"/v1/models/{name}").json == model
    assert peer.get("/v1/models/other").code == "model_not_found"
    for asked in (name, random_model().name):
        assert peer.post(CHAT, {"model": asked, "messages": HELLO, **SHORT}).json["model"] == name
    reply = peer.post(CHAT, {"model": "gpt-9", "messages": HELLO})
    assert (reply.status, reply.code) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/nothing", None, 404, "unknown_url"),
        ("GET", CHAT, None, 405, "method_not_allowed"),
        ("DELETE", "/v1/models/m", None, 405, "method_not_allowed"),
        ("POST", CHAT, b"{", 400, "malformed_json"),
        ("POST", CHAT, b"[]", 400, "malformed_json"),
        ("POST", CHAT, b"", 400, "malformed_json"),
        ("POST", CHAT, {}, 400, "missing_required_parameter"),
        ("POST", CHAT, {"messages": []}, 400, "invalid_value"),
        ("POST", CHAT, {"messages": HELLO, "n": 2}, 400, "unsupported_value"),
        ("POST", CHAT, {"messages": HELLO, "temperature": -1}, 400, "invalid_value"),
        ("POST", CHAT, {"messages": HELLO, "max_tokens": 0}, 400, "invalid_value"),
        ("POST", CHAT, {"messages": HELLO, "tools": [{"type": "retrieval"}]}, 400, "invalid_value"),
        ("POST", CHAT, {"messages": HELLO, "edge_rt": {"grammar": "root ::= ["}}, 400, "invalid_value"),
        ("POST", CHAT, {"messages": HELLO, "edge_rt": {"priority": "first"}}, 400, "invalid_value"),
        ("POST", CHAT, {"messages": HELLO, "edge_rt": {"nothing": 1}}, 400, "invalid_value"),
        ("POST", CHAT, {"messages": HELLO, "edge_rt": {"post": ["nothing"]}}, 400, "invalid_value"),
        ("POST", COMPLETION, {"prompt": "x " * 5000}, 400, "context_length_exceeded"),
        ("POST", COMPLETION, {"prompt": ""}, 400, "invalid_value"),
        ("POST", COMPLETION, {"prompt": ["a", "b"]}, 400, "invalid_type"),
        ("POST", COMPLETION, {"prompt": [1 << 40]}, 400, "invalid_value"),
        ("POST", COMPLETION, {"prompt": [1] * 5000}, 400, "context_length_exceeded"),
    ],
)
def test_errors(daemon, peer, method, path, body, status, code):
    for stream in (False, True) if isinstance(body, dict) else (False,):
        given = {**body, "stream": True} if stream else body
        reply = peer.ask(method, path, given)
        assert (reply.status, reply.code) == (status, code), reply.body
        assert reply.headers["content-type"] == "application/json"
        assert reply.headers["x-request-id"].startswith("req_")
    assert quiet(daemon) < 1


def test_a_worker_that_dies_is_an_error_in_the_stream_and_the_next_request_is_answered(daemon, peer):
    reply = peer.post(COMPLETION, {"prompt": "\x01 at once", **SHORT})
    assert (reply.status, reply.code) == (503, "worker_died")
    assert int(reply.headers["retry-after"]) >= 1
    daemon.ready().close()
    with peer.asked("POST", COMPLETION, {"prompt": "a long one", **LONG, "stream": True}) as answer:
        found = events(iter(answer.read1, b""))
        next(found)
        peer.post(COMPLETION, {"prompt": "\x02 meanwhile"})
        *_, last = found
    assert (last["error"]["code"], last["error"]["type"]) == ("worker_died", "server_error")
    daemon.ready().close()
    assert peer.post(CHAT, {"messages": HELLO, **SHORT}).status == 200


def begun(peer, body):
    """A stream of which some was read."""
    connection = connect(peer.address)
    data = json.dumps({"prompt": "a b c", **body, "stream": True}).encode()
    connection.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (COMPLETION.encode(), len(data), data))
    assert connection.recv(100).startswith(b"HTTP/1.1 200 OK\r\n")
    return connection


def test_a_client_that_leaves_frees_its_slot(daemon, peer):
    for leave in (socket.socket.close, lambda one: one.shutdown(socket.SHUT_WR)):
        with begun(peer, LONG) as connection:
            leave(connection)
            assert quiet(daemon) < 1


def test_a_client_that_does_not_read_holds_up_itself_alone(daemon, peer):
    with connect(peer.address) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        data = json.dumps({"prompt": "a b c", **LONG, "stream": True}).encode()
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data))
        before, now = -1, 0
        until = time.monotonic() + 10
        while now != before or not now:
            assert time.monotonic() < until
            before, now = now, told(peer)
            time.sleep(0.2)
        assert peer.post(CHAT, {"messages": HELLO, **SHORT}).status == 200
        with daemon.client() as client:
            assert client.status()["server"]["requests"] == 1, "it waits"
        assert told(peer) - now < 20 < 3000 - now, "nothing came for it meanwhile"
    assert quiet(daemon) < 1


def told(peer):
    """Tokens that all clients together were told of, but for the first of each."""
    (line,) = (line for line in peer.get("/metrics").body.decode().splitlines() if line.startswith("edge_rt_between_tokens_seconds_count"))
    return int(line.split()[1])


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_a_stream_reads_the_same_however_it_is_split(peer, step):
    asked = {"messages": HELLO, **SHORT}
    *chunks, done = peer.stream(CHAT, asked, step=step)
    assert (content(chunks), done) == (peer.post(CHAT, asked).json["choices"][0]["message"]["content"], "[DONE]")


def test_a_request_is_read_the_same_however_it_is_split(peer):
    data = json.dumps({"messages": HELLO, **SHORT}).encode()
    whole = b"POST %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (CHAT.encode(), len(data), data)
    chunked = b"POST %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n" % CHAT.encode()
    chunked += b"".join(b"%x\r\n%s\r\n" % (len(data[i : i + 9]), data[i : i + 9]) for i in range(0, len(data), 9)) + b"0\r\n\r\n"
    expected = peer.post(CHAT, {"messages": HELLO, **SHORT}).json["choices"]
    for request in (whole, chunked):
        for step in (1, 13):
            with connect(peer.address) as connection:
                for i in range(0, len(request), step):
                    connection.send(request[i : i + step])
                with connection.makefile("rb") as file:
                    assert json.loads(file.read().partition(b"\r\n\r\n")[2])["choices"] == expected


def test_metrics(daemon, peer, random_model):
    peer.post(CHAT, {"messages": HELLO, **SHORT})
    peer.get("/nothing")
    reply = peer.get("/metrics")
    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = reply.body.decode().splitlines()
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}
    assert values['edge_rt_http_requests_total{path="/v1/chat/completions",status="200"}'] >= 1
    assert values['edge_rt_http_requests_total{path="other",status="404"}'] >= 1
    assert values['edge_rt_requests_total{op="generate"}'] >= 1
    assert values['edge_rt_tokens_total{kind="completion_tokens"}'] >= 12
    assert (values["edge_rt_ready"], values["edge_rt_connections_open"]) == (1, 1)
    assert values[f'edge_rt_memory_bytes{{model="{random_model().stem}",owner="cache"}}'] >= 0
    for name in ("first_token", "between_tokens"):
        buckets = [value for key, value in values.items() if key.startswith(f"edge_rt_{name}_seconds_bucket")]
        assert buckets == sorted(buckets)
        assert buckets[-1] == values[f"edge_rt_{name}_seconds_count"] >= 1
    named = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    assert {key.partition("{")[0].removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for key in values} <= named


def test_several_requests_on_one_connection(peer):
    get = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    wrong = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n[]"
    missing = b"POST /no HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"
    data = json.dumps({"prompt": "Once", **SHORT}).encode()
    post = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data)
    last = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    found = peer.raw(get + wrong + missing + post + get * 40 + last)
    assert [reply.status for reply in found] == [200, 400, 404, 200] + [200] * 41
    assert found[3].json["usage"]["completion_tokens"] == 12
    assert found[-1].headers["connection"] == "close"


EMBEDDINGS = "/v1/embeddings"


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        ("a", {"texts": ["a"]}),
        (["a", "b"], {"texts": ["a", "b"]}),
        ([1, 2], {"tokens": [[1, 2]]}),
        ([[1, 2], [3]], {"tokens": [[1, 2], [3]]}),
    ],
)
def test_embedding_inputs(given, fields):
    asked = parse_embedding_request({"input": given, "model": "m", "user": "u", "dimensions": None})
    assert (asked.fields, asked.model, asked.base64, asked.dimensions, asked.ignored) == (fields, "m", False, None, ("user",))


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "input", "missing_required_parameter"),
        ({"input": None}, "input", "missing_required_parameter"),
        ({"input": 3}, "input", "invalid_type"),
        ({"input": {"text": "a"}}, "input", "invalid_type"),
        ({"input": ["a", 1]}, "input", "invalid_type"),
        ({"input": [1, "a"]}, "input", "invalid_type"),
        ({"input": [[1], 2]}, "input", "invalid_type"),
        ({"input": [[1], "a"]}, "input", "invalid_type"),
        ({"input": [-1]}, "input", "invalid_type"),
        ({"input": [1.5]}, "input", "invalid_type"),
        ({"input": [True]}, "input", "invalid_type"),
        ({"input": [None]}, "input", "invalid_type"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": ""}, "input", "invalid_value"),
        ({"input": ["a", ""]}, "input", "invalid_value"),
        ({"input": [[]]}, "input", "invalid_value"),
        ({"input": ["a"] * (MAX_EMBEDDING_TEXTS + 1)}, "input", "invalid_value"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "invalid_value"),
        ({"input": "a", "encoding_format": 3}, "encoding_format", "invalid_type"),
        ({"input": "a", "dimensions": 0}, "dimensions", "invalid_value"),
        ({"input": "a", "dimensions": 1.5}, "dimensions", "invalid_type"),
        ({"input": "a", "messages": []}, "messages", "unknown_parameter"),
        ({"input": "a", "stream": True}, "stream", "unknown_parameter"),
    ],
)
def test_embedding_mistakes(body, param, code):
    with pytest.raises(ApiError) as caught:
        parse_embedding_request(body)
    assert (caught.value.param, caught.value.code, caught.value.status) == (param, code, 400)


def test_unknown_embedding_options():
    with pytest.raises(ProtocolError):
        parse_embedding_request({"input": "a", "edge_rt": {"top_k": 3}})


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=20))
def test_numbers_come_back_to_the_bit(row):
    bits = struct.pack(f"<{len(row)}f", *row)
    assert struct.pack(f"<{len(row)}f", *json.loads(json.dumps(singles(row)))) == bits
    assert base64.b64decode(pack_base64(row)) == bits


def test_embeddings(daemon, peer, random_model):
    texts = ["ab", "a river", "東京"]
    reply = peer.post(EMBEDDINGS, {"input": texts, "model": random_model().stem, "user": "u"})
    assert (reply.status, reply.headers["content-type"], reply.headers["edge-rt-ignored"]) == (200, "application/json", "user")
    found = reply.json
    assert list(found) == ["object", "data", "model", "usage"]
    assert (found["object"], found["model"]) == ("list", random_model().stem)
    assert [(one["object"], one["index"]) for one in found["data"]] == [("embedding", i) for i in range(3)]
    count = sum(len(text.encode()) + 1 for text in texts)
    assert found["usage"] == {"prompt_tokens": count, "total_tokens": count}
    with daemon.client() as client:
        assert [one["embedding"] for one in found["data"]] == [singles(row) for row in client.embed(texts)]
        raw = client.embed([[256, 97, 98]], pooling="last", normalize=False)[0]
    packed = peer.post(EMBEDDINGS, {"input": texts, "encoding_format": "base64"}).json["data"]
    for one, plain in zip(packed, found["data"], strict=True):
        assert struct.unpack("<8f", base64.b64decode(one["embedding"])) == pytest.approx(plain["embedding"], rel=1e-7)
    tokens = peer.post(EMBEDDINGS, {"input": [256, 97, 98], "edge_rt": {"pooling": "last", "normalize": False}}).json
    assert (tokens["data"][0]["embedding"], tokens["usage"]["prompt_tokens"]) == (pytest.approx(raw, rel=1e-7), 3)


def test_dimensions(daemon, peer):
    whole = peer.post(EMBEDDINGS, {"input": "ab", "dimensions": 8}).json["data"][0]["embedding"]
    for wrong in (4, 9):
        reply = peer.post(EMBEDDINGS, {"input": ["ab"] * 300, "dimensions": wrong})
        assert (reply.status, reply.code, reply.json["error"]["param"]) == (400, "unsupported_value", "dimensions")
    quiet(daemon)
    cut = peer.post(EMBEDDINGS, {"input": "ab", "dimensions": 4, "edge_rt": {"truncate": True}}).json["data"][0]["embedding"]
    length = sum(x * x for x in whole[:4]) ** 0.5
    assert cut == pytest.approx([x / length for x in whole[:4]], rel=1e-6)
    reply = peer.post(EMBEDDINGS, {"input": "ab", "dimensions": 9, "edge_rt": {"truncate": True}})
    assert (reply.status, reply.code) == (400, "invalid_value")


def test_an_answer_that_is_too_long_to_be_held_is_refused_and_the_connection_goes_on(daemon, peer):
    first, second = (json.dumps({"input": given}).encode() for given in (["ab"] * 1000, "ab"))
    head = f"POST {EMBEDDINGS} HTTP/1.1\r\nHost: x\r\nContent-Length: "
    data = f"{head}{len(first)}\r\n\r\n".encode() + first + f"{head}{len(second)}\r\nConnection: close\r\n\r\n".encode() + second
    refused, answered = peer.raw(data)
    assert (refused.status, refused.code, answered.status) == (429, "rate_limit_exceeded", 200)
    quiet(daemon)
