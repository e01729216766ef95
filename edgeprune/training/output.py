"""Writing what training gave: a safetensors file and a JSON record beside it, whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import missing_package
from edgeprune.files import check_free, check_suffix, write_whole

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".safetensors"


def check_output(out: Path, overwrite: bool) -> None:
    """Raise before hours of training what would be raised after them.

    Raises:
        InputError: `output-suffix`, `output-exists` for the file or its record, `output-not-writable`.
    """
    check_suffix(out, SUFFIX)
    check_free((out, record_path(out)), overwrite)


def record_path(out: Path) -> Path:
    """Return where the record of a file stands."""
    return out.with_suffix(".json")


def write_output(
    out: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], record: Mapping[str, Any]
) -> tuple[Path, Path]:
    """Write the weights and the record; both are complete on the disk before either takes its name.

    Raises:
        InputError: `output-not-writable`.
        EnvironmentLackError: `disk-full`, `package-missing`.
    """
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise missing_package("safetensors", "train", "writing weights") from error

    weights = save(dict(tensors), dict(metadata))
    record = {"file": out.name, "sha256": hashlib.sha256(weights).hexdigest(), "bytes": len(weights), **record}
    write_whole({out: weights, record_path(out): (json.dumps(record, indent=1) + "\n").encode()})
    return out, record_path(out)
