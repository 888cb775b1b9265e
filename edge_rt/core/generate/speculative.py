"""Drafts from the text itself: what followed the last few tokens when they occurred before.

Extraction, code and summaries repeat their prompt; there several drafted tokens are accepted per step. Elsewhere drafts are wrong, and
each costs the rows that verify it: the drafter watches what becomes of its drafts and falls silent for a while after failures.
How long a draft should be follows from how often a drafted token is right and what a row more adds to a step, both measured all the time.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

LONGEST, SHORTEST = 4, 2  # tokens compared
LOOK_BACK = 64  # earlier occurrences of the last two tokens looked at: bounds the cost of a draft
MOST = 1 << 30
TRUST = {2: 2, 3: 4, 4: MOST}  # tokens drafted after a match of this length
MAX_PAUSE = 64  # tokens
RETRY = 32  # drafts that do not pay before one is tried all the same


class Worth:
    """How many drafted tokens pay.

    With m drafted tokens, each right with probability p if those before it were, a step gives (1 - p^(m+1)) / (1 - p) tokens on average
    (Leviathan, Kalman and Matias 2023, "Fast Inference from Transformers via Speculative Decoding", equation 1), and takes as long as one
    without and what m rows add. The best m has the most tokens a second.
    """

    def __init__(self) -> None:
        self._right = 0.8
        self._single = self._row = 0.0  # seconds: of a step of one token, and of each more
        self._skipped = 0

    def judged(self, right: bool) -> None:
        """A drafted token was right, or not."""
        self._right += (right - self._right) / 16

    def took(self, rows: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        if rows == 1:
            self._single += (min(seconds, 4 * self._single) - self._single) / 8 if self._single else seconds
        elif self._single:
            row = max(0.0, seconds - self._single) / (rows - 1)
            self._row += (min(row, 4 * self._row) - self._row) / 8 if self._row else row

    def most(self, limit: int) -> int:
        """The best number, up to ``limit``; that itself as long as nothing is known."""
        if not self._single or not self._row:
            return limit
        best, best_rate, tokens, chance, right = 0, 1 / self._single, 1.0, 1.0, min(self._right, 0.99)
        for m in range(1, limit + 1):
            chance *= right
            tokens += chance
            rate = tokens / (self._single + m * self._row)
            if rate <= best_rate:  # it rises, and then falls
                break
            best, best_rate = m, rate
        if best:
            return best
        self._skipped += 1
        return min(limit, 1) if self._skipped % RETRY == 0 else 0


class NgramDrafter:
    """Prompt and generated tokens of one sequence, indexed by pairs; each pair is chained to its earlier occurrence.

    A token costs one dictionary entry at most and 8 bytes; ``draft`` costs the same however long the text is.
    """

    def __init__(self) -> None:
        self._tokens = array("i")
        self._earlier = array("i")  # per token: where the pair that ends with it ended before, -1: nowhere
        self._last: dict[tuple[int, int], int] = {}  # pair -> where it ended last
        self._draft: list[int] = []  # what is not yet confirmed or refuted of the last draft
        self._drafted = 0  # its length at first
        self._limit = MOST  # tokens a draft may have, by experience
        self._failures = 0
        self._pause = 0  # tokens to wait before the next draft
        self._worth = Worth()

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Take tokens that are certain: the prompt, then what was sampled. Tells also how the last draft fared."""
        for token in tokens:
            if self._draft:
                self._judge(token)
            elif self._pause:
                self._pause -= 1
            end = len(self._tokens)
            self._tokens.append(token)
            if not end:
                self._earlier.append(-1)
                continue
            pair = (self._tokens[end - 1], token)
            self._earlier.append(self._last.get(pair, -1))
            self._last[pair] = end

    def _judge(self, token: int) -> None:
        """Compare a sampled token with the one drafted for its place."""
        self._worth.judged(token == self._draft[0])
        if token == self._draft[0]:
            del self._draft[0]
            self._failures = 0
            if not self._draft:
                self._limit = min(MOST, 2 * self._limit)
            return
        accepted = self._drafted - len(self._draft)
        self._limit = max(2, accepted + 1)
        if not accepted:
            self._failures += 1
            self._pause = min(MAX_PAUSE, 2**self._failures)
        self._draft = []

    def took(self, rows: int, seconds: float) -> None:
        """A step of so many tokens, one certain and the others drafted, took so long."""
        self._worth.took(rows, seconds)

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first ``length``."""
        while len(self._tokens) > max(length, 0):
            end = len(self._tokens) - 1
            token, earlier = self._tokens.pop(), self._earlier.pop()
            if not end:
                continue
            pair = (self._tokens[end - 1], token)
            if earlier < 0:
                del self._last[pair]
            else:
                self._last[pair] = earlier
        self._draft = []

    def draft(self, max_tokens: int) -> list[int]:
        """At most ``max_tokens`` tokens that may follow; empty where nothing suggests any, or drafts have failed lately."""
        self._draft = []
        if self._pause or len(self._tokens) < SHORTEST + 1:
            return []
        start, length = self._match()
        if not length:
            return []
        period = len(self._tokens) - start  # past the end the text is taken to repeat itself
        n = self._worth.most(min(max_tokens, TRUST[length], self._limit))
        self._draft = [self._tokens[start + i % period] for i in range(n)]
        self._drafted = len(self._draft)
        return list(self._draft)

    def _match(self) -> tuple[int, int]:
        """Where the text goes on after the best earlier occurrence of its end, and the tokens that agree (0: there is none).

        The longest agreement wins, up to LONGEST; of several, the latest.
        """
        tokens, end = self._tokens, len(self._tokens) - 1
        best, best_length = 0, 0
        at = self._earlier[end]
        for _ in range(LOOK_BACK):
            if at < 0:
                break
            length = SHORTEST
            while length < LONGEST and at >= length and tokens[at - length] == tokens[end - length]:
                length += 1
            if length > best_length:
                best, best_length = at + 1, length
                if length == LONGEST:
                    break
            at = self._earlier[at]
        return best, best_length
