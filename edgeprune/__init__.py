"""edgeprune: token-pruned Vision Transformers that are truly fast on edge devices.

Importing this package loads no heavy library; the public names below are loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.version import __version__

# In a checkout the compiler lives in ../export; an installed package has it as a subpackage already.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "export" / "__init__.py").is_file():
    __path__.append(str(_root))

if TYPE_CHECKING:
    from edgeprune.export import export_model
    from edgeprune.runtime.session import Session

_LAZY = {"Session": "edgeprune.runtime.session", "export_model": "edgeprune.export"}

__all__ = ["Session", "__version__", "export_model"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'edgeprune' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
