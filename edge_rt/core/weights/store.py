"""The weight store: tensors placed over mapped files, in four kinds of unit (embedding, each block, norm, head).

Nothing is read here. A tensor's bytes come from disk when a kernel, the prefetcher or the pager touches them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from edge_rt.core.graph.config import ModelConfig
from edge_rt.core.weights.repack import OFFSETS_SUFFIX, PackedFile, offsets_name
from edge_rt.core.weights.units import Span, Unit, merge, unit_name
from edge_rt.errors import ModelFileError
from edge_rt.native import ggml, memory

if TYPE_CHECKING:
    from edge_rt.core.gguf.model_file import ModelFile
    from edge_rt.core.weights.error_correction import Corrections


class WeightStore:
    """Every weight as a ggml tensor over mapped memory. ``packed`` None runs straight from the GGUF.

    Units that are ``elsewhere``, on a device, are in no unit here: nothing reads them ahead.
    """

    def __init__(self, file: ModelFile, config: ModelConfig, packed: PackedFile | None = None, elsewhere: Collection[str] = ()) -> None:
        self._file, self._packed = file, packed
        names = list(file.header.tensors)
        self._ctx = ggml.context(2 * (len(names) + len(packed.entries if packed else ())) + 1)  # half of it for ``joined``
        base = memory.address_of(file.map)
        self._plain = ggml.buffer_from_address(base, len(file.map))
        self._tensors: dict[str, int] = {}
        self._spans: dict[str, Span] = {}
        self._joined: dict[tuple[str, ...], int | None] = {}
        packed_names = packed.place(self._ctx.address) if packed else {}
        for name, (tensor, span) in packed_names.items():
            self._tensors[name], self._spans[name] = tensor, span
        for name, info in file.header.tensors.items():
            if name in self._tensors or name.endswith(OFFSETS_SUFFIX):  # of no model: what packing adds must not come from a file
                continue
            tensor = ggml.new_tensor(self._ctx.address, info.type, info.shape)
            ggml.c.set_name(tensor, name.encode())
            ggml.place(tensor, self._plain.address, base + info.offset)
            self._tensors[name] = tensor
            self._spans[name] = Span(base + info.offset, info.nbytes, file.fd, info.offset)
        self._packed_names = frozenset(packed_names)
        self.centred = any(name.endswith(OFFSETS_SUFFIX) for name in packed_names)
        """Whether some weights lie as Q4_0 and offsets (repack.py)."""
        self.corrections: Corrections | None = None
        """What compensates for their quantisation; it belongs to who set it."""
        self.units = tuple(self._units(config, elsewhere))
        self._advise()

    def get(self, name: str) -> int | None:
        """Address of a tensor, None if the model has none of that name."""
        return self._tensors.get(name)

    def require(self, name: str) -> int:
        """Address of a tensor. Raises ModelFileError."""
        if (tensor := self._tensors.get(name)) is None:
            raise ModelFileError(f"the model lacks the tensor {name}; the file is incomplete, download it again")
        return tensor

    def joined(self, names: tuple[str, ...]) -> int | None:
        """One tensor over the rows of several that lie side by side in memory in this order and are of one kind; None if they do not.

        Products with the same input become one: it is converted once, and threads meet less often. Each row's bits stay the same.
        """
        if names not in self._joined:
            self._joined[names] = self._join(names)
        return self._joined[names]

    def _join(self, names: tuple[str, ...]) -> int | None:
        tensors = [self._tensors.get(name) for name in names]
        parts = [ggml.fields(tensor) for tensor in tensors if tensor]
        if len(parts) < len(names):
            return None
        if len({offsets_name(name) in self._tensors for name in names}) > 1:
            return None
        first, rank = parts[0], 1 if all(part.ne[1] == 1 for part in parts) else 2
        end = first.data
        for name, part in zip(names, parts, strict=True):
            alike = (part.type, part.buffer, part.extra) == (first.type, first.buffer, first.extra) and part.ne[2] == 1
            if not alike or part.data != end or (rank == 2 and part.ne[0] != first.ne[0]):
                return None
            end += self._spans[name].size
        rows = sum(part.ne[rank - 1] for part in parts)
        joined = ggml.new_tensor(self._ctx.address, first.type, (rows,) if rank == 1 else (first.ne[0], rows))
        ggml.place(joined, first.buffer, first.data)
        return joined if ggml.fields(joined).extra == first.extra else None

    def span(self, name: str) -> Span:
        """Where a tensor's bytes are."""
        return self._spans[name]

    def matrices(self) -> Iterator[int]:
        """Weights that are multiplied with hidden states: all two-dimensional ones, the embedding only where it is the head too."""
        tied = "output.weight" not in self._tensors
        for name, tensor in self._tensors.items():
            if ggml.fields(tensor).ne[1] > 1 and (tied or name != "token_embd.weight"):
                yield tensor

    @property
    def size(self) -> int:
        """Bytes mapped over all units."""
        return sum(unit.size for unit in self.units)

    def resident(self) -> int | None:
        """Bytes in memory now, None where the system cannot say."""
        parts = [unit.resident() for unit in self.units]
        return None if any(part is None for part in parts) else sum(part or 0 for part in parts)

    def close(self) -> None:
        """Unmap. No graph over these tensors may run afterwards."""
        self._plain.close()
        self._ctx.close()
        if self._packed:
            self._packed.close()

    def _units(self, config: ModelConfig, elsewhere: Collection[str]) -> Iterator[Unit]:
        """Units in the order a forward pass touches them."""
        tied = "output.weight" not in self._tensors and "head" not in elsewhere
        members: dict[str, list[str]] = {}
        for name in self._tensors:
            members.setdefault(unit_name(name), []).append(name)
        if tied:
            # The head is the embedding: its bytes are read whole by every step, so they count there.
            members.setdefault("head", []).extend(n for n in members.pop("embedding", []))
        order = ["embedding", *(f"blk.{i}" for i in range(config.n_layer)), "norm", "head"]
        for unit in (one for one in order if one not in elsewhere):
            names = members.get(unit, [])
            experts = [n for n in names if "_exps." in n]
            for part, sparse, suffix in ((names, unit == "embedding", ""), (experts, True, ".experts")):
                chosen = [n for n in part if suffix or n not in experts]
                if chosen:
                    yield Unit(unit + suffix, merge([self._spans[n] for n in chosen]), sparse, any(n in self._packed_names for n in chosen))

    def _advise(self) -> None:
        """Rows and experts are touched at random: reading around them would page in neighbours nobody asked for."""
        for unit in self.units:
            if unit.sparse:
                for span in unit.spans:
                    address, size = memory.page_span(span.address, span.size)
                    memory.advise(address, size, "random")
