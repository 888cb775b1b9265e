"""What `run` and `chat` share: from options to a model and a request, and from events to text or JSON."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from edge_rt import model_hub
from edge_rt.cli import interrupts
from edge_rt.cli.options import GenerationOptions, ModelOptions, PostOptions
from edge_rt.cli.output import ProgressBar, write, write_json, write_stderr
from edge_rt.errors import ConstraintError, OptionError, RuleError
from edge_rt.types import Delta, Done, Event, GenerateOptions, Message, Notice, Pruning, SamplingParams, decode_rate, record

if TYPE_CHECKING:
    from edge_rt.model import Model
    from edge_rt.plugin_host.registry import Registry
    from edge_rt.postprocess.rules import Rulebook
    from edge_rt.session import Session

Show = Callable[[Iterable[Event]], tuple[str, Done]]
"""Shows the events of an answer as they come; returns the whole text and the last event."""
OnChange = Callable[[RuleError | None], None]
"""Called after rules were read again, with the error if they cannot be used."""


# ---- from options to a model and a request ---------------------------------------------------------------------------


@contextmanager
def opened(options: ModelOptions, registry: Registry | None = None) -> Iterator[Model]:
    """Open the model that the options name, with a progress bar, and close it at the end."""
    path = model_hub.resolve_model(options.model)
    memory = model_hub.parse_size(options.memory, "--memory") if options.memory is not None else None
    more: dict[str, Any] = {}
    if isinstance(options, GenerationOptions):
        adapter = _adapter(options.adapter)
        adapters = {Path(adapter[0]).name: adapter[0]} if adapter else {}
        more = {"policy": options.policy, "embedder": options.embedder, "adapters": adapters}
    import edge_rt

    started = time.perf_counter()
    gc.disable()  # opening imports much and frees nothing: garbage collection would be a tenth of the start-up time
    try:
        with ProgressBar() as progress:
            model = edge_rt.open(
                path,
                engine=options.engine,
                device=options.device,
                context=options.ctx,
                threads=options.threads,
                memory=memory,
                pack=not options.no_pack,
                key_type=options.key_type or "f16",  # type: ignore[arg-type]  # one of the option's choices
                compensation=options.compensation or "auto",
                power=options.power,
                celsius=options.celsius,
                progress=progress,
                registry=registry,
                **more,
            )
            import edge_rt.session  # the answer needs it, and the vocabulary is still loading
    finally:
        gc.freeze()
        gc.enable()
    with model:
        interrupts.forget()
        if options.verbose:
            info, applied = model.info, f", with {model.compensation.sentence}" if model.compensation else ""
            seconds = time.perf_counter() - started
            write_stderr(f"[{path.name}: {info.architecture} on {info.engine}, {info.device}{applied}; opened in {seconds:.3f} s]")
        yield model


def generate_options(options: GenerationOptions, logprobs: int = 0) -> GenerateOptions:
    """The request that the options describe; files they name are read. Raises OptionError, ConstraintError."""
    sampling = {name: getattr(options, name) for name in SamplingParams._fields if name != "logit_bias"}
    adapter = _adapter(options.adapter)
    return GenerateOptions(
        max_tokens=options.max_tokens,
        stop=tuple(_not_empty(text, "--stop") for text in options.stop),
        sampling=SamplingParams(**sampling, logit_bias=dict(map(_bias, options.logit_bias))),
        grammar=_grammar(options),
        json_schema=_schema(options),
        logprobs=logprobs,
        speculate=options.speculate,
        post=post_processor_names(options),
        ignore_eos=options.ignore_eos,
        prune=_pruning(options),
        tools=_tools(options.tools) if options.tools is not None else (),
        adapter=Path(adapter[0]).name if adapter else None,
        adapter_scale=adapter[1] if adapter else 1.0,
    )


def read_text(name: str, what: str) -> str:
    """The text of a file, or of standard input for ``-``. ``what`` names it in errors. Raises OptionError."""
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return data.decode()
    except OSError as error:
        raise OptionError(f"cannot read {what} from {name}: {(error.strerror or str(error)).lower()}") from error
    except UnicodeDecodeError as error:
        raise OptionError(f"{what} in {name} is not UTF-8 (byte {error.start}); convert it first, for example with iconv") from error


def text_or_file(text: str, what: str) -> str:
    """An option's text, or for ``@FILE`` the text of that file. Raises OptionError."""
    return read_text(text[1:], what) if text.startswith("@") else text


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


def _adapter(text: str | None) -> tuple[str, float] | None:
    """``FILE`` or ``FILE:SCALE`` as (file, scale). A colon that belongs to the name of an existing file begins no scale."""
    if text is None:
        return None
    file, _, scale = text.rpartition(":")
    if not file or Path(text).exists():
        return _not_empty(text, "--adapter"), 1.0
    try:
        return file, float(scale)
    except ValueError:
        return text, 1.0  # opening the file reports what is wrong


def _pruning(options: GenerationOptions) -> Pruning | None:
    """``1024`` cells, ``64M`` bytes or ``25%`` of the tokens."""
    text, every = options.prune, options.prune_every
    if text is None:
        if every:
            raise OptionError("--prune-every says when to prune and --prune how far; give both")
        return None
    try:
        if text.endswith("%"):
            return Pruning(float(text[:-1]) / 100, "share", every=every)
        return Pruning(int(text), every=every) if text.isdigit() else Pruning(model_hub.parse_size(text, "--prune"), "bytes", every=every)
    except (ValueError, OptionError):
        raise OptionError(f"--prune takes cells as 1024, a size as 64M or a share as 25%, and not {text!r}") from None


def _grammar(options: GenerationOptions) -> str | None:
    if options.grammar is not None and options.grammar_file is not None:
        raise OptionError("--grammar and --grammar-file contradict each other; give one of them")
    if options.grammar_file is not None:
        return read_text(options.grammar_file, "the grammar")
    return text_or_file(options.grammar, "the grammar") if options.grammar is not None else None


def _schema(options: GenerationOptions) -> Mapping[str, Any] | None:
    if options.json_schema is None:
        return None
    if options.grammar is not None or options.grammar_file is not None:
        raise OptionError("--json-schema and a grammar contradict each other; give one of them")
    import json

    try:
        schema = json.loads(text_or_file(options.json_schema, "the JSON schema"))
    except json.JSONDecodeError as error:
        raise ConstraintError(f"--json-schema is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise ConstraintError("--json-schema is not a JSON object; a schema that allows everything is {}")
    return schema


def _tools(name: str) -> Sequence[Mapping[str, Any]]:
    import json

    from edge_rt.chat.tools import checked

    try:
        return checked(json.loads(read_text(name, "the tools")))
    except (ValueError, RecursionError) as error:
        raise OptionError(f"the tools in {name} are not JSON: {error}") from error


# ---- post-processing -------------------------------------------------------------------------------------------------


def post_processor_names(options: PostOptions) -> tuple[str, ...]:
    """The names that --post lists. Raises OptionError for an empty one."""
    names = tuple(name.strip() for name in options.post.split(",")) if options.post is not None else ()
    if "" in names:
        raise OptionError("--post takes names with commas between them, as redaction,punctuation")
    return names


def is_post_processed(options: PostOptions) -> bool:
    """Whether any option asks for post-processing."""
    return options.post is not None or options.rules is not None or bool(options.rule)


def plugins_for(options: PostOptions) -> Registry | None:
    """The registry of post-processors; None, and no plugin is imported, if the options ask for no post-processing."""
    if not is_post_processed(options):
        return None
    from edge_rt.plugin_host.registry import Registry

    return Registry.load()


@contextmanager
def rulebook(
    options: PostOptions, registry: Registry | None, *, watch: bool = False, on_change: OnChange = lambda error: None
) -> Iterator[Rulebook | None]:
    """The rules of the options, None without any. Raises RuleError, PluginError.

    With ``watch`` a rule file is read again whenever it changes.
    """
    if registry is None or (options.rules is None and not options.rule):
        yield None
        return
    from edge_rt.postprocess.rules import RuleFile, Ruleset, change

    if options.rules is None:
        yield Ruleset(change({}, options.rule), registry)
        return
    with RuleFile(options.rules, registry, overrides=options.rule, watch=watch, told=on_change) as book:
        yield book


# ---- to the terminal -------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """A finished answer: its text, its last event, and whether Ctrl-C ended it."""

    text: str
    done: Done
    interrupted: bool


def answer(session: Session, prompt: str | Sequence[Message], request: GenerateOptions, show: Show) -> Answer:
    """Answer a prompt and show the events; Ctrl-C ends the answer early."""
    with interrupts.cancelling(session.cancel) as seen:  # not KeyboardInterrupt: an exception in the midst of an import breaks it
        events = session.generate(prompt, request)
        if seen:
            session.cancel()
        # The request ends here whatever happens: a generator that a traceback keeps alive would hold the session.
        with closing(cast("Generator[Event]", events)):
            text, done = show(events)
    return Answer(text, done, bool(seen))


def show_text(events: Iterable[Event]) -> tuple[str, Done]:
    """Stream an answer to standard output, notices to standard error."""
    parts: list[str] = []
    for event in events:
        if isinstance(event, Delta):
            if event.text:
                parts.append(event.text)
                write(event.text)
        elif isinstance(event, Notice):
            write_stderr(f"note: {event.message}")
        elif isinstance(event, Done):
            if event.reason == "context_full":
                write_stderr(
                    f"note: the answer ends because the context of {event.context.allowed} tokens is full; "
                    "--ctx N allows more, where the model does"
                )
            return "".join(parts), event
    raise AssertionError("the answer ended without a Done event")


def show_json(events: Iterable[Event]) -> tuple[str, Done]:
    """Write each event as one line of JSON."""
    parts: list[str] = []
    for event in events:
        write_json(record(event))
        if isinstance(event, Delta):
            parts.append(event.text)
        elif isinstance(event, Done):
            return "".join(parts), event
    raise AssertionError("the answer ended without a Done event")


def summary(done: Done) -> str:
    """An answer in one line: context, tokens, rates, seed."""
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
