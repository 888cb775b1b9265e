"""Power caps and temperature limits in the real engine, on a device of a plugin that tells what the process itself did."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import edge_rt
from edge_rt.core.engine import HoldsLimits
from edge_rt.errors import OptionError
from edge_rt.hooks import API_VERSION, Device, Health, Offer, hookimpl
from edge_rt.plugin_host.registry import Registry
from edge_rt.power import throttle
from edge_rt.power.limits import sentence, sustained
from edge_rt.types import Delta, Done, Notice

REST, WORK = 2.0, 20.0


class Meter:
    """A device that draws ``REST`` watts, and ``WORK`` more for each CPU that this process keeps busy; some 20 ms are its moment."""

    name = "metered"

    def __init__(self) -> None:
        self.at, self.used, self.power = time.monotonic(), time.process_time(), REST
        self.start, self.start_used = self.at, self.used
        self.tells = True

    def probe(self) -> Offer:
        return Offer(50, "a meter, for tests", 1 << 40, engines=("ggml", "llama_cpp", "null"), basis="simulated")

    def health(self) -> Health:
        now, used = time.monotonic(), time.process_time()
        if now - self.at > 0.02:
            self.power = REST + WORK * (used - self.used) / (now - self.at)
            self.at, self.used = now, used
        return Health(temperature=50.0, power=self.power) if self.tells else Health()

    def mean(self) -> float:
        """Watts since ``start``."""
        return REST + WORK * (time.process_time() - self.start_used) / (time.monotonic() - self.start)

    def reset(self) -> None:
        self.start, self.start_used = time.monotonic(), time.process_time()


class Silent:
    """A device that tells nothing of how it is."""

    name = "silent"

    def probe(self) -> Offer:
        return Offer(0, "tells nothing, for tests", 1 << 40, engines=("ggml", "null"), basis="simulated")


class Broken(Silent):
    """A device whose plugin breaks its word."""

    name = "broken"

    def health(self) -> Health:
        raise RuntimeError("no sensor")


class Plugin:
    EDGE_RT_API = API_VERSION

    def __init__(self, *devices: Device) -> None:
        self.devices = devices

    @hookimpl
    def edge_rt_devices(self) -> list[Device]:
        return list(self.devices)


@contextmanager
def opened(path: Path, *devices: Any, **options: Any) -> Iterator[Any]:
    registry = Registry.load(entry_points=False, plugins={"meters": Plugin(*devices)})
    given = {"device": devices[0].name, "threads": 1, "context": 2048, **options}
    with edge_rt.open(path, registry=registry, **given) as model:
        yield model


def write(model: Any, tokens: int) -> list[Any]:
    with model.session() as session:
        return list(session.generate("Once upon a time", max_tokens=tokens, temperature=0.0, ignore_eos=True))


def text(events: list[Any]) -> list[int]:
    return [token for event in events if isinstance(event, Delta) for token in event.tokens]


@pytest.fixture(scope="module")
def model_file(random_model: Callable[..., Path]) -> Path:
    return random_model("llama")


def test_the_engine_holds_a_cap_and_writes_the_same(model_file: Path) -> None:
    meter = Meter()
    with opened(model_file, meter) as free:
        plain = write(free, 64)
        assert sustained(free.engine) is None
    with opened(model_file, meter, power=8.0) as model:
        assert isinstance(model.engine, HoldsLimits)
        assert text(write(model, 64)) == text(plain), "rests change no token"
        until = time.monotonic() + 4
        while time.monotonic() < until:
            write(model, 200)
        meter.reset()
        until = time.monotonic() + 4
        while time.monotonic() < until:
            write(model, 200)
        # What Python does between steps draws power too, and is not the engine's: it is measured with the rest.
        assert meter.mean() <= 1.15 * 8.0
        found = sustained(model.engine)
        assert found is not None
        assert found.cap == 8.0
        assert found.duty < 1
        assert found.tokens_per_second is not None
        assert found.power == pytest.approx(8.0, rel=0.3)
        assert "limit 8 W; sustained" in sentence(found)


def test_a_cap_that_does_not_bind_costs_nothing_in_the_end(model_file: Path) -> None:
    with opened(model_file, Meter(), power=500.0) as model:
        until, found = time.monotonic() + 30, None
        while found is None or found.duty < 1:
            assert time.monotonic() < until, found
            write(model, 200)
            found = sustained(model.engine)
        assert found.problem == ""


def test_readings_that_vanish_are_told_with_the_answer(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_rt.power.controller.STALE", 0.5)
    meter = Meter()
    with opened(model_file, meter, power=500.0) as model:
        write(model, 8)
        meter.tells = False
        until, said = time.monotonic() + 10, []
        while not said and time.monotonic() < until:
            said = [event.message for event in write(model, 50) if isinstance(event, Notice) and "tells no power" in event.message]
        assert said
        assert "no power" in sustained(model.engine).problem  # type: ignore[union-attr]


def test_drafts_that_were_wrong_are_no_tokens() -> None:
    one = throttle.StepThrottle(1, 1)
    steps = [(10, 5), (12, 3), (15, 1), (16, 1)]  # one token and four drafts, of which one was right; then all were
    assert sum(one.written([(7, cells, tokens)]) for cells, tokens in steps) == 17 - 10


def test_a_rest_says_that_it_goes_on_and_time_that_passed_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_rt.hardware.profile import Limits

    one = throttle.StepThrottle(1, 1, Limits(lambda: Health(power=1.0), power=500.0))
    try:
        moved: list[int] = []
        one.before("decode", lambda: moved.append(1))
        one._due = one._ended = time.monotonic()
        one._due += 0.6
        started = time.monotonic()
        one.before("decode", lambda: moved.append(1))
        assert 0.55 <= time.monotonic() - started < 2
        assert len(moved) >= 3
        one._due = time.monotonic() - 1.0
        started = time.monotonic()
        one.before("decode", lambda: moved.append(1))
        assert time.monotonic() - started < 0.2
    finally:
        one.close()


# ---- who cannot ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "what"), [({"power": 5.0}, "--power"), ({"celsius": 70.0}, "--celsius")])
def test_a_device_that_tells_nothing_is_refused(model_file: Path, options: dict[str, float], what: str) -> None:
    with pytest.raises(OptionError, match=f"silent does not tell .*leave {what} out"), opened(model_file, Silent(), **options):
        pass


def test_a_reading_that_is_missing_is_named(model_file: Path) -> None:
    class Warm(Meter):
        name = "warm"

        def health(self) -> Health:
            return Health(temperature=40.0)

    with pytest.raises(OptionError, match=r"warm does not tell its power.*powercap"), opened(model_file, Warm(), power=5.0):
        pass
    with opened(model_file, Warm(), celsius=90.0) as model:
        assert sustained(model.engine).limit == 90.0  # type: ignore[union-attr]


def test_a_plugin_that_raises_tells_nothing(model_file: Path) -> None:
    with pytest.raises(OptionError, match="broken does not tell its temperature"), opened(model_file, Broken(), celsius=70.0):
        pass


@pytest.mark.parametrize("engine", ["llama_cpp", "null"])
def test_an_engine_that_cannot_is_refused(model_file: Path, engine: str) -> None:
    from edge_rt.testing.null_device import NullPlugin

    class Cpu(Meter):
        name = "cpu"  # the only one that llama_cpp drives

    plugins = {"meters": Plugin(Cpu()), "null": NullPlugin()}
    registry = Registry.load(entry_points=False, disabled=["cpu"], plugins=plugins)
    with pytest.raises(OptionError, match=f"{engine} cannot hold a limit"):
        edge_rt.open(model_file, registry=registry, engine=engine, power=5.0, device="cpu")


@pytest.mark.parametrize("options", [{"power": 0.0}, {"power": -1.0}, {"power": float("nan")}, {"celsius": 1e3}, {"celsius": -300.0}])
def test_limits_out_of_range_are_refused(model_file: Path, options: dict[str, float]) -> None:
    with pytest.raises(OptionError, match="out of range"), opened(model_file, Meter(), **options):
        pass


def test_done_is_the_last_event_still(model_file: Path) -> None:
    with opened(model_file, Meter(), power=500.0) as model:
        assert isinstance(write(model, 4)[-1], Done)
