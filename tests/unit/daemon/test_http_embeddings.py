"""`/v1/embeddings`: what is read of a request, and what is answered, with the null engine."""

import base64
import json
import struct
import time

import pytest
from daemons import Daemon, write_plugin
from http_peer import Peer, connect
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("h11", reason="the daemon speaks HTTP with h11; pip install 'edge-rt[http]'")

from edge_rt.daemon.http.openai import ApiError
from edge_rt.daemon.http.routes import MAX_EMBEDDING_TEXTS, pack_base64, parse_embedding_request
from edge_rt.errors import ProtocolError
from edge_rt.types import singles

PATH = "/v1/embeddings"


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        ("a", {"texts": ["a"]}),
        (["a", "b"], {"texts": ["a", "b"]}),
        ([1, 2], {"tokens": [[1, 2]]}),
        ([[1, 2], [3]], {"tokens": [[1, 2], [3]]}),
    ],
)
def test_inputs(given, fields):
    asked = parse_embedding_request({"input": given, "model": "m", "user": "u", "dimensions": None})
    assert (asked.fields, asked.model, asked.base64, asked.dimensions, asked.ignored) == (fields, "m", False, None, ("user",))


def test_what_edge_rt_adds():
    asked = parse_embedding_request(
        {"input": "a", "encoding_format": "base64", "dimensions": 3, "edge_rt": {"pooling": "last", "normalize": False}}
    )
    assert (asked.fields, asked.base64, asked.dimensions) == ({"texts": ["a"], "pooling": "last", "normalize": False}, True, 3)
    asked = parse_embedding_request({"input": "a", "dimensions": 3, "edge_rt": {"truncate": True}})
    assert (asked.fields, asked.dimensions) == ({"texts": ["a"], "dimensions": 3}, None)


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
def test_what_cannot_be(body, param, code):
    with pytest.raises(ApiError) as caught:
        parse_embedding_request(body)
    assert (caught.value.param, caught.value.code, caught.value.status) == (param, code, 400)


def test_what_edge_rt_has_not():
    with pytest.raises(ProtocolError):
        parse_embedding_request({"input": "a", "edge_rt": {"top_k": 3}})


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=20))
def test_numbers_come_back_to_the_bit(row):
    bits = struct.pack(f"<{len(row)}f", *row)
    assert struct.pack(f"<{len(row)}f", *json.loads(json.dumps(singles(row)))) == bits
    assert base64.b64decode(pack_base64(row)) == bits


# ---- the daemon ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def daemon(tmp_path_factory, random_model):
    folder = tmp_path_factory.mktemp("http")
    write_plugin(folder)
    config = "credits = 8\nlimits.requests_per_second = 0\nlimits.held_bytes = 40000\n"
    with Daemon(folder, "--http", str(folder / "h.sock"), config=config, model=str(random_model()), delay=0.001) as found:
        found.ready().close()
        yield found


@pytest.fixture(scope="module")
def peer(daemon):
    return Peer(str(daemon.folder / "h.sock"))


def under_way(daemon):
    with daemon.client() as client:
        return client.status()["server"]


def quiet(daemon):
    until = time.monotonic() + 20
    while (server := under_way(daemon))["requests"]:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert server["held_bytes"] == 0, "nothing is held for those who are gone"


def test_answers(daemon, peer, random_model):
    texts = ["ab", "a river", "東京"]
    reply = peer.post(PATH, {"input": texts, "model": random_model().stem, "user": "u"})
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
    packed = peer.post(PATH, {"input": texts, "encoding_format": "base64"}).json["data"]
    for one, plain in zip(packed, found["data"], strict=True):
        assert struct.unpack("<8f", base64.b64decode(one["embedding"])) == pytest.approx(plain["embedding"], rel=1e-7)
    tokens = peer.post(PATH, {"input": [256, 97, 98], "edge_rt": {"pooling": "last", "normalize": False}}).json
    assert (tokens["data"][0]["embedding"], tokens["usage"]["prompt_tokens"]) == (pytest.approx(raw, rel=1e-7), 3)


def test_dimensions(daemon, peer):
    whole = peer.post(PATH, {"input": "ab", "dimensions": 8}).json["data"][0]["embedding"]
    for wrong in (4, 9):
        reply = peer.post(PATH, {"input": ["ab"] * 300, "dimensions": wrong})
        assert (reply.status, reply.code, reply.json["error"]["param"]) == (400, "unsupported_value", "dimensions")
    quiet(daemon)
    cut = peer.post(PATH, {"input": "ab", "dimensions": 4, "edge_rt": {"truncate": True}}).json["data"][0]["embedding"]
    length = sum(x * x for x in whole[:4]) ** 0.5
    assert cut == pytest.approx([x / length for x in whole[:4]], rel=1e-6)
    reply = peer.post(PATH, {"input": "ab", "dimensions": 9, "edge_rt": {"truncate": True}})
    assert (reply.status, reply.code) == (400, "invalid_value")


def test_errors(daemon, peer):
    for body, status, code in (
        ({"input": ""}, 400, "invalid_value"),
        ({"input": ["a", "x" * 5000]}, 400, "context_length_exceeded"),
        ({"input": "a", "edge_rt": {"pooling": "max"}}, 400, "invalid_value"),
        ({"input": [999]}, 400, "invalid_value"),
        ({"input": "a", "model": "gpt-9"}, 404, "model_not_found"),
        (b"{", 400, "malformed_json"),
    ):
        reply = peer.post(PATH, body)
        assert (reply.status, reply.code) == (status, code), reply.body
    quiet(daemon)


def test_an_answer_that_is_too_long_to_be_held_is_refused_and_the_connection_goes_on(daemon, peer):
    first, second = (json.dumps({"input": given}).encode() for given in (["ab"] * 1000, "ab"))
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: "
    data = f"{head}{len(first)}\r\n\r\n".encode() + first + f"{head}{len(second)}\r\nConnection: close\r\n\r\n".encode() + second
    refused, answered = peer.raw(data)
    assert (refused.status, refused.code, answered.status) == (429, "rate_limit_exceeded", 200)
    quiet(daemon)


def test_leaving_ends_it(daemon, peer):
    body = json.dumps({"input": ["ab"] * 2000}).encode()
    with connect(str(daemon.folder / "h.sock")) as connection:
        connection.sendall(f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        while not under_way(daemon)["requests"]:
            time.sleep(0.005)
    quiet(daemon)


def test_a_worker_that_dies(daemon, peer):
    reply = peer.post(PATH, {"input": ["ab", "\x01\x01"]})
    assert (reply.status, reply.code) == (503, "worker_died")
    daemon.ready().close()
    assert peer.post(PATH, {"input": "ab"}).status == 200
    quiet(daemon)
