"""How likely given texts are: the same however they are read, in the daemon as in process, over its socket and over HTTP."""

import itertools

import numpy as np
import pytest
from daemons import Daemon, write_plugin
from http_peer import Peer
from hypothesis import given, settings
from hypothesis import strategies as st
from readers import Asks

from edge_rt.core.generate.scoring import divided, scoring, token_logprobs
from edge_rt.errors import Cancelled, ContextOverflow, DaemonError, OptionError, OutOfMemory
from edge_rt.testing.null_device import NullEngine

TEXTS = ["ab", "a river", "東京", "x" * 200, "ab"]
CHAT = [{"role": "user", "content": "Where?"}]


@pytest.fixture(scope="module")
def model(shared_null_model):
    return shared_null_model


def expected(model, before, continuation):
    """From all logits of the whole text."""
    rows = model.logits([*before, *continuation])[len(before) - 1 :]
    return [token_logprobs(row, token, 3) for row, token in zip(rows, continuation, strict=False)], token_logprobs(rows[-1], 0, 3)[1]


def scores(model, before, continuations, rooms, **more):
    """All scores, read in pieces of ``rooms`` tokens in turn."""
    steps, found = scoring(model.engine, before, continuations, **more), []
    with model.lock:
        next(steps)
        for room in itertools.cycle(rooms):
            if (one := steps.send(room)) is not None:
                found.append(one)
            if len(found) == len(continuations):
                break
        steps.close()
    assert model.memory().cache == 0, "nothing is left behind"
    return found


def tokens_of(least=0):
    return st.lists(st.integers(6, 200), min_size=least, max_size=40)


@given(tokens_of(1), st.lists(tokens_of(), min_size=1, max_size=4), st.lists(st.integers(1, 50), min_size=1))
@settings(max_examples=40, deadline=None)
def test_scores_are_those_of_whole_texts_however_they_are_read(model, before, continuations, rooms):
    found = scores(model, before, continuations, rooms, top=3, beyond=True)
    for one, continuation in zip(found, continuations, strict=True):
        told, beyond = expected(model, before, continuation)
        np.testing.assert_allclose(one.logprobs, [logprob for logprob, _ in told], atol=1e-9)
        assert (one.top, one.beyond) == (tuple(rivals for _, rivals in told), beyond)
    for one, full in zip(scores(model, before, continuations, rooms), found, strict=True):
        np.testing.assert_array_equal(one.logprobs, full.logprobs)
        assert (one.top, one.beyond) == ((), ())


def test_what_cannot_be_scored(model):
    for before, continuations in (([], [[7]]), ([7], [[model.info.n_vocab]]), ([-1], [[7]])):
        with pytest.raises(OptionError):
            next(scoring(model.engine, before, continuations))


def test_memory_that_runs_out_is_asked_for_once_and_then_told(model, monkeypatch):
    step, fails, asked = NullEngine.step, [], []

    def failing(self, parts):
        if fails:
            fails.pop()
            raise OutOfMemory("no cells are left")
        return step(self, parts)

    monkeypatch.setattr(NullEngine, "step", failing)
    fails.append(True)
    found = scores(model, [7, 8], [[9, 10]], [50], relieve=lambda: asked.append(1) or True)
    assert asked == [1]
    np.testing.assert_array_equal(found[0].logprobs, scores(model, [7, 8], [[9, 10]], [50])[0].logprobs)
    fails.append(True)
    with pytest.raises(OutOfMemory):
        scores(model, [7, 8], [[9, 10]], [50])
    assert model.memory().cache == 0


@given(st.lists(st.integers(0, 3), min_size=1), st.lists(st.lists(st.integers(0, 3), min_size=2), min_size=1))
def test_division_leaves_each_something_and_loses_nothing(alone, rows):
    before, rests = divided(alone, rows)
    assert [[*before, *rest] for rest in rests] == rows
    assert all(rests)
    at = len(before)
    assert alone[:at] == before
    assert at == len(alone) or min(map(len, rests)) == 1 or any(row[at] != alone[at] for row in rows), "no more could be before"


# ---- in the worker ---------------------------------------------------------------------------------------------------


@pytest.fixture
def asks(model):
    return Asks(model, "score")


def test_scores_and_embeddings_take_turns_and_disturb_nobody(asks, model):
    asks.add("score", texts=TEXTS, top=2, beyond=True)
    asks.add("embed", "embed", texts=TEXTS)
    asks.add("continue", prompt="a ", continuations=["river", "road"])
    asks.finish(room=7)
    assert [one["index"] for one in asks.said["score"]] == list(range(5))
    for text, event in zip(TEXTS, asks.said["score"], strict=True):
        tokens = model.tokenize(text)
        (one,) = event["scores"]
        told, beyond = expected(model, tokens[:1], tokens[1:])
        assert one["tokens"] == tokens[1:]
        np.testing.assert_allclose(one["logprobs"], [logprob for logprob, _ in told], atol=1e-9)
        assert one["beyond"] == [list(pair) for pair in beyond[:2]]
    np.testing.assert_allclose([one["embedding"] for one in asks.said["embed"]], model.embed(TEXTS), atol=1e-6)
    before, rests = model.continuations("a ", ["river", "road"])
    (event,) = asks.said["continue"]
    for one, nats in zip(event["scores"], model.continuation_logprobs(before, rests), strict=True):
        np.testing.assert_allclose(one["logprobs"], nats, atol=1e-9)
    assert asks.ended["score"] == {"tokens": sum(len(model.tokenize(text)) for text in TEXTS)}


def test_a_request_ends_by_its_own_mistake_or_wish_and_no_other(asks):
    with pytest.raises(OptionError, match="0 to 20"):
        asks.add("curious", texts=["a"], top=21)
    asks.add("good", texts=["ab", "river"])
    asks.add("long", texts=["a", "b" * 600])
    asks.add("foreign", tokens=[[7, 10**6]])
    asks.add("gone", texts=["x" * 300, "y"])
    for _ in range(6):
        asks.work.step(16)
    asks.asked["gone"].cancelled = True
    asks.finish()
    assert [type(asks.ended[name]) for name in ("good", "long", "foreign", "gone")] == [dict, ContextOverflow, OptionError, Cancelled]
    assert asks.said["long"] == []
    assert len(asks.said["good"]) == 2


# ---- the daemon ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def daemon(tmp_path_factory, random_model):
    folder = tmp_path_factory.mktemp("scores")
    write_plugin(folder)
    with Daemon(folder, "--http", str(folder / "h.sock"), config="limits.requests_per_second = 0\n", model=str(random_model())) as found:
        found.ready().close()
        yield found


@pytest.fixture(scope="module")
def peer(daemon):
    pytest.importorskip("h11", reason="the daemon speaks HTTP with h11; pip install 'edge-rt[http]'")
    return Peer(str(daemon.folder / "h.sock"))


def test_over_the_socket(daemon):
    with daemon.client() as client:
        whole = client.score(TEXTS, top=2)
        tokens = [client.call("tokenize", text=text)["tokens"] for text in TEXTS]
        assert [one["tokens"] for one in whole] == [one[1:] for one in tokens]
        assert client.score(tokens, top=2) == whole
        assert all(len(place) == 2 and place[0][1] >= place[1][1] for one in whole for place in one["top"])
        behind = client.score(["river", "road"], before=CHAT)
        assert [len(one["logprobs"]) for one in behind] == [5, 4]
        assert client.score(["road", "river"], before=CHAT) == behind[::-1]
        counted = client.call("metrics")["tokens"]["scored_tokens"]
        client.score(["abc"])
        assert client.call("metrics")["tokens"]["scored_tokens"] == counted + 3
        for fields in ({}, {"texts": ["a"], "tokens": [[1]]}, {"prompt": "a"}, {"texts": ["a"], "continuations": ["b"]}):
            with pytest.raises(DaemonError) as caught:
                client.call("score", **fields)
            assert caught.value.code == "bad_request"
        assert client.score(["river"], before="")[0]["tokens"] == whole[1]["tokens"][-5:]
        for fields in ({"texts": []}, {"prompt": "a", "continuations": []}, {"messages": [], "continuations": ["a"]}):
            with pytest.raises(DaemonError) as caught:
                client.call("score", **fields)
            assert caught.value.code == "option"


def test_echo_as_completions_had_it(daemon, peer):
    body = {"prompt": ["ab", "a river"], "echo": True, "logprobs": 2, "max_tokens": 1, "temperature": 0}
    reply = peer.post("/v1/completions", body)
    assert reply.status == 200, reply.body
    with daemon.client() as client:
        scores = client.score(["ab", "a river"], top=2, beyond=True)
        tokens = [client.call("tokenize", text=text)["tokens"] for text in body["prompt"]]
    for index, (choice, score) in enumerate(zip(reply.json["choices"], scores, strict=True)):
        shown = choice["logprobs"]
        assert (choice["index"], len(shown["tokens"])) == (index, len(score["tokens"]) + 2)
        assert shown["token_logprobs"] == [None, *score["logprobs"], score["beyond"][0][1]]
        assert shown["top_logprobs"][0] is None
        assert [max(one.values()) for one in shown["top_logprobs"][1:-1]] == [top[0][1] for top in score["top"]]
        assert shown["text_offset"] == [sum(map(len, shown["tokens"][:at])) for at in range(len(shown["tokens"]))]
    assert reply.json["usage"]["prompt_tokens"] == sum(map(len, tokens))
    as_tokens = peer.post("/v1/completions", {**body, "prompt": tokens}).json
    assert as_tokens["choices"] == reply.json["choices"]
    bare = peer.post("/v1/completions", {**body, "logprobs": 0, "max_tokens": 0}).json["choices"][0]["logprobs"]
    assert (bare["token_logprobs"], bare["top_logprobs"]) == (reply.json["choices"][0]["logprobs"]["token_logprobs"][:-1], None)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"logprobs": None}, "echo"),
        ({"max_tokens": 2}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"temperature": 1}, "max_tokens"),
        ({"stream": True}, "stream"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_what_echo_cannot_do(peer, more, param):
    reply = peer.post("/v1/completions", {"prompt": "ab", "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, **more})
    assert (reply.status, reply.json["error"]["param"]) == (400, param)


def test_continuations_over_http(daemon, peer):
    body = {"messages": CHAT, "continuations": ["river", "road"], "top_logprobs": 1}
    found = peer.post("/edge-rt/score", body).json
    with daemon.client() as client:
        scores = client.score(body["continuations"], before=CHAT)
    assert [one["logprobs"] for one in found["data"]] == [one["logprobs"] for one in scores]
    assert [one["pieces"] for one in found["data"]] == [list("river"), list("road")]
    assert all(len(place) == 1 for one in found["data"] for place in one["top_logprobs"])
    behind = peer.post("/edge-rt/score", {"prompt": "a r", "continuations": ["iver", "oad"]}).json["data"]
    assert [one["pieces"] for one in behind] == [list("iver"), list("oad")]
    for wrong in ({**body, "prompt": "a"}, {"continuations": ["a"]}, {**body, "continuations": []}, {**body, "top_logprobs": -1}):
        assert peer.post("/edge-rt/score", wrong).status == 400


def test_tokens_as_evaluation_tools_ask_for_them(daemon, peer):
    with daemon.client() as client:
        whole = client.call("tokenize", text="ab")["tokens"]
        assert client.call("tokenize", text="ab", bos=False)["tokens"] == whole[1:]
        told = client.call("tokenizer")
    assert peer.post("/tokenize", {"prompt": "ab"}).json == {"tokens": whole, "count": 3}
    bare = peer.post("/tokenize", {"prompt": "ab", "add_special_tokens": False}).json["tokens"]
    assert bare == whole[1:]
    assert peer.post("/detokenize", {"tokens": bare}).json == {"prompt": "ab"}
    info = peer.get("/tokenizer_info").json
    assert (info["bos_token"], info["eos_token"], info["vocab_size"]) == (told["bos"], told["eos"], told["tokens"])
    assert peer.post("/tokenize", {"prompt": told["bos"], "add_special_tokens": False}).json["tokens"] == whole[:1]
    for path, body in (("/tokenize", {}), ("/tokenize", {"prompt": 3}), ("/detokenize", {"tokens": ["a"]})):
        assert peer.post(path, body).status == 400
    assert peer.post("/tokenize", {"prompt": "a", "model": "nobody"}).status == 404
