"""The losses of all methods, as functions of tensors. Each returns a scalar."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from edgeprune.training.distributed import mean_over_processes


def classification(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of logits [B, classes] with labels [B] int64 or [B, classes] shares, averaged over the batch."""
    return F.cross_entropy(logits, labels, label_smoothing=smoothing)


def ratio(decisions: Sequence[Tensor], rates: Sequence[float]) -> Tensor:
    """Squared distance of every image's kept share from the target, averaged over the batch and the stages.

    Args:
        decisions: per stage [B, N] in {0, 1}, over all initial tokens.
        rates: per stage, the share of the initial tokens that should stay.

    Source: DynamicViT (arXiv 2106.02034) eq. 18.
    """
    parts = [(keep.mean(1) - rate).square().mean() for keep, rate in zip(decisions, rates, strict=True)]
    return sum(parts[1:], parts[0]) / len(parts)


def distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence of the student's class distribution from the teacher's, batch mean, temperature 1.

    Args:
        student: logits [B, classes].
        teacher: logits [B, classes], without gradient.

    Source: DynamicViT (arXiv 2106.02034) eq. 17, in the direction of the official code: KL(teacher || student).
    """
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)


def token_distillation(student: Tensor, teacher: Tensor, keep: Tensor) -> Tensor:
    """Mean squared error between token features, over the kept tokens of all processes; 0 when none is kept.

    Args:
        student: [B, N, D] normed patch features.
        teacher: [B, N, D] the same of the dense model, without gradient.
        keep: [B, N] in {0, 1}, the last decision, without gradient.

    Source: DynamicViT (arXiv 2106.02034) eq. 16.
    """
    error = (student - teacher).square().mean(-1)
    return (error * keep).sum() / mean_over_processes(keep.sum()).clamp(min=1)


def token_class_distillation(student_logits: Tensor, teacher_logits: Tensor, keep: Tensor) -> Tensor:
    """KL divergence between the class scores of kept tokens, averaged over all kept tokens of the batch, temperature 1.

    It stands in for `token_distillation` where a head scores every token (LV-ViT); 0 when no token is kept.

    Args:
        student_logits: [B, N, classes] of the aux head.
        teacher_logits: [B, N, classes] the same of the dense model, without gradient.
        keep: [B, N] in {0, 1}, the last decision, without gradient.

    Source: the official code of DynamicViT for LV-ViT, KL(teacher || student); raoyongming/DynamicViT#12 says why.
    """
    student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return (divergence * keep).sum() / mean_over_processes(keep.sum()).clamp(min=1)


def budget(gmacs: Tensor, target: float) -> Tensor:
    """Distance of the mean operations of an image from the budget, both in units of 1e9 multiply-accumulates.

    Args:
        gmacs: scalar, mean over this process's images, with gradient.
        target: what an image should cost.

    Source: AS-ViT (arXiv 2209.13802) section 3.3; as in the official code not normalised.
    """
    return (mean_over_processes(gmacs) - target).abs()


def score_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence of the student's token scores from the teacher's attention, both distributions over patches.

    Args:
        student: [B, N], sum 1.
        teacher: [B, N], sum 1, without gradient.

    Source: SaiT (arXiv 2210.05832), token distillation; KL(teacher || student) is our reading.
    """
    return F.kl_div(student.clamp(min=1e-12).log(), teacher, reduction="batchmean")
