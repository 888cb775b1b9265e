"""The secrets that are built in: their patterns, and whether what a pattern found is one."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any, NamedTuple

from edge_rt.plugins.redaction.automaton import SKIP, significant
from edge_rt.plugins.redaction.scanner import Check, Pattern

# Which secret a number is: an ID number, a bank card, a phone number, or none.
#
# A number of few check digits counts by how it is written. One that stands by itself, or in the groups in which such numbers are written,
# or after a word that calls for one, is a secret; the same digits out of the middle of a row of numbers are not.

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


# Whether what a pattern found is a secret: check digits, dates and how it is written. For numbers see numbers.py.
#
# Every check is given what was found and what stands before it, both as they are seen, and returns the kind of secret and its part of what
# was found, or None.

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


# Addresses of common form: of the mainland, from the largest part to the smallest, and of streets in English.
#
# A Chinese address is found by what it begins with: a province, a city, or a word that calls for one (地址, 家住, 寄到 ...).
# To find it by any district or road means to hold back several characters of every sentence, and is asked for by a rule.

_PROVINCES = (
    "北京 天津 上海 重庆 河北 山西 辽宁 吉林 黑龙江 江苏 浙江 安徽 福建 江西 山东 河南 湖北 湖南 广东 海南 四川 贵州 云南 陕西 "
    "甘肃 青海 台湾 内蒙古 广西 西藏 宁夏 新疆 香港 澳门"
)
_CITIES = (
    "石家庄 唐山 秦皇岛 邯郸 邢台 保定 张家口 承德 沧州 廊坊 衡水 太原 大同 阳泉 长治 晋城 朔州 晋中 运城 忻州 临汾 吕梁 呼和浩特 "
    "包头 乌海 赤峰 通辽 鄂尔多斯 呼伦贝尔 巴彦淖尔 乌兰察布 沈阳 大连 鞍山 抚顺 本溪 丹东 锦州 营口 阜新 辽阳 盘锦 铁岭 朝阳 "
    "葫芦岛 长春 四平 辽源 通化 白山 松原 白城 延边 哈尔滨 齐齐哈尔 鸡西 鹤岗 双鸭山 大庆 伊春 佳木斯 七台河 牡丹江 黑河 绥化 "
    "南京 无锡 徐州 常州 苏州 南通 连云港 淮安 盐城 扬州 镇江 泰州 宿迁 杭州 宁波 温州 嘉兴 湖州 绍兴 金华 衢州 舟山 台州 丽水 "
    "合肥 芜湖 蚌埠 淮南 马鞍山 淮北 铜陵 安庆 黄山 滁州 阜阳 宿州 六安 亳州 池州 宣城 福州 厦门 莆田 三明 泉州 漳州 南平 龙岩 "
    "宁德 南昌 景德镇 萍乡 九江 新余 鹰潭 赣州 吉安 宜春 抚州 上饶 济南 青岛 淄博 枣庄 东营 烟台 潍坊 济宁 泰安 威海 日照 临沂 "
    "德州 聊城 滨州 菏泽 郑州 开封 洛阳 平顶山 安阳 鹤壁 新乡 焦作 濮阳 许昌 漯河 三门峡 南阳 商丘 信阳 周口 驻马店 济源 武汉 "
    "黄石 十堰 宜昌 襄阳 鄂州 荆门 孝感 荆州 黄冈 咸宁 随州 恩施 仙桃 潜江 天门 长沙 株洲 湘潭 衡阳 邵阳 岳阳 常德 张家界 益阳 "
    "郴州 永州 怀化 娄底 湘西 广州 韶关 深圳 珠海 汕头 佛山 江门 湛江 茂名 肇庆 惠州 梅州 汕尾 河源 阳江 清远 东莞 中山 潮州 揭阳 "
    "云浮 南宁 柳州 桂林 梧州 北海 防城港 钦州 贵港 玉林 百色 贺州 河池 来宾 崇左 海口 三亚 三沙 儋州 成都 自贡 攀枝花 泸州 德阳 "
    "绵阳 广元 遂宁 内江 乐山 南充 眉山 宜宾 广安 达州 雅安 巴中 资阳 阿坝 甘孜 凉山 贵阳 六盘水 遵义 安顺 毕节 铜仁 黔西南 "
    "黔东南 黔南 昆明 曲靖 玉溪 保山 昭通 丽江 普洱 临沧 楚雄 红河 文山 西双版纳 大理 德宏 怒江 迪庆 拉萨 日喀则 昌都 林芝 山南 "
    "那曲 西安 铜川 宝鸡 咸阳 渭南 延安 汉中 榆林 安康 商洛 兰州 嘉峪关 金昌 白银 天水 武威 张掖 平凉 酒泉 庆阳 定西 陇南 临夏 "
    "甘南 西宁 海东 银川 石嘴山 吴忠 固原 中卫 乌鲁木齐 克拉玛依 吐鲁番 哈密 昌吉 博尔塔拉 巴音郭楞 阿克苏 喀什 和田 伊犁 塔城 "
    "阿勒泰 石河子 台北 高雄 昆山 义乌 浦东 海淀 朝阳区 西湖区 天河区 南山区 福田区"
)
_NAMES_OF_CITIES = "|".join(sorted({*_PROVINCES.split(), *_CITIES.split()}))
_CALLS = "地址|住址|住所|家住|住在|居住于|居住在|户籍|籍贯|邮寄到|寄到|寄往|寄给|送到|送货到|配送到|快递到|位于|坐落于|我家在"

_MARKS = "省市区區县縣旗镇鎮乡鄉村街路道巷弄里园苑庄城场厦寓屯段期湾府院组"  # what the name of a part of an address ends with


def _han_but(others: str) -> str:
    """A set of Chinese characters without some."""
    left = sorted(others)
    gaps = pairwise([0x33FF, *map(ord, left), 0xA000])
    return "[" + "".join(f"{chr(a + 1)}-{chr(b - 1)}" for a, b in gaps if b - a > 1) + "]"


_NAME, _SHORT_NAME = _han_but(_MARKS) + "{0,8}", _han_but(_MARKS + "第") + "{0,4}"
_NUMBER = "[0-9A-Za-z一二三四五六七八九十百零〇\\-]{1,6}"
_HOUSE = "(?:[0-9A-Za-z一二三四五六七八九十百零〇\\-]{1,6} ?(?:号楼|号院|[号號](?![线線令馆机文公])|弄))"
_UNIT = "(?:号楼|号院|号|號|单元|單元|[弄栋棟幢座室层樓楼房户])"
_PARTS = f"(?:(?:{_NAME}[{_MARKS}]|{_NUMBER}(?:号院|段|期|区)) ?)+"
# A house number after a road, with at most a few characters between; or the number of a building right after an estate.
_END = (
    f"(?:{_SHORT_NAME}{_HOUSE}|{_NUMBER}(?:[栋棟幢座]|单元|單元)(?![山桥大高新])) ?"
    f"(?:(?:{_NAME}[{_MARKS}] ?)?{_SHORT_NAME}{_NUMBER} ?{_UNIT} ?)*"
    "(?:[0-9]{1,5}(?![0-9A-Za-z]))?"
)
_MAINLAND = f"(?:{_NAMES_OF_CITIES}) ?{_PARTS}{_END}"
_CALLED = f"(?:{_CALLS})[是为在]?[:： ]{{0,2}}(?P<secret>{_PARTS}{_END})"

_CAPITAL = "[A-Z][A-Za-z'’.]*"
_STREETS = (
    "Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Place|Pl|Square|Sq|Terrace|Ter|Way|Parkway|Pkwy|Close|Crescent|"
    "Gardens|Highway|Hwy|Row|Walk|Mews|Circle|Cir|Trail|Alley"
)
_FLAT = r"(?:(?:Apt|Apartment|Suite|Ste|Unit|Flat|Floor|Room|Rm)\.? ?#?|# ?)[0-9A-Za-z\-]{1,6}"
_TOWN = f"{_CAPITAL}(?: {_CAPITAL}){{0,2}}"
_CODE = r"(?:[A-Z]{2} [0-9]{5}(?:-[0-9]{4})?|[A-Z]{1,2}[0-9][0-9A-Z]? [0-9][A-Z]{2})"
_STREET = (
    rf"(?<![0-9A-Za-z])(?:{_FLAT},? )?[0-9]{{1,5}}[A-Za-z]?,? (?:[NSEW]\.? )?(?:(?:{_CAPITAL}|[0-9]{{1,3}}(?:st|nd|rd|th)) ){{1,3}}"
    rf"(?:{_STREETS})(?![A-Za-z])\.?(?:,? (?:{_FLAT}|[NSEW]{{1,2}})(?![0-9A-Za-z\-]))?(?:,? {_TOWN})?(?:,? {_CODE}(?![0-9A-Za-z]))?"
)
_BOX = r"(?<![A-Za-z])(?:P\.? ?O\.? ?Box|Post Office Box) [0-9]{1,6}(?![0-9])"


ADDRESSES = (_MAINLAND, _CALLED, _STREET, _BOX)
ANYWHERE = f"{_han_but(_MARKS)}{{1,6}}[{_MARKS}] ?(?:{_PARTS})?{_END}"
"""Any road or district and house number: at the price of holding back seven characters of every Chinese sentence."""
_FUNCTION_WORDS = re.compile("[在到于於是住去往从從的了位给給和与與、至]")


def from_the_name(found: str, before: str) -> Verdict:
    """The address without what led to it: words like 在 and 到 do not begin the name of a road."""
    mark = next(at for at, char in enumerate(found) if char in _MARKS)
    first = max((match.end() for match in _FUNCTION_WORDS.finditer(found, 0, max(0, mark - 1))), default=0)
    return ("address", first, len(found.rstrip(" " + SKIP)))


# The patterns of the secrets that are built in.

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
_NUMBER_TEXT = rf"(?<![0-9])[+(]?[0-9](?:{_SEPARATOR}[0-9]){{6,21}}"


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

_WORD_TEXT = r"[A-Za-z0-9_\-]"
_KEYS = (
    r"(?:sk|pk|rk)_(?:live|test)_[A-Za-z0-9]{10}",
    r"gh[pousr]_[A-Za-z0-9]{16}",
    r"github_pat_[A-Za-z0-9_]{16}",
    r"(?:AKIA|ASIA|LTAI|AKID)[A-Za-z0-9]{12}",
    rf"AIza{_WORD_TEXT}{{20}}",
    rf"xox[abeprs]-{_WORD_TEXT}{{10}}",
)
_LIKE_WORDS = rf"(?:sk-(?:proj-|ant-|or-)?|glpat-|gsk_|hf_|npm_|dop_v1_|tvly-|shpat_|ya29\.|SG\.|pypi-){_WORD_TEXT}{{16}}"

_QUOTES = "[\"'*_`“”「『]{0,3}"
_VALUE = "[!#-&(-_a-~]"
_SECRET = f"(?P<secret>{_VALUE}{{3}}(?P<run>{_VALUE}*)(?!{_VALUE}))"
_IS = rf"{_QUOTES} ?(?:[:=]|:=|=>| is| was) {{0,2}}{_QUOTES} ?"
_PASSWORD = (
    r"(?<![A-Za-z])(?:passwords?|passwd|pwd|passphrase|passcode|pin code|client[_ \-]?secret"
    r"|(?:secret|access|api|private|account|auth|encryption|signing)[_ \-]?(?:access[_ \-]?)?(?:key|token|secret)(?:[_ \-]?id)?)"
)
_CHINESE_PASSWORD = rf"(?:密码|口令|密钥|秘钥|私钥|令牌|密碼|金鑰|验证码|驗證碼|激活码){_QUOTES} ?[:=是为為] {{0,2}}{_QUOTES} ?"

_HEX_TEXT = "[0-9A-Fa-f]"

SOURCES: tuple[Source, ...] = (
    _source("number", rf"(?<![0-9])[0-9](?:{_SEPARATOR}[0-9]){{16}}{_SEPARATOR}[Xx](?![0-9])", number),
    _source("number", rf"{_NUMBER_TEXT}(?![0-9])", number),
    _source("number", _number(_SEPARATOR, 22, rf"{_SEPARATOR}(?![0-9 \-·._()])"), last_number),
    _source("number", _number(_APART, 19, f"{_APART}[0-9]{{2}}"), one_by_one),
    _source("iban", r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}(?:[ \-]?[A-Z0-9]){11,30}(?![A-Za-z0-9])", iban),
    _source("email", _EMAIL, email),
    _source("ip", r"(?<![0-9])[0-9]{1,3}(?: ?\. ?[0-9]{1,3}){3} ?\.{0,6}(?![0-9.])", ip),
    _source("ip", rf"(?<![0-9A-Za-z])(?:{_HEX_TEXT}{{1,4}}|:)(?::{_HEX_TEXT}{{0,4}}){{2,7}}(?![0-9A-Za-z])", ip),
    _source("mac", rf"(?<![0-9A-Za-z]){_HEX_TEXT}{{2}}(?:[:\-]{_HEX_TEXT}{{2}}){{5}}(?![0-9A-Za-z])"),
    *(_source("api_key", f"(?<![A-Za-z0-9]){regex}", rest=_TOKEN_REST) for regex in _KEYS),
    _source("api_key", f"(?<![A-Za-z0-9]){_LIKE_WORDS}", api_key, rest=_TOKEN_REST),
    _source("api_key", rf"(?<![A-Za-z0-9])eyJ{_WORD_TEXT}{{10}}", rest=_DOTTED_REST),
    _source("api_key", r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----", rest=_PEM_REST),
    _source("api_key", rf"(?i:bearer|authorization: ?basic) {{1,2}}(?P<secret>{_WORD_TEXT}{{16}})", rest=_DOTTED_REST, sure=True),
    _source("token", r"(?<![A-Za-z0-9+/_\-])[A-Za-z0-9+/_\-]{24}(?P<run>[A-Za-z0-9+/_\-]*)={0,8}(?![A-Za-z0-9+/=_\-])", token,
            run_rest=_TOKEN_REST),
    _source("password", _PASSWORD + _IS + _SECRET, password, re.I, **_VALUE_ENDS),
    _source("password", _CHINESE_PASSWORD + _SECRET, password, **_VALUE_ENDS),
    _source("password", r"(?<![A-Za-z])(?:secret|token|credential)s?" + _IS + _SECRET, secret, re.I, **_VALUE_ENDS),
    _source("password", r"://[^/\s:@]{1,40}:(?P<secret>[^\s@/]{3,64}@)", credentials, sure=True),
    *(_source("address", regex, trimmed) for regex in ADDRESSES),
)  # fmt: skip
"""Every built-in pattern. A mainland ID number, a card and a phone number are told apart by the check of numbers."""
ANY_ADDRESS = _source("address", ANYWHERE, from_the_name)
"""Used if the rules ask for it."""
