"""Every method through the command line: exported, verified, run, drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeprune.pruning import METHODS
from tests.cli.conftest import DIGITS, Cli

SETTINGS = {
    "dynamicvit": ("--keep-rate", "0.5"),
    "evit": ("--keep-rate", "0.5"),
    "random": ("--keep-rate", "0.5"),
    "ats": ("--method-option", "variant=official"),
    "asvit": ("--method-option", "count=image"),
    "sait": ("--method-option", "select=mass", "--method-option", "mass=0.5"),
    "cropr": ("--method-option", "tokens_per_block=12", "--method-option", "llf=true"),
    "tome": ("--method-option", "r=13"),
}
ADAPTIVE = {"ats", "asvit", "sait"}


def test_settings_cover_every_method() -> None:
    assert set(SETTINGS) == set(METHODS) - {"dense"}


@pytest.mark.parametrize("method", SETTINGS)
def test_method_goes_from_export_to_overlay(cli: Cli, tmp_path: Path, method: str) -> None:
    bundle, image, drawn = tmp_path / "bundle", tmp_path / "image.png", tmp_path / "drawn"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(image)
    exported = cli("export", *DIGITS, "--method", method, *SETTINGS[method], "--token-outputs", "-o", bundle, "--json")
    assert exported.code == 0, exported.err
    manifest = exported.json["results"]["manifest"]
    assert any(stage["adaptive"] for stage in manifest["method"]["stages"]) is (method in ADAPTIVE)
    assert {"kept_counts"} <= {output["name"] for output in manifest["graphs"]["model"]["outputs"]}
    assert manifest["method"]["notes"] == list(METHODS[method].notes)
    assert cli("verify", bundle).code == 0
    found = cli("run", bundle, image, "--overlay", drawn, "--json").json["results"]["images"][0]
    assert found["overflow"] is False
    last = [patch for patch in found["kept"][-1] if patch >= 0]
    assert all(0 <= patch < 64 for patch in last) and len(set(last)) == len(last)
    pixels = np.asarray(Image.open(found["overlay"]).resize((64, 64), Image.Resampling.NEAREST))
    untouched = {p for p in range(64) if np.array_equal(*(x[patch_of(p)] for x in (pixels, noise)))}
    assert untouched == set(last)


def patch_of(number: int) -> tuple[slice, slice]:
    row, column = divmod(number, 8)
    return slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8)
