"""Units: what is read, kept and released together, as runs of mapped bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from edge_rt.native import memory


class Span(NamedTuple):
    """A contiguous run of mapped bytes: where it is in memory and in its file."""

    address: int
    size: int
    fd: int
    offset: int

    @property
    def whole_pages(self) -> tuple[int, int, int]:
        """(address, size, file offset) of the whole pages inside; neighbours' pages are left out."""
        start, size = memory.inner_page_span(self.address, self.size)
        return start, size, self.offset + (start - self.address)


class Unit(NamedTuple):
    """What is read, kept and released together. ``sparse``: touched row by row or expert by expert, so never read ahead whole."""

    name: str
    spans: tuple[Span, ...]
    sparse: bool = False
    packed: bool = False

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(span.size for span in self.spans)

    def resident(self) -> int | None:
        """Bytes in memory now, None where the system cannot say."""
        total = 0
        for span in self.spans:
            bytes_ = memory.resident_bytes(*memory.page_span(span.address, span.size))
            if bytes_ is None:
                return None
            total += min(bytes_, span.size)
        return total


def unit_name(tensor: str) -> str:
    """The unit a GGUF tensor belongs to, by its name."""
    if tensor.startswith("blk."):
        return ".".join(tensor.split(".", 2)[:2])
    if tensor.startswith("token_embd"):
        return "embedding"
    return "head" if tensor.startswith("output.") else "norm"


def merge(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Join neighbours (gaps under a page are alignment padding)."""
    merged: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.fd, s.address)):
        last = merged[-1] if merged else None
        if last and last.fd == span.fd and 0 <= span.address - (last.address + last.size) < memory.PAGE:
            merged[-1] = Span(last.address, span.address + span.size - last.address, last.fd, last.offset)
        else:
            merged.append(span)
    return tuple(merged)
