"""AS-ViT's learned threshold in torch."""

from __future__ import annotations

import torch
from torch import nn


class KeepThreshold(nn.Module):
    """A scalar; key `keep_threshold` of the official code."""

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.keep_threshold = nn.Parameter(torch.tensor(initial))
