"""Clients are let in a limited number a second, and the others wait in the system's queue."""

import asyncio
import errno
import itertools
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rt.daemon import server as door
from edge_rt.daemon.connection import TokenBucket
from edge_rt.daemon.server import RateLimitedAcceptor


@given(st.floats(0.5, 1000), st.floats(1, 50), st.lists(st.floats(0, 2), max_size=200))
def test_no_more_are_taken_than_come_and_are_there(rate, most, pauses):
    bucket, now, taken = TokenBucket(rate, most, 0.0), 0.0, 0
    for pause in pauses:
        now += pause
        wait = bucket.take(now)
        taken += not wait
        assert taken <= most + rate * now + 1e-6
        if wait:
            assert TokenBucket.take(bucket, now + wait * 1.001) == 0, "after that time there is one"
            taken += 1
            now += wait * 1.001


@given(st.floats(0.5, 1000), st.lists(st.floats(0, 0.01), max_size=300), st.floats(0.1, 2))
def test_what_is_owed_adds_up_to_a_limit(rate, pauses, longest):
    bucket, now = TokenBucket(rate, 1, 0.0), 0.0
    for number, pause in enumerate(pauses):
        now += pause
        wait = bucket.overdraw(now, longest)
        assert 0 <= wait <= longest + 1e-6
        assert wait >= min(longest, number / rate - now) - 1e-6


def test_without_a_rate_there_is_no_limit():
    bucket = TokenBucket(0, 0, 0.0)
    assert [bucket.take(0.0) or bucket.overdraw(0.0, 1.0) for _ in range(1000)] == [0] * 1000


class Client(asyncio.Protocol):
    made: list

    def connection_made(self, transport):
        self.made.append(transport)


@pytest.fixture
def listening(tmp_path):
    with socket.socket(socket.AF_UNIX) as found:
        found.bind(str(tmp_path / "s"))
        found.listen(64)
        found.setblocking(False)
        yield found


def connect(listening, number):
    found = []
    for _ in range(number):
        one = socket.socket(socket.AF_UNIX)
        one.connect(listening.getsockname())
        found.append(one)
    return found


def let_in(listening, number, rate, burst, before=None):
    """Clients that are in as time goes by, which is the loop's and goes as fast as it can."""

    async def run():
        loop, made, now = asyncio.get_running_loop(), [], 0.0
        loop.time = lambda: now
        found = RateLimitedAcceptor(listening, lambda: type("One", (Client,), {"made": made})(), rate, burst)
        clients = connect(listening, number)
        seen = []
        for _ in range(10):
            for _ in range(20):
                await asyncio.sleep(0)
            seen.append(len(made))
            now += 0.1
        found.close()
        more = connect(listening, 1)
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(made) == seen[-1], "a door that is closed lets nobody in"
        for one in (*clients, *more):
            one.close()
        for transport in made:
            transport.abort()
        await asyncio.sleep(0)
        return seen

    return asyncio.run(run())


def test_a_burst_comes_in_at_once_and_the_others_one_after_the_other(listening):
    seen = let_in(listening, 40, rate=50, burst=10)
    assert seen[0] == 10
    assert seen[-1] == 40
    assert all(later - earlier <= 6 for earlier, later in itertools.pairwise(seen))


def test_all_come_in_where_there_is_no_rate(listening):
    assert let_in(listening, 40, rate=0, burst=1)[0] == 40


def test_without_descriptors_it_tries_again(listening, monkeypatch, caplog):
    accept, refused = socket.socket.accept, []

    class Full(socket.socket):
        def accept(self):
            if not refused:
                refused.append(1)
                raise OSError(errno.EMFILE, "Too many open files")
            return accept(self)

    monkeypatch.setattr(door, "EXHAUSTED_PAUSE", 0.25)
    full = Full(listening.family, listening.type, fileno=listening.fileno())
    try:
        seen = let_in(full, 3, rate=0, burst=1)
    finally:
        full.detach()
    assert seen[0] == 0
    assert seen[-1] == 3
    assert "nobody can be let in: Too many open files" in caplog.text


def test_small_answers_do_not_wait_for_acknowledgements():
    async def run(listening):
        loop, made = asyncio.get_running_loop(), []
        found = RateLimitedAcceptor(listening, lambda: type("One", (Client,), {"made": made})(), 0, 1)
        with socket.create_connection(listening.getsockname()):
            while not made:
                await loop.run_in_executor(None, lambda: None)
            told = made[0].get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            made[0].abort()
        found.close()
        await asyncio.sleep(0)
        return told

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.setblocking(False)
        assert asyncio.run(run(listening)) != 0
