"""What lies in checkpoints/ is what its records and its README say."""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from edgeprune.data import open_dataset
from edgeprune.models.checkpoint import load_checkpoint
from edgeprune.models.fit import load_into
from edgeprune.models.registry import get_model_config
from edgeprune.pruning import METHODS, get_method
from edgeprune.pruning.base import parse_stages
from edgeprune.pruning.model import PrunedViT
from edgeprune.runtime.manifest import PreprocessInfo
from edgeprune.training.loop import top1

FOLDER = Path(__file__).resolve().parents[3] / "checkpoints"
RECORDS = sorted(FOLDER.glob("*.json"))
LIMIT_BYTES = 3_000_000
SAMPLE = 300


def record_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def build(record: dict[str, Any]) -> PrunedViT:
    """Return the shipped model, every weight from the file."""
    config, method = get_model_config(record["model"]), get_method(record["method"])
    blocks = ",".join(str(stage["block"]) for stage in record["stages"]) or None
    where = parse_stages(blocks, record["keep_rate"])
    model = PrunedViT(config, method.stages(config, where, method.parse_options(record["method_options"])))
    load_into(model, load_checkpoint(FOLDER / record["file"]), key_prefixes=method.key_prefixes)
    return model


def test_every_method_that_chooses_is_shipped() -> None:
    assert {record_of(path)["method"] for path in RECORDS} == set(METHODS) - {"random"}
    assert len(list(FOLDER.glob("*.safetensors"))) == len(RECORDS)


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_file_is_the_recorded_one_and_small(path: Path) -> None:
    record = record_of(path)
    content = (FOLDER / record["file"]).read_bytes()
    assert hashlib.sha256(content).hexdigest() == record["sha256"]
    assert len(content) < LIMIT_BYTES


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_recorded_start_is_a_shipped_file(path: Path) -> None:
    record = record_of(path)
    for origin in (record["started_from"], record["teacher"]):
        if origin is not None:
            assert hashlib.sha256((FOLDER / origin["file"]).read_bytes()).hexdigest() == origin["sha256"]


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_readme_gives_the_recorded_command_and_accuracy(path: Path) -> None:
    record, text = record_of(path), (FOLDER / "README.md").read_text()
    assert record["command"] in text
    words = shlex.split(record["command"])
    assert words[words.index("--output") + 1] == f"checkpoints/{record['file']}"
    row = next(line for line in text.splitlines() if line.startswith(f"| `{record['file']}`"))
    assert f"{100 * record['top1']:.1f} %" in row


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_accuracy_is_reproduced_on_a_sample(path: Path) -> None:
    record = record_of(path)
    model, config = build(record), get_model_config(record["model"])
    info = PreprocessInfo(
        image_size=config.image_size, mean=config.mean, std=config.std, crop_pct=1.0, interpolation="bicubic"
    )
    deviation = (record["top1"] * (1 - record["top1"]) / SAMPLE) ** 0.5
    assert abs(top1(model, open_dataset("digits", limit=SAMPLE), info) - record["top1"]) < 4 * deviation
