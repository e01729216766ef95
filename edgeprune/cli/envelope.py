"""The JSON document of --json."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from edgeprune.cli.ui import Ui
from edgeprune.errors import EdgepruneError

SCHEMA = "edgeprune-cli/1"
STATUS = {0: "ok", 1: "failed"}


def make_envelope(ui: Ui, exit_code: int, error: EdgepruneError | None) -> str:
    """Return the document of a command that has ended."""
    from edgeprune.bench.fingerprint import take_fingerprint

    document = {
        "schema": SCHEMA,
        "command": ui.command,
        "status": STATUS.get(exit_code, "error"),
        "exit_code": exit_code,
        "results": ui.results,
        "warnings": ui.warnings,
        "environment": take_fingerprint().to_dict(),
    }
    if error is not None:
        fields = ("code", "message", "expected", "hint", "details")
        document["error"] = {name: getattr(error, name) for name in fields}
    return json.dumps(plain(document), indent=2, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """Return JSON-ready values: numpy, pydantic, dataclasses and paths become plain; NaN and infinity become null."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(v) for v in value]
    if hasattr(value, "model_dump"):
        return plain(value.model_dump())
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return plain(value.tolist())
    return str(value)
