"""What stands in the text where a secret was: a placeholder, a hash by which equal secrets are recognised, or stars."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from edge_rt.plugins.redaction.automaton import Automaton, Class, Move, State, significant, view

MAX_KEPT = 16
"""Characters that a mask may show at either end."""
UNCLEAR = 1 << 16
"""The rank of what a cut left unclear: any other match names the whole."""
_STARS = 32
_HASH_DIGITS = 12


class Concealed:
    """A secret while it is read. It may be long, so only its ends, its length and its hash are kept."""

    def __init__(self, start: int, key: bytes) -> None:
        self.start = self.end = start
        self.kind = ""
        self.rest: re.Pattern[str] | None = None
        self._best = (-1, 0, 0)
        self._hash = hmac.new(key, digestmod=hashlib.sha256) if key else None
        self._first = self._last = ""
        self._length = 0

    def add(self, kind: str, rank: int, start: int, end: int, rest: re.Pattern[str] | None) -> None:
        """A match that is part of it. The longest names it, of equal ones the first, of those the one of the lowest rank."""
        better = (end - start, -start, -rank)
        if rank == UNCLEAR:
            better = (0, 0, 0)
        if better > self._best:
            self._best, self.kind = better, kind
        self.end = max(end, self.end)
        if rest is not None and (self.rest is None or len(self.rest.pattern) < len(rest.pattern)):
            self.rest = rest

    def read(self, text: str) -> None:
        """Its next characters."""
        plain = significant(text)
        if self._hash is not None:
            self._hash.update(plain.casefold().encode(errors="surrogatepass"))
        if len(self._first) < MAX_KEPT:
            self._first = (self._first + plain)[:MAX_KEPT]
        self._last = (self._last + plain)[-MAX_KEPT:]
        self._length += len(plain)

    def stars(self, first: int, last: int) -> str:
        """Its first and last characters with stars between; stars alone if those were fewer than four, or than a third."""
        if self._length - first - last < max(4, self._length / 3):
            first = last = 0
        hidden = min(self._length - first - last, _STARS)
        return self._first[:first] + "*" * hidden + (self._last[-last:] if last else "")

    def hashed(self) -> str:
        """The first digits of its HMAC-SHA256."""
        return self._hash.hexdigest()[:_HASH_DIGITS] if self._hash is not None else ""


Conceal = Callable[[Concealed], str]


def placeholder(text: str) -> Conceal:
    """Conceals by a text."""
    return lambda secret: text


def mask(first: int, last: int) -> Conceal:
    """Conceals by stars but for some characters at the ends."""
    return lambda secret: secret.stars(first, last)


def hash_of(name: str) -> Conceal:
    """Conceals by a keyed hash."""
    return lambda secret: f"[{name}:{secret.hashed()}]"


# Ordinary text, read once when rules are compiled: so the automaton has learned most of what it needs before the first answer.

PIECES = re.compile(r" ?[A-Za-z]+|[0-9]|[^\W0-9a-zA-Z]{1,2}|\s+(?=\s)| ?[^\w\s]+|\s", re.S)
"""A text is read in pieces as most tokenizers make: a word with the blank before it, a digit, one or two Chinese characters, signs."""

ENGLISH = """
The quick answer is yes: you can use it with any other model that we have made so far, but there are a few things which you should
know about before you start. First, make sure that the device has enough free memory. Then open the file, read the header, and check
what it says; if something is wrong, try again or ask for help. I don't think it's a problem, but we'll see. He said that his mother
would have liked to go there last year, when they were still young. "Why not?" she asked, looking at the old house by the river.
People often want to find out how much work these systems can really do, and how long they take. Because of this, every question
needs its own kind of answer.

Here is an example. Water, light and air are important for life on Earth. In general, plants use energy from the sun to make sugar;
this process is called photosynthesis. However, the world around us is changing quickly, and many different countries must learn to
live together. Those who understand history, science, music and language will probably be better prepared for the future than
others. Once upon a time, in a small village near the mountains, a little girl found a beautiful golden bird. "Please, let me go,"
it cried. Although she was only eight, she knew exactly what to do next. Perhaps nobody else could've done that!

## Steps to follow

1. **Install** the package: run `pip install numpy` or `sudo apt-get update` in your terminal.
2. Create a new folder, for instance `my_project/src`, and write down the following code:

```python
def main(items: list[str], count=10) -> None:
    for i, item in enumerate(items):
        if item == "x" and count > 0:
            print(f"{i + 1}: {item}")  # shows 3 of 25
            return self.value[0] * 2.5
```

- Note: between 1990 and 2024 the population grew by 12.5%, from 3,400 to about $7,250 per month (see page 48).
- You're welcome to visit https://www.example.com/docs/index.html?id=7 on Monday, March 15, at 10:30 a.m. (UTC+8).

| Name | Type | Value |
|---|---|---|
| size | integer | 64 MB |

However, it is worth keeping in mind that results may vary. Additionally, several factors, including temperature, weather, business,
government and education, affect performance. Overall, I hope this information helps. Let me know if you'd like to hear more. Best
regards, Kim
"""

CHINESE = """
当然可以。首先，我们需要了解这个问题的背景：人工智能是一种让机器能够像人一样学习、思考和解决问题的技术。它在医疗、教育、金融、交通等方面
都有很多应用，例如图像识别、语音助手和自动驾驶。其次，由于数据的质量会直接影响结果，所以应该先检查文件是否完整，然后再开始下一步操作。
如果你还有其他疑问，请随时告诉我，我会尽力帮助你！他说：“昨天下午三点，孩子们在公园里玩得非常高兴。”那时候天气很好，太阳照在大海上，
风轻轻地吹着，远处的山看起来特别美丽。虽然工作比较忙，但是她每天都坚持锻炼身体，早上跑步，晚上看书。中国有五千多年的历史，文化丰富多样；
许多年轻人喜欢喝茶、听音乐、做饭，也喜欢到不同的城市旅行。总之，为了实现目标，必须制定合理的计划，提高效率，并且不断总结经验。
以下是几点建议：（1）选择合适的方法；（2）使用最新版本的软件；（3）注意安全，保护个人隐私。第2章共有35页，价格为99.8元，比去年增长了6%。
希望这些内容对您有所帮助，谢谢！运行模型时内存不足怎么办？可以把参数改小，或者用4位量化。这样既能减少占用，又不会明显降低速度与精度。
"""

SECRETS = """
Call +44 20 7946 0958 or 13912345678, mail a.b@example.com, host 10.0.0.1 or fe80::1, 2024-05-11 10:32:11, version 1.2.3.
"""


# The post-processor: runs the automaton over a stream, and lets out what is in no match and can no longer come into one.
#
# A character is concealed if and only if it is in a match of some pattern that the pattern's check accepts. That says nothing of how the
# text was split, and neither can the result. Matches that overlap are concealed as one, by the name of the longest.

CONTEXT = 48
"""Characters before a match that its check may look at."""
LIMIT = 384
"""Characters that something may take to become a match. Every pattern is decided long before unless its characters are drawn far apart, by
characters that are passed over; then what was held is concealed without knowing what it is."""
RUN_LIMIT = 128
"""Characters after which a run of letters, of which an e-mail address or a token may be made, is judged as it is."""
_CHUNK = 64
_JUMP, _FEW_DIGITS = 12, 3
_WORD = "(?:[A-Z]?[a-z]+|[A-Z]+|[0-9]+)"
_ORDINARY = re.compile(f"{_WORD}?(?:[^A-Za-z0-9]+{_WORD})*[^A-Za-z0-9]*")
_KEPT = 8 * CONTEXT
_SHORT = 4

Check = Callable[[str, str], "tuple[str, int, int] | None"]
"""Given a match and up to CONTEXT characters before it, as they are seen: the kind of secret and where in the match it begins and ends."""


class Pattern(NamedTuple):
    """A way to find secrets of a kind.

    ``check``: whether a match is one (None: it is). ``rest``: characters that are concealed as well if they follow directly, so that a
    long secret need not be held to its end; ``run_rest``: the same after a run that was judged before its end. ``sure``: even its first
    letters are concealed where the text is cut. ``stop``: what ends it, in characters as they are written.
    """

    kind: str
    check: Check | None = None
    rest: re.Pattern[str] | None = None
    run_rest: re.Pattern[str] | None = None
    sure: bool = False
    stop: re.Pattern[str] | None = None


class ScanPlan(NamedTuple):
    """Rules, compiled; the same for all streams.

    ``conceal``: how, by kind. ``ranks``: which kind names a secret that is two. ``key``: of hashes. ``cut_text``: stands for what a cut
    leaves unclear; None: that is shown.
    """

    automaton: Automaton
    patterns: tuple[Pattern, ...]
    conceal: Mapping[str, Conceal]
    ranks: Mapping[str, int]
    key: bytes
    cut_text: str | None


class Redactor:
    """One stream."""

    def __init__(self, plan: ScanPlan) -> None:
        self._plan, self._automaton = plan, plan.automaton
        self._state: State = plan.automaton.start
        self._starts: list[int] = []  # where what may become a match began, for each set of the state's row
        self._text, self._base = "", 0  # what is still needed of the text, and where it begins
        self._read = 0  # up to where the automaton has read
        self._sent = 0  # up to where the text is answered for
        self._matched = False  # did a match end since this was set
        self._found: dict[tuple[int, str], tuple[int, re.Pattern[str] | None]] = {}  # (begin, kind) -> end, rest
        self._open: Concealed | None = None
        self._counts: dict[str, int] = {}

    @property
    def held(self) -> str:
        """Text it was fed and has not answered for yet."""
        return self._text[self._sent - self._base :]

    @property
    def counts(self) -> Mapping[str, int]:
        """How many secrets of each kind it concealed; ``cut``: what a cut left unclear, ``unclear``: see LIMIT."""
        return self._counts

    def feed(self, text: str) -> str:
        """Take more text and return what is in no secret."""
        jump = self._state.jumps.get(text)
        if jump is None or self._found or self._open is not None:
            return self._feed(text)
        # As _feed, for a short text in which nothing is found: few steps, as after a step of the model each waits for memory.
        starts, read = self._starts, self._read
        safe = end = read + len(text)
        if starts and end - min(starts) >= RUN_LIMIT:
            return self._feed(text)
        self._state, keep = jump
        if keep is not None:
            self._starts = starts = [starts[i] if i >= 0 else read + ~i for i in keep] if keep else []
        self._read = end
        if starts:
            safe = min(starts)
        self._text = whole = self._text + text
        sent, base = self._sent, self._base
        if safe <= sent:
            return ""
        self._sent = safe
        if safe - base > _KEPT:
            self._text, self._base = whole[safe - base - CONTEXT :], safe - CONTEXT
        return whole[sent - base : safe - base]

    def _feed(self, text: str) -> str:
        """As ``feed``, whatever the text."""
        state, starts, read = self._state, self._starts, self._read
        short = len(text) <= _JUMP and (not starts or read + len(text) - min(starts) < RUN_LIMIT)
        self._matched = False
        if short and len(text) > 1 and text[0] == " ":  # what a word does after a blank is known from more places
            sent = self.feed(" ")
            matched = self._matched
            sent += self.feed(text[1:])
            self._matched |= matched
        else:
            sent = self._read_on(text, short)
        if short and not self._matched:
            self._learn(state, starts, read, text)
        return sent

    def _read_on(self, text: str, short: bool) -> str:
        self._text += text
        (self._run if short else self._advance)(text)
        safe = min(self._starts) if self._starts else self._read
        sent = self._let_out(safe) if self._found or self._open is not None else self._take(safe)
        if self._sent - self._base > _KEPT:
            self._text = self._text[self._sent - self._base - CONTEXT :]
            self._base = self._sent - CONTEXT
        return sent

    def _learn(self, state: State, starts: list[int], read: int, text: str) -> None:
        """Keep for all streams what a text does, unless it may tell of a secret: what stands after a label, or is no words."""
        if self._state.tells is None:
            owners = (owner for i in range(len(self._starts)) for owner in self._automaton.owners(self._state, i))
            self._state.tells = any(self._plan.patterns[owner].sure for owner in owners)
        if self._state.tells or _ORDINARY.fullmatch(text) is None or sum(map(str.isdigit, text)) > _FEW_DIGITS:
            return
        keep = tuple(starts.index(start) if start < read else read - 1 - start for start in self._starts)
        self._automaton.learn(state, text, (self._state, None if self._starts == starts else keep))

    def flush(self) -> str:
        """The text is complete: return the rest. What only might have become a secret is none."""
        self._end_matches()
        return self._finish()

    def cut(self, following: str) -> str:
        """The text ends in the middle: return the rest without what may be the beginning of a secret.

        What follows is read on, so that what it ends is judged as complete. But what is shown ends here, so it is judged by itself, too.
        """
        end = self._read
        self._end_matches()
        self._text += following
        self._advance(following)
        self._end_matches()
        if self._plan.cut_text is not None:
            self._conceal_unclear(end)
        self._found = {(a, kind): (min(b, end), rest) for (a, kind), (b, rest) in self._found.items() if a < end}
        self._text, self._read = self._text[: end - self._base], end
        return self._finish()

    def _finish(self) -> str:
        rest = self._let_out(self._read) + self._close()
        self._state, self._starts = self._automaton.start, []
        return rest

    def _conceal_unclear(self, end: int) -> None:
        """Conceal what may still become a match and began before the end; but no signs alone, and no word too short to tell anything."""
        for start, index in sorted((start, index) for index, start in enumerate(self._starts)):
            piece = significant(self._text[start - self._base : end - self._base])
            told = sum(map(str.isalnum, piece))
            sure = any(self._plan.patterns[owner].sure for owner in self._automaton.owners(self._state, index))
            if start < end and (sure or (told and (told >= _SHORT or not piece.isalpha()))):
                self._found[start, "cut"] = (end, None)
                return

    # ---- reading -----------------------------------------------------------------------------------------------------

    def _advance(self, text: str) -> None:
        """Run the automaton over text that was appended."""
        for at in range(0, len(text), _CHUNK):
            chunk = text[at : at + _CHUNK]
            if self._starts and self._read + len(chunk) - min(self._starts) >= RUN_LIMIT:
                for char in chunk:
                    self._run(char)
                    if self._starts and self._read - min(self._starts) >= RUN_LIMIT:
                        self._shorten()
            else:
                self._run(chunk)

    def _run(self, text: str) -> None:
        """As ``_advance``, for text in which nothing that began gets longer than RUN_LIMIT."""
        automaton, state, known, position = self._automaton, self._state, self._automaton.of.get, self._read
        for char in text:
            read = known(char, _NEW)
            if read is _NEW:
                read = automaton.classify(char)
            if read is not None:  # else it is passed over
                state, move = state.moves.get(read) or automaton.move(state, read)
                if move is not None:
                    self._change(move, position)
            position += 1
        self._state, self._read = state, position

    def _change(self, move: Move, position: int) -> None:
        """What began goes on, or not, and matches ended before a position."""
        starts = self._starts
        for index, number in move.matches:
            self._matched = True
            pattern = self._plan.patterns[number]
            self._judge(starts[index], position, pattern, pattern.rest)
        new = len(starts)
        self._starts = [starts[i] if i < new else position for i in move.keep]

    def _end_matches(self) -> None:
        """Judge the matches that end with the text."""
        _, move = self._automaton.move(self._state, None)
        if move is not None:
            for index, number in move.matches:
                pattern = self._plan.patterns[number]
                self._judge(self._starts[index], self._read, pattern, pattern.rest)

    def _judge(self, start: int, end: int, pattern: Pattern, rest: re.Pattern[str] | None) -> None:
        kind = pattern.kind
        if pattern.check is not None:
            at = start - self._base
            verdict = pattern.check(view(self._text[at : end - self._base]), view(self._text[max(0, at - CONTEXT) : at]))
            if verdict is None or verdict[0] not in self._plan.conceal:
                return
            kind, first, last = verdict
            start, end = start + first, start + last
        longest, known = self._found.get((start, kind), (0, None))
        if pattern.stop is not None:
            stop = pattern.stop.search(self._text, start + 1 - self._base, end - self._base)
            if stop is not None:
                end, rest = stop.start() + self._base, None
        if end > longest or (end == longest and known is None):
            self._found[start, kind] = (end, rest)

    def _shorten(self) -> None:
        """Something that began is long. A run is judged as it is and then taken to begin later; if another is too long for any secret,
        conceal it all and begin anew.
        """
        for index, start in enumerate(self._starts):
            if self._read - start < RUN_LIMIT:
                continue
            if self._automaton.may_slide(self._state, index):
                for owner in self._automaton.owners(self._state, index):
                    pattern = self._plan.patterns[owner]
                    if pattern.run_rest is not None:
                        self._judge(start, self._read, pattern, pattern.run_rest)
                self._starts[index] = self._read - RUN_LIMIT // 2
            elif self._read - start >= LIMIT:
                self._found[start, "unclear"] = (self._read, None)
                self._state, self._starts = self._automaton.empty(self._state), []
                return

    # ---- letting out -------------------------------------------------------------------------------------------------

    def _let_out(self, safe: int) -> str:
        """Text up to a position before which nothing can begin any more, without the secrets."""
        out = []
        found = sorted(self._found.items(), reverse=True)
        while True:
            secret = self._open
            if secret is None:
                start = min(found[-1][0][0] if found else safe, safe)
                out.append(self._take(start))
                if start == safe:
                    break
                secret = self._open = Concealed(start, self._plan.key)
            while found and found[-1][0][0] < max(secret.end, secret.start + 1):
                self._add(secret, *found.pop())
            secret.read(self._take(min(secret.end, safe)))
            if self._sent < secret.end:
                break
            if secret.rest is not None:
                limit = min(found[-1][0][0] if found else safe, safe)
                secret.read(self._take(self._rest_end(secret.rest, limit)))
                if self._sent == safe:
                    break  # more of the rest may come
                if self._sent == limit < self._rest_end(secret.rest, limit + 1):
                    self._add(secret, *found.pop())
                    continue
            out.append(self._close())
        return "".join(out)

    def _add(self, secret: Concealed, where: tuple[int, str], how: tuple[int, re.Pattern[str] | None]) -> None:
        """A match that was found is part of a secret."""
        (start, kind), (end, rest) = where, how
        secret.add(kind, self._plan.ranks.get(kind, UNCLEAR), start, end, rest)
        del self._found[where]

    def _rest_end(self, rest: re.Pattern[str], limit: int) -> int:
        """Up to where the rest of a secret goes on from here, a limit at most."""
        match = rest.match(self._text, self._sent - self._base, limit - self._base)
        return self._sent if match is None else match.end() + self._base

    def _take(self, end: int) -> str:
        """The text up to a position, which is answered for with this."""
        start, self._sent = self._sent, max(end, self._sent)
        return self._text[start - self._base : self._sent - self._base]

    def _close(self) -> str:
        """What stands for the secret that is open, if one is."""
        secret, self._open = self._open, None
        if secret is None:
            return ""
        self._counts[secret.kind] = self._counts.get(secret.kind, 0) + 1
        if secret.kind == "cut":
            return self._plan.cut_text or ""
        return self._plan.conceal[secret.kind](secret)


_NEW = Class(-1, "", "")
