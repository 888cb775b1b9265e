"""What the worker's memory is used for, as it tells the daemon."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_rt.core.engine import PredictsMemory

if TYPE_CHECKING:
    from edge_rt.daemon.account import Account
    from edge_rt.daemon.frames import Message
    from edge_rt.daemon.store import Store
    from edge_rt.model import Model


def memory(model: Model, store: Store, account: Account) -> Message:
    """Bytes by owner. All may be shown to anybody but ``by_session``, whose keys are the names of all users' sessions.

    ``weights_mapped``, ``weights_resident``, ``cache``, ``compute``, ``device``: as ``MemoryReport``. ``units``: of the weights, with
    ``name``, ``nbytes`` and ``resident``. ``promised``: what caches and steps may come to hold, by what it is for; ``held``,
    ``reserved`` and ``allowance`` are of caches and steps. ``anonymous``: of the whole process, None where the system does not say.
    ``sessions``, ``parked``: how many there are.
    """
    return {
        **model.memory()._asdict(),
        "units": [{"name": unit.name, "nbytes": unit.nbytes, "resident": unit.resident} for unit in model.units()],
        "promised": account.parts(), "held": account.held(), "reserved": account.reserved(), "allowance": account.allowance,
        "anonymous": anonymous(), "sessions": len(store), "parked": len(store.parked), "by_session": _by_session(model, store),
    }  # fmt: skip


def _by_session(model: Model, store: Store) -> dict[str, Message]:
    engine = model.engine if isinstance(model.engine, PredictsMemory) else None
    found: dict[str, Message] = {}
    for name, parked in store.parked.items():
        found[name] = {"bytes": 0, "cells": parked.cells, "parked": True, **store.counts.get(name, {})}
    for name, session in store.live.items():
        sequence = session.sequence
        with model.lock:
            size = 0 if sequence is None or engine is None else engine.sequence_bytes(sequence)
        found[name] = {"bytes": size, "cells": session.history.cells, "parked": False, **store.counts.get(name, {})}
    return found


def anonymous() -> int | None:
    """Bytes of this process that no file stands behind, swapped ones included; None where the system does not say."""
    try:
        with open("/proc/self/status") as lines:
            sizes = [int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "VmSwap:"))]
    except OSError:
        return None
    return 1024 * sum(sizes) if sizes else None
