"""Units, sentences, passages and language of a text, for Latin and Chinese alike, without a model.

A unit is a word, or one character where words are not set apart by spaces (Chinese, Japanese). Everything that compares texts
(de-duplication, leaks, repetition) counts in units, so that one rule holds for both.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_KANA = "\u3040-\u30ff\u31f0-\u31ff"
_UNIT = re.compile(rf"[{_HAN}{_KANA}]|[^\W_{_HAN}{_KANA}]+")
_WIDE = re.compile(rf"[{_HAN}{_KANA}]")
_SCRIPTS = {
    # language: (what its script writes, as a class; the first whose share is largest wins)
    "zh": f"[{_HAN}]",
    "ja": f"[{_KANA}]",
    "ko": "[\uac00-\ud7a3]+",
    "ru": "[\u0400-\u04ff]+",
    "el": "[\u0370-\u03ff]+",
    "ar": "[\u0600-\u06ff]+",
    "he": "[\u0590-\u05ff]+",
    "hi": "[\u0900-\u097f]+",
    "th": "[\u0e00-\u0e7f]+",
    "en": r"[A-Za-z\u00c0-\u024f]+",
}
_PATTERNS = {language: re.compile(pattern) for language, pattern in _SCRIPTS.items()}
_ABBREVIATIONS = frozenset(
    ("e.g", "i.e", "etc", "vs", "approx", "mr", "mrs", "ms", "dr", "prof", "st", "no", "fig", "eq", "sec", "art", "inc", "ltd", "co", "p.m")
)
_END = re.compile(r"[。！？!?…]+[”’」』\"')\]]*|\.[”\"')\]]*(?=\s|$)|\n+")


def units(text: str) -> list[str]:
    """Words and single Chinese or Japanese characters of ``text``, without case, width or punctuation (NFKC, case folded)."""
    return _UNIT.findall(unicodedata.normalize("NFKC", text).casefold())


def language_of(text: str) -> str:
    """``zh``, ``ja``, ``ko``, ``ru`` ... by script, or "" where there are no letters.

    Words of an alphabet count like single Chinese characters, so that a Chinese sentence may name things in English. All languages
    in Latin script come out as ``en``: from script alone they cannot be told apart.
    """
    counts = {language: len(pattern.findall(text)) for language, pattern in _PATTERNS.items()}
    if counts["ja"] > 0.1 * counts["zh"]:  # Japanese writes Han characters too
        counts["ja"], counts["zh"] = counts["ja"] + counts["zh"], 0
    best = max(counts, key=lambda language: counts[language])
    return best if counts[best] else ""


def script_of(language: str) -> str:
    """The language that stands for the script of ``language`` in ``language_of``: "zh-CN" -> "zh", "de" -> "en"."""
    base = language.lower().split("-")[0].split("_")[0]
    return base if base in _SCRIPTS else "en"


def sentences(text: str) -> list[str]:
    """The sentences of ``text``; lines end one as well. Dots in numbers, addresses and common abbreviations do not."""
    found: list[str] = []
    start = 0
    for end in _END.finditer(text):
        if end.group().startswith(".") and _abbreviated(text[start : end.start()], text[end.end() : end.end() + 2]):
            continue
        found.append(text[start : end.end()].strip())
        start = end.end()
    found.append(text[start:].strip())
    return [sentence for sentence in found if _UNIT.search(sentence)]


def _abbreviated(before: str, after: str) -> bool:
    """Whether a dot behind ``before`` is not the end of a sentence: an abbreviation, or the number of a list's item."""
    last = before.split()[-1].lstrip("(\"'“").casefold() if before.split() else ""
    if last.isdigit() and before.strip() == last:
        return True
    return last in _ABBREVIATIONS and bool(after.strip())


def passages(text: str, size: int = 1500) -> Iterator[str]:
    """Pieces of ``text`` of at most ``size`` letters (a Chinese character counts as three), cut between paragraphs, else sentences."""
    held: list[str] = []
    room = size
    for paragraph in re.split(r"\n[ \t]*\n\s*", text.replace("\r\n", "\n").replace("\r", "\n")):
        for piece in _pieces(paragraph.strip("\n"), size):
            if held and _size(piece) > room:
                yield "\n\n".join(held)
                held, room = [], size
            held.append(piece)
            room -= _size(piece) + 2
    if held:
        yield "\n\n".join(held)


def _size(text: str) -> int:
    return len(text) + 2 * len(_WIDE.findall(text))


def _pieces(paragraph: str, size: int) -> Iterator[str]:
    """``paragraph`` if it fits, else its parts, cut behind the last sentence, line or word that fits."""
    while _size(paragraph) > size:
        cut = min(size, len(paragraph))
        while _size(paragraph[:cut]) > size:  # a few rounds: each comes nearer by what is too much
            cut -= max(1, (_size(paragraph[:cut]) - size) // 3)
        ends = [end.end() for end in _END.finditer(paragraph, 0, cut)]
        cut = next((end for end in reversed(ends) if end >= cut // 2), 0) or paragraph.rfind(" ", cut // 2, cut) + 1 or cut
        if paragraph[:cut].strip():
            yield paragraph[:cut].strip()
        paragraph = paragraph[cut:].lstrip()
    if paragraph.strip():
        yield paragraph.rstrip()
