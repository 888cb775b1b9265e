"""One conversation: its cells, its tokens, the requests made of it, and its file."""

from __future__ import annotations

import threading
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from edge_rt.core.context import session_file
from edge_rt.core.context.history import SequenceState
from edge_rt.core.context.manager import ContextManager, max_tokens_in_memory
from edge_rt.core.engine import AppliesAdapters
from edge_rt.core.generate import loop
from edge_rt.core.generate.output import Detokeniser, OutputStream, StopMatcher
from edge_rt.core.generate.sampler import Sampler
from edge_rt.core.kv.prefix_cache import common_prefix
from edge_rt.errors import OptionError, SessionFileError
from edge_rt.power.limits import news
from edge_rt.types import Event, GenerateOptions, Message, Notice, check, check_context, override

if TYPE_CHECKING:
    from edge_rt.chat.transcript import Span
    from edge_rt.core.context.recall import Recall
    from edge_rt.core.generate.speculative import NgramDrafter
    from edge_rt.model import Adapter, Model
    from edge_rt.native.llama import Vocab
    from edge_rt.structured.grammar import Constraint

# Sessions to a file and back: the runtime's part of core/context/session_file.py.


def save_session(
    path: Path, model: Model, sequence: int | None, history: SequenceState, adapter: Adapter | None, *, durable: bool,
    moved: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Write a session that answers no request; ``durable``, ``moved``: see ``Session.save``. Raises UserError if the disk says no."""
    cells: bytes | memoryview = b""
    if sequence is not None:
        with model.lock:
            cells = model.engine.export_sequence(sequence)
    made_with = None if adapter is None else session_file.MadeWith(adapter.name, adapter.key, adapter.scale)
    found = session_file.SavedSession(model.info.engine, model.key, history, cells, made_with)
    session_file.save(path, found, durable=durable, moved=moved)


def read_session(path: Path, model: Model, moved: Callable[[], None] = lambda: None) -> session_file.SavedSession:
    """A saved session of this model; ``moved`` is called after each piece of the file. Raises SessionFileError."""
    return session_file.load(path, engine=model.info.engine, model=model.key, moved=moved)


def session_path(saved: session_file.SavedSession, path: Path, model: Model) -> tuple[int | None, SequenceState, Adapter | None]:
    """Its sequence, history and adapter. Raises SessionFileError, and what opening the adapter raises."""
    adapter, engine = model.adapters.saved(*saved.adapter) if saved.adapter is not None else None, model.engine
    sequence = None
    with model.lock:
        if saved.cells:
            sequence = engine.import_sequence(saved.cells)
        if (0 if sequence is None else engine.length(sequence)) != saved.history.cells:
            if sequence is not None:
                engine.free_sequence(sequence)
            raise SessionFileError(f"the session {path} has other cells than tokens; start a new session")
        if sequence is not None and adapter is not None and isinstance(engine, AppliesAdapters):
            engine.adapt(sequence, adapter.number, adapter.scale, imported=True)
    return sequence, saved.history, adapter


# One conversation: its cells, its tokens, and the requests made of it.


class Stream(Iterator[Event]):
    """The events of one request. The request ends with its last event, with ``close``, or when the stream is dropped."""

    def __init__(self, events: Generator[Event, None, None], end: Callable[[], None]) -> None:
        self._events, self._end = events, end
        self._over = False

    def __next__(self) -> Event:
        try:
            return next(self._events)
        except BaseException:  # the last event was taken, or something went wrong
            self._finish()
            raise

    def close(self) -> None:
        """End the request, also if it never started. While another thread takes an event, that thread ends it."""
        try:
            self._events.close()
        except ValueError:  # the generator is running
            return
        self._finish()

    def _finish(self) -> None:
        if not self._over:
            self._over = True
            self._end()

    def __del__(self) -> None:
        self.close()


class Session:
    """A context manager. Requests run one at a time; what a request's prompt shares with the session's cells is not computed again."""

    def __init__(
        self, model: Model, sequence: int | None = None, history: SequenceState | None = None, *,
        context: int | None = None, owner: str = "", adapter: Adapter | None = None,
    ) -> None:  # fmt: skip
        """Use ``Model.session`` or ``Model.restore``."""
        self.owner = owner
        self._model = model
        self._sequence = sequence
        self._history = history if history is not None else SequenceState()
        self._adapter = adapter
        self._context = context
        check_context(context, model.info.max_context)
        self._memory_told = False
        self._recall: Recall | None = None
        self._busy = threading.Lock()
        self._cancelled = threading.Event()
        self._closed = False
        self._stream: weakref.ref[Stream] | None = None

    @property
    def sequence(self) -> int | None:
        """The engine's number for its cells, None while it has none."""
        return self._sequence

    @property
    def context(self) -> int | None:
        """Cells that its requests may use, None for as many as the model's."""
        return self._context

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens in the session's cells."""
        return tuple(self._history.resident())

    @property
    def shares_with(self) -> object:
        """Sessions for which this is the same may go on from each other's cells: those of one owner, made with one adapter."""
        return self.owner, self._adapter

    @property
    def history(self) -> SequenceState:
        """All that was said, whether it is still in cells or was evicted. Not for changing."""
        return self._history

    def generate(self, prompt: str | Sequence[Message], options: GenerateOptions | None = None, **overrides: Any) -> Stream:
        """Answer a prompt: events as they happen, the last one Done. Leaving the loop early and closing the stream ends the request.

        A text is continued as it is; a list of messages goes through the model's chat template. The prompt is always the whole one:
        a chat passes all its messages each time, and only what is new is computed. If the last message is the assistant's, its text is
        the beginning of the answer, which goes on from there; the events hold what follows. Keywords replace fields of ``options`` and
        of its ``sampling`` (``max_tokens=64, temperature=0``).

        When the context gets short, the model's policy chooses what leaves it, and the last event says so.

        Raises OptionError, ConstraintError, ContextOverflow (what must stay does not fit), ModelChanged, PluginError.
        """
        job, running = self.begin(prompt, options, **overrides)
        stream = Stream(loop.run_single(job, running), partial(self.end, job))
        self._stream = weakref.ref(stream)  # weak: a stream nobody holds any more ends its request
        return stream

    def begin(
        self,
        prompt: str | Sequence[Message],
        options: GenerateOptions | None = None,
        *,
        tokens: list[int] | None = None,
        room: int | None = None,
        **overrides: Any,
    ) -> tuple[loop.Request, loop.GenerationSteps[None]]:
        """Prepare an answer whose steps someone else takes (``core.generate.scheduler.Scheduler``): the request, and its events and steps.

        ``tokens`` of the prompt, if they are known (``Model.prompt_tokens``). ``room``: cells that there is memory for.
        Whoever takes the steps calls ``end`` after the last. Raises what ``generate`` raises.
        """
        return self.start(prompt, options, tokens=tokens, room=room, **overrides)()

    def start(
        self,
        prompt: str | Sequence[Message] | None,
        options: GenerateOptions | None = None,
        *,
        tokens: list[int] | None = None,
        room: int | None = None,
        **overrides: Any,
    ) -> Callable[[], tuple[loop.Request, loop.GenerationSteps[None]]]:
        """``begin`` in two parts, for a prompt that may be far longer than the context. This is the first; it opens and frees sequences.

        What it returns is the second, to be called once, on any thread: what leaves the context is chosen there, which takes a second
        for a megabyte, and the engine's lock is taken for moments only. Up to ``end`` the session is busy. ``prompt`` None: of ``tokens``.
        """
        chosen = override(options or GenerateOptions(), overrides)
        if self._closed:
            raise OptionError("the session was closed; open another with model.session()")
        if not self._busy.acquire(blocking=False):
            raise OptionError("the session is answering another request; wait for it, cancel it, or open another session")
        try:
            make = self._prepare(prompt, chosen, tokens, room)
        except BaseException:
            self._busy.release()
            raise

        def rest() -> tuple[loop.Request, loop.GenerationSteps[None]]:
            try:
                job = make()
            except BaseException:
                self._busy.release()
                raise
            return job, self._run(job, chosen)

        return rest

    async def agenerate(
        self, prompt: str | Sequence[Message], options: GenerateOptions | None = None, **overrides: Any
    ) -> AsyncIterator[Event]:
        """The same for asyncio: steps run on a worker thread. Leaving the iteration early cancels the request."""
        import asyncio

        events = await asyncio.to_thread(self.generate, prompt, options, **overrides)
        try:
            while (event := await asyncio.to_thread(next, events, None)) is not None:
                yield event
        finally:
            self.cancel()
            await asyncio.shield(asyncio.to_thread(events.close))

    def cancel(self) -> None:
        """End the running request at the next step (from any thread): it finishes with reason ``cancelled``."""
        self._cancelled.set()

    def save(self, path: str | Path, *, durable: bool = True, moved: Callable[[], None] = lambda: None) -> None:
        """Write tokens and cells to a file. Raises UserError if the disk says no, OptionError while a request runs.

        ``durable``: so that they survive the end of the system's power. ``moved`` is called while that goes on. Cells of what left the
        context are not saved: if it is recalled after a restore, it is computed again.
        """

        if not self._busy.acquire(blocking=False):
            raise OptionError("the session is answering a request; save it when that is done")
        try:
            save_session(Path(path), self._model, self._sequence, self._history, self._adapter, durable=durable, moved=moved)
        finally:
            self._busy.release()

    def clone(self) -> Session:
        """Another session that goes on from what was said in this one. Raises OptionError while a request runs, OutOfMemory.

        What left the context is not known to the other: if it is recalled there, it is computed again.
        """
        if not self._busy.acquire(blocking=False):
            raise OptionError("the session is answering a request; clone it when that is done")
        try:
            sequence = None
            if self._sequence is not None:
                with self._model.lock:
                    sequence = self._model.engine.fork_sequence(self._sequence, self._history.cells)
            other = self._model.session(context=self._context, owner=self.owner)
            other._sequence, other._adapter = sequence, self._adapter
            other._history = SequenceState(self._history.tokens, self._history.evicted, self._history.condensed)
        finally:
            self._busy.release()
        return other

    def close(self, *, share: bool = True) -> None:
        """End the session; ``share``: its cells may serve later prompts with the same beginning."""
        if self._closed:
            return
        self._closed = True
        self.cancel()
        if self._stream is not None and (stream := self._stream()) is not None:
            stream.close()
        with self._busy:
            self._model.end_session(self, self._sequence, self._history.whole() if share else [])
            self._sequence = None
            if self._recall:
                self._recall.forget()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # ---- one request -------------------------------------------------------------------------------------------------

    def _prepare(
        self, prompt: str | Sequence[Message] | None, options: GenerateOptions, tokens: list[int] | None, room: int | None
    ) -> Callable[[], loop.Request]:
        """Check the request, then find the cells it can start from; what is returned makes the prompt fit."""
        model = self._model
        if tokens is None:
            tokens = model.prompt_tokens("" if prompt is None else prompt, options.tools)
        if not tokens:
            raise OptionError("the prompt is empty; give some text")
        check(options, model.info.max_context)
        adapter = model.adapters.chosen(options.adapter, options.adapter_scale)
        constraint = _constraint(model.vocab, options)
        allowed = self._asked(options)
        sampler = Sampler(model.vocab, options.sampling, constraint, context=allowed, ban_eog=options.ignore_eos)
        try:
            writer = OutputStream(Detokeniser(model.vocab), StopMatcher(options.stop), model.pipeline(options.post, options.rules))
            if options.logprobs and writer.pipeline.conceals:
                raise OptionError("log-probabilities tell the text that post-processing is to conceal; ask for one of them")
            window = self._window(tokens, allowed, room, options, lambda: _pieces(model.vocab, prompt, tokens, options.tools), adapter)
        except BaseException:
            self._give_up(sampler)
            raise
        return partial(self._job, options, tokens, window, sampler, writer)

    def _job(
        self, options: GenerateOptions, tokens: list[int], window: ContextManager, sampler: Sampler, writer: OutputStream
    ) -> loop.Request:
        """Make the prompt fit."""
        model = self._model
        try:
            window.fit()
            with model.lock:
                exact = model.engine.exact_rows() if options.speculate else 1
            speculate = min(options.speculate, exact - 1)
            drafter = _drafter(tokens) if speculate else None
            sampler.read(tokens)
        except BaseException:
            self._give_up(sampler)
            raise
        self._cancelled.clear()
        return loop.Request(
            engine=model.engine, lock=model.lock, vocab=model.vocab, window=window, sampler=sampler, writer=writer,
            max_tokens=options.max_tokens, drafter=drafter, speculate=speculate, logprobs=options.logprobs,
            ignore_eos=options.ignore_eos, cancelled=self._cancelled.is_set, relieve=model.prefixes.clear, news=partial(news, model.engine),
        )  # fmt: skip

    def _give_up(self, sampler: Sampler) -> None:
        """The request cannot be begun."""
        sampler.close()
        self._history.truncate(self._history.fed)

    def _window(
        self, tokens: list[int], allowed: int, room: int | None, options: GenerateOptions, pieces: Callable[[], list[Span]],
        adapter: Adapter | None,
    ) -> ContextManager:  # fmt: skip
        """The sequence to continue, our own or one that shares more of the prompt, cut to what it shares; one token is left to feed."""
        model = self._model
        with model.lock:
            self._choose(adapter)
            own = self._history.boundary(common_prefix(self._history.tokens, tokens))
            other = model.prefixes.take(tokens, self.shares_with) if own < len(tokens) // 2 else None
            if other and other[1] > own:
                if self._sequence is not None:
                    model.prefixes.give(self._sequence, self._history.whole(), self.shares_with)
                self._sequence, own = other
                self._history = SequenceState(tokens[:own])
            elif other:
                model.prefixes.give(other[0], tokens[: other[1]], self.shares_with)
            if self._sequence is None:
                self._sequence = model.engine.new_sequence()
                if adapter is not None and isinstance(model.engine, AppliesAdapters):
                    model.engine.adapt(self._sequence, adapter.number, adapter.scale)
            most = [cells for cells in (max_tokens_in_memory(model.engine, self._history.cells), room) if cells is not None]
            allowed = max(1, min([allowed, *most]))
            window = ContextManager(
                model.engine, model.lock, self._sequence, self._history, allowed=allowed, policy=model.policy.name,
                keep=model.policy.keep, answer=options.max_tokens, pieces=pieces, grader=model.grader, text=model.detokenize,
                recall=self._remember if model.policy.recalls else None, pruning=options.prune,
            )  # fmt: skip
        window.start(tokens, own)
        return window

    def _choose(self, adapter: Adapter | None) -> None:
        """Nothing that was made with another adapter is gone on from: its memory is what the request was let in with. The lock is held."""
        if adapter == self._adapter:
            return
        if self._sequence is not None:
            self._model.engine.free_sequence(self._sequence)
        if self._recall:
            self._recall.forget()
        self._sequence, self._history, self._recall, self._adapter = None, SequenceState(), None, adapter

    def _remember(self) -> Recall:
        """What this session remembers of what left its context."""
        if self._recall is None:
            self._recall = self._model.recall()
        return self._recall

    def _run(self, job: loop.Request, options: GenerateOptions) -> loop.GenerationSteps[None]:
        messages = self._model.new_notices()
        asked, allowed = self._asked(options), job.window.allowed
        if allowed < asked and not self._memory_told:
            self._memory_told = True
            messages.append(f"free memory allows a context of {allowed:,} tokens and not {asked:,}; close something to have more")
        if left := job.window.notice(quote=not job.writer.pipeline.conceals):
            messages.append(left)
        if options.speculate and job.drafter is None:
            messages.append("speculation is off: this model's kernels do not give bit-identical results for several tokens at once")
        yield from map(Notice, messages)
        yield from loop.generate_steps(job)

    def _asked(self, options: GenerateOptions) -> int:
        """Cells that the request, the session or the model asks for."""
        return options.context or self._context or self._model.info.max_context

    def end(self, job: loop.Request) -> None:
        """A request that was begun is over, however it ended: another may begin. Once for each."""
        job.sampler.close()
        self._history.truncate(self._history.fed)
        self._busy.release()


def _constraint(vocab: Vocab, options: GenerateOptions) -> Constraint | None:
    """What binds the answer; most requests have none, and do not pay for the import."""
    if options.grammar is None and options.json_schema is None:
        return None
    from edge_rt.structured.grammar import compile_constraint

    return compile_constraint(vocab, options.grammar, options.json_schema)


def _drafter(prompt: Sequence[int]) -> NgramDrafter:
    """An index of the prompt to draft from."""
    from edge_rt.core.generate.speculative import NgramDrafter

    drafter = NgramDrafter()
    drafter.extend(prompt)
    return drafter


def _pieces(vocab: Vocab, prompt: str | Sequence[Message] | None, tokens: Sequence[int], tools: Sequence[Mapping[str, Any]]) -> list[Span]:
    """The prompt's segments; most requests fit, and do not pay for the import."""
    from edge_rt.chat.transcript import find_spans

    return find_spans(vocab, prompt, tokens, tools)
