"""What a run is told, as one TOML file says it: a table a stage, every value checked, every mistake with its line.

The same data classes make the reference in docs/distill.md and the file that ``edge-rt distill init`` writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, cast

from edge_rt.hooks import Rules, read_toml

T = TypeVar("T")
LEVELS = ("token", "hidden", "attention", "behaviour")
"""The levels of distillation, in order."""


def setting(default: Any, help: str, least: float = 0, most: float = 1 << 40, choices: tuple[str, ...] = (), numbers: bool = False) -> Any:
    """A field of a table: its default, what it means, and which values it may have. ``numbers``: a list of them and not of texts."""
    return field(default=default, metadata={"help": help, "least": least, "most": most, "choices": choices, "numbers": numbers})


@dataclass(frozen=True)
class RunConfig:
    """``[run]``"""

    folder: str = setting("", "Where the run works and leaves its results, relative to this file; its name without .toml if left out.")
    seed: int = setting(0, "Of all that is drawn.", most=1 << 31)
    threads: int = setting(0, "Threads of torch, 0: all. Results are equal to the bit only with the same number.", most=1024)


@dataclass(frozen=True)
class TeacherConfig:
    """``[teacher]``"""

    model: str = setting("smollm2", "A GGUF, a folder in Hugging Face's layout, or a name from `edge-rt models`.")
    vocabulary: str = setting("", "A GGUF of the same tokeniser, for folders that bring none.")


@dataclass(frozen=True)
class DataConfig:
    """``[data]``"""

    samples: tuple[str, ...] = setting(
        ("demo",),
        "Files and folders of JSONL or text; `demo` ships with the tool, `technical` and `docstrings` are text that ships with Python, "
        "`packages` the docstrings of numpy and torch (`./demo` is your own)."
    )  # fmt: skip
    policy: str = setting("skip", "What a broken line does: it is skipped and told, or stops the run.", choices=("skip", "stop"))
    length: int = setting(256, "Tokens of a sequence at most.", 16, 1 << 16)
    held_out: float = setting(0.1, "Share of the samples that nothing is learnt from.", 0.01, 0.9)
    rollouts: int = setting(0, "Texts that the teacher writes itself, to learn from beside the samples (Kim and Rush 2016).", most=1 << 20)
    chats: int = setting(0, "Conversations that the teacher makes up, questions and answers (Magpie, Xu et al. 2024).", most=1 << 20)
    rollout_tokens: int = setting(192, "Tokens of each of these texts and answers at most.", 8, 1 << 14)
    weights: tuple[int, ...] = setting(
        (), "How much is learnt from each of `samples` and, last, from what the teacher writes, as shares of the tokens; students are "
        "measured on samples in these shares. All as often as they come if left out.", most=1000, numbers=True,
    )  # fmt: skip


@dataclass(frozen=True)
class LibraryConfig:
    """``[library]``"""

    folder: str = setting("", "Where the teacher library is, relative to this file; in the run's folder if left out. Runs may share one.")
    snapshot: bool = setting(True, "Keep all of the teacher's parameters there.")
    samples: int = setting(0, "Chat samples that are recorded at most, 0: all.", most=1 << 30)
    answer_tokens: int = setting(96, "Tokens of an answer at most.", 1, 1 << 16)
    errors: int = setting(1, "Errors of a domain that are explained: a pass for each layer, and for some heads.", most=1 << 20)


@dataclass(frozen=True)
class DiagnoseConfig:
    """``[diagnose]``"""

    sequences: int = setting(32, "Sequences that are looked at.", 1, 1 << 20)
    removal_tokens: int = setting(2048, "Tokens on which every layer is left out in turn.", 64, 1 << 24)
    order: int = setting(6, "Layers of which it is found out in which order they can go best, one after the other.", most=512)
    candidates: int = setting(6, "Layers that are tried at each place of that order.", 1, 512)
    paths: int = setting(8, "Sequences whose key tokens are traced.", 1, 1 << 20)


@dataclass(frozen=True)
class StudentConfig:
    """``[student]``"""

    parameters: float = setting(0.8, "Share of the teacher's parameters at most.", 0.05, 1)
    speed: float = setting(0.0, "Times as fast as the teacher at least, predicted; 0: as it comes.", 0, 100)
    vocabulary: float = setting(
        1.0, "Share of the teacher's tokens that are kept: those that the samples use, and the commonest. Some texts get longer by it.",
        0.01, 1,
    )  # fmt: skip
    methods: tuple[str, ...] = setting(("depth", "width"), "What may be cut.", choices=("depth", "width", "heads", "hidden", "sharing"))
    drop: tuple[int, ...] = setting((), "Layers to drop, by number, instead of those that the diagnosis says.", most=511, numbers=True)
    merge: tuple[int, ...] = setting((), "Layers that are merged with the one behind them, by number.", most=510, numbers=True)
    share: int = setting(0, "Pairs of layers that share parameters, with the method `sharing`. The file has them twice.", most=256)
    grouped: bool = setting(False, "Channels go in whole blocks of 32: those of an already quantised teacher then lose nothing again.")
    widths: str = setting(
        "auto", "As many channels in all layers (equal), or fewer where they are missed least (free): a deci, which edge-rt and llama.cpp "
        "run and transformers does not read. auto: free, but for a qwen3, which has no such form, and where `ffn` says how many.",
        choices=("auto", "equal", "free"),
    )  # fmt: skip
    ffn: int = setting(0, "Channels of the feed-forward network, instead of what the search finds.", most=1 << 20)
    repair_tokens: int = setting(8192, "Tokens for least squares after the cut, 0: none.", most=1 << 24)
    side_rank: int = setting(0, "Rank of side paths that are trained beside every matrix and folded in at export, 0: none.", most=1024)


@dataclass(frozen=True)
class LevelConfig:
    """``[distil.token]`` and the other levels"""

    tokens: int = setting(60_000, "Tokens to learn from at most; 0: the level is left out.", most=1 << 40)
    learning_rate: float = setting(1.5e-4, "The largest.", 1e-8, 1)
    threshold: float = setting(0.0, "Held-out error below which the gate opens, 0: the usual one.", 0, 1e9)


@dataclass(frozen=True)
class DistilConfig:
    """``[distil]``"""

    batch_tokens: int = setting(1024, "Tokens of a step.", 64, 1 << 22)
    evaluate_every: int = setting(
        16_384, "Tokens between evaluations, the epochs that gates count; fewer where a level would end before its third.", 256, 1 << 40
    )
    held_out: int = setting(64, "Sequences of the held-out samples that are measured on.", 1, 1 << 20)
    divergence: str = setting("forward", "Of the token level.", choices=("forward", "reverse", "skewed", "taid"))
    decoupled: bool = setting(True, "Discriminative candidates that are unlikely count for more; a third slower than plain divergence.")
    top_k: int = setting(
        0, "Of the teacher's distribution only so many likeliest tokens and the mass of all others count, 0: every token. Instead of "
        "`decoupled`.", most=1 << 16,
    )  # fmt: skip
    cross_entropy: float = setting(0.0, "Weight of the samples' own tokens beside the teacher's distribution, in all levels.", 0, 10)
    patience: int = setting(0, "Evaluations without a better score after which a level stops, 0: never for that.", most=1 << 20)
    asked: int = setting(8, "Held-out questions that are answered for the score.", most=1 << 20)
    precision: str = setting("auto", "Of products in training.", choices=("auto", "float32", "bfloat16"))
    freeze_embedding: bool = setting(True, "Leave the embedding as the teacher has it.")
    evaluator: str = setting("quick", "Whose score ends a level early: `quick`, `sandbox` (items of `edge-rt eval`), or MODULE:ATTRIBUTE.")
    token: LevelConfig = LevelConfig()
    hidden: LevelConfig = LevelConfig(tokens=30_000, learning_rate=5e-5)
    attention: LevelConfig = LevelConfig(tokens=20_000, learning_rate=5e-5)
    behaviour: LevelConfig = LevelConfig(tokens=10_000, learning_rate=5e-5)


@dataclass(frozen=True)
class BehaviourConfig:
    """``[behaviour]``: what the last level learns from"""

    prompts: int = setting(64, "Questions that the teacher answers.", 1, 1 << 30)
    per_prompt: int = setting(4, "Answers to each.", 1, 1024)
    tokens: int = setting(96, "Tokens of an answer at most.", 1, 1 << 16)
    temperature: float = setting(0.8, "At which they are drawn.", 0, 5)
    reward: str = setting("", "What scores them: the samples' own checks if left out, else MODULE:FUNCTION.")


@dataclass(frozen=True)
class QuantiseConfig:
    """``[quantise]``"""

    type: str = setting("Q4_0", "Of matrices.", choices=("Q4_0", "Q4_1", "IQ4_NL", "Q5_0", "Q5_1", "Q8_0", "F16"))
    method: str = setting("gptq", "How codes are chosen.", choices=("plain", "importance", "gptq"))
    embedding: str = setting(
        "F16", "Type of the embedding and the output; GPTQ makes the one that gives logits, too.",
        choices=("F32", "F16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"),
    )  # fmt: skip
    calibration_tokens: int = setting(8_192, "Tokens that statistics are taken of.", 256, 1 << 24)
    aware_tokens: int = setting(0, "Tokens of a last phase of training that knows of the quantisation, 0: none.", most=1 << 40)
    aware_rate: float = setting(5e-5, "Its learning rate.", 1e-8, 1)


@dataclass(frozen=True)
class CompensateConfig:
    """``[compensate]``"""

    bytes: float = setting(0.03, "Share of the file's bytes that corrections may add, 0: none.", 0, 1)
    time: float = setting(0.035, "Share of a decoding step's time that they may add, projected.", 0, 1)
    biases_in_model: bool = setting(False, "Biases become tensors of the model itself, which stock llama.cpp adds too (llama models).")
    tokens: int = setting(8_192, "Tokens that corrections are fitted to; an eighth of them judges.", 256, 1 << 40)
    norm_rate: float = setting(0.002, "How fast norms learn with them, as a share of their size a step; 0: they stay.", 0, 1)
    tune_tokens: int = setting(20_480, "Tokens on which the chosen corrections are trained together, 0: none.", most=1 << 40)


@dataclass(frozen=True)
class Config:
    """A whole run."""

    run: RunConfig = RunConfig()
    teacher: TeacherConfig = TeacherConfig()
    data: DataConfig = DataConfig()
    library: LibraryConfig = LibraryConfig()
    diagnose: DiagnoseConfig = DiagnoseConfig()
    student: StudentConfig = StudentConfig()
    behaviour: BehaviourConfig = BehaviourConfig()
    distil: DistilConfig = DistilConfig()
    quantise: QuantiseConfig = QuantiseConfig()
    compensate: CompensateConfig = CompensateConfig()
    name: str = setting("student", "Name of the student, in its file and its metadata.")


def read(path: Path) -> Config:
    """Read a file. Raises OptionError, RuleError with the line of a mistake."""
    return read_toml(path, "run", lambda table: read_table(Config, table))


def read_table(kind: type[T], table: Rules) -> T:
    """A data class from a table; fields that are data classes are tables in it. Raises RuleError."""
    return kind(**{one.name: _value(one, table) for one in fields(cast("Any", kind))})


def _value(one: Field[Any], table: Rules) -> Any:
    default, limits = one.default, one.metadata
    assert default is not MISSING
    if not limits:
        return _replaced(default, table.table(one.name))
    if isinstance(default, bool):
        return table.flag(one.name, default)
    if isinstance(default, int):
        return table.integer(one.name, default, int(limits["least"]), int(limits["most"]))
    if isinstance(default, float):
        return table.number(one.name, default, limits["least"], limits["most"])
    if isinstance(default, tuple) and limits["numbers"]:
        return table.integers(one.name, default, int(limits["least"]), int(limits["most"]))
    if isinstance(default, tuple):
        return table.choices(one.name, limits["choices"], default) if limits["choices"] else table.texts(one.name, default)
    return table.choice(one.name, limits["choices"], default) if limits["choices"] else table.text(one.name, default)


def _replaced(base: Any, table: Rules) -> Any:
    """A data class as ``base`` with what a table says else: levels have defaults of their own."""
    changed = {}
    for one in fields(base):
        own = field(default=getattr(base, one.name), metadata=one.metadata)
        own.name = one.name
        changed[one.name] = _value(own, table)
    return type(base)(**changed)


def to_toml(config: Config, explained: bool = True) -> str:
    """A file that ``read`` takes, with every value and what it means."""
    lines: list[str] = []
    _write(config, "", lines, explained)
    return "\n".join(lines).strip() + "\n"


def _write(values: Any, prefix: str, lines: list[str], explained: bool) -> None:
    tables = []
    for one in fields(values):
        value = getattr(values, one.name)
        if not one.metadata:
            tables.append((one.name, value))
            continue
        if explained:
            lines.append(f"# {one.metadata['help']}{_choices(one.metadata)}")
        lines.append(f"{one.name} = {_toml(value)}")
    for name, value in tables:
        lines += ["", f"[{prefix}{name}]"]
        _write(value, f"{prefix}{name}.", lines, explained)


def _choices(metadata: Mapping[str, Any]) -> str:
    return f" One of {', '.join(metadata['choices'])}." if metadata["choices"] else ""


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return repr(value)


def to_json(config: Any) -> dict[str, Any]:
    """Plain data: what the key of a step is made of."""
    return asdict(config)
