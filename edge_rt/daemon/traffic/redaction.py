"""Takes out of recorded traffic what is not to be kept: the post-processors that conceal, on whole texts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from edge_rt.errors import EdgeError, OptionError

if TYPE_CHECKING:
    from edge_rt.postprocess.rules import Ruleset

PIECE, REST = 2048, 0.0001
"""Characters that are redacted at once, some 2 ms, and seconds between: who waits lets the daemon's loop have Python's lock."""


class Redaction(NamedTuple):
    """``by``: what conceals, in words. ``names``: of the post-processors in the rules that do; none but these are used."""

    by: str
    rules: Ruleset
    names: tuple[str, ...]

    def text(self, text: str, following: str | None = None) -> str:
        """A whole text; with ``following`` one that was cut off, as ``HandlesCut`` has it. Raises PluginError, which does not quote it."""
        pipeline = self.rules.pipeline(self.names)
        told = []
        for start in range(0, len(text), PIECE):
            told.append(pipeline.feed(text[start : start + PIECE]))
            time.sleep(REST)
        told.append(pipeline.flush() if following is None else pipeline.cut(following))
        return "".join(told)

    def value(self, value: Any) -> Any:
        """A value as JSON has it: every text in it, names of fields, and numbers that read as secrets.

        Raises PluginError, and ValueError if two names become one.
        """
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            told = {self.text(name): self.value(one) for name, one in value.items()}
            if len(told) < len(value):
                raise ValueError("two names became one")
            return told
        if isinstance(value, (list, tuple)):
            return [self.value(one) for one in value]
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            shown = self.text(str(value))
            return value if shown == str(value) else shown
        return value


def load(file: Path | None) -> Redaction:
    """By the rules in a file, or the usual ones: all kinds that the plugin redaction knows.

    Raises RuleError, PluginError, and OptionError if nothing would be concealed.
    """
    from edge_rt.plugin_host.registry import Registry
    from edge_rt.postprocess.rules import RuleFile, Ruleset

    registry = Registry.load()
    if file is None:
        try:
            rules = Ruleset({"redaction": {}}, registry)
        except EdgeError as error:
            raise OptionError(f"traffic is not recorded without redaction, which cannot be loaded: {error}") from error
    else:
        rules = RuleFile(file, registry, watch=False).current
    names = tuple(name for name in rules.order if registry.post_processor(name).fails_closed)
    if not names:
        raise OptionError(f"{file} has no rules that conceal anything, and traffic is not recorded as it is; add a table [redaction]")
    said = "the usual rules" if file is None else file.name
    return Redaction(f"{', '.join(names)} by {said}, version {rules.version}", rules, names)
