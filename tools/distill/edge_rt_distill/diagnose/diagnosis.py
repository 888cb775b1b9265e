"""A whole diagnosis: measured part by part, resumed where it was interrupted, written as ``diagnosis.json`` and ``diagnosis.npz``.

What surgery and training read are the arrays:

- ``layer_kl``, ``attention_kl``, ``ffn_kl`` [L] (nats a token without the layer or that half of it; ``.._error``: standard errors, NaN
  for a single sequence), ``block_influence`` [L], ``drop_order``, ``drop_kl`` (layers in the order in which they can go).
- ``heads`` [L, H], ``kv_groups`` [L, KV], ``ffn_channels`` [L, F], ``hidden`` [D]: importance, more is more; by the measure that the
  options choose, and by name of the measure (``ffn_channels_taylor``, ``ffn_channels_activation``, ``hidden_..``).
- ``path_heads`` [L, H] (mean 1), ``attention_entropy``, ``.._distance``, ``.._sink``, ``.._far`` [L, H].
- ``stream_mean_square``, ``.._largest``, ``.._kurtosis`` [L + 1] without position 0, ``stream_positions`` [L + 1, T] (largest
  magnitude), ``input_mean_square.blk.N.NAME`` [in].
- ``domain.NAME.heads``, ``domain.NAME.layer_kl``, and the same for ``language``.

Where layers differ in size, a smaller one's row ends in NaN.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edge_rt.hooks import DataError
from edge_rt_distill.diagnose.findings import Finding, Measured, rank
from edge_rt_distill.diagnose.groups import Group, by_label
from edge_rt_distill.diagnose.measure import PARTS, Task
from edge_rt_distill.diagnose.options import Options
from edge_rt_distill.diagnose.parts import Array, Part, find, key_of, packed, save, unpacked
from edge_rt_distill.diagnose.passes import check_own_parameters
from edge_rt_distill.diagnose.rows import Labels, checked, mixed
from edge_rt_distill.files import write_file
from edge_rt_distill.model.load import Teacher
from edge_rt_distill.model.rows import TokenSequence
from edge_rt_distill.progress import PartTold, quiet

VERSION = 1


@dataclass(frozen=True)
class Diagnosis:
    """``facts``: what is neither array nor finding (see ``facts_of``). ``findings``: what carries the value, by rank."""

    facts: dict[str, Any]
    arrays: dict[str, Array]
    findings: list[Finding]

    def save(self, folder: Path) -> None:
        """Write both files, the arrays first. Raises UserError if the disk says no."""
        write_file(folder / "diagnosis.npz", packed(self.arrays))
        data = {**self.facts, "findings": [one._asdict() for one in self.findings]}
        write_file(folder / "diagnosis.json", json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Diagnosis:
        """What ``save`` wrote. Raises DataError."""
        path = folder / "diagnosis.json"
        try:
            data = json.loads(path.read_bytes())
            if data["version"] != VERSION:
                raise DataError(f"{path} is of version {data['version']}; diagnose the teacher again")
            findings = [Finding(**one) for one in data.pop("findings")]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is no diagnosis ({error}); diagnose the teacher again") from None
        return cls(data, unpacked(folder / "diagnosis.npz"), findings)

    @property
    def fisher(self) -> dict[str, float]:
        """The trace of the Fisher information by site, per predicted token."""
        found: dict[str, float] = self.facts["fisher"]
        return found


def diagnose(
    teacher: Teacher, sequences: Sequence[TokenSequence], options: Options = Options(), told: PartTold = quiet, *,  # noqa: B008 (frozen)
    folder: Path, labels: Mapping[str, Labels] | None = None,
) -> Diagnosis:  # fmt: skip
    """Measure a teacher on sequences, and write the result into ``folder``; parts that were done before with the same are taken from there.

    ``labels``: by sample id its domain and language. Raises DataError (sequences or a model that cannot be measured), OptionError (a
    model that shares layers), UserError (the disk), and whatever ``told`` raises, with the parts done so far kept.
    """
    model = teacher.model
    check_own_parameters(model)
    labels = labels or {}
    usable = checked(sequences, model.architecture.vocabulary)
    kept = mixed(usable, options.seed, labels)[: options.sequences]
    made_of = [VERSION, teacher.digest, model.architecture.to_json(), [[list(one.tokens), list(map(bool, one.targets))] for one in kept]]
    parts: dict[str, Part] = {}
    for name, (measure, depends) in PARTS.items():
        key = key_of(made_of, name, {option: getattr(options, option) for option in depends})
        part = find(folder / "parts", name, key)
        if part is None:
            part = measure(Task(model, kept, options, partial(told, name), parts))
            save(folder / "parts", name, key, part)
        parts[name] = part
    found = assemble(teacher, kept, options, parts, labels, skipped=len(sequences) - len(usable))
    found.save(folder)
    return found


def assemble(
    teacher: Teacher, kept: Sequence[TokenSequence], options: Options, parts: Mapping[str, Part], labels: Mapping[str, Labels], skipped: int
) -> Diagnosis:
    """The diagnosis that the parts amount to."""
    model = teacher.model
    inner = {"heads_by_sequence", "loss", "removal_sums", "removal_counts"}
    arrays = {name: array for part in parts.values() for name, array in part.arrays.items() if name not in inner}
    arrays["ffn_channels"] = arrays[f"ffn_channels_{options.channels}"]
    arrays["hidden"] = arrays[f"hidden_{options.hidden}"]
    groups = by_label(kept, labels, parts["gradients"], parts["removal"], len(model.layers))
    for group in groups:
        arrays[f"{group.kind}.{group.name}.heads"] = group.heads
        if group.layer_kl is not None:
            arrays[f"{group.kind}.{group.name}.layer_kl"] = group.layer_kl
    for name, array in arrays.items():
        if np.isinf(array).any():
            raise DataError(f"the measure {name} is beyond all bounds; the teacher's weights are damaged, get it again")
    facts = facts_of(teacher, kept, options, parts, groups, skipped)
    weights = {site: model.linear(site).weight.numel() for site in model.sites()}
    return Diagnosis(facts, arrays, rank(Measured(arrays, facts, groups, weights)))


def facts_of(
    teacher: Teacher, kept: Sequence[TokenSequence], options: Options, parts: Mapping[str, Part], groups: Sequence[Group], skipped: int
) -> dict[str, Any]:
    """What ``diagnosis.json`` holds beside the findings.

    ``samples``: how much was looked at, ``removal`` on how much of it layers were left out. ``layers``: a row each. ``fisher``: by site.
    ``sites``: each matrix' input (activations.Spread). ``massive``: activations.Massive. ``groups``: domains and languages.
    ``traces``: key tokens of some sequences; ``owed`` is in nats of the answer's log-probability.
    """
    predictions = [sum(map(bool, one.targets[1:])) for one in kept]
    rows = {name: array for part in (parts["activations"], parts["removal"]) for name, array in part.arrays.items()}
    columns = ("block_influence", *(f"{half}_kl{suffix}" for half in ("layer", "attention", "ffn") for suffix in ("", "_error")))
    layers = [
        {"layer": number, **{name: _plain(rows[name][number]) for name in columns if name in rows}}
        for number in range(len(teacher.model.layers))
    ]
    traces = [
        {**one, "pieces": [teacher.tokeniser.piece(token) for token in one["tokens"]]} for one in parts["paths"].facts["traces"]
    ]  # fmt: skip
    return {
        "version": VERSION, "teacher": teacher.digest, "architecture": teacher.model.architecture.to_json(),
        "options": dataclasses.asdict(options),
        "samples": {
            "sequences": len(kept), "tokens": sum(len(one.tokens) for one in kept), "predictions": sum(predictions), "skipped": skipped,
            "loss": float(parts["gradients"].arrays["loss"].sum() / sum(predictions)), "removal": parts["removal"].facts,
        },
        "layers": layers, "fisher": parts["fisher"].facts["fisher"], "sites": parts["activations"].facts["sites"],
        "massive": parts["activations"].facts["massive"], "groups": [_group_facts(one) for one in groups], "traces": traces,
    }  # fmt: skip


def _group_facts(group: Group) -> dict[str, Any]:
    return {name: value for name, value in group._asdict().items() if name not in ("heads", "layer_kl")}


def _plain(value: Any) -> float | None:
    """A number for JSON, None for one that is none."""
    return float(value) if np.isfinite(value) else None
