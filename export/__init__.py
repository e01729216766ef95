"""The compiler: a pruned ViT in, a bundle out. Import it as `edgeprune.export`."""

from __future__ import annotations

if __name__ != "edgeprune.export":
    raise ImportError("import this package as 'edgeprune.export', not 'export'")

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeprune.export.api import ExportRequest, export_model, export_module, load_torch_model, plan_export

_API = ("ExportRequest", "export_model", "export_module", "load_torch_model", "plan_export")

__all__ = ["ExportRequest", "export_model", "export_module", "load_torch_model", "plan_export"]


def __getattr__(name: str) -> Any:
    if name in _API:
        return getattr(import_module("edgeprune.export.api"), name)
    raise AttributeError(f"module 'edgeprune.export' has no attribute '{name}'")
