"""`edge-rt serve`: --check, options that override the file, and errors before the daemon starts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edge_rt.cli import main as cli
from edge_rt.cli import serve
from edge_rt.cli.options import parse
from edge_rt.core.gguf.reader import read_header
from edge_rt.daemon.address import Address
from edge_rt.daemon.config import RecordConfig
from edge_rt.testing.random_models import write_random_adapter

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


def test_check_of_http(tmp_path, capsys):
    words = ["serve", "--check", "--listen", str(tmp_path / "d.sock"), "--config", str(tmp_path / "c.toml")]
    (tmp_path / "c.toml").write_text("[http]\n")
    assert cli.main(words) == 1
    assert "HTTP on a TCP port is open to every process of this machine; give a path, or set key_file, or open" in capsys.readouterr().err
    port = 0
    (tmp_path / "c.toml").write_text("[http]\nopen = true\n")
    assert cli.main([*words, "--http", f"tcp:127.0.0.1:{port}", "--http", str(tmp_path / "h.sock")]) == 0
    said = capsys.readouterr().err
    assert f"would listen at http at tcp:127.0.0.1:{port}\nwould listen at http at unix:{tmp_path}/h.sock\n" in said


def test_without_h11(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["serve", "--check", "--listen", str(tmp_path / "d.sock"), "--http", str(tmp_path / "h.sock")]) == 1
    assert "HTTP needs the package h11; pip install 'edge-rt[http]'" in capsys.readouterr().err


def test_check_of_adapters(tmp_path, random_model, capsys):
    whole = random_model().read_bytes()
    law = write_random_adapter(tmp_path / "law.gguf", read_header(whole, len(whole)))

    def check(adapter: Path) -> int:
        (tmp_path / "daemon.toml").write_text(f"[model]\nfile = {str(random_model())!r}\nadapters = {{ law = {str(adapter)!r} }}\n")
        return cli.main(["serve", "--config", str(tmp_path / "daemon.toml"), "--listen", str(tmp_path / "s"), "--check"])

    assert check(law) == 0
    assert f"would offer its adapter law, {law}" in capsys.readouterr().err
    raw = random_model("qwen2").read_bytes()
    for wrong, said in (
        (tmp_path / "none.gguf", "does not exist"),
        (random_model(), "is no adapter"),
        (write_random_adapter(tmp_path / "q.gguf", read_header(raw, len(raw))), "is for qwen2 models"),
    ):
        assert check(wrong) == 1
        assert said in capsys.readouterr().err


def test_the_command_line_names_the_file_and_keeps_the_other_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert serve.configured(parse("serve", serve.ServeCommand, ["--record", "t"])).record == RecordConfig(tmp_path / "t")
    (tmp_path / "d.toml").write_text("[record]\nfile = 'x'\nsample = 0.5\n")
    found = serve.configured(parse("serve", serve.ServeCommand, ["--config", "d.toml", "--record", "t"]))
    assert found.record == RecordConfig(tmp_path / "t", 0.5)


def test_check_says_what_would_be_recorded_and_leaves_nothing(tmp_path, capsys):
    (tmp_path / "d.toml").write_text("[record]\nfile = 't.jsonl'\nsample = 0.25\n")
    words = ["serve", "--listen", str(tmp_path / "s"), "--config", str(tmp_path / "d.toml"), "--check"]
    assert cli.main(words) == 0
    said = capsys.readouterr().err
    assert f"would record 25 % of the requests without their answers in {tmp_path / 't.jsonl'}" in said
    assert "would redact what is recorded: redaction by the usual rules, version " in said
    assert not (tmp_path / "t.jsonl").exists()
    (tmp_path / "t.jsonl").write_text("notes")
    (tmp_path / "t.jsonl").chmod(0o600)
    assert cli.main(words) == 1
    assert "is something else than recorded traffic" in capsys.readouterr().err


def test_a_daemon_that_cannot_record_does_not_start_and_leaves_no_socket(tmp_path):
    (tmp_path / "r.toml").write_text("[punctuation]\n")
    (tmp_path / "d.toml").write_text("[record]\nfile = 't.jsonl'\nrules = 'r.toml'\n")
    words = [sys.executable, "-m", "edge_rt.cli.main", "serve", "--listen", tmp_path / "s", "--config", tmp_path / "d.toml"]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, "has no rules that conceal anything" in ended.stderr) == (1, True)
    assert not (tmp_path / "s").exists()
    assert not (tmp_path / "t.jsonl").exists()
