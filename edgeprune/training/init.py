"""Initial weights for training from nothing. Loading a checkpoint needs none of this."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgeprune.pruning.model import PrunedViT

POSITION_SCALE = 0.5
POSITION_TEMPERATURE = 100.0  # slowest wave longer than a grid of some tens of patches


def init_from_scratch(model: PrunedViT) -> None:
    """Draw the blocks' matrices at the scale of their width and give patches two-dimensional sine positions.

    timm's fixed deviation of 0.02 suits widths of about 400 and more; narrow models start to learn much later with it.

    Source: initialisation of ViT (arXiv 2010.11929); sine positions as in arXiv 2205.01580.
    """
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    P = model.config.num_pos_tokens - model.config.num_patches
    with torch.no_grad():
        model.pos_embed[0, P:] = POSITION_SCALE * sine_positions(*model.config.grid, model.config.embed_dim)


def sine_positions(rows: int, cols: int, dim: int) -> Tensor:
    """Return [rows * cols, dim]: sines and cosines of the column and the row; zeros where `dim` is no multiple of 4."""
    quarter = dim // 4
    frequency = POSITION_TEMPERATURE ** (-torch.arange(quarter) / quarter)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    waves = [f(axis.reshape(-1, 1) * frequency) for axis in (x, y) for f in (torch.sin, torch.cos)]
    return nn.functional.pad(torch.cat(waves, 1), (0, dim - 4 * quarter))
