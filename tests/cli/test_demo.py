from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from edgeprune.cli import demo_steps
from edgeprune.data import open_dataset
from tests.cli.conftest import Cli


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an untrained DynamicViT checkpoint as `finetune` writes it, with a dense one beside it."""
    from safetensors.torch import save_file

    from edgeprune.export import ExportRequest, load_torch_model

    directory = tmp_path_factory.mktemp("checkpoints")
    for name, method, rate in ((demo_steps.PRUNED, "dynamicvit", 0.5), (demo_steps.DENSE, "dense", 1.0)):
        model = load_torch_model(ExportRequest("vit_digits", method, rate, random_weights=True))
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, directory / name)
        record = {
            "model": "vit_digits",
            "method": method,
            "keep_rate": rate,
            "method_options": {},
            "stages": [{"block": stage.block, "kept": stage.counts.kept} for stage in model.stages],
        }
        (directory / name).with_suffix(".json").write_text(json.dumps(record))
    return directory / demo_steps.PRUNED


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluate few images and measure briefly."""
    monkeypatch.setattr(demo_steps, "BENCH_SECONDS", 0.2)
    monkeypatch.setattr("edgeprune.data.open_dataset", lambda spec: open_dataset(spec, limit=40))


def test_demo_prints_one_table_and_writes_its_files(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    result = cli("demo", "--checkpoint", checkpoint, "-o", out)
    assert result.code == 0, result.err
    heading, dense, pruned = result.out.splitlines()
    assert all(word in heading for word in ("accuracy", "MACs", "median latency", "speed-up [95 % CI]"))
    assert (dense.split()[0], dense.split()[-1]) == ("dense", "1.00")
    assert pruned.split()[0] == "pruned"
    assert "[" in pruned
    assert sorted(p.name for p in out.iterdir()) == [
        "bench.json",
        "bundle",
        "dense",
        "images",
        "overlays",
        "report.html",
        "results.json",
    ]
    overlays = sorted((out / "overlays").iterdir())
    assert len(overlays) == demo_steps.OVERLAYS
    assert Image.open(overlays[0]).size == (256, 256)
    results = json.loads((out / "results.json").read_text())
    assert results["pruned"]["images"] == results["dense"]["images"] == 40
    assert results["report"] == str(out / "report.html")
    assert (out / "report.html").read_text().count("<figure data-picture") == demo_steps.OVERLAYS
    assert results["parity"]["max_rel_error"] < 1e-4


def test_demo_can_be_repeated_with_overwrite_only(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    command = ("demo", "--checkpoint", checkpoint, "-o", tmp_path / "demo", "--json")
    assert cli(*command).code == 0
    assert cli(*command).json["error"]["code"] == "output-exists"
    assert cli(*command, "--overwrite").code == 0


def test_demo_without_a_dense_checkpoint_says_so(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.safetensors"
    shutil.copy(checkpoint, alone)
    shutil.copy(checkpoint.with_suffix(".json"), alone.with_suffix(".json"))
    result = cli("demo", "--checkpoint", alone, "-o", tmp_path / "demo")
    assert result.code == 0, result.err
    assert "no dense checkpoint" in result.err


def test_demo_outside_a_checkout_says_what_to_do(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_steps, "CHECKPOINTS", tmp_path / "nothing")
    result = cli("demo", "-o", tmp_path / "demo")
    assert result.code == 2
    assert "this is no checkout" in result.err
    assert "make demo" in result.err
    assert not (tmp_path / "demo").exists()


def test_demo_refuses_a_checkpoint_with_other_counts(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    shutil.copy(checkpoint, other)
    record = json.loads(checkpoint.with_suffix(".json").read_text())
    record["stages"][0]["kept"] += 1
    other.with_suffix(".json").write_text(json.dumps(record))
    assert (
        cli("demo", "--checkpoint", other, "-o", tmp_path / "demo", "--json").json["error"]["code"] == "demo-checkpoint"
    )


def test_shipped_checkpoints_are_where_the_demo_looks() -> None:
    for name in (demo_steps.PRUNED, demo_steps.DENSE):
        file = demo_steps.CHECKPOINTS / name
        assert file.is_file()
        assert file.stat().st_size < 3_000_000
        assert json.loads(file.with_suffix(".json").read_text())["method"] in name
