"""`edgeprune convert` as a command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from edgeprune.models.checkpoint import load_checkpoint
from edgeprune.models.registry import get_model_config
from edgeprune.pruning import get_method
from edgeprune.pruning.base import StageRequest
from edgeprune.pruning.model import PrunedViT
from tests.cli.conftest import Cli
from tests.helpers.reference_vit import randomize

DIGITS = ("-m", "vit_digits", "--method", "dynamicvit")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a DynamicViT checkpoint in the official layout."""
    method, config = get_method("dynamicvit"), get_model_config("vit_digits")
    state = randomize(PrunedViT(config, method.every_stage(config, StageRequest(), {}))).state_dict()
    path = tmp_path / "source.pth"
    torch.save({"model": {k.replace("prune.", "score_predictor."): v for k, v in state.items()}, "epoch": 1}, path)
    return path


def test_table_metadata_and_json(cli: Cli, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "w.safetensors"
    shown = cli("convert", source, *DIGITS, "--keep-rate", 0.7, "--layout", "edgeprune", "-o", out)
    assert (shown.code, shown.err) == (0, "")
    count = str(len(load_checkpoint(source).tensors))
    rows = [line.split() for line in shown.out.splitlines()]
    assert ["read", count, "source.pth"] in rows
    assert ["matched", count, "vit_digits,", "dynamicvit"] in rows
    assert ["written", count, "edgeprune", "keys"] in rows
    results = cli("convert", out, "-o", tmp_path / "b.safetensors", "--json").json["results"]
    assert (results["read"], results["left_out"], results["metadata"]["keep_rate"]) == (int(count), {}, "0.7")
    with safe_open(results["file"], "pt") as file:
        assert file.metadata() == results["metadata"]


def test_what_is_left_out_is_counted(cli: Cli, source: Path, tmp_path: Path) -> None:
    dense = {k: v for k, v in load_checkpoint(source).tensors.items() if not k.startswith("score_predictor.")}
    masks = {f"blocks.{b}.attn.out_zero_mask": torch.zeros(1, 96) for b in (1, 2)}
    torch.save({"model_state": {**dense, **masks}}, tmp_path / "ats.pth")
    result = cli(
        "convert", tmp_path / "ats.pth", "-m", "vit_digits", "--method", "ats", "-o", tmp_path / "w.safetensors"
    )
    assert result.code == 0
    assert any(line.split()[:3] == ["left", "out", "2"] for line in result.out.splitlines())


def test_converted_file_is_exported(cli: Cli, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    assert cli("convert", source, *DIGITS, "-o", out).code == 0
    arguments = ("--keep-rate", 0.7, "--checkpoint", out, "--no-verify", "-o", tmp_path / "bundle")
    assert cli("export", *DIGITS, *arguments).code == 0
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["weights"]["file"] == "w.safetensors"


def test_pth_is_the_dictionary_the_official_code_loads(cli: Cli, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "w.pth"
    assert cli("convert", source, *DIGITS, "--format", "pth", "-o", out).code == 0
    loaded, original = (torch.load(path, weights_only=True)["model"] for path in (out, source))
    assert loaded.keys() == original.keys()
    assert all(torch.equal(loaded[key], original[key]) for key in original)


def refused(cli: Cli, code: str, *arguments: object) -> str:
    """Run a command line that is refused as wrong input and return its message."""
    result = cli("convert", *arguments)
    assert result.code == 2
    assert result.out == ""
    assert f"[{code}]" in result.err
    assert "Traceback" not in result.err
    return result.err


def test_bad_input_writes_nothing(cli: Cli, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    out, kept = folder / "w.safetensors", folder / "kept.safetensors"
    kept.write_bytes(b"precious")
    cut = tmp_path / "cut.pth"
    cut.write_bytes(source.read_bytes()[:-1000])
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save({"model": {"fc.weight": torch.ones(2, 2)}}, tmp_path / "other.pth")
    assert "source.pth" in refused(cli, "checkpoint-not-found", tmp_path / "sourc.pth", *DIGITS, "-o", out)
    refused(cli, "checkpoint-unreadable", cut, *DIGITS, "-o", out)
    refused(cli, "checkpoint-unreadable", tmp_path / "empty.pth", *DIGITS, "-o", out)
    refused(cli, "checkpoint-foreign", tmp_path / "other.pth", *DIGITS, "-o", out)
    refused(cli, "checkpoint-ema", source, *DIGITS, "--ema", "-o", out)
    refused(cli, "checkpoint-shape", source, *DIGITS, "--num-classes", 3, "-o", out)
    wrong = refused(cli, "checkpoint-mismatch", source, "-m", "vit_digits", "--method", "asvit", "-o", out)
    assert "--method dynamicvit" in wrong
    refused(cli, "model-missing", source, "-o", out)
    refused(cli, "model-unknown", source, "-m", "vit_digit", "-o", out)
    refused(cli, "method-unknown", source, "-m", "vit_digits", "--method", "dynamic", "-o", out)
    refused(cli, "keep-rate", source, *DIGITS, "--keep-rate", 1.5, "-o", out)
    assert "--overwrite" in refused(cli, "output-exists", source, *DIGITS, "-o", kept)
    refused(cli, "output-exists", source, *DIGITS, "--overwrite", "-o", folder.rename(tmp_path / "d.safetensors"))
    assert "--format pth" in refused(cli, "output-suffix", source, *DIGITS, "-o", tmp_path / "w.pth")
    refused(cli, "output-suffix", source, *DIGITS, "--format", "pth", "-o", tmp_path / "w.bin")
    refused(cli, "output-not-writable", source, *DIGITS, "-o", source / "w.safetensors")
    assert [path.name for path in (tmp_path / "d.safetensors").iterdir()] == ["kept.safetensors"]
    assert (tmp_path / "d.safetensors" / "kept.safetensors").read_bytes() == b"precious"


def test_overwrite_replaces_even_the_source(cli: Cli, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    assert cli("convert", source, *DIGITS, "-o", out).code == 0
    before = load_checkpoint(source).tensors
    assert cli("convert", out, "--layout", "edgeprune", "--overwrite", "-o", out).code == 0
    after = load_checkpoint(out).tensors
    assert all(torch.equal(after[key.replace("score_predictor.", "prune.")], before[key]) for key in before)


def test_contradicting_the_metadata_is_refused(cli: Cli, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    assert cli("convert", source, *DIGITS, "--keep-rate", 0.7, "-o", out).code == 0
    message = refused(cli, "metadata-disagrees", out, "--keep-rate", 0.5, "-o", tmp_path / "b.safetensors")
    assert "0.5 was asked for, and the file says 0.7" in message


def test_file_of_finetune_needs_no_options(cli: Cli, tmp_path: Path) -> None:
    shipped = Path(__file__).parents[2] / "checkpoints" / "vit_digits_dynamicvit.safetensors"
    results = cli("convert", shipped, "-o", tmp_path / "w.safetensors", "--json").json["results"]
    assert results["metadata"]["method"] == "dynamicvit"
    before, after = load_checkpoint(shipped).tensors, load_checkpoint(tmp_path / "w.safetensors").tensors
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
