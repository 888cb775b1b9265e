"""The patterns of the secrets that are built in."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from edge_rt.plugins.redaction import checks, numbers
from edge_rt.plugins.redaction.places import ADDRESSES, ANYWHERE, from_the_name
from edge_rt.plugins.redaction.scanner import Check, Pattern

KINDS = ("id", "card", "iban", "phone", "email", "ip", "mac", "api_key", "token", "password", "address", "name")
"""What secrets there are, the more telling first: it names a match that is two."""


class Source(NamedTuple):
    """A pattern, its expression, and the kinds of secrets it finds."""

    regex: str
    pattern: Pattern
    flags: int
    finds: tuple[str, ...]


def _source(kind: str, regex: str, check: Check | None = None, flags: int = 0, **more: Any) -> Source:
    finds = ("id", "card", "phone") if kind == "number" else (kind,)
    return Source(regex, Pattern(kind, check, **more), flags, finds)


_PASSED_OVER = "\u00ad\u0300-\u036f\u200b-\u200f\u2060-\u2064\ufe00-\ufe0f\ufeff"


def _rest(more: str) -> re.Pattern[str]:
    """Letters, digits and some characters more, their wide forms, and what is passed over."""
    wide = "".join(chr(ord(char) + 0xFEE0) for char in more if "!" <= char <= "~")
    return re.compile(f"[A-Za-z0-9{re.escape(more)}Ａ-Ｚａ-ｚ０-９{re.escape(wide)}{_PASSED_OVER}]*")


_TOKEN_REST, _DOTTED_REST, _PEM_REST = _rest("_-+/="), _rest("_-+/=."), _rest("+/=\r\n\\")
_VALUE_REST = re.compile(f"[!#-&(-_a-~！-～{_PASSED_OVER}]*")

_VALUE_ENDS: dict[str, Any] = {"run_rest": _VALUE_REST, "sure": True, "stop": re.compile(r"(?<=[!-~])[，；]|\]\(")}

_SEPARATOR = r"[ \-·._()]{0,3}"
_APART = r"[ \-·._()]{1,3}"
_NUMBER = rf"(?<![0-9])[+(]?[0-9](?:{_SEPARATOR}[0-9]){{6,21}}"


def _number(separator: str, most: int, end: str) -> str:
    """7 digits or more and what comes after. That is written out for each length: else a longer number, which the check refuses, and a
    shorter one within it would share it, and only the longer be found.
    """
    more, tail = f"{separator}[0-9]", end
    for _ in range(most - 7):
        tail = f"(?:{end}|{more}{tail})"
    return f"(?<![0-9])[+(]?[0-9](?:{more}){{6}}{tail}"


_LETTER = "A-Za-z0-9À-ÖØ-öø-ɏͰ-ϿЀ-ԯ"
_LABEL = rf"[{_LETTER}][{_LETTER}\-]*"
_SPELT_AT, _SPELT_DOT = r" ?[\[(](?:at|AT)[\])] ?", r" ?[\[(](?:dot|DOT)[\])] ?"
_EMAIL = (
    rf"(?<![{_LETTER}_.%+\-'])[{_LETTER}_.%+\-'](?P<run>[{_LETTER}_.%+\-']*)(?: {{1,2}}\. {{1,2}}[{_LETTER}_%+\-]+)?"
    rf"(?: {{0,2}}@ {{0,2}}|{_SPELT_AT}){_LABEL}(?: {{0,2}}[.。｡] {{0,2}}|{_SPELT_DOT}){_LABEL}"
    rf"(?:(?:\.| {{1,2}}\. {{1,2}}|{_SPELT_DOT}){_LABEL}){{0,2}}(?![{_LETTER}\-])"
)

_WORD = r"[A-Za-z0-9_\-]"
_KEYS = (
    r"(?:sk|pk|rk)_(?:live|test)_[A-Za-z0-9]{10}",
    r"gh[pousr]_[A-Za-z0-9]{16}",
    r"github_pat_[A-Za-z0-9_]{16}",
    r"(?:AKIA|ASIA|LTAI|AKID)[A-Za-z0-9]{12}",
    rf"AIza{_WORD}{{20}}",
    rf"xox[abeprs]-{_WORD}{{10}}",
)
_LIKE_WORDS = rf"(?:sk-(?:proj-|ant-|or-)?|glpat-|gsk_|hf_|npm_|dop_v1_|tvly-|shpat_|ya29\.|SG\.|pypi-){_WORD}{{16}}"

_QUOTES = "[\"'*_`“”「『]{0,3}"
_VALUE = "[!#-&(-_a-~]"
_SECRET = f"(?P<secret>{_VALUE}{{3}}(?P<run>{_VALUE}*)(?!{_VALUE}))"
_IS = rf"{_QUOTES} ?(?:[:=]|:=|=>| is| was) {{0,2}}{_QUOTES} ?"
_PASSWORD = (
    r"(?<![A-Za-z])(?:passwords?|passwd|pwd|passphrase|passcode|pin code|client[_ \-]?secret"
    r"|(?:secret|access|api|private|account|auth|encryption|signing)[_ \-]?(?:access[_ \-]?)?(?:key|token|secret)(?:[_ \-]?id)?)"
)
_CHINESE_PASSWORD = rf"(?:密码|口令|密钥|秘钥|私钥|令牌|密碼|金鑰|验证码|驗證碼|激活码){_QUOTES} ?[:=是为為] {{0,2}}{_QUOTES} ?"

_HEX = "[0-9A-Fa-f]"

SOURCES: tuple[Source, ...] = (
    _source("number", rf"(?<![0-9])[0-9](?:{_SEPARATOR}[0-9]){{16}}{_SEPARATOR}[Xx](?![0-9])", numbers.number),
    _source("number", rf"{_NUMBER}(?![0-9])", numbers.number),
    _source("number", _number(_SEPARATOR, 22, rf"{_SEPARATOR}(?![0-9 \-·._()])"), numbers.last_number),
    _source("number", _number(_APART, 19, f"{_APART}[0-9]{{2}}"), numbers.one_by_one),
    _source("iban", r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}(?:[ \-]?[A-Z0-9]){11,30}(?![A-Za-z0-9])", checks.iban),
    _source("email", _EMAIL, checks.email),
    _source("ip", r"(?<![0-9])[0-9]{1,3}(?: ?\. ?[0-9]{1,3}){3} ?\.{0,6}(?![0-9.])", checks.ip),
    _source("ip", rf"(?<![0-9A-Za-z])(?:{_HEX}{{1,4}}|:)(?::{_HEX}{{0,4}}){{2,7}}(?![0-9A-Za-z])", checks.ip),
    _source("mac", rf"(?<![0-9A-Za-z]){_HEX}{{2}}(?:[:\-]{_HEX}{{2}}){{5}}(?![0-9A-Za-z])"),
    *(_source("api_key", f"(?<![A-Za-z0-9]){regex}", rest=_TOKEN_REST) for regex in _KEYS),
    _source("api_key", f"(?<![A-Za-z0-9]){_LIKE_WORDS}", checks.api_key, rest=_TOKEN_REST),
    _source("api_key", rf"(?<![A-Za-z0-9])eyJ{_WORD}{{10}}", rest=_DOTTED_REST),
    _source("api_key", r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----", rest=_PEM_REST),
    _source("api_key", rf"(?i:bearer|authorization: ?basic) {{1,2}}(?P<secret>{_WORD}{{16}})", rest=_DOTTED_REST, sure=True),
    _source("token", r"(?<![A-Za-z0-9+/_\-])[A-Za-z0-9+/_\-]{24}(?P<run>[A-Za-z0-9+/_\-]*)={0,8}(?![A-Za-z0-9+/=_\-])", checks.token,
            run_rest=_TOKEN_REST),
    _source("password", _PASSWORD + _IS + _SECRET, checks.password, re.I, **_VALUE_ENDS),
    _source("password", _CHINESE_PASSWORD + _SECRET, checks.password, **_VALUE_ENDS),
    _source("password", r"(?<![A-Za-z])(?:secret|token|credential)s?" + _IS + _SECRET, checks.secret, re.I, **_VALUE_ENDS),
    _source("password", r"://[^/\s:@]{1,40}:(?P<secret>[^\s@/]{3,64}@)", checks.credentials, sure=True),
    *(_source("address", regex, checks.trimmed) for regex in ADDRESSES),
)  # fmt: skip
"""Every built-in pattern. A mainland ID number, a card and a phone number are told apart by the check of numbers."""
ANY_ADDRESS = _source("address", ANYWHERE, from_the_name)
"""Used if the rules ask for it."""
