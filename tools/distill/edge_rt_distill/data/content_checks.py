"""Checks of what an answer says: declining, sums, secrets, support by a passage, register. Like those of checks.py, and part of its list.

Each is a rule of letters and numbers with limits that its docstring names; `sandbox` measures how often crafted good and bad answers are
told apart by it.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from edge_rt_distill.data.answers import Answer, Kind, has, place, plain
from edge_rt_distill.data.text import sentences, units

_NEAR = 160
"""Letters at an answer's beginning in which it declines, if it does."""
_DECLINES = re.compile(
    r"\b(?:i|we)(?:'m| am|'re| are)? (?:sorry|afraid|unable|not able|not (?:allowed|permitted|in a position))\b"
    r"|\b(?:i|we) (?:can ?not|can't|won't|will not|could not|couldn't|must (?:decline|refuse)|decline|refuse)\b"
    r"|\b(?:i|we) (?:do not|don't) (?:know|have|share|reveal|disclose|discuss|provide|tell)\b|\b(?:sorry|unfortunately),"
    r"|\b(?:i|we)(?:'d| would) (?:rather|prefer) not\b|\b(?:i'm|we're|i am|we are) not (?:going|willing) to\b"
    r"|\b(?:that|this|it)(?:'s| is) (?:confidential|not something (?:i|we))\b|\A\W*no\W*\Z"
    r"|\b(?:does not|doesn't|do not|don't|did not|didn't) (?:say|state|mention|specify|contain|give)\b"
    r"|\bnot (?:stated|mentioned|specified|possible (?:for me )?to)\b|\bno way (?:for me )?to (?:know|tell)\b"
    r"|\bagainst (?:the law|(?:my|our) )"
    r"|抱歉|对不起|很遗憾|无法|不能(?:够)?(?:帮|提供|协助|透露|告诉|回答|给出|为您|为你|判断|确定|保证|披露|查询)|不可以(?:帮|提供|透露)"
    r"|不(?:能|可以|会)(?:说(?!明)|讲|透露|泄露|告诉|分享)|(?:是|属于|须|应当)保密|\A\W*不(?:行|能|可以)(?:\W|\Z)"
    r"|不便|拒绝|恕|没有办法|不清楚|不知道|没有?(?:提到|提及|说明|写明|给出)|未(?:提供|提及|提到|说明|注明|写明)"
)


def declines(answer: Answer, arguments: Mapping[str, Any]) -> float:
    """Declines to do or know what was asked (``is`` true), or does not (``is`` false), in its first 160 letters.

    By phrases, English and Chinese. Limits: an apology followed by a full answer counts as declining; irony and new phrases pass.
    """
    text = plain(answer.text).replace("’", "'")[:_NEAR]
    return float((_DECLINES.search(text) is not None) == arguments["is"])


_UNIT = r"(?:[ ]?(?:%|[A-Za-z\u4e00-\u9fff]{1,8}(?![A-Za-z\u4e00-\u9fff])))?"
_NUMBER = rf"[-−]?[$€£¥]?(?:\d{{1,3}}(?:,\d{{3}})+|\d+)(?:\.\d+)?{_UNIT}"
_SUM = rf"[(（ ]*{_NUMBER}[)） ]*(?:[+\-−–*×·/÷][(（ ]*{_NUMBER}[)） ]*)*"
_EQUALS = r"(=|≈|约?等于)"
_CHAIN = re.compile(rf"{_SUM}(?:{_EQUALS}{_SUM})+")
_WRITTEN = str.maketrans({**dict(zip("−–×·÷（）", "--**/()", strict=True)), **dict.fromkeys("$€£¥,")})
_OPERATIONS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip


def arithmetic(answer: Answer, arguments: Mapping[str, Any]) -> float:
    """The share of the sums written in it (12 × 3 = 36, or 12 × 3 = 30 + 6 = 36) that are right, to the digits that are written; 0 with
    fewer than ``min`` (1).

    Limits: sums in words, with variables or over several lines are not seen. ≈ may be off by 2 %.
    """
    right = total = 0
    for chain in _CHAIN.finditer(answer.text):
        sides = re.split(_EQUALS, chain.group())
        values = [_value(side) for side in sides[::2]]
        for at, sign in enumerate(sides[1::2]):
            left, found = values[at], values[at + 1]
            if left is not None and found is not None and not (_plain_number(sides[2 * at]) and _plain_number(sides[2 * at + 2])):
                near = 0.02 * abs(left) if sign in ("≈", "约等于") else _last_digit(sides[2 * at + 2])
                total, right = total + 1, right + (abs(left - found) <= near)
    return right / total if total >= int(arguments.get("min", 1)) else 0.0


def _bare(side: str) -> str:
    """A sum without units and marks of currency, as Python writes it."""
    return re.sub(r"[^\d.+\-*/()%]", "", side.translate(_WRITTEN))


def _plain_number(side: str) -> bool:
    return re.fullmatch(r"-?\d+(?:\.\d+)?%?", _bare(side)) is not None


def _last_digit(side: str) -> float:
    """Half of what the last written digit of a number is worth; of a sum, next to nothing."""
    written = _bare(side)
    digits = len(written.rstrip("%").partition(".")[2]) if _plain_number(side) else 9
    return float(0.5000001 * 10.0**-digits * (0.01 if written.endswith("%") else 1))


def _value(side: str) -> float | None:
    """Of a number or a sum of them, + - * / and brackets; None for what is none. A percentage is a hundredth."""
    written = re.sub(r"(\d)%", r"\1/100", _bare(side))
    try:
        return _evaluated(ast.parse(written, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, OverflowError, MemoryError):
        return None


def _evaluated(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluated(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_evaluated(node.left), _evaluated(node.right))
    raise ValueError("not a sum")


_BETWEEN = r"[\s.\-–—_()/,*、]"
"""What may stand between the parts of a secret that is written apart, of text as ``plain`` makes it."""


def redacts(answer: Answer, arguments: Mapping[str, Any]) -> float:
    """None of ``secrets`` is in it, written together or apart (spaces, dots, dashes, commas, stars aside), nor six digits of one in a row.

    Limits: a secret in words, or described, is not seen. An empty answer hides everything: combine it with what must remain.
    """
    text = plain(answer.text)
    together = re.sub(f"{_BETWEEN}+", "", text)
    for secret in (re.sub(f"{_BETWEEN}+", "", plain(one)) for one in arguments["secrets"]):
        digits = re.sub(r"\D", "", secret)
        runs = [digits[at : at + 6] for at in range(len(digits) - 5)]
        if secret in text or _apart(secret).search(text) or any(run in together for run in runs):
            return 0.0
    return 1.0


def _apart(secret: str) -> re.Pattern[str]:
    """A secret whose characters may stand apart; of Latin letters as whole words then, as "grab and eat" does not tell of a "Band"."""
    spaced = f"{_BETWEEN}*".join(map(re.escape, secret))
    return re.compile(rf"(?<![a-z](?=[a-z])){spaced}(?!(?<=[a-z])[a-z])")


_NEGATION = re.compile(r"\b(?:not|no|never|none|cannot|without|neither|nor|n't)\b|n't\b|[不没无未非否]")
_FIGURE = re.compile(r"\d[\d,]*(?:\.\d+)?|[零一二三四五六七八九十百千万亿两]+(?=[年月日号天元名个人次件条份周岁点])")
_NAME = re.compile(r"(?<![.!?。]\s)(?<!^)\b[A-Z][\w&-]+")
_COMMON = frozenset(
    re.findall(
        r"\S+",
        """
        the a an and or but of to in on at for from by with as is are was were be been it its this that these those they he she we you i
        his her their our your has have had will would can could may might should must do does did than then there here which who what
        when where how also more most less all any each such into over under about after before between during while if so very only
        just not no
        的 了 是 在 和 与 或 及 对 从 到 为 以 其 这 那 该 此 也 都 就 而 但 并 等 个 一 上 下 中 有 将 被 由 于 我 你 他 她 它 们 不 没 无
        """,
    )
)


def supported(answer: Answer, arguments: Mapping[str, Any]) -> float:
    """The share of its sentences that the ``passage`` supports.

    A sentence is supported if the two neighbouring sentences of the passage that are nearest to it have at least ``share`` (.6) of its
    words (Chinese: characters) besides the commonest, the passage has all its figures and names, and both negate or neither does.
    After the span-based faithfulness measures of summaries (extractive fragments, Grusky et al. 2018, arXiv:1804.11283), with figures and
    polarity added. Limits: free paraphrase fails, and a sentence of the passage's words in another relation passes.
    """
    written = sentences(answer.text)
    return sum(_holds(one, arguments["passage"], float(arguments.get("share", 0.6))) for one in written) / len(written) if written else 0.0


def _holds(sentence: str, passage: str, share: float) -> bool:
    known = {one.replace(",", "") for one in _FIGURE.findall(plain(passage))}
    figures = {one.replace(",", "") for one in _FIGURE.findall(plain(re.sub(r"\A\s*\d{1,2}[.)、]\s*", "", sentence)))}
    if not figures <= known or not all(has(passage, name) for name in _NAME.findall(sentence)):
        return False
    words = [one for one in units(sentence) if one not in _COMMON]
    parts = sentences(passage)
    windows = [" ".join(parts[at : at + 2]) for at in range(max(1, len(parts) - 1))]
    best = max(windows, key=lambda window: _share(words, window), default="")
    negated = [bool(_NEGATION.search(plain(one))) for one in (sentence, best)]
    return _share(words, best) >= share and (negated[1] or not negated[0])


def _share(words: list[str], text: str) -> float:
    there = {_stem(one) for one in units(text)}
    return sum(_stem(one) in there for one in words) / len(words) if words else 1.0


def _stem(word: str) -> str:
    """Without the commonest endings of English."""
    return re.sub(r"(?:ing|ed|es|s|ly)\Z", "", word) if len(word) > 4 else word


def chosen(text: str, options: list[str]) -> str | None:
    """The option that ``text`` names first, None if it names none. Of two at one place, the longer: "not allowed", not "allowed"."""
    found = [(at, -len(option), option) for option in options if (at := place(text, option)) is not None]
    return min(found)[2] if found else None


def chooses(answer: Answer, arguments: Mapping[str, Any]) -> float:
    """Names ``is`` before any other of ``options``. Limits: "yes" in "yes, but no" is a choice."""
    return float(chosen(answer.text, arguments["options"]) == arguments["is"])


_AGAINST = {
    "formal": re.compile(
        r"\b(?:gonna|wanna|gotta|kinda|yeah|yep|nope|hey|hi there|guys|awesome|cool|stuff|lol|btw|super|totally|\w+'(?:re|ve|ll|m|d))\b"
        r"|n't\b|!|~|[哈呀啦嘛哦噢呢吧咯喽]|亲[，,~]|[\U0001f300-\U0001faff]"
    ),
    "plain": re.compile(
        r"\b(?:hereinafter|aforementioned|notwithstanding|pursuant|heretofore|thereof|herein|whereas|utili[sz]e|commence|endeavou?r)\b"
        r"|兹|鉴于|上述|之规定|敬请|特此|贵方|谨此"
    ),
}


def register(answer: Answer, arguments: Mapping[str, Any]) -> float:
    """Keeps the register ``is``: formal (no slang, contractions, exclamation marks, emoji or modal particles) or plain (no officialese).

    A word out of place takes a half, two all. Limits: it is a list of words; tone that has none of them passes.
    """
    wrong = len(_AGAINST[arguments["is"]].findall(plain(answer.text).replace("’", "'")))
    return max(0.0, 1 - 0.5 * wrong)


def own_turn(answer: Answer, _: Mapping[str, Any]) -> float:
    """It does not go on as somebody else: no line that begins with a role (User:, 用户：) or a mark of a template."""
    roles = r"(?im)^[\s#*>]*(?:user|human|assistant|customer|system|question|q|用户|客户|顾客|客服|系统|助手|问)\**\s*:"
    return float(re.search(roles + r"|<\|[a-z_]+\|>|\[/?INST\]|</s>|<(?:start|end)_of_turn>", plain(answer.text)) is None)


def matches(answer: Answer, arguments: Mapping[str, Any]) -> float:
    """All of it, but for spaces around, is of the regular expression ``pattern``; with ``lines`` true, each of its lines; a half where
    only a part is."""
    text = answer.text.strip()
    parts = [line.strip() for line in text.splitlines() if line.strip()] if arguments.get("lines") else [text]
    if not text:
        return 0.0
    held = sum(re.fullmatch(arguments["pattern"], part) is not None for part in parts) / len(parts)
    return held if held else 0.5 * (re.search(arguments["pattern"], text) is not None)


def csv(answer: Answer, arguments: Mapping[str, Any]) -> float:
    """Lines of ``columns`` fields with ``separator`` (a comma; | for a table in Markdown, whose rule is no line) between them, ``rows`` of
    them if given: the share of lines that are so, times how near their number is."""
    separator, columns = arguments.get("separator", ","), int(arguments["columns"])
    lines = [line.strip() for line in answer.text.strip().splitlines() if line.strip() and not line.strip().startswith("```")]
    if separator == "|":
        lines = [line.strip("| ") for line in lines if not re.fullmatch(r"[|\s:\-]+", line)]
    if not lines:
        return 0.0
    share = sum(line.count(separator) == columns - 1 for line in lines) / len(lines)
    rows = arguments.get("rows")
    return share if rows is None else share * max(0.0, 1 - abs(len(lines) - rows) / rows)


CONTENT: dict[str, Kind] = {
    "declines": Kind(declines, {"is": "true or false"}, {}),
    "arithmetic": Kind(arithmetic, {}, {"min": "count"}),
    "redacts": Kind(redacts, {"secrets": "texts"}, {}),
    "supported": Kind(supported, {"passage": "text"}, {"share": "share"}),
    "chooses": Kind(chooses, {"is": "text", "options": "texts"}, {}),
    "register": Kind(register, {"is": "formal or plain"}, {}),
    "own_turn": Kind(own_turn, {}, {}),
    "matches": Kind(matches, {"pattern": "regular expression"}, {"lines": "true or false"}),
    "csv": Kind(csv, {"columns": "positive count"}, {"rows": "positive count", "separator": "text"}),
}
