"""Pruned caches: each head keeps what it needs, memory is given back, and everything else about a sequence still holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bits import random_tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_rt.core.engine import SequenceBatch
from edge_rt.core.ggml_engine import GgmlEngine
from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.core.kv.ops import ENOUGH, cached_layers
from edge_rt.core.kv.pruning import METHODS
from edge_rt.errors import ContextError, SessionFileError
from edge_rt.hooks import EngineOptions
from edge_rt.native import ggml, memory

LAYOUTS = pytest.mark.parametrize(
    "options",
    [{}, {"extra": {"ggml.transposed_values": True}}, {"key_type": "q8_0"}],
    ids=["by-cell", "transposed", "q8_0-keys"],
)


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[GgmlEngine]:
    given = {"threads": 1, "context": 1024, "extra": {"ggml.transposed_values": False}, **options}
    with ModelFile.open(path) as file, closing(GgmlEngine(file, EngineOptions(**given))) as engine:
        yield engine


def feed(engine: GgmlEngine, sequence: int, tokens: list[int], size: int | None = None) -> Any:
    """Logits of every token, as a copy."""
    size = size or len(tokens)
    return np.concatenate(
        [np.array(engine.step([SequenceBatch(sequence, tokens[i : i + size], "all")])[0]) for i in range(0, len(tokens), size)]
    )


def watched(engine: GgmlEngine, tokens: list[int], window: int = 8) -> int:
    """A sequence that was watched while it was fed."""
    sequence = engine.new_sequence()
    engine.watch(sequence, window)
    feed(engine, sequence, tokens)
    return sequence


def same_bits(a: Any, b: Any) -> None:
    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


def contents(engine: GgmlEngine, sequence: int) -> list[tuple[Any, Any]]:
    """Copies of keys [n, G, bytes] and values [n, G, D] in use, layer by layer."""
    cache = engine._sequences[sequence]
    n = cache.length
    found = []
    for layer in range(engine.info.n_layer):
        with cache.cells(layer) as (keys, values):
            found.append((keys[:n].copy(), values[:n].copy()))
    return found


# ---- queries ---------------------------------------------------------------------------------------------------------


def attention_by_hand(engine: GgmlEngine, sequence: int, window: int) -> list[Any]:
    """What ``CachedLayer.attention`` must be, in double precision from the ring's queries and the cached keys."""
    cache, config = engine._sequences[sequence], engine.config
    asked = sorted({round(i) for i in np.linspace(0, window - 1, min(window, ENOUGH))})
    n, group, found = cache.length, config.n_head // config.n_head_kv, []
    for layer in range(config.n_layer):
        queries = cache.ring.queries(layer, n).astype(np.float64)
        assert len(queries) == window
        with cache.cells(layer) as (cached, _):
            keys = cached[:n].copy().view(np.float16).astype(np.float64)
        rows = np.empty((config.n_head_kv, group * len(asked), n))
        for head in range(config.n_head):
            for row, i in enumerate(asked):
                scores = np.exp(keys[:, head // group] @ queries[i, head] * config.attention_scale)
                scores[n - window + i + 1 :] = 0
                rows[head // group, head % group * len(asked) + row] = scores / scores.sum()
        found.append(rows)
    return found


@pytest.mark.parametrize(("window", "size"), [(8, 60), (8, 7), (8, 1), (60, 60), (1, 16), (13, 4)])
def test_the_ring_holds_the_last_queries(random_model: Callable[..., Path], window: int, size: int) -> None:
    """However the tokens were fed: attention computed with them by hand is what the engine says it is, and a token's row is its own."""
    with opened(random_model("llama", n_head=4, n_head_kv=2, type="F32")) as engine:
        tokens, sequence = random_tokens(engine, 60), engine.new_sequence()
        engine.watch(sequence, window)
        feed(engine, sequence, tokens, size)
        whole = engine.new_sequence()
        engine.watch(whole, 60)
        feed(engine, whole, tokens)
        layers = cached_layers(engine._sequences[sequence], engine.config, engine._backend)
        for layer, expected in zip(layers, attention_by_hand(engine, sequence, window), strict=True):
            np.testing.assert_allclose(layer.attention(), expected, atol=2e-3)
            mine, all_ = (engine._sequences[one].ring.queries(layer.number, 60) for one in (sequence, whole))
            np.testing.assert_allclose(mine, all_[60 - window :], atol=2e-2 * np.abs(all_).max())


def test_a_pass_may_ask_with_fewer_queries_than_were_kept(random_model: Callable[..., Path]) -> None:
    """With the last 8 of 60 all is as if no more had been watched, and otherwise not."""
    with opened(random_model("llama")) as engine:
        tokens = random_tokens(engine, 60)
        few, many, all_ = watched(engine, tokens, 8), watched(engine, tokens, 60), watched(engine, tokens, 60)
        engine.prune(few, 30, first=2, last=3, queries=60)  # there are no more than 8
        engine.prune(many, 30, first=2, last=3, queries=8)
        engine.prune(all_, 30, first=2, last=3)
        assert engine.export_sequence(few) == engine.export_sequence(many) != engine.export_sequence(all_)


def test_queries_of_tokens_that_went_are_forgotten(random_model: Callable[..., Path]) -> None:
    with opened(random_model("llama")) as engine:
        tokens = random_tokens(engine, 60)
        sequence = watched(engine, tokens)
        ring = engine._sequences[sequence].ring
        assert ring is not None
        before = ring.queries(1, 60)
        engine.truncate(sequence, 57)
        assert ring.held(57) == 5
        same_bits(ring.queries(1, 57), before[:5])
        feed(engine, sequence, tokens[57:])
        assert ring.held(60) == 8
        assert np.abs(ring.queries(1, 60) - before).max() < 2e-2 * np.abs(before).max()
        engine.truncate(sequence, 10)
        assert ring.held(10) == 0
        with pytest.raises(ContextError, match="watch"):
            engine.prune(sequence, 5, first=1, last=1)
        feed(engine, sequence, tokens[10:])
        before = ring.queries(1, 60)
        engine.remove_cells(sequence, [(20, 56)])
        same_bits(ring.queries(1, 24), before[4:])
        feed(engine, sequence, tokens[:2])
        same_bits(ring.queries(1, 26)[:4], before[4:])
        for _ in range(4):  # through the repeated step, and growing into a larger cache
            feed(engine, sequence, tokens, 1)
        assert ring.held(engine.length(sequence)) == 8


# ---- pruning ---------------------------------------------------------------------------------------------------------


@LAYOUTS
def test_each_head_keeps_its_own_cells(random_model: Callable[..., Path], options: dict[str, Any]) -> None:
    """Every kept cell is one of the old, in order, with its key and its value; both ends are there; heads differ."""
    path = random_model("llama", n_head=4, n_head_kv=2, head_dim=32)
    with opened(path, **options) as engine:
        sequence = watched(engine, random_tokens(engine, 90))
        before = contents(engine, sequence)
        engine.prune(sequence, 40, first=5, last=7)
        positions = engine._sequences[sequence].each_position()
        assert (np.diff(positions) > 0).all()
        assert (positions[:, :, :5] == np.arange(5)).all()
        assert (positions[:, :, -7:] == np.arange(83, 90)).all()
        assert not (positions == positions[0, 0]).all()
        for layer, ((old_keys, old_values), (keys, values)) in enumerate(zip(before, contents(engine, sequence), strict=True)):
            for head in range(2):
                np.testing.assert_array_equal(keys[:, head], old_keys[positions[layer, head], head])
                np.testing.assert_array_equal(values[:, head], old_values[positions[layer, head], head])


@LAYOUTS
def test_a_window_is_what_remains_when_the_middle_is_removed(random_model: Callable[..., Path], options: dict[str, Any]) -> None:
    path = random_model("llama", n_head=4, n_head_kv=2, head_dim=32)
    with opened(path, **options) as engine:
        tokens, more = random_tokens(engine, 90), random_tokens(engine, 12, seed=1)
        pruned, removed = watched(engine, tokens), watched(engine, tokens)
        engine.prune(pruned, 30, first=5, last=2, method="window")
        engine.remove_cells(removed, [(5, 65)])
        assert engine.mixed_cells(pruned) == 0
        assert engine.export_sequence(pruned) == engine.export_sequence(removed)
        same_bits(feed(engine, pruned, more), feed(engine, removed, more))
        same_bits(feed(engine, pruned, more, 1), feed(engine, removed, more, 1))


def test_one_head_is_never_mixed(random_model: Callable[..., Path]) -> None:
    with opened(random_model("llama", n_head=2, n_head_kv=1, n_layer=1)) as engine:
        sequence = watched(engine, random_tokens(engine, 60))
        engine.prune(sequence, 20, first=2, last=2)
        assert engine.mixed_cells(sequence) == 0
        engine.truncate(sequence, 11)
        assert engine.next_position(sequence) > 11


@LAYOUTS
def test_a_pruned_cache_is_as_if_the_other_cells_were_masked(random_model: Callable[..., Path], options: dict[str, Any]) -> None:
    """One layer, so that what is left of the cache decides alone: next logits from the keys and values kept, by hand."""
    with opened(random_model("llama", n_head=4, n_head_kv=2, head_dim=32, n_layer=2), **options) as engine:
        sequence = watched(engine, random_tokens(engine, 90))
        fork = engine.fork_sequence(sequence, 90)
        engine.prune(sequence, 89, first=5, last=7)
        a, b = feed(engine, sequence, [3]), feed(engine, fork, [3])
        assert 0 < np.abs(a - b).mean() < 0.05 * np.abs(b).mean(), "the least important cell changes little, but something"


@LAYOUTS
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_history_survives_saving(random_model: Callable[..., Path], options: dict[str, Any], data: st.DataObject) -> None:
    """Prune, feed, remove, renumber, truncate at random: copies stay bit-identical, positions rise, the protected ends stay."""
    with opened(random_model("llama", n_head=4, n_head_kv=2, head_dim=32), **options) as engine:
        sequence = engine.new_sequence()
        engine.watch(sequence, data.draw(st.integers(1, 20)))
        feed(engine, sequence, random_tokens(engine, data.draw(st.integers(2, 70))))
        for number in range(data.draw(st.integers(1, 5))):
            length, mixed = engine.length(sequence), engine.mixed_cells(sequence)
            each = engine._sequences[sequence].each_position()
            kind = data.draw(st.sampled_from(["prune", "prune", "feed", "remove", "renumber", "truncate"]))
            if kind == "prune" and length:
                keep = data.draw(st.integers(1, length + 1))
                first = data.draw(st.integers(0, keep))
                last = data.draw(st.integers(0, keep - first))
                feed(engine, sequence, [1])
                length, each = length + 1, engine._sequences[sequence].each_position()
                engine.prune(sequence, keep, first=first, last=last, method=data.draw(st.sampled_from(sorted(METHODS))))
                now = engine._sequences[sequence].each_position()
                assert now.shape[2] == engine.length(sequence) == min(keep, length)
                assert (now[:, :, :first] == each[:, :, :first]).all()
                assert (now[:, :, now.shape[2] - last :] == each[:, :, length - last :]).all()
            elif kind == "remove" and mixed < length:
                start = data.draw(st.integers(mixed, length - 1))
                engine.remove_cells(sequence, [(start, data.draw(st.integers(start + 1, length)))])
            elif kind == "renumber":
                engine.renumber(sequence)
            elif kind == "truncate" and length:
                engine.truncate(sequence, data.draw(st.integers(mixed or 1, length)))
            feed(engine, sequence, random_tokens(engine, data.draw(st.integers(1, 12)), seed=number))
            each = engine._sequences[sequence].each_position()
            assert (np.diff(each) > 0).all()
            assert each.max(initial=-1) < engine.next_position(sequence)
        copy = engine.import_sequence(engine.export_sequence(sequence))
        assert engine.export_sequence(copy) == engine.export_sequence(sequence)
        more = random_tokens(engine, 10, seed=99)
        same_bits(feed(engine, copy, more, 3), feed(engine, sequence, more, 3))


def test_gaps_close_head_by_head(random_model: Callable[..., Path]) -> None:
    """Keys are turned to their rank in each head: as the reference, the key's rotation computed from the one it had at position 0."""
    with opened(random_model("llama", n_head=4, n_head_kv=2, head_dim=32, type="F32")) as engine:
        sequence = watched(engine, [7] * 60)  # in the first layer every key is the same but for its position
        plain = contents(engine, sequence)[0][0].view(np.float16).astype(np.float32)
        engine.prune(sequence, 30, first=2, last=3, method="random")
        assert engine.mixed_cells(sequence) > 10
        engine.renumber(sequence)
        assert engine.next_position(sequence) == 30
        assert (engine._sequences[sequence].each_position() == np.arange(30)).all()
        turned = contents(engine, sequence)[0][0].view(np.float16).astype(np.float32)
        np.testing.assert_allclose(turned, plain[:30], atol=4e-3 * np.abs(plain).max())
        with pytest.raises(ContextError):
            engine.truncate(sequence, 5)
        feed(engine, sequence, [1])
        engine.prune(sequence, 20, first=2, last=3, method="window")
        assert engine.mixed_cells(sequence) > 5, "cells at equal positions still hold other tokens"


@LAYOUTS
def test_memory_goes_back(random_model: Callable[..., Path], options: dict[str, Any]) -> None:
    """As the system sees it: what the sequence holds after a pass to a quarter is under three tenths of what it held."""
    path = random_model("llama", head_dim=64, n_head=4, n_head_kv=2)
    with opened(path, context=4096, **options) as engine:
        sequence = watched(engine, random_tokens(engine, 2048))

        def held() -> tuple[int, int]:
            view = engine._sequences[sequence].view
            places = [(ggml.data_address(t), ggml.fields(t).nb[3]) for t in (*view.keys, *view.values)]
            return sum(memory.resident_bytes(*memory.page_span(*place)) or 0 for place in places), engine.memory().cache

        resident, said = held()
        released = engine.prune(sequence, 500, first=16, last=64).released_bytes
        after, now_said = held()
        assert after < 0.3 * resident
        assert released == said - now_said
        assert abs((resident - after) - released) < 0.05 * released


def test_damaged_saved_cells_are_refused(random_model: Callable[..., Path]) -> None:
    with opened(random_model("llama", n_head=4, n_head_kv=2)) as engine:
        sequence = watched(engine, random_tokens(engine, 60))
        engine.prune(sequence, 30, first=2, last=3)
        saved = engine.export_sequence(sequence)
        counted, noted = 28, 32 + 12 * len(list(engine._sequences[sequence].positions))
        for at, number in ((counted, 31), (counted, 0), (counted, 2**31), (noted, 1), (noted, -1), (noted + 8, 1000)):
            damaged = saved[:at] + (number % 2**32).to_bytes(4, "little") + saved[at + 4 :]
            with pytest.raises(SessionFileError):
                engine.import_sequence(damaged)
