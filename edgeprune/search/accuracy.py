"""How well schedules do on labelled images: the torch reference, one set of weights for all of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgeprune.data import Dataset
from edgeprune.errors import InputError
from edgeprune.pruning.base import Stage
from edgeprune.runtime.manifest import PreprocessInfo

if TYPE_CHECKING:
    from torch import Tensor

    from edgeprune.pruning.model import PrunedViT

CHUNK = 64


@dataclass(frozen=True)
class Judgement:
    """What a schedule does on some images.

    Attributes:
        right: [n] bool, images whose class it says.
        loss: mean cross entropy, which tells schedules of the same top-1 apart.
    """

    right: NDArray[np.bool_]
    loss: float

    @property
    def top1(self) -> float:
        """Share of images whose class it says."""
        return float(self.right.mean())

    @property
    def score(self) -> tuple[float, float]:
        """What schedules are ranked by: top-1, then the lower loss."""
        return self.top1, -self.loss


@dataclass
class Images:
    """Labelled images in memory as the model takes them.

    Attributes:
        images: [n, C, H, W] float32.
        labels: [n] int64, classes of the model.
    """

    images: NDArray[np.float32]
    labels: NDArray[np.int64]

    @classmethod
    def read(cls, data: Dataset, preprocessing: PreprocessInfo, labels: list[str] | None, classes: int) -> Images:
        """Return all images of some data.

        Raises:
            InputError: `search-images` below two images; `data-classes` when the classes do not match; those of
                reading images.
        """
        from edgeprune.data.classes import match_classes

        groups = list(data.batches(CHUNK, preprocessing))
        if sum(len(found) for _, found in groups) < 2:
            raise InputError(
                f"{len(data)} image is too few to choose a schedule by",
                code="search-images",
                expected="at least two images, better some hundred",
            )
        mapping = match_classes(data.labels, labels, classes)
        return cls(np.concatenate([i for i, _ in groups]), mapping[np.concatenate([found for _, found in groups])])

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sha256(self) -> str:
        """Hash of the images and labels as the model sees them."""
        digest = hashlib.sha256(np.ascontiguousarray(self.images).tobytes())
        digest.update(np.ascontiguousarray(self.labels).tobytes())
        return digest.hexdigest()

    def spread(self, count: int) -> Images:
        """Return so many of them, spread evenly."""
        chosen = [i * len(self) // count for i in range(min(count, len(self)))]
        return Images(self.images[chosen], self.labels[chosen])


@dataclass
class Judge:
    """Judges schedules on one set of images, each once.

    Attributes:
        model: holds the weights of all stages.
        data: the images.
    """

    model: PrunedViT
    data: Images
    _known: dict[tuple[Stage, ...], tuple[Judgement, NDArray[np.int64]]] = field(default_factory=dict)

    def judge(self, stages: tuple[Stage, ...]) -> Judgement:
        """Return what the schedule does.

        Raises:
            InputError: `search-weights` when the model gives no number for one of the images.
        """
        return self._run(stages)[0]

    def counts(self, stages: tuple[Stage, ...]) -> NDArray[np.int64]:
        """Return the tokens every image keeps at every stage, [n, S]."""
        return self._run(stages)[1]

    def _run(self, stages: tuple[Stage, ...]) -> tuple[Judgement, NDArray[np.int64]]:
        import torch

        if stages not in self._known:
            model = self.model.with_stages(stages)
            right, losses, counts = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
            with torch.inference_mode():
                for at in range(0, len(self.data), CHUNK):
                    out = model.run(torch.from_numpy(self.data.images[at : at + CHUNK]))
                    labels = torch.from_numpy(self.data.labels[at : at + CHUNK])
                    right.append((_checked(out.logits).argmax(1) == labels).numpy())
                    losses.append(torch.nn.functional.cross_entropy(out.logits, labels, reduction="none").numpy())
                    counts.append(
                        torch.stack(out.counts, 1).numpy() if stages else np.zeros((len(labels), 0), np.int64)
                    )
            judgement = Judgement(np.concatenate(right), float(np.concatenate(losses).mean()))
            self._known[stages] = judgement, np.concatenate(counts)
        return self._known[stages]


def _checked(logits: Tensor) -> Tensor:
    if not bool(logits.isfinite().all()):
        raise InputError(
            "the model's outputs are not finite on the calibration images",
            code="search-weights",
            expected="images and weights that belong together",
            hint="check the images, and the checkpoint with `edgeprune verify`",
        )
    return logits
