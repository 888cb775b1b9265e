"""Refuses grammars that libllama would not survive.

libllama (ggml 0.25.3) looks for left recursion in time exponential in nested alternatives, misses it behind a rule that only
another rule makes empty (then its stacks grow for ever), and keeps every way a text can go on as a stack of its own. Grammars
whose rules can begin in very many ways are therefore refused here, before it sees them. How many stacks a text can lead to
later cannot be computed, so it is tried: a walk that always takes the character that leads to most stacks finds the grammars
where they multiply (``root ::= "a" root "b" | "a" root "c" | "a"`` has 2^n after n times a).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator

from edge_rt.core.decode.gbnf import ALT, MAX_ELEMENTS, MORE, TERMINAL, Parser, Rule, Terminal
from edge_rt.errors import ConstraintError

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
