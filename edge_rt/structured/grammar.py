"""Grammars and JSON schemas that constrain what a model writes: GBNF parsed and checked before libllama gets it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edge_rt.errors import ConstraintError, OptionError
from edge_rt.native.samplers import Grammar as Constraint

if TYPE_CHECKING:
    from edge_rt.native.llama import Vocab

# Parses GBNF, the language of libllama's grammars, into rules that grammar_check.py looks at.
#
# Takes what llama_grammar_parser (ggml 0.25.3) takes and expands repetitions as it does, but tells line and column, and refuses
# ``x{3,2}``, on which libllama loops 2^64 times, too deep nesting, and too much text. It also refuses three slips that libllama
# takes without a word: an empty class ``[]`` (it means nothing at all), a backward range ``[z-a]`` (it matches nothing), and a rule
# defined twice (the first is lost).

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


# Refuses grammars that libllama would not survive.
#
# libllama (ggml 0.25.3) looks for left recursion in time exponential in nested alternatives, misses it behind a rule that only
# another rule makes empty (then its stacks grow for ever), and keeps every way a text can go on as a stack of its own. Grammars
# whose rules can begin in very many ways are therefore refused here, before it sees them. How many stacks a text can lead to
# later cannot be computed, so it is tried: a walk that always takes the character that leads to most stacks finds the grammars
# where they multiply (``root ::= "a" root "b" | "a" root "c" | "a"`` has 2^n after n times a).

MAX_PATHS = 50_000  # ways a rule can begin: stacks at that point
MAX_DEPTH = 3_000  # calls of libllama's recursive check
MAX_VISITS = 5_000_000  # its steps
MAX_STACKS = 300  # a choice among 49,152 tokens takes seconds then; llama.cpp's sample grammars reach 12
TOKEN = 12  # characters; a long token
MAX_TRIES = 20_000  # libllama follows every path through a token by itself, even where they lead to the same stack
WALK = 10_000  # steps of the walk, about 10 ms
_APART = "keep characters and tokens apart"
_REMEDY = "give its alternatives distinct beginnings"


def _alternatives(rule: Rule) -> Iterator[list[int]]:
    alternative: list[int] = []
    for element in rule.elements or ():
        if element == ALT:
            yield alternative
            alternative = []
        elif element != MORE:
            alternative.append(element)
    yield alternative


def check_grammar(text: str, is_token: Callable[[str], bool]) -> None:
    """Raise ConstraintError unless libllama can parse and run this grammar; ``is_token`` knows names of control tokens."""
    if "\0" in text:
        raise ConstraintError("the grammar contains a NUL character; write it as \\x00")
    for i, c in enumerate(text):
        if 0xD800 <= ord(c) < 0xE000:
            raise ConstraintError(f"the grammar holds half of a surrogate pair at character {i}; write the whole character")
    if len(text) > MAX_ELEMENTS:
        raise ConstraintError(f"the grammar is {len(text):,} characters long, more than {MAX_ELEMENTS:,}; use a smaller one")
    if not re.sub(r"#[^\r\n]*", "", text).strip(" \t\r\n"):
        raise ConstraintError("the grammar is empty; leave it out, or write root ::= ...")
    parser = Parser(text, is_token)
    parser.parse()
    alternatives = [list(_alternatives(rule)) for rule in parser.rules]
    empty = _nullable(alternatives)
    _check_recursion(parser.rules, _first(alternatives, empty))
    if parser.tokens:
        _check_tokens(parser, alternatives, empty)
    _Walk(alternatives, parser.terminals).go(parser.numbers["root"])


def _nullable(alternatives: list[list[list[int]]]) -> list[bool]:
    """Which rules can stand for no text at all."""
    users: list[list[tuple[int, int]]] = [[] for _ in alternatives]  # rule -> (rule, alternative) that name it
    missing: dict[tuple[int, int], int] = {}
    empty = [False] * len(alternatives)
    queue = []
    for number, options in enumerate(alternatives):
        for i, option in enumerate(options):
            if all(element >= 0 for element in option):
                missing[number, i] = len(option)
                for element in option:
                    users[element].append((number, i))
                if not option and not empty[number]:
                    empty[number] = True
                    queue.append(number)
    while queue:
        for user in users[queue.pop()]:
            missing[user] -= 1
            if not missing[user] and not empty[user[0]]:
                empty[user[0]] = True
                queue.append(user[0])
    return empty


def _first(alternatives: list[list[list[int]]], empty: list[bool]) -> list[tuple[list[int], int]]:
    """For each rule: the rules it can begin with, as often as it can, and the number of other ways to begin."""
    result = []
    for options in alternatives:
        refs, others = [], 0
        for option in options:
            for element in option:
                if element < 0:
                    others += 1
                    break
                refs.append(element)
                if not empty[element]:
                    break
            else:
                others += 1
        result.append((refs, others))
    return result


def _check_tokens(parser: Parser, alternatives: list[list[list[int]]], empty: list[bool]) -> None:
    """Refuse tokens that libllama would allow and then not accept, which ends the process.

    It looks at a token's characters one by one, and takes <X> or !<X> in the middle as well as at the beginning: ``"a" !<X>`` allows
    the token "ab". So !<X> must not come right after a character, nor <X> where characters can be the beginning of its name, "<".
    """
    ends = _closure(alternatives, empty, last=True, terminal=lambda element: element not in parser.tokens)
    for element, token in parser.tokens.items():
        begins = _closure(alternatives, empty, last=False, terminal=lambda other, wanted=element: other == wanted)  # type: ignore[misc]
        named = token[0] == "<" and token[1] != "["  # what a numbered token begins with is not known here
        if named and not any(low <= ord("<") <= high for ranges in parser.terminals for low, high in ranges):
            continue
        for option in (option for options in alternatives for option in options):
            after_character = False
            for symbol in option:
                if after_character and (begins[symbol] if symbol >= 0 else symbol == element):
                    raise ConstraintError(f"{token} of the grammar comes right after characters, which libllama does not survive; {_APART}")
                ending = ends[symbol] if symbol >= 0 else symbol not in parser.tokens
                after_character = ending or (after_character and symbol >= 0 and empty[symbol])


def _closure(alternatives: list[list[list[int]]], empty: list[bool], *, last: bool, terminal: Callable[[int], bool]) -> list[bool]:
    """Which rules can begin (``last``: end) with one of some terminals."""
    found = [False] * len(alternatives)
    changed = True
    while changed:
        changed = False
        for number, options in enumerate(alternatives):
            for option in options if not found[number] else ():
                for symbol in reversed(option) if last else option:
                    if found[symbol] if symbol >= 0 else terminal(symbol):
                        found[number] = changed = True
                    if symbol < 0 or not empty[symbol]:
                        break
    return found


def _check_recursion(rules: list[Rule], first: list[tuple[list[int], int]]) -> None:
    """Refuse left recursion, and grammars whose possible beginnings are too many or too deep to enumerate."""
    order: list[int] = []  # rules after all they can begin with
    state = [0] * len(rules)  # 1: in progress, 2: done
    for root in range(len(rules)):
        stack = [(root, iter(first[root][0]))] if not state[root] else []
        if stack:
            state[root] = 1
        while stack:
            number, rest = stack[-1]
            for ref in rest:
                if state[ref] == 1:
                    raise ConstraintError(f"rule {rules[ref].name!r} of the grammar can begin with itself; put what it repeats before it")
                if state[ref] == 0:
                    state[ref] = 1
                    stack.append((ref, iter(first[ref][0])))
                    break
            else:
                state[number] = 2
                order.append(number)
                stack.pop()
    paths, visits, depth = [0] * len(rules), [0] * len(rules), [0] * len(rules)
    for number in order:
        refs, others = first[number]
        paths[number] = others + sum(paths[ref] for ref in refs)
        visits[number] = 1 + sum(visits[ref] for ref in refs)
        depth[number] = 1 + max((depth[ref] for ref in refs), default=0)
        if paths[number] > MAX_PATHS or depth[number] > MAX_DEPTH:
            raise ConstraintError(f"rule {rules[number].name!r} of the grammar can begin in too many ways; {_REMEDY}")
    if sum(visits) > MAX_VISITS:
        raise ConstraintError(f"the grammar's rules can begin in too many ways; {_REMEDY}")


class _Walk:
    """libllama's stacks, followed along one text. A stack is a number: its top (rule, alternative, element) and the stack below."""

    def __init__(self, alternatives: list[list[list[int]]], terminals: list[Terminal]) -> None:
        self._alternatives, self._terminals = alternatives, terminals
        self._numbers: dict[tuple[int, int, int, int], int] = {}
        self._stacks: list[tuple[int, int, int, int]] = []
        self._steps = 0

    def _stack(self, rule: int, alternative: int, element: int, below: int) -> int:
        """The stack with this top; an alternative that is at its end leaves what is below (libllama pops it as early)."""
        if element == len(self._alternatives[rule][alternative]):
            return below
        key = (rule, alternative, element, below)
        if key not in self._numbers:
            self._numbers[key] = len(self._stacks)
            self._stacks.append(key)
        return self._numbers[key]

    def _expand(self, start: list[int]) -> set[int]:
        """Stacks with a terminal on top that these lead to; -1, the empty one, is left out."""
        todo, seen = start, set(start)
        tops: set[int] = set()
        while todo:
            self._steps += 1
            stack = todo.pop()
            if stack < 0:
                continue
            rule, alternative, element, below = self._stacks[stack]
            ref = self._alternatives[rule][alternative][element]
            if ref < 0:
                tops.add(stack)
                continue
            rest = self._stack(rule, alternative, element + 1, below)
            for i in range(len(self._alternatives[ref])):
                following = self._stack(ref, i, 0, rest)
                if following not in seen:
                    seen.add(following)
                    todo.append(following)
        return tops

    def _ranges(self, stack: int) -> Terminal:
        rule, alternative, element, _ = self._stacks[stack]
        return self._terminals[TERMINAL - self._alternatives[rule][alternative][element]]

    def go(self, root: int) -> None:
        """Walk until the steps are used up or the text ends. Raises ConstraintError if there come to be too many stacks or paths."""
        tops = dict.fromkeys(self._expand([self._stack(root, i, 0, -1) for i in range(len(self._alternatives[root]))]), 1)
        for turn in itertools.count(1):
            if not tops or self._steps > WALK:
                return
            if turn % TOKEN == 0:
                tops = dict.fromkeys(tops, 1)
            ranges = {stack: self._ranges(stack) for stack in tops}
            codes = {low for terminal in ranges.values() for low, _ in terminal}  # where most overlap, one of them begins
            tops = max((self._after(tops, ranges, code) for code in codes), key=lambda after: sum(after.values()), default={})

    def _after(self, tops: dict[int, int], ranges: dict[int, Terminal], code: int) -> dict[int, int]:
        """The stacks one character on, each with the number of paths that lead to it."""
        after: dict[int, int] = {}
        for stack, terminal in ranges.items():
            if any(low <= code <= high for low, high in terminal):
                rule, alternative, element, below = self._stacks[stack]
                for top in self._expand([self._stack(rule, alternative, element + 1, below)]):
                    after[top] = after.get(top, 0) + tops[stack]
        if len(after) > MAX_STACKS or sum(after.values()) > MAX_TRIES:
            raise ConstraintError(f"the grammar is so ambiguous that some texts fit it in very many ways; {_REMEDY}")
        return after


# Grammars and JSON schemas that bind what a model writes.
#
# A grammar is checked here first (grammar_check.py): what libllama would not survive never reaches it.

__all__ = ["Constraint", "compile_constraint"]


def compile_constraint(vocab: Vocab, grammar: str | None, json_schema: Mapping[str, Any] | None) -> Constraint | None:
    """Compile a GBNF grammar (start: ``root``) or a JSON schema; None where neither is given.

    The result is at the start of its text. A Sampler copies it, so one can serve many requests.
    Raises ConstraintError, with line and column or the path in the schema, OptionError if both are given.
    """
    if grammar is not None and json_schema is not None:
        raise OptionError("a grammar and a JSON schema are given; give one of them")
    if json_schema is not None:
        from edge_rt.structured.json_schema import schema_to_grammar

        grammar = schema_to_grammar(json_schema)
        try:
            check_grammar(grammar, _no_tokens)
        except ConstraintError as error:
            raise ConstraintError(f"the JSON schema cannot be enforced: {error}") from None
    elif grammar is not None:
        check_grammar(grammar, lambda name: len(vocab.tokenize(name, special=True, bos=False)) == 1)
    return None if grammar is None else Constraint.parse(vocab, grammar)


def _no_tokens(name: str) -> bool:
    """Schemas make no use of token names."""
    return False
