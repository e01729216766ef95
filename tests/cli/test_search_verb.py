"""`edgeprune search` and `edgeprune export --recipe`, from checkpoint to bundle and with everything users get wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeprune.search.recipe import Recipe, load_recipe
from tests.cli.conftest import Cli, write_image

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "checkpoints" / "vit_digits_evit.safetensors"
MODEL = ("search", "-m", "vit_digits", "--method", "evit", "--stages", "0,2,3", "--no-progress")
SHORT = (*MODEL, "--checkpoint", WEIGHTS, "--data", "digits", "--quick", "--images", "64", "--subset", "64")
FEW = (*SHORT, "--evaluations", "16", "--finalists", "1", "--max-drop", "5")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a recipe the command wrote."""
    from edgeprune.cli.app import run

    path = tmp_path_factory.mktemp("search") / "recipe.json"
    assert run([*map(str, FEW), "-o", str(path), "--svg", str(path.with_suffix(".svg")), "-q"]) == 0
    return path


def test_recipe_says_what_was_found_and_how(recipe: Path) -> None:
    found = load_recipe(recipe)
    assert found.model == "vit_digits" and found.method == "evit" and found.stages is not None
    assert found.found.data == "digits" and found.found.quick and found.found.seed == 0
    assert found.found.fingerprint["cpu_model"]
    assert found.expected.measured_ms is not None and found.expected.test_top1 is not None
    assert found.found.table.block_ms == sorted(found.found.table.block_ms)
    assert str(ROOT) not in recipe.read_text()
    assert Recipe.model_validate_json(found.to_json()) == found


def test_picture_is_svg_without_network(recipe: Path) -> None:
    import xml.etree.ElementTree as Tree

    text = recipe.with_suffix(".svg").read_text()
    assert Tree.fromstring(text).tag.endswith("svg")
    assert text.count("http") == 1  # the namespace


def test_export_takes_the_recipe(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    result = cli("export", "--recipe", recipe, "--checkpoint", WEIGHTS, "-o", tmp_path / "bundle", "--json")
    assert result.code == 0, result.err
    stages = result.json["results"]["manifest"]["method"]["stages"]
    wanted = load_recipe(recipe).counts
    assert [(s["block"], s["tokens_in"], s["kept"]) for s in stages] == [(c.block, c.tokens_in, c.kept) for c in wanted]
    assert result.json["warnings"] == []


def test_options_override_the_recipe_with_a_message(cli: Cli, recipe: Path) -> None:
    result = cli(
        "export",
        "--recipe",
        recipe,
        "--checkpoint",
        WEIGHTS,
        "--target",
        "onnx",
        "--keep-rate",
        "0.9",
        "--dry-run",
        "--json",
    )
    assert result.code == 0, result.err
    assert result.json["results"]["target"] == "onnx"
    assert result.json["results"]["stages"][0]["kept"] == 58
    assert any("--target onnx replaces the recipe's ort-cpu" in w for w in result.json["warnings"])
    assert any("--keep-rate or --stages replaces" in w for w in result.json["warnings"])


def test_another_method_drops_the_schedule(cli: Cli, recipe: Path) -> None:
    options = ("--random-weights", "--method", "tome", "--dry-run", "--json")
    result = cli("export", "--recipe", recipe, *options)
    assert result.code == 0, result.err
    assert result.json["results"]["method"] == "tome"
    assert "--method tome replaces" in result.json["warnings"][0]


def test_another_checkpoint_is_said(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    other = WEIGHTS.with_name("vit_digits_dense.safetensors")
    result = cli(
        "export", "--recipe", recipe, "--checkpoint", other, "-o", tmp_path / "bundle", "--no-verify", "--json"
    )
    assert result.code == 0, result.err
    assert any("another checkpoint" in w for w in result.json["warnings"])


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"schema": "edgeprune-recipe/9"}', "\x00\xff", "null"])
def test_bad_recipe(cli: Cli, tmp_path: Path, content: str) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(content, encoding="latin-1")
    result = cli("export", "--recipe", path, "--random-weights", "--dry-run")
    assert result.code == 2 and "error [recipe]: " in result.err and "Traceback" not in result.err


def test_recipe_with_a_field_nobody_knows(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({**json.loads(recipe.read_text()), "surprise": 1}))
    result = cli("export", "--recipe", path, "--random-weights", "--dry-run")
    assert result.code == 2 and "surprise" in result.err


def test_absent_recipe_and_no_model(cli: Cli, tmp_path: Path) -> None:
    absent = cli("export", "--recipe", tmp_path / "none.json", "--random-weights", "--dry-run")
    assert absent.code == 2 and "error [recipe]: " in absent.err
    nothing = cli("export", "--random-weights", "--dry-run")
    assert nothing.code == 2 and "-m NAME, or --recipe FILE" in nothing.err


def test_budget_that_nothing_meets(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "recipe.json"
    result = cli(*FEW, "--latency-budget", "1us", "-o", out, "--json")
    assert result.code == 1
    assert result.json["error"]["code"] == "search-budget"
    assert "the fastest that was exported takes" in result.json["error"]["message"]
    assert result.json["results"]["frontier"] and result.json["results"]["chosen"] is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--latency-budget", "8"), "latency-budget"),
        (("--latency-budget", "soon"), "latency-budget"),
        (("--latency-budget", "0ms"), "latency-budget"),
        (("--max-drop", "-1"), "search-max-drop"),
        (("--max-drop", "nan"), "search-max-drop"),
        (("--method", "asvit"), "search-method"),
        (("--method", "dense"), "search-method"),
        (("--method", "evitt"), "method-unknown"),
        (("--target", "trt-fp16"), "search-target"),
        (("--stages", "1:0.5"), "stages"),
        (("--stages", "99"), "stages"),
        (("--subset", "128"), "search-images"),
        (("--data", "imagefolder:/nowhere"), "data-not-found"),
        (("--data", "photos"), "data-unknown"),
        (("--checkpoint", "none.safetensors"), "checkpoint-not-found"),
        (("--checkpoint", str(WEIGHTS.with_name("README.md"))), "checkpoint-unreadable"),
        (("--model", "deit_tiny_patch16_224"), None),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_is_measured(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], code: str | None
) -> None:
    monkeypatch.setattr("edgeprune.search.run.time_networks", None)
    result = cli(*FEW, *options, "-o", tmp_path / "recipe.json")
    assert result.code == 2, result.err
    assert f"error [{code}]: " in result.err if code else "error [" in result.err
    assert "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []


def test_empty_folder_and_a_single_image(cli: Cli, tmp_path: Path) -> None:
    data = tmp_path / "images"
    (data / "0").mkdir(parents=True)
    assert "error [data-empty]: " in cli(*FEW, "--data", f"imagefolder:{data}").err
    write_image(data / "0" / "only.png", "RGB")
    assert "error [search-images]: " in cli(*FEW, "--data", f"imagefolder:{data}").err


def test_output_that_exists(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("mine")
    result = cli(*FEW, "-o", tmp_path / "recipe.json")
    assert result.code == 2 and "error [output-exists]: " in result.err
    assert (tmp_path / "recipe.json").read_text() == "mine"


def test_dry_run_reads_nothing(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeprune.search.run.load_reference", None)
    result = cli(*MODEL, "--checkpoint", "none", "--data", "digits", "--dry-run", "--json")
    assert result.code == 0, result.err
    plan = result.json["results"]
    assert plan["dry_run"] and plan["places"] == [0, 1, 2, 3, 4]
    assert plan["uniform"]["keep rate 0.5"] == [32, 17, 9]


def test_interrupt_leaves_nothing(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgeprune.search.run.time_networks", interrupt)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    result = cli(*FEW, "-o", tmp_path / "recipe.json")
    assert result.code == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dynamicvit", "ats", "cropr", "tome"])
def test_every_method(cli: Cli, tmp_path: Path, method: str) -> None:
    weights = WEIGHTS.with_name(f"vit_digits_{method}.safetensors")
    options = (
        "--quick",
        "--images",
        "64",
        "--subset",
        "64",
        "--evaluations",
        "4",
        "--finalists",
        "1",
        "--max-drop",
        "20",
    )
    out = tmp_path / "recipe.json"
    result = cli(
        "search",
        "-m",
        "vit_digits",
        "--method",
        method,
        "--checkpoint",
        weights,
        "--data",
        "digits",
        *options,
        "-o",
        out,
    )
    assert result.code == 0, result.err
    exported = cli("export", "--recipe", out, "--checkpoint", weights, "--dry-run", "--json")
    assert exported.code == 0, exported.err
    wanted = [(c.block, c.kept) for c in load_recipe(out).counts]
    assert [(s["block"], s["kept"]) for s in exported.json["results"]["stages"]] == wanted
