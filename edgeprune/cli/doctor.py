"""`edgeprune doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeprune.cli.bundle_checks import check_bundle
from edgeprune.cli.common import BUNDLE, verb
from edgeprune.cli.machine import CHECKS
from edgeprune.cli.ui import Ui, table
from edgeprune.errors import EnvironmentLackError
from edgeprune.runtime.bundle import load_bundle


@verb(
    "doctor",
    "Check this machine: Python, packages, processor, memory, disk and devices, a Jetson's power mode. With a bundle "
    "also whether it runs here: what stops which TensorRT, which engines fit, which are stale.\n\nExit code 3 when "
    "something required is missing.",
)
@click.argument("bundle", type=BUNDLE, required=False)
def command(ui: Ui, bundle: Path | None) -> list[dict[str, Any]]:
    """Print every finding."""
    loaded = None if bundle is None else load_bundle(bundle)
    findings = [finding for check in CHECKS for finding in check()]
    if loaded is not None:
        findings += check_bundle(loaded)
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
