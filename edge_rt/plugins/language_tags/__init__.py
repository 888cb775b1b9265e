"""The post-processor ``language_tags``: marks changes of language (tagger.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from edge_rt.hooks import PostProcessorFactory, hookimpl

if TYPE_CHECKING:
    from edge_rt.hooks import PostProcessor, Rules

EDGE_RT_API = 1


def compile(rules: Rules) -> Callable[[], PostProcessor]:
    """See plan.py. Raises RuleError."""
    from edge_rt.plugins.language_tags.plan import make_plan  # only now: its patterns take milliseconds to compile
    from edge_rt.plugins.language_tags.tagger import LanguageTags

    plan = make_plan(rules)
    return lambda: LanguageTags(plan)


@hookimpl
def edge_rt_post_processors() -> Iterable[PostProcessorFactory]:
    """One post-processor."""
    return [PostProcessorFactory("language_tags", compile, "marks changes of language, for speech synthesis and screen readers")]
