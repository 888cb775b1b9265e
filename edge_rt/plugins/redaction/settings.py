"""The rules of redaction, checked and compiled.

action        "placeholder" (default), "mask" or "hash"
placeholder   the text of a placeholder; {KIND} stands for the kind, {kind} for it in small letters. Default "[{KIND}]"
keep_first, keep_last   characters that a mask shows, 0 to 16 each; default 0
key           the key of hashes, 16 characters or more; without it there can be none
key_file      a file that holds the key instead
kinds         a list of what to conceal, default all: id, card, iban, phone, email, ip, mac, api_key, token, password, address, name
cut           "conceal" (default) what may be the beginning of a secret where a text is cut off, or "keep" it
cut_text      what stands for that, default "…"
addresses     "named" (default): Chinese ones that begin with a province, a city or a word as 地址; "anywhere": with any road, too
names         a list of names to conceal
names_file    a file of names, one a line
[redaction.KIND]        action, placeholder, keep_first and keep_last for one kind
[[redaction.pattern]]   name, regex, max_length (how often * and + repeat, default 64), ignore_case, and the same four
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from edge_rt.hooks import Rules
from edge_rt.plugins.redaction import scanner
from edge_rt.plugins.redaction.automaton import Automaton, Graph, Refused, add_pattern, add_words, view
from edge_rt.plugins.redaction.detectors import ANY_ADDRESS, KINDS, SOURCES
from edge_rt.plugins.redaction.scanner import LIMIT, Pattern, Redactor, ScanPlan

ACTIONS = ("placeholder", "mask", "hash")
LEAST_KEY = 16
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_GAPS = {" ": "[ \\t\\r\\n\\-·]{1,3}", "\0": "[ ·\\-]{0,2}"}
_LETTER = "A-Za-z0-9_À-ÖØ-öø-ɏͰ-ϿЀ-ԯ"


def compile_redaction(rules: Rules) -> Callable[[], Redactor]:
    """Rules as a function that makes a post-processor for one stream. Raises RuleError."""
    key = _key(rules)
    kinds = rules.choices("kinds", KINDS, KINDS)
    default = _Action.read(rules, _Action("placeholder", "[{KIND}]", 0, 0), key)
    conceal = {kind: _Action.read(rules.table(kind), default, key).conceal(kind) for kind in KINDS}
    graph = Graph()
    patterns: list[Pattern] = []
    anywhere = rules.choice("addresses", ("named", "anywhere"), "named") == "anywhere"
    for source in (*SOURCES, *[ANY_ADDRESS] * anywhere):
        if not set(source.finds) & set(kinds):
            continue
        graph.adding = len(patterns)
        add_pattern(graph, source.regex, None, flags=source.flags)
        patterns.append(source.pattern)
    _add_names(rules, graph, patterns, "name" in kinds)
    custom: dict[str, scanner.Conceal] = {}
    for table in rules.tables("pattern"):
        name = _add_custom(table, graph, patterns, {*KINDS, *custom})
        custom[name] = _Action.read(table, default, key).conceal(name)
    shown = {kind: conceal[kind] for kind in KINDS if kind in kinds}
    cut_text = rules.text("cut_text", "…")
    conceals_cut = rules.choice("cut", ("conceal", "keep"), "conceal") == "conceal"
    every = {**custom, **shown, "unclear": default.conceal("unclear")}
    ranks = {kind: rank for rank, kind in enumerate(every)}
    plan = ScanPlan(Automaton(graph), tuple(patterns), every, ranks, key, cut_text if conceals_cut else None)
    learning = Redactor(plan)
    for piece in scanner.PIECES.findall(scanner.ENGLISH + scanner.CHINESE + scanner.SECRETS):
        learning.feed(piece)
    return lambda: Redactor(plan)


def _key(rules: Rules) -> bytes:
    """The key of hashes, empty if there is none."""
    text = rules.text("key", "")
    if "key_file" in rules:
        if text:
            raise rules.error("there is a key and a key_file; leave one away", "key_file")
        text = rules.file("key_file")[1].strip()
    if text and len(text) < LEAST_KEY:
        raise rules.error(f"the key has {len(text)} characters; give {LEAST_KEY} or more, or numbers can be found by trying", "key")
    return text.encode()


class _Action:
    """What to do with secrets, as it is written."""

    def __init__(self, name: str, text: str, first: int, last: int) -> None:
        self.name, self.text, self.first, self.last = name, text, first, last

    @classmethod
    def read(cls, rules: Rules, default: _Action, key: bytes) -> _Action:
        """From a table, with a default for each value. Raises RuleError."""
        name = rules.choice("action", ACTIONS, default.name)
        if name == "hash" and not key:
            at = ("action",) if "action" in rules else ()
            raise rules.error(f"a hash needs a key; give one of {LEAST_KEY} characters or more as key in [redaction]", *at)
        text = rules.text("placeholder", default.text)
        first = rules.integer("keep_first", default.first, most=scanner.MAX_KEPT)
        last = rules.integer("keep_last", default.last, most=scanner.MAX_KEPT)
        return cls(name, text, first, last)

    def conceal(self, kind: str) -> scanner.Conceal:
        """The function that does it."""
        if self.name == "mask":
            return scanner.mask(self.first, self.last)
        if self.name == "hash":
            return scanner.hash_of(kind.upper())
        return scanner.placeholder(self.text.replace("{KIND}", kind.upper()).replace("{kind}", kind))


def _add_names(rules: Rules, graph: Graph, patterns: list[Pattern], wanted: bool) -> None:
    names = list(rules.texts("names"))
    if "names_file" in rules:
        names += rules.file("names_file")[1].splitlines()
    cleaned = sorted({" ".join(view(name).replace("\u200b", "").replace("·", " ").split()) for name in names} - {""})
    for name in cleaned:
        if len(name) < 2 or len(name) > 64:
            raise rules.error(f"the name {name!r} is too {'short' if len(name) < 2 else 'long'}; give 2 to 64 characters", "names")
    if not wanted:
        return
    graph.adding = len(patterns)
    latin = [name for name in cleaned if not _is_han(name)]
    if latin:
        add_words(graph, latin, _GAPS, f"(?<![{_LETTER}])", f"(?![{_LETTER}])")
    han = ["\0".join(name.replace(" ", "")) for name in cleaned if _is_han(name)]
    if han:
        add_words(graph, han, _GAPS, "", "")
    patterns.append(Pattern("name", sure=True))


def _is_han(name: str) -> bool:
    return any("\u2e80" <= char <= "\ud7ff" or char >= "\U00020000" for char in name)


def _add_custom(rules: Rules, graph: Graph, patterns: list[Pattern], taken: Iterable[str]) -> str:
    """Add a pattern of the user's. Raises RuleError."""
    name = rules.text("name")
    if _NAME.fullmatch(name) is None or name in (*taken, "unclear", "cut"):
        raise rules.error(f"name cannot be {name!r}; use small letters, digits and _, and no name of another kind", "name")
    regex, most = rules.text("regex"), rules.integer("max_length", 64, least=1, most=256)
    graph.adding = len(patterns)
    try:
        width = add_pattern(graph, regex, most, flags=re.IGNORECASE if rules.flag("ignore_case", False) else 0)
    except Refused as error:
        raise rules.error(f"regex of {name}: {error}", "regex") from error
    if width > LIMIT - 64:
        raise rules.error(f"regex of {name} can match {width} characters; let it match {LIMIT - 64} at most, by max_length", "regex")
    patterns.append(Pattern(name, sure=True))
    return name
