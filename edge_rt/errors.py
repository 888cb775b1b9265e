"""Every error edge-rt raises on purpose.

    EdgeError
    ├── UserError                the caller can mend it; the CLI exits 1 with the message
    │   ├── ModelFileError       not a model, damaged, or not found
    │   │   ├── UnsupportedModel   a sound file that no installed engine can run
    │   │   └── ModelChanged       the file was replaced or truncated while open
    │   ├── ContextError         the request does not fit the context
    │   │   └── ContextOverflow      what must stay in it is too large, by how much it says
    │   ├── OptionError          an option's value is out of range, or options contradict
    │   ├── ConstraintError      a grammar, JSON schema or chat template that does not compile
    │   ├── SessionFileError     a saved session that is damaged or cannot be read
    │   │   └── SessionMismatch      a sound one of another model, engine or version
    │   ├── RuleError            rules of a post-processor that cannot be, with the file and the line
    │   ├── ProtocolError        a peer of the daemon said what the protocol does not allow
    │   ├── DataError            samples, data sets or recordings that cannot be used as they are
    │   ├── TrainingError        a training run diverged or cannot go on; what was reached is kept
    │   ├── PluginError          a plugin asked for by name failed or does not exist
    │   └── DownloadError        the network, or a checksum, said no
    ├── NativeError              libggml or libllama refused or failed
    │   └── AbiMismatch            the installed library is not one this version was written for
    ├── OutOfMemory              a buffer could not be allocated
    ├── DaemonError              the daemon answered with an error, or is gone
    └── Cancelled                the caller asked to stop

A bug is any other exception: the CLI writes a report and exits 3.
Messages are one sentence that says what is wrong and, after a semicolon, the way out.
"""

from __future__ import annotations

from typing import Any


class EdgeError(Exception):
    """Base of every error raised on purpose."""


class UserError(EdgeError):
    """The caller can mend this; the CLI prints the message and exits 1."""


class ModelFileError(UserError):
    """The file is not a model, is damaged, or is not there."""


class UnsupportedModel(ModelFileError):
    """A sound model file that no installed engine can run."""


class ModelChanged(ModelFileError):
    """The model file was replaced or truncated while it was open."""


class ContextError(UserError):
    """The request does not fit the context."""


class ContextOverflow(ContextError):
    """What must be in the context has ``needed`` tokens, and there is room for ``available``."""

    def __init__(self, message: str, needed: int, available: int) -> None:
        super().__init__(message)
        self.needed, self.available = needed, available


class OptionError(UserError):
    """An option's value is out of range, or two options contradict each other."""


class ConstraintError(UserError):
    """A grammar, JSON schema or chat template does not compile."""


class SessionFileError(UserError):
    """A saved session is damaged, or cannot be read."""


class SessionMismatch(SessionFileError):
    """A sound saved session of another model, engine or version: of no use here, also if the model's file was replaced since."""


class RuleError(UserError):
    """A rule of a post-processor cannot be. ``reason`` is why; where it is, as far as that is known, begins the message.

    ``place``: keys and indices from the top of the file. ``line`` counts from 1.
    """

    def __init__(self, reason: str, *, place: tuple[str | int, ...] = (), file: str | None = None, line: int | None = None) -> None:
        where = ", ".join(filter(None, (file, f"line {line}" if line is not None else "")))
        super().__init__(f"{where}: {reason}" if where else reason)
        self.reason, self.place, self.file, self.line = reason, place, file, line


class ProtocolError(UserError):
    """What a peer of the daemon said is not what the protocol allows; ``code`` and ``fields`` are the protocol's (docs/protocol.md)."""

    def __init__(self, code: str, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.code, self.fields = code, fields


class DataError(UserError):
    """Samples, data sets or recordings that cannot be used as they are."""


class TrainingError(UserError):
    """A training run diverged or cannot go on; what it had reached is kept."""


class PluginError(UserError):
    """A plugin asked for by name is missing, too new, or failed."""


class DownloadError(UserError):
    """A download failed, or what arrived has the wrong checksum."""


class NativeError(EdgeError):
    """libggml or libllama refused a call or failed in it."""


class AbiMismatch(NativeError):
    """The installed native library is not one this version was written for."""


class OutOfMemory(EdgeError):
    """A buffer could not be allocated."""


class DaemonError(EdgeError):
    """What the daemon answered where it could not do as asked: ``code`` and ``fields`` are the protocol's (docs/protocol.md).

    ``disconnected`` is no code of the protocol: the daemon is gone, or was never there.
    """

    def __init__(self, code: str, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.code, self.fields = code, fields


class Cancelled(EdgeError):
    """The caller asked to stop."""
