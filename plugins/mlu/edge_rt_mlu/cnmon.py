"""Reads what Cambricon's monitor says: the table that ``cnmon`` prints without arguments.

A card takes two lines of it, after a head that names the driver:

    | CNMON v5.10.13                                               Driver v5.10.13 |
    | 0     /   MLU370-X8    v1.1.6 |         0000:39:00.0 | 0%                N/A |
    |  0%   32C        106 W/ 250 W |     0 MiB/ 23374 MiB | N/A           Default |

The columns are those of CNMON 5 and 6 (PaddlePaddle's installation guide for MLU and PaddleNLP's guide for llama on MLU show them).
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Sequence
from typing import NamedTuple

from edge_rt.hooks import Refusal
from edge_rt_mlu.commands import output

PLACES = ("/usr/bin/cnmon", "/usr/local/neuware/bin/cnmon")
"""Where the driver's and the toolkit's packages put it, besides PATH."""
TIMEOUT = 0.8
"""Seconds. With eight cards it answers in a fraction of that; one that hangs in a broken driver is not waited for."""

_DRIVER = re.compile(r"\bDriver\s+v?(\d[\w.\-]*)")
_FIRST = re.compile(r"^\|\s*(\d+)\s+\S+\s+(MLU\S*)\s+v?(\S+)\s*\|\s*([0-9A-Fa-f:.]+)\s*\|")
_SECOND = re.compile(r"^\|\s*\S+\s+(\S+)\s+(\S+)\s*W?\s*/\s*(\S+)\s*W?\s*\|\s*(\d+)\s*MiB\s*/\s*(\d+)\s*MiB\s*\|")


class Card(NamedTuple):
    """A card as ``cnmon`` shows and numbers it; a board of two chips is two. ``used``, ``memory``: bytes. None: it does not say."""

    number: int
    name: str
    firmware: str
    bus: str
    temperature: float | None
    power: float | None
    cap: float | None
    used: int
    memory: int


class Table(NamedTuple):
    """The driver's version, and the cards by their number."""

    driver: str
    cards: dict[int, Card]


def parse(text: str) -> Table:
    """The table in what ``cnmon`` printed; no cards if there is none. Never raises."""
    driver = _DRIVER.search(text)
    lines = [line.strip() for line in text.splitlines()]
    cards = {}
    for line, following in itertools.pairwise(lines):
        first, second = _FIRST.match(line), _SECOND.match(following)
        if first is None or second is None:
            continue
        temperature, power, cap = (_number(second[i]) for i in (1, 2, 3))
        used, memory = (int(second[i]) << 20 for i in (4, 5))
        cards[int(first[1])] = Card(int(first[1]), first[2], first[3], first[4], temperature, power, cap, used, memory)
    return Table(driver[1] if driver else "", cards)


def find(path: str | None = None) -> str | None:
    """The monitor, None if it is not installed. ``path``: folders to look in instead of PATH and the usual places."""
    if path is not None:
        return shutil.which("cnmon", path=path)
    return shutil.which("cnmon") or next((place for place in PLACES if os.access(place, os.X_OK)), None)


def read(command: Sequence[str], timeout: float = TIMEOUT) -> Table | Refusal:
    """Run the monitor and read its table. Never raises, never waits longer than ``timeout`` seconds."""
    try:
        done = output(command, timeout)
    except OSError as error:
        return Refusal(f"cnmon cannot be run: {error.strerror or error}", "install it again with the driver's package")
    if done is None:
        reason = f"cnmon did not answer within {timeout:g} seconds, as it does when the driver hangs"
        return Refusal(reason, "run cnmon by hand; if it hangs too, reload the driver (modprobe -r cambricon-drv) or restart")
    table = parse(done.out)
    if table.cards:
        return table
    said = next((line.strip() for line in (done.out + "\n" + done.err).splitlines() if line.strip(" +-=|")), "")
    what = f"cnmon shows no card (it ended with {done.status}" + (f" and said {said[:120]!r})" if said else ")")
    return Refusal(what, "check with cnmon that the driver is loaded and fits the card, and install the driver anew if not")


def _number(text: str) -> float | None:
    """The number that ``text`` begins with ("32C", "106"); None for "N/A" and the like."""
    found = re.match(r"-?\d+(\.\d+)?", text)
    return float(found[0]) if found else None
