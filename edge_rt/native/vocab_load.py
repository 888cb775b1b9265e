"""Loading a vocabulary beside other work: libllama reads it on a thread, in C, without the GIL."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack

from edge_rt.errors import ModelFileError, NativeError
from edge_rt.native import ggml, logs
from edge_rt.native.llama import LOAD_MODE_NONE, Vocab, c, initialise


class VocabLoad:
    """A vocabulary that is being loaded (30 to 55 ms for 49,152 tokens where nothing else runs); weights are not read.

    The thread makes one call. What needs Python is done before it starts and after it ended: beside a busy main thread every return
    to Python waits for the GIL, five milliseconds each (sys.getswitchinterval). It is no daemon thread, because the interpreter could
    end in the middle of the call.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Start. Raises ModelFileError for an impossible path, AbiMismatch, NativeError."""
        initialise()
        self._name = os.fspath(path)
        if "\0" in self._name:
            raise ModelFileError("the model's path contains a NUL character; give the path of a GGUF file")
        self._params = c.model_default_params()
        self._params.vocab_only, self._params.load_mode, self._params.n_gpu_layers = True, LOAD_MODE_NONE, 0
        self._model: int | None = None
        self.vocab: Vocab | None = None
        self._lock = threading.Lock()
        self._closed = False
        load = c.model_load_from_file  # bound here: the first look-up takes Python
        quiet = ExitStack()
        quiet.enter_context(logs.muted())

        def run() -> None:
            with quiet:
                self._model = load(os.fsencode(self._name), self._params)

        self._thread = threading.Thread(target=run, name="edge-rt-vocabulary")
        try:
            self._thread.start()
        except BaseException:
            quiet.close()
            raise

    @property
    def loading(self) -> bool:
        """Whether it still goes on."""
        return self._thread.is_alive()

    def result(self) -> Vocab:
        """Wait for it; always the same object. Raises ModelFileError with libllama's own reason, NativeError after ``close``."""
        with self._lock:
            self._thread.join()
            if self._closed:
                raise NativeError("the vocabulary was closed; open the model again")
            if self.vocab is None:
                model = self._model or self._once_more()
                self.vocab = Vocab(ggml.Handle(model, c.model_free, "a vocabulary"), model)
            return self.vocab

    def _once_more(self) -> int:
        """Load it aloud, for the reason why it cannot be loaded."""
        with logs.collect_errors() as errors:
            model: int | None = c.model_load_from_file(os.fsencode(self._name), self._params)
        if not model:
            reason = errors[0].split(": ", 1)[-1] if errors else "it gave no reason"
            raise ModelFileError(f"libllama cannot read the vocabulary of {self._name} ({reason}); check that it is a complete GGUF file")
        return model

    def close(self) -> None:
        """Wait for the thread, then let go of the model as ``Vocab.close`` does. Closing twice is harmless."""
        with self._lock:
            self._thread.join()
            self._closed = True
            if self.vocab is not None:
                self.vocab.close()
            elif self._model:
                c.model_free(self._model)
            self._model = None
