"""The official OpenAI client, unchanged, against the daemon with a real model."""

import asyncio
import json
import re
import time

import pytest
from daemons import Daemon
from meanings import PAIRS, closest

openai = pytest.importorskip("openai", reason="OpenAI's client is not installed; pip install openai")

KEY = "0123456789abcdef0123"
QUESTION = [{"role": "user", "content": "Name three colours."}]
GREEDY = {"temperature": 0, "max_tokens": 24}
LONG = {"prompt": "Once upon a time", "stream": True, "max_tokens": 900, "extra_body": {"edge_rt": {"ignore_eos": True}}}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory, smollm2):
    folder = tmp_path_factory.mktemp("http")
    (folder / "keys").write_text(KEY)
    (folder / "keys").chmod(0o600)
    words = ("-m", str(smollm2), "-c", "1024", "--policy", "strict", "--http", "tcp:127.0.0.1:0")
    with Daemon(folder, *words, config='limits.requests_per_second = 0\n[http]\nkey_file = "keys"\n') as found:
        found.port = int(re.search(rb"tcp:127\.0\.0\.1:(\d+)", found.said)[1])
        found.ready().close()
        yield found


@pytest.fixture(scope="module", autouse=True)
def _no_proxy():
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("NO_PROXY", "127.0.0.1")
        yield


@pytest.fixture
def client(daemon):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{daemon.port}/v1", api_key=KEY, max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def model(smollm2):
    return smollm2.stem


@pytest.fixture(scope="module")
def expected(daemon):
    """By the daemon's own protocol. The second answer: like all later ones it starts from the cells of the first."""
    with daemon.client() as client:
        list(client.generate(QUESTION, **GREEDY))
        return "".join(event.text for event in client.generate(QUESTION, **GREEDY) if hasattr(event, "tokens"))


def test_chat(client, model, expected):
    found = client.chat.completions.create(model=model, messages=QUESTION, **GREEDY)
    assert found.choices[0].message.content == expected
    assert found.choices[0].finish_reason in ("stop", "length")
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    assert found._request_id.startswith("req_")


def test_a_stream(client, model, expected):
    with client.chat.completions.create(
        model=model, messages=QUESTION, stream=True, stream_options={"include_usage": True}, **GREEDY
    ) as stream:
        *chunks, usage = stream
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert len(chunks) > 5
    assert usage.usage.completion_tokens == 24 or chunks[-1].choices[0].finish_reason == "stop"
    with client.chat.completions.stream(model=model, messages=QUESTION, temperature=0, max_tokens=400, stop=expected[9]) as stream:
        assert stream.get_final_completion().choices[0].message.content == expected[: expected.index(expected[9])]


def test_many_at_once(daemon, model, expected):
    async def work():
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{daemon.port}/v1", api_key=KEY) as client:
            asked = [client.chat.completions.create(model=model, messages=QUESTION, **GREEDY) for _ in range(4)]
            return [found.choices[0].message.content for found in await asyncio.gather(*asked)]

    assert asyncio.run(work()) == [expected] * 4


def test_completion_and_log_probabilities(client, model):
    found = client.completions.create(model=model, prompt="Once upon a time", logprobs=2, **GREEDY).choices[0]
    assert "".join(found.logprobs.tokens).startswith(found.text[:10])
    found = client.chat.completions.create(model=model, messages=QUESTION, logprobs=True, top_logprobs=2, **GREEDY).choices[0]
    for entry in found.logprobs.content:
        assert entry.token == entry.top_logprobs[0].token, "the likeliest, as the temperature is 0"
        assert bytes(entry.bytes).decode(errors="replace") == entry.token


def test_a_schema_binds_the_answer(client, model):
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
    shape = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema, "strict": True}}
    found = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "A number"}], response_format=shape, **GREEDY)
    assert set(json.loads(found.choices[0].message.content)) == {"n"}
    found = client.chat.completions.create(
        model=model, messages=QUESTION, response_format={"type": "json_object"}, temperature=0, max_tokens=8
    )
    assert found.choices[0].message.content.startswith("{")


def test_embeddings_of_close_texts_lie_close(client, daemon, model):
    found = client.embeddings.create(model=model, input=[text for pair in PAIRS for text in pair])  # the client asks for base64
    rows = [one.embedding for one in found.data]
    assert [one.index for one in found.data] == list(range(len(rows)))
    assert (found.model, {len(row) for row in rows}, found.usage.prompt_tokens > 30) == (model, {576}, True)
    assert closest(rows) == [i ^ 1 for i in range(len(rows))], "each text's neighbour is the other one of its pair"
    plain = client.embeddings.create(model=model, input=PAIRS[0][0], encoding_format="float").data[0].embedding
    assert plain == pytest.approx(rows[0], abs=1e-3)
    with daemon.client() as own:
        assert own.embed([PAIRS[0][0]])[0] == pytest.approx(plain, abs=1e-3)
    tokens = client.embeddings.create(model=model, input=[[5, 6, 7], [8]])
    assert (len(tokens.data), tokens.usage.total_tokens) == (2, 4)


def test_errors(client, model):
    chat, embed = client.chat.completions.create, client.embeddings.create
    far = [{"role": "user", "content": "far " * 2000}]
    for kind, code, call in (
        (openai.BadRequestError, "context_length_exceeded", lambda: chat(model=model, messages=far)),
        (openai.BadRequestError, "unsupported_value", lambda: chat(model=model, messages=QUESTION, n=2)),
        (openai.NotFoundError, "model_not_found", lambda: chat(model="gpt-9", messages=QUESTION)),
        (openai.AuthenticationError, "invalid_api_key", lambda: client.with_options(api_key="wrong").models.list()),
        (openai.BadRequestError, "unsupported_value", lambda: embed(model=model, input="x", dimensions=100)),
    ):
        with pytest.raises(kind) as caught:
            call()
        assert caught.value.code == code


def test_closing_a_stream_cancels(client, daemon, model):
    stream = client.completions.create(model=model, **LONG)
    next(stream)
    started = time.monotonic()
    stream.close()
    with daemon.client() as own:
        while own.status()["server"]["requests"]:
            assert time.monotonic() - started < 5
            time.sleep(0.01)
