"""The command line as a whole: which command, which status, what is written where."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edge_rt import __version__
from edge_rt.cli import main as cli
from edge_rt.cli.output import OutputClosed
from edge_rt.errors import Cancelled, ModelFileError, NativeError


@pytest.fixture
def command(monkeypatch):
    """``command(function)``: make `edge-rt models` call it instead."""

    def replace(function):
        monkeypatch.setattr("edge_rt.cli.models.ModelsCommand.run", function)

    return replace


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"edge-rt {__version__}\n"


@pytest.mark.parametrize("words", [["--help"], ["-h"]])
def test_help_lists_every_command(words, capsys):
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", shown, re.MULTILINE) for name in cli.COMMANDS)


def test_no_command_shows_help_and_a_wrong_one_is_wrong_usage(capsys):
    assert cli.main([]) == 2
    assert "Commands:" in "".join(capsys.readouterr())
    for words, message in (
        (["chatt"], "Error: No such command 'chatt'. Did you mean 'chat'?"),
        (["sing"], "Error: No such command 'sing'."),
        (["--sing"], "Error: No such option: --sing"),
    ):
        assert cli.main(words) == 2
        assert capsys.readouterr().err.splitlines() == [f"Usage: {cli.USAGE}", "Try 'edge-rt -h' for help.", "", message]


def test_a_status_of_a_command_is_the_programs(command):
    command(lambda options: 7)
    assert cli.main(["models"]) == 7


def test_what_the_user_can_mend_is_one_line(command, capsys):
    def fail(options):
        raise ModelFileError("there is no file x; check the path")

    command(fail)
    assert cli.main(["models"]) == 1
    assert capsys.readouterr() == ("", "error: there is no file x; check the path\n")


def test_values_out_of_range_are_refused_before_anything_happens(capsys):
    assert cli.main(["run", "-m", "/nowhere.gguf", "-n", "0", "hi"]) == 1
    assert capsys.readouterr().err == "error: --max-tokens takes a number of at least 1 and not 0\n"


@pytest.mark.parametrize("error", [NativeError("ggml said no"), ZeroDivisionError("oops"), AssertionError()])
def test_a_bug_writes_a_report_without_what_the_user_typed(command, capsys, error):
    def fail(options):
        raise error

    command(fail)
    assert cli.main(["models", "--json", "--json"]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    report = Path(re.search(r"A report is in (.*)\n", err)[1])
    text = report.read_text()
    assert type(error).__name__ in text
    assert "Traceback" in text
    assert f"edge-rt: {__version__}" in text
    assert "llama-cpp-python: " in text
    assert "command: models" in text


def test_a_report_holds_no_prompt(monkeypatch, capsys):
    def fail(options):
        raise RuntimeError

    monkeypatch.setattr("edge_rt.cli.run.RunCommand.run", fail)
    assert cli.main(["run", "my secret prompt"]) == 3
    report = Path(re.search(r"A report is in (.*)\n", capsys.readouterr().err)[1])
    assert "secret" not in report.read_text()


def test_a_report_that_cannot_be_written_is_shown(command, capsys, monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("EDGE_RT_CACHE", str(blocked))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(blocked))
    command(lambda options: 1 / 0)
    assert cli.main(["models"]) == 3
    err = capsys.readouterr().err
    assert "No report could be written" in err
    assert "ZeroDivisionError: division by zero" in err


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (Cancelled("the caller asked"), 130), (OutputClosed(), 141)])
def test_being_stopped_is_quiet(command, capsys, error, status):
    def stop(options):
        raise error

    command(stop)
    assert cli.main(["models"]) == status
    assert capsys.readouterr() == ("", "")


def test_the_interrupt_handler_is_back_while_a_command_runs(command):
    seen = []
    before = signal.getsignal(signal.SIGINT)
    command(lambda options: seen.append(signal.getsignal(signal.SIGINT)) or 0)
    assert cli.main(["models"]) == 0
    assert seen == [before]


def test_ctrl_c_during_the_imports_is_quiet(tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(
        "import os, signal, sys, types\n"
        "from edge_rt.cli import main as cli\n"
        "def import_module(name):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    for _ in range(10**6): pass\n"
        "cli.import_module = import_module\n"
        "sys.exit(cli.main(['models']))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_plugins_add_commands(monkeypatch, capsys):
    import typer

    from edge_rt.hooks import API_VERSION, hookimpl
    from edge_rt.plugin_host import registry

    class Good:
        EDGE_RT_API = API_VERSION

        @hookimpl
        def edge_rt_cli_commands(self, app: typer.Typer) -> None:
            @app.command("greet")
            def greet(name: str) -> None:
                """Greet."""
                print(f"Hello, {name}!")
                raise typer.Exit(5)

    class Bad:
        EDGE_RT_API = API_VERSION

        @hookimpl
        def edge_rt_cli_commands(self, app: typer.Typer) -> None:
            raise RuntimeError("broken")

    made = registry.Registry.load(entry_points=False, plugins={"good": Good(), "bad": Bad()})
    monkeypatch.setattr(registry.Registry, "load", lambda **_: made)
    assert cli.main(["greet", "you"]) == 5
    assert capsys.readouterr().out == "Hello, you!\n"
    assert cli.main(["--help"]) == 0
    assert "greet" in capsys.readouterr().out


def test_a_plain_line_imports_nothing_slow():
    """The time from process start to opening the model counts: what is imported before it stays small."""
    script = (
        "import sys, types\n"
        "runtime = types.ModuleType('edge_rt.model')\n"
        "def open(*args, **options):\n"
        "    print(*sorted(sys.modules))\n"
        "    raise KeyboardInterrupt\n"
        "runtime.open = open\n"
        "sys.modules['edge_rt.model'] = runtime\n"
        "from edge_rt.cli.main import main\n"
        f"sys.exit(main(['run', '-m', {__file__!r}, '-n', '5', '--temp=0', 'hi']))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 130, done.stderr
    loaded = set(done.stdout.split())
    slow = {"typer", "click", "rich", "numpy", "asyncio", "psutil", "jinja2", "llama_cpp", "gguf", "logging", "json", "urllib.request",
            "ssl", "hashlib", "subprocess", "importlib.metadata", "pluggy", "ctypes", "email"}  # fmt: skip
    assert loaded & slow == set()


def test_a_log_level_that_is_none(monkeypatch, capsys):
    monkeypatch.setenv("EDGE_RT_LOG", "loud")
    assert cli.main(["models"]) == 1
    assert capsys.readouterr().err == "error: EDGE_RT_LOG takes debug, info, warning or error and not 'loud'\n"
