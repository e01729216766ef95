"""Which weight files an ONNX graph refers to, read from its bytes: no onnx package, no tensor is loaded.

ONNX is protobuf; the walk below visits every message that can hold a tensor and skips the rest by length. A
runtime opens whatever file a tensor names, so a bundle is only checked whole when these names are known.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from edgeprune.errors import InputError

# message -> {field number: message}; only the fields on a way to a TensorProto. Numbers from onnx.proto3.
_CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_MAX_DEPTH = 100  # as protobuf itself


def find_external_locations(path: Path) -> set[str]:
    """Return the `location` of every tensor of an ONNX file that is stored outside it.

    Raises:
        InputError: `graph-invalid` when the file is not readable protobuf.
    """
    found: set[str] = set()
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _collect(data, 0, len(data), "model", found, 0)
    except ValueError as error:  # an empty file, or _MalformedError
        raise InputError(
            f"{path} is not an ONNX graph: {error}",
            code="graph-invalid",
            expected="a graph written by `edgeprune export`",
            hint="export the bundle again",
        ) from error
    return found


class _MalformedError(ValueError):
    """The bytes are no protobuf message."""


def _collect(data: mmap.mmap, start: int, end: int, message: str, found: set[str], depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise _MalformedError(f"messages are nested deeper than {_MAX_DEPTH}")
    for number, lo, hi in _fields(data, start, end):
        child = _CHILDREN[message].get(number)
        if child == "entry":
            pair = {n: data[a:b].decode("utf-8", "surrogateescape") for n, a, b in _fields(data, lo, hi)}
            if pair.get(1) == "location":
                found.add(pair.get(2, ""))
        elif child:
            _collect(data, lo, hi, child, found, depth + 1)


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield (number, start, end) of the length-delimited fields of a message, stepping over the others."""
    while at < end:
        tag, at = _varint(data, at, end)
        number, wire = tag >> 3, tag & 7
        size = 0
        if wire == 0:
            _, at = _varint(data, at, end)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        elif wire == 2:
            size, at = _varint(data, at, end)
        else:  # groups ended with proto2; ONNX has none
            raise _MalformedError(f"wire type {wire} at byte {at}")
        if at + size > end:
            raise _MalformedError(f"a field of {size} bytes at byte {at} runs past its message")
        if wire == 2:
            yield number, at, at + size
        at += size


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _MalformedError(f"a number is cut off at byte {at}")
