"""The device on docs/plugins.md, tried as written: its tests pass, with the files of the card and without."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs" / "plugins.md"


def test_the_device_on_the_page_passes_the_tests_on_the_page(tmp_path: Path) -> None:
    codes = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (device,), (tests,) = ([code for code in codes if word in code] for word in ("class Npu:", "class TestNpu("))
    (tmp_path / "test_npu.py").write_text(device + "\n\n" + tests, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_npu.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "14 passed, 6 skipped" in done.stdout, "without the card there is nothing to say of it"
