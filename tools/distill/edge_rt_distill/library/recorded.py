"""Reads back what record.py and errors.py recorded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edge_rt.hooks import DataError
from edge_rt_distill.library.catalogue import Record
from edge_rt_distill.library.record import unpack
from edge_rt_distill.library.store import Library


class Trajectory(NamedTuple):
    """An answer as it was given. Of its A tokens: ``logprobs`` [A], ``top_ids`` and ``top_logprobs`` [A, K], ``tail`` [A], ``entropy`` [A].

    ``facts``: what stands in its line besides (batch, batch_tokens, batch_seconds, logprob).
    """

    sample: str
    rollout: int
    prompt: list[int]
    answer: list[int]
    ended: bool
    text: str
    score: float | None
    logprobs: npt.NDArray[np.float32]
    top_ids: npt.NDArray[np.int32]
    top_logprobs: npt.NDArray[np.float32]
    tail: npt.NDArray[np.float32]
    entropy: npt.NDArray[np.float32]
    facts: dict[str, Any]


def trajectories(library: Library, record: Record) -> Iterator[Trajectory]:
    """A record's answers in order, shard by shard. Raises DataError for damaged objects or a record of another kind."""
    _is(record, "trajectories")
    for name in _files(record, "trajectories-", ".jsonl"):
        arrays = unpack(library.read(record.objects[name.replace(".jsonl", ".npz")]))
        token = place = 0
        for line in _lines(library, record, name):
            length, count = line.pop("prompt"), line.pop("answer")
            prompt, answer = np.split(arrays["tokens"][token : token + length + count], [length])
            part = slice(place, place + count)
            token, place = token + length + count, place + count
            fields: dict[str, Any] = {key: line.pop(key) for key in ("sample", "rollout", "ended", "text", "score")}
            fields.update({key: arrays[key][part] for key in ("logprobs", "top_ids", "top_logprobs", "tail", "entropy")})
            yield Trajectory(prompt=prompt.tolist(), answer=answer.tolist(), facts=line, **fields)


class Activations(NamedTuple):
    """``rms`` and ``max`` [L + 1, P] of the residual stream by layer entry and position, ``sequences`` [P] that reach the position."""

    rms: npt.NDArray[np.float32]
    max: npt.NDArray[np.float32]
    sequences: npt.NDArray[np.int64]


def activations(library: Library, record: Record) -> Activations:
    """Raises DataError."""
    _is(record, "activations")
    return Activations(**unpack(library.read(record.objects["activations.npz"])))


class Maps(NamedTuple):
    """A sample's attention: ``maps`` float16 [L, H, n, n], rows adding up to one; block i is positions edges[i] to edges[i + 1].

    Over the full map's rows: ``entropy`` (nats), ``distance`` (tokens), ``first`` (share on position 0), [L, H].
    """

    sample: str
    tokens: npt.NDArray[np.int32]
    edges: npt.NDArray[np.int32]
    maps: npt.NDArray[np.float16]
    entropy: npt.NDArray[np.float32]
    distance: npt.NDArray[np.float32]
    first: npt.NDArray[np.float32]


def attention(library: Library, record: Record) -> Iterator[Maps]:
    """A record's samples. Raises DataError."""
    _is(record, "attention")
    for sample, name in zip(record.facts["samples"], _files(record, "attention-", ".npz"), strict=True):
        yield Maps(sample, **unpack(library.read(record.objects[name])))


def errors(library: Library, record: Record) -> Iterator[dict[str, Any]]:
    """A record's error cases, as ``errors.explain`` made them. Raises DataError."""
    _is(record, "errors")
    for name in _files(record, "errors-", ".jsonl"):
        yield from _lines(library, record, name)


def _is(record: Record, kind: str) -> None:
    if record.kind != kind:
        raise DataError(f"record {record.id[:12]} is of kind {record.kind} and not {kind}; choose another")


def _files(record: Record, start: str, end: str) -> list[str]:
    return sorted(name for name in record.objects if name.startswith(start) and name.endswith(end))


def _lines(library: Library, record: Record, name: str) -> Iterator[dict[str, Any]]:
    for line in library.read(record.objects[name]).decode("utf-8", "surrogatepass").split("\n"):
        if line:
            yield json.loads(line)
