"""The composition root: `open` puts engine, weights, context and post-processing together as a `Model`, and nothing else does."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from edge_rt.core.engine import AppliesAdapters
from edge_rt.core.gguf import model_file
from edge_rt.core.gguf.model_file import ModelFile, OpenFile
from edge_rt.deploy import plan as deployment
from edge_rt.errors import AbiMismatch, NativeError, OptionError, SessionFileError, UnsupportedModel
from edge_rt.native.llama import VocabLoad

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edge_rt.core.context.grading import Grade
    from edge_rt.core.context.history import Segment
    from edge_rt.core.context.recall import Recall
    from edge_rt.core.context.session_file import SavedSession
    from edge_rt.core.engine import Engine, EngineInfo, EngineOptions, MemoryReport
    from edge_rt.core.generate.scoring import Embedding, Vector
    from edge_rt.core.gguf.lora import LoraFile
    from edge_rt.error_correction import Applied
    from edge_rt.native.llama import Vocab
    from edge_rt.plugin_host.guard import PluginContextPolicy, PluginEmbedder
    from edge_rt.plugin_host.registry import EngineChoice, Registry
    from edge_rt.postprocess.pipeline import Pipeline
    from edge_rt.postprocess.rules import Rulebook, Ruleset
    from edge_rt.session import Session
    from edge_rt.types import Message

# The vocabulary of a model that is being opened, or of its engine.


class Vocabulary:
    """The vocabulary of the model file, loaded beside everything else; or the engine's own."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self._load: VocabLoad | None = None
        self._error: NativeError | None = None
        self._found: Vocab | None = None

    def start(self, path: str) -> None:
        """Begin to load it. What goes wrong is told whoever asks for it: an engine may bring another."""
        try:
            self._load = VocabLoad(path)
        except NativeError as error:
            self._error = error

    @property
    def loading(self) -> bool:
        """Whether ``get`` would wait."""
        return self._found is None and self._load is not None and self._load.loading

    @property
    def loaded(self) -> bool:
        """Whether libllama has loaded it from the file."""
        return self._load is not None and self._found is not None and self._found is self._load.vocab

    def get(self) -> Vocab:
        """Wait for it. Raises what loading raised, NativeError after ``close``."""
        if self._found is None:
            self._found = self._find()
        return self._found

    def _find(self) -> Vocab:
        own = getattr(self.engine, "vocab", None)
        if own is not None:  # an engine without libllama brings its own (the null engine does)
            return own  # type: ignore[no-any-return]
        try:
            if self._load is not None:
                return self._load.result()
            assert self._error is not None, "a load that did not start says why"
            raise self._error
        except AbiMismatch:  # our bindings refused the library: the engine's own bindings have opened the model
            pointer = getattr(self.engine, "llama_model", None)
            if pointer is None:
                raise
            from edge_rt.native.llama import Vocab

            return Vocab.adopt(pointer, self.engine)

    def close(self) -> None:
        """Let go of it, at any moment; no thread is left behind."""
        if self._load is not None:
            self._load.close()
        if self._found is not None:
            self._found.close()


# The adapters of an open model, by name: each file is opened once, and every request chooses one or none.

MOST = 1000.0
"""How often an adapter can be applied, or taken away."""


class Adapter(NamedTuple):
    """An adapter as a request has chosen it: what cells made with it depend on. ``number``: the engine's. ``key``: of its content."""

    name: str
    number: int
    key: str
    scale: float


class _Opened(NamedTuple):
    number: int
    key: str
    lora: LoraFile


class Adapters:
    """Names and files. Any thread may ask."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._files: dict[str, str | os.PathLike[str]] = {}
        self._opened: dict[str, _Opened] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """What a request can ask for."""
        return tuple(self._files)

    def declare(self, files: Mapping[str, str | os.PathLike[str]]) -> None:
        """Adapters that are opened when a request first asks for them. Raises OptionError for a name that is taken."""
        for name in files:
            if not name or name in self._files:
                raise OptionError(f"there is an adapter {name!r} already; choose another name" if name else "an adapter has no name")
        self._files.update(files)

    def open(self, name: str, path: str | os.PathLike[str]) -> None:
        """Open one now. Raises OptionError, ModelFileError, UnsupportedModel; then its name is free as before."""
        self.declare({name: path})
        try:
            self._get(name)
        except BaseException:
            del self._files[name]
            raise

    def chosen(self, name: str | None, scale: float) -> Adapter | None:
        """The adapter of a request; one that is applied 0 times is none. Raises OptionError, and what opening it raises."""
        if name is None:
            if scale != 1.0:
                raise OptionError("adapter_scale says how often an adapter is applied, and there is none; give an adapter too")
            return None
        if not abs(scale) <= MOST:
            raise OptionError(f"adapter_scale is {scale}; give {-MOST:g} to {MOST:g}")
        if name not in self._files:
            known = ", ".join(self._files) or "none"
            raise OptionError(f"there is no adapter {name!r:.80}; this model has {known}")
        found = self._get(name)
        return Adapter(name, found.number, found.key, float(scale)) if scale else None

    def saved(self, name: str, key: str, scale: float) -> Adapter:
        """The adapter that a saved session was made with, whatever it is called now. Raises SessionFileError if it is not here."""
        for own in sorted(self._files, key=lambda one: one != name):  # the likeliest first
            if own == name or own in self._opened:
                found = self._get(own)
                if found.key == key:
                    return Adapter(own, found.number, key, scale)
        raise SessionFileError(f"the session was made with another adapter, then called {name!r:.80}; open the model with that one")

    def _get(self, name: str) -> _Opened:
        with self._lock:
            if name not in self._opened:
                self._opened[name] = self._open(name)
            return self._opened[name]

    def _open(self, name: str) -> _Opened:
        from edge_rt.core.gguf.lora import open_lora

        model = self._model
        if not isinstance(model.engine, AppliesAdapters):
            raise OptionError(f"the engine {model.info.engine} applies no adapters; leave the adapter out, or choose another engine")
        lora = open_lora(self._files[name], model.file.header)
        try:
            with model.lock:
                number = model.engine.open_adapter(lora)
        except BaseException:
            lora.file.close()
            raise
        if lora.norms:
            model.notices.append(f"the adapter {name} has {len(lora.norms)} norms, which are left out: only its low-rank parts are applied")
        return _Opened(number, lora.file.key(), lora)

    def close(self) -> None:
        """Close the files; the engine has let go of them."""
        for found in self._opened.values():
            found.lora.file.close()
        self._opened.clear()
        self._files.clear()


# Embeddings of texts by an open model: numbers that lie close for texts of close meaning.


def embeddings(
    model: Model, texts: Iterable[str | Sequence[int]], *, pooling: str | None = None, normalize: bool = True
) -> Generator[Embedding, None, None]:  # fmt: skip
    """Each text's embedding, when it is asked for. Texts are tokenised as llama.cpp's embedding does it, or given as tokens.

    ``pooling``: mean, cls or last; left out: what the file says, else the mean. ``normalize``: to length 1.
    Sessions on other threads go on between two chunks of a text. Raises OptionError for an empty text, and for a model or an engine that
    makes none, ContextOverflow for a text longer than the context, OutOfMemory, NativeError.
    """
    # Loads NumPy, which no first token needs.
    from edge_rt.core.generate.scoring import Embedding, TextReader, finished, pooling_of, tokens_of

    how, info = pooling_of(model.file.header, pooling), model.info
    reader = TextReader(model.engine, model.prefixes.clear)
    try:
        for index, text in enumerate(texts):
            tokens = tokens_of(model.vocab, text, index, info.max_context)
            with model.lock:
                reader.begin(tokens, how)
            pooled: Vector | None = None
            while pooled is None:
                with model.lock:
                    pooled = reader.read(info.chunk)
            yield Embedding(finished(pooled, normalize=normalize), len(tokens))
    finally:
        with model.lock:
            reader.close()


# The composition root: everything is put together here and nowhere else. Runtime -> Model -> Session.
#
# Start-up is a race between the vocabulary, which libllama loads in C on a thread, and everything Python has to import (the engine,
# sampling). So this module imports only what starting the vocabulary takes; the rest comes while it loads.

Progress = Callable[[str, int, int], None]
GRADER = "content"
"""The grader of conversations."""


def open(
    path: str | os.PathLike[str],
    *,
    engine: str | None = None,
    device: str | None = None,
    context: int | None = None,
    threads: int | None = None,
    memory: int | None = None,
    pack: bool = True,
    key_type: Literal["f16", "q8_0"] = "f16",
    policy: str = "graded",
    embedder: str | None = None,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    compensation: str | os.PathLike[str] = "auto",
    power: float | None = None,
    celsius: float | None = None,
    progress: Progress | None = None,
    registry: Registry | None = None,
) -> Model:
    """Open a model.

    ``engine``, ``device``: by name, else the best that can. ``context``: cells per sequence, else what the model was trained with.
    ``threads``: else one for each CPU this process may use. ``memory``: bytes of weights that may be resident.
    ``pack``: make and use packed weights. ``policy``: what leaves the context when it gets short (docs/context.md).
    ``embedder``: by name, what tells which segments a question is about, else the model's own token embeddings.
    ``adapters``: files of LoRA adapters, by the names that requests use. ``compensation``: a side file that corrects what quantisation did
    (docs/compensation.md); ``auto``: the one beside the model, if there is one; ``off``: none. ``power``: watts, ``celsius``: degrees that
    the device is held to by computing less (docs/power.md). ``progress`` is told (phase, done, total), on any thread.

    A file that an earlier ``open`` found sound (core/gguf/model_file.py) is open as soon as the engine takes tokens; the first use of
    ``Model.vocab`` then waits for the rest of the vocabulary.

    Raises ModelFileError, UnsupportedModel, OptionError, PluginError, OutOfMemory, NativeError.
    """
    with ExitStack() as undo:
        deployed = deployment.find(path)
        source = OpenFile.open(deployed.model if deployed else path)
        undo.callback(os.close, source.fd)
        mark = model_file.fingerprint(source.fd)
        sound = model_file.is_verified(mark)
        vocabulary = Vocabulary()
        undo.callback(vocabulary.close)
        if sound:  # before our header parser, which takes milliseconds too
            vocabulary.start(source.native_path)
        file = ModelFile.read(source)
        undo.callback(file.map.close)
        if not sound:
            model_file.check_metadata(file)
            vocabulary.start(source.native_path)
        from edge_rt import error_correction
        from edge_rt.core.engine import EngineOptions
        from edge_rt.plugin_host.registry import Registry
        from edge_rt.power import limits
        from edge_rt.types import check_opening

        check_opening(context, threads, memory, power, celsius)
        plugins = registry or Registry.load()
        choice = plugins.choose_device(device)
        fitting = plugins.context_policy(policy)
        chosen = None if embedder is None else plugins.embedder(embedder)
        if chosen is not None and not fitting.recalls:
            raise OptionError(f"the policy {policy} recalls nothing, so an embedder has no use; choose graded, or leave the embedder out")
        held, named = limits.limits(choice.device, power, celsius), choice.device.name
        notices: list[str] = []
        own = held or (limits.planned(choice.device, deployed.plan.power, notices) if deployed else None)
        corrected = error_correction.opened(source.path, file, compensation, undo, deployed)
        options = EngineOptions(
            context, threads, memory, pack, key_type, named, progress, own, cpus=choice.offer.cpus, compensation=corrected
        )
        options = deployment.follow(deployed, options)
        engines = plugins.choose_engine(file, options, engine, choice.offer)
        opened = _open_engine(engines, file, options, notices, strict=engine is not None)
        undo.callback(opened.close)
        limits.check_held(opened, held)
        applied = error_correction.applied(opened, corrected)
        vocabulary.engine = opened
        if not sound:
            vocabulary.get()
            if vocabulary.loaded:
                model_file.mark_verified(mark)
        model = Model(file, opened, vocabulary, plugins, fitting, chosen, notices, applied)
        undo.callback(model.adapters.close)
        for name, adapter in (adapters or {}).items():
            model.adapters.open(name, adapter)
        undo.pop_all()
    return model


def _open_engine(choice: EngineChoice, file: ModelFile, options: EngineOptions, notices: list[str], *, strict: bool) -> Engine:
    """Try engines from the best down; falling back is said aloud."""
    for name, refusal in choice.refusals.items():
        if not strict and name == "ggml":
            notices.append(f"running with {choice.candidates[0][0].name} instead of ggml: {refusal.reason}")
    for i, (factory, _) in enumerate(choice.candidates):
        try:
            return factory.open(file, options)
        except (AbiMismatch, UnsupportedModel) as error:
            if strict or i == len(choice.candidates) - 1:
                raise
            notices.append(f"running with {choice.candidates[i + 1][0].name} instead of {factory.name}: {error}")
    raise AssertionError("choose_engine returns at least one candidate")


class UnitFacts(NamedTuple):
    """What `inspect` shows of a unit. ``resident`` is None where the system cannot say."""

    name: str
    blocks: int
    nbytes: int
    resident: int | None
    packed: bool


class Model:
    """An open model; a context manager. Several sessions may run on several threads: steps take turns."""

    def __init__(
        self,
        file: ModelFile,
        engine: Engine,
        vocabulary: Vocabulary,
        registry: Registry,
        policy: PluginContextPolicy,
        embedder: PluginEmbedder | None,
        notices: list[str],
        compensation: Applied | None = None,
    ) -> None:
        """Use ``open``."""
        from edge_rt.core.kv.prefix_cache import PrefixCache

        self.file, self.engine, self.registry, self.policy = file, engine, registry, policy
        self.compensation = compensation
        """What compensates for quantisation, None if nothing does."""
        self._embedder = None if embedder is None else (embedder.start(), embedder.relevant)
        self._vocabulary = vocabulary
        self.lock = threading.RLock()
        self.notices = [*notices, *getattr(engine, "notices", ())]
        self.prefixes = PrefixCache(engine, budget=self.info.max_context)
        self.adapters = Adapters(self)
        self._grade: Callable[[Segment], Grade] | None = None
        self._plain_rules: Ruleset | None = None
        self._told = 0
        self._sessions: set[Session] = set()
        self._closed = False
        if self.info.max_context > self.info.train_context > 0:
            trained, asked = self.info.train_context, self.info.max_context
            self.notices.append(f"a context of {asked} is beyond the {trained} the model was trained with; answers may degrade")

    @property
    def info(self) -> EngineInfo:
        """Static facts."""
        return self.engine.info

    @property
    def key(self) -> str:
        """Identifies what cells are made with: the model's content and its compensation's. Adapters are each session's own."""
        return self.file.key() + (f"+{self.compensation.key}" if self.compensation else "")

    @property
    def vocab(self) -> Vocab:
        """The vocabulary; the first use may wait until it is loaded. Raises what loading it raises (see ``open``)."""
        return self._vocabulary.get()

    # ---- text and tokens ---------------------------------------------------------------------------------------------

    def tokenize(self, text: str, *, special: bool = False, bos: bool | None = None) -> list[int]:
        """Text to tokens; see ``Vocab.tokenize``."""
        return self.vocab.tokenize(text, special=special, bos=bos)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Tokens to text; bytes that are no UTF-8 become U+FFFD."""
        return self.vocab.detokenize(tokens).decode(errors="replace")

    def prompt_tokens(self, prompt: str | Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Tokens of a raw text, or of messages and tool schemas through the model's chat template. Raises ConstraintError, OptionError."""
        if isinstance(prompt, str):
            if tools:
                raise OptionError("tools go through the chat template and a raw text does not; give messages, or write them into the text")
            return self.vocab.tokenize(prompt) if prompt else []
        from edge_rt.chat import template as chat_template

        if self._vocabulary.loading and isinstance(template := self.file.header.get("tokenizer.chat_template"), str):
            chat_template.prepare(template)  # meanwhile
        given = chat_template.placed(self.vocab, prompt, tools)
        if given.written:
            from edge_rt.chat.tools import NO_PLACE

            if NO_PLACE not in self.notices:
                self.notices.append(NO_PLACE)
        return chat_template.tokenize_placed(self.vocab, given)

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits after every token of a text of its own: float32 [n_tokens, n_vocab]. Raises ContextError, OptionError."""
        from edge_rt.core.generate.scoring import text_logits

        return text_logits(self.engine, self.lock, tokens)

    @property
    def template(self) -> str:
        """12 hexadecimal digits that tell this model's chat template from others: a changed one asks the model otherwise."""
        import hashlib

        return hashlib.sha256(str(self.file.header.get("tokenizer.chat_template")).encode()).hexdigest()[:12]

    def continuations(self, before: str | Sequence[Message], texts: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """Tokens of what comes before all of the ``texts``, and of each: behind a text, or as answers to messages.

        A text and what continues it are tokenised as one: where that changes the text's last tokens, they count with what continues it.
        Raises ConstraintError, OptionError.
        """
        from edge_rt.core.generate.scoring import divided

        if not isinstance(before, str):
            return self.prompt_tokens(before), [self.vocab.tokenize(text, bos=False) for text in texts]
        start = self.vocab.tokenize("") or self.vocab.tokenize("\n")  # a first token is told from something too
        alone, *rows = ([*start, *self.vocab.tokenize(text, bos=False)] for text in (before, *(before + text for text in texts)))
        return divided(alone, rows)

    def continuation_logprobs(self, tokens: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[npt.NDArray[np.float64]]:
        """Natural log-probabilities of every token of each continuation of the same ``tokens``, which are computed once.

        Raises ContextError, OptionError.
        """
        from edge_rt.core.generate.scoring import continuation_logprobs

        return continuation_logprobs(self.engine, self.lock, tokens, continuations)

    def embed(self, texts: Sequence[str | Sequence[int]], *, pooling: str | None = None, normalize: bool = True) -> npt.NDArray[np.float32]:
        """Embeddings of texts, which may be given as tokens: float32 [n_texts, n_embd]; see ``edge_rt.model``, also for errors."""
        import numpy as np

        rows = [found.vector for found in embeddings(self, texts, pooling=pooling, normalize=normalize)]
        return np.stack(rows) if rows else np.empty((0, self.info.n_embd), np.float32)

    # ---- sessions ----------------------------------------------------------------------------------------------------

    def session(self, *, context: int | None = None, owner: str = "") -> Session:
        """Open one. ``context``: cells it may use, else the model's. ``owner``: it shares beginnings with no other. Raises OptionError."""
        from edge_rt.session import Session

        session = Session(self, context=context, owner=owner)
        self._sessions.add(session)
        return session

    def restore(
        self, path: str | Path, *, context: int | None = None, owner: str = "", read: SavedSession | None = None
    ) -> Session:  # fmt: skip
        """Open a session saved with ``Session.save``; ``read``: what ``saved.read`` has made of the file, if it was read already.

        Raises SessionFileError if it is damaged or from another model, engine or adapter.
        """
        from edge_rt import session as saved
        from edge_rt.session import Session

        where = Path(path)
        sequence, history, adapter = saved.session_path(read or saved.read_session(where, self), where, self)
        session = Session(self, sequence, history, context=context, owner=owner, adapter=adapter)
        self._sessions.add(session)
        return session

    def end_session(self, session: Session, sequence: int | None, tokens: list[int]) -> None:
        """Called by ``Session.close``: keep its cells, of which the first hold ``tokens``, for prompts with the same beginning."""
        self._sessions.discard(session)
        if sequence is not None and not self._closed:
            with self.lock:
                self.prefixes.give(sequence, tokens, session.shares_with)

    def grader(self) -> Callable[[Segment], Grade]:
        """The grader of what may leave the context, made when it is first needed. Raises PluginError."""
        if self._grade is None:
            self._grade = self.registry.grader(GRADER).start()
        return self._grade

    def recall(self) -> Recall:
        """What a session is to remember of what leaves its context."""
        from edge_rt.core.context.recall import Recall, Summaries

        return Recall(self.engine, self.lock, Summaries(*self._embedder) if self._embedder else None)

    def pipeline(self, names: Sequence[str], rules: Rulebook | Mapping[str, Any] | None = None) -> Pipeline:
        """Fresh post-processors for one stream: those named, else those of the rules, in order. Raises PluginError, RuleError."""
        if not names and rules is None:
            from edge_rt.postprocess.pipeline import Pipeline

            return Pipeline([])
        from edge_rt.postprocess.rules import Ruleset

        if rules is None:
            if self._plain_rules is None or self._plain_rules.generation != self.registry.generation:
                self._plain_rules = Ruleset({}, self.registry)
            rules = self._plain_rules
        return (Ruleset(rules, self.registry) if isinstance(rules, Mapping) else rules.current).pipeline(names)

    def new_notices(self) -> list[str]:
        """Notices nobody has been told yet."""
        fresh, self._told = self.notices[self._told :], len(self.notices)
        return fresh

    # ---- memory ------------------------------------------------------------------------------------------------------

    def memory(self) -> MemoryReport:
        """Bytes held now."""
        with self.lock:
            return self.engine.memory()

    def units(self) -> list[UnitFacts]:
        """Units of the weight store with what of them is in memory; empty for engines that have none."""
        units = getattr(self.engine, "units", tuple)
        return [UnitFacts(u.name, len(u.spans), u.size, u.resident(), u.packed) for u in units()]

    def cool(self) -> None:
        """Let the system have the weights' memory while nobody asks anything; vocabulary, header and sessions stay."""
        self._if_possible("cool")

    def warm(self) -> None:
        """Map the weights again, and read what the system took, in the background."""
        self._if_possible("warm")

    def _if_possible(self, method: str) -> None:
        """Engines that cannot give memory back (the fallback holds all it needs) have nothing to do."""
        if call := getattr(self.engine, method, None):
            with self.lock:
                call()

    def close(self) -> None:
        """Close sessions and release everything; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        for session in list(self._sessions):
            session.close()
        with self.lock:
            self.engine.close()
        self.adapters.close()
        self._vocabulary.close()
        self.file.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
