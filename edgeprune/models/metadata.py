"""What a weight file of ours says of its weights, as texts beside the tensors of a safetensors file. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeprune.errors import InputError
from edgeprune.models.config import ViTConfig
from edgeprune.models.registry import MODELS
from edgeprune.version import __version__

TOOL = "edgeprune"
FIRST_FILES = frozenset({"model", "method", "keep_rate", "seed", "top1"})  # before files named their tool
OWN_OPTIONS = ("name", "image_size", "num_classes")


@dataclass(frozen=True)
class WeightsInfo:
    """The model and the method weights are for.

    Attributes:
        keep_rate: share of tokens that stays; None when unknown or without meaning.
        stages: blocks as `--stages` takes them; None for the method's own places.
        method_options: settings of the method.
        model_options: fields of `ViTConfig` that differ from the registered model.
        num_classes, image_size: None when the file does not say.
    """

    model: str
    method: str
    keep_rate: float | None = None
    stages: str | None = None
    method_options: Mapping[str, Any] = field(default_factory=dict)
    model_options: Mapping[str, Any] = field(default_factory=dict)
    num_classes: int | None = None
    image_size: tuple[int, int] | None = None

    def to_metadata(self) -> dict[str, str]:
        """Return the texts; what is None is left out."""
        texts = {
            "format": "pt",
            "tool": TOOL,
            "tool_version": __version__,
            "model": self.model,
            "method": self.method,
            "keep_rate": None if self.keep_rate is None else repr(float(self.keep_rate)),
            "stages": self.stages,
            "method_options": json.dumps(dict(self.method_options), sort_keys=True),
            "model_options": json.dumps(dict(self.model_options), sort_keys=True),
            "num_classes": None if self.num_classes is None else str(self.num_classes),
            "image_size": None if self.image_size is None else "x".join(map(str, self.image_size)),
        }
        return {name: text for name, text in texts.items() if text is not None}

    def options(self) -> str:
        """Return the model and method as options of the command line."""
        words = [f"--model {self.model} --method {self.method}"]
        words += [] if self.stages is None else [f"--stages {self.stages}"]
        words += [f"--method-option {name}={_text(value)}" for name, value in self.method_options.items()]
        words += [f"--model-option {name}={_text(value)}" for name, value in self.model_options.items()]
        return " ".join(words)


def read_metadata(metadata: Mapping[str, str], file: str) -> WeightsInfo | None:
    """Return what a file of ours says; None for the file of another tool.

    Raises:
        InputError: `checkpoint-metadata` when a text cannot be read.
    """
    if metadata.get("tool") != TOOL and not metadata.keys() >= FIRST_FILES:
        return None
    try:
        rate, size, classes = (metadata.get(name) for name in ("keep_rate", "image_size", "num_classes"))
        height, width = (int(side) for side in size.split("x")) if size else (0, 0)
        options, fields = (json.loads(metadata.get(name, "{}")) for name in ("method_options", "model_options"))
        return WeightsInfo(
            model=metadata["model"],
            method=metadata["method"],
            keep_rate=None if rate is None else float(rate),
            stages=metadata.get("stages"),
            method_options=dict(options),
            model_options={k: tuple(v) if isinstance(v, list) else v for k, v in dict(fields).items()},
            num_classes=None if classes is None else int(classes),
            image_size=(height, width) if size else None,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"the metadata of checkpoint '{file}' cannot be read: {error!r}",
            code="checkpoint-metadata",
            expected="the texts edgeprune writes into its files",
            hint="write the file again from its source",
        ) from error


def changed_fields(config: ViTConfig) -> dict[str, Any]:
    """Return the fields in which a model differs from the registered one, but for those with options of their own."""
    if config.name not in MODELS:
        return {}
    ours, theirs = config.to_dict(), MODELS[config.name].to_dict()
    return {name: value for name, value in ours.items() if name not in OWN_OPTIONS and value != theirs[name]}


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
