"""Limits of power and temperature: whether a device can be held to them, and what they turned out to be worth."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from edge_rt.core.engine import HoldsLimits
from edge_rt.device_profile import Health, Limits, TellsHealth
from edge_rt.errors import OptionError

if TYPE_CHECKING:
    from edge_rt.core.engine import Engine
    from edge_rt.deployment import PowerSetting
    from edge_rt.plugin_host.guard import PluginDevice
    from edge_rt.power.controller import Sustained

PATIENCE = 0.6
"""Seconds within which a device must tell what it is asked for: power may be the difference between two readings of energy."""
_WAYS_OUT = {
    "power": (
        "on a PC the kernel's powercap (RAPL) must be there and readable, as after `sudo chmod a+r "
        "/sys/class/powercap/intel-rapl:*/energy_uj`, and a virtual machine has none; limit --celsius or --threads instead, "
        "or leave --power out"
    ),
    "temperature": "/sys/class/thermal has no zone that it could read, as in a virtual machine; limit --power or --threads instead, "
    "or leave --celsius out",
}


def limits(device: PluginDevice, power: float | None, celsius: float | None) -> Limits | None:
    """What to hold a device to: ``power`` in watts, ``celsius`` in degrees. None if nothing is asked for.

    Waits for up to ``PATIENCE`` seconds for first readings. Raises OptionError if the device does not tell what is to be limited.
    """
    if power is None and celsius is None:
        return None
    if not isinstance(device.device, TellsHealth):
        asked = " and ".join(flag for flag, value in (("--power", power), ("--celsius", celsius)) if value is not None)
        raise OptionError(f"the device {device.name} does not tell its power and temperature, so they cannot be limited; leave {asked} out")
    health = _guarded(device.plugin, device.device)
    wanted = [name for name, value in (("power", power), ("temperature", celsius)) if value is not None]
    until = time.monotonic() + PATIENCE
    while missing := _missing(health(), wanted):
        if time.monotonic() > until:
            raise OptionError(f"the device {device.name} does not tell its {missing}, so it cannot be limited: {_WAYS_OUT[missing]}")
        time.sleep(0.05)
    return Limits(health, power, celsius)


def planned(device: PluginDevice, setting: PowerSetting, notices: list[str]) -> Limits | None:
    """What a compiled model's plan asks to hold, as far as the device tells it; a cap that it cannot be held to is noted, and no error:
    the model may run on another device than it was compiled for. Waits as ``limits`` does, for power alone.
    """
    if setting.watts is None and setting.celsius is None:
        return None  # sensors cost start-up time
    health: Callable[[], Health] = _guarded(device.plugin, device.device) if isinstance(device.device, TellsHealth) else Health
    until = time.monotonic() + PATIENCE
    while (now := health()).power is None and setting.watts is not None and time.monotonic() < until:
        time.sleep(0.05)
    if setting.watts is not None and now.power is None:
        notices.append(f"the plan's cap of {setting.watts:g} W is not held: the device {device.name} does not tell its power")
    power = None if now.power is None else setting.watts
    celsius = None if now.temperature is None else setting.celsius
    return None if power is None and celsius is None else Limits(health, power, celsius)


def _missing(found: Health, wanted: list[str]) -> str | None:
    return next((name for name in wanted if getattr(found, name) is None), None)


def _guarded(plugin: str, device: TellsHealth) -> Callable[[], Health]:
    """A plugin that breaks its word and raises tells nothing, which is said once in the log; the limits then do without readings."""
    failed = False

    def health() -> Health:
        nonlocal failed
        try:
            found = device.health()
        except Exception as error:
            if not failed:
                logging.getLogger("edge_rt.plugins").warning("plugin %s: health raised %s: %s", plugin, type(error).__name__, error)
            failed = True
            return Health()
        return found if isinstance(found, Health) else Health()

    return health


def check_held(engine: Engine, limits: Limits | None) -> None:
    """Raise OptionError for an engine that would compute on whatever it was asked to keep to."""
    if limits is not None and not (isinstance(engine, HoldsLimits) and engine.sustained() is not None):
        name = engine.info.engine
        what = f"the engine {name} cannot hold a limit of power or temperature"
        raise OptionError(f"{what}; run it with ggml, or leave --power and --celsius out")


def sustained(engine: Engine) -> Sustained | None:
    """What limits were asked for and what was measured, None without any."""
    return engine.sustained() if isinstance(engine, HoldsLimits) else None


def news(engine: Engine) -> list[str]:
    """What became of the limits, each once."""
    return engine.news() if isinstance(engine, HoldsLimits) else []


def sentence(found: Sustained) -> str:
    """All that is known, in one line."""
    asked = [f"{found.cap:g} W"] if found.cap is not None else []
    asked += [f"{found.limit:g} °C"] if found.limit is not None else []
    parts = [f"limit {' and '.join(asked)}"]
    if found.tokens_per_second is not None:
        parts.append(f"sustained {found.tokens_per_second:.1f} tokens/s over {found.seconds:.0f} s")
    if found.power is not None:
        parts.append(f"mean {found.power:.2f} W")
    if found.temperature is not None:
        hottest = f", hottest {found.hottest:.0f}" if found.hottest is not None else ""
        parts.append(f"{found.temperature:.0f} °C{hottest}")
    parts.append(f"{found.threads} thread{'s' * (found.threads > 1)} for {found.duty:.0%} of the time")
    if found.throttled > 0:
        parts.append(f"throttled {found.throttled:.0%} of it")
    return "; ".join([*parts, *filter(None, [found.problem])])
