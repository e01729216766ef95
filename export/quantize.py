"""How the linear layers of a bundle are quantized: which stay float, which ranges, dynamic or static, and at what cost.

What is decided by measurement is decided on trial graphs of the pruned model: written beside nothing, run on this
machine, thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.data import DIGITS, FOLDER_PREFIX
from edgeprune.errors import BuildError, CheckFailed, InputError
from edgeprune.export.graphs import make_plan
from edgeprune.export.pipeline import lower
from edgeprune.export.quantized_accuracy import CalibrationImages, Judged, judge, open_images
from edgeprune.export.request import Resolved
from edgeprune.export.sensitivity import LayerCosts, choose_float, parse_keep_float
from edgeprune.export.targets.registry import get_target
from edgeprune.export.turns import measure_in_turns
from edgeprune.export.writer import WeightStore
from edgeprune.plugins.locate import cache_root
from edgeprune.quantization.ranges import observe_ranges
from edgeprune.quantization.scheme import Quantization, Scheme, linear_layers
from edgeprune.runtime.kernels import float_layers, linear_layer, profile_nodes
from edgeprune.runtime.manifest import PreprocessInfo, QuantizationInfo, QuantizedAccuracy, QuantizedSpeed, RangesInfo
from edgeprune.runtime.ort import OrtBackend
from edgeprune.runtime.processor import processor_name

if TYPE_CHECKING:
    from edgeprune.pruning.model import PrunedViT

