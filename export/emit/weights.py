"""The weights of a torch model as arrays that share its memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import nn


def weight_arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """Return the float32 state_dict as numpy arrays without copying."""
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
