"""`edgeprune doctor`."""

from __future__ import annotations

from typing import Any

from edgeprune.cli.common import verb
from edgeprune.cli.machine import CHECKS
from edgeprune.cli.ui import Ui, table
from edgeprune.errors import EnvironmentLackError


@verb("doctor", "Check Python, packages, processor, disk and devices. Exit code 3 when something required is missing.")
def command(ui: Ui) -> list[dict[str, Any]]:
    """Print every finding."""
    findings = [finding for check in CHECKS for finding in check()]
    ui.results = [vars(finding) for finding in findings]
    shown = table("check", "", "found", "fix")
    for f in findings:
        shown.add_row(f.check, f.level, f.found, f.fix or "")
    ui.data(shown)
    failed = [f for f in findings if f.level == "fail"]
    if failed:
        raise EnvironmentLackError(
            f"required but not right: {', '.join(f.check for f in failed)}",
            code="doctor",
            hint=failed[0].fix,
            details={"failed": [f.check for f in failed]},
        )
    return ui.results
