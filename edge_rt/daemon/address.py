"""Where a daemon listens, and who may come in.

A socket in the file system is taken over from a daemon that is gone, never from one that lives: who listens holds a lock on a file beside
it, which the system lets go of however the process ends.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
import sys
from pathlib import Path
from typing import IO, NamedTuple

from edge_rt.errors import OptionError

MAX_PATH = 107  # bytes of a socket's name in Linux; 103 on macOS


class Address(NamedTuple):
    """``unix``: a path; ``abstract``: a name without a file (Linux); ``tcp``: a port of the loopback interface."""

    kind: str
    path: str = ""
    port: int = 0

    def __str__(self) -> str:
        return f"tcp:{self.path}:{self.port}" if self.kind == "tcp" else f"{self.kind}:{self.path}"


def default_address() -> Address:
    """``EDGE_RT_SOCKET``, else ``edge-rt/daemon.sock`` in the user's folder for what lives as long as a login."""
    if given := os.environ.get("EDGE_RT_SOCKET"):
        return parse(given)
    from edge_rt.config import runtime_dir

    return Address("unix", str(runtime_dir() / "daemon.sock"))


def parse(text: str) -> Address:
    """``unix:/run/x.sock`` or a path, ``abstract:name``, ``tcp:127.0.0.1:8080``. Raises OptionError."""
    kind, colon, rest = text.partition(":")
    if not colon or "/" in kind:
        kind, rest = "unix", text
    if kind == "unix" and rest:
        path = str(Path(rest).expanduser().absolute())
        if len(os.fsencode(path)) > MAX_PATH:
            raise OptionError(f"the socket's path {path} is longer than the {MAX_PATH} bytes that sockets allow; choose a shorter one")
        return Address("unix", path)
    if kind == "abstract" and rest:
        if not sys.platform.startswith("linux"):
            raise OptionError("abstract sockets are Linux's; give a path")
        if len(os.fsencode(rest)) > MAX_PATH:
            raise OptionError(f"the socket's name {rest} is longer than the {MAX_PATH} bytes that sockets allow; choose a shorter one")
        return Address("abstract", rest)
    host, _, port = rest.rpartition(":")
    if kind == "tcp" and host in ("127.0.0.1", "localhost", "[::1]", "::1") and port.isascii() and port.isdigit() and int(port) < 65536:
        return Address("tcp", "127.0.0.1" if host == "localhost" else host.strip("[]"), int(port))
    raise OptionError(f"{text!r} is no address to listen at; give a path, abstract:name or tcp:127.0.0.1:PORT")


class Listener(NamedTuple):
    """A socket that is listening. ``lock``: held as long as it is open. ``http``: that is what is spoken there."""

    socket: socket.socket
    address: Address
    lock: IO[bytes] | None = None
    http: bool = False

    def close(self) -> None:
        self.socket.close()
        if self.lock is not None:
            Path(self.address.path).unlink(missing_ok=True)
            self.lock.close()


def listen(address: Address, backlog: int = 128) -> Listener:
    """Listen. Raises OptionError: the address is in use, or its folder is not ours."""
    if address.kind == "unix":
        return _listen_at_path(address, backlog)
    found = _bound(address)
    try:
        found.listen(backlog)
    except OSError as error:
        found.close()
        raise _in_use(address, error) from error
    if address.kind == "tcp":
        address = address._replace(port=found.getsockname()[1])
    return Listener(found, address)


def check_address(address: Address) -> None:
    """Whether one could listen there, without a trace. Raises OptionError as ``listen`` would."""
    if address.kind != "unix":
        _bound(address).close()
        return
    import fcntl

    path = Path(address.path)
    there = next(one for one in path.parents if os.path.lexists(one))
    if not there.is_dir() or (there != path.parent and not os.access(there, os.W_OK | os.X_OK)):
        raise _no_folder(path.parent, "permission denied" if there.is_dir() else "not a directory")
    if there != path.parent:
        return
    _check_folder(path.parent)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise _in_use(address, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    try:
        with open(_lock_of(path), "r+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        pass  # nobody has listened there yet
    except OSError as error:
        raise _in_use(address, error) from error
    _check_free(address)


def _bound(address: Address) -> socket.socket:
    """A socket of a name or a port, which does not listen yet."""
    family = socket.AF_INET6 if ":" in address.path else socket.AF_INET if address.kind == "tcp" else socket.AF_UNIX
    found = socket.socket(family)
    try:
        if address.kind == "tcp":
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((address.path, address.port) if address.kind == "tcp" else "\0" + address.path)
    except OSError as error:
        found.close()
        raise _in_use(address, error) from error
    return found


def _listen_at_path(address: Address, backlog: int) -> Listener:
    import fcntl

    path = Path(address.path)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _no_folder(path.parent, (error.strerror or str(error)).lower()) from error
    _check_folder(path.parent)
    found = socket.socket(socket.AF_UNIX)
    lock: IO[bytes] | None = None
    try:
        lock = open(_lock_of(path), "wb")  # noqa: SIM115 - it stays open
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _check_free(address)
        path.unlink(missing_ok=True)  # whoever listened there is gone
        before = os.umask(0o177)
        try:
            found.bind(str(path))
        finally:
            os.umask(before)
        found.listen(backlog)
    except BaseException as error:
        found.close()
        if lock is not None:
            lock.close()
        if isinstance(error, OSError):
            raise _in_use(address, error) from error
        raise
    return Listener(found, address, lock)


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _check_folder(folder: Path) -> None:
    """That no one else can put something into it. Raises OptionError."""
    found = folder.stat()
    if found.st_uid not in (os.getuid(), 0):
        raise OptionError(f"the folder {folder} for the socket belongs to another user; choose one of yours")
    if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
        raise OptionError(f"others may write in the folder {folder} of the socket; chmod go-w it, or choose another")


def _no_folder(folder: Path, reason: str) -> OptionError:
    return OptionError(f"the folder {folder} for the socket cannot be made: {reason}")


def _check_free(address: Address) -> None:
    """That at a path is nothing, or a socket at which nobody listens: a program without our lock may. Raises OptionError."""
    path = Path(address.path)
    if os.path.lexists(path) and not path.is_socket():
        raise OptionError(f"{path} exists and is no socket; choose another path, or remove it")
    with socket.socket(socket.AF_UNIX) as client:
        client.setblocking(False)
        try:
            client.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return
        except OSError as error:  # it lives, whoever it is
            raise _taken(address) from error
    raise _taken(address)


def _in_use(address: Address, error: OSError) -> OptionError:
    if error.errno in (errno.EADDRINUSE, errno.EAGAIN, errno.EWOULDBLOCK):
        return _taken(address)
    return OptionError(f"cannot listen at {address}: {(error.strerror or str(error)).lower()}")


def _taken(address: Address) -> OptionError:
    return OptionError(f"another daemon listens at {address}; stop it, or choose another address with --listen")


def systemd_listeners() -> list[Listener]:
    """The sockets that systemd listens at for us (sd_listen_fds(3)), none if it did not start us; those named ``http`` are for that."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = int(os.environ.get("LISTEN_FDS", "0"))
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):  # not for our children
        os.environ.pop(name, None)
    found = []
    for number in range(3, 3 + count):
        os.set_inheritable(number, False)
        one = socket.socket(fileno=number)
        name = one.getsockname()
        if one.family == socket.AF_UNIX:
            text = os.fsdecode(name)
            found.append(Listener(one, Address("abstract", text[1:]) if text.startswith("\0") else Address("unix", text)))
        else:
            found.append(Listener(one, Address("tcp", name[0], name[1])))
        if names[number - 3 : number - 2] == ["http"]:
            found[-1] = found[-1]._replace(http=True)
    return found


def notify_systemd(state: str) -> None:
    """Tell systemd, if it asks to be told (sd_notify(3)), e.g. ``READY=1``."""
    name = os.environ.get("NOTIFY_SOCKET")
    if not name:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as to:
        try:
            to.sendto(state.encode(), "\0" + name[1:] if name.startswith("@") else name)
        except OSError:
            return  # who asked is gone


class PeerCredentials(NamedTuple):
    """Who is at the other end of a local socket; None where the system does not say."""

    user: int | None
    group: int | None
    process: int | None


def peer_credentials(connection: socket.socket) -> PeerCredentials:
    """As the kernel says, not as the peer does."""
    if connection.family != socket.AF_UNIX:
        return PeerCredentials(None, None, None)
    if hasattr(socket, "SO_PEERCRED"):
        process, user, group = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return PeerCredentials(user, group, process)
    # macOS: struct xucred of LOCAL_PEERCRED (1), level 0: version, user, number of groups, groups
    data = connection.getsockopt(0, 1, 76)
    _, user, count, *groups = struct.unpack_from("IIh2x16I", data)
    return PeerCredentials(user, groups[0] if count else None, None)
