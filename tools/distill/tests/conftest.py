"""Fixtures for the tests of edge-rt-distill. Without torch none of them is collected."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

# Processes that tests start know this distribution too, whether it is installed or not.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))

# Tiny models: a second thread costs more than it brings, and results must not depend on the machine. For processes that tests start too.
os.environ["OMP_NUM_THREADS"] = "1"

if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import torch

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(item: pytest.Item) -> None:
        """Runs and engines of other tests set a number for the whole process; this comes before fixtures of the module."""
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of two layers with grouped heads, as GGUF in F32, with a vocabulary and ChatML."""
    from edge_rt.testing.random_models import write_random_model

    folder = tmp_path_factory.mktemp("tiny")
    return write_random_model(folder / "tiny.gguf", "llama", n_layer=2, n_embd=64, n_head=4, n_head_kv=2, n_ff=128, type="F32")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model, as the other tests have it (it is fetched the first time)."""
    from edge_rt import model_hub

    return model_hub.fetch_model(model_hub.DEFAULT)
