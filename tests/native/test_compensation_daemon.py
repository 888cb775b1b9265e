"""Compensation in the daemon: its configuration, what it needs, what it says of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from worker_host import Host

from edge_rt.cli import main, serve
from edge_rt.cli.options import parse
from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.daemon import config as configuration
from edge_rt.daemon.models import estimate_memory
from edge_rt.daemon.supervisor import WorkerSpec
from edge_rt.testing.random_models import write_random_compensation, write_random_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = write_random_model(tmp_path / "m.gguf", "llama")
    with ModelFile.open(path) as file:
        write_random_compensation(tmp_path / "m.compensation.gguf", file)
    return path


@pytest.mark.parametrize(
    ("line", "words", "expected"),
    [
        ("", [], None),
        ('compensation = "off"', [], "off"),
        ('compensation = "auto"', [], "auto"),
        ('compensation = "side.gguf"', [], "{folder}/side.gguf"),
        ('compensation = "/side.gguf"', [], "/side.gguf"),
        ('compensation = "side.gguf"', ["--compensation", "off"], "off"),
        ("", ["--compensation", "/other.gguf"], "/other.gguf"),
    ],
)
def test_where_the_configuration_says_it_is(line: str, words: list[str], expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "d.toml").write_text(f'listen = ["a"]\n[model]\nfile = "m"\n{line}\n')
    options = parse("serve", serve.ServeCommand, ["--config", str(tmp_path / "d.toml"), *words])
    found = serve.configured(options).model_options.get("compensation")
    assert found == (None if expected is None else expected.format(folder=tmp_path))
    assert configuration.read_config(tmp_path / "d.toml").model == "m"


def test_its_bytes_are_foreseen(model: Path) -> None:
    plain = estimate_memory(WorkerSpec(str(model), {"compensation": "off"}))
    side = model.with_name("m.compensation.gguf")
    assert estimate_memory(WorkerSpec(str(model), {})).weights == plain.weights + side.stat().st_size
    assert estimate_memory(WorkerSpec(str(model), {"compensation": str(side)})).weights == plain.weights + side.stat().st_size
    assert estimate_memory(WorkerSpec(str(model), {"compensation": "/nowhere.gguf"})) == plain


def test_a_check_finds_what_is_wrong_with_it(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["serve", "--check", "--listen", str(tmp_path / "d.sock"), "-m", str(model)]
    assert main.main(words) == 0
    assert f"would apply its compensation {model.with_name('m.compensation.gguf')}" in capsys.readouterr().err
    assert main.main([*words, "--compensation", "off"]) == 0
    assert "compensation" not in capsys.readouterr().err
    model.with_name("m.compensation.gguf").write_bytes(b"GGUF")
    assert main.main(words) == 1
    assert "run without it by --compensation off" in capsys.readouterr().err


def test_the_worker_says_what_it_opened_with(model: Path) -> None:
    with_it, without = (Host(model, threads=1, **options) for options in ({}, {"compensation": "off"}))
    found: Any = with_it.said[0][-1]["ok"]["compensation"]
    assert (found["sites"], found["low_rank"], found["tables"], found["biases"]) == (14, 14, 14, 14)
    assert without.said[0][-1]["ok"]["compensation"] is None
    texts = []
    for host in (with_it, without):
        number = host.ask("once upon a time", max_tokens=12)
        host.until(number)
        texts.append(host.text(number))
        host.worker._opened.close()
    assert texts[0] != texts[1]
