"""Scripts, and the patterns that find where one ends.

A script is known by ranges of Unicode's blocks, less the digits and punctuation in them, which belong to no language. Chinese and
Japanese share a script: characters that only one of them writes tell them apart, and kana, which only Japanese has. Which those are is
in the old national character sets, whose tables Python brings.
"""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

SCRIPTS = {
    # script: (language unless the rules say otherwise, ranges)
    "latin": ("", "A-Za-zªºÀ-ÖØ-öø-ʯ\u1e00-\u1eff\u2c60-\u2c7f\ua722-\ua7ff\ufb00-\ufb06Ａ-Ｚａ-ｚ"),
    "han": ("zh", "々〇㐀-䶿一-鿿\uf900-\ufaff\U00020000-\U000323afㄅ-ㄯㆠ-ㆿ"),
    "kana": ("ja", "ぁ-ゖゝ-ゟァ-ヺー-ヿㇰ-ㇿｦ-ﾝ"),
    "hangul": ("ko", "가-\ud7a3ᄀ-ᇿㄱ-ㆎꥠ-ꥼힰ-ퟻﾡ-ￜ"),
    "cyrillic": ("ru", "Ѐ-ҁҊ-ԯᲀ-ᲈꙀ-ꙮꚀ-ꚝ"),
    "greek": (
        "el",
        "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u03ff\u1f00-\u1fbc\u1fc2-\u1fcc\u1fd0-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ffc",
    ),
    "arabic": (
        "ar",
        "\u0620-\u064a\u066e-\u06d3\u06d5\u06fa-\u06fc\u0750-\u077f\u08a0-\u08c9\ufb50-\ufbb1\ufbd3-\ufd3d\ufd50-\ufdfb\ufe70-\ufefc",
    ),
    "hebrew": ("he", "\u05d0-\u05ea\u05ef-\u05f2\ufb1d-\ufb4f"),
    "devanagari": ("hi", "\u0900-\u0963\u0971-\u097f"),
    "bengali": ("bn", "\u0980-\u09e3\u09f0\u09f1"),
    "gurmukhi": ("pa", "\u0a01-\u0a5e\u0a70-\u0a75"),
    "gujarati": ("gu", "\u0a81-\u0ae3"),
    "odia": ("or", "\u0b01-\u0b63"),
    "tamil": ("ta", "\u0b82-\u0bd7"),
    "telugu": ("te", "\u0c00-\u0c63"),
    "kannada": ("kn", "\u0c80-\u0ce3"),
    "malayalam": ("ml", "\u0d00-\u0d63"),
    "sinhala": ("si", "\u0d81-\u0ddf"),
    "thai": ("th", "\u0e01-\u0e3a\u0e40-\u0e4e"),
    "lao": ("lo", "\u0e81-\u0ecd\u0edc-\u0edf"),
    "tibetan": ("bo", "\u0f40-\u0fbc"),
    "myanmar": ("my", "\u1000-\u103f\u1050-\u108f"),
    "georgian": ("ka", "\u10a0-\u10fa\u10fc-\u10ff\u1c90-\u1cbf"),
    "armenian": ("hy", "\u0531-\u0556\u0560-\u0588"),
    "ethiopic": ("am", "\u1200-\u135a"),
    "khmer": ("km", "\u1780-\u17d3"),
    "mongolian": ("mn", "\u1820-\u1878"),
}

_STRONG = "".join(ranges for _, ranges in SCRIPTS.values())
SCRIPT = re.compile("|".join(f"(?P<{name}>[{ranges}])" for name, (_, ranges) in SCRIPTS.items()))
"""The script of a character, as the name of the group."""
STRONG_OR_LINE = re.compile(rf"[{_STRONG}\n]")
LAST_STRONG = re.compile(rf".*[{_STRONG}]", re.DOTALL)
"""As far as the last character of any script."""

OPENING = re.compile(r"[(\[{（［｛〔【〈《「『〖〘“‘„‚«‹¿¡]{0,8}\Z")
"""Opening brackets and quotes just before a place (``\\Z``). More than eight are not one quotation."""
_CLOSING = r""")\]}”’"'»›）」』.!?…"""
_SENTENCE = rf"[.!?…][{_CLOSING}]{{0,8}}[^\S\n]"
OPEN_END = re.compile(rf"[.!?…][{_CLOSING}]{{0,8}}\Z")
"""What may be the end of a sentence if a space follows."""
LOWER = re.compile("[a-zß-öø-ÿ]")
"""No sentence begins with it (letters that stand for most: it is about ``e.g. this``)."""
WORD = re.compile(rf"[{SCRIPTS['latin'][1]}]\S*")
_RESET = "\n。！？!?…「」『』《》【】（）()“”‘’"
"""Where Chinese may give way to Japanese and back."""

# Characters of texts in which no script, sentence, line or quotation ends, and which no format writes otherwise.
_PLAIN = r" 0-9,;:_'’*·~=@#$%^/+|\-–—→×°"


class Patterns(NamedTuple):
    """The patterns for a stream that is in one script."""

    letters: re.Pattern[str]
    border: re.Pattern[str]  # what ends it, or may
    stop: re.Pattern[str]  # what ends a unit whose language is not known yet
    boring: re.Pattern[str]  # pieces of text in which nothing can end


# Python's "shift_jis" is JIS X 0208, which has old forms that are written in Taiwan today and in Japan only in names. These are the
# commonest that are in no common name, with words of Chinese grammar.
_TAIWAN = "很它哪們說會對體讀變發總當從處單圖聲戰斷繼續爲嗎麼妳"


@cache
def _han() -> tuple[str, str, str]:
    """Characters that only Chinese writes, that only Japanese writes, and that Japanese may write, each for a character class."""
    unified = "".join(map(chr, range(0x4E00, 0xA000)))
    mainland, taiwan, japan = (set(unified.encode(name, "ignore").decode(name)) for name in ("gb2312", "big5", "shift_jis"))
    chinese = mainland - japan | set(_TAIWAN)
    return _ranges(chinese), _ranges(japan - mainland - taiwan), _ranges(set(unified) - chinese)


def _ranges(characters: set[str]) -> str:
    found: list[list[int]] = []
    for code in sorted(map(ord, characters)):
        if found and found[-1][1] == code - 1:
            found[-1][1] = code
        else:
            found.append([code, code])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in found)


@cache
def evidence() -> re.Pattern[str]:
    """The first character that tells Chinese (``han``) from Japanese (``ja``), or the end of the sentence or quotation."""
    chinese, japanese, _ = _han()
    return re.compile(rf"(?P<ja>[{SCRIPTS['kana'][1]}{japanese}])|(?P<han>[{chinese}])|[{_RESET}]")


@cache
def patterns(kind: str, sentences: bool = False) -> Patterns:
    """The patterns of a script. ``ja``: Han and kana together; ``han``: without kana. ``sentences``: the language may change with each."""
    own = ("han", "kana") if kind == "ja" else (kind,)
    letters = "".join(SCRIPTS[name][1] for name in own)
    others = "".join(ranges for name, (_, ranges) in SCRIPTS.items() if name not in own)
    stop = border = rf"[{others}\n]"
    plain = letters + _PLAIN
    if kind in ("han", "kana", "ja"):
        chinese, _, not_chinese = _han()
        border = rf"[{others}{_RESET}{chinese if kind == 'ja' else ''}]"
        plain = (SCRIPTS["kana"][1] + not_chinese if kind == "ja" else letters) + _PLAIN + "，、；："
    elif sentences:
        border = rf"[{others}\n。！？]|{_SENTENCE}"
        stop = rf"[{others}\n]|{_SENTENCE}[^{_STRONG}\n]{{0,8}}(?!{LOWER.pattern})[{letters}]"
    else:
        plain += ".!?…"
    return Patterns(*map(re.compile, (f"[{letters}]", border, stop, f"[{plain}]+")))
