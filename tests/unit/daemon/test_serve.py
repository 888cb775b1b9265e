"""`edge-rt serve` around the daemon: configuration, --check, rules, systemd, and how it ends."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from daemons import Daemon

from edge_rt.cli import main as cli
from edge_rt.cli import serve
from edge_rt.cli.options import parse
from edge_rt.daemon import config as configuration
from edge_rt.daemon.address import Address
from edge_rt.errors import DaemonError, OptionError, RuleError
from edge_rt.types import Delta, Done

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


# ---- configuration ---------------------------------------------------------------------------------------------------


def test_a_configuration(tmp_path):
    (tmp_path / "m.gguf").write_text("")
    (tmp_path / "key").write_text("0123456789abcdef")
    (tmp_path / "key").chmod(0o600)
    (tmp_path / "d.toml").write_text(
        'listen = ["/run/x.sock", "tcp:127.0.0.1:80"]\nusers = ["root", "1000"]\nkey_file = "key"\nrules = "r.toml"\ncredits = 8\n'
        'hung_after = 5\n[model]\nfile = "m.gguf"\ncontext = 512\npack = false\n[limits]\nconnections = 3\nhello_seconds = 0\n'
    )
    found = configuration.read_config(tmp_path / "d.toml")
    assert found.listen == (Address("unix", "/run/x.sock"), Address("tcp", "127.0.0.1", 80))
    assert (found.users, found.key, found.rules) == ({0, 1000}, "0123456789abcdef", str(tmp_path / "r.toml"))
    assert (found.model, found.model_options) == (str(tmp_path / "m.gguf"), {"context": 512, "pack": False})
    assert (found.credits, found.hung_after, found.limits.connections, found.limits.hello_seconds) == (8, 5.0, 3, 0.0)
    (tmp_path / "d.toml").write_text("")
    assert configuration.read_config(tmp_path / "d.toml") == configuration.default_config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("credit = 3", r"d\.toml, line 1: the file has no rule credit; did you mean credits\?"),
        ("\ncredits = 0", r"line 2: credits is 0; give 1 to 4096"),
        ("[limits]\n\nconnections = '3'", "line 3: connections is a text; give a whole number"),
        ("listen = ['x', 'tcp:0.0.0.0:1']", "line 1: 'tcp:0.0.0.0:1' is no address"),
        ("users = ['nobody-at-all']", "line 1: there is no user nobody-at-all"),
        ("key_file = 'open'", "line 1: others may read the key"),
        ("key_file = 'short'", "line 1: the key has fewer than 16 characters"),
        ("listen = [", "line 1: it is not TOML"),
        ("\nmemory = 'lots'", "line 2: memory takes a size as 500M or 1.5G and not 'lots'"),
        ("[models.'a b']\nfile = 'x'", "line 1: 'a b' is no name for a model"),
        ("[models.a]\ncontext = 3", "models.a has no file; give a text"),
        ("[models.a]\nfile = 'x'\ncontex = 3", "line 3: models.a has no rule contex; did you mean context"),
    ],
)
def test_configurations_that_are_wrong(tmp_path, text, message):
    (tmp_path / "open").write_text("0" * 16)
    (tmp_path / "open").chmod(0o644)
    (tmp_path / "short").write_text("0" * 15)
    (tmp_path / "short").chmod(0o600)
    (tmp_path / "d.toml").write_text(text)
    with pytest.raises(RuleError, match=message):
        configuration.read_config(tmp_path / "d.toml")
    with pytest.raises(OptionError, match="cannot be read: no such file"):
        configuration.read_config(tmp_path / "none.toml")


FILE_OPTIONS = {"context": 512, "threads": 3, "memory": 1 << 20, "key_type": "q8_0", "engine": "e", "device": "d", "policy": "slide",
                "embedder": "m", "pack": False}  # fmt: skip


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {}),
        (["--key-type", "f16"], {"key_type": "f16"}),
        (["--pack"], {"pack": True}),
        (["--no-pack"], {}),
        (["-c", "64", "-t", "1", "--memory", "2M"], {"context": 64, "threads": 1, "memory": 2 << 20}),
        (["--engine", "null", "--device", "cpu", "--policy", "graded", "--embedder", "x"],
         {"engine": "null", "device": "cpu", "policy": "graded", "embedder": "x"}),
    ],
)  # fmt: skip
def test_options_of_the_command_line_come_before_the_file(tmp_path, words, expected):
    values = {name: f'"{value}"' if isinstance(value, str) else str(value).lower() for name, value in FILE_OPTIONS.items()}
    lines = [f"{name} = {value}" for name, value in values.items()]
    (tmp_path / "d.toml").write_text(
        "\n".join(['listen = ["a"]', 'rules = "a.toml"', "[model]", 'file = "a"', *lines, "[http]", 'listen = ["h"]'])
    )
    options = parse("serve", serve.ServeCommand, ["--config", str(tmp_path / "d.toml"), *words])
    assert serve.configured(options).model_options == FILE_OPTIONS | expected
    more = ["-m", "b", "--listen", "/b", "--http", "/i", "--rules", "/b.toml"]
    found = serve.configured(parse("serve", serve.ServeCommand, ["--config", str(tmp_path / "d.toml"), *words, *more]))
    assert (found.model, found.rules, found.model_options) == ("b", "/b.toml", FILE_OPTIONS | expected)
    assert (found.listen, found.http.listen) == ((Address("unix", "/b"),), (Address("unix", "/i"),))


def test_check_says_what_would_happen(tmp_path, random_model, capsys):
    words = ["serve", "--listen", str(tmp_path / "run" / "d.sock"), "--check"]
    assert cli.main(words) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[:-1] == [
        f"would listen at unix:{tmp_path}/run/d.sock",
        "would let in root" + (", you" if os.getuid() else ""),
        "would wait for a client to load a model",
    ]
    assert re.fullmatch(r"would let models have [\d,.]+ [MG]B together", said[-1])
    assert list(tmp_path.iterdir()) == []
    assert cli.main([*words, "-m", str(random_model())]) == 0
    assert f"would open {random_model()}, architecture llama, which needs about 10" in capsys.readouterr().err
    config = tmp_path / "d.toml"
    config.write_text(f'memory = "1.5G"\n[models.small]\nfile = "{random_model()}"\ncontext = 99\n')
    assert cli.main([*words, "--config", str(config)]) == 0
    *_, model, budget = capsys.readouterr().err.splitlines()
    assert model.startswith(f"would know small: {random_model()}, architecture llama, which needs about ")
    assert budget == "would let models have 1.6 GB together"
    same = f'[model]\nfile = "{random_model()}"\n[models.{random_model().stem}]\nfile = "{random_model()}"\n'
    config.write_text(same)
    assert cli.main([*words, "--config", str(config)]) == 1
    assert f"two models are called {random_model().stem}" in capsys.readouterr().err
    config.write_text(f'memory = "50M"\n[models.small]\nfile = "{random_model()}"\n')
    assert cli.main([*words, "--config", str(config)]) == 1
    assert "and all models may have 52.4 MB; raise memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-m", "nowhere.gguf"], "there is no file nowhere.gguf"),
        (["--listen", "tcp:0.0.0.0:8"], "'tcp:0.0.0.0:8' is no address"),
        (["--listen", "tcp:127.0.0.1:0"], "a TCP port is open to every user of this machine; set key_file"),
        (["--rules", "none.toml"], "none.toml: cannot be read"),
        (["--config", "none.toml"], "the configuration none.toml cannot be read"),
        (["--pack", "--no-pack"], "--pack and --no-pack contradict each other; give one of them"),
        (["--memory", "much"], "--memory takes a size"),
        (["--listen", "a", "--listen", "a"], "a is given twice; name another address, or leave one out"),
    ],
)
def test_check_says_what_is_wrong(tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["serve", "--check", *(["--listen", str(tmp_path / "d.sock")] if "--listen" not in words else []), *words]) == 1
    assert message in capsys.readouterr().err


def test_a_model_that_is_not_there_ends_it(tmp_path):
    daemon = Daemon(tmp_path, "-m", "nowhere.gguf")
    done = subprocess.run(daemon.words, env=daemon.environment, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: there is no file nowhere.gguf;")
    assert not daemon.socket.exists()


def test_two_daemons_do_not_share_an_address(tmp_path):
    with Daemon(tmp_path) as first:
        second = subprocess.run(first.words, env=first.environment, capture_output=True, text=True, timeout=30, check=False)
        assert second.returncode == 1
        assert "another daemon listens at" in second.stderr
        assert first.client().status()["worker"]["state"] == "none"


def test_verbose_says_what_becomes_of_the_worker(folder, random_model):
    with Daemon(folder, "-v", model=str(random_model())) as daemon:
        said = [daemon.said, daemon.line(), daemon.line()]
        assert sorted(said)[:2] == [b"INFO edge_rt.daemon: worker ready\n", b"INFO edge_rt.daemon: worker starting\n"]


# ---- rules -----------------------------------------------------------------------------------------------------------


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


def test_rules_that_are_wrong_are_told_who_asks(folder, random_model):
    (folder / "r.toml").write_text("[moons]\n")
    with Daemon(folder, "--rules", str(folder / "r.toml"), model=str(random_model())) as daemon, daemon.client() as client:
        with pytest.raises(DaemonError, match="line 1: there is no post-processor moons") as caught:
            list(client.generate("a"))
        assert caught.value.code == "rule"
        assert "moons" in client.status()["worker"]["reason"]


# ---- the end ---------------------------------------------------------------------------------------------------------


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


# ---- systemd ---------------------------------------------------------------------------------------------------------


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
