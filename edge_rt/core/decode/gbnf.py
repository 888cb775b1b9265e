"""Parses GBNF, the language of libllama's grammars, into rules that grammar_check.py looks at.

Takes what llama_grammar_parser (ggml 0.25.3) takes and expands repetitions as it does, but tells line and column, and refuses
``x{3,2}``, on which libllama loops 2^64 times, too deep nesting, and too much text. It also refuses three slips that libllama
takes without a word: an empty class ``[]`` (it means nothing at all), a backward range ``[z-a]`` (it matches nothing), and a rule
defined twice (the first is lost).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from edge_rt.errors import ConstraintError

MAX_REPETITIONS = 2000  # libllama's MAX_REPETITION_THRESHOLD
MAX_NESTING = 200
MAX_ELEMENTS = 500_000

# Elements of a rule, flattened as libllama does: a reference to a rule is its number, terminal n is TERMINAL - n.
ALT, MORE, TERMINAL = -1, -2, -3  # MORE: the rest of a character class

Terminal = tuple[tuple[int, int], ...]
"""Ranges of code points, both ends included, that it stands for. A <token> has none: it is no character."""
_ANY: Terminal = ((0, 0x10FFFF),)

_WORD = re.compile(r"[a-zA-Z0-9-]+")
_DIGITS = re.compile(r"[0-9]+")
_HEX = {"x": 2, "u": 4, "U": 8}
_ESCAPES = {"t": "\t", "r": "\r", "n": "\n", "\\": "\\", '"': '"', "[": "[", "]": "]", "-": "-"}


@dataclass(slots=True)
class Rule:
    """A rule; ``elements`` is None while it is only used."""

    name: str
    used_at: int
    elements: list[int] | None = None


@dataclass(slots=True)
class Parser:
    """Recursive descent over the text; ``at`` is the position. Mirrors llama_grammar_parser."""

    text: str
    is_token: Callable[[str], bool]
    at: int = 0
    rules: list[Rule] = field(default_factory=list)
    terminals: list[Terminal] = field(default_factory=list)
    tokens: dict[int, str] = field(default_factory=dict)  # element -> the <token> or !<token> it stands for
    numbers: dict[str, int] = field(default_factory=dict)
    elements: int = 0
    depth: int = 0

    def fail(self, what: str, at: int | None = None) -> ConstraintError:
        """The error at a position (default: the current one)."""
        at = self.at if at is None else at
        line, column = self.text.count("\n", 0, at) + 1, at - self.text.rfind("\n", 0, at)
        return ConstraintError(f"the grammar does not parse: {what} at line {line}, column {column}; see llama.cpp's grammars/README.md")

    def peek(self) -> str:
        return self.text[self.at] if self.at < len(self.text) else ""

    def space(self, newline: bool) -> None:
        """Skip blanks and comments, and line ends where they do not end the rule."""
        blanks = " \t\r\n" if newline else " \t"
        while (c := self.peek()) and (c in blanks or c == "#"):
            if c == "#":
                ends = [at for at in (self.text.find("\n", self.at), self.text.find("\r", self.at)) if at >= 0]
                self.at = min(ends, default=len(self.text))
            else:
                self.at += 1

    def number(self, name: str, at: int) -> int:
        """The number of a named rule."""
        if name not in self.numbers:
            self.numbers[name] = len(self.rules)
            self.rules.append(Rule(name, at))
        return self.numbers[name]

    def made_up(self, base: str, elements: list[int] | None = None) -> int:
        """A rule without a name of its own."""
        self.count(len(elements or ()))
        self.rules.append(Rule(base, self.at, elements))
        return len(self.rules) - 1

    def terminal(self, ranges: Terminal) -> int:
        """The element of a new terminal."""
        self.terminals.append(ranges)
        return TERMINAL - len(self.terminals) + 1

    def count(self, n: int) -> None:
        self.elements += n
        if self.elements > MAX_ELEMENTS:
            raise ConstraintError(f"the grammar grows to more than {MAX_ELEMENTS:,} elements; repeat less, or shorter parts")

    def parse(self) -> None:
        """Fill ``rules``, ``root`` among them."""
        self.space(True)
        while self.peek():
            self.rule()
        for rule in self.rules:
            if rule.elements is None:
                raise self.fail(f"rule {rule.name!r} is not defined but used", rule.used_at)
        if "root" not in self.numbers:
            raise ConstraintError("the grammar has no rule named root; name its start so: root ::= ...")

    def rule(self) -> None:
        start = self.at
        name = self.match(_WORD, "expecting the name of a rule (letters, digits and -)")
        number = self.number(name, start)
        if self.rules[number].elements is not None:
            raise self.fail(f"rule {name!r} is defined a second time", start)
        self.space(False)
        if not self.text.startswith("::=", self.at):
            raise self.fail("expecting ::=")
        self.at += 3
        self.space(True)
        elements = self.alternates(name, nested=False)
        self.rules[number].elements = elements
        self.count(len(elements))
        if self.peek() not in ("", "\r", "\n"):
            raise self.fail("expecting the end of the line")
        self.space(True)

    def match(self, pattern: re.Pattern[str], otherwise: str) -> str:
        found = pattern.match(self.text, self.at)
        if not found:
            raise self.fail(otherwise)
        self.at = found.end()
        return found.group()

    def alternates(self, name: str, nested: bool) -> list[int]:
        elements: list[int] = []
        self.sequence(name, elements, nested)
        while self.peek() == "|":
            self.at += 1
            elements.append(ALT)
            self.space(True)
            self.sequence(name, elements, nested)
        return elements

    def sequence(self, name: str, elements: list[int], nested: bool) -> None:
        """One alternative, appended to ``elements``."""
        start, multiple = len(elements), 1  # of the last symbol: its first element, and the rules it stands for
        while c := self.peek():
            if c in "*+?{":
                at = self.at
                low, high = self.quantifier(nested)
                if start == len(elements):
                    raise self.fail(f"nothing to repeat before {c}", at)
                times = high if high else low or 1
                if multiple * times > MAX_REPETITIONS:
                    raise self.fail(f"more than {MAX_REPETITIONS} repetitions, or repetitions of them,", at)
                self.repeat(name, elements, start, low, high)
                multiple *= times
                continue
            symbol = self.symbol(c, name)
            if symbol is None:
                return
            start, multiple = len(elements), symbol[1]
            elements.extend(symbol[0])
            self.space(nested)

    def symbol(self, c: str, name: str) -> tuple[list[int], int] | None:
        """The elements of the symbol at the position, and the rules it stands for; None where no symbol starts."""
        if c == '"':
            return self.literal(), 1
        if c == "[":
            return self.character_class(), 1
        if c in "<!":
            return [self.token()], 1
        if c == ".":
            self.at += 1
            return [self.terminal(_ANY)], 1
        if c == "(":
            before = len(self.rules)
            number = self.group(name)
            return [number], max(1, len(self.rules) - before)
        if found := _WORD.match(self.text, self.at):
            at, self.at = self.at, found.end()
            return [self.number(found.group(), at)], 1
        return None

    def group(self, name: str) -> int:
        opened = self.at
        self.depth += 1
        if self.depth > MAX_NESTING:
            raise self.fail(f"more than {MAX_NESTING} nested parentheses")
        self.at += 1
        self.space(True)
        number = self.made_up(name)
        elements = self.alternates(name, nested=True)
        self.rules[number].elements = elements
        self.count(len(elements))
        if self.peek() != ")":
            raise self.fail("expecting )") if self.peek() else self.fail("this ( is never closed", opened)
        self.at += 1
        self.depth -= 1
        return number

    def literal(self) -> list[int]:
        opened, elements = self.at, []
        self.at += 1
        while self.peek() != '"':
            code = self.character(opened)
            elements.append(self.terminal(((code, code),)))
        self.at += 1
        return elements

    def character_class(self) -> list[int]:
        opened, n = self.at, 0
        negated = self.text.startswith("[^", self.at)
        self.at += 2 if negated else 1
        ranges = []
        while self.peek() != "]":
            low = high = self.character(opened)
            n += 1
            if self.peek() == "-" and not self.text.startswith("-]", self.at):
                at = self.at
                self.at += 1
                high = self.character(opened)
                n += 1
                if high < low:
                    raise self.fail("this range runs backwards", at)
            ranges.append((low, high))
        self.at += 1
        if not n:
            raise self.fail("this character class is empty", opened)
        return [self.terminal(complement(ranges) if negated else tuple(ranges)), *[MORE] * (n - 1)]

    def character(self, opened: int) -> int:
        """One character of a literal or class, escapes resolved."""
        c = self.peek()
        if not c:
            raise self.fail(f"this {self.text[opened]} is never closed", opened)
        self.at += 1
        if c != "\\":
            return ord(c)
        escape = self.peek()
        if escape in _ESCAPES and escape:
            self.at += 1
            return ord(_ESCAPES[escape])
        digits = _HEX.get(escape)
        code = self.text[self.at + 1 : self.at + 1 + (digits or 0)]
        if not digits or len(code) < digits or re.search(r"[^0-9a-fA-F]", code):
            raise self.fail(f"unknown or incomplete escape \\{escape}", self.at - 1)
        self.at += 1 + digits
        return int(code, 16)

    def token(self) -> int:
        """A token: <[id]> or <its name>, after ! any other."""
        start = self.at
        self.at += self.peek() == "!"
        at = self.at
        if self.peek() != "<":
            raise self.fail("expecting <token> after !")
        end = self.text.find(">", at)
        if end < 0:
            raise self.fail("this < is never closed", at)
        self.at = end + 1
        name = self.text[at : self.at]
        if name.startswith("<["):
            if not re.fullmatch(r"<\[[0-9]{1,9}\]>", name, re.ASCII):
                raise self.fail("expecting a token number as in <[123]>", at)
        elif not self.is_token(name):
            raise self.fail(f"{name!r} is not one token of this model", at)
        element = self.terminal(())
        self.tokens[element] = self.text[start : self.at]
        return element

    def quantifier(self, nested: bool) -> tuple[int, int | None]:
        """(least, most) of * + ? {n} {n,} {n,m}; most None: without limit."""
        c = self.text[self.at]
        self.at += 1
        self.space(nested)
        if c != "{":
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[c]
        low = self.times(nested)
        high: int | None = low
        if self.peek() == ",":
            self.at += 1
            self.space(nested)
            high = self.times(nested) if _DIGITS.match(self.text, self.at) else None
        if self.peek() != "}":
            raise self.fail("expecting } or ,")
        at = self.at
        self.at += 1
        self.space(nested)
        if low > MAX_REPETITIONS:
            raise self.fail(f"more than {MAX_REPETITIONS} repetitions", at)
        if high is not None and high < low:
            raise self.fail(f"at least {low} repetitions but at most {high}", at)
        return low, None if high is not None and high > MAX_REPETITIONS else high  # as libllama does

    def times(self, nested: bool) -> int:
        digits = self.match(_DIGITS, "expecting a number of repetitions")
        self.space(nested)
        return int(digits) if len(digits) < 10 else 10**9

    def repeat(self, name: str, elements: list[int], start: int, low: int, high: int | None) -> None:
        """Rewrite the symbol that begins at ``start`` as libllama does: S{m,n} is m times S, then n - m nested optional ones."""
        part = elements[start:]
        optional = 1 if high is None else high - low
        self.count(len(part) * max(0, low - 1) + (len(part) + 2) * optional)
        if low == 0:
            del elements[start:]
        else:
            elements.extend(part * (low - 1))
        last = -1
        for i in range(optional):
            number = self.made_up(name)
            again = [number] if high is None else [last] if i else []
            self.rules[number].elements = [*part, *again, ALT]
            last = number
        if optional:
            elements.append(last)


def complement(ranges: Iterable[tuple[int, int]]) -> Terminal:
    """The code points that are in none of the ranges."""
    result, start = [], 0
    for low, high in sorted(ranges):
        if low > start:
            result.append((start, low - 1))
        start = max(start, high + 1)
    if start <= 0x10FFFF:
        result.append((start, 0x10FFFF))
    return tuple(result)
