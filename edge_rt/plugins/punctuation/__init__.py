"""The post-processor ``punctuation``: completes, closes and normalises the punctuation of Chinese and English text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from edge_rt.hooks import PostProcessorFactory, hookimpl

if TYPE_CHECKING:
    from edge_rt.hooks import PostProcessor, Rules

EDGE_RT_API = 1


def _compile(rules: Rules) -> Callable[[], PostProcessor]:
    from edge_rt.plugins.punctuation.processor import compile_rules  # only now: its patterns take milliseconds to compile

    return compile_rules(rules)


@hookimpl
def edge_rt_post_processors() -> Iterable[PostProcessorFactory]:
    """One post-processor."""
    return [PostProcessorFactory("punctuation", _compile, "adds missing full stops, closes quotes and brackets, chooses the width")]
