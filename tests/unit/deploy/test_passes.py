"""Passes: pure functions on plans, what they decide for which target and goal, and plans as files."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.deploy import passes
from edge_rt.deploy import plan as deployment
from edge_rt.deploy import target as targets
from edge_rt.deploy.folding import Norm
from edge_rt.deploy.passes import Goals, Situation, built_in, decide
from edge_rt.deploy.plan import Gain, Plan, PowerSetting
from edge_rt.deploy.target import Kernel
from edge_rt.errors import ModelFileError, OptionError
from edge_rt.hooks import EngineOptions
from edge_rt.testing.random_models import write_random_model

SIZES = {"n_layer": 4, "n_embd": 512, "n_head": 8, "n_head_kv": 2, "n_ff": 1024, "n_vocab": 2048, "context": 4096}


def situation(tmp_path: Path, name: str, goals: Goals = Goals(), **changes: object) -> Situation:  # noqa: B008
    path = tmp_path / "model.gguf"
    write_random_model(path, **{**SIZES, "type": "Q4_0", **changes})  # type: ignore[arg-type]
    with ModelFile.open(path) as file:
        return Situation(file.header, targets.load(name), goals)


def test_a_pass_changes_no_plan_but_returns_another(tmp_path: Path) -> None:
    found = situation(tmp_path, "rpi-5", Goals(power=6.0))
    for one in built_in():
        plan = Plan("rpi-5")
        before = plan._asdict()
        after = one.apply(plan, found)
        assert plan._asdict() == before
        assert after == one.apply(plan, found)
        assert (after != plan) == (one.name != "precision"), "without sensitivities there is no better type"


def test_norms_are_folded_for_what_their_nodes_cost(tmp_path: Path) -> None:
    found = situation(tmp_path, "rpi-cm4")
    norms = [Norm(f"blk.{i}.attn_norm.weight", ones=True) for i in range(4)]
    norms += [Norm("blk.0.ffn_norm.weight", ones=False, lacks="reasons"), Norm("blk.0.attn_q_norm.weight", ones=True)]
    plan = passes._apply_fusion(Plan("rpi-cm4"), found._replace(norms=norms))
    assert plan.folded == (*(norm.name for norm in norms[:4]), "blk.0.attn_q_norm.weight")
    assert plan.gains[0].what.endswith("5 of 6 norms folded, 1 have reasons")
    bare = passes._apply_fusion(Plan("rpi-cm4"), found)
    assert found.shape(bare).nodes - found.shape(plan).nodes == 4  # the model has no nodes for norms of queries
    assert found.shape(bare).elements(1) - found.shape(plan).elements(1) == 4 * 512
    assert found.token(bare) / found.token(plan) == pytest.approx(plan.gains[0].token / bare.gains[0].token)
    assert plan.gains[0].token > bare.gains[0].token


def test_products_are_one_where_that_gains_and_then_lie_side_by_side(tmp_path: Path) -> None:
    found = situation(tmp_path, "rpi-cm4")
    plan = passes._apply_layout(passes._apply_fusion(Plan("rpi-cm4"), found), found)
    assert plan.joined == ("attn_q|attn_k|attn_v", "ffn_gate|ffn_up")
    assert plan.alignment == 32
    rates = {"Q4_0": 1.0, "Q4_0 512x768": 0.1, "Q4_0 512x2048": 0.1}
    kernels = {(name, n): Kernel(1e10 * rate, 1e11 * rate, 1e10 * rate, 1e-6) for name, rate in rates.items() for n in range(1, 5)}
    other = found._replace(target=found.target._replace(kernels=kernels))
    plan = passes._apply_layout(passes._apply_fusion(Plan("rpi-cm4"), other), other)
    assert plan.joined == ()
    assert plan.alignment == 4096
    assert not any("|" in product.name for product in other.shape(plan).products)
    assert plan.gains[0].token > 1.5  # to the file as it is, where they lie side by side
    assert "attn_q, attn_k, attn_v apart, as one product (" in plan.gains[0].what


def test_what_has_no_one_type_or_is_one_already_is_no_matter_of_fusion(tmp_path: Path) -> None:
    mixed = Plan("rpi-cm4", types={f"blk.{i}.attn_k.weight": "Q8_0" for i in range(4)})
    assert passes._apply_fusion(mixed, situation(tmp_path, "rpi-cm4")).joined == ("ffn_gate|ffn_up",)
    experts = situation(tmp_path, "rpi-cm4", architecture="qwen3moe")
    assert passes._apply_fusion(Plan("rpi-cm4"), experts).joined == ("attn_q|attn_k|attn_v",)
    whole = passes._apply_fusion(
        Plan("rpi-cm4"), situation(tmp_path, "rpi-cm4", architecture="llama", n_expert=4, n_expert_used=2, fused_qkv=True)
    )
    assert whole.joined == ()
    assert whole.gains[0].what == "nothing in this model shares an input"


def test_tensors_lie_as_they_are_touched(tmp_path: Path) -> None:
    plan = passes._apply_layout(Plan("rpi-5"), situation(tmp_path, "rpi-5", tied=False, bias=True))
    names = [name.removeprefix("blk.0.") for name in plan.order]
    assert names[:6] == ["token_embd.weight", "attn_norm.weight", "attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight"]
    assert names.index("ffn_up.weight") == names.index("ffn_gate.weight") + 1
    assert [names.index(f"attn_{part}.bias") - names.index("attn_q.bias") for part in "qkv"] in ([0, 1, 2], [0, -2, 3], [0, 1, 3])
    assert plan.order[-2:] == ("output_norm.weight", "output.weight")
    assert len(set(plan.order)) == len(plan.order)


@pytest.mark.parametrize(("name", "kind", "pack", "alignment"), [("rpi-5", "Q4_0", True, 4096), ("rpi-cm4", "Q4_0", False, 32)])
def test_packed_weights_are_planned_where_there_are_kernels(tmp_path: Path, name: str, kind: str, pack: bool, alignment: int) -> None:
    plan = passes._apply_layout(Plan(name), situation(tmp_path, name, type=kind))
    assert (plan.pack, plan.alignment) == (pack, alignment)
    assert len(plan.gains) == 1
    assert plan.gains[0].by == "layout"


def test_all_cores_are_left_to_the_governor_and_small_ones_left_out_where_they_do_not_help(tmp_path: Path) -> None:
    assert passes._apply_pipeline(Plan("rpi-5"), situation(tmp_path, "rpi-5")).threads == 0
    found = situation(tmp_path, "android-arm64")
    profile = found.target.profile
    *big, small = profile.cores
    target = found.target._replace(profile=profile._replace(cores=(*big, small._replace(clock=2e8))))
    assert passes._apply_pipeline(Plan("rpi-5"), found._replace(target=target)).threads == 4


def test_threads_that_help_with_prompts_alone_are_taken(tmp_path: Path) -> None:
    """One thread reads weights as fast as four; a prompt takes it four times as long."""
    found = situation(tmp_path, "rpi-5")
    narrow = found.target._replace(profile=found.target.profile._replace(bandwidth={1: 4e9, 2: 4e9, 4: 4e9}))
    assert passes._apply_pipeline(Plan("rpi-5"), found._replace(target=narrow)).threads == 0


def test_latency_bounds_the_chunk(tmp_path: Path) -> None:
    free = passes._apply_pipeline(Plan("rpi-cm4"), situation(tmp_path, "rpi-cm4"))
    assert free.chunk >= 256
    found = situation(tmp_path, "rpi-cm4", Goals(latency=0.1))
    from edge_rt.deploy import cost

    bound = passes._apply_pipeline(Plan("rpi-cm4"), found)
    assert bound.chunk < free.chunk
    assert cost.prefill(found.shape(bound), found.target, bound.chunk, 4, bound.chunk).seconds <= 0.1
    with pytest.raises(OptionError, match=r"--latency 0\.0001 is less than"):
        passes._apply_pipeline(Plan("rpi-cm4"), situation(tmp_path, "rpi-cm4", Goals(latency=0.0001)))


def test_a_memory_limit_streams_what_does_not_fit_or_says_how_much_it_takes(tmp_path: Path) -> None:
    found = situation(tmp_path, "rpi-cm4", n_layer=16)
    whole = passes._apply_pipeline(Plan("rpi-cm4"), found)
    assert whole.memory is None
    held = found.memory(whole)
    limit = held.total - held.compute - held.weights // 4
    tight = found._replace(goals=Goals(memory=limit))
    plan = passes._apply_pipeline(Plan("rpi-cm4"), tight)
    assert plan.memory is not None
    assert plan.memory < held.weights
    assert tight.memory(plan).total <= limit
    assert tight.token(plan) > found.token(whole)  # and what is streamed is paid for
    with pytest.raises(OptionError, match=r"give --memory \d+M") as caught:
        passes._apply_pipeline(Plan("rpi-cm4"), found._replace(goals=Goals(memory=80_000_000)))
    enough = int(str(caught.value).split("--memory ")[1].split("M")[0]) << 20
    assert passes._apply_pipeline(Plan("rpi-cm4"), found._replace(goals=Goals(memory=enough))).chunk


def test_corrections_take_memory_unless_the_plan_makes_them_useless(tmp_path: Path) -> None:
    plain = situation(tmp_path, "rpi-cm4")
    corrected, kept, changed = plain._replace(corrections=1000), Plan("rpi-cm4"), Plan("rpi-cm4", types={"blk.0.attn_q.weight": "Q8_0"})
    assert corrected.memory(kept).total == plain.memory(kept).total + 1000
    assert corrected.memory(changed) == plain.memory(changed)


def test_a_card_takes_the_layers_that_fit(tmp_path: Path) -> None:
    found = situation(tmp_path, "a10g")
    assert passes._apply_pipeline(Plan("a10g"), found).layers == 5  # four blocks and the head
    shape = found.shape(Plan("a10g"))
    held = found.memory(Plan("a10g", chunk=64))  # what does not fit is fed in the smallest pieces
    room = held.process + held.compute + shape.units["head"] + 2 * (shape.units["blk.0"] + held.cells // 4) + 1000
    small = found.target._replace(profile=found.target.profile._replace(memory=room))
    assert passes._apply_pipeline(Plan("a10g"), found._replace(target=small)).layers == 3


def test_what_may_be_taken_away_is_locked(tmp_path: Path) -> None:
    found = situation(tmp_path, "rpi-cm4")
    assert passes._apply_pipeline(Plan("rpi-cm4"), found).locked == ()
    total = found.memory(Plan("rpi-cm4")).total
    small = found.target._replace(profile=found.target.profile._replace(memory=int(1.2 * total)))
    locked = passes._apply_pipeline(Plan("rpi-cm4"), found._replace(target=small)).locked
    assert locked[:2] == ("blk.0", "blk.1")


def test_a_power_cap_is_held_by_threads_and_rests(tmp_path: Path) -> None:
    found = situation(tmp_path, "rpi-5", Goals(power=5.0))
    plan = passes._apply_power(passes._apply_pipeline(Plan("rpi-5"), found), found)
    setting = plan.power
    assert setting.watts == 5.0
    assert setting.celsius == 75.0
    profile = found.target.profile
    drawn = profile.idle_power + setting.duty * (profile.power - profile.idle_power) * setting.threads / 4
    assert drawn <= 5.0 * 1.001
    rates = {n: passes.sustained(plan._replace(threads=n), found, 5.0)[0] for n in range(1, 5)}
    assert max(rates, key=lambda n: rates[n]) == setting.threads
    for cap, words in ((2.0, "draws at rest"), (3.0, "draws at rest")):
        with pytest.raises(OptionError, match=words):
            passes._apply_power(plan, found._replace(goals=Goals(power=cap)))
    unknown = found.target._replace(profile=found.target.profile._replace(power=None))
    with pytest.raises(OptionError, match="is not known"):
        passes._apply_power(plan, found._replace(target=unknown))


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_plan_is_the_same_when_it_is_read_again(tmp_path: Path) -> None:
    plan = decide(situation(tmp_path, "rpi-5", Goals(power=6.0, context=2048)), built_in())
    told = Gain('a "quoted"\\\n', "é", 1.5, 0.5, 2.0, 0.25)
    plan = plan._replace(types={"blk.0.attn_q.weight": "Q8_0"}, memory=123, layers=3, locked=("head",), gains=(*plan.gains, told))
    (tmp_path / "plan.json").write_text(deployment.to_json(plan, {"model.gguf": "00"}, {"source": "x"}), encoding="utf-8")
    found = deployment.find(tmp_path)
    assert found is not None
    assert found.plan._replace(types=dict(found.plan.types)) == plan
    assert found.provenance == {"source": "x"}


def test_a_directory_without_a_plan_is_none(tmp_path: Path) -> None:
    assert deployment.find(tmp_path) is None
    assert deployment.find(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"format": 1', '"format": 2', "format 2 and this version reads 1"),
        ('"format"', '"form"', "is no plan"),
        ('"plan": {', '"plan": ', "cannot be read"),
        ('"plan"', '"plans"', "has no decisions"),
        ('"chunk": 512', '"chunk": "many"', "chunk has a value of a wrong kind"),
        ('"pack": true', '"pack": 1', "pack has a value of a wrong kind"),
        ('"chunk": 512', '"chunks": 512', "there is no decision chunks"),
        ('"model.gguf"', '"other.gguf"', "names no model.gguf"),
        ('"watts"', '"volts"', "volts"),
        ('"chunk": 512', '"chunk": 0', "chunk is 0, and may be 1 to 65536"),
        ('"folded": []', '"folded": [3]', "folded lists something else than names"),
        ('"key_type": "f16"', '"key_type": "q2"', "may be f16 or q8_0"),
        ('"key_type": "f16"', '"key_type": 5', "key_type has a value of a wrong kind"),
    ],
)
def test_a_damaged_plan_is_told(tmp_path: Path, old: str, new: str, words: str) -> None:
    text = deployment.to_json(Plan("x", power=PowerSetting(3.0)), {"model.gguf": "00"}, {})
    assert old in text
    (tmp_path / "plan.json").write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ModelFileError, match="compile the model again") as caught:
        deployment.find(tmp_path)
    assert words in str(caught.value)


def test_options_of_the_caller_come_before_the_plan(tmp_path: Path) -> None:
    plan = Plan("x", threads=3, memory=5000, context=700, chunk=128, locked=("head",))
    deployed = deployment.Deployed(tmp_path, plan, {"model.gguf": ""}, {})
    followed = deployment.follow(deployed, EngineOptions())
    assert (followed.context, followed.threads, followed.memory, followed.pack) == (700, None, 5000, True)
    expected = {"ggml.chunk": 128, "ggml.locked": ("head",), "ggml.most_threads": 3}
    assert expected.items() <= followed.extra.items()
    own = deployment.follow(deployed, EngineOptions(context=9, threads=1, memory=7, pack=False, extra={"ggml.chunk": 64}))
    assert (own.context, own.threads, own.memory, own.pack, own.extra["ggml.chunk"]) == (9, 1, 7, False, 64)
    assert deployment.follow(None, EngineOptions()) == EngineOptions()
