"""Writing what training gave: a safetensors file and a JSON record beside it, whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import EdgepruneError, EnvironmentLackError, InputError, missing_package

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".safetensors"


def check_output(out: Path, overwrite: bool) -> None:
    """Raise before hours of training what would be raised after them.

    Raises:
        InputError: `output-suffix`, `output-exists` for the file or its record, `output-not-writable`.
    """
    if out.suffix != SUFFIX:
        raise InputError(
            f"--output {out} does not end in {SUFFIX}",
            code="output-suffix",
            expected=f"a file name ending in {SUFFIX}",
            hint=f"--output {out.with_suffix(SUFFIX) if out.name else 'model' + SUFFIX}",
        )
    for path in (out, record_path(out)):
        if path.is_dir() or (path.exists() and not overwrite):
            raise InputError(
                f"'{path}' exists",
                code="output-exists",
                expected="a name that is free",
                hint="choose another --output" + ("" if path.is_dir() else ", or add --overwrite"),
            )
    parent = next(p for p in (out.absolute().parent, *out.absolute().parent.parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise _not_writable(out, f"'{parent}' is not a directory one may write to")


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
    contents = {out: weights, record_path(out): (json.dumps(record, indent=1) + "\n").encode()}
    parts = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in contents}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for path, content in contents.items():
            with parts[path].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, part in parts.items():
            part.replace(path)
    except OSError as error:
        raise explain(out, error) from error
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    return out, record_path(out)


def explain(out: Path, error: OSError) -> EdgepruneError:
    """Return the error for a write that failed: `disk-full` or `output-not-writable`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EnvironmentLackError(
            f"no space left for '{out}'", code="disk-full", hint="free some space or choose another --output"
        )
    return _not_writable(out, error.strerror or str(error))


def _not_writable(out: Path, why: str) -> InputError:
    return InputError(
        f"cannot write '{out}': {why}",
        code="output-not-writable",
        expected="a directory one may write to",
        hint="choose another --output",
    )
