"""The second choice on an NPU: the engine ``torch`` of edge-rt-mlu, on torch_npu. Is it here, and if not, what is missing?"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

from edge_rt.hooks import Engine, EngineOptions, ModelFile, Refusal, UnsupportedModel

ENGINE = "torch"
_NEEDED = {
    "edge_rt_mlu": "edge-rt-mlu",
    "torch": "torch of the version that torch-npu was built for",
    "torch_npu": "torch-npu of the version that fits CANN",
}
"""Python package -> what to install."""


def installed(package: str) -> bool:
    """Whether a package can be found. Imports nothing."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # a half-removed package, or one without a spec
        return False


def missing(here: Callable[[str], bool]) -> Refusal | None:
    """What the engine lacks, None if all is here."""
    lacking = [package for package in _NEEDED if not here(package)]
    if not lacking:
        return None
    what = f"the engine {ENGINE} lacks the Python package{'s' if len(lacking) > 1 else ''} {' and '.join(lacking)}"
    return Refusal(what, "install " + " and ".join(_NEEDED[package] for package in lacking))


def or_else(first: Refusal, second: Refusal) -> Refusal:
    """Why neither of two engines can be used, and both ways out."""
    return Refusal(f"{first.reason}, and {second.reason}", f"{first.remedy}; or, for the engine {ENGINE}, {second.remedy}")


class AbsentTorch:
    """Keeps the name ``torch`` while edge-rt-mlu is not installed, so that who asks for that engine is told where it is."""

    name = ENGINE

    def supports(self, model: ModelFile, options: EngineOptions) -> Refusal:
        """Never; what to install."""
        return Refusal(f"the engine {ENGINE} comes with edge-rt-mlu, which is not installed", "pip install edge-rt-mlu")

    def open(self, model: ModelFile, options: EngineOptions) -> Engine:
        """Raises UnsupportedModel."""
        refusal = self.supports(model, options)
        raise UnsupportedModel(f"{refusal.reason}; {refusal.remedy}")


def engines(here: Callable[[str], bool]) -> Iterator[AbsentTorch]:
    """What stands in for the engine where it is not installed."""
    if not here("edge_rt_mlu"):
        yield AbsentTorch()
