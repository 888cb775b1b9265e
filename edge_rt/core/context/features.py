"""What a text is made of, counted in one pass for Latin words and one for Chinese: the features that a grade is made of.

Rules and word lists (lexicon.py), no model: a segment of 500 words takes a fraction of a millisecond. Every quantifier that could go
back over what it has read is bounded, so time is linear in the text, whatever it is. Nothing depends on the locale.

Latin words are looked at one by one, because a look-up in a table costs less than one more alternative in a regular expression.
Chinese has no spaces, so its patterns search the text; those for times and amounts take out what they count, lest their digits count
again as numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from edge_rt.core.assemble.width import HALF_WIDTH
from edge_rt.core.context import lexicon


class Features(NamedTuple):
    """Counts in one segment.

    ``words``: Latin words and numbers, plus ``CHARACTER`` for each Chinese character. The others are occurrences:
    ``clauses``: markers of subordinate and coordinate clauses. ``punctuation``: commas, colons, semicolons, brackets, list items.
    ``names``: of persons, and capitalised names of anything else. ``places``, ``organisations``: names that say so.
    ``times``: dates and times. ``amounts``: numbers, with or without unit or currency, and numerals.
    ``identifiers``: codes, order and phone numbers, URLs, e-mail addresses, paths, hashes, versions. ``quotes``: quoted strings.
    ``causes``, ``contrasts``, ``conditions``, ``conclusions``, ``sequences``: logical connectives.
    ``decisions``: words of decision, duty, prohibition and preference. ``courtesies``: words of politeness and small talk.
    """

    words: float = 0.0
    clauses: int = 0
    punctuation: int = 0
    names: int = 0
    places: int = 0
    organisations: int = 0
    times: int = 0
    amounts: int = 0
    identifiers: int = 0
    quotes: int = 0
    causes: int = 0
    contrasts: int = 0
    conditions: int = 0
    conclusions: int = 0
    sequences: int = 0
    decisions: int = 0
    courtesies: int = 0


CHARACTER = 0.6
"""Words that a Chinese character counts for: a Chinese word has one or two."""

_Counts = dict[str, int]


def features(text: str) -> Features:
    """Count what a text is made of. Full-width letters and digits count as the ordinary ones."""
    counts = dict.fromkeys(Features._fields[1:], 0)
    if not text.isascii() and _FULL_WIDTH.search(text):
        text = text.translate(HALF_WIDTH)
    counts["punctuation"] = len(_all(_PUNCTUATION, text))
    counts["quotes"] = len(_all(_QUOTED, text))
    text, urls = _blanked(_URL, text)
    counts["identifiers"] = urls
    characters = 0
    if not text.isascii():
        characters = len(_all(_HAN, text))
        if characters:
            text = _count_chinese(text, counts)
    return Features(_count_latin(text, counts) + CHARACTER * characters, **counts)


_LONG = 1 << 15
"""Characters of a text (code, a table) from which it is searched match by match: all at once would hold up other threads for 0.1 seconds
a MB, since Python's lock is not free meanwhile."""


def _all(pattern: re.Pattern[str], text: str) -> list[str]:
    """``findall`` for a pattern without groups."""
    return pattern.findall(text) if len(text) < _LONG else [found[0] for found in pattern.finditer(text)]


def _blanked(pattern: re.Pattern[str], text: str) -> tuple[str, int]:
    """The text with a space in the place of each match, and the number of these."""
    return pattern.subn(" " if len(text) < _LONG else lambda _: " ", text)


_FULL_WIDTH = re.compile("[０-９Ａ-Ｚａ-ｚ]")
_PUNCTUATION = re.compile(r"[,;:()，；：（）、]|\n[ \t]{0,8}(?:[-*•]|\d{1,3}[.)])[ \t]")
_QUOTED = re.compile(r'"[^"\n]{1,80}"|“[^“”\n]{1,80}”|「[^「」\n]{1,80}」|『[^『』\n]{1,80}』|《[^《》\n]{1,80}》|`[^`\n]{1,80}`')
_URL = re.compile(r"://[!-~]{1,400}")  # from here on, so that a search need not try every letter; the word before it tells nothing
_HAN = re.compile("[\u3400-\u9fff\uf900-\ufaff]")


# ---- Latin script ----------------------------------------------------------------------------------------------------

_W = "0-9A-Za-z_À-ɏ"
_TOKEN = re.compile(
    rf"[$€£¥￥₩₹]?\d{{1,3}}(?:,\d{{3}}){{1,6}}(?:\.\d{{1,9}})?%?|[$€£¥￥₩₹#@/~]?[{_W}](?:[{_W}'’./\\:@&+#=-]{{0,120}}[{_W}])?[%％]?"
)
_MONTH = "jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec"
_TIME = re.compile(
    r"\d{1,2}:\d\d(?::\d\d)?(?:[ap]m)?|\d{1,2}[ap]m|\d{4}[-/.]\d{1,2}(?:[-/.]\d{1,2})?(?:t[\d:.+z-]+)?|\d{1,2}[-/.]\d{1,2}[-/.](?:\d\d){1,2}"
    rf"|(?:19|20)\d\d(?:s|'s)?|\d{{1,2}}[-/.](?:{_MONTH})(?:[-/.]\d{{2,4}})?"
)
_AMOUNT = re.compile(
    r"[$€£¥￥₩₹]\d[\d,.]*(?:k|m|bn|b)?|\d[\d.,]*[%％]|\d{1,4}(?:\.\d+)?|\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,3}(?:st|nd|rd|th)"
    r"|\d+(?:\.\d+)?(?:kg|g|mg|km|cm|mm|m|l|ml|gb|mb|kb|tb|ms|s|h|hz|khz|mhz|ghz|w|kw|v|x|k|c|f)"
)
_CODE = re.compile(r"_|.@.|\\|.:[0-9A-Za-z]|/.*/|[0-9A-Za-z]{2}\.[a-z]{1,5}$|^[/~#@].")
_DIGIT = re.compile("[0-9]")


def _count_latin(text: str, counts: _Counts) -> int:
    """Count in text in Latin script and return the number of its words and numbers."""
    tokens = _all(_TOKEN, text)
    number = False  # was the last token a number?
    for token in tokens:
        word = token.lower()
        feature = _WORDS.get(word)
        if number and word in _TIME_UNITS:
            counts["amounts"] -= 1
            counts["times"] += 1
        elif feature:
            counts[feature] += 1
        number = False
        if not token.isalpha():
            shape = _shape(word)
            if shape:
                counts[shape] += 1
                number = shape == "amounts"
        elif word != token and token[0].islower():
            counts["identifiers"] += 1  # camelCase
    lowered = text.lower()
    for phrase, feature in _PHRASES.items():
        counts[feature] += lowered.count(phrase)
    _count_names(text, counts)
    return len(tokens)


def _shape(word: str) -> str | None:
    """The feature of a word in lower case that is not letters alone."""
    if not _DIGIT.search(word):
        return "identifiers" if _CODE.search(word) else None
    if _TIME.fullmatch(word):
        return "times"
    return "amounts" if _AMOUNT.fullmatch(word) else "identifiers"


_TITLED = "|".join(rf"(?<=\b{title}\. )" for title in lexicon.TITLES.split())
_NAME = re.compile(
    rf"[A-Z](?<![{_W}'’./@-].)[{_W}'’&-]*(?:(?: (?:of|the|de|van|von|for|&)){{0,2}} [A-Z][{_W}'’&-]*|\. (?:{_TITLED})[A-Z][{_W}'’-]*)*"
)
_SENTENCE_ENDS = frozenset('.!?:;\n"“”*>-#|。！？：')


def _count_names(text: str, counts: _Counts) -> None:
    """Count capitalised names: sequences that are no sentence's beginning, or go on after it."""
    for found in _NAME.finditer(text):
        start = found.start()
        words = found[0].replace(".", "").split()
        before = text[max(0, start - 2) : start].rstrip(" ")
        lowered = [word.lower().removesuffix("'s").removesuffix("’s") for word in words]
        kept = [word for word in lowered if word not in _NO_NAMES and not _DIGIT.search(word)]
        several = len(kept) > 1
        if several and not _ORGANISATIONS.isdisjoint(kept):
            counts["organisations"] += 1
        elif not _PLACES.isdisjoint(kept) or (several and not _PLACE_KINDS.isdisjoint(kept)):
            counts["places"] += 1
        elif several or (kept and ((before and before[-1] not in _SENTENCE_ENDS) or lowered[0] in _TITLES)):
            counts["names"] += 1


_WORDS = {word: feature for feature, words in lexicon.ENGLISH.items() for word in words.split()}
_PHRASES = {phrase: feature for feature, phrases in lexicon.ENGLISH_PHRASES.items() for phrase in phrases.split(", ")}
_TIME_UNITS, _ORGANISATIONS, _PLACES, _PLACE_KINDS, _TITLES = (
    frozenset(words.lower().split())
    for words in (lexicon.TIME_UNITS, lexicon.ORGANISATIONS, lexicon.PLACES, lexicon.PLACE_KINDS, lexicon.TITLES)
)
_NO_NAMES = _TIME_UNITS.union(_WORDS, lexicon.UNITS.split(), lexicon.NO_NAMES.split())


# ---- Chinese ---------------------------------------------------------------------------------------------------------


def _any(words: Iterable[str]) -> str:
    """A pattern for any of some words, the longest at a place first."""
    return "|".join(sorted(words, key=lambda word: (-len(word), word)))


_N = "[0-9零〇一二三四五六七八九十百千两兩]"
_ZH_TIME = re.compile(
    rf"(?:{_N}{{1,4}}(?:年代?|月份?|日(?!本)|号(?![码线楼])|號(?![碼線樓])|点(?!儿)|點|时|時|小时|小時|分钟|分鐘|分(?!之)|秒|周|週|天|个月|個月)半?)+"
    r"|(?:周|週|星期|礼拜|禮拜)[一二三四五六日天]"
)
_ZH_AMOUNT = re.compile(
    r"(?:百分之)?(?!一[个個次位份条條只种種直起些下点點样樣般定])(?:\d{1,12}(?:[,.]\d{1,9}){0,3}|[零〇一二三四五六七八九十百千万萬亿億两兩]{1,12})\s?"
    r"(?:[%％万萬亿億]?(?:元|块|塊|美元|欧元|歐元|人民币|人民幣|兆帕|公里|千米|毫米|厘米|米|公斤|千克|毫克|克|吨|噸|毫升|升|平方米|度|"
    r"个|個|人|名|位|件|台|臺|次|套|份|页|頁|条|條|只|隻|倍|岁|歲|层|層|楼|樓|晚|瓶|把|本|张|張|种|種|字段|GB|MB|KB|[%％])|[万萬亿億])"
    r"|百分之[零一二三四五六七八九十百点]{1,8}"
)
_SURNAME = f"(?:{_any(lexicon.COMPOUND_SURNAMES.split())}|[{lexicon.SURNAMES}])"
_ZH_PERSON = re.compile(
    f"{_SURNAME}(?:"
    f"[\u4e00-\u9fff]{{0,2}}(?:{_any(lexicon.CHINESE_TITLES.split())})"
    "|[总總工](?![作程结結体體业業厂廠具人资資会會共是])"
    # without a title: characters of given names, and then the end of a phrase or a word that often follows a name
    f"|[{lexicon.GIVEN}]{{1,2}}(?=[^\u4e00-\u9fff]|$|[的是在和与與说說于於负負将將已会會要不去来來喜住向把给給也很就因今明昨])"
    ")"
    f"|(?:我叫|名叫|姓名|联系人|聯繫人|收件人|被告|原告|患者|客户|客戶)[：: ]?{_SURNAME}[\u4e00-\u9fff]{{1,2}}"
)
_ZH_ORGANISATION = re.compile(_any(lexicon.CHINESE_ORGANISATIONS.split()))
# What places' names end in: the characters before it and after it that make another word of it.
_PLACE_ENDS = {
    "省": ("节節反全各外", "钱錢略事心电電"),
    "市": ("城都超股上门門本全黑夜", "场場民面价價值政"),
    "[县縣镇鎮]": ("", ""),
    "[区區]": ("地社小园園景市", "别別分域間间块塊"),
    "路": ("道公马馬铁鐵网網电電思走一上半后後高绕繞", "上过過由线線径徑程费費口灯燈人"),
    "街": ("上大", ""),
    "村": ("农農", ""),
    "高速": ("", "度"),
    "(?:机|機)(?:场|場)": ("", ""),
    "(?:车|車)站": ("", ""),
}
_ZH_PLACE = re.compile(
    f"(?:{_any(lexicon.CHINESE_PLACES.split())})[省市县縣]?|(?:"
    + "|".join(
        end + (f"(?<![{before}].)" if before else "") + (f"(?![{after}])" if after else "") for end, (before, after) in _PLACE_ENDS.items()
    )
    + ")(?<=[\u4e00-\u9fff]{3})"
)
_ZH_WORDS = {word: feature for feature, words in lexicon.CHINESE.items() for word in words.split()}
_ZH_WORD = re.compile(_any(_ZH_WORDS))


def _count_chinese(text: str, counts: _Counts) -> str:
    """Count in Chinese text and return it without what would count again in the pass for Latin script."""
    for word in _all(_ZH_WORD, text):
        counts[_ZH_WORDS[word]] += 1
    counts["names"] += len(_all(_ZH_PERSON, text))
    counts["places"] += len(_all(_ZH_PLACE, text))
    counts["organisations"] += len(_all(_ZH_ORGANISATION, text))
    text, times = _blanked(_ZH_TIME, text)
    text, amounts = _blanked(_ZH_AMOUNT, text)
    counts["times"] += times
    counts["amounts"] += amounts
    return text
