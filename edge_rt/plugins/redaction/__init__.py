"""The post-processor ``redaction``: conceals secrets while the text streams. See docs/post/redaction.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from edge_rt.hooks import PostProcessor, PostProcessorFactory, Rules, hookimpl

EDGE_RT_API = 1


def compile_rules(rules: Rules) -> Callable[[], PostProcessor]:
    """A table of rules as a function that makes a post-processor. Raises RuleError."""
    from edge_rt.plugins.redaction.settings import compile_redaction

    return compile_redaction(rules)


@hookimpl
def edge_rt_post_processors() -> Iterable[PostProcessorFactory]:
    """One."""
    return [PostProcessorFactory("redaction", compile_rules, "conceals numbers, keys, addresses and names", fails_closed=True)]
