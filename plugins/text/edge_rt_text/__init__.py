"""Post-processors for Chinese, English and mixed text: ``punctuation``, ``terminology`` and ``language_tags``, a plugin each.

This module is imported at every start of edge-rt. A post-processor's own module is imported when its rules are compiled, because the
patterns in it take milliseconds to compile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import TYPE_CHECKING

from edge_rt.hooks import PostProcessorFactory, hookimpl

if TYPE_CHECKING:
    from edge_rt.hooks import PostProcessor, Rules


class TextPlugin:
    """A plugin that offers one post-processor, which is in the module of the same name."""

    EDGE_RT_API = 1

    def __init__(self, name: str, description: str) -> None:
        self._factory = PostProcessorFactory(name, self._compile, description)

    @hookimpl
    def edge_rt_post_processors(self) -> Iterable[PostProcessorFactory]:
        return [self._factory]

    def _compile(self, rules: Rules) -> Callable[[], PostProcessor]:
        make: Callable[[], PostProcessor] = import_module(f"edge_rt_text.{self._factory.name}").compile_rules(rules)
        return make


PUNCTUATION = TextPlugin("punctuation", "adds missing full stops, closes quotes and brackets, chooses the width")
TERMINOLOGY = TextPlugin("terminology", "writes terms as a glossary wants them")
LANGUAGE_TAGS = TextPlugin("language_tags", "marks changes of language, for speech synthesis and screen readers")
