"""A device that names its fast cores: the engine computes there and nowhere else, and the results are the same."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge_rt
from edge_rt.core.engine import SequenceBatch
from edge_rt.core.ggml_engine import GgmlEngine
from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.hooks import Device, EngineOptions, Offer, hookimpl
from edge_rt.native import ggml
from edge_rt.plugin_host.registry import Registry

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux says where a thread may run")
LAST = max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """The CPUs that each graph was allowed to run on."""
    found: list[set[int]] = []
    compute = ggml.c.backend_graph_compute

    def watched(*arguments: Any) -> Any:
        found.append(os.sched_getaffinity(0))
        return compute(*arguments)

    monkeypatch.setattr(ggml.c, "backend_graph_compute", watched)
    return found


def logits(path: Path, **options: Any) -> np.ndarray[Any, Any]:
    """After a prompt and after two tokens fed one by one: the second of these repeats the step of the first."""
    with ModelFile.open(path) as file, closing(GgmlEngine(file, EngineOptions(context=256, **options))) as engine:
        sequence = engine.new_sequence()
        rows = []
        for tokens in (range(3, 20), [20], [21]):
            (row,) = engine.step([SequenceBatch(sequence, list(tokens))])
            assert row is not None
            rows.append(np.array(row))
        return np.concatenate(rows)


def test_every_graph_stays_on_these_cpus(random_model: Callable[..., Path], seen: list[set[int]]) -> None:
    path, before = random_model("llama", type="Q4_0"), os.sched_getaffinity(0)
    usual = logits(path, threads=1)  # the first engine of a machine also measures which layout of values suits it, anywhere
    seen.clear()
    kept = logits(path, cpus=(LAST,))
    assert seen == [{LAST}] * len(seen)
    assert len(seen) >= 3
    assert os.sched_getaffinity(0) == before
    np.testing.assert_array_equal(kept, usual)


def test_more_threads_than_fast_cores_go_anywhere(random_model: Callable[..., Path], seen: list[set[int]]) -> None:
    logits(random_model("llama"), cpus=(LAST,), threads=2)
    assert seen == [os.sched_getaffinity(0)] * len(seen)


WORKERS = """
import os
import sys
from pathlib import Path
from edge_rt.core.engine import SequenceBatch
from edge_rt.core.ggml_engine import GgmlEngine
from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.hooks import EngineOptions
from edge_rt.native import memory

memory.fitting = lambda cpus, threads: tuple(cpus)  # two threads on one CPU: OpenMP makes a team even here
engine = GgmlEngine(ModelFile.open(sys.argv[1]), EngineOptions(threads=2, context=256, cpus=(int(sys.argv[2]),)))
before = {path.name for path in Path("/proc/self/task").iterdir()}
engine.step([SequenceBatch(engine.new_sequence(), list(range(3, 20)))])
for task in Path("/proc/self/task").iterdir():
    allowed = next(line.split()[1] for line in (task / "status").read_text().splitlines() if line.startswith("Cpus_allowed_list"))
    print("new" if task.name not in before else "caller" if int(task.name) == os.getpid() else "other", allowed)
"""


def test_the_threads_of_openmp_stay_there_too(random_model: Callable[..., Path]) -> None:
    path = random_model("llama", type="Q4_0")
    logits(path, threads=1)  # what is measured once for this machine is measured
    result = subprocess.run([sys.executable, "-c", WORKERS, str(path), str(LAST)], capture_output=True, text=True, check=True)
    told = [line.split() for line in result.stdout.splitlines()]
    assert ["new", str(LAST)] in told, f"OpenMP's thread is elsewhere: {told}"  # the thread that reads ahead is new as well, and free
    (caller,) = (allowed for kind, allowed in told if kind == "caller")
    assert caller != str(LAST) or len(os.sched_getaffinity(0)) == 1, "the caller is where it may be"


class FastCores:
    """A plugin whose device has one fast core."""

    EDGE_RT_API = 1
    name = "fast"

    def probe(self) -> Offer:
        return Offer(100, "one fast core", 1 << 30, cpus=(LAST,))

    @hookimpl
    def edge_rt_devices(self) -> Iterable[Device]:
        return [self]


def test_what_a_device_offers_reaches_the_engine(random_model: Callable[..., Path], seen: list[set[int]]) -> None:
    registry = Registry.load(plugins={"fast": FastCores()})
    with edge_rt.open(random_model("llama"), registry=registry) as model:
        assert model.info.device == "fast"
        model.logits([3, 4, 5])
    assert seen == [{LAST}] * len(seen)
    assert seen
