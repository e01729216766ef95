"""An exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Weights that follow a model's: `average = decay * average + (1 - decay) * weights` after every step.

    Source: DeiT (arXiv 2012.12877), as timm's `ModelEma`: no warm-up of the decay.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors: dict[str, Tensor] = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's weights."""
        for name, tensor in model.state_dict().items():
            average = self.tensors[name]
            if average.is_floating_point():
                average.mul_(self.decay).add_(tensor, alpha=1 - self.decay)
            else:
                average.copy_(tensor)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over an average that was saved."""
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Give the model the averaged weights for a while."""
        own = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(self.tensors)
        try:
            yield
        finally:
            model.load_state_dict(own)
