"""Compensation: what its formulas say, the same bits in any company, in whatever memory the weights are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bits import feed, random_tokens, same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy_decoder import NumpyDecoder, tensors
from reference import Reference

from edge_rt.core.engine import AppliesCompensation, SequenceBatch
from edge_rt.core.ggml_engine import GgmlEngine
from edge_rt.core.gguf.lora import open_lora
from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.core.gguf.reader import read_header
from edge_rt.core.graph.layers import of_block
from edge_rt.core.weights.error_correction import Compensation, open_compensation
from edge_rt.core.weights.gpu_offload import Accelerator
from edge_rt.errors import ModelFileError, OptionError, OutOfMemory
from edge_rt.hooks import EngineOptions
from edge_rt.testing import gguf_bytes
from edge_rt.testing.random_models import write_random_adapter, write_random_compensation

LINEARS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def side_for(model: Path, folder: Path, name: str = "side", **measures: Any) -> Path:
    with ModelFile.open(model) as file:
        return write_random_compensation(folder / f"{name}.gguf", file, **measures)


@contextmanager
def opened(path: Path, side: Path | None = None, accelerator: Accelerator | None = None, **options: Any) -> Iterator[GgmlEngine]:
    """An engine; the side file is closed before it is used, as the runtime does."""
    found: Compensation | None = None
    with ModelFile.open(path) as file:
        if side is not None:
            found = open_compensation(side, file)
        chosen = {"threads": 1, "context": 512, "extra": {"ggml.transposed_values": False}, **options}
        with closing(GgmlEngine(file, EngineOptions(compensation=found, **chosen), accelerator=accelerator)) as engine:
            if found is not None:
                found.file.close()
            yield engine


def talked(engine: GgmlEngine, tokens: list[int]) -> list[Any]:
    """Logits of a prompt in two pieces, and of tokens one by one."""
    sequence = engine.new_sequence()
    found = [feed(engine, sequence, part) for part in (tokens[:20], tokens[20:30], *([token] for token in tokens[30:]))]
    engine.free_sequence(sequence)
    return found


# ---- what is computed ------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "all": {},
    "f16": {"type": "F16"},
    "low-rank": {"rows": 0, "bias": False, "rank": 7},
    "tables": {"rank": 0, "bias": False},
    "tables-without-offsets": {"rank": 0, "bias": False, "offsets": False, "rows": 9},
    "biases": {"rank": 0, "rows": 0},
    "one-row": {"rank": 1, "rows": 1},
    "some-sites": {"target": r"blk\.1\.(attn_q|attn_v|ffn_up)\.weight"},
    "middle": {"target": r"blk\.\d\.(attn_k|attn_output)\.weight"},
    "large": {"rank": 64, "rows": 0, "type": "F16"},
}


@pytest.mark.parametrize("joined", [True, False], ids=["joined", "apart"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_what_the_formulas_say(kind: str, joined: bool, random_model: Callable[..., Path], tmp_path: Path) -> None:
    path = random_model("llama", alignment=32 if joined else 4096)
    side = side_for(path, tmp_path, **KINDS[kind])
    extra: dict[str, Any] = {"ggml.transposed_values": not joined} | ({} if joined else {"ggml.joined": []})
    with opened(path, side, extra=extra) as engine:
        assert isinstance(engine, AppliesCompensation)
        assert engine.compensated() is not None
        assert (len(next(of_block(engine.weights, engine.config, "blk.0"))) == 3) is joined
        tokens = random_tokens(engine, 36)
        expected, without = NumpyDecoder(path, side).logits(tokens), NumpyDecoder(path).logits(tokens)
        assert np.abs(expected - without).max() > 0.5, "the compensation changes next to nothing"
        found = np.concatenate(talked(engine, tokens))
    assert np.abs(found - expected).mean() < 4e-3  # the cache is in half precision
    assert np.abs(found - expected).mean() < 1e-2 * np.abs(without - expected).mean()


@pytest.mark.parametrize(("kind", "tolerance"), [("q8_0", 3e-2), ("f16", 5e-3), ("f32", 1e-3)])
def test_a_low_rank_term_is_an_adapter_of_scale_one(kind: str, tolerance: float, random_model: Callable[..., Path], tmp_path: Path) -> None:
    """An adapter's kernels round A x to the type of B, and those of a compensation do not."""
    path = random_model("llama", n_embd=128, n_ff=256)
    side = side_for(path, tmp_path, rank=32, rows=0, bias=False, type=kind.upper())
    raw = side.read_bytes()
    header = read_header(raw, len(raw))
    infos = [
        gguf_bytes.tensor(name.replace(".low_", ".weight.lora_"), one.shape, one.type, one.offset - header.data_offset)
        for name, one in header.tensors.items()
    ]
    values = [gguf_bytes.metadata(key, "str", text) for key, text in
              {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}.items()]  # fmt: skip
    (tmp_path / "adapter.gguf").write_bytes(gguf_bytes.build(values, infos, raw[header.data_offset :]))
    with opened(path, side) as corrected, opened(path) as plain, ModelFile.open(path) as file:
        adapter = open_lora(tmp_path / "adapter.gguf", file.header)
        with adapter.file:
            tokens, number = random_tokens(corrected, 36), plain.open_adapter(adapter)
            base = talked(plain, tokens)
            sequence = plain.new_sequence()
            plain.adapt(sequence, number)
            for ours, without, part in zip(talked(corrected, tokens), base, (20, 10, *[1] * 6), strict=True):
                expected = feed(plain, sequence, [tokens.pop(0) for _ in range(part)])
                assert np.abs(ours - expected).mean() < tolerance * np.abs(without - expected).mean()
                assert np.abs(without - expected).mean() > 0.1
            plain.close()


def with_biases(model: Path, side: Path, target: Path) -> Path:
    """The model with a compensation's biases as its own."""
    raw, added = model.read_bytes(), tensors(side)
    header = read_header(raw, len(raw))
    infos = [gguf_bytes.tensor(one.name, one.shape, one.type, one.offset - header.data_offset) for one in header.tensors.values()]
    data = bytearray(raw[header.data_offset :])
    for name, values in added.items():
        data.extend(bytes(-len(data) % header.alignment))
        infos.append(gguf_bytes.tensor(name, values.shape[::-1], 0, len(data)))
        data.extend(values.astype(np.float32).tobytes())
    entries = []
    for key in header:
        kind = header.type_of(key) or ""
        entries.append(gguf_bytes.metadata(key, kind, header.raw_strings(key) if kind == "[str]" else header.get(key)))
    target.write_bytes(gguf_bytes.build(entries, infos, bytes(data), alignment=header.alignment))
    return target


@pytest.mark.parametrize("measures", [{}, {"type": "F16"}, {"type": "Q4_0", "n_embd": 128}], ids=["f32", "f16", "packed"])
def test_biases_are_those_of_stock_llama_cpp_bit_for_bit(
    measures: dict[str, Any], random_model: Callable[..., Path], tmp_path: Path
) -> None:
    path = random_model("llama", **measures)
    side = side_for(path, tmp_path, rank=0, rows=0)
    folded, pack = with_biases(path, side, tmp_path / "folded.gguf"), measures.get("type") == "Q4_0"
    with opened(path, side, pack=pack) as ours, opened(folded, pack=pack) as theirs:
        tokens, libllama = random_tokens(ours, 36), Reference(folded, flash=True, layouts=None if pack else ())
        with closing(libllama):
            for a, b, n in zip(talked(ours, tokens), talked(theirs, tokens), (20, 10, *[1] * 6), strict=True):
                stock = libllama.feed([tokens.pop(0) for _ in range(n)])
                same_bits(b, stock)
                same_bits(a, stock)


@pytest.mark.parametrize(
    ("architecture", "measures", "target"),
    [
        ("qwen2", {}, {}),
        ("qwen3", {"head_dim": 32}, {}),
        ("qwen3moe", {}, {"target": r"blk\.\d+\.attn_(q|k|v|output)\.weight"}),
        ("llama", {"bias": True, "tied": False}, {}),
        ("llama", {"type": "Q4_1", "n_embd": 128, "n_ff": 256}, {}),
    ],
    ids=["qwen2", "qwen3", "experts", "bias", "centred"],
)
def test_a_table_of_one_row_is_a_bias_in_every_architecture(
    architecture: str, measures: dict[str, Any], target: dict[str, Any], random_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Also where a bias of the model's own comes between: then as nearly as an addition in another order is."""
    path = random_model(architecture, **measures)
    table = side_for(path, tmp_path, rank=0, rows=1, bias=False, **target)
    raw = table.read_bytes()
    header = read_header(raw, len(raw))
    infos = [
        gguf_bytes.tensor(name.replace(".rows", ".bias"), one.shape[:1], one.type, one.offset - header.data_offset)
        for name, one in header.tensors.items()
        if name.endswith(".rows")
    ]
    values = [gguf_bytes.metadata(key, header.type_of(key) or "", header.get(key)) for key in header]
    (tmp_path / "bias.gguf").write_bytes(gguf_bytes.build(values, infos, raw[header.data_offset :]))
    with opened(path, table) as one, opened(path, tmp_path / "bias.gguf") as other, opened(path) as plain:
        tokens = random_tokens(one, 36)
        for a, b, c in zip(talked(one, tokens), talked(other, tokens), talked(plain, tokens), strict=True):
            assert np.abs(a - b).max() < 2e-2 * np.abs(b).max()
            assert np.abs(c - b).max() > 0.1 * np.abs(b).max()


# ---- in company ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact(random_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[GgmlEngine, list[int | None]]]:
    """A compensated engine whose base products do not depend on how many columns there are, up to 8, with an adapter."""
    path, folder = random_model("llama", type="Q8_0", n_embd=128, n_ff=256), tmp_path_factory.mktemp("exact")
    side = side_for(path, folder, type="F16", rank=5, rows=6)
    with ModelFile.open(path) as file:
        adapter = open_lora(write_random_adapter(folder / "adapter.gguf", file.header), file.header)
    with adapter.file, opened(path, side) as engine:
        number = engine.open_adapter(adapter)
        assert engine.exact_rows() == 8
        yield engine, [None, number]
        engine.close()


def sequence_of(engine: GgmlEngine, adapter: int | None) -> int:
    sequence = engine.new_sequence()
    engine.adapt(sequence, adapter)
    return sequence


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_interleaving_gives_the_bits_of_each_alone(exact: tuple[GgmlEngine, list[int | None]], data: st.DataObject) -> None:
    """Up to six sequences, with and without an adapter, a few tokens of some of them a step."""
    engine, adapters = exact
    bindings = data.draw(st.lists(st.sampled_from(adapters), min_size=1, max_size=6), label="bindings")
    chance = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    texts = [random_tokens(engine, int(chance.integers(2, 14)), seed=int(chance.integers(1 << 30))) for _ in bindings]
    alone = []
    for adapter, text in zip(bindings, texts, strict=True):
        sequence = sequence_of(engine, adapter)
        alone.append(np.concatenate([feed(engine, sequence, [token]) for token in text]))
        engine.free_sequence(sequence)
    live = [sequence_of(engine, adapter) for adapter in bindings]
    done, found = [0] * len(live), [list[Any]() for _ in live]
    while any(at < len(text) for at, text in zip(done, texts, strict=True)):
        waiting, room, parts = [i for i in range(len(live)) if done[i] < len(texts[i])], 8, []
        for i in chance.permutation(waiting)[: int(chance.integers(1, len(waiting) + 1))]:
            if n := min(int(chance.integers(1, 4)), len(texts[i]) - done[i], room):
                parts.append((i, texts[i][done[i] : done[i] + n]))
                room -= n
        for (i, tokens), logits in zip(parts, engine.step([SequenceBatch(live[i], tokens, "all") for i, tokens in parts]), strict=True):
            found[i].append(np.array(logits))
            done[i] += len(tokens)
    for sequence in live:
        engine.free_sequence(sequence)
    for rows, expected in zip(found, alone, strict=True):
        same_bits(np.concatenate(rows), expected)


def test_a_few_tokens_together_are_each_as_if_alone(exact: tuple[GgmlEngine, list[int | None]]) -> None:
    engine, _ = exact
    tokens, one, many = random_tokens(engine, 28), engine.new_sequence(), engine.new_sequence()
    for sequence in (one, many):
        feed(engine, sequence, tokens[:20])
    same_bits(feed(engine, many, tokens[20:]), np.concatenate([feed(engine, one, [token]) for token in tokens[20:]]))


def test_a_prompt_beside_others_is_as_alone(exact: tuple[GgmlEngine, list[int | None]]) -> None:
    """A piece of a prompt that wants its last logits, with what decodes; the products of eight columns are exact here."""
    engine, adapters = exact
    tokens = random_tokens(engine, 40)
    alone, company = engine.new_sequence(), engine.new_sequence()
    others = [sequence_of(engine, adapter) for adapter in (*adapters, *adapters)]
    for at in range(0, 40, 4):
        part = tokens[at : at + 4]
        expected = np.array(engine.step([SequenceBatch(alone, part)])[0])
        found = engine.step(
            [
                *(SequenceBatch(other, tokens[at : at + 1]) for other in others[:2]),
                SequenceBatch(company, part),
                SequenceBatch(others[2], part[:2]),
            ]
        )
        same_bits(np.array(found[2]), expected)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_a_memory_budget_changes_no_bit_and_counts_the_corrections(random_model: Callable[..., Path], tmp_path: Path) -> None:
    path = random_model("llama", n_layer=6, n_embd=128, n_ff=512, tied=False, alignment=4096)
    side = side_for(path, tmp_path, rank=8)
    with ModelFile.open(path) as file:
        budget = int(file.header.file_size * 0.8)
    with opened(path, side, pack=False) as whole, opened(path, side, memory=budget, pack=False) as split, opened(path, pack=False) as plain:
        assert split.pager is not None
        assert split.pager.streams
        tokens = random_tokens(whole, 36)
        for ours, theirs in zip(talked(split, tokens), talked(whole, tokens), strict=True):
            same_bits(ours, theirs)
        more = whole.memory().weights_mapped - plain.memory().weights_mapped
        assert 0 < more < 1.5 * side.stat().st_size
        share = sum(one.size for one in split.units() if not one.sparse) - split.pager.streamed_bytes
        assert share + more <= budget
        split.cool()
        split.warm()
        for ours, theirs in zip(talked(split, tokens), talked(whole, tokens), strict=True):
            same_bits(ours, theirs)


def test_a_budget_that_the_corrections_do_not_fit_names_one_that_they_do(random_model: Callable[..., Path], tmp_path: Path) -> None:
    path = random_model("llama", n_layer=6, n_embd=128, n_ff=512, tied=False, alignment=4096)
    side = side_for(path, tmp_path, rank=64)
    with pytest.raises(OptionError, match=r"give at least [1-9]M"), opened(path, side, memory=1 << 20, pack=False):
        pass


def test_graphs_of_all_shapes_have_room(random_model: Callable[..., Path], tmp_path: Path) -> None:
    """libggml ends the process where a context is too small: many prompts and drafts in one step, at every site all there is."""
    path = random_model("llama", alignment=4096)
    side = side_for(path, tmp_path, rank=100, rows=3, type="F16")
    with opened(path, side, extra={"ggml.joined": []}) as engine:
        said = engine.compute_bytes(256, 16, 16)
        for want in ("all", "last"):
            sequences = [engine.new_sequence() for _ in range(24)]
            engine.step([SequenceBatch(sequence, random_tokens(engine, 1 + i % 12, i), want) for i, sequence in enumerate(sequences)])
            for sequence in sequences:
                engine.free_sequence(sequence)
        assert engine.held_bytes()[1] <= said


def test_what_changes_under_us_after_opening_is_of_no_account(random_model: Callable[..., Path], tmp_path: Path) -> None:
    path = random_model("llama")
    side = side_for(path, tmp_path)
    with opened(path, side) as engine:
        tokens = random_tokens(engine, 36)
        expected = talked(engine, tokens)
        side.write_bytes(b"")
        for ours, theirs in zip(talked(engine, tokens), expected, strict=True):
            same_bits(ours, theirs)


def test_a_site_of_a_weight_that_is_part_of_another_is_refused(random_model: Callable[..., Path], tmp_path: Path) -> None:
    path, whole = random_model("llama", fused_qkv=True), random_model("llama")
    side = side_for(whole, tmp_path, target=r"blk\.0\.attn_q\.weight")
    with ModelFile.open(path) as file:
        from edge_rt.core.weights.error_correction import compensation_fingerprint

        changes = {"edge_rt.compensation.model": ("str", compensation_fingerprint(file))}
        side.write_bytes(gguf_bytes.edit_metadata(side.read_bytes(), changes))
        with pytest.raises(ModelFileError, match=r"attn_q\.\w+ corrects nothing that this model has"):
            open_compensation(side, file)


# ---- on an accelerator -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measures", [{}, {"bias": True}, {"type": "F16"}], ids=["f32", "bias", "f16"])
@pytest.mark.parametrize("memory", [1 << 30, 1 << 20], ids=["all", "some"])
def test_corrections_go_where_their_units_go(
    memory: int, measures: dict[str, Any], random_model: Callable[..., Path], tmp_path: Path, simulator: str
) -> None:
    path = random_model("llama", n_layer=4, **measures)
    side = side_for(path, tmp_path, type="F16")
    options: dict[str, Any] = {"pack": False, "context": 256}
    with opened(path, side, Accelerator(simulator, 1 << 30), **options) as engine:
        assert engine._offloaded is not None
        sizes = engine._offloaded.sizes
    room = memory if memory == 1 << 30 else sizes.head + sizes.compute + 2 * (sizes.blocks[-1] + sizes.cache)
    with opened(path, side, **options) as cpu, opened(path, side, Accelerator(simulator, room), **options) as engine:
        assert len(engine.info.offloaded) == (6 if memory == 1 << 30 else 4)
        tokens = random_tokens(cpu, 36)
        expected = talked(cpu, tokens)
        for ours, theirs in zip(talked(engine, tokens), expected, strict=True):
            assert np.abs(ours - theirs).max() < 2e-2 * np.abs(theirs).max()
        parts = [(21, "last"), (3, "all"), (1, "last")]
        together = [engine.step([SequenceBatch(engine.new_sequence(), tokens[:n], want) for n, want in parts]),
                    cpu.step([SequenceBatch(cpu.new_sequence(), tokens[:n], want) for n, want in parts])]  # fmt: skip
        for ours, theirs in zip(*together, strict=True):
            assert np.abs(np.array(ours) - np.array(theirs)).max() < 2e-2 * np.abs(np.array(theirs)).max()
        engine.cool()
        engine.warm()
        for ours, theirs in zip(talked(engine, tokens), expected, strict=True):
            assert np.abs(ours - theirs).max() < 2e-2 * np.abs(theirs).max()


def test_an_accelerator_without_room_for_the_corrections_gets_fewer_blocks(
    random_model: Callable[..., Path], tmp_path: Path, simulator: str
) -> None:
    path = random_model("llama", n_layer=4)
    side = side_for(path, tmp_path, rank=64, rows=64)
    with opened(path, None, Accelerator(simulator, 1 << 30), pack=False) as engine:
        assert engine._offloaded is not None
        sizes = engine._offloaded.sizes
    room = Accelerator(simulator, sizes.head + sizes.compute + sum(sizes.blocks) + 4 * sizes.cache)
    with opened(path, None, room, pack=False) as engine:
        assert len(engine.info.offloaded) == 6
    with opened(path, side, room, pack=False) as engine:
        assert 2 <= len(engine.info.offloaded) < 6
        try:
            talked(engine, random_tokens(engine, 36))
        except OutOfMemory:
            pytest.fail("what was placed there leaves too little room")
