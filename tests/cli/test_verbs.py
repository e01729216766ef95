from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeprune.export.targets.registry import TARGETS
from edgeprune.models.registry import MODELS
from edgeprune.pruning import METHODS
from edgeprune.runtime.bundle import Bundle, load_bundle
from tests.cli.conftest import DIGITS, Cli


def test_models_lists_all_of_them(cli: Cli) -> None:
    assert [row["name"] for row in cli("models", "--json").json["results"]] == list(MODELS)
    line = next(x for x in cli("models").out.splitlines() if x.startswith("deit_small_patch16_224"))
    assert line.split() == ["deit_small_patch16_224", "22.05", "4.60", "224x224", "16x16", "1+196", "1000"]


def test_methods_lists_options_with_defaults(cli: Cli) -> None:
    rows = {row["name"]: row for row in cli("methods", "--json").json["results"]}
    assert list(rows) == list(METHODS)
    assert rows["evit"]["options"][0]["name"] == "fuse"
    assert rows["evit"]["options"][0]["default"] is True
    assert "fuse=true" in cli("methods").out


def test_methods_says_what_a_keep_rate_means_and_shows_the_notes(cli: Cli) -> None:
    rows = {row["name"]: row for row in cli("methods", "--json").json["results"]}
    uses = {name: row["keep_rate"] for name, row in rows.items()}
    assert {name for name, use in uses.items() if use == "not taken"} == {"dense", "cropr", "tome"}
    assert {name for name, use in uses.items() if use == "limits slots"} == {"ats", "asvit", "sait"}
    assert {name for name, use in uses.items() if use == "required"} == {"dynamicvit", "evit", "random"}
    assert rows["tome"]["notes"] == list(METHODS["tome"].notes)
    assert METHODS["tome"].notes[0] in " ".join(cli("methods").out.split())


def test_targets_lists_reasons(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "ort-cpu-int8", replace(TARGETS["ort-cpu-int8"], packages=(("no_such", "ort"),)))
    rows = {row["name"]: row for row in cli("targets", "--json").json["results"]}
    assert rows["ort-cpu"]["available"]
    assert not rows["ort-cpu-int8"]["available"]
    assert "'no_such' is missing" in rows["ort-cpu-int8"]["why_unavailable"]
    assert "'no_such'" in cli("targets").out


# ------------------------------------------------------------------------------------------------ export


def test_export_writes_a_bundle_and_says_what_it_is(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "new" / "bundle"
    result = cli("export", *DIGITS, "--method", "evit", "--keep-rate", "0.5", "--seed", "3", "-o", out)
    assert result.code == 0, result.err
    assert result.out == ""
    manifest = load_bundle(out).manifest
    assert [stage.kept for stage in manifest.method.stages] == [32, 17, 9]
    assert all(word in result.err for word in ("evit", "seed 3", "parity", "inside block 3", f"edgeprune bench {out}"))
    assert "edgeprune: warning" not in result.err


def test_export_passes_every_option_on(cli: Cli, tmp_path: Path) -> None:
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps(["no", "maybe", "yes"]))
    settings = ["--image-size", "32x48", "--patch-size", "16", "--num-classes", "3", "--labels", labels]
    settings += ["--model-option", "reg_tokens=2", "--model-option", "mean=0.1,0.2,0.3", "--target", "onnx"]
    settings += ["--method", "evit", "--method_option", "fuse=false", "--stages", "2:0.5", "--batch", "1:4"]
    settings += ["--token-outputs", "--no-dead-rows", "--opset", "18", "--no-verify"]
    result = cli("export", *DIGITS, *settings, "-o", tmp_path / "bundle", "--json")
    assert result.code == 0, result.err
    m = result.json["results"]["manifest"]
    config = m["model"]["config"]
    assert (config["image_size"], config["patch_size"], config["num_classes"]) == ([32, 48], [16, 16], 3)
    assert (config["reg_tokens"], config["mean"]) == (2, [0.1, 0.2, 0.3])
    assert (m["target"], m["opset"], m["batch"], m["dead_rows"]) == ("onnx", 18, [1, 4], False)
    assert (m["labels"], m["parity"], m["selection"]) == (["no", "maybe", "yes"], None, "native")
    assert (m["method"]["name"], m["method"]["options"]) == ("evit", {"fuse": False})
    assert [(s["block"], s["kept"]) for s in m["method"]["stages"]] == [(2, 3)]
    assert "kept_indices_0" in [t["name"] for t in m["graphs"]["model"]["outputs"]]


def test_export_keeps_the_op_when_asked(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    assert (
        cli("export", *DIGITS, "--method", "dynamicvit", "--keep-rate", "0.5", "--selection", "plugin", "-o", out).code
        == 0
    )
    assert cli("inspect", out, "--json").json["results"]["graphs"]["model"]["ops"]["TopKGather"] == 3


def test_export_from_a_checkpoint_can_be_verified_with_it(cli: Cli, tmp_path: Path) -> None:
    import torch

    from edgeprune.models.vit import VisionTransformer

    file, out = tmp_path / "ckpt.pth", tmp_path / "bundle"
    torch.manual_seed(0)
    torch.save({"model": VisionTransformer(MODELS["vit_digits"]).state_dict()}, file)
    assert cli("export", "-m", "vit_digits", "--checkpoint", file, "-o", out, "--no-verify").code == 0
    assert cli("verify", out, "--checkpoint", file).code == 0
    assert cli("verify", out, "--json").json["error"]["code"] == "weights"


def test_dry_run_shows_the_plan_and_writes_nothing(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    command = ["export", "-m", "deit_small_patch16_224", "--random-weights", "--method", "evit", "--keep-rate", "0.7"]
    result = cli(*command, "--dry-run", "-o", out)
    assert result.code == 0
    assert all(word in result.out for word in ("4.599 G dense", "3.029 G pruned", "196", "138", "model.onnx.data"))
    assert not out.exists()
    assert cli(*command, "--dry-run", "--json").json["results"]["stages"][0]["kept"] == 138


def test_dry_run_refuses_what_an_export_refuses(cli: Cli) -> None:
    assert cli("export", *DIGITS, "--method", "evit", "--keep-rate", "9", "--dry-run").code == 2


# ------------------------------------------------------------------------------------------------ run


def test_run_prints_the_five_best_classes_with_their_names(cli: Cli, digits_bundle: Bundle, image: Path) -> None:
    result = cli("run", digits_bundle.path, image)
    assert result.code == 0
    lines = [line.split() for line in result.out.splitlines()[1:]]
    assert lines[0][0] == str(image)
    shares = [float(line[-1]) for line in lines]
    assert len(lines) == 5
    assert shares == sorted(shares, reverse=True)
    assert {line[-2] for line in lines} <= set("abcdefghij")


def test_run_returns_probabilities_and_kept_tokens(cli: Cli, digits_bundle: Bundle, image: Path) -> None:
    (found,) = cli("run", digits_bundle.path, image, "--json").json["results"]["images"]
    assert found["image"] == str(image)
    assert 0 < found["top"][4]["probability"] <= found["top"][0]["probability"] <= 1
    assert [len(stage) for stage in found["kept"]] == [44, 31, 21]


def test_run_takes_the_dense_graph(cli: Cli, digits_bundle: Bundle, image: Path) -> None:
    pruned, dense = (
        cli("run", digits_bundle.path, image, "--json", "--graph", graph).json["results"]["images"][0]
        for graph in ("model", "dense")
    )
    assert dense["kept"] == []
    assert dense["top"] != pruned["top"]


def test_overlay_dims_exactly_the_dropped_patches(cli: Cli, digits_bundle: Bundle, tmp_path: Path) -> None:
    pixels = np.full((64, 64, 3), 255, np.uint8)
    pixels[20:40, 20:40] = 0
    file, directory = tmp_path / "white.png", tmp_path / "overlays"
    Image.fromarray(pixels).save(file)
    result = cli("run", digits_bundle.path, file, "--overlay", directory, "--json")
    (found,) = result.json["results"]["images"]
    assert found["overlay"] == str(directory / "white_kept.png")
    drawn = np.asarray(Image.open(found["overlay"]).convert("RGB").resize((64, 64), Image.Resampling.NEAREST))
    changed = (drawn != pixels).any(-1).reshape(8, 8, 8, 8).any((1, 3)).reshape(-1)
    kept = set(found["kept"][-1])
    assert set(np.flatnonzero(~changed)) == kept


def test_overlays_of_equal_names_do_not_overwrite_each_other(cli: Cli, digits_bundle: Bundle, tmp_path: Path) -> None:
    files = []
    for name in "ab":
        (tmp_path / name).mkdir()
        files.append(tmp_path / name / "x.png")
        Image.new("RGB", (64, 64)).save(files[-1])
    assert cli("run", digits_bundle.path, *files, "--overlay", tmp_path).code == 0
    assert len(list(tmp_path.glob("x_*kept.png"))) == 2


def test_overlay_of_the_dense_graph_is_refused(cli: Cli, digits_bundle: Bundle, image: Path, tmp_path: Path) -> None:
    result = cli("run", digits_bundle.path, image, "--graph", "dense", "--overlay", tmp_path / "o")
    assert result.code == 2
    assert "drops nothing" in result.err


# ------------------------------------------------------------------------------------------------ verify, inspect


def test_verify_passes_and_shows_the_numbers(cli: Cli, digits_bundle: Bundle) -> None:
    result = cli("verify", digits_bundle.path)
    assert result.code == 0, result.err
    assert "PASSED" in result.err
    assert "100.00%" in result.out
    parity = cli("verify", digits_bundle.path, "--json", "--images", "3").json["results"]["parity"]
    assert (parity["images"], parity["kept_overlap"]) == (3, 1)
    assert 0 < parity["max_rel_error"] < 1e-4


def test_verify_fails_with_the_numbers_when_the_weights_differ(cli: Cli, digits_bundle: Bundle, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(digits_bundle.path, tmp_path / "bundle"))
    text = (bundle / "manifest.json").read_text()
    manifest = json.loads(text)
    manifest["weights"]["seed"] = 99
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    result = cli("verify", bundle, "--json")
    assert (result.code, result.json["status"]) == (1, "failed")
    assert result.json["results"]["parity"]["max_rel_error"] > 1e-2
    assert result.json["error"]["details"]["tolerance"] == 1e-4
    assert "logits differ by" in result.err


def test_inspect_shows_graphs_files_and_provenance(cli: Cli, digits_bundle: Bundle) -> None:
    result = cli("inspect", digits_bundle.path)
    assert result.code == 0
    sha = digits_bundle.manifest.files["model.onnx"].sha256
    assert all(
        word in result.out for word in ("vit_digits", "dynamicvit", "in front of block 1", "Gemm", sha, "bicubic")
    )
    found = cli("inspect", digits_bundle.path, "--json").json["results"]
    assert found["graphs"]["model"]["nodes"] > found["graphs"]["dense"]["nodes"] > 50


def test_inspect_and_run_need_neither_torch_nor_onnx(digits_bundle: Bundle, image: Path) -> None:
    script = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnx_graphsurgeon', 'sklearn'): sys.modules[name] = None\n"
        "from edgeprune.cli.app import run\n"
        f"bundle, image = {str(digits_bundle.path)!r}, {str(image)!r}\n"
        "codes = [run(['inspect', bundle]), run(['run', bundle, image]), run(['models']), run(['methods'])]\n"
        "codes += [run(['bench', bundle, '--rounds', '2', '--against', 'dense'])]\n"
        "codes += [run(['verify', bundle])]\n"
        "codes += [run(['export', '-m', 'vit_digits', '--random-weights', '-o', bundle + '2'])]\n"
        "codes += [run(['finetune', '-m', 'vit_digits', '-o', bundle + '3.safetensors'])]\n"
        "sys.exit(str(codes))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "[0, 0, 0, 0, 0, 3, 3, 3]" in done.stderr, done.stderr
    assert "pip install 'edgeprune[export]'" in done.stderr


# ------------------------------------------------------------------------------------------------ bench, evaluate


def test_bench_measures_and_writes_all_samples(cli: Cli, digits_bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "results" / "bench.json"
    result = cli("bench", digits_bundle.path, "--rounds", "4", "--quick", "-o", file)
    assert result.code == 0, result.err
    assert [line.split()[0] for line in result.out.splitlines()] == ["graph", "dense", "pruned", "random"]
    assert "random weights" in result.err
    stored: dict[str, Any] = json.loads(file.read_text())
    assert [len(r["wall_ms"]) == r["n"] > 0 for r in stored["runners"]] == [True, True, True]
    assert [p.name for p in file.parent.iterdir()] == ["bench.json"]


def test_bench_takes_baselines_and_batch(cli: Cli, digits_bundle: Bundle) -> None:
    found = cli("bench", digits_bundle.path, "--rounds", "2", "--against", "dense", "--json").json["results"]
    assert [r["name"] for r in found["runners"]] == ["dense", "pruned"]
    assert cli("bench", digits_bundle.path, "--batch", "9", "--json").json["error"]["code"] == "bench-batch"
    assert cli("bench", digits_bundle.path, "--against", "sparse", "--json").json["error"]["code"] == "bench-against"


def test_evaluate_counts_model_and_dense(cli: Cli, digits_bundle: Bundle, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in "abcdefghij":
        (tmp_path / name).mkdir()
        for i in range(2):
            pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    result = cli("evaluate", digits_bundle.path, "--data", f"imagefolder:{tmp_path}")
    assert result.code == 0, result.err
    assert [line.split()[0] for line in result.out.splitlines()] == ["graph", "dense", "model"]
    graphs = cli("evaluate", digits_bundle.path, "--data", f"imagefolder:{tmp_path}", "--json").json["results"][
        "graphs"
    ]
    assert graphs["model"]["images"] == 20
    assert 0 <= graphs["model"]["top1"] <= graphs["model"]["top5"] <= 1


def test_evaluate_takes_digits_graph_and_limit(cli: Cli, digits_bundle: Bundle) -> None:
    command = ("evaluate", digits_bundle.path, "--data", "digits", "--limit", "30", "--graph", "random", "--json")
    assert cli(*command).json["results"]["graphs"]["random"]["images"] == 30


def test_evaluate_refuses_unknown_data(cli: Cli, digits_bundle: Bundle) -> None:
    assert cli("evaluate", digits_bundle.path, "--data", "cifar", "--json").json["error"]["code"] == "data-unknown"


@pytest.fixture(scope="session")
def adaptive_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return a bundle whose images keep different numbers of tokens, some more than there are slots."""
    import torch

    from edgeprune.export import ExportRequest, export_model

    torch.set_num_threads(1)
    request = ExportRequest(
        model="vit_digits",
        method="sait",
        keep_rate=0.6,
        method_options={"select": "value", "value": "0.9"},
        random_weights=True,
    )
    return export_model(request, tmp_path_factory.mktemp("adaptive") / "bundle")


def test_evaluate_shows_what_images_keep_and_cost(cli: Cli, adaptive_bundle: Bundle) -> None:
    command = ("evaluate", adaptive_bundle.path, "--data", "digits", "--limit", "40")
    found = cli(*command, "--json")
    model, dense = (found.json["results"]["graphs"][name] for name in ("model", "dense"))
    assert 0 < model["overflow"] < 40
    assert "more tokens than the bundle has slots" in found.json["warnings"][0]
    assert (dense["kept"], dense["overflow"], dense["mean_macs"]) == (None, 0, None)
    (kept,) = model["kept"]
    assert 30 < kept < 64
    assert 0.5 * model["macs"] < model["mean_macs"] < model["macs"] < dense["macs"]
    shown = cli(*command).out.splitlines()
    assert all(word in shown[0] for word in ("all slots", "on average", "tokens kept", "overflowed"))
    assert f"{kept:.1f}" in shown[2]


def test_adaptive_stages_are_shown_as_slots_with_the_notes(cli: Cli, adaptive_bundle: Bundle) -> None:
    shown = cli("inspect", adaptive_bundle.path).out
    assert "up to 38" in shown
    assert "keep rate 0.6 (limits the slots)" in shown
    assert "with every slot in use" in shown
    assert METHODS["sait"].notes[0] in " ".join(shown.split())


def test_adaptive_bundle_can_be_verified(cli: Cli, adaptive_bundle: Bundle) -> None:
    parity = cli("verify", adaptive_bundle.path, "--json").json["results"]["parity"]
    assert (parity["counts_agreement"], parity["kept_overlap"]) == (1, None)


def test_adaptive_bundle_can_be_measured(cli: Cli, adaptive_bundle: Bundle) -> None:
    command = ("bench", adaptive_bundle.path, "--rounds", "2", "--quick", "--threads", "1")
    noise = cli(*command)
    assert noise.code == 0, noise.err
    assert "noise keeps other numbers of tokens" in noise.err
    assert "warning" not in noise.err
    digits = cli(*command, "--data", "digits", "--images", "5", "--callers", "2")
    assert digits.code == 0, digits.err
    headings = [line.split()[0] for line in digits.out.splitlines() if line.strip()]
    assert [word for word in headings if not word.isdigit()] == [
        *("graph", "dense", "pruned", "pruned,", "quartile"),
        *("callers", "callers"),
    ]
    assert "noise" not in digits.err
    found = cli(*command, "--data", "digits", "--images", "5", "--json").json["results"]
    assert (found["data"], found["images"], found["runs_per_sample"]) == ("digits", 5, 5)
    assert found["adaptive"]["form"] == "computed"


def test_undecided_images_are_shown() -> None:
    from edgeprune.cli.show import parity_words
    from edgeprune.runtime.manifest import ParityInfo

    figures = {"images": 8, "max_abs_error": 0, "max_rel_error": 0, "top1_agreement": 1, "tolerance": 1e-4}
    assert parity_words(ParityInfo(**figures)).endswith("8 images")
    assert "2 set aside" in parity_words(ParityInfo(**figures, undecided=2))


def test_merging_says_where_the_others_went_and_no_keep_rate(cli: Cli) -> None:
    shown = cli("export", *DIGITS, "--method", "tome", "--method-option", "r=4", "--dry-run")
    assert shown.code == 0, shown.err
    assert "merged into kept ones" in shown.out
    assert "up to" not in shown.out


def test_counts_over_a_batch_are_warned_of(cli: Cli, tmp_path: Path) -> None:
    command = ("export", *DIGITS, "--method", "asvit", "--method-option", "count=batch-mean")
    batch = cli(*command, "--batch", "1:4", "-o", tmp_path / "batch")
    assert batch.code == 0, batch.err
    assert "an image's logits depend on its batch" in batch.err
    assert "depend on its batch" in load_bundle(tmp_path / "batch").manifest.warnings[0]
    assert load_bundle(tmp_path / "batch").manifest.parity.counts_agreement == 1


# ------------------------------------------------------------------------------------------------ finetune


def test_finetune_passes_every_option_on_and_says_what_is_next(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeprune.training import finetune as module

    asked = []

    def train(request: module.FinetuneRequest, progress: Any) -> module.FinetuneResult:
        asked.append(request)
        progress("training", 0.5)
        return module.FinetuneResult(request.out, tmp_path / "x.json", 0.9, 0.5, 12.0, {"num_classes": 10})

    monkeypatch.setattr(module, "finetune", train)
    out = tmp_path / "x.safetensors"
    result = cli(
        *("finetune", "-m", "vit_digits", "--method", "evit", "--keep-rate", "0.7", "--stages", "1,3"),
        *("--method-option", "fuse=false", "--checkpoint", "a.pth", "--epochs", "2", "--batch-size", "8"),
        *("--lr", "0.01", "--seed", "4", "--threads", "1", "--overwrite", "-o", out),
    )
    assert result.code == 0, result.err
    assert asked == [
        module.FinetuneRequest(
            model="vit_digits",
            out=out,
            method="evit",
            keep_rate=0.7,
            stages="1,3",
            method_options={"fuse": "false"},
            checkpoint="a.pth",
            epochs=2,
            batch_size=8,
            lr=0.01,
            seed=4,
            threads=1,
            overwrite=True,
        )
    ]
    assert "90.00 %" in result.out
    assert (
        "edgeprune export -m vit_digits --num-classes 10 --method evit --keep-rate 0.7 --stages 1,3 "
        f"--method-option fuse=false --checkpoint {out} -o" in result.err
    )


def test_finetune_shows_what_float_and_quantized_layers_reach(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeprune.training import finetune as module

    def train(request: module.FinetuneRequest, progress: Any) -> module.FinetuneResult:
        record = {
            "num_classes": 10,
            "quantized": {"top1": 0.875, "top1_before": 0.25},
            "ema": {"top1": 0.5, "top1_quantized": 0.375, "file": "x.ema.safetensors"},
        }
        assert request.quantize == "int8"
        return module.FinetuneResult(request.out, tmp_path / "x.json", 0.9, 0.5, 12.0, record)

    monkeypatch.setattr(module, "finetune", train)
    result = cli("finetune", "-m", "vit_digits", "--quantize", "int8", "-o", tmp_path / "x.safetensors")
    assert result.code == 0, result.err
    shown = {" ".join(line.split()) for line in result.out.splitlines()}
    assert {"top-1 before 50.00 %", "top-1 90.00 %", "quantized before 25.00 %", "quantized 87.50 %"} <= shown
    assert "averaged 50.00 % top-1, quantized 37.50 %, x.ema.safetensors" in shown
    assert f"--target ort-cpu-int8 --checkpoint {tmp_path / 'x.safetensors'}" in result.err


def test_finetune_refuses_a_precision_it_cannot_train_for(cli: Cli, tmp_path: Path) -> None:
    result = cli("finetune", "-m", "vit_digits", "--json", "--quantize", "int4", "-o", tmp_path / "x.safetensors")
    assert result.code == 2
    assert "int4" in result.json["error"]["message"]
    assert "int8" in str(result.json["error"])


@pytest.mark.parametrize(
    ("method", "options", "shown"),
    [
        ("tome", (), "--method tome --checkpoint"),
        ("sait", (), "--method sait --checkpoint"),
        ("sait", ("--keep-rate", "0.5"), "--method sait --keep-rate 0.5 --checkpoint"),
        ("evit", ("--stages", "2:0.5"), "--method evit --stages 2:0.5 --checkpoint"),
    ],
)
def test_finetune_asks_for_a_keep_rate_only_where_it_means_something(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, options: tuple[str, ...], shown: str
) -> None:
    from edgeprune.training import finetune as module

    def train(request: module.FinetuneRequest, progress: Any) -> module.FinetuneResult:
        return module.FinetuneResult(request.out, tmp_path / "x.json", 0.9, 0.5, 12.0, {"num_classes": 10})

    monkeypatch.setattr(module, "finetune", train)
    result = cli("finetune", "-m", "vit_digits", "--method", method, *options, "-o", tmp_path / "x.safetensors")
    assert result.code == 0, result.err
    assert shown in result.err


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("evit", (), "no keep rate"),
        ("sait", ("--method-option", "select=topk"), "no keep rate"),
        ("tome", ("--keep-rate", "0.5"), "takes no keep rate"),
        ("cropr", ("--stages", "1:0.5"), "takes no keep rate"),
        ("ats", ("--keep-rate", "1.5"), "out of range"),
    ],
)
def test_finetune_refuses_a_wrong_keep_rate(
    cli: Cli, tmp_path: Path, method: str, options: tuple[str, ...], words: str
) -> None:
    command = ("finetune", "-m", "vit_digits", "--json", "--method", method, *options)
    error = cli(*command, "-o", tmp_path / "x.safetensors").json["error"]
    assert error["code"] == "keep-rate"
    assert words in error["message"]


def test_finetune_refuses_before_it_trains(cli: Cli, tmp_path: Path) -> None:
    command = ("finetune", "-m", "vit_digits", "--json", "-o")
    assert cli(*command, tmp_path / "x.pth").json["error"]["code"] == "output-suffix"
    without = cli(*command, tmp_path / "x.safetensors", "--method", "dynamicvit", "--keep-rate", "0.7").json["error"]
    assert without["code"] == "checkpoint-missing"


def test_finetune_lists_the_recipes_with_their_sources(cli: Cli) -> None:
    result = cli("finetune", "--list-recipes")
    assert result.code == 0
    assert {"dynamicvit", "evit-scratch", "cropr", "sait"} <= {line.split()[0] for line in result.out.splitlines()}
    assert "arXiv 2106.02034" in result.out
