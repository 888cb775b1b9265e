"""The terms of ``[terminology]``, from the rule file and the glossary files it names, and how their characters compare.

A variant with two preferred forms is an error. If a preferred form is a variant of another term, that term's preferred form is written.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple
from unicodedata import category

from edge_rt.hooks import HALF_WIDTH, AhoCorasick, RuleError, Rules

MAX_TERM = 100
"""Most characters of a variant or preferred form."""
CASES = ("smart", "exact", "ignore", "follow")

_WIDTH = {**HALF_WIDTH, 0xA0: 0x20}
_CASED = (range(0x41, 0x2E00), range(0xA640, 0xA800), range(0x10400, 0x10430))  # where letters have an upper and a lower case
_LOWER = {code: ord(low) for codes in _CASED for code in codes if len(low := chr(code).lower()) == 1 and ord(low) != code}
_FOLD = _LOWER | {code: _LOWER.get(half, half) for code, half in _WIDTH.items()}
_WIDE = re.compile(f"[{re.escape(''.join(map(chr, _WIDTH)))}]")
_FOLDED = re.compile(f"[{re.escape(''.join(map(chr, _FOLD)))}]")

# Thai and Lao; Burmese; Hangul; Khmer; Han, kana and more to Yi; Hangul; Han; half-width kana and Hangul; more kana; more Han.
_SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u2e80-\ua4cf\uac00-\ud7ff\uf900-\ufaff\uff66-\uffdc"
    "\U0001b000-\U0001b2ff\U00020000-\U0003ffff"
)
_UNBOUND = re.compile(f"[{_SPACELESS}]")
_WORD = re.compile(f"[^\\W{_SPACELESS}]")
_JOINER = "\u200d"


def narrow(text: str) -> str:
    """The text with full-width characters as half-width ones, of the same length."""
    return text if text.isascii() or not _WIDE.search(text) else text.translate(_WIDTH)


def fold(text: str) -> str:
    """The text, narrow and in lower case, of the same length: each character depends on itself alone, which is not so of ``lower``."""
    if text.isascii():
        return text.lower()
    return text.translate(_FOLD) if _FOLDED.search(text) else text


def unbound(character: str) -> bool:
    """Whether a character is of a script that puts no spaces between words, where a term may begin and end anywhere."""
    return not character.isascii() and _UNBOUND.match(character) is not None


@lru_cache(1024)  # asked for almost every token; the cache takes a third of the time
def in_word(character: str) -> bool:
    """Whether a character is part of a word that ends at a space: a letter, digit, mark or underscore."""
    if character.isascii():
        return character.isalnum() or character == "_"
    return _WORD.match(character) is not None or category(character)[0] == "M"


def continues(character: str) -> bool:
    """Whether a character belongs to the one before it: an accent, a joiner, a skin tone."""
    return not character.isascii() and (character == _JOINER or category(character)[0] == "M" or "\U0001f3fb" <= character <= "\U0001f3ff")


def begins(text: str, at: int) -> bool:
    """Whether a term may begin at a character, by those before it."""
    if not at:
        return True
    c, before = text[at], text[at - 1]
    if not in_word(c):
        return before != _JOINER
    if in_word(before) or before == _JOINER:
        return False
    return not (at > 1 and joins(text[at - 2], before, c))


def joins(before: str, mark: str, after: str) -> bool:
    """Whether a point or comma is inside something (``node.js``, ``3.5``, ``1,000``) and no punctuation."""
    if mark == ".":
        return in_word(before) and (after.islower() or after.isdigit())
    return mark == "," and before.isdigit() and after.isdigit()


class Term(NamedTuple):
    """A variant and what is written instead. ``case``: exact, ignore or follow. ``first``: only the first time.

    ``domain``: that of its glossary; "terms" for a term in the rule file itself.
    """

    variant: str
    preferred: str
    case: str
    first: bool
    domain: str


class Entry(NamedTuple):
    """A term as it was read: where that was, for messages, and at which key of which table."""

    term: Term
    place: str
    table: Rules
    key: str

    def mistake(self, reason: str) -> RuleError:
        return self.table.error(f"{self.place}: {reason}", self.key)


class Glossary:
    """Terms to look for; immutable. ``automaton`` finds, in folded text, all variants, and preferred forms that must be left whole."""

    def __init__(self, entries: list[Entry]) -> None:
        """Raises RuleError for variants with two preferred forms, and for terms that are each other's variants."""
        self._exact: dict[str, Term] = {}
        self._folded: dict[str, Term] = {}
        entry_of: dict[Term, Entry] = {}
        for entry in entries:
            entry_of.setdefault(entry.term, entry)
            term = entry.term
            exact = term.case == "exact"
            other = self._exact.setdefault(term.variant, term) if exact else self._folded.setdefault(fold(term.variant), term)
            if other.preferred != entry.term.preferred:
                here, there = f"{entry.term.variant} is to be {entry.term.preferred} here", f"{other.preferred} in {entry_of[other].place}"
                raise entry.mistake(f"{here}, and {there}; leave one of them out")
        for known in (self._exact, self._folded):
            for variant, term in list(known.items()):
                known[variant] = term._replace(preferred=self._last(entry_of[term]))
        self.domains = {entry.term.domain for entry in entries}
        variants = {*map(fold, self._exact), *self._folded}
        self.automaton = AhoCorasick(sorted(variants))
        lengths, whole = self.automaton.lengths, set()  # whole: those with variants in them, or to be noticed as the first use of a term
        for term in (*self._exact.values(), *self._folded.values()):
            preferred = fold(term.preferred)
            _, ends = self.automaton.scan(preferred)
            if term.first or any(lengths[i] < len(preferred) for _, state in ends for i in self.automaton.ending(state)):
                whole.add(preferred)
        self._whole = frozenset(whole)
        if self._whole:
            self.automaton = AhoCorasick(sorted(variants | self._whole))

    def _last(self, entry: Entry) -> str:
        """Return the preferred form of the preferred form, and so on."""
        preferred, passed = entry.term.preferred, [entry.term.variant]
        while (further_term := self.term(preferred)) is not None:
            further = written(further_term, preferred)
            if further == preferred:
                break
            passed.append(preferred)
            if further in passed:
                circle = " to ".join([*passed[passed.index(further) :], further])
                raise entry.mistake(f"terms go in a circle, {circle}; leave one of them out")
            preferred = further
        return preferred

    def term(self, text: str) -> Term | None:
        """The term that a text is a variant of."""
        return self._exact.get(narrow(text)) or self._folded.get(fold(text))

    def preferred(self, text: str) -> bool:
        """Whether a text that is no variant is a preferred form to be left whole."""
        return fold(text) in self._whole


def written(term: Term, text: str) -> str:
    """What is written for a text that is a variant of a term.

    In the case ``follow`` a preferred form in lower case is written as the text is: UPPER, Capitalised or lower.
    """
    preferred, text = term.preferred, narrow(text)
    if term.case != "follow" or preferred != preferred.lower() or text == text.lower():
        return preferred
    letters = [c for c in text if c.lower() != c.upper()]
    if len(letters) > 1 and all(c.isupper() for c in letters):
        return preferred.upper()
    return preferred[0].upper() + preferred[1:] if letters[0].isupper() else preferred


def read(rules: Rules) -> list[Entry]:
    """All terms of the active domains. Raises RuleError."""
    case, first = rules.choice("case", CASES, "smart"), rules.flag("first_only", False)
    terms = list(_inline(rules.table("terms"), case, first))
    tables = rules.tables("glossary")
    if "domains" in rules and not tables:
        raise rules.error("domains chooses glossaries and there are none; add a [[terminology.glossary]] or leave domains out", "domains")
    domains = [table.text("domain") for table in tables]
    active = rules.choices("domains", sorted(set(domains)), domains)
    for table, domain in zip(tables, domains, strict=True):
        if domain in active:
            terms += _of_file(table, domain, case, first)
        else:
            table.text("file")  # it is not misspelt, only not read
    return terms


def _inline(table: Rules, case: str, first: bool) -> Iterator[Entry]:
    """Yield terms written as ``"variant" = "preferred"`` or ``"variant" = { to = "preferred", case = "exact", first = true }``."""
    for variant in table.keys():  # noqa: SIM118  # it is not a mapping
        try:
            preferred, its_case, its_first = table.text(variant), case, first
        except RuleError:
            try:
                options = table.table(variant)
            except RuleError as error:
                raise table.error(f'{variant} is neither a text nor a table; write "{variant}" = "preferred form"', variant) from error
            preferred, its_case, its_first = options.text("to"), options.choice("case", CASES, case), options.flag("first", first)
        yield _checked(Entry(Term(variant, preferred, its_case, its_first, "terms"), table.name, table, variant))


def _of_file(table: Rules, domain: str, case: str, first: bool) -> Iterator[Entry]:
    """Yield the terms of a file, one a line: ``variant,preferred`` or ``variant,preferred,flags``; with tabs if it is a ``.tsv``."""
    path, text = table.file("file")
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        place = f"{path.name}, line {number}"
        try:
            fields = [field.strip() for field in next(csv.reader([line], delimiter=delimiter, strict=True, skipinitialspace=True))]
        except csv.Error as error:
            raise table.error(f"{place}: {error}; write variant{delimiter}preferred form", "file") from error
        if fields[:2] == ["variant", "preferred"]:
            continue  # the names of the columns
        if not 2 <= len(fields) <= 3:
            shown = "a tab" if delimiter == "\t" else "a comma"
            raise table.error(
                f"{place}: it has {len(fields)} fields; write a variant and its preferred form with {shown} between them", "file"
            )
        its_case, its_first = case, first
        for flag in fields[2].split() if len(fields) == 3 else ():
            if flag == "first":
                its_first = True
            elif flag in CASES:
                its_case = flag
            else:
                raise table.error(f"{place}: there is no flag {flag}; choose from first, {', '.join(CASES)}", "file")
        yield _checked(Entry(Term(fields[0], fields[1], its_case, its_first, domain), place, table, "file"))


def _checked(entry: Entry) -> Entry:
    """Return the entry with its term stripped and ``smart`` decided. Raises RuleError."""
    term = entry.term
    variant, preferred, case = narrow(term.variant).strip(), term.preferred.strip(), term.case
    for kind, text in (("variant", variant), ("preferred form", preferred)):
        if not text:
            raise entry.mistake(f"a {kind} is empty; write what it is, or leave the term out")
        if len(text) > MAX_TERM:
            raise entry.mistake(f"the {kind} {text[:20]}... has {len(text)} characters; it may have {MAX_TERM}")
    if case == "smart":
        case = "follow" if variant == variant.lower() else "exact"
    return entry._replace(term=term._replace(variant=variant, preferred=preferred, case=case))
