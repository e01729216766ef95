"""Triton's config.pbtxt: the text form of its ModelConfig message, from plain values."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "bool": "TYPE_BOOL",
}


class Word(str):
    """A value that stands without quotes: a name of an enumeration."""

    __slots__ = ()


def data_type(dtype: str) -> Word:
    """Return Triton's name of a manifest's dtype."""
    return Word(_TYPES[dtype])


def render(fields: Mapping[str, Any]) -> str:
    """Return a message as text.

    Args:
        fields: by name: numbers, truth values, strings, `Word`s, messages as mappings, and lists of these. Of a map
            field the entries are messages of `key` and `value`.
    """
    return "\n".join(_lines(fields, "")) + "\n"


def _lines(fields: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, value in fields.items():
        if isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
            for one in value:
                yield from _message(name, one, indent)
        elif isinstance(value, Mapping):
            yield from _message(name, value, indent)
        elif isinstance(value, list):
            yield f"{indent}{name}: [{', '.join(map(_scalar, value))}]"
        else:
            yield f"{indent}{name}: {_scalar(value)}"


def _message(name: str, fields: Mapping[str, Any], indent: str) -> Iterator[str]:
    yield f"{indent}{name} {{"
    yield from _lines(fields, indent + "  ")
    yield f"{indent}}}"


def _scalar(value: Any) -> str:
    if isinstance(value, Word):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value)  # its escapes are those of the text form
    return str(value)
