from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeprune import Session
from edgeprune.runtime.bundle import Bundle
from edgeprune.serving import readme
from tests.cli.conftest import Cli
from tests.helpers.bundles import write_tiny
from tests.helpers.fake_triton import FakeTriton


def test_a_bundle_becomes_a_repository(cli: Cli, digits_bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "model_repository"
    outcome = cli("serve-repo", digits_bundle.path, "-o", out, "--name", "digits", "--dense", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["results"]["public"] == ["digits", "digits_dense"]
    server = FakeTriton(out)
    images = np.random.default_rng(0).normal(size=(1, 3, 64, 64)).astype(np.float32)
    for name, graph in (("digits", "model"), ("digits_dense", "dense")):
        expected = Session(digits_bundle, graph=graph).run(images).logits
        np.testing.assert_allclose(server.infer(name, images)["logits"], expected, rtol=1e-4, atol=1e-5)


def test_people_see_the_models_and_what_is_next(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = cli("serve-repo", write_tiny(tmp_path / "tiny").path, "-o", out)
    assert "tiny" in outcome.out and "clients call it" in outcome.out
    assert f"cd {out}" in outcome.err


@pytest.mark.parametrize(
    ("target", "tensorrt", "words"),
    [
        ("ort-cpu", None, f"{readme.IMAGE}:{readme.ONNX_TAG} tritonserver"),
        ("ort-cuda-fp16", None, "--gpus all"),
        ("trt-fp16", "10.3.0", f"{readme.IMAGE}:24.08-py3 tritonserver"),
        ("trt-fp16", "10.13.3", f"{readme.IMAGE}:YY.MM-py3 tritonserver"),
    ],
)
def test_the_command_fits_the_bundle(target: str, tensorrt: str | None, words: str) -> None:
    line = readme.run_line(target, tensorrt, None)
    assert words in line
    assert line.startswith("docker run --rm") and "--disable-auto-complete-config" in line


def test_an_output_in_the_way_is_refused(cli: Cli, tmp_path: Path) -> None:
    bundle = write_tiny(tmp_path / "tiny").path
    assert cli("serve-repo", bundle, "-o", tmp_path / "out").code == 0
    outcome = cli("serve-repo", bundle, "-o", tmp_path / "out", "--json")
    assert (outcome.code, outcome.json["error"]["code"]) == (2, "output-exists")
    assert cli("serve-repo", bundle, "-o", tmp_path / "out", "--overwrite").code == 0


def test_a_bundle_is_not_replaced(cli: Cli, tmp_path: Path) -> None:
    bundle = write_tiny(tmp_path / "tiny").path
    outcome = cli("serve-repo", bundle, "-o", bundle, "--overwrite", "--json")
    assert (outcome.code, outcome.json["error"]["code"]) == (2, "output-not-a-repository")
    assert Session(bundle).manifest.target == "ort-cpu"
