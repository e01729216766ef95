"""What users get wrong, through the real command line: one clear message, the right exit code, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edgeprune.export.targets.registry import TARGETS
from edgeprune.runtime.bundle import Bundle, BundleWriter
from tests.cli.conftest import DIGITS, Cli, Outcome, write_image

EXPORT = ("export", *DIGITS, "--no-verify")
PRUNED = ("export", *DIGITS, "--no-verify", "--method", "evit", "--keep-rate", "0.7")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Return where a bundle would go; its parent is otherwise empty."""
    parent = tmp_path / "out"
    parent.mkdir()
    return parent / "bundle"


@pytest.fixture
def bundle(digits_bundle: Bundle, tmp_path: Path) -> Path:
    """Return a copy of a good bundle, to be spoiled."""
    return Path(shutil.copytree(digits_bundle.path, tmp_path / "bundle"))


def assert_refused(result: Outcome, code: int, name: str, *words: str) -> None:
    """Check exit code, error code, and that there is one message with these words and nothing else."""
    assert result.code == code, result.err
    errors = [line for line in result.err.splitlines() if line.startswith("edgeprune: error")]
    assert len(errors) == 1
    assert errors[0].startswith(f"edgeprune: error [{name}]: ")
    assert "Traceback" not in result.err
    assert result.out == ""
    for word in words:
        assert word in result.err


def assert_nothing_written(out: Path) -> None:
    """Check that neither the bundle nor a temporary directory is there."""
    assert list(out.parent.iterdir()) == []


def edit_manifest(bundle: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    file = bundle / "manifest.json"
    manifest = json.loads(file.read_text())
    edit(manifest)
    file.write_text(json.dumps(manifest))


# ------------------------------------------------------------------------------------------------ checkpoints


def export_checkpoint(cli: Cli, file: Path, out: Path) -> Outcome:
    result = cli("export", "-m", "vit_digits", "--checkpoint", file, "-o", out)
    assert_nothing_written(out)
    return result


def good_checkpoint(file: Path) -> Path:
    from edgeprune.models.registry import get_model_config
    from edgeprune.models.vit import VisionTransformer

    torch.save({"model": VisionTransformer(get_model_config("vit_digits")).state_dict()}, file)
    return file


def test_missing_checkpoint(cli: Cli, tmp_path: Path, out: Path) -> None:
    result = export_checkpoint(cli, tmp_path / "missing.pth", out)
    assert_refused(result, 2, "checkpoint-not-found", "missing.pth", "fix:")


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_truncated_checkpoint(cli: Cli, tmp_path: Path, out: Path, share: float) -> None:
    file = good_checkpoint(tmp_path / "cut.pth")
    os.truncate(file, int(file.stat().st_size * share))
    assert_refused(export_checkpoint(cli, file, out), 2, "checkpoint-unreadable", "cut.pth", "fix:")


def test_truncated_safetensors(cli: Cli, tmp_path: Path, out: Path) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "cut.safetensors"
    save_file({"blocks.0.norm1.weight": torch.ones(1000)}, file)
    os.truncate(file, 2000)
    assert_refused(export_checkpoint(cli, file, out), 2, "checkpoint-unreadable", "cut.safetensors", "fix:")


def test_checkpoint_of_another_architecture(cli: Cli, tmp_path: Path, out: Path) -> None:
    file = tmp_path / "resnet.pth"
    torch.save({"layer1.0.conv1.weight": torch.ones(4, 3, 3, 3), "fc.weight": torch.ones(10, 4)}, file)
    result = export_checkpoint(cli, file, out)
    assert_refused(result, 2, "checkpoint-foreign", "resnet.pth", "layer1.0.conv1.weight", "expected:")


def test_checkpoint_of_another_size(cli: Cli, tmp_path: Path, out: Path) -> None:
    file = good_checkpoint(tmp_path / "digits.pth")
    result = cli("export", "-m", "deit_tiny_patch16_224", "--checkpoint", file, "-o", out)
    assert_refused(result, 2, "checkpoint-shape", "width 96", "vit_digits")
    assert_nothing_written(out)


def test_checkpoint_that_would_run_code(cli: Cli, tmp_path: Path, out: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "pwned",))

    file = tmp_path / "evil.pth"
    torch.save({"model": Evil()}, file)
    assert_refused(export_checkpoint(cli, file, out), 2, "checkpoint-unsafe", "evil.pth")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("weights", [(), ("--checkpoint", "a.pth", "--random-weights")])
def test_weights_come_from_one_place(cli: Cli, out: Path, weights: tuple[str, ...]) -> None:
    result = cli("export", "-m", "vit_digits", *weights, "-o", out)
    assert_refused(result, 2, "weights", "exactly one of --checkpoint and --random-weights")
    assert_nothing_written(out)


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(("rate", "hint"), [("0", "0.7"), ("1.5", "0.7"), ("9", "0.09"), ("-1", "0.7"), ("nan", "0.7")])
def test_keep_rate_out_of_range(cli: Cli, out: Path, rate: str, hint: str) -> None:
    result = cli(*PRUNED, "--keep-rate", rate, "-o", out)
    assert_refused(result, 2, "keep-rate", rate, "above 0 and at most 1")
    assert_nothing_written(out)


def test_keep_rate_that_is_missing(cli: Cli, out: Path) -> None:
    assert_refused(cli("export", *DIGITS, "--method", "evit", "-o", out), 2, "keep-rate", "--keep-rate 0.7")


def test_keep_rate_that_leaves_nothing(cli: Cli, out: Path) -> None:
    result = cli("export", *DIGITS, "--method", "dynamicvit", "--keep-rate", "0.1", "-o", out)
    assert_refused(result, 2, "keep-rate", "at least one token")
    assert_nothing_written(out)


def test_keep_rate_that_is_no_number(cli: Cli, out: Path) -> None:
    assert_refused(cli(*PRUNED, "--keep-rate", "half", "-o", out), 2, "usage", "'half'")


def test_unknown_model_names_the_nearest(cli: Cli, out: Path) -> None:
    result = cli("export", "-m", "deit_smal_patch16_224", "--random-weights", "-o", out)
    assert_refused(result, 2, "model-unknown", "did you mean deit_small_patch16_224")
    assert_nothing_written(out)


def test_unknown_method_names_the_nearest(cli: Cli, out: Path) -> None:
    result = cli(*EXPORT, "--method", "dynamic-vit", "-o", out)
    assert_refused(result, 2, "method-unknown", "did you mean dynamicvit")
    assert_nothing_written(out)


def test_unknown_target_names_the_nearest(cli: Cli, out: Path) -> None:
    assert_refused(cli(*EXPORT, "--target", "ort-cpuu", "-o", out), 2, "target-unknown", "did you mean ort-cpu")
    assert_nothing_written(out)


def test_target_that_cannot_be_used_here(cli: Cli, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "ort-cpu-int8", replace(TARGETS["ort-cpu-int8"], packages=(("no_such", "ort"),)))
    assert_refused(cli(*EXPORT, "--target", "ort-cpu-int8", "-o", out), 3, "target-unavailable", "ort-cpu-int8")
    assert_nothing_written(out)


@pytest.mark.parametrize("stages", ["9,6,3", "3,3", "42", "1:0.5,2", "a", "", "1:0.5:2"])
def test_stages_that_do_not_fit(cli: Cli, out: Path, stages: str) -> None:
    assert_refused(cli(*PRUNED, "--stages", stages, "-o", out), 2, "stages", "for example --stages")
    assert_nothing_written(out)


@pytest.mark.parametrize("option", ["fuse=perhaps", "fuze=true"])
def test_method_option_that_does_not_fit(cli: Cli, out: Path, option: str) -> None:
    assert_refused(cli(*PRUNED, "--method-option", option, "-o", out), 2, "method-option", "edgeprune methods")
    assert_nothing_written(out)


def test_labels_that_do_not_fit(cli: Cli, tmp_path: Path, out: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("one\ntwo\n")
    assert_refused(cli(*EXPORT, "--labels", labels, "-o", out), 2, "labels", "2 labels for 10 classes")
    assert_nothing_written(out)


# ------------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize(
    ("name", "content"), [("missing.png", None), ("text.png", b"hello"), ("empty.jpg", b""), ("cut.png", b"cut")]
)
def test_unreadable_image(cli: Cli, bundle: Path, tmp_path: Path, name: str, content: bytes | None) -> None:
    file = tmp_path / name
    if name.startswith("cut"):
        whole = write_image(file, "RGB").read_bytes()
        content = whole[: len(whole) // 2]
    if content is not None:
        file.write_bytes(content)
    result = cli("run", bundle, file, "--overlay", tmp_path / "overlays")
    assert_refused(result, 2, "image-unreadable", name, "fix:")
    assert not (tmp_path / "overlays").exists()


@pytest.mark.parametrize("mode", ["L", "1", "P", "I;16", "CMYK"])
def test_grey_and_other_images_work(cli: Cli, bundle: Path, tmp_path: Path, mode: str) -> None:
    file = write_image(tmp_path / ("image.tiff" if mode == "CMYK" else "image.png"), mode)
    result = cli("run", bundle, file)
    assert (result.code, result.err) == (0, "")
    assert str(file) in result.out


def test_rgba_image_works_with_a_warning(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    result = cli("run", bundle, write_image(tmp_path / "alpha.png", "RGBA"))
    assert result.code == 0
    assert result.err.count("edgeprune: warning: ") == 1
    assert "transparency" in result.err


def test_overlay_without_token_outputs(cli: Cli, tmp_path: Path, out: Path, image: Path) -> None:
    assert cli(*PRUNED, "--keep-rate", "0.5", "-o", out).code == 0
    result = cli("run", out, image, "--overlay", tmp_path / "overlays")
    assert_refused(result, 2, "token-outputs", "export again with --token-outputs")
    assert not (tmp_path / "overlays").exists()


# ------------------------------------------------------------------------------------------------ bundles


@pytest.mark.parametrize("verb", ["inspect", "verify", "bench", "evaluate", "run"])
def test_missing_bundle(cli: Cli, tmp_path: Path, image: Path, verb: str) -> None:
    extra = {"run": [image], "evaluate": ["--data", "digits"]}.get(verb, [])
    assert_refused(cli(verb, tmp_path / "nothing", *extra), 2, "bundle-not-found", "nothing", "edgeprune export")


@pytest.mark.parametrize(
    ("edit", "code"),
    [
        (lambda m: m.update(wings=2), "bundle-invalid"),
        (lambda m: m.update(batch=["a", "b"]), "bundle-invalid"),
        (lambda m: m.pop("graphs"), "bundle-invalid"),
        (lambda m: m.update(tool="other"), "bundle-invalid"),
        (lambda m: m.update(schema_version=2), "bundle-version"),
        (lambda m: m["files"]["model.onnx"].update(sha256="0" * 64), "bundle-tampered"),
        (lambda m: m["files"].pop("model.onnx.data"), "bundle-tampered"),
    ],
    ids=["unknown-field", "wrong-type", "no-graphs", "other-tool", "newer", "wrong-hash", "unlisted-weights"],
)
def test_tampered_manifest(cli: Cli, bundle: Path, edit: Callable[[dict[str, Any]], None], code: str) -> None:
    edit_manifest(bundle, edit)
    assert_refused(cli("inspect", bundle), 2, code, "expected:", "fix:")


def test_manifest_that_is_no_json(cli: Cli, bundle: Path) -> None:
    (bundle / "manifest.json").write_text('{"tool": "edgeprune"')
    assert_refused(cli("inspect", bundle), 2, "bundle-invalid", "JSON")


@pytest.mark.parametrize("name", ["model.onnx", "dense.onnx", "model.onnx.data"])
def test_tampered_graph(cli: Cli, bundle: Path, image: Path, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    assert_refused(cli("run", bundle, image), 2, "bundle-tampered", name, "sha256")


def test_truncated_graph(cli: Cli, bundle: Path, image: Path) -> None:
    os.truncate(bundle / "model.onnx", 100)
    assert_refused(cli("run", bundle, image), 2, "bundle-tampered", "model.onnx")


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret"])
def test_path_escape_in_the_manifest(cli: Cli, bundle: Path, name: str) -> None:
    (bundle.parent / "secret").write_text("x")

    def escape(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = manifest["files"]["model.onnx"]

    edit_manifest(bundle, escape)
    assert_refused(cli("inspect", bundle), 2, "bundle-path", name)


def test_link_out_of_the_bundle(cli: Cli, bundle: Path) -> None:
    moved = bundle.parent / "elsewhere.onnx"
    (bundle / "dense.onnx").rename(moved)
    (bundle / "dense.onnx").symlink_to(moved)
    assert_refused(cli("inspect", bundle), 2, "bundle-path", "dense.onnx")


# ------------------------------------------------------------------------------------------------ output


def test_output_that_exists_is_left_alone(cli: Cli, out: Path) -> None:
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    assert_refused(cli(*EXPORT, "-o", out), 2, "output-exists", "--overwrite")
    assert_refused(cli(*EXPORT, "-o", out, "--overwrite"), 2, "output-not-a-bundle")
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


def test_output_that_is_a_file(cli: Cli, out: Path) -> None:
    out.write_text("precious")
    assert_refused(cli(*EXPORT, "-o", out), 2, "output-exists")
    assert out.read_text() == "precious"


def test_overwrite_keeps_the_old_bundle_when_the_export_fails(cli: Cli, bundle: Path) -> None:
    before = {p.name: p.read_bytes() for p in bundle.iterdir()}
    result = cli("export", "-m", "vit_digits", "--checkpoint", "missing.pth", "-o", bundle, "--overwrite")
    assert_refused(result, 2, "checkpoint-not-found")
    assert {p.name: p.read_bytes() for p in bundle.iterdir()} == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, the device that is always full")
def test_full_disk_leaves_nothing(cli: Cli, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter = BundleWriter.__enter__

    def enter_full_disk(self: BundleWriter) -> BundleWriter:
        writer = enter(self)
        (writer.path / "model.onnx.data").symlink_to("/dev/full")
        return writer

    monkeypatch.setattr(BundleWriter, "__enter__", enter_full_disk)
    assert_refused(cli(*EXPORT, "-o", out), 3, "disk-full", "the disk is full", "fix:")
    assert_nothing_written(out)


def test_output_without_a_directory(cli: Cli) -> None:
    assert_refused(cli(*EXPORT), 2, "usage", "-o DIR")


@pytest.mark.parametrize(
    ("step", "number", "code"),
    [
        ("loading weights", signal.SIGINT, 130),
        ("lowering model.onnx", signal.SIGINT, 130),
        ("comparing with PyTorch", signal.SIGTERM, 143),
    ],
)
def test_interrupted_export_leaves_nothing(out: Path, step: str, number: int, code: int) -> None:
    command = [sys.executable, "-m", "edgeprune", "export", "-m", "deit_small_patch16_224", "--random-weights"]
    command += ["--method", "evit", "--keep-rate", "0.7", "-o", str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any(step in line for line in process.stderr)
        assert [p.name[:8] for p in out.parent.iterdir()] == [".bundle."]
        process.send_signal(number)
        _, rest = process.communicate(timeout=60)
    assert process.returncode == code, rest
    assert "nothing was written" in rest
    assert "Traceback" not in rest
    assert_nothing_written(out)
