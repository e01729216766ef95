"""Engines: TensorRT's builder in a process of its own, caches, and choices by measurement. Neither torch nor onnx."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeprune.export.trt.api import build_engines, can_build_here
    from edgeprune.export.trt.options import BuildOptions

_HOMES = {"BuildOptions": "options", "build_engines": "api", "can_build_here": "api"}

__all__ = ["BuildOptions", "build_engines", "can_build_here"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"edgeprune.export.trt.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'edgeprune.export.trt' has no attribute '{name}'")
