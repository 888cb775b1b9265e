"""Post-processors on the command line: which, and by which rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edge_rt.cli.options import PostOptions
from edge_rt.errors import OptionError, RuleError

if TYPE_CHECKING:
    from edge_rt.plugin_host.registry import Registry
    from edge_rt.postprocess.rules import Rulebook
    from edge_rt.types import GenerateOptions


def names(options: PostOptions) -> tuple[str, ...]:
    """The post-processors asked for by name. Raises OptionError for an empty name."""
    found = tuple(name.strip() for name in options.post.split(",")) if options.post is not None else ()
    if "" in found:
        raise OptionError("--post takes names with commas between them, as redaction,punctuation")
    return found


def asked(options: PostOptions) -> bool:
    """Whether the options ask for post-processing."""
    return options.post is not None or options.rules is not None or bool(options.rule)


@contextmanager
def post_processed(
    request: GenerateOptions, options: PostOptions, *, watch: bool = False, told: Callable[[RuleError | None], None] = lambda error: None
) -> Iterator[tuple[GenerateOptions, Registry | None]]:
    """A request with the rules of the options, and the registry of its post-processors, None without any."""
    if not asked(options):
        yield request, None
        return
    from edge_rt.plugin_host.registry import Registry

    registry = Registry.load()
    with rulebook(options, registry, watch=watch, told=told) as book:
        yield request._replace(rules=book), registry


@contextmanager
def rulebook(
    options: PostOptions, registry: Registry, *, watch: bool = False, told: Callable[[RuleError | None], None] = lambda error: None
) -> Iterator[Rulebook | None]:
    """The rules that the options give, None if they give none; watched while it lasts, if asked for. Raises RuleError, PluginError."""
    if options.rules is None and not options.rule:
        yield None
        return
    from edge_rt.postprocess.rules import RuleFile, Ruleset, change

    if options.rules is None:
        yield Ruleset(change({}, options.rule), registry)
        return
    with RuleFile(options.rules, registry, overrides=options.rule, watch=watch, told=told) as book:
        yield book
