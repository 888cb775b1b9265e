"""The life of the daemon: accepting clients, rules, systemd, and the signals that end it."""

import asyncio
import errno
import itertools
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from daemons import Daemon

from edge_rt.daemon import server as door
from edge_rt.daemon.server import RateLimitedAcceptor
from edge_rt.errors import DaemonError
from edge_rt.types import Delta, Done


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


STARS = """
from edge_rt.hooks import PostProcessorFactory, hookimpl
import plugin_nulls

EDGE_RT_API = 1

class Stars:
    counts = {}

    def __init__(self, sign):
        self.sign = sign

    def feed(self, text):
        return self.sign * len(text)

    def flush(self):
        return ""

    def cut(self, following):
        return ""

def compile_rules(rules):
    sign = rules.text("sign", "*")
    return lambda: Stars(sign)

@hookimpl
def edge_rt_post_processors():
    return [PostProcessorFactory("stars", compile_rules, "hides all")]
"""


def test_rules_are_read_again_and_a_mistake_is_in_the_status(folder, random_model):
    (folder / "nulls-1.0.dist-info" / "entry_points.txt").write_text("[edge_rt]\nnulls = plugin_nulls\nstars = plugin_stars\n")
    (folder / "plugin_stars.py").write_text(STARS)
    rules = folder / "r.toml"
    rules.write_text('[stars]\nsign = "x"\n')
    with Daemon(folder, "--rules", str(rules), model=str(random_model())) as daemon:
        client = daemon.ready()

        def signs():
            events = client.generate("a", max_tokens=5, ignore_eos=True)
            return set("".join(event.text for event in events if isinstance(event, Delta)))

        assert signs() == {"x"}
        rules.write_text('[stars]\nsign = "y"\n')
        assert client.call("reload_rules")["changed"]
        assert signs() == {"y"}
        rules.write_text("[stars]\nsign = 3\n")
        with pytest.raises(DaemonError, match="line 2: sign is a whole number; give a text") as caught:
            client.call("reload_rules")
        assert caught.value.code == "rule"
        assert "line 2: sign is a whole number" in client.status()["rules"]["error"]
        assert signs() == {"y"}
        rules.write_text('[stars]\nsign = "z"\n')
        daemon.process.send_signal(signal.SIGHUP)
        until = time.monotonic() + 5
        while signs() != {"z"}:
            assert time.monotonic() < until
            time.sleep(0.02)  # a client may ask 100 times a second
        assert client.status()["rules"]["error"] is None
        rules.write_text('[stars]\nsign = "w"\n')  # also without being told
        while signs() != {"w"}:
            assert time.monotonic() < until
            time.sleep(0.02)


def running(daemon, **options):
    """A client with a request under way, whose events are then collected on a thread."""
    client, got = daemon.client(), []
    events = client.generate("a", ignore_eos=True, **options)
    next(events)

    def collect():
        try:
            got.extend(events)
        except DaemonError as error:
            got.append(error)

    thread = threading.Thread(target=collect)
    thread.start()
    return client, got, thread


def test_requests_under_way_come_to_their_end(folder, random_model):
    with Daemon(folder, model=str(random_model()), delay=0.005) as daemon:
        waiting = daemon.ready()
        client, got, thread = running(daemon, max_tokens=100)
        daemon.process.terminate()
        until = time.monotonic() + 5
        while not waiting.status()["server"]["draining"]:
            assert time.monotonic() < until
        with pytest.raises(DaemonError) as caught:
            list(waiting.generate("b"))
        assert caught.value.code == "draining"
        with pytest.raises(DaemonError):
            daemon.client()
        thread.join(20)
        assert (got[-1].reason, got[-1].usage.completion_tokens) == ("max_tokens", 100)
        assert daemon.process.wait(5) == 0
        assert not daemon.socket.exists()
        for one in (client, waiting):
            one.close()


def test_requests_that_take_too_long_are_cancelled(folder, random_model):
    with Daemon(folder, config="drain_seconds = 0.3\n", model=str(random_model()), delay=0.005) as daemon:
        daemon.ready().close()
        client, got, thread = running(daemon, max_tokens=3000)
        started = time.monotonic()
        daemon.process.send_signal(signal.SIGINT)
        thread.join(20)
        assert isinstance(got[-1], Done)
        assert got[-1].reason == "cancelled"
        assert daemon.process.wait(5) == 0
        assert time.monotonic() - started < 5
        client.close()


def test_a_second_signal_ends_it_at_once(folder, random_model):
    with Daemon(folder, model=str(random_model()), delay=0.005) as daemon:
        daemon.ready().close()
        client, got, thread = running(daemon, max_tokens=3000)
        daemon.process.terminate()
        time.sleep(0.3)
        started = time.monotonic()
        daemon.process.terminate()
        assert daemon.process.wait(10) == 0
        assert time.monotonic() - started < 4
        thread.join(20)
        assert (type(got[-1]), got[-1].code) == (DaemonError, "draining")
        client.close()


def test_systemd_starts_it_and_is_told(folder, random_model):
    told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    told.bind(str(folder / "notify"))
    told.settimeout(20)
    with socket.socket(socket.AF_UNIX) as given, told:
        given.bind(str(folder / "given.sock"))
        given.listen()
        daemon = Daemon(folder, model=str(random_model()), NOTIFY_SOCKET=str(folder / "notify"), WATCHDOG_USEC="200000")
        daemon.socket = Path(folder / "given.sock")
        code = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1')\n"
        code += "from edge_rt.cli.main import main; sys.exit(main(sys.argv[2:]))"
        words = [sys.executable, "-c", code, str(given.fileno()), *daemon.words[3:]]
        daemon.words = words
        with subprocess.Popen(words, env=daemon.environment, pass_fds=[given.fileno()], stderr=subprocess.PIPE) as daemon.process:
            said = set()
            while not {"READY=1", "STATUS=worker ready", "WATCHDOG=1"} <= said:
                said.add(told.recv(1000).decode())
            client = daemon.ready()
            list(client.generate("a", max_tokens=2))
            client.close()
            daemon.process.terminate()
            while "STOPPING=1" not in said:
                said.add(told.recv(1000).decode())
            assert daemon.process.wait(10) == 0
        assert (folder / "given.sock").exists(), "it is systemd's"


def test_the_daemon_itself_loads_no_numpy_and_no_library(folder, random_model):
    with Daemon(folder, model=str(random_model())) as daemon:
        client = daemon.ready()
        list(client.generate("a", max_tokens=2))
        maps = Path(f"/proc/{daemon.process.pid}/maps")
        if not maps.exists():
            pytest.skip("only Linux says what is mapped")
        assert not [line for line in maps.read_text().splitlines() if "numpy" in line or "libllama" in line or "libggml" in line]
        client.close()


def test_without_recording_the_daemon_imports_no_plugins():
    program = (
        "import sys, edge_rt.daemon.server, edge_rt.daemon.http.connection\n"
        "from edge_rt.daemon.server import Server\nfrom edge_rt.daemon.config import default_config\n"
        "assert Server(default_config()).status()['recording'] is None\n"
        "print([name for name in sys.modules if name.startswith(('edge_rt.plugins', 'edge_rt.daemon.recording', "
        "'edge_rt.plugin_host.registry'))])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout == "[]\n"
