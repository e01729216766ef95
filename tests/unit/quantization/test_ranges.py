"""Ranges of layers' inputs: on known values, by every method, and from the cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from edgeprune.errors import InputError
from edgeprune.quantization import ranges
from edgeprune.quantization.ranges import METHODS, PERCENTILE, observe_ranges, parse_method
from edgeprune.quantization.scheme import Range
from tests.helpers.lowering import noise, random_model, small, stages_of

Images = NDArray[np.float32]


class Chain(nn.Module):
    """The identity, then a layer: the second one reads what the first makes."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(8) * gain)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        out: torch.Tensor = self.second(self.first(x))
        return out


def batches(values: Images, size: int = 4) -> list[Images]:
    rows = values.reshape(-1, 8).astype(np.float32)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def ranges_of(values: Images, method: str, **options: Any) -> dict[str, Range]:
    return observe_ranges([Chain(2.0).eval()], ["first", "second"], batches(values), method, **options)


@pytest.mark.parametrize("method", ["minmax", "percentile:100"])
def test_whole_range(method: str) -> None:
    values = np.random.default_rng(0).uniform(-1, 3, 800)
    values[[7, 500]] = -1.5, 4.0  # in different batches
    found = ranges_of(values, method)
    tolerance = 0 if method == "minmax" else 8 / 2048  # a bin of the histogram of both signs
    assert found["first"] == pytest.approx((-1.5, 4.0), abs=tolerance)
    assert found["second"] == pytest.approx((-3.0, 8.0), abs=2 * tolerance)


def test_percentile_cuts_off_outliers_at_both_ends() -> None:
    values = np.linspace(-1, 1, 8000)
    values[4000] = 40.0
    low, high = ranges_of(np.random.default_rng(0).permutation(values), "percentile:99")["first"]
    # 1 % on the whole, and a bin is 80/2048 wide
    assert low == pytest.approx(-0.99, abs=0.06) and high == pytest.approx(0.99, abs=0.06)
    default = ranges_of(values, "percentile")["first"]
    assert default == ranges_of(values, f"percentile:{PERCENTILE}")["first"] != (low, high)


def test_entropy_keeps_the_bulk_and_not_a_lone_outlier() -> None:
    values = np.random.default_rng(0).standard_normal(8000)
    values[4000] = 60.0
    low, high = ranges_of(values, "entropy")["first"]
    assert -60 < low < -2 and 2 < high < 60


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, 0.5, -3.0])
def test_constant_input(method: str, value: float) -> None:
    low, high = ranges_of(np.full(64, value), method)["first"]
    assert np.isfinite([low, high]).all()
    assert min(low, 0) - 1e-2 <= value <= max(high, 0) + 1e-2 or method == "entropy"  # a bin of the histogram


@pytest.mark.parametrize("method", METHODS)
def test_late_outlier_does_not_make_entropy_slow(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).uniform(-1, 1, 640)
    values[600] = 1e3
    bins: list[int] = []
    ours = ranges._Histograms.ranges

    def counted(self: ranges._Histograms) -> dict[str, Range]:
        bins.extend(len(counts) for counts, *_ in self._collector.histogram_dict.values())
        return ours(self)

    monkeypatch.setattr(ranges._Histograms, "ranges", counted)
    assert ranges_of(values, method)["first"][1] > 0.5
    assert len(bins) == (0 if method == "minmax" else 2)
    assert method == "percentile" or set(bins) <= {ranges.BINS}


def test_several_models_have_one_range() -> None:
    values = np.random.default_rng(0).uniform(-1, 1, 80)
    models = [Chain(gain).eval() for gain in (1.0, 3.0, 2.0)]
    found = observe_ranges(models, ["first", "second"], batches(values), "minmax")
    assert found["second"] == pytest.approx((3 * values.min(), 3 * values.max()))
    assert [model.calls for model in models] == [len(batches(values))] * 3


def test_steps_are_reported_and_hooks_are_gone() -> None:
    model, told = Chain().eval(), list[float]()
    observe_ranges([model], ["first"], batches(np.ones(64)), "minmax", report=lambda step, share: told.append(share))
    assert told == [0.5, 1.0]
    assert not model.first._forward_pre_hooks


def test_pruned_model_is_what_is_observed() -> None:
    config = small(depth=3)
    model = random_model(config, stages_of(config, "evit", 0.5, "1"))
    layers, images = ["blocks.0.mlp.fc1", "blocks.2.mlp.fc2"], [noise(config, 4)]
    pruned = observe_ranges([model], layers, images, "minmax")
    dense = observe_ranges([model.with_stages(())], layers, images, "minmax")
    assert pruned["blocks.0.mlp.fc1"] == dense["blocks.0.mlp.fc1"]
    assert pruned["blocks.2.mlp.fc2"] != dense["blocks.2.mlp.fc2"]


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("entropy", ("entropy", PERCENTILE)),
        ("minmax", ("minmax", PERCENTILE)),
        ("percentile", ("percentile", PERCENTILE)),
        ("percentile:99.9", ("percentile", 99.9)),
        ("percentile:100", ("percentile", 100.0)),
    ],
)
def test_methods_are_parsed(text: str, parsed: tuple[str, float]) -> None:
    assert parse_method(text) == parsed


@pytest.mark.parametrize(
    "text", ["", "max", "entropy:9", "percentile:", "percentile:50", "percentile:101", "percentile:nan"]
)
def test_other_methods_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="no calibration method") as caught:
        parse_method(text)
    assert caught.value.code == "calibration-method"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("method", METHODS)
def test_values_that_are_not_finite_are_refused(method: str, bad: float) -> None:
    values = np.ones(64)
    values[50] = bad
    with pytest.raises(InputError, match="what layer first reads is not finite") as caught:
        ranges_of(values, method)
    assert caught.value.code == "calibration"


def test_refused_values_are_not_cached(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        ranges_of(np.full(64, np.nan), "minmax", cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ the cache


def cached(
    cache: Path,
    values: Images | None = None,
    method: str = "percentile",
    weights: str = "a",
    layers: Sequence[str] = ("first",),
) -> tuple[dict[str, Range], bool]:
    """Return the ranges and whether the model ran."""
    model = Chain().eval()
    values = np.arange(64.0) if values is None else values
    found = observe_ranges([model], layers, batches(values), method, cache=cache, weights=weights)
    return found, model.calls > 0


@pytest.mark.parametrize("method", METHODS)
def test_same_question_does_not_run_the_model(tmp_path: Path, method: str) -> None:
    first, ran = cached(tmp_path / "cache", method=method)
    again, ran_again = cached(tmp_path / "cache", method=method)
    assert (ran, ran_again) == (True, False)
    assert first == again


@pytest.mark.parametrize(
    "other",
    [
        {"values": np.arange(64.0) + 1},
        {"method": "minmax"},
        {"method": "percentile:99"},
        {"weights": "b"},
        {"layers": ("first", "second")},
    ],
    ids=["images", "method", "percentile", "weights", "layers"],
)
def test_other_questions_do(tmp_path: Path, other: dict[str, Any]) -> None:
    cached(tmp_path)
    assert cached(tmp_path, **other)[1]
    assert not cached(tmp_path, **other)[1]
    assert not cached(tmp_path)[1]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"first": 3}',
        '{"first": [1]}',
        '{"first": ["a", 1]}',
        '{"first": [NaN, 1]}',
        '{"first": [0, 1e999]}',
    ],
)
def test_damaged_entry_is_made_again(tmp_path: Path, content: str) -> None:
    expected, _ = cached(tmp_path)
    (entry,) = tmp_path.iterdir()
    entry.write_text(content)
    assert cached(tmp_path) == (expected, True)
    assert json.loads(entry.read_text())["first"] == list(expected["first"])
    assert cached(tmp_path) == (expected, False)


def test_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    found, ran = cached(tmp_path / "file" / "cache")
    assert ran and found == cached(tmp_path / "good")[0]
