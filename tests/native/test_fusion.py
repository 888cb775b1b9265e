"""Fused models: norms without scales and products made one or left apart give the same bits, here and in libllama, or are not fused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bits import feed, same_bits
from reference import Reference

import edge_rt
from edge_rt.cli.main import main
from edge_rt.core.autotune import _product
from edge_rt.core.engine import AppliesAdapters, SequenceBatch
from edge_rt.core.ggml_engine import GgmlEngine
from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.core.gguf.reader import FOLDED, SCALED
from edge_rt.core.weights.gpu_offload import Accelerator
from edge_rt.core.weights.store import WeightStore
from edge_rt.deploy import folding, passes, writer
from edge_rt.deploy import plan as deployment
from edge_rt.deploy import target as targets
from edge_rt.deploy.passes import Goals, Situation, built_in, decide
from edge_rt.deploy.plan import Deployed, Plan
from edge_rt.deploy.target import Kernel, Target
from edge_rt.errors import ModelFileError, OptionError, UnsupportedModel
from edge_rt.hooks import EngineOptions
from edge_rt.native import ggml
from edge_rt.native.ggml import quantise_rows
from edge_rt.testing.random_models import TYPE_NUMBERS, WEIGHT_TYPES, write_random_adapter, write_random_model

SIZES = {"n_layer": 2, "n_embd": 256, "n_head": 4, "n_head_kv": 2, "n_ff": 256, "context": 512}
TOKENS = list(range(1, 70))
MODELS: dict[str, dict[str, Any]] = {
    "f32": {"type": "F32"},
    "f16": {"type": "F16", "tied": False},
    "bf16": {"type": "BF16"},
    "q4_0": {"type": "Q4_0"},
    "q4_1": {"type": "Q4_1", "tied": False},
    "q8_0": {"type": "Q8_0", "tied": False},
    "q4_k": {"type": "Q4_K"},
    "fused-qkv": {"type": "F32", "fused_qkv": True, "bias": True},
    "deci": {"architecture": "deci", "type": "Q4_K", "n_ff": (512, 256)},
    "qwen2": {"architecture": "qwen2", "type": "Q4_K"},
    "qwen3": {"architecture": "qwen3", "type": "BF16"},
    "qwen3-q8_0": {"architecture": "qwen3", "type": "Q8_0"},
    "experts": {"architecture": "qwen3moe", "type": "Q4_K", "tied": False},
    "mixtral": {"n_expert": 4, "n_expert_used": 2, "type": "F32"},
}
EXACT = ("f32", "bf16", "q4_k", "fused-qkv", "deci", "qwen2", "qwen3", "experts", "mixtral")
"""Those whose kernels take inputs in formats with a wide range."""
Scales = Callable[[str, int], Any]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_RT_CACHE", str(tmp_path / "cache"))


def made(tmp_path: Path, scales: Scales | None = None, **changes: Any) -> Path:
    """A random model whose norms have other scales: float32 [width] by name and width, None as they are."""
    path = write_random_model(tmp_path / "model.gguf", **{**SIZES, **changes})
    with ModelFile.open(path) as found, open(path, "r+b") as file:
        for name, info in found.header.tensors.items():
            if name.endswith("_norm.weight") and scales and (own := scales(name, info.shape[0])) is not None:
                file.seek(info.offset)
                file.write(np.broadcast_to(np.asarray(own, "<f4"), info.shape).tobytes())
    return path


def ones(_name: str, _width: int) -> float:
    return 1.0


def common(name: str, _width: int) -> float:
    """One power of two for all inputs of a norm."""
    return {"blk.0.ffn_norm.weight": 0.5, "blk.1.ffn_norm.weight": 8.0, "output_norm.weight": 2.0}.get(name, 4.0)


def each(name: str, width: int) -> Any:
    """Another power of two for each input."""
    return np.exp2(np.random.default_rng(len(name)).integers(-6, 7, width))


def situation(source: ModelFile, target: Target) -> Situation:
    return Situation(source.header, target, Goals(), (), folding.norms(source))


def compiled(path: Path, folder: Path, target: Target | None = None) -> Deployed:
    found = target or targets.load("x86-avx512")
    with ModelFile.open(path) as source:
        return writer.write(source, found, decide(situation(source, found), built_in()), folder, here=True)


def logits(path: Path, *, hidden: bool = False, **options: Any) -> Any:
    """Of a prompt and of single tokens, through the options that the path's own plan gives; or its hidden states."""
    deployed = deployment.find(path)
    given = EngineOptions(**{"threads": 1, "context": 256, "extra": {"ggml.transposed_values": False}, **options})
    with (
        ModelFile.open(deployed.model if deployed else path) as file,
        closing(GgmlEngine(file, deployment.follow(deployed, given))) as engine,
    ):
        sequence = engine.new_sequence()
        if hidden:
            return np.array(engine.hidden([SequenceBatch(sequence, TOKENS, "all")])[0])
        return np.concatenate([feed(engine, sequence, TOKENS), feed(engine, sequence, [7]), feed(engine, sequence, [9])])


def of_libllama(path: Path) -> Any:
    with closing(Reference(path, flash=True)) as libllama:
        return np.concatenate([libllama.feed(TOKENS), libllama.feed([7])])


def hidden_norms(path: Path) -> set[str]:
    """The norms that have weights alone behind them."""
    with ModelFile.open(path) as source:
        return {name for name in source.header.tensors if name.endswith(("attn_norm.weight", "ffn_norm.weight"))}


@pytest.fixture(params=MODELS, ids=list(MODELS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_norms_of_ones_are_left_out_of_every_model(tmp_path: Path, kind: str) -> None:
    path = made(tmp_path, ones, **MODELS[kind])
    deployed = compiled(path, tmp_path / "out")
    with ModelFile.open(path) as source, ModelFile.open(deployed.model) as written:
        assert set(deployed.plan.folded) == {name for name in source.header.tensors if name.endswith("_norm.weight")}
        assert written.header.get(FOLDED) == list(deployed.plan.folded)
        assert SCALED not in written.header
    same_bits(logits(deployed.folder), logits(path))
    same_bits(logits(deployed.folder, hidden=True), logits(path, hidden=True))
    same_bits(of_libllama(deployed.model), of_libllama(path))


def test_powers_of_two_go_into_the_weights_where_that_changes_no_bit(tmp_path: Path, kind: str) -> None:
    path = made(tmp_path, common, **MODELS[kind])
    deployed = compiled(path, tmp_path / "out")
    exact = kind in EXACT
    assert set(deployed.plan.folded) == (hidden_norms(path) if exact else set())
    with ModelFile.open(path) as source, ModelFile.open(deployed.model) as written:
        assert written.header.get(SCALED, []) == list(deployed.plan.folded)
        for name, info in source.header.tensors.items():
            own = written.header.tensors[name]
            same = source.map[info.offset : info.offset + info.nbytes] == written.map[own.offset : own.offset + own.nbytes]
            if not exact or name.startswith(("token_embd", "output")) or "attn_output" in name or "ffn_down" in name:
                assert same
            elif name in deployed.plan.folded:
                assert not np.any(folding.exponents(written, name))
            elif name.endswith(("attn_q.weight", "attn_qkv.weight", "ffn_up.weight", "ffn_gate_inp.weight", "ffn_up_exps.weight")):
                assert not same
    same_bits(logits(deployed.folder), logits(path))
    same_bits(logits(deployed.folder, hidden=True), logits(path, hidden=True))
    same_bits(of_libllama(deployed.model), of_libllama(path))


@pytest.mark.parametrize("kind", ["f32", "bf16", "mixtral", "q4_k", "f16"])
def test_another_power_of_two_for_each_input_goes_into_floats_alone(tmp_path: Path, kind: str) -> None:
    path = made(tmp_path, each, **MODELS[kind])
    deployed = compiled(path, tmp_path / "out")
    assert set(deployed.plan.folded) == (hidden_norms(path) if kind in ("f32", "bf16", "mixtral") else set())
    same_bits(logits(deployed.folder), logits(path))
    same_bits(of_libllama(deployed.model), of_libllama(path))


@pytest.mark.parametrize("type_name", WEIGHT_TYPES)
def test_what_counts_as_exact_is_what_kernels_are_with_inputs_of_any_size(type_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And only that: of the other types a small input gives other bits, so that their norms must stay."""
    exact = type_name in (*folding.FLOATS, *folding.HALVES)
    rng, width = np.random.default_rng(1), 256
    powers = (rng.integers(-6, 7, width) if type_name in folding.FLOATS else np.full(width, 3)).astype(np.int32)
    weights = np.frombuffer(quantise_rows(rng.standard_normal((8, width)).astype(np.float32), TYPE_NUMBERS[type_name]), np.uint8)
    if type_name == "F16":
        folded = np.ldexp(weights.view(np.float16).reshape(8, width), powers).tobytes()
    else:
        two = ("Q4_1", "Q5_1")
        monkeypatch.setitem(folding.HALVES, type_name, folding.HALVES.get(type_name, (0, 2) if type_name in two else (0,)))
        folded = folding.scaled(weights.tobytes(), type_name, powers)
    for size in (1.0, 1e-2, 1e-5, 1e-9):
        x = (rng.standard_normal((3, width)) * size).astype(np.float32)
        before = product(weights, type_name, width, np.ldexp(x, powers))
        after = product(np.frombuffer(folded, np.uint8), type_name, width, x)
        if exact:
            np.testing.assert_array_equal(before.view(np.uint32), after.view(np.uint32))
        elif size == 1e-5:
            assert not np.array_equal(before, after)


def product(weights: Any, type_name: str, width: int, x: Any) -> Any:
    """x [n, width] times eight rows of weights."""
    room = np.empty(weights.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    room[start : start + weights.nbytes] = weights
    with (
        ggml.context(1) as ctx,
        ggml.cpu_backend(1) as backend,
        ggml.buffer_from_address(room.ctypes.data + start, weights.nbytes) as buffer,
    ):
        matrix = ggml.new_tensor(ctx.address, TYPE_NUMBERS[type_name], (width, 8))
        ggml.place(matrix, buffer.address, room.ctypes.data + start)
        return _product(matrix, x.astype(np.float32), backend)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_not_exact_stays_as_it_is(tmp_path: Path, seed: int) -> None:
    """Norms of each sort by chance, one scale of some ruined by chance: folded are those that are whole, and no other weight changes."""
    rng = np.random.default_rng(seed)
    wanted: dict[str, bool] = {}

    def mixed(name: str, width: int) -> Any:
        scales = {0: np.ones(width), 1: each(name, width), 2: rng.uniform(0.2, 3.0, width)}[int(rng.integers(3))]
        if rng.integers(3) == 0:
            scales[rng.integers(width)] = rng.choice([0.0, -1.0, 3.0, 1.0000001, np.inf, np.nan])
        whole = bool(np.isfinite(scales).all() and (scales > 0).all() and (np.log2(scales) % 1 == 0).all())
        wanted[name] = whole and (bool((scales == 1).all()) or "output" not in name)
        return np.nan_to_num(scales, nan=1.5, posinf=1.5)

    path = made(tmp_path, mixed, type="F32", n_layer=5)
    deployed = compiled(path, tmp_path / "out")
    assert set(deployed.plan.folded) == {name for name, whole in wanted.items() if whole}
    with ModelFile.open(path) as source, ModelFile.open(deployed.model) as written:
        changed = {name for name, info in source.header.tensors.items() if bytes_of(source, name) != bytes_of(written, name) and info}
        behind = {name for norm in folding.norms(source) if norm.name in deployed.plan.folded for name in (*norm.weights, norm.name)}
        assert changed <= behind
    same_bits(logits(deployed.folder), logits(path))


def bytes_of(file: ModelFile, name: str) -> bytes:
    info = file.header.tensors[name]
    return bytes(file.map[info.offset : info.offset + info.nbytes])


@pytest.mark.parametrize(("type_name", "value", "scale"), [("F32", 1e38, 16.0), ("F32", 1e-37, 2.0**-6), ("BF16", 3e38, 2.0)])
def test_a_value_that_would_overflow_or_become_subnormal_keeps_the_norm(tmp_path: Path, type_name: str, value: float, scale: float) -> None:
    path = made(tmp_path, lambda *_: scale, type=type_name)
    assert set(compiled(path, tmp_path / "out").plan.folded) == hidden_norms(path)
    with ModelFile.open(path) as found, open(path, "r+b") as file:
        file.seek(found.header.tensors["blk.1.attn_k.weight"].offset + 400)
        raw = np.array([value], "<f4").tobytes()
        file.write(raw if type_name == "F32" else raw[2:])
    with ModelFile.open(path) as source:
        norm = next(one for one in folding.norms(source) if one.name == "blk.1.attn_norm.weight")
        assert norm.lacks == f"{type_name} weights behind them, of which some would overflow or become subnormal"
    deployed = compiled(path, tmp_path / "out")
    assert set(deployed.plan.folded) == hidden_norms(path) - {"blk.1.attn_norm.weight"}


@pytest.mark.parametrize("scale", [2.0**25, 2.0**-25])
def test_scales_so_far_from_one_that_inputs_could_become_subnormal_stay(tmp_path: Path, scale: float) -> None:
    with ModelFile.open(made(tmp_path, lambda *_: scale, type="F32")) as source:
        assert {norm.lacks for norm in folding.norms(source)} == {"scales too far from one", "no weights alone behind them"}


@pytest.mark.parametrize(("half", "power"), [(60000.0, 1), (2.0**-14, -1), (np.inf, 1), (np.nan, 0)])
def test_scales_of_blocks_are_looked_at_too(half: float, power: int) -> None:
    for type_name, places in folding.HALVES.items():
        size = int(ggml.c.row_size(TYPE_NUMBERS[type_name], 256))
        block = np.zeros(2 * size, np.uint8)
        folding.scaled(block.tobytes(), type_name, np.full(256, power, np.int32))  # zeros stay zeros
        block[size + places[-1] : size + places[-1] + 2] = np.array([half], "<f2").view(np.uint8)
        with pytest.raises(folding.Inexact, match=type_name):
            folding.scaled(block.tobytes(), type_name, np.full(256, power, np.int32))


def test_other_architectures_keep_their_norms_and_their_logits(tmp_path: Path) -> None:
    path = made(tmp_path, ones, architecture="gemma", type="F32")
    deployed = compiled(path, tmp_path / "out")
    assert deployed.plan.folded == ()
    same_bits(of_libllama(deployed.model), of_libllama(path))


# ---- what a plan says is not believed alone --------------------------------------------------------------------------


def test_a_plan_that_folds_what_the_file_does_not_say_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path)
    deployed = compiled(path, tmp_path / "out")
    assert deployed.plan.folded == ()
    plan = deployed.plan._replace(folded=("blk.1.ffn_norm.weight",))
    (deployed.folder / "plan.json").write_text(deployment.to_json(plan, deployed.files, deployed.provenance), encoding="utf-8")
    with pytest.raises(ModelFileError, match=r"takes the scales of blk\.1\.ffn_norm\.weight for ones, which the model does not say"):
        edge_rt.open(deployed.folder, engine="ggml", threads=1)
    with ModelFile.open(path) as source, open(tmp_path / "no.gguf", "wb") as out:
        from edge_rt.deploy.writer import write_gguf

        with pytest.raises(ModelFileError, match="cannot be folded: they have scales that are no powers of two"):
            write_gguf(source, out, plan)
        with pytest.raises(ModelFileError, match="no place in this model's graph"):
            write_gguf(source, out, plan._replace(folded=("blk.9.ffn_norm.weight",)))
        with pytest.raises(ModelFileError, match=r"the scales of blk\.1\.ffn_norm\.weight are not ones in model\.gguf"):
            folding.check(source, plan)


def test_a_pass_behind_fusion_may_not_change_the_types_of_what_was_folded_into(tmp_path: Path) -> None:
    path = made(tmp_path, common, type="F32")
    with ModelFile.open(path) as source:
        target = targets.load("x86-avx512")
        plan = decide(situation(source, target), built_in())._replace(types={"blk.0.ffn_up.weight": "Q8_0"})
        assert "blk.0.ffn_norm.weight" in plan.folded
        with pytest.raises(ModelFileError, match="that get another type"):
            writer.write(source, target, plan, tmp_path / "out", here=False)
        other = passes._apply_fusion(Plan("x", types={"blk.0.ffn_up.weight": "Q8_0"}), situation(source, target))
        assert hidden_norms(path) - set(other.folded) == {"blk.0.ffn_norm.weight"}
        card = passes._apply_fusion(Plan("x"), situation(source, targets.load("a10g")))
        assert card.folded == ()
        assert "whose kernels, on a card, round inputs as they like" in card.gains[0].what


def test_a_compiled_model_is_compiled_again(tmp_path: Path) -> None:
    path = made(tmp_path, common, type="F32")
    first = compiled(path, tmp_path / "first")
    second = compiled(first.model, tmp_path / "second")
    assert second.plan.folded == first.plan.folded
    with ModelFile.open(first.model) as one, ModelFile.open(second.model) as other:
        assert other.header.get(SCALED) == one.header.get(SCALED) == list(first.plan.folded)
    same_bits(logits(second.folder), logits(path))


def test_adapters_are_for_weights_that_no_norm_was_folded_into(tmp_path: Path) -> None:
    path = made(tmp_path, ones, type="F32")
    with ModelFile.open(path) as source:
        adapter = write_random_adapter(tmp_path / "adapter.gguf", source.header)
    answers = []
    for where in (path, compiled(path, tmp_path / "out").folder):
        with edge_rt.open(where, engine="ggml", threads=1, context=64, adapters={"one": adapter}) as model:
            engine = model.engine
            assert isinstance(engine, AppliesAdapters)
            sequence = engine.new_sequence()
            engine.adapt(sequence, 1)
            answers.append(feed(engine, sequence, TOKENS[:9]))
    same_bits(*answers)
    scaled = compiled(made(tmp_path, common, type="F32"), tmp_path / "out")
    with pytest.raises(UnsupportedModel, match="norms were folded into its weights, which no adapter was trained for; use the model's"):
        edge_rt.open(scaled.folder, engine="ggml", threads=1, context=64, adapters={"one": adapter})


# ---- products --------------------------------------------------------------------------------------------------------


def slow(target: Target, **rates: float) -> Target:
    """The target with kernels as fast as each other but for some shapes."""
    names = {"Q8_0": 1.0, "Q4_0": 1.0, "attention": 1.0, **{name.replace("_of_", " "): rate for name, rate in rates.items()}}
    kernels: Mapping[tuple[str, int], Kernel] = {
        (name, n): Kernel(1e10 * rate, 1e11 * rate, 1e10 * rate, 1e-6) for name, rate in names.items() for n in range(1, target.threads + 1)
    }
    return target._replace(kernels=kernels)


@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_0"])
def test_products_that_would_be_slower_as_one_are_left_apart(tmp_path: Path, type_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made(tmp_path, type=type_name, n_layer=3)
    target = slow(targets.load("x86-avx512"), **{f"{type_name}_of_256x512": 0.2})
    asked: list[tuple[str, ...]] = []
    real = WeightStore.joined

    def joined(self: WeightStore, names: tuple[str, ...]) -> int | None:
        asked.append(names)
        return real(self, names)

    monkeypatch.setattr(WeightStore, "joined", joined)
    deployed = compiled(path, tmp_path / "out", target)
    # Both joined shapes are 256x512.
    assert deployed.plan.joined == ()
    assert "apart, as one product" in deployed.plan.gains[0].what
    apart = logits(deployed.folder)
    assert [names for names in asked if any("attn_q." in name or "gate." in name for name in names)] == []
    same_bits(apart, logits(path))
    assert any("attn_q." in name for names in asked for name in names)
    together = compiled(path, tmp_path / "out", slow(targets.load("x86-avx512")))
    assert together.plan.joined == ("attn_q|attn_k|attn_v", "ffn_gate|ffn_up")
    same_bits(logits(together.folder), apart)
    same_bits(of_libllama(deployed.model), of_libllama(path))


def test_one_kind_of_product_may_be_one_and_the_other_not(tmp_path: Path) -> None:
    path = made(tmp_path, type="Q8_0", n_ff=512)
    deployed = compiled(path, tmp_path / "out", slow(targets.load("x86-avx512"), Q8_0_of_256x1024=0.2))
    assert deployed.plan.joined == ("attn_q|attn_k|attn_v",)
    same_bits(logits(deployed.folder), logits(path))


def test_settings_that_cannot_be_are_told(tmp_path: Path) -> None:
    path = made(tmp_path)
    with ModelFile.open(path) as file, pytest.raises(OptionError, match=r"ggml\.joined names attn_q\|attn_v, and only"):
        GgmlEngine(file, EngineOptions(extra={"ggml.joined": ["attn_q|attn_v"]}))


def test_devices_take_fused_models_too(tmp_path: Path, simulator: str) -> None:
    path = made(tmp_path, ones, architecture="qwen3", type="Q8_0")
    deployed = compiled(path, tmp_path / "out")
    found = []
    for where, plan in ((deployed.model, deployed), (path, None)):
        given = deployment.follow(plan, EngineOptions(threads=1, context=64))
        with ModelFile.open(where) as file, closing(GgmlEngine(file, given, accelerator=Accelerator(simulator, 1 << 30))) as engine:
            found.append(feed(engine, engine.new_sequence(), TOKENS[:20]))
    same_bits(*found)


def test_a_fused_model_is_streamed(tmp_path: Path) -> None:
    path = made(tmp_path, ones, type="Q8_0", n_layer=6)
    deployed = compiled(path, tmp_path / "out")
    with ModelFile.open(path) as file:
        budget = file.header.file_size * 3 // 4
    same_bits(logits(deployed.folder, memory=budget), logits(path))


def test_the_command_prints_the_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = made(tmp_path, type="Q8_0")
    assert main(["compile", str(path), "--target", "rpi-cm4", "--dry-run"]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith("fusion")
    assert "attn_q, attn_k, attn_v one product" in line
    assert "none of 5 norms folded, 5 have scales that are no powers of two" in line
    made(tmp_path, ones, type="Q8_0")
    assert main(["compile", str(path), "--target", "rpi-cm4", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["plan"]
    assert len(found["folded"]) == 5
    assert found["gains"][0]["token"] > 1.0


def test_nothing_is_said_of_norms_that_nobody_looked_at(tmp_path: Path) -> None:
    with ModelFile.open(made(tmp_path, ones)) as source:
        plan = decide(Situation(source.header, targets.load("rpi-5"), Goals()), built_in())
    assert plan.folded == Plan("x").folded == ()
    assert "norms" not in plan.gains[0].what
