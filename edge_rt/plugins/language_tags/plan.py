"""The rules of ``language_tags``, compiled. The table ``[language_tags]`` takes

``format``: ``plain`` (default; ``<zh>…</zh>``, and ``<`` of the text is written ``<<``), ``ssml`` (``<lang xml:lang="zh">…</lang>`` with
the text as XML, to be put between ``<speak>`` and ``</speak>``) or ``json`` (a line ``{"lang":"zh","text":"…"}`` for each span, and for
each line of text in it).
``primary``: the language of the text as a whole. It gets no tags (but lines of JSON), and short texts at the start are in it. None by
default.
``languages``: those that Latin script may be in. Several are told apart by an identifier, which has to be installed; the first is taken
where that cannot tell. By default en, de, fr, es, it, pt and nl, and en alone without the identifier.
``minimum_words`` (3, at most 6): fewer words in Latin script stay with the language around them.
``minimum_characters`` (2, at most 16): the same for all other scripts.
``[language_tags.scripts]``: the language of a script, e.g. ``cyrillic = "uk"``; scripts.py has all with their defaults.
``[language_tags.tags]``: how a language is written, e.g. ``zh = "zh-CN"``; by default as it is called here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from edge_rt.hooks import Rules
from edge_rt.plugins.language_tags import identifier
from edge_rt.plugins.language_tags.formats import FORMATS, Format
from edge_rt.plugins.language_tags.scripts import SCRIPTS, evidence, patterns

LANGUAGES = ("en", "de", "fr", "es", "it", "pt", "nl")
"""Candidates for Latin script by default."""
_TAG = re.compile(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*")
"""A language tag as BCP 47 forms it; whether its parts are registered is not looked up."""


class Plan(NamedTuple):
    """What all streams of a version of the rules share."""

    form: Format
    primary: str
    latin: str
    """The language of Latin script until another is found."""
    identify: identifier.Identifier | None
    languages: Mapping[str, str]
    """By script, without Latin."""
    tags: Mapping[str, str | None]
    """By language; None: it is not marked."""
    minimum_words: int
    minimum_characters: int


def make_plan(rules: Rules) -> Plan:
    """Compile a table of rules. Raises RuleError."""
    form = FORMATS[rules.choice("format", tuple(FORMATS), "plain")]
    latin = _latin(rules)
    table = rules.table("scripts")
    languages = {name: _tag(table, name, language) for name, (language, _) in SCRIPTS.items() if language}
    known = dict.fromkeys((*latin, *languages.values()))
    table = rules.table("tags")
    tags: dict[str, str | None] = {language: _tag(table, language, language) for language in known}
    primary = rules.text("primary", "")
    if primary and primary not in known:
        raise rules.error(f"primary is {primary!r}, which no script is in; add it to languages or scripts", "primary")
    if primary and not form.always:
        tags[primary] = None
    for kind in ("han", "ja", "kana"):
        patterns(kind)
    patterns("latin", len(latin) > 1)
    evidence()
    return Plan(
        form,
        primary,
        primary if primary in latin else latin[0],
        identifier.Identifier(latin) if len(latin) > 1 else None,
        languages,
        tags,
        rules.integer("minimum_words", 3, 1, 6),
        rules.integer("minimum_characters", 2, 1, 16),
    )


def _latin(rules: Rules) -> tuple[str, ...]:
    """The languages of Latin script."""
    installed = identifier.installed()
    latin = rules.texts("languages", LANGUAGES if installed else LANGUAGES[:1])
    if not latin:
        raise rules.error("languages is empty; name those that Latin script may be in", "languages")
    if len(latin) == 1:
        if not _TAG.fullmatch(latin[0]):
            raise rules.error(f"languages has {latin[0]!r} in it; give language tags such as en", "languages", 0)
        return latin
    if not installed:
        reason = "languages names several, and what tells them apart is not installed; pip install 'edge-rt[languages]', or name one"
        raise rules.error(reason, "languages")
    for i, language in enumerate(latin):
        if language not in identifier.known():
            raise rules.error(f"languages has {language!r} in it, which the identifier does not know; leave it out", "languages", i)
    return latin


def _tag(table: Rules, key: str, default: str) -> str:
    tag = table.text(key, default)
    if not _TAG.fullmatch(tag):
        raise table.error(f"{key} is {tag!r}; give a language tag such as zh or zh-CN", key)
    return tag
