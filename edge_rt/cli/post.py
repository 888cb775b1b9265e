"""`edge-rt post`: post-processing for any text, without a model."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edge_rt.cli.options import PostOptions, argument, option
from edge_rt.cli.output import say, write_bytes
from edge_rt.cli.post_options import asked, names, rulebook
from edge_rt.errors import OptionError

if TYPE_CHECKING:
    from edge_rt.postprocess.pipeline import Pipeline
    from edge_rt.postprocess.rules import Rulebook

HELP = """Post-process a text.

FILE, or standard input for -, goes through post-processors to standard output, as an answer of a model would.
What may be said at once comes out at once. Bytes that are not UTF-8 pass as they are.

\b
Examples:
  edge-rt post letter.txt --post redaction
  tail -f service.log | edge-rt post - --post redaction --lines
  edge-rt post draft.md --rules rules.toml > final.md
  edge-rt post - --rules rules.toml --rule 'redaction.action="hash"' --counts < talk.txt
"""

_CHUNK = 1 << 16  # bytes to read at once, at most


class Options(PostOptions):
    """The command's options."""

    file: str = argument(metavar="FILE", help="The text; - for standard input.")
    lines: bool = option(False, "--lines", "Process every line for itself, by the rules as they are then.")
    counts: bool = option(False, "--counts", "Say on standard error what was done, as JSON.")


def run(options: Options) -> int:
    """Process and return the exit status."""
    from edge_rt.plugin_host.registry import Registry
    from edge_rt.postprocess.rules import Ruleset

    if not asked(options):
        raise OptionError("there is nothing to do; name post-processors with --post, as --post redaction, or give --rules")
    chosen, registry = names(options), Registry.load()
    with rulebook(options, registry, watch=options.lines, told=lambda error: say(f"note: {error or 'the rules were exchanged'}")) as book:
        work = _Work(book or Ruleset({}, registry), chosen)
        interrupted = False
        try:
            for text in _texts(options):
                (work.line if options.lines else work.part)(text)
        except KeyboardInterrupt:
            interrupted = True
        work.end(cut=interrupted)
        if options.counts:
            import json

            say(json.dumps(work.report(), ensure_ascii=False))
    return 130 if interrupted else 0


class _Work:
    """Text on its way. ``line`` and ``part`` are not for the same text."""

    def __init__(self, book: Rulebook, chosen: tuple[str, ...]) -> None:
        self._book, self._chosen = book, chosen
        self._pipeline: Pipeline | None = None
        self._done: dict[str, dict[str, int]] = {}
        self._held: dict[str, int] = {}
        self._rules = ""

    def part(self, text: str) -> None:
        """More of the text."""
        write_bytes(_bytes(self._started().feed(text)))

    def line(self, text: str) -> None:
        """More lines, or parts of one: each is a text of its own."""
        *whole, rest = text.split("\n")
        for line in whole:
            self.part(line)
            self._finish(cut=False)
            write_bytes(b"\n")
        if rest:
            self.part(rest)

    def end(self, *, cut: bool) -> None:
        """There is no more text, or not for us."""
        if self._pipeline is not None:
            self._finish(cut=cut)

    def report(self) -> dict[str, object]:
        """What was done so far."""
        post = [{"name": name, "counts": counts, "most_held": self._held.get(name)} for name, counts in self._done.items()]
        return {"rules": self._rules, "post": post}

    def _started(self) -> Pipeline:
        if self._pipeline is None:
            self._pipeline = self._book.current.pipeline(self._chosen)
            self._pipeline.forget()
        return self._pipeline

    def _finish(self, *, cut: bool) -> None:
        pipeline = self._started()
        write_bytes(_bytes(pipeline.cut("") if cut else pipeline.flush()))
        for notice in pipeline.notices:
            say(f"note: {notice}")
        for use in pipeline.use():
            counts = self._done.setdefault(use.name, {})
            for kind, count in use.counts.items():
                counts[kind] = counts.get(kind, 0) + count
            if use.most_held is not None:
                self._held[use.name] = max(self._held.get(use.name, 0), use.most_held)
        self._rules, self._pipeline = pipeline.rules, None


def _texts(options: Options) -> Iterator[str]:
    """The text, as it comes."""
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    try:
        if options.file == "-":
            if sys.stdin is None:
                raise OptionError("standard input is closed and there is no text; give a file")
            descriptor, ours = sys.stdin.fileno(), False
        else:
            descriptor, ours = os.open(Path(options.file).expanduser(), os.O_RDONLY), True
        try:
            while data := os.read(descriptor, _CHUNK):
                yield decode(data)
        finally:
            if ours:
                os.close(descriptor)
    except OSError as error:
        raise OptionError(f"cannot read {options.file}: {(error.strerror or str(error)).lower()}; check the name") from error
    yield decode(b"", final=True)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
