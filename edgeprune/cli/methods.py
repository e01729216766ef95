"""`edgeprune methods`."""

from __future__ import annotations

from typing import Any

from edgeprune.cli.common import verb
from edgeprune.cli.ui import Ui, table
from edgeprune.pruning import METHODS
from edgeprune.pruning.base import Method, MethodOption, RateUse


@verb("methods", "List the pruning methods and the options of --method-option.")
def command(ui: Ui) -> list[dict[str, Any]]:
    """Print the methods."""
    shown = table("method", "what it does", "keep rate", "source", "options")
    notes = table("method", "notes")
    rows = []
    for method in METHODS.values():
        options = "\n".join(f"{o.name}={_text(o.default)}: {o.help}" for o in method.options)
        rate = rate_use(method)
        shown.add_row(method.name, method.summary, rate, method.source or "-", options or "-")
        for i, note in enumerate(method.notes):
            notes.add_row("" if i else method.name, note)
        rows.append(
            {
                "name": method.name,
                "summary": method.summary,
                "source": method.source or None,
                "keep_rate": rate,
                "needs_class_token": method.needs_class_token,
                "options": [_describe(option) for option in method.options],
                "notes": list(method.notes),
            }
        )
    ui.data(shown)
    ui.data("")
    ui.data(notes)
    return rows


def rate_use(method: Method) -> str:
    """Return what --keep-rate means to a method with its default options."""
    if method.name == "dense":
        return RateUse.NONE.value
    return method.rate_use(method.parse_options({})).value


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
