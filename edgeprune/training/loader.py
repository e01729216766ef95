"""One process's share of the batches of an epoch, made in the background."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from edgeprune.data import TrainingData
from edgeprune.runtime.manifest import PreprocessInfo


@dataclass(frozen=True)
class EpochBatches(Dataset):
    """The batches of one epoch from number `start` on; an item depends on its number alone, not on who makes it."""

    data: TrainingData
    size: int
    preprocessing: PreprocessInfo
    epoch: int
    seed: int
    difficulty: float
    rows: slice
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index >= len(self):
            raise IndexError(index)
        images, labels = self.data.batch(
            self.start + index,
            self.size,
            self.preprocessing,
            epoch=self.epoch,
            seed=self.seed,
            difficulty=self.difficulty,
            rows=self.rows,
        )
        return torch.from_numpy(images), torch.from_numpy(labels)


def load(batches: EpochBatches, workers: int, pin: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images [B, C, H, W] and labels [B] in order, made by `workers` processes; 0 makes them here."""
    if not workers:
        return (batches[i] for i in range(len(batches)))
    return iter(DataLoader(batches, batch_size=None, num_workers=workers, pin_memory=pin))
