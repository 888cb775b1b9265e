"""The documentation is true: its code runs, its generated parts are current, its links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from edge_rt.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]


def test_the_python_guide_runs_as_written(smollm2, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 7
    (tmp_path / "guide.py").write_text("\n".join(blocks), encoding="utf-8")
    (tmp_path / "model.gguf").symlink_to(smollm2)
    done = subprocess.run([sys.executable, "guide.py"], cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert "llama ggml 2048" in done.stdout
    assert "(3, 49152)" in done.stdout
    assert re.search(r"^[1-9]\d* tokens of the prompt were not computed again$", done.stdout, re.MULTILINE)
    assert re.search(r"^[1-9]\d* tokens are there already$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("arguments", [["generate_cli_doc.py", "--check"], ["check_links.py"]])
def test_pages_are_current_and_links_lead_somewhere(arguments):
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT / "tools", capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_both_readmes_have_the_same_parts():
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))
    for pattern in (r"^#+ ", r"^\| `([^`]*)`", r"\]\(((?!README)[^)]*)\)", r"^> .*"):
        found = [re.findall(pattern, text, re.MULTILINE) for text in (english, chinese)]
        assert found[0] == found[1], pattern
    assert re.findall(r"^\| `edge-rt (\w+)", english, re.MULTILINE) == list(COMMANDS)
