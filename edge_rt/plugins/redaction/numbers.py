"""Which secret a number is: an ID number, a bank card, a phone number, or none.

A number of few check digits counts by how it is written. One that stands by itself, or in the groups in which such numbers are written,
or after a word that calls for one, is a secret; the same digits out of the middle of a row of numbers are not.
"""

from __future__ import annotations

import re

from edge_rt.plugins.redaction.characters import SKIP, significant
from edge_rt.plugins.redaction.checks import Verdict

_SEPARATORS = " -·._()"
_BETWEEN = _SEPARATORS + SKIP
_NO_SIGNS = str.maketrans("", "", "+._")
_GROUP = re.compile("[0-9Xx]+")
_ROW_BEFORE = re.compile(r"[0-9][ \-·._()\u200b]{1,3}\Z")
_DIGIT_BEFORE = re.compile(r"(?:\A|[^0-9]|[0-9](?P<first>[ \-·._()\u200b]{1,3}))[0-9](?P<last>[ \-·._()\u200b]{1,3})\Z")
_INSIDE = re.compile(r"(?:(?<![0-9.])0\.|[0-9][a-fA-F]{1,8})\Z")  # a fraction, a number in base 16
_JOINED = re.compile(r"[A-Za-z0-9][0-9.\-]*\Z")  # it is the end of a longer number, an ISBN or a part number
_DECIMAL = re.compile(r"[0-9]{1,2}\.[0-9]+")
_INTEGER = re.compile(r"[^\s\-*|>()·][^\n]*(?<![0-9.])[0-9]{1,3}\.\Z")  # not where a line begins: there it is the number of an item
_YEARS = re.compile("(?:19|20)[0-9]{2}-(?:19|20)[0-9]{2}")
_SENTENCE_END = re.compile("[\n。]")
_PHONE_WORDS = re.compile(
    "电话|手机|座机|号码|联系|致电|拨打|热线|传真|短信|電話|手機|聯絡|"
    "(?<![a-z])(?:tel(?:ephone)?|(?:cell|mobile)?[ -]?phone|mobile|cell|call|fax|dial|whatsapp|sms|hotline)(?:s|ed|ing)?"
    "(?:[ _-]?(?:number|no))?(?![a-z])",
    re.I,
)
_CARD_WORDS = re.compile(r"卡|账号|帐号|账户|card|visa|master|amex|account|acct|pan\b|unionpay", re.I)
_ID_WORDS = re.compile(r"身份|证件|证号|公民|\bid\b|identity|ID", re.I)
_NEAR = 24
_DIRECTLY, _NEXT = 8, 3

_REGIONS = frozenset((*range(11, 16), *range(21, 24), *range(31, 38), *range(41, 47), *range(50, 55), *range(61, 66), 71, 81, 82, 83))
_ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
_DAYS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_AREA = re.compile("0(?:10|2[0-57-9]|[3-9][0-9]{2})")
_LANDLINE = re.compile("0?(?:10|2[0-9]|[3-9][0-9]{2})[2-8][0-9]{6,7}")
_CHINA = re.compile("(?:00)?86(?=1[3-9][0-9]{9}$|0?[1-9][0-9]{8,10}$)")
_DIALLED = re.compile("0|(?:86)?1[3-9][0-9]{9}$|86|[2-9][0-9]{9}$|1[2-9][0-9]{9}$")  # what may be a number whatever was said before it
_NOT_GIVEN_OUT = re.compile("14[123]|154|16[13489]|179|194")  # beginnings of mobile numbers
_ID_GROUPS = frozenset(((6, 6, 3), (6, 2, 2, 2, 3)))
_CARD_GROUPS = frozenset((
    (4, 4, 4, 4), (4, 6, 5), (4, 6, 4), (6, 13), (6, 10), (8, 8), (4, 4, 4, 4, 3), (4, 4, 4, 4, 2), (4, 4, 4, 4, 1), (4, 4, 4, 3),
    (4, 4, 4, 2), (4, 4, 4, 1), (4, 4, 4), (6, 4, 4, 4), (6, 4, 4, 4, 1), (5, 4, 5, 5), (6, 6, 7),
))  # fmt: skip
_MOBILE_GROUPS = frozenset(((3, 4, 4), (4, 3, 4), (3, 3, 5), (3, 8), (4, 4, 3), (5, 6), (7, 4), (3, 2, 2, 4), (2, 3, 3, 3), (3, 2, 3, 3)))


def luhn(digits: str) -> bool:
    """Is the last digit the check digit of ISO/IEC 7812-1, annex B?"""
    total = 0
    for i, digit in enumerate(reversed(digits)):
        value = int(digit) << (i & 1)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def _date(year: int, month: int, day: int) -> bool:
    if not 1 <= month <= 12 or not 1 <= day <= _DAYS[month - 1]:
        return False
    return (month, day) != (2, 29) or (year % 4 == 0 and (year % 100 != 0 or year % 400 == 0))


def mainland_id(number: str) -> bool:
    """Is it an ID number of GB 11643? 18 digits with a check digit, or the 15 of before 1999; both with a region and a day of birth."""
    if int(number[:2]) not in _REGIONS:
        return False
    if len(number) == 15:  # of a year of whichever century: 2000 has a 29th of February, 1900 has none
        month, day = int(number[8:10]), int(number[10:12])
        return number.isdigit() and any(_date(century + int(number[6:8]), month, day) for century in (1900, 2000))
    if not 1850 <= int(number[6:10]) <= 2100 or not _date(int(number[6:10]), int(number[10:12]), int(number[12:14])):
        return False
    total = sum(weight * int(digit) for weight, digit in zip(_ID_WEIGHTS, number, strict=False))
    return "10X98765432"[total % 11] == number[17].upper()


def issued(digits: str) -> bool:
    """Does a number of 12 digits or more begin, and is it as long, as those that some issuer of cards gives out?"""
    size, two, four = len(digits), int(digits[:2]), int(digits[:4])
    if digits[0] == "4":
        return size in (13, 16, 19)
    if 51 <= two <= 55 or 2221 <= four <= 2720 or 2200 <= four <= 2205:
        return size == 16
    if two in (34, 37):
        return size == 15
    if two in (36, 38, 39) or 3000 <= four <= 3059:
        return size in (14, 16, 19)
    if four in (9558, 6858) or digits[:3] == "103":
        return size in (16, 18, 19)
    return two in (35, 50, 56, 57, 58, 60, 62, 63, 64, 65, 67, 68, 69, 81, 82) and size <= 19 and (two != 62 or size >= 16)


def international(digits: str) -> bool:
    """May a number with its country code be dialled? By libphonenumber's table of lengths: new ranges are given out all the time."""
    if not 7 <= len(digits) <= 15:
        return False
    import phonenumbers

    try:
        parsed = phonenumbers.parse("+" + digits)
    except phonenumbers.NumberParseException:
        return False
    return bool(phonenumbers.is_possible_number(parsed))


def number(found: str, before: str) -> Verdict:
    """A number of 7 digits or more, followed by no digit."""
    return _judged(found, before, False)


def last_number(found: str, before: str) -> Verdict:
    """The same with the separators that follow it, and no digit comes after those."""
    return _judged(found.rstrip(_BETWEEN), before, True)


def one_by_one(found: str, before: str) -> Verdict:
    """Digits read one by one, and the beginning of another number of longer groups, which is not judged here."""
    return _judged(found[: max(map(found.rfind, _SEPARATORS))].rstrip(_BETWEEN), before, True)


def _judged(found: str, before: str, last: bool) -> Verdict:
    digits = significant(found).translate(_NO_SIGNS)
    sign = found[0]
    if sign == "+" and international(digits):
        return ("phone", 0, len(found))
    first = int(sign == "+" or (sign == "(" and ")" not in found))
    kind = _kind(digits, found[first:], before, last)
    return (kind, first, len(found)) if kind is not None else None


def _kind(digits: str, found: str, before: str, last: bool) -> str | None:
    size = len(digits)
    if size == 18 and mainland_id(digits):
        return "id"
    if not digits.isdigit():
        return None
    as_id, as_card = size == 15 and mainland_id(digits), 12 <= size <= 19 and issued(digits) and luhn(digits)
    as_phone = 7 <= size <= 15 and (last or _DIALLED.match(digits) is not None)
    if not (as_id or as_card or as_phone) or _INSIDE.search(before) is not None:
        return None  # soon, for rows of numbers ask this of every part of them
    written = _Written(digits, found, before, last)
    alone = written.alone and not {"(", ")"} & set(written.text)
    if as_id and (written.plain or alone or written.groups in _ID_GROUPS or written.after(_ID_WORDS)):
        return "id"
    if as_card and (written.plain or alone or written.groups in _CARD_GROUPS or written.after(_CARD_WORDS)):
        return "card"
    return "phone" if as_phone and _phone(written) else None


class _Written:
    """How a number is written: its digits, their groups, and whether that is how a list of numbers is written.

    ``alone``: it is no part of a longer row of numbers. ``last``: no digit follows, even after separators.
    """

    __slots__ = ("alone", "before", "digits", "groups", "plain", "text")

    def __init__(self, digits: str, found: str, before: str, last: bool) -> None:
        self.text, self.before, self.digits = found.replace(SKIP, ""), before, digits
        self.groups = tuple(map(len, _GROUP.findall(self.text)))
        if set(self.groups) == {1}:  # one read digit by digit is no part of a row of longer ones, or of one with other separators
            row = _DIGIT_BEFORE.search(before)
            gaps = {gap.replace(SKIP, "") for gap in row.group("first", "last") if gap is not None} if row is not None else {""}
            in_row = len(gaps) == 1 and gaps <= {*_GROUP.split(self.text)[1:-1]}
        else:
            in_row = _ROW_BEFORE.search(before) is not None
        self.alone = last and "." not in self.text and not in_row
        self.plain = len(self.groups) == 1 or not set(" .()") & set(self.text)

    def after(self, words: re.Pattern[str], within: int = _NEAR) -> bool:
        """Is one of the words in the sentence before, and ends it so many characters before at most?"""
        sentence = _SENTENCE_END.split(self.before)[-1][-_NEAR:]
        return any(len(sentence) - match.end() <= within for match in words.finditer(sentence))

    def called_phone(self, within: int = _NEAR) -> bool:
        """Is a word as phone before it, and it is no part of a longer number?"""
        joined = _JOINED.search(self.before)
        return self.after(_PHONE_WORDS, within if joined is None else min(within, len(self.before) - joined.start() - 1))


def _phone(written: _Written) -> bool:
    """Is it a phone number without a plus: of the mainland, or as it is written in the United States or in Britain?"""
    national = _CHINA.sub("", written.digits, count=1)
    coded = len(national) < len(written.digits)
    groups = _last_groups(written.groups, len(national))
    if _DECIMAL.fullmatch(written.text) is not None:
        return False
    if len(national) == 11 and national[0] == "1" and national[1] in "3456789":
        if _NOT_GIVEN_OUT.match(national) is not None and _INTEGER.search(written.before) is not None:
            return False  # decimals
        if groups in _MOBILE_GROUPS or len(groups) == 1 or (coded and set(groups) == {1}):
            return True
        return "." not in written.text and (written.plain or written.alone or written.called_phone())
    if written.text[:2] == "00" and len(written.digits) >= 10 and international(written.digits[2:]):
        return True
    if 10 <= len(national) <= 12 and _AREA.match(national if national[0] == "0" else f"0{national}" if coded else "") is not None:
        told = coded and (len(groups) > 1 or _LANDLINE.fullmatch(national) is not None)
        return told or written.called_phone() or (groups[0] in (3, 4) and sum(groups[1:]) in (7, 8))
    return _abroad(written.digits, groups, written) or _local(written)


def _last_groups(groups: tuple[int, ...], size: int) -> tuple[int, ...]:
    """The groups of the last digits."""
    kept: list[int] = []
    for group in reversed(groups):
        if sum(kept) < size:
            kept.append(min(group, size - sum(kept)))
    return tuple(reversed(kept))


def _abroad(digits: str, groups: tuple[int, ...], written: _Written) -> bool:
    """A number of the United States (415-555-2671) or Britain (020 7946 0958), or a service number of China (400-123-4567)."""
    if groups in ((3, 3, 4), (3, 4, 3)) and digits[:3] in ("400", "800"):
        return True
    if len(digits) == 10 and digits[0] in "23456789" and digits[3] in "23456789":
        return groups == (3, 3, 4) or written.called_phone(_DIRECTLY)
    if len(digits) in (10, 11) and digits[0] == "0" and digits[1] in "1237":
        return (len(groups) in (2, 3) and 3 <= groups[0] <= 5) or written.called_phone()
    return len(digits) == 11 and digits[0] == "1" and groups == (1, 3, 3, 4)


def _local(written: _Written) -> bool:
    """A number without an area code, right after a word that calls for one; but no day and no round sum."""
    digits = written.digits
    day = len(digits) == 8 and 1900 <= int(digits[:4]) <= 2100 and _date(int(digits[:4]), int(digits[4:6]), int(digits[6:]))
    said = not day and not digits.endswith("00000")
    near = _NEXT if _YEARS.fullmatch(written.text) is not None else _DIRECTLY
    return said and len(digits) <= 12 and digits[0] != "0" and written.alone and written.called_phone(near)
