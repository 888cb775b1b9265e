"""The post-processor ``terminology`` (processor.py): writes terms as a glossary wants them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from edge_rt import hooks
from edge_rt.hooks import PostProcessor, PostProcessorFactory, hookimpl

EDGE_RT_API = 1


def _compile(rules: hooks.Rules) -> Callable[[], PostProcessor]:
    """Imports the rest only when it is needed."""
    from edge_rt.plugins.terminology.processor import compile_rules

    return compile_rules(rules)


@hookimpl
def edge_rt_post_processors() -> Iterable[PostProcessorFactory]:
    """One post-processor."""
    return [PostProcessorFactory("terminology", _compile, "writes terms as a glossary wants them")]
