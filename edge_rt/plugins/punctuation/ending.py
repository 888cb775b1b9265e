"""Which mark a text or paragraph lacks at its end, if any."""

from __future__ import annotations

import re
import unicodedata

from edge_rt.plugins.punctuation.characters import HAN_LETTER
from edge_rt.plugins.punctuation.reading import Reading

_BOLD = re.compile(r"\*\*[^*]+\*\*$")
_HEADING_OR_TABLE = re.compile(r"#{1,6}\s|\|")
_NAME_OF_FILE = re.compile(r"(?:\S@\S+|[^\W\d]\.[A-Za-z]\w*|(?:^|\s)[~.]?/\S+|\\\S+|\w_\w+)$")
_SMALL = "a|an|and|as|at|by|de|for|from|in|la|of|on|or|the|to|with"
_TITLE = re.compile(rf"(?:[*_“\"'‘(]*[A-Z0-9][\w’'.-]*[,:*_”\"'’)]*|{_SMALL})(?:\s+(?:[A-Z0-9][\w’'.-]*[,:*_”\"'’)]*|{_SMALL}))*\s*$")

_SUBJECT = "you|he|she|it|we|they|i|there|this|that|these|those|the|a|an|my|your|his|her|our|their"
_QUESTION = re.compile(
    r"(?:so|and|but|well|now|ok|okay)?,?\s*(?:"
    rf"(?:is|are|was|does|did|can|could|would|will|has|am)(?:n['’]t)?\s(?:{_SUBJECT})\b"
    r"|(?:do|have)(?:n['’]t)?\s(?:you|we|they|i)\b"
    rf"|(?:what|where|when|who|why|how)(?:['’]s|\s(?:is|are|was|were|do|does|did|can|could|would|will|should|has|have))\s(?:{_SUBJECT})\b"
    r"|how\s(?:many|much|long|often|old|far)\s\w+\s(?:is|are|was|were|do|does|did|can|will|would)\b)",
    re.IGNORECASE,
)
_WHEN_CLAUSE = re.compile(r"(?:when|where|how|what|who)\s.*,", re.IGNORECASE)
_ASKS = re.compile(
    "吗$|(?:是不是|对不对|好不好|行不行|可不可以|能不能)$|(?:什么|怎么|怎样|怎么样|谁|哪|为何|几|多少|如何).*呢$|^[你您我他她它]们?呢$"
)
_PLEASE_ASK = re.compile("(?:请问|敢问)")


def missing_stop(reading: Reading, shortest: int, width: str) -> str:
    """The mark that the text read so far lacks, or "".

    ``shortest``: Han letters and other words of a lone sentence, at least. ``width``: "full" or "half"; else that of the sentence.
    """
    before, line = reading.before, reading.line
    core = before.rstrip("*_)）”’\"'」』》〉】〕")
    if reading.address or not core or _HEADING_OR_TABLE.match(line) or not _ends_with_a_word(core[-1]):
        return ""
    if before[-1] in ")）" and reading.head.lstrip("”’\"'」』 ")[:1] in ("(", "（"):
        return ""  # a remark in brackets after the last sentence, or the only one
    if _BOLD.match(reading.head):
        return ""  # a heading
    han, words = reading.han, reading.words
    if reading.is_item:
        if not (reading.items_end or reading.line_ended):
            return ""
    elif not reading.sentence_ended:
        # After a line with a colon there are names, values and parts of a list as often as sentences.
        if han + words - reading.clause < shortest * (2 if reading.line_end in (":", "：") else 1):
            return ""
        if reading.lines and reading.line_end not in ("，", ",", "；", ";", "、"):  # a verse, a column of names
            return ""
        if not han and _TITLE.match(reading.head):
            return ""
    if not han + words:
        return ""
    wide = han > words or (han == words and HAN_LETTER.match(reading.head.lstrip("*_“\"‘'（([《「『")) is not None)
    if _NAME_OF_FILE.search(before) and (not wide or "@" in before.rpartition(" ")[2]):
        return ""
    asks = _asks_in_chinese(core, reading.head) if wide else _asks(reading.head)
    marks = "？。" if width == "full" or (wide and width != "half") else "?."
    return marks[0] if asks else marks[1]


def _asks_in_chinese(text: str, head: str) -> bool:
    clause = re.split("[，。；：,:;]", text)[-1]
    return _ASKS.search(clause) is not None or _PLEASE_ASK.match(head) is not None


def _asks(head: str) -> bool:
    head = head.lstrip("*_“\"'‘( ")
    return _QUESTION.match(head) is not None and not _WHEN_CLAUSE.match(head)


def _ends_with_a_word(character: str) -> bool:
    return character.isalnum() or character in "%％°℃‰" or unicodedata.category(character).startswith("M")
