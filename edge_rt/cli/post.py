"""`edge-rt post` and `edge-rt rules`: post-processing for any text, without a model, and the rules for it."""

from __future__ import annotations

import codecs
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edge_rt.cli.generation import is_post_processed, post_processor_names, rulebook
from edge_rt.cli.options import JsonOption, PostOptions, argument, option
from edge_rt.cli.output import table, write, write_bytes, write_json, write_stderr
from edge_rt.errors import EdgeError, OptionError, RuleError, UserError
from edge_rt.plugin_host.registry import Registry
from edge_rt.postprocess.pipeline import Pipeline
from edge_rt.postprocess.rules import Rulebook, RuleFile, Ruleset

_CHUNK = 1 << 16  # bytes read at once, at most


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
        if not is_post_processed(self):
            raise OptionError("there is nothing to do; name post-processors with --post, as --post redaction, or give --rules")
        names, registry = post_processor_names(self), Registry.load()
        with rulebook(self, registry, watch=self.lines, on_change=_report_change) as rules:
            stream = _Stream(rules or Ruleset({}, registry), names)
            interrupted = False
            try:
                for text in _read(self.file):
                    (stream.feed_lines if self.lines else stream.feed)(text)
            except KeyboardInterrupt:
                interrupted = True
            stream.close(cut=interrupted)
            if self.counts:
                write_stderr(json.dumps({"rules": stream.rules, "post": list(stream.counts.values())}, ensure_ascii=False))
        return 130 if interrupted else 0


def _report_change(error: RuleError | None) -> None:
    write_stderr(f"note: {error or 'the rules were exchanged'}")


class _Stream:
    """A text on its way through post-processors to standard output. Use either ``feed`` or ``feed_lines`` for it.

    ``rules`` is the version of the rules last used, ``counts`` what each post-processor did, by its name.
    """

    def __init__(self, rulebook: Rulebook, names: tuple[str, ...]) -> None:
        self._rulebook, self._names = rulebook, names
        self._pipeline: Pipeline | None = None
        self.rules = ""
        self.counts: dict[str, dict[str, Any]] = {}

    def feed(self, text: str) -> None:
        """Process the next part of the text."""
        if self._pipeline is None:
            self._pipeline = self._rulebook.current.pipeline(self._names)
            self._pipeline.forget()
        _write(self._pipeline.feed(text))

    def feed_lines(self, text: str) -> None:
        """Process the next part of the text, each line as a text of its own."""
        *lines, rest = text.split("\n")
        for line in lines:
            self.feed(line)
            self.close(cut=False)
            _write("\n")
        if rest:
            self.feed(rest)

    def close(self, *, cut: bool) -> None:
        """Write what post-processors still hold, and count what they did. ``cut``: the text was interrupted."""
        if (pipeline := self._pipeline) is None:
            return
        _write(pipeline.cut("") if cut else pipeline.flush())
        for notice in pipeline.notices:
            write_stderr(f"note: {notice}")
        for use in pipeline.use():
            total = self.counts.setdefault(use.name, {"name": use.name, "counts": {}, "most_held": None})
            for kind, count in use.counts.items():
                total["counts"][kind] = total["counts"].get(kind, 0) + count
            if use.most_held is not None:
                total["most_held"] = max(total["most_held"] or 0, use.most_held)
        self.rules, self._pipeline = pipeline.rules, None


def _read(file: str) -> Iterator[str]:
    """The text of a file, or of standard input for ``-``, as it arrives. Raises OptionError."""
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    try:
        if file == "-" and sys.stdin is None:
            raise OptionError("standard input is closed and there is no text; give a file")
        # Unbuffered: a buffered file would wait until its buffer is full.
        with open(sys.stdin.fileno() if file == "-" else Path(file).expanduser(), "rb", buffering=0, closefd=file != "-") as source:
            while data := source.read(_CHUNK):
                yield decode(data)
    except OSError as error:
        raise OptionError(f"cannot read {file}: {(error.strerror or str(error)).lower()}; check the name") from error
    yield decode(b"", final=True)


def _write(text: str) -> None:
    write_bytes(text.encode("utf-8", "surrogateescape"))


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
    """What `edge-rt rules check` shows of a rule file: the version and pipeline, or why it cannot be used."""
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
