"""What `run` and `chat` share: from the command line to a request, and from events to text or JSON."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from edge_rt import sizes
from edge_rt.cli import interrupts
from edge_rt.cli.options import GenerationOptions, ModelOptions
from edge_rt.cli.output import ProgressBar, say, write, write_json
from edge_rt.errors import ConstraintError, OptionError
from edge_rt.records import decode_rate, record
from edge_rt.types import Delta, Done, Event, GenerateOptions, Message, Notice, Pruning, SamplingParams

if TYPE_CHECKING:
    from edge_rt.registry import Registry
    from edge_rt.runtime import Model
    from edge_rt.session import Session

Show = Callable[[Iterable[Event]], tuple[str, Done]]


# ---- from the command line -------------------------------------------------------------------------------------------


@contextmanager
def opened(
    options: ModelOptions, policy: str = "graded", embedder: str | None = None, registry: Registry | None = None,
    adapter: str | None = None,
) -> Iterator[Model]:  # fmt: skip
    """Open the model the options name, with a progress bar. ``policy``: the context policy. ``embedder``: what recalls, by name.

    ``adapter``: as the command line has it.
    """
    from edge_rt.catalog import resolve

    path = resolve(options.model)
    memory = sizes.parse(options.memory, "--memory") if options.memory is not None else None
    import edge_rt

    progress = ProgressBar()
    started = time.perf_counter()
    gc.disable()  # opening imports much and frees nothing: collecting in the meantime is a tenth of the start-up time
    try:
        model = edge_rt.open(
            path,
            engine=options.engine,
            device=options.device,
            context=options.ctx,
            threads=options.threads,
            memory=memory,
            pack=not options.no_pack,
            key_type=options.key_type or "f16",  # type: ignore[arg-type]  # one of the choices that check() allows
            policy=policy,
            embedder=embedder,
            adapters={Path(file).name: file for file, _ in _adapter(adapter)},
            compensation=options.compensation or "auto",
            power=options.power,
            celsius=options.celsius,
            progress=progress,
            registry=registry,
        )
        import edge_rt.session  # what the answer needs, while the vocabulary still loads
    finally:
        progress.finish()
        gc.freeze()
        gc.enable()
    with model:
        interrupts.forget()
        if options.verbose:
            info, with_ = model.info, f", with {model.compensation.sentence}" if model.compensation else ""
            seconds = time.perf_counter() - started
            say(f"[{path.name}: {info.architecture} on {info.engine}, {info.device}{with_}; opened in {seconds:.3f} s]")
        yield model


def generate_options(options: GenerationOptions, logprobs: int = 0) -> GenerateOptions:
    """The request's options. Raises OptionError, ConstraintError."""
    adapter, scale = next(((Path(file).name, scale) for file, scale in _adapter(options.adapter)), (None, 1.0))
    return GenerateOptions(
        max_tokens=options.max_tokens,
        stop=tuple(_not_empty(text, "--stop") for text in options.stop),
        sampling=SamplingParams(
            temperature=options.temp,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            typical_p=options.typical,
            repeat_penalty=options.repeat_penalty,
            repeat_last_n=options.repeat_last_n,
            frequency_penalty=options.frequency_penalty,
            presence_penalty=options.presence_penalty,
            dry_multiplier=options.dry_multiplier,
            dry_base=options.dry_base,
            dry_allowed_length=options.dry_allowed_length,
            dry_penalty_last_n=options.dry_penalty_last_n,
            seed=options.seed,
            logit_bias=dict(map(_bias, options.logit_bias)),
        ),
        grammar=_grammar(options),
        json_schema=_schema(options),
        logprobs=logprobs,
        speculate=options.speculate,
        post=names(options),
        ignore_eos=options.ignore_eos,
        prune=_pruning(options),
        tools=_tools(options.tools) if options.tools is not None else (),
        adapter=adapter,
        adapter_scale=scale,
    )


def read_text(name: str, what: str) -> str:
    """The text of a file, or of standard input for ``-``. Raises OptionError."""
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return data.decode()
    except OSError as error:
        raise OptionError(f"cannot read {what} from {name}: {(error.strerror or str(error)).lower()}") from error
    except UnicodeDecodeError as error:
        raise OptionError(f"{what} in {name} is not UTF-8 (byte {error.start}); convert it first, for example with iconv") from error


def check_text(text: str, what: str) -> None:
    """Raise OptionError for a text that is empty or was not UTF-8 on the command line."""
    if not text.strip():
        raise OptionError(f"{what} is empty; give the model something to answer")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise OptionError(f"{what} is not UTF-8 (character {error.start}); check the terminal's encoding") from error


def _not_empty(text: str, flag: str) -> str:
    if not text:
        raise OptionError(f"{flag} takes a text that is not empty")
    return text


def _bias(text: str) -> tuple[int, float]:
    """``42+1.5`` or ``42-inf`` as (token id, bias)."""
    sign = max(text.find("+"), text.find("-"))
    try:
        if sign < 1:
            raise ValueError
        return int(text[:sign]), float(text[sign:])
    except ValueError:
        raise OptionError(f"--logit-bias takes a token id and a signed number, as 42+1.5, and not {text!r}") from None


def _adapter(text: str | None) -> list[tuple[str, float]]:
    """``FILE`` or ``FILE:SCALE`` as (file, scale), if there is one. A file whose name ends so is meant itself. Raises OptionError."""
    if text is None:
        return []
    file, _, scale = text.rpartition(":")
    if not file or Path(text).exists():
        return [(_not_empty(text, "--adapter"), 1.0)]
    try:
        return [(file, float(scale))]
    except ValueError:
        return [(text, 1.0)]  # opening it says what is wrong


def _pruning(options: GenerationOptions) -> Pruning | None:
    """``1024`` cells, ``64M`` bytes or ``25%`` of the tokens."""
    text = options.prune
    if text is None:
        if options.prune_every:
            raise OptionError("--prune-every says when to prune and --prune how far; give both")
        return None
    every = options.prune_every
    try:
        if text.endswith("%"):
            return Pruning(float(text[:-1]) / 100, "share", every=every)
        return Pruning(int(text), every=every) if text.isdigit() else Pruning(sizes.parse(text, "--prune"), "bytes", every=every)
    except (ValueError, OptionError):
        raise OptionError(f"--prune takes cells as 1024, a size as 64M or a share as 25%, and not {text!r}") from None


def _or_file(text: str, what: str) -> str:
    return read_text(text[1:], what) if text.startswith("@") else text


def _grammar(options: GenerationOptions) -> str | None:
    if options.grammar is not None and options.grammar_file is not None:
        raise OptionError("--grammar and --grammar-file contradict each other; give one of them")
    if options.grammar_file is not None:
        return read_text(options.grammar_file, "the grammar")
    return _or_file(options.grammar, "the grammar") if options.grammar is not None else None


def _schema(options: GenerationOptions) -> Mapping[str, Any] | None:
    if options.json_schema is None:
        return None
    if options.grammar is not None or options.grammar_file is not None:
        raise OptionError("--json-schema and a grammar contradict each other; give one of them")
    import json

    try:
        schema = json.loads(_or_file(options.json_schema, "the JSON schema"))
    except json.JSONDecodeError as error:
        raise ConstraintError(f"--json-schema is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise ConstraintError("--json-schema is not a JSON object; a schema that allows everything is {}")
    return schema


def _tools(name: str) -> Sequence[Mapping[str, Any]]:
    """The tool schemas in a file. Raises OptionError."""
    import json

    from edge_rt.core.context.tools import checked

    try:
        return checked(json.loads(read_text(name, "the tools")))
    except (ValueError, RecursionError) as error:
        raise OptionError(f"the tools in {name} are not JSON: {error}") from error


# ---- post-processing --------------------------------------------------------------------------------------------------


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
    from edge_rt.registry import Registry

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
    from edge_rt.rules import RuleFile, Ruleset, change

    if options.rules is None:
        yield Ruleset(change({}, options.rule), registry)
        return
    with RuleFile(options.rules, registry, overrides=options.rule, watch=watch, told=told) as book:
        yield book


# ---- to the terminal -------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """A finished answer: its text, its last event, and whether Ctrl-C ended it."""

    text: str
    done: Done
    interrupted: bool


def answer(session: Session, prompt: str | Sequence[Message], request: GenerateOptions, show: Show) -> Answer:
    """Answer a prompt and show the events; Ctrl-C ends the answer early."""
    with cancelling(session.cancel) as interrupts:  # preparing imports much, and an exception in the midst of that breaks it
        events = session.generate(prompt, request)
        if interrupts:
            session.cancel()
        # The request ends here whatever happens: a generator that a traceback keeps alive would hold the session.
        with closing(cast("Generator[Event]", events)):
            text, done = show(events)
    return Answer(text, done, bool(interrupts))


def show_text(events: Iterable[Event]) -> tuple[str, Done]:
    """Stream an answer to standard output, notices to standard error; returns the whole text and the last event."""
    parts: list[str] = []
    for event in events:
        if isinstance(event, Delta):
            if event.text:
                parts.append(event.text)
                write(event.text)
        elif isinstance(event, Notice):
            say(f"note: {event.message}")
        elif isinstance(event, Done):
            _say_context(event)
            return "".join(parts), event
    raise AssertionError("the answer ended without a Done event")


def show_json(events: Iterable[Event]) -> tuple[str, Done]:
    """One JSON object a line for every event; returns the whole text and the last event."""
    parts: list[str] = []
    for event in events:
        write_json(record(event))
        if isinstance(event, Delta):
            parts.append(event.text)
        elif isinstance(event, Done):
            return "".join(parts), event
    raise AssertionError("the answer ended without a Done event")


def facts(done: Done) -> str:
    """One line about an answer: tokens, rates, context."""
    use, times, context = done.usage, done.timings, done.context
    parts = [f"context {context.used} of {context.allowed}", f"prompt {use.prompt_tokens} tokens"]
    if context.absent_tokens:
        parts[0] += f", {context.absent_tokens} tokens left it"
    if context.missing_cells:
        parts[0] += f", {context.missing_cells} cells pruned"
    if use.reused_tokens:
        parts[-1] += f", {use.reused_tokens} of them reused"
    if use.computed_tokens and times.prompt > 0:
        parts[-1] += f" ({use.computed_tokens / times.prompt:.0f}/s)"
    rate = decode_rate(done)
    parts.append(f"answer {use.completion_tokens} tokens" + (f" ({rate:.1f}/s)" if rate else ""))
    if use.drafted_tokens:
        parts.append(f"{use.accepted_tokens} of {use.drafted_tokens} drafted tokens right")
    parts.append(f"first token after {times.first_token:.3f} s")
    for one in done.post:
        if did := ", ".join(f"{count} {kind}" for kind, count in one.counts.items() if count):
            parts.append(f"{one.name} {did}")
    return f"[{'; '.join(parts)}; {done.reason.replace('_', ' ')}; seed {done.seed}]"


def say_sustained(model: Model, *, json: bool, verbose: bool) -> None:
    """What --power and --celsius came to, if they were given: as JSON, as a line with -v, and never silent where they were not held."""
    from edge_rt.limits import sentence, sustained

    found = sustained(model.engine)
    if found is None:
        return
    if json:
        write_json({"event": "sustained", **found._asdict()})
    elif verbose:
        say(f"[{sentence(found)}]")
    elif found.problem:
        say(f"note: {found.problem}")


def _say_context(done: Done) -> None:
    """Why an answer ended early is never silent. (What left the context and what came back, a Notice has said.)"""
    if done.reason == "context_full":
        allowed = done.context.allowed
        say(f"note: the answer ends because the context of {allowed} tokens is full; --ctx N allows more, where the model does")
