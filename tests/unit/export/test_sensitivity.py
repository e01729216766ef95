"""Layers that stay float: those named, and those found to cost most for what they save."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeprune.errors import CheckFailed, InputError
from edgeprune.export import quantize as module
from edgeprune.export.quantized_accuracy import ImageSet
from edgeprune.export.sensitivity import choose_float, log_softmax, lost, match_layers, parse_keep_float
from edgeprune.pruning.model import PrunedViT
from edgeprune.quantization import Quantization, linear_layers
from edgeprune.quantization.fake import fake_quantized
from tests.helpers.lowering import noise, random_model, small

CONFIG = small(depth=3)
LAYERS = linear_layers(CONFIG)
ALL = Quantization("int8", "dynamic", frozenset(LAYERS), weight_bits=7)
SENSITIVE = "blocks.1.mlp.fc2"


def sensitive() -> PrunedViT:
    """Return a model in which a layer's input has one channel far larger than the others, which nothing reads."""
    model = random_model(CONFIG)
    block = model.blocks[1]
    with torch.no_grad():
        block.mlp.fc1.bias[5] = 1e5
        block.mlp.fc2.weight[:, 5] = 0
    return model


def chosen(model: PrunedViT, points: float, gains: dict[str, float] | None = None) -> list[str]:
    images = ImageSet("noise", noise(CONFIG, 48), None)
    quantized = partial(fake_quantized, model, per_image=True)
    gains = gains or dict.fromkeys(LAYERS, 1.0)
    return choose_float(quantized, ALL, model, images, gains, points, lambda step, share: None)


def test_layer_with_an_outlier_stays_float() -> None:
    found = chosen(sensitive(), 10.0)
    assert found == [SENSITIVE]
    assert chosen(random_model(CONFIG), 10.0) == []


def test_more_layers_stay_float_for_less_loss() -> None:
    model = sensitive()
    strict = chosen(model, 0.0)
    assert SENSITIVE in strict and strict == sorted(strict)
    assert len(strict) >= len(chosen(model, 10.0))
    assert chosen(model, 99.0) == []


@pytest.mark.parametrize("gain", [0.0, -1.0], ids=["nothing", "a loss"])
def test_gains_of_nothing_do_not_turn_the_order_around(gain: float) -> None:
    assert chosen(sensitive(), 10.0, dict.fromkeys(LAYERS, gain)) == [SENSITIVE]


def test_layer_that_saves_nothing_is_the_first_to_stay_float() -> None:
    gains = dict.fromkeys(LAYERS, 1.0) | {"blocks.0.attn.proj": -0.1}
    assert "blocks.0.attn.proj" in chosen(sensitive(), 10.0, gains)


def test_labels_count_what_only_the_float_model_gets_right() -> None:
    ours, theirs = np.eye(4)[[0, 1, 2, 3]], np.eye(4)[[0, 2, 1, 0]]
    images = np.zeros((4, 1, 1, 1), np.float32)
    assert lost(ours, theirs, ImageSet("x", images, np.array([0, 2, 2, 0]))) == pytest.approx(1 / 4)
    assert lost(ours, theirs, ImageSet("x", images, None)) == pytest.approx(3 / 4)
    np.testing.assert_allclose(np.exp(log_softmax(1000 * ours)).sum(1), 1)


@pytest.mark.parametrize(
    ("texts", "parsed"),
    [
        ((), ([], None)),
        (("blocks.0.*", "auto:0.2", "*.fc2"), (["blocks.0.*", "*.fc2"], 0.2)),
        (("auto:0",), ([], 0.0)),
    ],
)
def test_options_are_parsed(texts: tuple[str, ...], parsed: tuple[list[str], float | None]) -> None:
    assert parse_keep_float(texts) == parsed


@pytest.mark.parametrize(
    "texts", [("auto",), ("auto:",), ("auto:x",), ("auto:nan",), ("auto:100",), ("auto:1", "auto:2")]
)
def test_wrong_options_are_refused(texts: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        parse_keep_float(texts)
    assert caught.value.code == "keep-float"


def test_patterns_name_layers() -> None:
    assert match_layers(["blocks.2.attn.*", "blocks.0.mlp.fc1"], LAYERS) == [
        "blocks.0.mlp.fc1", "blocks.2.attn.qkv", "blocks.2.attn.proj",
    ]  # fmt: skip
    assert match_layers([], LAYERS) == []
    with pytest.raises(InputError, match=r"no linear layer 'blocks\.7\.\*'") as caught:
        match_layers(["*.fc1", "blocks.7.*"], LAYERS)
    assert caught.value.code == "keep-float"


def test_export_in_which_every_layer_costs_too_much_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeprune.export import ExportRequest, export_model

    monkeypatch.setattr(module, "choose_float", lambda _, quantization, *args: sorted(quantization.layers))
    monkeypatch.setattr("edgeprune.export.quantized_accuracy.JUDGED_IMAGES", 8)
    request = ExportRequest(
        model="vit_digits", model_options={"depth": 2, "embed_dim": 32, "num_heads": 2}, target="ort-cpu-int8",
        random_weights=True, calibration="digits", calibration_images=8, quantization="dynamic",
        keep_float=("auto:0.2",),
    )  # fmt: skip
    with pytest.raises(CheckFailed, match=r"costs more than 0\.2 points") as caught:
        export_model(request, tmp_path / "bundle")
    assert caught.value.code == "keep-float" and list(tmp_path.iterdir()) == []
