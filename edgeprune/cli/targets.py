"""`edgeprune targets`."""

from __future__ import annotations

from typing import Any

from edgeprune.cli.common import verb
from edgeprune.cli.ui import Ui, table


@verb("targets", "List the targets of --target, and why one is unavailable here.")
def command(ui: Ui) -> list[dict[str, Any]]:
    """Print the targets."""
    from edgeprune.export.targets.registry import TARGETS

    shown = table("target", "precision", ">opset", "what it is", "exported here", "runs here")
    rows = []
    for target in TARGETS.values():
        reason, not_runnable = target.why_unavailable(), target.why_not_runnable()
        shown.add_row(
            target.name,
            target.precision,
            str(target.opset or "-"),
            target.summary,
            *(f"no: {why}" if why else "yes" for why in (reason, not_runnable)),
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
                "runnable": not_runnable is None,
                "why_not_runnable": not_runnable,
            }
        )
    ui.data(shown)
    return rows
