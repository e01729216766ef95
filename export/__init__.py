"""The compiler: a pruned ViT in, a bundle out. Import it as `edgeprune.export`."""

from __future__ import annotations

if __name__ != "edgeprune.export":
    raise ImportError("import this package as 'edgeprune.export', not 'export'")

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeprune.export.adoption import adopt
    from edgeprune.export.api import export_model, load_torch_model, plan_export
    from edgeprune.export.modules import export_module
    from edgeprune.export.request import ExportRequest

_HOMES = {
    "adopt": "adoption",
    "ExportRequest": "request",
    "export_model": "api",
    "export_module": "modules",
    "load_torch_model": "api",
    "plan_export": "api",
}

__all__ = ["ExportRequest", "adopt", "export_model", "export_module", "load_torch_model", "plan_export"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"edgeprune.export.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'edgeprune.export' has no attribute '{name}'")
