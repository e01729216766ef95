from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from edgeprune.training import losses
from edgeprune.training.mixing import mix, neighbours, rectangle
from edgeprune.training.recipes import Recipe

PLAIN = Recipe(source="test", epochs=1, batch_size=4, lr=1e-3)
LABELS = torch.tensor([0, 1, 2, 2, 1])


def images() -> torch.Tensor:
    return torch.arange(1.0, 6.0).view(5, 1, 1, 1).expand(5, 3, 8, 8).clone()


def test_nothing_is_mixed_without_being_asked_for() -> None:
    pixels, labels = mix(images(), LABELS, 3, PLAIN, seed=0, step=0)
    assert torch.equal(pixels, images())
    assert labels is LABELS


def test_mixup_takes_the_same_share_of_images_and_targets() -> None:
    pixels, targets = mix(images(), LABELS, 3, replace(PLAIN, mixup=0.8), seed=0, step=3)
    share = targets[0, 0].item()
    assert 0 < share < 1
    assert targets[0].tolist() == pytest.approx([share, 1 - share, 0])
    assert targets[2].tolist() == [0, 0, 1]
    assert targets[4].tolist() == [0, 1, 0]
    assert pixels[0].unique().item() == pytest.approx(share * 1 + (1 - share) * 2)
    assert pixels[1].unique().item() == pytest.approx(share * 2 + (1 - share) * 1)
    assert torch.equal(pixels[4], images()[4])


def test_cutmix_weighs_the_targets_by_area() -> None:
    recipe = replace(PLAIN, cutmix=1.0)
    seen = set()
    for step in range(20):
        pixels, targets = mix(images(), LABELS, 3, recipe, seed=0, step=step)
        own = (pixels[0] == 1).float().mean().item()
        assert set(pixels[0].unique().tolist()) <= {1.0, 2.0}
        assert targets[0].tolist() == pytest.approx([own, 1 - own, 0], abs=1e-6)
        seen.add(round(own, 3))
    assert len(seen) > 5


def test_switch_and_probability() -> None:
    recipe = replace(PLAIN, mixup=0.8, cutmix=1.0, mixup_prob=0.5)
    kinds = []
    for step in range(60):
        pixels, targets = mix(images(), LABELS, 3, recipe, seed=1, step=step)
        assert targets.shape == (5, 3)
        assert targets.sum(1).tolist() == pytest.approx([1] * 5)
        values = pixels[0].unique().tolist()
        kinds.append("none" if values == [1.0] else "cut" if set(values) <= {1.0, 2.0} else "mix")
    assert all(kinds.count(kind) > 5 for kind in ("none", "cut", "mix"))


def test_part_of_a_batch_is_mixed_as_in_the_whole() -> None:
    recipe = replace(PLAIN, mixup=0.8, cutmix=1.0)
    for step in range(4):
        whole = mix(images()[:4], LABELS[:4], 3, recipe, seed=0, step=step)
        part = mix(images()[2:4], LABELS[2:4], 3, recipe, seed=0, step=step)
        assert all(torch.equal(a[2:], b) for a, b in zip(whole, part, strict=True))


def test_neighbours_and_rectangle() -> None:
    import numpy as np

    assert neighbours(5).tolist() == [1, 0, 3, 2, 4]
    assert rectangle((8, 16), 0.75, np.array([0.5, 0.5])) == (2, 6, 4, 12)
    assert rectangle((8, 16), 0.75, np.array([0.0, 0.99])) == (0, 2, 11, 16)
    assert rectangle((8, 16), 1.0, np.array([0.5, 0.5])) == (4, 4, 8, 8)


def test_smoothing_of_mixed_targets_is_timms() -> None:
    logits, (_, targets) = torch.randn(5, 3), mix(images(), LABELS, 3, replace(PLAIN, mixup=1.0), seed=0, step=0)
    smooth = targets * 0.9 + 0.1 / 3
    expected = -(smooth * logits.log_softmax(-1)).sum(1).mean()
    assert losses.classification(logits, targets, 0.1).item() == pytest.approx(expected.item(), rel=1e-5)
