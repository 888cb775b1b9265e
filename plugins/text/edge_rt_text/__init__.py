"""Post-processors for Chinese, English and mixed text: ``punctuation``, ``terminology`` and ``language_tags``, a plugin each.

This module is imported at every start of edge-rt. A post-processor's own module is imported when its rules are compiled, because the
patterns in it take milliseconds to compile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from edge_rt.hooks import PostProcessorFactory, hookimpl

if TYPE_CHECKING:
    from edge_rt.hooks import PostProcessor, Rules


class TextPlugin:
    """A plugin that offers one post-processor."""

    EDGE_RT_API = 1

    def __init__(self, factory: PostProcessorFactory) -> None:
        self._factory = factory

    @hookimpl
    def edge_rt_post_processors(self) -> Iterable[PostProcessorFactory]:
        return [self._factory]


def _punctuation(rules: Rules) -> Callable[[], PostProcessor]:
    from edge_rt_text.punctuation import compile_rules

    return compile_rules(rules)


def _terminology(rules: Rules) -> Callable[[], PostProcessor]:
    from edge_rt_text.terminology import compile_rules

    return compile_rules(rules)


def _language_tags(rules: Rules) -> Callable[[], PostProcessor]:
    from edge_rt_text.language_tags import compile_rules

    return compile_rules(rules)


PUNCTUATION = TextPlugin(
    PostProcessorFactory("punctuation", _punctuation, "adds missing full stops, closes quotes and brackets, chooses the width")
)
TERMINOLOGY = TextPlugin(PostProcessorFactory("terminology", _terminology, "writes terms as a glossary wants them"))
LANGUAGE_TAGS = TextPlugin(
    PostProcessorFactory("language_tags", _language_tags, "marks changes of language, for speech synthesis and screen readers")
)
