from __future__ import annotations

import math

import pytest
import torch

from edgeprune.training import losses


def test_ratio_of_a_hand_example() -> None:
    first = torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 0]])  # kept shares 0.75 and 0.5
    second = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]])  # 0.25 and 0
    expected = ((0.05**2 + 0.2**2) / 2 + (0.24**2 + 0.49**2) / 2) / 2
    assert losses.ratio([first, second], [0.7, 0.49]).item() == pytest.approx(expected, rel=1e-6)


def test_ratio_punishes_every_image_and_not_the_mean_of_the_batch() -> None:
    uneven = torch.tensor([[1.0, 1], [0, 0]])
    assert losses.ratio([uneven], [0.5]).item() == pytest.approx(0.25)


def test_distillation_is_the_divergence_of_the_student_from_the_teacher() -> None:
    teacher, student = torch.tensor([[0.2, 0.8]]), torch.tensor([[0.5, 0.5]])
    expected = 0.2 * math.log(0.2 / 0.5) + 0.8 * math.log(0.8 / 0.5)
    assert losses.distillation(student.log(), teacher.log()).item() == pytest.approx(expected, rel=1e-5)


def test_token_distillation_counts_kept_tokens_only() -> None:
    teacher = torch.zeros(1, 3, 2)
    student = torch.tensor([[[1.0, 1], [2, 0], [9, 9]]])
    keep = torch.tensor([[1.0, 1, 0]])
    assert losses.token_distillation(student, teacher, keep).item() == pytest.approx((1 + 2) / 2)


def test_token_distillation_is_zero_when_nothing_is_kept() -> None:
    ones = torch.ones(2, 3, 4)
    assert losses.token_distillation(ones, ones + 1, torch.zeros(2, 3)).item() == 0


def test_token_class_distillation_is_the_mean_divergence_of_kept_tokens() -> None:
    teacher = torch.tensor([[[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]]])
    student = torch.tensor([[[0.5, 0.5], [0.5, 0.5], [0.1, 0.9]]])
    keep = torch.tensor([[1.0, 1, 0]])
    expected = (0.2 * math.log(0.2 / 0.5) + 0.8 * math.log(0.8 / 0.5) + 0) / 2
    value = losses.token_class_distillation(student.log(), teacher.log(), keep)
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_token_class_distillation_is_zero_when_nothing_is_kept() -> None:
    ones = torch.ones(2, 3, 4)
    assert losses.token_class_distillation(ones, ones * torch.arange(4.0), torch.zeros(2, 3)).item() == 0


def test_classification_smooths_labels() -> None:
    logits = torch.tensor([[2.0, 0.0]])
    log = logits.log_softmax(-1)[0]
    expected = -(0.95 * log[0] + 0.05 * log[1])
    assert losses.classification(logits, torch.tensor([0]), 0.1).item() == pytest.approx(expected.item(), rel=1e-6)
