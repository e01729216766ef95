"""Which class of a model is which class of some images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import InputError


def match_classes(data: Sequence[str] | None, model: Sequence[str] | None, classes: int) -> NDArray[np.int64]:
    """Return the model's class index for every class of the data.

    Names decide when both sides have them and agree; else the order, when there are as many.

    Raises:
        InputError: `data-classes` when neither works.
    """
    if data is not None and model is not None and set(data) <= set(model):
        index = {name: i for i, name in enumerate(model)}
        return np.array([index[name] for name in data], np.int64)
    if data is None or len(data) == classes:
        return np.arange(classes)
    raise InputError(
        f"the data has {len(data)} classes, the model {classes}, and their names do not match",
        code="data-classes",
        expected="as many classes in the same order, or class names that are the bundle's labels",
        hint="export with --labels FILE so that folders are found by name",
    )
