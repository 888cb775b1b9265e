"""Suites as tasks of lm-evaluation-harness (Gao et al., github.com/EleutherAI/lm-evaluation-harness): a folder for its ``--include_path``.

For each suite up to three tasks, named ``edge_rt_SUITE_...``: ``text``, choices behind a text, by the sum of log-likelihoods (``acc``);
``chat``, choices as the answer to a message, by the mean a byte (``acc_bytes``); and ``answer``, free answers, by the items' own checks.
Chat and answer tasks want ``--apply_chat_template``. The harness asks a single question, so items with a longer conversation or a system
message, of turns and of wordings have no place there; they are counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from edge_rt_distill.files import write_file
from edge_rt_distill.sandbox.items import Item
from edge_rt_distill.sandbox.suites import Suite

_CODE = '''"""How answers are judged: by the items' checks. Needs the package edge-rt-distill."""

import json

from edge_rt_distill.data.answers import Answer
from edge_rt_distill.sandbox.judging import judge_answer
from edge_rt_distill.sandbox.items import parse


def process_results(doc, results):
    """The mean of the item's checks by their weights. The harness does not tell whether an answer ended by itself."""
    return {"checks": judge_answer(parse(json.loads(doc["item"])), Answer(results[0], True))}
'''
_CHOICE: Mapping[str, Any] = {"output_type": "multiple_choice", "doc_to_choice": "{{options}}", "doc_to_target": "{{right}}"}
_ANSWER: Mapping[str, Any] = {
    "output_type": "generate_until", "doc_to_target": "", "process_results": "!function edge_rt_checks.process_results",
}  # fmt: skip
_METRICS: Mapping[str, tuple[str, ...]] = {"text": ("acc",), "chat": ("acc_bytes", "acc"), "answer": ("checks",)}


class Exported(NamedTuple):
    """``tasks`` that were written, with how many items each has; ``left_out``: items that have no place in the harness."""

    tasks: Mapping[str, int]
    left_out: int


def export(suites: Sequence[Suite], folder: Path, split: Sequence[str]) -> Exported:
    """Write tasks and their data. ``split``: of whose items. Raises UserError."""
    tasks: dict[str, int] = {}
    left_out = 0
    for suite in suites:
        kinds: dict[str, list[dict[str, Any]]] = {"text": [], "chat": [], "answer": []}
        for item in suite.items:
            if item.split in split:
                kind = _kind(item)
                left_out += not kind
                if kind:
                    kinds[kind].append(_document(item))
        for kind, documents in kinds.items():
            if documents:
                name = f"edge_rt_{suite.name}_{kind}"
                data = folder / f"{name}.jsonl"
                write_file(data, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in documents))
                write_file(folder / f"{name}.yaml", _task(name, kind, data))
                tasks[name] = len(documents)
    write_file(folder / "edge_rt_checks.py", _CODE)
    write_file(folder / "edge_rt.yaml", "group: edge_rt\ntask:\n" + "".join(f"  - {name}\n" for name in tasks))
    return Exported(tasks, left_out)


def _kind(item: Item) -> str:
    """Of the task it belongs to; "" if none."""
    if item.turns or item.asks:
        return ""
    if not item.messages:
        return "text"
    roles = [message["role"] for message in item.messages]
    if roles != ["user"]:
        return ""
    return "chat" if item.options else "answer"


def _document(item: Item) -> dict[str, Any]:
    asked = item.messages[-1]["content"] if item.messages else item.text
    found: dict[str, Any] = {"id": item.id, "asked": asked, "metric": item.metric, "language": item.language}
    if item.options:
        return {**found, "options": list(item.options), "right": item.right}
    record = {
        "id": item.id, "metric": item.metric, "language": item.language, "form": item.form, "source": item.source, "licence": item.licence,
        "messages": list(item.messages), "checks": list(item.checks), "tokens": item.tokens,
        "good": [one[0].text for one in item.good], "bad": [one[0].text for one in item.bad],
    }  # fmt: skip
    passages = [check["passage"] for check in item.checks if check.get("passage")]
    if passages:
        record["passage"] = passages[0]
    return {**found, "item": json.dumps(record, ensure_ascii=False)}


def _task(name: str, kind: str, data: Path) -> str:
    """YAML of the harness; JSON is YAML, but for its ``!function``."""
    settings: dict[str, Any] = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data.absolute())}}, "test_split": "test",
        "doc_to_text": "{{asked}}", "target_delimiter": "", **(_ANSWER if kind == "answer" else _CHOICE),
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in _METRICS[kind]],
    }  # fmt: skip
    if kind == "answer":
        settings["generation_kwargs"] = {"until": [], "max_gen_toks": 256, "do_sample": False, "temperature": 0.0}
    lines = [f"{key}: {value if str(value).startswith('!') else json.dumps(value, ensure_ascii=False)}" for key, value in settings.items()]
    return "\n".join([*lines, "metadata: {version: 1.0}", ""])
