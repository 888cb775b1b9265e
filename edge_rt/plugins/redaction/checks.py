"""Whether what a pattern found is a secret: check digits, dates and how it is written. For numbers see numbers.py.

Every check is given what was found and what stands before it, both as they are seen, and returns the kind of secret and its part of what
was found, or None.
"""

from __future__ import annotations

import re
from itertools import pairwise

from edge_rt.plugins.redaction.characters import SKIP, significant

Verdict = tuple[str, int, int] | None


def iban(found: str, before: str) -> Verdict:
    """An account number of ISO 13616: the remainder by 97 is 1."""
    code = significant(found)
    value = int("".join(str(int(char, 36)) for char in code[4:] + code[:4]))
    return ("iban", 0, len(found)) if 15 <= len(code) <= 34 and value % 97 == 1 else None


_IN_MIDST = re.compile(r"[0-9]\.\Z")
_IN_MIDST_APART = re.compile(r"[0-9] ?\. ?\Z")
_OCTETS = re.compile("[0-9]+")
_VERSION = re.compile(r"(?:(?:version|(?<![A-Za-z])ver\.?|版本号?|release|section|§|第)[ :]?|(?<![A-Za-z])v)\Z", re.I)


def ip(found: str, before: str) -> Verdict:
    """An address of IPv4 or IPv6, and no version or time."""
    import ipaddress

    kept = found.rstrip(" ." + SKIP)
    text = kept.replace(SKIP, "")
    if not any(char.isdigit() for char in text):
        return None
    midst = _IN_MIDST_APART if " " in text else _IN_MIDST  # what stands apart may be the number of an item in a list
    if ":" not in text and (midst.search(before) is not None or len(set(_OCTETS.split(text)) - {""}) > 1):
        return None
    text = text.replace(" ", "")
    if _VERSION.search(before.replace(SKIP, "")) is not None:
        return None
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if address.version == 6 and text != "::1" and len(text) < 5:
        return None
    return ("ip", 0, len(kept))


_COMMON_DOMAINS = re.compile(
    "com|net|org|edu|gov|mil|int|info|biz|cn|hk|tw|mo|jp|kr|sg|us|uk|ca|au|de|fr|it|es|nl|ru|br|eu|ch|at|be|se|no|fi|pl|cz|in"
    "|io|ai|co|me|cc|tv|dev|app|xyz|top|site|online|shop|vip|club"
)
_NO_WORDS = frozenset(("com", "org", "edu", "gov", "cn", "hk", "jp", "kr", "uk", "eu", "fr", "de"))
"""Of those, which begin no sentence and end none."""
_SPELT = re.compile(r"[\[(](?:at|dot)[\])]", re.I)
_DOT = re.compile("[.。｡]")


def email(found: str, before: str) -> Verdict:
    """An address with a domain of two names or more. If there are blanks in it, the last must be a well-known one, and if that is a word
    as well (It, me), the blanks must be on both sides of @ and dot, as no sentence has them.
    """
    first, last = len(found) - len(found.lstrip("'-.+%" + SKIP)), len(found.rstrip("-'" + SKIP))
    text = _SPELT.sub(".", found[first:last].replace(SKIP, ""))
    domain = _DOT.split(text)[-1].strip().lower()
    if len(domain) < 2 or not (domain.isalpha() or domain.startswith("xn--")) or text[0] in "@. ":
        return None
    return ("email", first, last) if " " not in text or _apart(text, domain) else None


_BLANK_ON_ONE_SIDE = re.compile(r"(?<! )[@.] | [@.](?! )")


def _apart(text: str, domain: str) -> bool:
    """Is a text with blanks an address, or the end of a sentence and the beginning of the next?"""
    if domain in _NO_WORDS:
        return True
    return _COMMON_DOMAINS.fullmatch(domain) is not None and _BLANK_ON_ONE_SIDE.search(text) is None and not text.endswith(domain.title())


_WORDS = re.compile(r"[a-z]*(?:[_-][a-z]{1,12}){2,}[_-]?")


def api_key(found: str, before: str) -> Verdict:
    """The beginning of a key; small letters with dashes between are words (``sk-learn-like-estimators``)."""
    text = found.replace(SKIP, "")
    return None if _WORDS.fullmatch(text) is not None else ("api_key", 0, len(found))


_HEX = re.compile("[0-9a-fA-F]+")
_COMMON_PAIRS = (  # of letters in English, most common first; a pair is in the text if and only if it is one
    "th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le ve co me de hi ri ro ic ne ea ra ce "
    "li ch ll be ma si om ur ca el ta la ns di fo ho pe ec pr no ct us ac ot il tr ly nc et ut ss so rs un lo wa ge ie wh ee wi em "
    "ad ol rt po we na ul ni ts mo ow pa im mi ai sh ir su id os iv ia am fi ci vi pl ig tu ev ld ry mp fe bl ab gh ty op wo sa ay "
    "ex ke fr oo av ag if ap gr od bo sp rd do uc bu ei ov rm ep tt oc"
)
_WORD = re.compile("[A-Za-z]?[a-z]{3,}")


def token(found: str, before: str) -> Verdict:
    """A long run of letters and digits that looks drawn by lot: not a word, a path or an identifier. Of a path, one part may be."""
    at = begin = 0
    parts = found.split("/")
    for part in parts:
        text = part.replace(SKIP, "")
        if _random(text):  # base64 has slashes of its own: what is around it and no word belongs to it
            return ("token", at, at + len(part)) if _HEX.fullmatch(text) is not None else ("token", begin, len(found))
        at += len(part) + 1
        if not text or _WORD.fullmatch(text) is not None:
            begin = at
    words = any(_WORD.fullmatch(part) for part in parts)
    return ("token", 0, len(found)) if len(parts) > 1 and not words and _random(found.replace(SKIP, "")) else None


def _random(text: str) -> bool:
    """Is a text of letters and digits drawn by lot? In words most pairs of letters are common ones; of all pairs these are a fifth."""
    size, digits = len(text), sum(char.isdigit() for char in text)
    if _HEX.fullmatch(text) is not None:
        return size >= 32 and size // 5 <= digits < size and len(set(text.lower())) >= 8
    signs = sum(not char.isalnum() for char in text)
    if size < 24 or len(set(text)) < 10 or signs > size // 6:
        return False
    pairs = [a + b for a, b in pairwise(text.lower()) if a.isalpha() and b.isalpha()]
    common = sum(pair in _COMMON_PAIRS for pair in pairs)
    if text.lower() == text or text.upper() == text:
        return digits > 1 and signs == 0 and common < 0.6 * len(pairs)
    changes = sum(_case(a) != _case(b) for a, b in pairwise(text)) / size
    return common < (0.6 if digits > 1 else 0.45) * len(pairs) and changes >= 0.2


def _case(char: str) -> int:
    return 0 if char.isdigit() else 1 if char.isupper() else 2


_EXPRESSION = re.compile(
    r"none|null|true|false|str(?:ing)?\b|int\b|bool|bytes|any\b|optional|required|empty|undefined|nil\b|\*+|x{3,}|\.{2,}"
    r"|(?:os|self|process|request|config|settings|args|options|env)\b|get|is\b|the\b|must|should|was\b|has\b|your[_-]?|example|placeholder|changeme|[a-z_.]+[\[(]",
    re.I,
)
_SAID = re.compile(r"(?:is|was) +[\"'*_`“”]*\Z")


def password(found: str, before: str) -> Verdict:
    """What follows a word as password and a colon, unless it is a type, an expression or the word of a sentence."""
    kept = found[:-1] if found[-1] in ".,;:)]}>" else found
    text = kept.replace(SKIP, "")
    call = _EXPRESSION.match(text)
    if len(text) < 3 or text[0] in "<{$(%[*" or (call is not None and (call[0][-1] in "[(" or not any(char.isdigit() for char in text))):
        return None
    return None if _SAID.search(before) is not None and _WORD.fullmatch(text) else ("password", 0, len(kept))


def secret(found: str, before: str) -> Verdict:
    """The same after a word as token or secret, which is often an ordinary one: letters and digits, eight or more."""
    verdict = password(found, before)
    text = found[: verdict[2]] if verdict is not None else ""
    drawn = len(text) >= 8 and any(char.isdigit() for char in text) and any(char.isalpha() for char in text)
    return verdict if drawn else None


def credentials(found: str, before: str) -> Verdict:
    """The password in a URL, which ends with the @ after it."""
    return ("password", 0, len(found) - 1)


_DAY_OR_TIME = re.compile(r"[0-9]{4}([\-./])[0-9]{1,2}\1\Z|[0-9]{1,2}/[0-9]{1,2}/\Z|[0-9]:(?:[0-9]{2}:)?\Z")


def trimmed(found: str, before: str) -> Verdict:
    """An address without the blank or full stop after it. Its number is not the end of a date or a time."""
    if _DAY_OR_TIME.search(before) is not None:
        return None
    return ("address", 0, len(found.rstrip(" ." + SKIP)))
