"""Tensors that stay on the device between two engines: rows that are sliced and joined without looking at them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Lease:
    """As long as it lives, the output buffers of a run are not written again, nor freed."""

    held: Any


@dataclass(frozen=True)
class Piece:
    """Rows that lie one behind the other; `first` of them are before the first in the same buffer."""

    address: int
    first: int
    rows: int
    lease: Lease


@dataclass(frozen=True)
class EngineRows:
    """Rows of a tensor on the device; slices and joins of them copy nothing. They hold as long as anybody has them.

    Attributes:
        shape: as of an array.
        dtype: name of the type, "bfloat16" too.
    """

    pieces: tuple[Piece, ...]
    tail: tuple[int, ...]
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and the sides of one."""
        return (len(self), *self.tail)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.tail) * storage(self.dtype).itemsize

    def __len__(self) -> int:
        return sum(piece.rows for piece in self.pieces)

    def __getitem__(self, rows: slice) -> EngineRows:
        start, stop, _ = rows.indices(len(self))
        pieces, at = [], 0
        for piece in self.pieces:
            low, high = max(start - at, 0), min(stop - at, piece.rows)
            at += piece.rows
            if low < high:
                address = piece.address + low * self.row_bytes
                pieces.append(Piece(address, piece.first + low, high - low, piece.lease))
        return EngineRows(tuple(pieces), self.tail, self.dtype)


def join_rows(parts: Sequence[EngineRows]) -> EngineRows:
    """Return rows one behind the other; neighbours in memory become one piece."""
    first, joined = parts[0], list(parts[0].pieces)
    for piece in (piece for part in parts[1:] for piece in part.pieces):
        last = joined[-1]
        if piece.lease is last.lease and piece.address == last.address + last.rows * first.row_bytes:
            joined[-1] = Piece(last.address, last.first, last.rows + piece.rows, last.lease)
        else:
            joined.append(piece)
    return EngineRows(tuple(joined), first.tail, first.dtype)


def storage(dtype: str) -> np.dtype[Any]:
    """Return the type of a tensor's elements in numpy, which has no bfloat16: its bits then."""
    return np.dtype(np.uint16 if dtype == "bfloat16" else dtype)
