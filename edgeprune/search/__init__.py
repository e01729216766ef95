"""Schedules by measured latency: which blocks prune how much so that a target meets a budget and loses least."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeprune.search.recipe import Recipe, load_recipe
    from edgeprune.search.request import SearchRequest
    from edgeprune.search.run import SearchResult, search_schedules

_HOMES = {
    "Recipe": "recipe",
    "SearchRequest": "request",
    "SearchResult": "run",
    "load_recipe": "recipe",
    "search_schedules": "run",
}

__all__ = ["Recipe", "SearchRequest", "SearchResult", "load_recipe", "search_schedules"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"edgeprune.search.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'edgeprune.search' has no attribute '{name}'")
