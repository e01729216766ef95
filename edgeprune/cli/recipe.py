"""`edgeprune export --recipe`: what a recipe says where no option says otherwise."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from edgeprune.cli import parse
from edgeprune.cli.ui import Ui
from edgeprune.search.recipe import Recipe

PLAIN = ("model", "image_size", "patch_size", "num_classes", "target", "batch")


def apply_recipe(ui: Ui, recipe: Recipe, options: dict[str, Any], given: Collection[str]) -> dict[str, Any]:
    """Return the options of an export with those of a recipe; given ones win, with a note when they differ.

    Args:
        ui: takes the notes.
        recipe: the recipe.
        options: of the command, by parameter.
        given: parameters the user has set.
    """
    made = dict(options)
    for name in PLAIN:
        own = getattr(recipe, name)
        if name not in given:
            made[name] = own if own is not None else options[name]
        elif options[name] != own:
            _overridden(ui, f"--{name.replace('_', '-')} {_words(options[name])}", _words(own))
    made["model_option"] = _merged(ui, "--model-option", recipe.model_options, options["model_option"])
    if "method" in given and options["method"] != recipe.method:
        _overridden(ui, f"--method {options['method']}", f"{recipe.method} and its schedule")
        return made
    made["method"] = recipe.method
    made["method_option"] = _merged(ui, "--method-option", recipe.method_options, options["method_option"])
    if {"keep_rate", "stages"} & set(given):
        _overridden(ui, "--keep-rate or --stages", recipe.stages or "the method's own blocks")
    else:
        made["stages"] = recipe.stages
    if recipe.weights.ema and "ema" not in given and options["checkpoint"] is not None:
        made["ema"] = True
    return made


def weights_differ(recipe: Recipe, sha256: str | None) -> str | None:
    """Return what to say when a bundle's weights are not those the recipe was found with."""
    if sha256 == recipe.weights.sha256:
        return None
    return (
        f"the recipe was found with {recipe.weights.file or 'random weights'}, another checkpoint: the accuracy it "
        "expects does not hold for this one"
    )


def _merged(ui: Ui, option: str, own: dict[str, Any], texts: tuple[str, ...]) -> tuple[str, ...]:
    """Return KEY=VALUE texts of both; those of the user win."""
    theirs = parse.key_values(texts, option)
    for name in own.keys() & theirs.keys():
        if theirs[name] != _words(own[name]):
            _overridden(ui, f"{option} {name}={theirs[name]}", _words(own[name]))
    merged = {**{name: _words(value) for name, value in own.items()}, **theirs}
    return tuple(f"{name}={value}" for name, value in merged.items())


def _words(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _overridden(ui: Ui, given: str, own: str) -> None:
    ui.warn(f"{given} replaces the recipe's {own}: what the recipe expects no longer holds")
