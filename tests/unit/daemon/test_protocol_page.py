"""docs/protocol.md says all that there is, and nothing else."""

import re
from pathlib import Path

from edge_rt.daemon import protocol
from edge_rt.daemon.config import Limits
from edge_rt.types import PRIORITIES

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")


def rows(heading):
    """First cells of the table under a heading."""
    part = PAGE.split(f"\n{heading}\n", 1)[1]
    table = re.search(r"(?:^\|.*\n)+", part, re.MULTILINE)
    return [line.split("|")[1] for line in table[0].splitlines()[2:]]


def test_operations_and_their_fields():
    assert {re.search(r"`(\w+)`", cell)[1] for cell in rows("## Operations")} == set(protocol.OPS)
    for op, fields in protocol.OPS.items():
        (line,) = (line for line in PAGE.splitlines() if re.match(rf"\| \[?`{op}`", line))
        assert [name for name in fields if f"`{name}`" not in line] == [], op


def test_options():
    assert {name for cell in rows("### generate") for name in re.findall(r"`(\w+)`", cell)} == set(protocol.OPTIONS)


def test_priorities_and_their_shares():
    names, shares = re.search(r"`priority` is (.*): shares of ([\d, and]+) ", PAGE).groups()
    assert {name: float(share) for name, share in zip(re.findall(r"`(\w+)`", names), re.findall(r"\d+", shares), strict=True)} == PRIORITIES


def test_codes():
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "edge_rt" / "daemon").rglob("*.py"))
    said = set(re.findall(r"(?:ProtocolError|WorkerExit|Cancelled)\(\s*\"([a-z_]+)\"", sources))
    codes = said | {code for _, code in protocol.CODES} | {"internal"}
    assert len(codes) > 25
    assert {re.search(r"`(\w+)`", cell)[1] for cell in rows("## Errors")} == codes


def test_limits_are_in_the_daemons_page():
    page = (ROOT / "docs" / "daemon.md").read_text(encoding="utf-8")
    for name, value in Limits()._asdict().items():
        assert re.search(rf"^{name} = {value:.0f}\b", page, re.MULTILINE), name
