"""Adapters in the daemon: named in its configuration, chosen per request in both protocols."""

import pytest
from daemons import Daemon, write_plugin
from http_peer import Peer

from edge_rt.core.gguf.reader import read_header
from edge_rt.errors import DaemonError
from edge_rt.testing.random_models import write_random_adapter
from edge_rt.types import Delta

CHAT = "/v1/chat/completions"


HELLO = [{"role": "user", "content": "Hello"}]


GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def files(tmp_path_factory, random_model):
    folder, raw = tmp_path_factory.mktemp("files"), random_model().read_bytes()
    header = read_header(raw, len(raw))
    return {name: write_random_adapter(folder / f"{name}.gguf", header, seed=seed) for seed, name in enumerate(("law", "tales"))}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory, random_model, files):
    folder = tmp_path_factory.mktemp("daemon")
    write_plugin(folder)
    (folder / "law.gguf").write_bytes(files["law"].read_bytes())
    (folder / "broken.gguf").write_bytes(b"GGUF")
    config = f"""
[model]
file = {str(random_model())!r}
engine = "null"
device = "null"
adapters = {{ law = "law.gguf", tales = {str(files["tales"])!r}, broken = "broken.gguf" }}

[http]
listen = ["{folder}/h.sock"]
"""
    with Daemon(folder, config=config) as found:
        found.ready().close()
        yield found


@pytest.fixture(scope="module")
def peer(daemon):
    return Peer(str(daemon.folder / "h.sock"))


def ask(one, prompt="A prompt that is long enough.", **options):
    return "".join(event.text for event in one.generate(prompt, **{**GREEDY, **options}) if isinstance(event, Delta))


def test_each_request_chooses_one_or_none(client):
    asked = [{}, {"adapter": "law"}, {"adapter": "law", "adapter_scale": 0.5}, {"adapter": "tales"}]
    answers = [ask(client, **options) for options in asked]
    assert len(set(answers)) == 4
    with client.session() as session:
        assert [ask(session, **options) for options in asked[::-1]] == answers[::-1]
    assert client.status()["model"]["adapters"] == ["law", "tales", "broken"]


def test_what_cannot_be_is_an_error_of_that_request_alone(client, files):
    expected = ask(client)
    for options, code, said in (
        ({"adapter": "other"}, "option", "there is no adapter 'other'; this model has law, tales, broken"),
        ({"adapter": str(files["law"])}, "option", "there is no adapter"),
        ({"adapter": 7}, "option", "not a text"),
        ({"adapter": "law", "adapter_scale": "much"}, "option", "not a number"),
        ({"adapter": "law", "adapter_scale": 1e6}, "option", "give -1000 to 1000"),
        ({"adapter_scale": 2.0}, "option", "give an adapter too"),
        ({"adapter": "broken"}, "model_file", "broken.gguf"),
    ):
        with pytest.raises(DaemonError, match=said) as caught:
            ask(client, **options)
        assert caught.value.code == code
    assert ask(client) == expected
    with pytest.raises(DaemonError) as caught:
        client.call("load_model", model="none", options={"adapters": {"law": str(files["law"])}})
    assert caught.value.code == "option", "who may load models may not name files of adapters either"


def test_a_saved_session_goes_on_with_its_adapter(daemon, client):
    longer = "A prompt that is long enough. And?"
    expected = ask(client, longer, adapter="law")
    with client.session() as session:
        ask(session, adapter="law")
        session.save("mine")
    with client.restore("mine") as session:
        events = list(session.generate(longer, adapter="law", **GREEDY))
        assert "".join(event.text for event in events if isinstance(event, Delta)) == expected
        assert events[-1].usage.reused_tokens > 20


def test_models_with_adapters_are_models(peer, client, random_model):
    name = random_model().stem
    found = peer.get("/v1/models").json["data"]
    assert [one["id"] for one in found] == [name, f"{name}:law", f"{name}:tales", f"{name}:broken"]
    assert [one.get("parent") for one in found] == [None, name, name, name]
    assert peer.get(f"/v1/models/{name}:law").json == found[1]
    for wrong in (f"{name}:other", "other:law", f"{name}:", ":law"):
        assert peer.get(f"/v1/models/{wrong}").code == "model_not_found"
        assert peer.post(CHAT, {"model": wrong, "messages": HELLO}).code == "model_not_found"


def test_both_ways_to_ask_for_one(peer, client, random_model):
    name = random_model().stem
    body = {"messages": HELLO, "max_tokens": 12, "temperature": 0}
    own = {"ignore_eos": True}
    by_model = peer.post(CHAT, {**body, "model": f"{name}:law", "edge_rt": own}).json
    by_field = peer.post(CHAT, {**body, "edge_rt": {**own, "adapter": "law"}}).json
    plain = peer.post(CHAT, {**body, "edge_rt": own}).json
    texts = [answer["choices"][0]["message"]["content"] for answer in (by_model, by_field, plain)]
    assert texts[0] == texts[1] == ask(client, HELLO, adapter="law")
    assert texts[2] == ask(client, HELLO) != texts[0]
    assert (by_model["model"], plain["model"]) == (f"{name}:law", name)
    half = peer.post(CHAT, {**body, "model": f"{name}:law", "edge_rt": {**own, "adapter_scale": 0.5}}).json
    assert half["choices"][0]["message"]["content"] == ask(client, HELLO, adapter="law", adapter_scale=0.5)
    reply = peer.post(CHAT, {**body, "model": f"{name}:law", "edge_rt": {"adapter": "tales"}})
    assert (reply.status, reply.code, reply.json["error"]["param"]) == (400, "invalid_value", "edge_rt.adapter")
    reply = peer.post(CHAT, {**body, "edge_rt": {"adapter": "other"}})
    assert (reply.status, reply.code) == (400, "invalid_value")
