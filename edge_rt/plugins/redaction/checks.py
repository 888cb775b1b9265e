"""Whether what a pattern found is a secret: check digits, dates, number plans and how it is written.

Every check is given what was found and what stands before it, and returns the kind of secret and its part of what was found, or None.
"""

from __future__ import annotations

import re

from edge_rt.plugins.redaction.characters import significant

Verdict = tuple[str, int, int] | None

_REGIONS = frozenset("11 12 13 14 15 21 22 23 31 32 33 34 35 36 37 41 42 43 44 45 46 50 51 52 53 54 61 62 63 64 65 71 81 82 83".split())
_ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
_DAYS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_BETWEEN = " -·._()\u200b"
_NO_SIGNS = str.maketrans("", "", "+._")
_SEPARATED = re.compile(r"[0-9Xx]+")
_BEFORE_RUN = re.compile(r"[0-9][ \-·._()\u200b]{1,3}$")
_BEFORE_DIGIT = re.compile(r"(?:^|[^0-9])[0-9][ \-·._()\u200b]{1,3}$")
_INSIDE = re.compile(r"(?:[0-9][A-Za-z]+|[0-9]\.|[a-z]{2,}[A-Z]+|[A-Za-z]+[-_][A-Za-z]+[-_])$")
_PHONE_WORDS = re.compile(
    r"电话|手机|座机|号码|联系|致电|拨打|热线|传真|短信|电聯|電話|手機|tel|phone|mobile|cell|call|fax|dial|whatsapp|sms|contact|text me|reach|hotline|ring",
    re.I,
)
_CARD_WORDS = re.compile(r"卡|账号|帐号|账户|card|visa|master|amex|account|acct|pan\b|unionpay", re.I)
_ID_WORDS = re.compile(r"身份|证件|证号|公民|\bid\b|identity|ID", re.I)
_AREA = re.compile(r"0(?:10|2[0-57-9]|[3-9][0-9]{2})")
_PREFIX_86 = re.compile(r"^(?:00)?86(?=1[3-9][0-9]{9}$|0?[1-9][0-9]{8,10}$)")

_CARD_SHAPES = frozenset(((4, 4, 4, 4), (4, 6, 5), (4, 6, 4), (6, 13), (6, 10), (8, 8), (4, 4, 4, 4, 3), (4, 4, 4, 4, 2), (4, 4, 4, 4, 1),
                          (4, 4, 4, 3), (4, 4, 4, 1), (4, 4, 4, 2), (4, 4, 4), (6, 4, 4, 4), (6, 4, 4, 4, 1), (5, 4, 5, 5), (6, 6, 7)))  # fmt: skip
_MOBILE_SHAPES = frozenset(((3, 4, 4), (4, 3, 4), (3, 3, 5), (3, 8), (4, 4, 3), (5, 6), (7, 4), (3, 2, 2, 4), (2, 3, 3, 3), (3, 2, 3, 3)))


def luhn(digits: str) -> bool:
    """The check digit of ISO/IEC 7812-1, annex B."""
    total = 0
    for i, digit in enumerate(reversed(digits)):
        value = int(digit) << (i & 1)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def _date(year: int, month: str, day: str) -> bool:
    if not 1 <= int(month) <= 12 or not 1 <= int(day) <= _DAYS[int(month) - 1]:
        return False
    return (month, day) != ("02", "29") or (year % 4 == 0 and (year % 100 != 0 or year % 400 == 0))


def mainland_id(number: str) -> bool:
    """An ID number of GB 11643: 18 digits with a check digit, or the 15 of before 1999; both with a region and a day of birth."""
    if number[:2] not in _REGIONS:
        return False
    if len(number) == 15:
        return number.isdigit() and _date(1900 + int(number[6:8]), number[8:10], number[10:12])
    if len(number) != 18 or not 1850 <= int(number[6:10]) <= 2100 or not _date(int(number[6:10]), number[10:12], number[12:14]):
        return False
    total = sum(weight * int(digit) for weight, digit in zip(_ID_WEIGHTS, number, strict=False))
    return "10X98765432"[total % 11] == number[17].upper()


def issued(digits: str) -> bool:
    """Does a number begin and is it as long as those some issuer of cards gives out?"""
    n, two, four = len(digits), int(digits[:2]), int(digits[:4])
    if digits[0] == "4":
        return n in (13, 16, 19)
    if 51 <= two <= 55 or 2221 <= four <= 2720 or 2200 <= four <= 2205:
        return n == 16
    if two in (34, 37):
        return n == 15
    if two in (36, 38, 39) or 300 <= four // 10 <= 305:
        return n in (14, 16, 19)
    if four == 9558 or four == 6858 or digits[:3] == "103":
        return n in (16, 18, 19)
    return two in (35, 50, 56, 57, 58, 60, 62, 63, 64, 65, 67, 68, 69, 81, 82) and 12 <= n <= 19 and (two != 62 or n >= 16)


class _Written:
    """How a number is written: groups of digits and what is between them."""

    __slots__ = ("alone", "before", "clear", "shape", "single", "text")

    def __init__(self, found: str, before: str, last: bool) -> None:
        self.text, self.before = found.replace("\u200b", ""), before
        self.shape = tuple(map(len, _SEPARATED.findall(self.text)))
        self.single = len(self.shape) == 1
        self.alone = last and _BEFORE_RUN.search(before) is None and "." not in self.text
        if last and set(self.shape) == {1}:  # digit by digit, up to the end of such a run
            self.alone = _BEFORE_DIGIT.search(before) is None
        # Separators that no list of numbers has.
        self.clear = self.single or (" " not in self.text and "." not in self.text)

    def named(self, words: re.Pattern[str]) -> bool:
        """Is one of the words in the line before?"""
        return words.search(self.before.rpartition("\n")[2][-24:]) is not None


def number(found: str, before: str) -> Verdict:
    """A number of 7 digits or more, followed by no digit."""
    return _number(found, before, False)


def last_number(found: str, before: str) -> Verdict:
    """The same with the separators that follow it, and no digit comes after those."""
    return _number(found.rstrip(_BETWEEN), before, True)


def _number(found: str, before: str, last: bool) -> Verdict:
    kind = _kind(significant(found).translate(_NO_SIGNS), found, before, last)
    return (kind, 0, len(found)) if kind is not None else None


def _kind(digits: str, found: str, before: str, last: bool) -> str | None:
    size = len(digits)
    if found[0] == "+":
        return "phone" if international(digits) else _kind(digits, found[1:], before, last)
    if size < 7 or (before and _INSIDE.search(before) is not None):
        return None
    written = _Written(found, before, last)
    if size in (15, 18) and mainland_id(digits) and (size == 18 or written.single or written.alone or written.named(_ID_WORDS)):
        return "id"
    if size == 17 or not digits.isdigit():
        return None
    if 12 <= size <= 19 and issued(digits) and luhn(digits) and _card_like(written):
        return "card"
    return "phone" if size <= 15 and _phone_like(digits, written) else None


def _card_like(written: _Written) -> bool:
    return written.clear or written.shape in _CARD_SHAPES or written.alone or written.named(_CARD_WORDS)


def _phone_like(digits: str, written: _Written) -> bool:
    """A number without a plus: of the mainland, or as they are written in the United States and Britain."""
    national = _PREFIX_86.sub("", digits)
    prefixed = len(national) < len(digits)
    shape = written.shape
    if prefixed and not written.single and shape[0] in (2, 4):
        shape = shape[1:]
    if len(national) == 11 and national[0] == "1" and national[1] in "3456789":
        if "." in written.text:
            return shape in _MOBILE_SHAPES
        return written.clear or shape in _MOBILE_SHAPES or written.alone or written.named(_PHONE_WORDS)
    if digits[:2] == "00" and len(digits) >= 10 and international(digits[2:]):
        return True
    named = written.named(_PHONE_WORDS)
    area = _AREA.match(national) or (_AREA.match("0" + national) if prefixed else None)
    if area is not None and 10 <= len(national) <= 12:
        parts = "".join(written.text.split("(", 1)[0].split()) == "" or len(shape) > 1
        return named or prefixed or (parts and shape[0] in (3, 4) and sum(shape[1:]) in (7, 8))
    if shape == (3, 3, 4) and digits[0] in "23456789" and digits[3] != "1" or shape in ((3, 3, 4), (3, 4, 3)) and digits[:3] in ("400", "800"):
        return True
    if digits[0] == "0" and digits[1] in "1237" and len(digits) in (10, 11) and (len(shape) in (2, 3) and 3 <= shape[0] <= 5 or named):
        return True
    if size_named(digits, named, written):
        return True
    return False


def size_named(digits: str, named: bool, written: _Written) -> bool:
    """A local number: after a word that says so, directly."""
    return named and 7 <= len(digits) <= 12 and written.alone and digits[0] != "0" and _near(written.before) and not _is_date(digits)


def _near(before: str) -> bool:
    """Ends the text before with a word that calls for a number, and at most a few characters?"""
    last = None
    for last in _PHONE_WORDS.finditer(before[-24:]):
        pass
    return last is not None and len(before[-24:]) - last.end() <= 8


def _is_date(digits: str) -> bool:
    return len(digits) == 8 and 1900 <= int(digits[:4]) <= 2100 and _date(int(digits[:4]), digits[4:6], digits[6:])


def international(digits: str) -> bool:
    """May a number with its country code be dialled? By the tables of libphonenumber; lengths decide, as new ranges are given out."""
    if not 7 <= len(digits) <= 15:
        return False
    import phonenumbers

    try:
        parsed = phonenumbers.parse("+" + digits)
    except phonenumbers.NumberParseException:
        return False
    return bool(phonenumbers.is_possible_number(parsed))


def iban(found: str, before: str) -> Verdict:
    """ISO 13616: the remainder by 97 is 1."""
    code = significant(found).upper()
    if not 15 <= len(code) <= 34:
        return None
    value = int("".join(str(int(char, 36)) for char in code[4:] + code[:4]))
    return ("iban", 0, len(found)) if value % 97 == 1 else None


def ip(found: str, before: str) -> Verdict:
    """An address of IPv4 or IPv6, and no version or time."""
    import ipaddress

    text = found.replace("\u200b", "").rstrip(".")
    if re.search(r"(?:version|ver\.?|版本号?|release|v|section|§|第)[ :：]?$", before, re.I):
        return None
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if address.version == 6 and (text.count(":") < 2 or not any(char.isdigit() for char in text) or len(text) < 5 and text != "::1"):
        return None
    return ("ip", 0, len(found.rstrip(".\u200b")))


def token(found: str, before: str) -> Verdict:
    """A long run of letters and digits that looks drawn by lot: not a word, a path or an identifier."""
    text = found.replace("\u200b", "")
    digits = sum(char.isdigit() for char in text)
    if re.fullmatch(r"[0-9a-fA-F]+", text):
        random = len(text) >= 32 and digits >= len(text) // 5 and len(set(text.lower())) >= 8 and digits < len(text)
        return ("token", 0, len(found)) if random else None
    kinds = ["d" if char.isdigit() else "u" if char.isupper() else "l" if char.islower() else "o" for char in text]
    changes = sum(a != b for a, b in zip(kinds, kinds[1:], strict=False))
    mixed = {"d", "u", "l"} <= set(kinds)
    random = mixed and digits >= 2 and changes >= 0.38 * len(text) and len(set(text)) >= 14 and kinds.count("o") <= len(text) // 8
    return ("token", 0, len(found)) if random else None


_EXPRESSION = re.compile(r"(?i)none|null|true|false|str(ing)?|int|bool|bytes|any|optional|required|empty|undefined|nil|text|\*+|x{3,}|\.{2,}|os\.|self\."
                         r"|process\.|env\b|get|is\b|the\b|must|should|was|has|your[_-]?|example|placeholder|changeme|request\.|config\.|settings\.")  # fmt: skip


def password(found: str, before: str) -> Verdict:
    """What follows a word as password and a colon, unless it is a type, an expression or the word of a sentence."""
    text = found.replace("\u200b", "")
    kept = text.rstrip(".,;:!?)]}>'\"")
    if len(kept) < 3 or text[0] in "<{$(%[*" or "(" in text or _EXPRESSION.match(text) and not any(char.isdigit() for char in text):
        return None
    if re.search(r"[a-z] $|[是为] ?$", before) and kept.isalpha():
        return None
    return ("password", 0, len(found) - (len(text) - len(kept)))


_COMMON_DOMAINS = frozenset("com net org edu gov mil int info biz cn hk tw mo jp kr sg us uk ca au de fr it es nl ru br eu ch at be se no fi pl cz in"
                            " io ai co me cc tv dev app xyz top site online shop vip club".split())  # fmt: skip


def email(found: str, before: str) -> Verdict:
    """An address with a domain of two names or more; if there are blanks in it, the last must be a well-known one."""
    text = re.sub(r"[\[(](?:at|dot)[\])]", ".", found.replace("\u200b", ""), flags=re.I).rstrip("-'")
    last = re.split(r"[.。｡]", text)[-1].strip().lower()
    if len(last) < 2 or not (last.isalpha() or last.startswith("xn--")):
        return None
    if " " in text and last not in _COMMON_DOMAINS:
        return None
    return ("email", 0, len(found.rstrip("-'\u200b")))


def credentials(found: str, before: str) -> Verdict:
    """The password in a URL, which ends with the @ after it."""
    return ("password", 0, len(found) - 1)
