"""The daemon's configuration file (docs/daemon.md): TOML, every value checked and every mistake with its line."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from edge_rt.daemon import address as addresses
from edge_rt.daemon.address import Address
from edge_rt.daemon.protocol import MAX_BYTES
from edge_rt.errors import OptionError
from edge_rt.postprocess.rules import Rules


class Limits(NamedTuple):
    """What one client, or all of them, may take. Times are in seconds; 0: no limit."""

    connections: int = 256
    connections_per_user: int = 128
    connections_per_second: float = 500.0
    requests: int = 256
    requests_per_user: int = 128
    requests_per_connection: int = 32
    requests_per_second: float = 100.0
    sessions_per_user: int = 64
    saved_per_user: int = 64
    frame_bytes: int = 4 << 20
    held_bytes: int = 64 << 20
    held_bytes_per_user: int = 32 << 20
    hello_seconds: float = 5.0
    frame_seconds: float = 30.0
    idle_seconds: float = 0.0


class HttpConfig(NamedTuple):
    """The HTTP side (docs/http.md). ``keys``: any of them lets in. ``open``: none is needed, also over TCP.

    ``origins``: of pages that may ask. ``hosts``: names by which the daemon may be asked for, beside those of this machine.
    """

    listen: tuple[Address, ...] = (Address("tcp", "127.0.0.1", 8080),)
    keys: tuple[str, ...] = ()
    open: bool = False
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()


class RecordConfig(NamedTuple):
    """Recording traffic. ``sample``: share of the requests. ``rules``: for what is taken out, None for the usual ones.

    ``max_bytes``: from which a file is renamed; ``keep``: of these.
    """

    file: Path
    sample: float = 1.0
    answers: bool = False
    rules: Path | None = None
    max_bytes: int = 64 << 20
    keep: int = 4


class Config(NamedTuple):
    """All that a daemon is told. ``model_options``: keywords of ``edge_rt.open``. ``models``: others by name, with theirs.

    Adapters among them are opened when a request first asks for them: one that is damaged is no reason to have no model.

    ``memory``: bytes that all of them may have, 0 for most of what is free at the start.
    ``held_bytes`` of the limits: begun frames and requests that were not answered yet. ``credits``: events of a generation that may be
    on their way.
    """

    listen: tuple[Address, ...] = ()
    users: frozenset[int] = frozenset()
    key: str | None = None
    model: str | None = None
    model_options: dict[str, Any] = {}  # noqa: RUF012 - nobody changes it
    models: dict[str, tuple[str, dict[str, Any]]] = {}  # noqa: RUF012 - nor that
    memory: int = 0
    rules: str | None = None
    state: Path = Path()
    limits: Limits = Limits()
    credits: int = 64
    keep_sessions: float = 600.0
    resume_within: float = 30.0
    drain_seconds: float = 20.0
    hung_after: float = 120.0
    cool_after: float = 60.0
    wait_for_memory: float = 60.0
    http: HttpConfig | None = None
    record: RecordConfig | None = None


FRAME_ROOM = 1 << 16  # bytes that the daemon may add to a client's message on its way to the worker
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ORIGIN = re.compile(r"https?://[a-z0-9.-]+(:[0-9]+)?|https?://\[[0-9a-f:]+\](:[0-9]+)?")
_TIMES = {"keep_sessions": 86400.0, "resume_within": 3600.0, "drain_seconds": 3600.0, "hung_after": 86400.0, "wait_for_memory": 3600.0}
_LEAST_RECORDED = 1 << 16  # bytes of a file of recorded traffic
_MODEL_NUMBERS = ("context", "threads")
_MODEL_LIMITS = {"power": 10_000.0, "celsius": 150.0}
_MODEL_TEXTS = ("key_type", "engine", "device", "policy", "embedder", "compensation")


def default_config() -> Config:
    """Without a file: the user's own socket, for the user and root."""
    from edge_rt.config import state_dir

    return Config(users=frozenset((os.getuid(), 0)), state=state_dir() / "sessions")


def read_config(path: Path) -> Config:
    """Read a file. Raises OptionError, RuleError with the line."""
    from edge_rt.toml_file import read_toml

    return read_toml(path, "configuration", lambda table: _config(table, path.parent))


def _config(table: Rules, folder: Path) -> Config:
    base = default_config()
    rules, state, users = table.text("rules", ""), table.text("state", ""), table.texts("users")
    model, options = _model(table.table("model"), folder)
    others = table.table("models")
    times: dict[str, Any] = {name: table.number(name, getattr(base, name), 0.05, most) for name, most in _TIMES.items()}
    return base._replace(
        listen=_addresses(table),
        users=frozenset(_user(table, text, i) for i, text in enumerate(users)) or base.users,
        key=_key(table) if "key_file" in table else None,
        model=model,
        model_options=options,
        rules=str(folder / Path(rules).expanduser()) if rules else None,
        state=folder / Path(state).expanduser() if state else base.state,
        limits=_limits(table.table("limits")),
        http=_http(table.table("http")) if "http" in table else None,
        record=_record(table.table("record"), folder) if "record" in table else None,
        models={name: _named_model(others, name, folder) for name in others.keys()},  # noqa: SIM118 - no mapping
        memory=table.size("memory"),
        cool_after=table.number("cool_after", base.cool_after, 0, 86400),
        credits=table.integer("credits", base.credits, 1, 4096),
        **times,
    )


def _model(table: Rules, folder: Path) -> tuple[str | None, dict[str, Any]]:
    """The model's file or name, and the keywords to open it with. What is 0 or empty is left to ``edge_rt.open``."""
    file = table.text("file", "")
    if file and (folder / file).exists():
        file = str(folder / file)
    options: dict[str, Any] = {name: table.integer(name, 0, 0, 1 << 50) for name in _MODEL_NUMBERS}
    options |= {name: table.number(name, 0.0, 0.0, most) for name, most in _MODEL_LIMITS.items()}
    options |= {"memory": table.size("memory"), **{name: table.text(name, "") for name in _MODEL_TEXTS}}
    found = {name: value for name, value in options.items() if value}
    if not table.flag("pack", True):
        found["pack"] = False
    if (side := found.get("compensation", "auto")) not in ("auto", "off"):
        found["compensation"] = str((folder / Path(side).expanduser()).absolute())
    if "adapters" in table:
        found["adapters"] = _adapters(table.table("adapters"), folder)
    return file or None, found


def _adapters(table: Rules, folder: Path) -> dict[str, str]:
    """Files of LoRA adapters by the names that requests use. Whether they fit the model is seen when they are opened."""
    found: dict[str, str] = {}
    for name in table.keys():  # noqa: SIM118 - it is no mapping
        if not _NAME.fullmatch(name):
            raise table.error(f"{name!r:.80} is no name for an adapter; give 1 to 64 of A-Z a-z 0-9 . _ -", name)
        if not (file := table.text(name)):
            raise table.error(f"the adapter {name} has no file; give its path", name)
        found[name] = str((folder / Path(file).expanduser()).absolute())
    return found


def _named_model(table: Rules, name: str, folder: Path) -> tuple[str, dict[str, Any]]:
    if not _NAME.fullmatch(name):
        raise table.error(f"{name!r:.80} is no name for a model; give 1 to 64 of A-Z a-z 0-9 . _ -", name)
    own = table.table(name)
    own.text("file")
    file, options = _model(own, folder)
    assert file is not None, "it is there"
    return file, options


def _limits(table: Rules) -> Limits:
    found: dict[str, Any] = {}
    for name, value in Limits._field_defaults.items():
        least = 0 if name.endswith(("seconds", "_per_second")) else 1
        if isinstance(value, float):
            found[name] = table.number(name, value, least, 1e6)
        else:
            found[name] = table.integer(name, value, least, MAX_BYTES - FRAME_ROOM if name == "frame_bytes" else 1 << 40)
    return Limits(**found)


def _http(table: Rules) -> HttpConfig:
    base, origins = HttpConfig(), table.texts("origins")
    for i, origin in enumerate(origins):
        if not _ORIGIN.fullmatch(origin):
            raise table.error(f"{origin!r:.80} is no origin; give it as browsers do, such as http://localhost:3000", "origins", i)
    return HttpConfig(
        listen=_addresses(table) or base.listen,
        keys=_keys(table) if "key_file" in table else (),
        open=table.flag("open", False),
        origins=origins,
        hosts=tuple(map(str.lower, table.texts("hosts"))),
    )


def _record(table: Rules, folder: Path) -> RecordConfig:
    rules, max_bytes = table.text("rules", ""), table.size("max_bytes", RecordConfig._field_defaults["max_bytes"])
    if max_bytes < _LEAST_RECORDED:
        raise table.error(f"max_bytes is {max_bytes}; give {_LEAST_RECORDED} or more", "max_bytes")
    if not (file := table.text("file")):
        raise table.error("record has no file; give its path", "file")
    return RecordConfig(
        file=(folder / Path(file).expanduser()).absolute(),
        sample=table.number("sample", 1.0, 0.0, 1.0),
        answers=table.flag("answers", False),
        rules=(folder / Path(rules).expanduser()).absolute() if rules else None,
        max_bytes=max_bytes,
        keep=table.integer("keep", RecordConfig._field_defaults["keep"], 1, 1000),
    )


def _addresses(table: Rules) -> tuple[Address, ...]:
    return tuple(_address(table, text, i) for i, text in enumerate(table.texts("listen")))


def _address(table: Rules, text: str, index: int) -> Address:
    try:
        return addresses.parse(text)
    except OptionError as error:
        raise table.error(str(error), "listen", index) from error


def _user(table: Rules, text: str, index: int) -> int:
    """A user's number by name or number."""
    import pwd

    try:
        return int(text) if text.isdigit() else pwd.getpwnam(text).pw_uid
    except KeyError as error:
        raise table.error(f"there is no user {text}; give a name or a number", "users", index) from error


def _key(table: Rules) -> str:
    keys = _keys(table)
    if len(keys) > 1:
        raise table.error("there are several keys, and the daemon's own protocol knows one; leave one in the file", "key_file")
    return keys[0]


def _keys(table: Rules) -> tuple[str, ...]:
    """The keys in a file, one in each line."""
    path, text = table.file("key_file")
    if path.stat().st_mode & 0o077:
        raise table.error(f"others may read the key in {path}; chmod 600 it", "key_file")
    keys = tuple(filter(None, map(str.strip, text.splitlines()))) or ("",)
    if any(len(key) < 16 for key in keys):
        raise table.error("the key has fewer than 16 characters; make one as `openssl rand -hex 16` does", "key_file")
    return keys
