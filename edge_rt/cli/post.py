"""`edge-rt post` and `edge-rt rules`: post-processing for any text, without a model, and the rules for it."""

from __future__ import annotations

import codecs
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_rt.cli.generation import asked, names, rulebook
from edge_rt.cli.options import JsonOption, PostOptions, argument, option
from edge_rt.cli.output import say, table, write, write_bytes, write_json
from edge_rt.errors import EdgeError, OptionError, RuleError, UserError

if TYPE_CHECKING:
    from edge_rt.core.assemble.pipeline import Pipeline
    from edge_rt.registry import Registry
    from edge_rt.rules import Rulebook


_CHUNK = 1 << 16  # bytes to read at once, at most


class PostCommand(PostOptions):
    """Post-process a text.

    FILE, or standard input for -, goes through post-processors to standard output, as an answer of a model would.
    What may be said at once comes out at once. Bytes that are not UTF-8 pass as they are.

    Examples:
      edge-rt post letter.txt --post redaction
      tail -f service.log | edge-rt post - --post redaction --lines
      edge-rt post draft.md --rules rules.toml > final.md
      edge-rt post - --rules rules.toml --rule 'redaction.action="hash"' --counts < talk.txt
    """

    file: str = argument(metavar="FILE", help="The text; - for standard input.")
    lines: bool = option(False, "--lines", "Process every line for itself, by the rules as they are then.")
    counts: bool = option(False, "--counts", "Say on standard error what was done, as JSON.")

    def run(self) -> int:
        from edge_rt.registry import Registry
        from edge_rt.rules import Ruleset

        if not asked(self):
            raise OptionError("there is nothing to do; name post-processors with --post, as --post redaction, or give --rules")
        chosen, registry = names(self), Registry.load()
        with rulebook(self, registry, watch=self.lines, told=lambda error: say(f"note: {error or 'the rules were exchanged'}")) as book:
            work = _Work(book or Ruleset({}, registry), chosen)
            interrupted = False
            try:
                for text in _texts(self):
                    (work.line if self.lines else work.part)(text)
            except KeyboardInterrupt:
                interrupted = True
            work.end(cut=interrupted)
            if self.counts:
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


def _texts(options: PostCommand) -> Iterator[str]:
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


# ---- edge-rt rules -----------------------------------------------------------------------------------------------------


class RulesCommand(JsonOption):
    """Check rules for post-processors.

    Everything is compiled as for an answer. The first mistake is shown with its line, and the exit status is 1.

    Examples:
      edge-rt rules check rules.toml
      edge-rt rules check rules.toml --json | jq .line
    """

    action: str = argument(metavar="check", help="What to do: check.")
    file: str = argument(metavar="FILE", help="The rule file.")

    def run(self) -> int:
        if self.action != "check":
            raise OptionError(f"edge-rt rules has no action {self.action!r}; write edge-rt rules check FILE")
        from edge_rt.registry import Registry

        found = rule_facts(self.file, Registry.load())
        if self.json:
            write_json(found, indent=2)
            return 0 if found["ok"] else 1
        if not found["ok"]:
            raise UserError(found["message"])
        rows = [("POST-PROCESSOR", "IF IT FAILS"), *((one["name"], one["if_it_fails"]) for one in found["pipeline"])]
        write(f"{found['file']} is right, version {found['version']}, compiled in {found['milliseconds']} ms.\n" + table(rows))
        if found["files"]:
            write(f"It names {', '.join(found['files'])}.\n")
        return 0


def rule_facts(file: str, registry: Registry) -> dict[str, Any]:
    """What a rule file says, or what is wrong with it."""
    from edge_rt.rules import RuleFile

    started = time.perf_counter()
    try:
        book = RuleFile(file, registry, watch=False)
    except EdgeError as error:
        line, reason = (error.line, error.reason) if isinstance(error, RuleError) else (None, str(error))
        return {"file": file, "ok": False, "line": line, "reason": reason, "message": str(error)}
    rules = book.current
    return {
        "file": file,
        "ok": True,
        "version": rules.version,
        "milliseconds": round((time.perf_counter() - started) * 1000, 1),
        "pipeline": [{"name": name, "if_it_fails": "the stream stops" if rules.fails_closed(name) else "left out"} for name in rules.order],
        "files": [str(path) for path in rules.files],
    }
