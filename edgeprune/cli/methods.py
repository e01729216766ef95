"""`edgeprune methods`."""

from __future__ import annotations

from typing import Any

from edgeprune.cli.common import verb
from edgeprune.cli.ui import Ui, table
from edgeprune.pruning import METHODS
from edgeprune.pruning.base import MethodOption


@verb("methods", "List the pruning methods and the options of --method-option.")
def command(ui: Ui) -> list[dict[str, Any]]:
    """Print the methods."""
    shown = table("method", "what it does", "source", "options")
    rows = []
    for method in METHODS.values():
        options = "\n".join(f"{o.name}={_text(o.default)}: {o.help}" for o in method.options)
        shown.add_row(method.name, method.summary, method.source or "-", options or "-")
        rows.append(
            {
                "name": method.name,
                "summary": method.summary,
                "source": method.source or None,
                "needs_class_token": method.needs_class_token,
                "options": [_describe(option) for option in method.options],
            }
        )
    ui.data(shown)
    return rows


def _describe(option: MethodOption) -> dict[str, Any]:
    return {
        "name": option.name,
        "type": option.kind.__name__,
        "default": option.default,
        "choices": list(option.choices),
        "help": option.help,
    }


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
