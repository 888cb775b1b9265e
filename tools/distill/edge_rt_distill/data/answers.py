"""An answer that is to be checked, and how texts are compared: case and width aside, words as whole words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Answer(NamedTuple):
    text: str
    ended: bool
    """Whether the model ended its turn by itself; else it was cut off."""


class Kind(NamedTuple):
    """A kind of check. ``needs`` and ``may``: argument -> what it must be, of ``checks._TYPES``. ``one_of``: one of these must be given."""

    apply: Callable[[Answer, Mapping[str, Any]], float]
    needs: Mapping[str, str]
    may: Mapping[str, str]
    one_of: tuple[str, ...] = ()


def plain(text: str) -> str:
    """``text`` without differences of case and width (NFKC)."""
    return unicodedata.normalize("NFKC", text).casefold()


def place(text: str, part: str) -> int | None:
    """Where ``part`` first stands in ``text``, case and width aside; one that begins or ends in a Latin letter or digit as a whole word."""
    part = plain(part)
    before = r"(?<![a-z0-9])" if re.match(r"[a-z0-9]", part) else ""
    after = r"(?![a-z0-9])" if re.search(r"[a-z0-9]\Z", part) else ""
    found = re.search(before + re.escape(part) + after, plain(text))
    return None if found is None else found.start()


def has(text: str, part: str) -> bool:
    """Whether ``part`` stands in ``text`` (``place``)."""
    return place(text, part) is not None
