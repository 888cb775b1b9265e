"""`edge-rt run` and `edge-rt embed`: one call of a model, for an answer or for embeddings."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from edge_rt.cli.generation import (
    answer,
    check_text,
    generate_options,
    opened,
    plugins_for,
    read_text,
    rulebook,
    show_json,
    show_text,
    summary,
    text_or_file,
)  # fmt: skip
from edge_rt.cli.options import GenerationOptions, ModelOptions, argument, option
from edge_rt.cli.output import is_terminal, write, write_json, write_stderr
from edge_rt.errors import OptionError, UserError
from edge_rt.types import GenerateOptions, Message, singles

if TYPE_CHECKING:
    from edge_rt.model import Model


class RunCommand(GenerationOptions, ModelOptions):
    """Answer one prompt.

    The prompt is the argument, a file (-f) or standard input. It goes through the model's chat template unless --raw is given.
    The answer streams to standard output, everything else goes to standard error.

    Examples:
      edge-rt run "Why is the sky blue?"
      edge-rt run -m model.gguf -n 64 --temp 0 --raw "The capital of France is"
      git diff | edge-rt run --system "Summarise the change in one sentence."
      edge-rt run -f letter.txt --json-schema '{"type":"object","properties":{"sender":{"type":"string"}}}'
      edge-rt run --tools tools.json "How is the weather in Leeds?"
      edge-rt run --post redaction,punctuation --rules rules.toml "Whom do I call?"
      edge-rt run --json "Hello" | jq -r 'select(.event == "delta") | .text'
    """

    prompt: str | None = argument(None, metavar="PROMPT", help="The prompt; standard input if left out, or if it is -.")
    file: str | None = option(None, "-f --file FILE", "Read the prompt from a file.")
    raw: bool = option(False, "--raw", "Give the prompt to the model as it is, without the chat template.")
    system: str | None = option(None, "--system TEXT", "System message, or @FILE.")
    session: str | None = option(None, "--session FILE", "Start from the session saved in FILE, if it exists, and save it there.")
    logprobs: int = option(0, "--logprobs N", "With --json: log-probabilities of each token and its N rivals.", low=0, high=100)
    json: bool = option(False, "--json", "Write one JSON event a line.")

    def run(self) -> int:
        if self.logprobs and not self.json:
            raise OptionError("--logprobs shows nothing without --json; add it")
        if self.raw and self.tools is not None:
            raise OptionError("--tools needs the chat template and --raw leaves it out; write the schemas into the prompt")
        request = generate_options(self, self.logprobs)
        prompt = _prompt(self)
        try:
            return _answer(self, prompt, request)
        except UserError as error:
            if self.json:
                write_json({"event": "error", "error": type(error).__name__, "message": str(error)})
            raise


def _answer(options: RunCommand, prompt: str | list[Message], request: GenerateOptions) -> int:
    saved = Path(options.session) if options.session is not None else None
    registry = plugins_for(options)
    with rulebook(options, registry) as rules, opened(options, registry) as model:
        if options.json:
            write_json({"event": "model", "path": str(model.file.path), "engine": model.info.engine, "device": model.info.device,
                        "architecture": model.info.architecture, "context": model.info.max_context})  # fmt: skip
        with model.restore(saved) if saved and saved.exists() else model.session() as session:
            text, done, interrupted = answer(session, prompt, request._replace(rules=rules), show_json if options.json else show_text)
            if not options.json and not text.endswith("\n"):
                write("\n")
            if options.verbose:
                write_stderr(summary(done))
            _report_limits(model, options)
            if saved and not interrupted:
                session.save(saved)
                if any(one.conceals for one in done.post):
                    note = "holds the answer as the model wrote it, with what was concealed; keep it safe"
                    write_stderr(f"note: the session in {saved} {note}")
    return 130 if interrupted else 0


def _report_limits(model: Model, options: RunCommand) -> None:
    """Report how --power and --celsius were kept, if they were given: as JSON, as a line with -v, else only if they were exceeded."""
    from edge_rt.power.limits import sentence, sustained

    found = sustained(model.engine)
    if found is None:
        return
    if options.json:
        write_json({"event": "sustained", **found._asdict()})
    elif options.verbose:
        write_stderr(f"[{sentence(found)}]")
    elif found.problem:
        write_stderr(f"note: {found.problem}")


def _prompt(options: RunCommand) -> str | list[Message]:
    """The prompt as raw text or as messages. Raises OptionError."""
    if options.prompt is not None and options.file is not None:
        raise OptionError("a prompt and --file contradict each other; give one of them, and instructions for the file with --system")
    if options.raw and options.system is not None:
        raise OptionError("--system needs the chat template and --raw leaves it out; put it all into the prompt")
    if options.file is not None:
        text = read_text(options.file, "the prompt")
    elif options.prompt is not None and options.prompt != "-":
        text = options.prompt
    elif options.prompt is None and is_terminal(sys.stdin):
        raise OptionError('there is no prompt; give one as an argument, with --file or on standard input, as edge-rt run "Hello"')
    elif sys.stdin is None:
        raise OptionError("standard input is closed and there is no prompt; give one as an argument or with --file")
    else:
        text = read_text("-", "the prompt")
    check_text(text, "the prompt")
    if options.raw:
        return text
    text = text.rstrip("\n") if options.prompt is None or options.prompt == "-" else text
    messages: list[Message] = [{"role": "user", "content": text}]
    if options.system is not None:
        system = text_or_file(options.system, "the system message")
        check_text(system, "the system message")
        messages.insert(0, {"role": "system", "content": system})
    return messages


# ---- edge-rt embed -----------------------------------------------------------------------------------------------------


class EmbedCommand(ModelOptions):
    """Embed texts: numbers that lie close for texts of close meaning.

    Each argument is a text, or each line of standard input. For each there is a line of JSON on standard output, as soon as it is made.
    A text longer than the context is an error, as an empty line is; nothing is cut off or left out.

    Examples:
      edge-rt embed "The cat sleeps." "A kitten naps." | jq -c .embedding
      edge-rt embed -m qwen3-embedding.gguf < lines.txt > embeddings.jsonl
      edge-rt embed --pooling last --no-normalize "Hello"
    """

    texts: tuple[str, ...] = argument((), metavar="TEXT...", help="The texts; lines of standard input if left out.")
    pooling: str | None = option(
        None, "--pooling KIND", choices=("mean", "cls", "last"),
        help="Of all tokens' hidden states the mean, the first (cls) or the last; as the model's file says if left out, else mean.",
    )  # fmt: skip
    no_normalize: bool = option(False, "--no-normalize", "Leave embeddings as long as they are, and not of length 1.")

    def run(self) -> int:
        if not self.texts and is_terminal(sys.stdin):
            raise OptionError('there is no text; give some as arguments or on standard input, as edge-rt embed "Hello"')
        if not self.texts and sys.stdin is None:
            raise OptionError("standard input is closed and there is no text; give some as arguments")
        with opened(self) as model:
            from edge_rt.model import embeddings

            texts, count, tokens, started = iter(self.texts) if self.texts else _lines(), 0, 0, time.perf_counter()
            with closing(embeddings(model, texts, pooling=self.pooling, normalize=not self.no_normalize)) as found:
                for index, one in enumerate(found):
                    write_json({"index": index, "embedding": singles(one.vector.tolist()), "tokens": one.tokens})
                    count, tokens = count + 1, tokens + one.tokens
            if self.verbose:
                write_stderr(f"[{count} texts, {tokens} tokens ({tokens / (time.perf_counter() - started):.0f}/s)]")
        return 0


def _lines() -> Iterator[str]:
    """Lines of standard input, as they come. Raises OptionError."""
    for number, line in enumerate(iter(sys.stdin.buffer.readline, b""), 1):
        try:
            yield line.removesuffix(b"\n").removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise OptionError(f"line {number} is not UTF-8 (byte {error.start}); convert it first, for example with iconv") from error
