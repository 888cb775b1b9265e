"""What the steps of a run share: its configuration, and models and sequences that are loaded when first needed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from edge_rt.hooks import DataError, ModelFileError, resolve_model
from edge_rt_distill.data.batches import encode
from edge_rt_distill.data.records import parse
from edge_rt_distill.data.samples import Sample
from edge_rt_distill.files import write_file
from edge_rt_distill.model.load import Teacher, load
from edge_rt_distill.model.rows import TokenSequence
from edge_rt_distill.model.tokens import Tokeniser
from edge_rt_distill.model.vocabulary import Fewer, read_merges, with_fewer
from edge_rt_distill.run.config import Config
from edge_rt_distill.stages.teachers import CachingTeacher, ReadingTeacher, TeacherView

TRAIN, HELD_OUT, ROLLOUTS = "train.jsonl", "held_out.jsonl", "rollouts.jsonl"
VOCABULARY, KEPT, FEWER = "vocabulary", "kept.json", "vocabulary.gguf"
"""The step that may leave tokens out, and what it leaves: the numbers of those that are kept, or null, and a vocabulary of them."""


class Workshop:
    """A run's configuration and folder. Nothing here changes a result: it only saves loading things twice."""

    def __init__(self, config: Config, folder: Path, beside: Path) -> None:
        """``beside``: where names of files in the configuration are relative to."""
        self.config, self.folder, self.beside = config, folder, beside

    def path(self, name: str) -> Path:
        """A file that the configuration names."""
        found = self.beside / Path(name).expanduser()
        return found if found.exists() else Path(name)

    @property
    def library_folder(self) -> Path:
        """Where the teacher library is."""
        named = self.config.library.folder
        return self.beside / Path(named).expanduser() if named else self.folder / "teacher-library"

    @cached_property
    def teacher_path(self) -> Path:
        """The teacher's file or folder. Raises ModelFileError when there is none."""
        return resolve_model(self.path(self.config.teacher.model))

    @cached_property
    def teacher_stamp(self) -> list[Any]:
        """Name, size and time of change of the teacher's files: another teacher under the same name makes other keys of steps.

        Its name alone where it is not there: what a run found can be told without it, and doing one asks for its path before this.
        """
        try:
            path = self.teacher_path
        except ModelFileError:
            return [self.config.teacher.model]
        return stamps(path)

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher. Raises ModelFileError, UnsupportedModel."""
        vocabulary = self.config.teacher.vocabulary
        return load(self.teacher_path, self.path(vocabulary) if vocabulary else None)

    @cached_property
    def fewer(self) -> Fewer | None:
        """The teacher with fewer tokens, as the step ``vocabulary`` left it; None if it kept all. That step comes first."""
        folder = self.folder / VOCABULARY
        kept = json.loads((folder / KEPT).read_text(encoding="utf-8"))
        if kept is None:
            return None
        return with_fewer(self.teacher, read_merges(self.teacher.tokeniser.source), kept, folder / FEWER)

    @property
    def taught(self) -> Teacher:
        """The teacher with the tokens that its student has."""
        return self.teacher if self.fewer is None else self.fewer.teacher

    @cached_property
    def seen(self) -> TeacherView:
        """The teacher as training and measuring see it: what it says of a sequence is computed once for all steps."""
        whole = CachingTeacher(self.teacher.model)
        return whole if self.fewer is None else ReadingTeacher(whole, self.teacher.tokeniser, self.fewer)

    def sequences(self, tokeniser: Tokeniser, *files: Path) -> list[TokenSequence]:
        """The sequences of files of samples that ``write_samples`` wrote, one of which may be empty."""
        return encode([sample for file in files for sample in read_back(file)], tokeniser, self.config.data.length)


def stamps(path: Path) -> list[list[Any]]:
    """Name, size and time of change of a file or of all in a folder: other content, other stamps. Empty where nothing is there."""
    files = [one for one in ([path, *sorted(path.rglob("*"))]) if one.is_file()]
    return [[one.name, one.stat().st_size, one.stat().st_mtime_ns] for one in files]


def shuffled(sequences: list[TokenSequence], seed: int) -> list[TokenSequence]:
    """The same in an order of its own: whoever takes the first few gets some of everything."""
    found = list(sequences)
    random.Random(f"shuffled {seed}").shuffle(found)
    return found


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Samples as JSONL that ``read_back`` reads, in their order, at once. Raises UserError."""
    write_file(path, "".join(json.dumps(_record(sample), ensure_ascii=False) + "\n" for sample in samples))


def _record(sample: Sample) -> Mapping[str, Any]:
    content: dict[str, Any] = {"text": sample.text}
    if sample.messages:
        content = {"messages": [one._asdict() for one in sample.messages]}
    known = {name: getattr(sample, name) for name in ("domain", "language", "source", "licence")}
    return {**content, **{name: value for name, value in known.items() if value}, **({"checks": sample.checks} if sample.checks else {})}


def read_back(path: Path) -> list[Sample]:
    """Samples that ``write_samples`` wrote. Raises DataError for a file that was changed since."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); run the same command again with another folder") from error
    return [parse(line, file=str(path), line=number) for number, line in enumerate(lines, 1)]
