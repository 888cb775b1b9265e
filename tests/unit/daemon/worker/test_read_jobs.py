"""Texts to embed: in turns, beside generations, and without leftovers when they end."""

import asyncio
import random
import time
from types import SimpleNamespace

import numpy as np
import pytest
from daemons import Daemon, write_plugin
from readers import Asks

from edge_rt.core.generate import scheduler as batch_module
from edge_rt.core.generate.scheduler import Scheduler
from edge_rt.daemon.client import AsyncClient
from edge_rt.daemon.worker import read_jobs as module
from edge_rt.daemon.worker.read_jobs import ReadJobs
from edge_rt.errors import Cancelled, ContextOverflow, DaemonError, OptionError, OutOfMemory
from edge_rt.testing.null_device import NullEngine

TEXTS = ["ab", "a river", "東京", "x" * 200, "ab"]


@pytest.fixture(scope="module")
def model(shared_null_model):
    return shared_null_model


class Embeds(Asks):
    """Requests for embeddings."""

    def rows(self, name):
        assert [one["index"] for one in self.said[name]] == list(range(len(self.said[name])))
        return np.array([one["embedding"] for one in self.said[name]], np.float32)


@pytest.fixture
def asks(model):
    return Embeds(model, "embed")


@pytest.mark.parametrize("seed", range(6))
def test_everyone_gets_what_they_would_get_alone(model, asks, seed):
    chance = random.Random(seed)
    wanted = {}
    for name in range(chance.randrange(1, 7)):
        texts = ["".join(chance.choices("abc ", k=chance.randrange(1, 150))) for _ in range(chance.randrange(1, 6))]
        wanted[name] = texts, chance.choice(("mean", "cls", "last")), chance.choice((True, False))
        asks.add(name, texts=texts, pooling=wanted[name][1], normalize=wanted[name][2])
        for _ in range(chance.randrange(5)):
            asks.work.step(chance.randrange(1, 64))
    asks.finish(chance.randrange(1, 64))
    for name, (texts, pooling, normalize) in wanted.items():
        np.testing.assert_array_equal(asks.rows(name), model.embed(texts, pooling=pooling, normalize=normalize))
        counts = [len(model.tokenize(text)) for text in texts]
        assert [one["tokens"] for one in asks.said[name]] == counts
        assert asks.ended[name] == {"pooling": pooling, "dimensions": 8, "tokens": sum(counts)}


def test_who_has_no_credits_waits_and_holds_up_nobody(asks):
    asks.add("slow", credits=2, texts=TEXTS)
    asks.add("quick", texts=TEXTS)
    asks.finish()
    assert (len(asks.said["slow"]), len(asks.said["quick"]), list(asks.ended)) == (2, 5, ["quick"])
    asks.asked["slow"].credits = 100
    asks.finish()
    np.testing.assert_array_equal(asks.rows("slow"), asks.rows("quick"))


def test_cancelling_in_the_middle_of_a_text(asks):
    asks.add("long", texts=["x" * 300, "y"])
    asks.add("other", texts=["ab"])
    for _ in range(4):
        asks.work.step(64)
    assert asks.model.memory().cache, "it is being read"
    asks.asked["long"].cancelled = True
    asks.work.step(64)
    assert isinstance(asks.ended["long"], Cancelled)
    asks.finish()
    assert (asks.said["long"], asks.ended["other"]["tokens"]) == ([], 3)


def test_many_texts_are_tokenised_a_few_at_a_time_and_checked_before_any_is_read(asks, monkeypatch):
    monkeypatch.setattr(module, "CHARACTERS_AT_ONCE", 10)
    seen = []
    monkeypatch.setattr(module, "tokens_of", lambda *given, real=module.tokens_of: seen.append(given[2]) or real(*given))
    asks.add("good", texts=["12345"] * 6)
    for done in (2, 4, 6):
        assert asks.work.step(64)
        assert (len(seen), asks.model.memory().cache) == (done, 0)
    asks.add("bad", texts=["a", "b" * 600])
    asks.finish()
    assert isinstance(asks.ended["bad"], ContextOverflow)
    assert (asks.said["bad"], len(asks.said["good"])) == ([], 6)


def test_mistakes_end_a_request_and_no_other(asks, monkeypatch):
    with pytest.raises(OptionError, match="no pooling"):
        asks.add("pooling", texts=["a"], pooling="max")
    asks.add("one", texts=["ab", "a river"])
    asks.add("wide", texts=["ab"], dimensions=9)
    asks.finish()
    assert isinstance(asks.ended["wide"], OptionError)
    assert asks.said["wide"] == []
    hidden, fails = NullEngine.hidden, [True]

    def failing(self, parts):
        if fails.pop() if fails else False:
            raise OutOfMemory("no cells are left")
        return hidden(self, parts)

    monkeypatch.setattr(NullEngine, "hidden", failing)
    asks.add("unlucky", texts=["ab"])
    asks.add("again", texts=["ab"])
    asks.finish()
    assert isinstance(asks.ended["unlucky"], OutOfMemory)
    np.testing.assert_array_equal(asks.rows("again"), asks.rows("one")[:1])


def test_an_engine_that_makes_none(model):
    class Mute:
        info = model.info

    mute = SimpleNamespace(file=model.file, engine=Mute(), prefixes=model.prefixes)
    with pytest.raises(OptionError, match="makes no embeddings"):
        ReadJobs(mute, None, None, None, None).add(None, {"op": "embed", "texts": ["a"]})


def test_those_who_decode_share_the_time_with_those_who_embed(model, monkeypatch):
    """By a clock of the test's own: a token costs as much in either kind of work."""
    now, log = [0.0], []
    monkeypatch.setattr(batch_module.time, "perf_counter", lambda: now[0])

    def costly(kind, real):
        def taken(self, parts):
            tokens = sum(len(part.tokens) for part in parts)
            now[0] += 5.0 + tokens
            log.append((kind, tokens))
            return real(self, parts)

        return taken

    for kind in ("step", "hidden"):
        monkeypatch.setattr(NullEngine, kind, costly(kind, getattr(NullEngine, kind)))
    batch, asks, ended = Scheduler(model.engine, model.lock), Embeds(model, "embed"), []
    with model.session() as session:
        job, steps = session.begin("ab", max_tokens=100, temperature=0, ignore_eos=True)
        batch.add(job, steps, lambda event: True, ended.append)
        asks.add("texts", texts=["x" * 400] * 3)
        while not ended:
            batch.step()
            room, started = batch.room(), now[0]
            before = len(log)
            asks.work.step(room)
            batch.waited(now[0] - started)
            assert [tokens <= room for _, tokens in log[before:]] in ([], [True]), "one piece, not larger than there was room for"
        session.end(job)
    assert ended == [None]
    spent = {kind: sum(5.0 + tokens for what, tokens in log if what == kind) for kind in ("step", "hidden")}
    assert 0.7 * spent["step"] < spent["hidden"] <= spent["step"] + 13.0, "half of the time each, up to the last piece"
    model.prefixes.clear()
    asks.finish()
    assert len(asks.said["texts"]) == 3


@pytest.fixture(scope="module")
def daemon(tmp_path_factory, random_model):
    folder = tmp_path_factory.mktemp("daemon")
    write_plugin(folder)
    with Daemon(folder, config="credits = 8\nlimits.requests_per_second = 0\n", model=str(random_model()), delay=0.001) as found:
        found.ready().close()
        yield found


def quiet(client):
    until = time.monotonic() + 20
    while client.status()["server"]["requests"]:
        assert time.monotonic() < until, client.status()
        time.sleep(0.01)


def test_the_clients(daemon, client):
    before = client.call("metrics")["tokens"].get("embedded_tokens", 0)
    found = client.embed(TEXTS)
    assert [len(row) for row in found] == [8] * 5
    assert found[0] == found[4] != found[1]
    assert client.call("metrics")["tokens"]["embedded_tokens"] == before + sum(len(text.encode()) + 1 for text in TEXTS)
    assert client.embed([[256, 97, 98]]) == found[:1]
    assert client.embed(["ab"], pooling="last", normalize=False, dimensions=3)[0] != found[0][:3]

    async def work():
        async with AsyncClient(str(daemon.socket)) as mine:
            return await asyncio.gather(*(mine.embed(TEXTS) for _ in range(6)))

    assert asyncio.run(work()) == [found] * 6
    for bad in (["a", [1]], [[1], "a"]):
        with pytest.raises(OptionError, match="some texts are given as text"):
            client.embed(bad)
    with pytest.raises(DaemonError) as caught:
        client.embed([])
    assert caught.value.code == "option"
    with pytest.raises(DaemonError) as caught:
        client.embed(["x", "y" * 5000])
    assert (caught.value.code, caught.value.fields) == ("context_overflow", {"needed": 5001, "available": 4096})


def test_a_task_that_is_cancelled_ends_its_request(daemon, client):
    async def work():
        async with AsyncClient(str(daemon.socket)) as mine:
            task = asyncio.create_task(mine.embed(["a river"] * 20000))
            while not client.status()["server"]["requests"]:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert len(await mine.embed(["ab"])) == 1
            quiet(client)

    asyncio.run(work())
