"""General text that is on every machine this tool runs on: the reference topics of Python's own documentation."""

from __future__ import annotations

import sys

from edge_rt.hooks import DataError
from edge_rt_distill.data.samples import Sample, make_sample
from edge_rt_distill.data.text import passages

LICENCE = "PSF-2.0"


def technical_text(passage: int = 1500) -> list[Sample]:
    """English technical text of every CPython (``pydoc_data.topics``, about 460 kB), in passages of at most ``passage`` letters.

    It depends on Python's version, so the version is in each sample's source. Raises ``DataError`` where a distribution left it out.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError(
            "this Python has no pydoc_data.topics, which the general text is taken from; install Python's full standard library, "
            "or name text files of your own"
        ) from None
    version = ".".join(map(str, sys.version_info[:3]))
    samples: dict[str, Sample] = {}
    for topic, text in sorted(topics.items()):
        for number, piece in enumerate(passages(text, passage), 1):
            source = f"CPython {version}, pydoc_data.topics, {topic}, passage {number}"
            sample = make_sample(text=piece, domain="general", language="en", source=source, licence=LICENCE)
            samples.setdefault(sample.id, sample)  # some topics quote the same paragraphs
    return list(samples.values())
