from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeprune.cli.app import run
from edgeprune.cli.common import verb
from edgeprune.runtime.bundle import Bundle

DIGITS = ("-m", "vit_digits", "--random-weights")


@dataclass(frozen=True)
class Outcome:
    """What a command line did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


Cli = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Give Ctrl-C its usual meaning: a process that a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Return a function that runs a command line in this process."""

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = run([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture
def fake_verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], str]:
    """Return a function that puts another body into a verb and returns its name."""

    def install(body: Callable[..., Any]) -> str:
        monkeypatch.setattr("edgeprune.cli.models.command", verb("models", "A fake.")(body))
        return "models"

    return install


@pytest.fixture(scope="session")
def digits_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return a pruned bundle of the digits model with random weights and token outputs."""
    import torch

    from edgeprune.export import ExportRequest, export_model

    torch.set_num_threads(1)
    request = ExportRequest(
        model="vit_digits",
        method="dynamicvit",
        keep_rate=0.7,
        random_weights=True,
        token_outputs=True,
        labels=list("abcdefghij"),
        verify=False,
    )
    return export_model(request, tmp_path_factory.mktemp("digits") / "bundle")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return a photograph-like RGB file that is not square."""
    return write_image(tmp_path / "photo.png", "RGB")


def write_image(path: Path, mode: str) -> Path:
    """Write a 90x70 image of a Pillow mode."""
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path
