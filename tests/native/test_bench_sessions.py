"""The benchmark's conversations through sessions: the fact has been in the cells, and what became of it is told as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import edge_rt
from bench.context.conversations import conversation
from bench.context.sessions import POLICIES, converse
from edge_rt.plugin_host.registry import Registry
from edge_rt.testing.null_device import NullPlugin


@pytest.mark.parametrize("policy", POLICIES.values())
def test_a_conversation_is_held(random_model: Callable[..., Path], policy: str) -> None:
    registry = Registry.load(entry_points=False, plugins={"null": NullPlugin(reply="so it is")})
    with edge_rt.open(random_model(), engine="null", device="null", registry=registry, context=4096, policy=policy) as model:
        one = conversation(0, "en", 3000, lambda text: len(model.tokenize(text, bos=False)))
        small, whole = converse(model, one, 800, 4), converse(model, one, 4096, 4)
    assert small.answer
    assert small.answer in "so it is"
    assert (whole.left, whole.there, whole.recalled) == (False, True, 0)
    assert small.left
    assert small.there == (small.recalled > 0)
    assert policy == "graded" or small.recalled == 0
