"""`edge-rt run`: one prompt, one answer."""

from __future__ import annotations

import sys
from pathlib import Path

from edge_rt.cli.generation import answer, check_text, facts, generate_options, opened, read_text, say_sustained, show_json, show_text
from edge_rt.cli.options import GenerationOptions, ModelOptions, argument, option
from edge_rt.cli.output import say, terminal, write, write_json
from edge_rt.cli.post_options import post_processed
from edge_rt.errors import OptionError, UserError
from edge_rt.types import GenerateOptions, Message

HELP = """Answer one prompt.

The prompt is the argument, a file (-f) or standard input. It goes through the model's chat template unless --raw is given.
The answer streams to standard output, everything else goes to standard error.

\b
Examples:
  edge-rt run "Why is the sky blue?"
  edge-rt run -m model.gguf -n 64 --temp 0 --raw "The capital of France is"
  git diff | edge-rt run --system "Summarise the change in one sentence."
  edge-rt run -f letter.txt --json-schema '{"type":"object","properties":{"sender":{"type":"string"}}}'
  edge-rt run --tools tools.json "How is the weather in Leeds?"
  edge-rt run --post redaction,punctuation --rules rules.toml "Whom do I call?"
  edge-rt run --json "Hello" | jq -r 'select(.event == "delta") | .text'
"""


class Options(GenerationOptions, ModelOptions):
    """The command's options."""

    prompt: str | None = argument(None, metavar="PROMPT", help="The prompt; standard input if left out, or if it is -.")
    file: str | None = option(None, "-f --file FILE", "Read the prompt from a file.")
    raw: bool = option(False, "--raw", "Give the prompt to the model as it is, without the chat template.")
    system: str | None = option(None, "--system TEXT", "System message, or @FILE.")
    session: str | None = option(None, "--session FILE", "Start from the session saved in FILE, if it exists, and save it there.")
    logprobs: int = option(0, "--logprobs N", "With --json: log-probabilities of each token and its N rivals.", low=0, high=100)
    json: bool = option(False, "--json", "Write one JSON event a line.")


def run(options: Options) -> int:
    """Answer and return the exit status."""
    if options.logprobs and not options.json:
        raise OptionError("--logprobs shows nothing without --json; add it")
    if options.raw and options.tools is not None:
        raise OptionError("--tools needs the chat template and --raw leaves it out; write the schemas into the prompt")
    request = generate_options(options, options.logprobs)
    prompt = _prompt(options)
    try:
        return _answer(options, prompt, request)
    except UserError as error:
        if options.json:
            write_json({"event": "error", "error": type(error).__name__, "message": str(error)})
        raise


def _answer(options: Options, prompt: str | list[Message], request: GenerateOptions) -> int:
    saved = Path(options.session) if options.session is not None else None
    with (
        post_processed(request, options) as (asked, registry),
        opened(options, options.policy, options.embedder, registry, options.adapter) as model,
    ):
        if options.json:
            write_json({"event": "model", "path": str(model.file.path), "engine": model.info.engine, "device": model.info.device,
                        "architecture": model.info.architecture, "context": model.info.max_context})  # fmt: skip
        with model.restore(saved) if saved and saved.exists() else model.session() as session:
            text, done, interrupted = answer(session, prompt, asked, show_json if options.json else show_text)
            if not options.json and not text.endswith("\n"):
                write("\n")
            if options.verbose:
                say(facts(done))
            say_sustained(model, json=options.json, verbose=options.verbose)
            if saved and not interrupted:
                session.save(saved)
                if any(one.conceals for one in done.post):
                    say(f"note: the session in {saved} holds the answer as the model wrote it, with what was concealed; keep it safe")
    return 130 if interrupted else 0


def _prompt(options: Options) -> str | list[Message]:
    """The prompt as raw text or as messages. Raises OptionError."""
    if options.prompt is not None and options.file is not None:
        raise OptionError("a prompt and --file contradict each other; give one of them, and instructions for the file with --system")
    if options.raw and options.system is not None:
        raise OptionError("--system needs the chat template and --raw leaves it out; put it all into the prompt")
    if options.file is not None:
        text = read_text(options.file, "the prompt")
    elif options.prompt is not None and options.prompt != "-":
        text = options.prompt
    elif options.prompt is None and terminal(sys.stdin):
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
        system = read_text(options.system[1:], "the system message") if options.system.startswith("@") else options.system
        check_text(system, "the system message")
        messages.insert(0, {"role": "system", "content": system})
    return messages
