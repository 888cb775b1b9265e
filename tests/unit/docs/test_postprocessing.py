"""docs/postprocessing.md is true: its rules do to its text what it shows."""

import re
from pathlib import Path

import pytest

from edge_rt.cli import main as cli

PAGE = (Path(__file__).parents[3] / "docs" / "postprocessing.md").read_text(encoding="utf-8")


@pytest.fixture
def call(tmp_path, monkeypatch, capfdbinary):
    (rules,) = re.findall(r"^```toml\n(pipeline.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "rules.toml").write_text(rules, encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    def run(line):
        status = cli.main(line.split()[1:])
        out, err = capfdbinary.readouterr()
        return status, out.decode(), err.decode()

    return run


def test_the_first_example(call):
    (text, command, shown), *_ = re.findall(r"^\$ cat talk\.txt\n(.*?)^\$ (.*?)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    Path("talk.txt").write_text(text, encoding="utf-8")
    assert call(command) == (0, shown, "")


def test_the_mistake(call):
    ((command, shown),) = re.findall(r"^\$ (edge-rt rules check rules\.toml)\n(error.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    rules = Path("rules.toml").read_text(encoding="utf-8")
    Path("rules.toml").write_text(rules.replace("max_length", "max_lenght"), encoding="utf-8")
    assert call(command) == (1, "", shown)


def test_the_python_without_a_model():
    (code,) = re.findall(r"^```python\n(from edge_rt\.plugin_host\.registry.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    names = {}
    exec(code, names)
    assert names["shown"] == "Call [PHONE] now."
