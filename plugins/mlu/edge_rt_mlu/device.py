"""The devices ``mlu:0``, ``mlu:1``...: is there a card, is its driver loaded, what is it like, how is it now.

Looked at in this order, so that a refusal names the first thing that is missing: the driver's nodes under /dev, ``cnmon``, the card in its
table, torch_mlu. No card is opened by it.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from edge_rt.hooks import Basis, Cache, Cores, Health, Latest, NativeError, Offer, Profile, Refusal
from edge_rt_mlu import adapters, cnmon
from edge_rt_mlu.boards import board

_VENDOR = "0xcabc"  # Cambricon's, in the PCI database
_NODE = re.compile(r"cambricon_dev(\d+)")
_FRESH = 2.0  # seconds for which a reading answers
_SCORE = 30.0
_DRIVER = "install Cambricon's driver for it (https://sdk.cambricon.com, component Driver) and load it with modprobe cambricon-drv"
_CONTAINER = "choose another device; in a container, pass the card in: --device /dev/cambricon_dev0 --device /dev/cambricon_ctl"


class System(NamedTuple):
    """Where to look: the root of /dev and /sys, folders to look for ``cnmon`` in (None: PATH), and the environment."""

    root: Path = Path("/")
    path: str | None = None
    environment: Mapping[str, str] = os.environ

    def nodes(self) -> list[int]:
        """Numbers of the cards that the driver shows under /dev."""
        try:
            names = os.listdir(self.root / "dev")
        except OSError:
            return []
        return sorted(int(found[1]) for found in map(_NODE.fullmatch, names) if found)

    def on_bus(self) -> bool:
        """Whether there is a Cambricon card on the PCI bus, with or without a driver."""
        for vendor in (self.root / "sys/bus/pci/devices").glob("*/vendor"):
            try:
                if vendor.read_text().strip().lower() == _VENDOR:
                    return True
            except OSError:  # a card that was just removed
                continue
        return False

    def visible(self, count: int) -> list[int]:
        """Cards by PyTorch's numbers: MLU_VISIBLE_DEVICES chooses and orders them."""
        chosen = self.environment.get("MLU_VISIBLE_DEVICES")
        if chosen is None:
            return list(range(count))
        found: list[int] = []
        for part in chosen.split(","):
            if not part.strip().isdecimal():
                break  # as in CUDA_VISIBLE_DEVICES, the first that is none ends the list
            found.append(int(part))
        return found


class Monitor:
    """The last reading of ``cnmon``, shared by all cards: several devices are probed one after the other, and health is asked often."""

    def __init__(self, system: System) -> None:
        self.system = system
        self._last: tuple[float, cnmon.Table | Refusal] | None = None
        self._lock = threading.Lock()
        self.latest: Latest[cnmon.Table | Refusal | None] = Latest(self.table, None, every=_FRESH)
        """The last reading of any age, at once; an old one is renewed on a thread."""

    def table(self) -> cnmon.Table | Refusal:
        """The last reading if it is fresh, else a new one."""
        with self._lock:
            if self._last is None or time.monotonic() - self._last[0] > _FRESH:
                self._last = (time.monotonic(), self._read())
            return self._last[1]

    def _read(self) -> cnmon.Table | Refusal:
        command = cnmon.find(self.system.path)
        if command is None:
            remedy = "install the driver's package, which has it; in a container, mount it: -v /usr/bin/cnmon:/usr/bin/cnmon"
            return Refusal("cnmon is not installed", remedy)
        return cnmon.read([command])


class Mlu(NamedTuple):
    """A card, by PyTorch's number."""

    number: int
    monitor: Monitor

    @property
    def name(self) -> str:
        """``mlu:N``."""
        return f"mlu:{self.number}"

    def probe(self) -> Offer | Refusal:
        """Reads /dev and /sys, and runs ``cnmon`` where the driver shows a card. Looks whether torch_mlu is installed, imports nothing."""
        card = self._card()
        if isinstance(card, Refusal):
            return card
        if refusal := adapters.missing(adapters.ADAPTERS["mlu"]):
            return refusal
        known, table = board(card.name), self.monitor.table()
        driver = table.driver if isinstance(table, cnmon.Table) else ""
        return Offer(
            score=_SCORE,
            description=f"{card.name} at {card.bus}, {card.memory >> 20} MiB" + (f", driver {driver}" if driver else ""),
            memory_bytes=card.memory,
            features=("fp16", "bf16", "int8") if known else (),
            engines=("torch",),
            basis="projected",  # the card is real, but what the engine does on one was never measured
        )

    def _card(self) -> cnmon.Card | Refusal:
        """The card in cnmon's table, or the first thing that is missing."""
        system = self.monitor.system
        nodes = system.nodes()
        if not nodes:
            if system.on_bus():
                return Refusal("there is a Cambricon card on the PCI bus, but its driver is not loaded (no /dev/cambricon_dev0)", _DRIVER)
            return Refusal("there is no Cambricon card here (no /dev/cambricon_dev0)", _CONTAINER)
        visible = system.visible(len(nodes))
        if self.number >= len(visible):
            chosen = " that MLU_VISIBLE_DEVICES shows" if "MLU_VISIBLE_DEVICES" in system.environment else ""
            return Refusal(f"there are only {len(visible)} cards{chosen}", "choose a lower number, or show more cards")
        node = system.root / "dev" / f"cambricon_dev{visible[self.number]}"
        if node.exists() and not os.access(node, os.R_OK | os.W_OK):
            return Refusal(f"this user may not open {node}", f"run as a user who may, or: sudo chmod a+rw {node}")
        table = self.monitor.table()
        if isinstance(table, Refusal):
            return table
        card = table.cards.get(visible[self.number])
        if card is None:
            return Refusal(f"cnmon shows no card {visible[self.number]}", "see with cnmon which cards there are")
        if not card.memory:
            return Refusal(f"cnmon shows no memory on card {card.number}", "see with cnmon whether it has failed, then restart")
        return card

    def profile(self) -> Profile:
        """What Cambricon publishes of the board, projected; its memory as the driver says it. Measures nothing."""
        card = self._card()
        if isinstance(card, Refusal):
            raise NativeError(f"{self.name}: {card.reason}; {card.remedy}")
        known = board(card.name)
        said: Basis = "measured" if card.cap else "projected"
        basis: dict[str, Basis] = {"memory": "measured"}
        if known is None:  # how many cores it has is not known either: the chip counts as one
            basis |= {"cores": "unknown"}
            if card.cap:
                basis["power"] = said
            return Profile(self.name, "npu", (Cores(card.name, 1),), card.memory, power=card.cap, basis=basis)
        caches = (Cache(1, 768 << 10), Cache(2, 4 << 20, shared_by=4))  # NRAM of a core, SRAM of a cluster
        cores = Cores(f"{card.name}, MLUarch03", 4 * known.clusters, features=("fp16", "bf16", "int8"), caches=caches)
        basis |= {"cores": "projected", "bandwidth": "projected", "operations": "projected", "link": "projected", "power": said}
        return Profile(
            name=self.name,
            kind="npu",
            cores=(cores,),
            memory=card.memory,
            bandwidth={cores.number: known.bandwidth},
            operations=known.operations,
            link=known.link,
            power=card.cap or known.power,
            basis=basis,
        )

    def health(self) -> Health:
        """Temperature and power as ``cnmon`` last said, at once; the first call of all knows nothing yet."""
        table = self.monitor.latest.get()
        if not isinstance(table, cnmon.Table):
            return Health()
        visible = self.monitor.system.visible(len(table.cards))
        card = table.cards.get(visible[self.number]) if self.number < len(visible) else None
        if card is None:
            return Health()
        # The table has no reasons for slowing down. A board that draws all it may is slowed down by that.
        capped = card.power is not None and card.cap is not None and 0 < card.cap <= card.power
        return Health(card.temperature, card.power, throttled=(f"it draws all of the {card.cap:.0f} W it may",) if capped else ())


class AbsentAscend(NamedTuple):
    """An Ascend card that this package's engine could drive, and that only edge-rt-ascend knows how to look at: says so."""

    name: str = "ascend:0"

    def probe(self) -> Refusal:
        """What to install."""
        return Refusal("there is an Ascend NPU, and edge-rt-ascend, which finds it, is not installed", "pip install edge-rt-ascend")


def absent(system: System | None = None, here: Callable[[str], bool] = adapters.installed) -> list[AbsentAscend]:
    """One where there is an Ascend NPU, and nothing that finds it."""
    node = (system or System()).root / "dev/davinci_manager"
    return [AbsentAscend()] if node.exists() and not here("edge_rt_ascend") else []


def places(system: System | None = None) -> list[Mlu]:
    """``mlu:0``, found or not, and one more for each further card that the driver shows and the environment leaves visible."""
    system = system or System()
    monitor = Monitor(system)
    return [Mlu(number, monitor) for number in range(max(1, len(system.visible(len(system.nodes())))))]
