"""`edgeprune targets`."""

from __future__ import annotations

from typing import Any

from edgeprune.cli.common import verb
from edgeprune.cli.ui import Ui, table


@verb("targets", "List the targets of --target, and why one is unavailable here.")
def command(ui: Ui) -> list[dict[str, Any]]:
    """Print the targets."""
    from edgeprune.export.targets.registry import TARGETS

    shown = table("target", "precision", ">opset", "what it is", "available here")
    rows = []
    for target in TARGETS.values():
        reason = target.why_unavailable()
        shown.add_row(
            target.name,
            target.precision,
            str(target.opset or "-"),
            target.summary,
            f"no: {reason}" if reason else "yes",
        )
        rows.append(
            {
                "name": target.name,
                "backend": target.backend,
                "precision": target.precision,
                "opset": target.opset or None,
                "summary": target.summary,
                "available": reason is None,
                "why_unavailable": reason,
            }
        )
    ui.data(shown)
    return rows
