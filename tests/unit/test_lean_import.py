"""The run time needs neither torch nor onnx, and nothing heavy is loaded before it is used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.bundles import WEIGHTS, write_tiny
from tests.helpers.trt_bundles import write_for_tensorrt

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "onnx", "onnxruntime", "onnx_graphsurgeon", "sklearn", "scipy", "openvino", "tensorrt", "pycuda")


def python(code: str, *args: object) -> str:
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "module",
    [
        "edgeprune",
        "edgeprune.runtime.session",
        "edgeprune.data.preprocess",
        "edgeprune.data.overlay",
        "edgeprune.models.registry",
        "edgeprune.plugins.loader",
        "edgeprune.plugins.build",
        "edgeprune.bench",
        "edgeprune.export",
        "edgeprune.export.trt.api",
        "edgeprune.export.trt.builder",
        "edgeprune.cli.main",
        "edgeprune.cli.build",
        "edgeprune.cli.doctor",
        "edgeprune.cli.serve_repo",
        "edgeprune.serving",
    ],
)
def test_import_loads_no_heavy_package(module: str) -> None:
    loaded = python(f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))").split()
    assert module.partition(".")[0] in loaded
    assert sorted(set(HEAVY) & set(loaded)) == []


def test_session_runs_a_bundle_when_torch_and_onnx_cannot_be_imported(tmp_path: Path) -> None:
    bundle = write_tiny(tmp_path / "bundle")
    Image.new("RGB", (9, 9), (0, 255, 0)).save(tmp_path / "green.png")
    images = np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    code = """
import sys
for name in ("torch", "onnx", "onnx_graphsurgeon", "sklearn", "safetensors"):
    sys.modules[name] = None  # importing it raises ImportError
import json
import numpy
from edgeprune import Session
session = Session(sys.argv[1], threads=1)
logits = session.run(numpy.load(sys.argv[2])).logits
print(json.dumps([logits.tolist(), session.classify([sys.argv[3]], top=1)[0].top[0][1]]))
"""
    logits, label = json.loads(python(code, bundle.path, tmp_path / "images.npy", tmp_path / "green.png"))
    np.testing.assert_allclose(logits, images.mean((2, 3)) @ WEIGHTS, rtol=1e-4, atol=1e-6)
    assert label == "green"


def test_engines_are_planned_where_only_the_run_time_is_installed(tmp_path: Path) -> None:
    code = """
import sys
for name in ("torch", "onnx", "onnx_graphsurgeon", "onnxruntime", "sklearn", "safetensors"):
    sys.modules[name] = None  # importing it raises ImportError
from edgeprune.cli.app import run
sys.exit(run(["build", sys.argv[1], "--dry-run"]))
"""
    bundle = write_for_tensorrt(tmp_path / "bundle", plugin=True)
    rows = python(code, bundle.path).splitlines()
    assert [row.split()[2] for row in rows[1:]] == ["model", "model_plugin", "dense"]
