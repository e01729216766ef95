"""Texts of options to values: sizes, ranges, KEY=VALUE pairs, label files."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import click

from edgeprune.errors import InputError
from edgeprune.models.config import ViTConfig
from edgeprune.pruning import get_method
from edgeprune.pruning.base import RateUse

_OWN_OPTIONS = {"image_size": "--image-size", "patch_size": "--patch-size", "num_classes": "--num-classes"}
_BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class ImageSize(click.ParamType):
    """224, or 224x320 for height x width."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Return (height, width)."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d+)(?:[x,](\d+))?", value.strip())
        if match is None or 0 in (sides := (int(match[1]), int(match[2] or match[1]))):
            self.fail(f"'{value}' is not a size; expected for example 224 or 224x320 (height x width)", param, ctx)
        return sides


class KeepRates(click.ParamType):
    """0.7, or 1.0,0.7,0.5 for several in one bundle."""

    name = "SHARE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Return the rates in the order given."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"'{value}' is not a keep rate; expected for example 0.7, or 1.0,0.7,0.5", param, ctx)


class BatchRange(click.ParamType):
    """8, or 1:8 for any batch from 1 to 8."""

    name = "BATCH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Return (smallest, largest)."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d+)(?::(\d+))?", value.strip())
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= low <= high:
            self.fail(f"'{value}' is not a batch; expected for example 1, 8 or 1:8", param, ctx)
        return low, high


class Batches(click.ParamType):
    """1,8: batch sizes."""

    name = "LIST"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Return the sizes, each once, the smallest first."""
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in value.split(",")]
        if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
            self.fail(f"'{value}' is not a list of batches; expected for example 1 or 1,8", param, ctx)
        return tuple(sorted({int(part) for part in parts}))


class ByteSize(click.ParamType):
    """1GiB, 512MiB, 1.5GB: a size with its unit."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return bytes."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG])(i?)B", value.strip(), re.IGNORECASE)
        size = 0
        if match:
            base = 1024 if match[3] else 1000
            size = int(float(match[1]) * base ** ("KMG".index(match[2].upper()) + 1))
        if not 0 < size < 1 << 50:
            self.fail(
                f"'{value}' is not a size; expected a number and KiB, MiB, GiB, KB, MB or GB, as in 1GiB", param, ctx
            )
        return size


def key_values(texts: Iterable[str], option: str) -> dict[str, str]:
    """Return KEY=VALUE texts as a dictionary; hyphens in keys become underscores.

    Raises:
        InputError: `key-value` when a text has no '=' or a key comes twice.
    """
    pairs: dict[str, str] = {}
    for text in texts:
        key, found, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not found or not key or key in pairs:
            what = f"gives '{key}' a second time" if found and key else "is not KEY=VALUE"
            raise InputError(
                f"{option} {text} {what}",
                code="key-value",
                expected="KEY=VALUE, each key once",
                hint=f"for example {option} {'fuse=false' if 'method' in option else 'reg_tokens=4'}",
            )
        pairs[key] = value.strip()
    return pairs


def model_options(texts: Iterable[str]) -> dict[str, Any]:
    """Return fields of `ViTConfig` from KEY=VALUE texts, with the types the fields have.

    Raises:
        InputError: `key-value`, or `model-option` for an unknown field or a value of another type.
    """
    hints = get_type_hints(ViTConfig)
    fields = [f.name for f in dataclasses.fields(ViTConfig) if f.name not in ("name", *_OWN_OPTIONS)]
    values: dict[str, Any] = {}
    for name, text in key_values(texts, "--model-option").items():
        if name not in fields:
            raise InputError(
                f"--model-option {name}={text}: a model has no such field",
                code="model-option",
                expected=f"one of {', '.join(fields)}",
                hint=f"use {_OWN_OPTIONS[name]}" if name in _OWN_OPTIONS else "run `edgeprune models` for the models",
            )
        values[name] = _parse_field(name, text, hints[name])
    return values


def _parse_field(name: str, text: str, kind: Any) -> Any:
    try:
        if kind is bool:
            return _BOOLS[text.lower()]
        if kind in (int, float, str):
            return kind(text)
        parts = tuple(float(part) for part in text.split(","))
        if len(parts) == 3:
            return parts
        raise ValueError(text)
    except (KeyError, ValueError):
        words = {bool: "true or false", int: "a whole number", float: "a number"}
        raise InputError(
            f"--model-option {name}={text} does not fit",
            code="model-option",
            expected=words.get(kind, "three numbers such as 0.5,0.5,0.5"),
        ) from None


def read_labels(path: Path) -> list[str]:
    """Return class names from a file with one per line, or with a JSON list.

    Raises:
        InputError: `labels-unreadable`.
    """
    expected = "a text file with one class name per line, or a JSON list of names"
    try:
        text = path.read_text(encoding="utf-8")
        if not text.lstrip().startswith("["):
            labels = [line.strip() for line in text.splitlines()]
            labels = labels[: max((i + 1 for i, label in enumerate(labels) if label), default=0)]
        else:
            labels = json.loads(text)
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot read the labels in {path}: {error}", code="labels-unreadable", expected=expected
        ) from error
    if not labels or not all(isinstance(label, str) and label for label in labels):
        raise InputError(f"{path} does not hold class names only", code="labels-unreadable", expected=expected)
    return labels


def keep_rate(rates: tuple[float, ...] | None, method: str, settings: Mapping[str, str], stages: str | None) -> float:
    """Return the first value of --keep-rate; 1 where it is left out and need not be given.

    Raises:
        InputError: `keep-rate` when the method needs one; `method-unknown`, `method-option`.
    """
    found = get_method(method)
    use = found.rate_use(found.parse_options(settings))
    if rates is None and use is RateUse.REQUIRED and method != "dense" and ":" not in (stages or ""):
        raise InputError(
            f"no keep rate for method '{method}'",
            code="keep-rate",
            expected="--keep-rate, the share of tokens that stays, or a rate for every stage",
            hint="add --keep-rate 0.7, or --stages 3:0.7,6:0.5,9:0.35",
        )
    return 1.0 if rates is None else rates[0]
