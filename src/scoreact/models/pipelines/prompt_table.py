"""Embeddings of prompts: as many as a bound allows beside the denoiser, the others in a temporary file.

A row is what the denoiser is given of one prompt: some tensors without a batch dimension, of one dtype. Does not know how a
prompt is encoded.
"""

from __future__ import annotations

import math
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import IO

import torch
from torch import Tensor

from ...support.errors import ModelError

MIB = 2**20


class PromptTable:
    """Rows by number, in the order in which they were added; the least recently used leave memory first."""

    def __init__(self, memory: int) -> None:
        """memory: MiB of rows that stay on the device."""
        if memory < 1:
            raise ModelError(f"prompt_memory is {memory} MiB; expected 1 or more.")
        self.memory = memory
        self.rows: dict[str, int] = {}  # the number of each prompt
        self.shapes: dict[str, torch.Size] = {}  # of a row's tensors, by name
        self._slabs: dict[str, Tensor] = {}  # [places, ...] by name: one piece of memory, whatever comes and goes
        self._place: dict[int, int] = {}  # of each row in the slabs, the least recently used first
        self._stored = torch.float32  # in the file
        self._wanted = 0  # places that will be needed
        self._written: set[int] = set()
        self._file: IO[bytes] | None = None

    @property
    def row_bytes(self) -> int:
        """Of one prompt, in memory and in the file."""
        return sum(math.prod(shape) for shape in self.shapes.values()) * self._stored.itemsize

    @property
    def memory_bytes(self) -> int:
        """Of the rows in memory, and of the places that wait for some."""
        return sum(slab.numel() * slab.itemsize for slab in self._slabs.values())

    @property
    def on_disk(self) -> int:
        """Rows that have been written to the file."""
        return len(self._written)

    @property
    def kept(self) -> Sequence[int]:
        """The rows in memory, the least recently used first."""
        return list(self._place)

    @property
    def device(self) -> torch.device:
        """Where the rows are that are in memory."""
        return next((slab.device for slab in self._slabs.values()), torch.device("cpu"))

    def reserve(self, count: int) -> None:
        """Say that so many prompts are about to be added: their places are then made at once."""
        self._wanted = len(self.rows) + count

    def add(self, prompts: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        """Number new prompts; tensors [n, ...] by name, all of one dtype and device; rows beyond n fill up."""
        if not self.shapes:
            self.shapes = {name: tensor.shape[1:] for name, tensor in tensors.items()}
            self._stored = next(iter(tensors.values())).dtype
            self._slabs = {name: tensor[:0].clone() for name, tensor in tensors.items()}
        for i, prompt in enumerate(prompts):
            number = self.rows[prompt] = len(self.rows)
            place = self._free_place()
            for name, tensor in tensors.items():
                self._slabs[name][place] = tensor[i]
            self._place[number] = place

    def at(self, rows: Tensor) -> dict[str, Tensor]:
        """The tensors of rows [B] by name, each [B, ...]; {} of a table without any."""
        if not self.shapes:
            return {}
        numbers, most = rows.tolist(), self._most()
        distinct = dict.fromkeys(numbers)
        if len(distinct) > most:  # more than memory may hold
            parts = [self.at(part) for part in rows.split(most)]
            return {name: torch.cat([part[name] for part in parts]) for name in self.shapes}
        for number in distinct:
            if number in self._place:  # first, so that none of them makes room for another
                self._place[number] = self._place.pop(number)
        for number in distinct:
            if number not in self._place:
                row, place = self._read(number), self._free_place()
                for name, slab in self._slabs.items():
                    slab[place] = row[name].to(slab)
                self._place[number] = place
        index = torch.tensor([self._place[number] for number in numbers], device=self.device)
        return {name: slab[index] for name, slab in self._slabs.items()}

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move the rows along with the networks."""
        self._slabs = {name: fn(slab) for name, slab in self._slabs.items()}

    def _most(self) -> int:
        return max(1, self.memory * MIB // self.row_bytes)

    def _free_place(self) -> int:
        """A place in the slabs: a new one while there may be more, else that of the row not asked for the longest."""
        places = len(next(iter(self._slabs.values())))
        if len(self._place) < places:
            return len(self._place)
        if places < self._most():
            more = min(self._most(), max(2 * places, self._wanted, 1))
            for name, slab in self._slabs.items():
                self._slabs[name] = torch.cat([slab, slab.new_empty(more - places, *slab.shape[1:])])
            return places
        number = next(iter(self._place))
        if number not in self._written:
            self._write(number)
        return self._place.pop(number)

    def _write(self, number: int) -> None:
        place = self._place[number]
        parts = [
            slab[place].to("cpu", self._stored).contiguous().flatten().view(torch.uint8)
            for slab in self._slabs.values()
        ]
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="scoreact-prompts-")  # noqa: SIM115  has no name: gone when closed
                weakref.finalize(self, self._file.close)
            self._file.seek(number * self.row_bytes)
            self._file.write(torch.cat(parts).numpy().tobytes())
        except OSError as error:
            count = max(len(self.rows), self._wanted)
            raise ModelError(
                f"the embeddings of {count} prompts take {count * self.row_bytes // MIB} MiB, of which "
                f"prompt_memory keeps {self.memory}, and the others do not fit into {tempfile.gettempdir()} ({error}); raise "
                "prompt_memory, name a larger folder in TMPDIR, or give fewer prompts."
            ) from error
        self._written.add(number)

    def _read(self, number: int) -> dict[str, Tensor]:
        assert self._file is not None  # what is not in memory has been written
        self._file.seek(number * self.row_bytes)
        content = torch.frombuffer(bytearray(self._file.read(self.row_bytes)), dtype=self._stored)
        parts = content.split([math.prod(shape) for shape in self.shapes.values()])
        return {name: part.reshape(self.shapes[name]) for name, part in zip(self.shapes, parts, strict=True)}
