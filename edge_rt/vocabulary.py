"""The vocabulary of a model that is being opened, or of its engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_rt.errors import AbiMismatch, NativeError
from edge_rt.native.vocab_load import VocabLoad

if TYPE_CHECKING:
    from edge_rt.core.engine import Engine
    from edge_rt.native.llama import Vocab


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
