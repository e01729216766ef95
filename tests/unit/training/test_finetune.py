from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edgeprune.errors import EdgepruneError, EdgepruneWarning, EnvironmentLackError, InputError
from edgeprune.models.checkpoint import load_checkpoint
from edgeprune.models.fit import load_into
from edgeprune.models.registry import get_model_config
from edgeprune.pruning import get_method
from edgeprune.pruning.base import StageRequest
from edgeprune.pruning.model import PrunedViT
from edgeprune.quantization import Quantization, linear_layers
from edgeprune.quantization.fake import FakeQuantizedLinear, fake_quantized
from edgeprune.training import finetune as module
from edgeprune.training.finetune import FinetuneRequest, finetune
from edgeprune.training.init import init_from_scratch
from edgeprune.training.loop import train
from edgeprune.version import __version__

Request = Callable[..., FinetuneRequest]
QUICK: dict[str, Any] = {
    "device": "cpu",
    "recipe_options": {"rand_augment": "none", "random_erase": "0", "ema_decay": "0"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, bright on the left and on the right."""
    path = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for side, name in enumerate(("left", "right")):
            (path / split / name).mkdir(parents=True)
            for i in range(count):
                image = rng.integers(0, 90, (64, 64, 3), np.uint8)
                image[:, 32 * side : 32 * side + 32] += 120
                Image.fromarray(image).save(path / split / name / f"{i}.png")
    return path


@pytest.fixture(scope="module")
def dense(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a dense model for two classes, one step old."""
    out = tmp_path_factory.mktemp("dense") / "dense.safetensors"
    finetune(
        FinetuneRequest("vit_digits", out, data=f"imagefolder:{folder}", epochs=1, batch_size=24, threads=1, **QUICK)
    )
    return out


@pytest.fixture
def request_for(folder: Path, tmp_path: Path) -> Request:
    """Return a function that makes a request of one epoch and one step."""

    def make(**fields: Any) -> FinetuneRequest:
        base = {"model": "vit_digits", "out": tmp_path / "out.safetensors", "data": f"imagefolder:{folder}"}
        return FinetuneRequest(**{**base, "epochs": 1, "batch_size": 24, "lr": 1e-4, "threads": 1, **QUICK, **fields})

    return make


def refused(request: FinetuneRequest, kind: type[EdgepruneError] = InputError) -> EdgepruneError:
    """Return the error of a request, which must leave nothing behind."""
    before = sorted(request.out.parent.glob("*")) if request.out.parent.is_dir() else None
    with pytest.raises(kind) as error:
        finetune(request)
    if before is not None:
        assert sorted(request.out.parent.glob("*")) == before
    return error.value


@pytest.mark.parametrize("method", ["dynamicvit", "evit", "random"])
def test_written_weights_load_into_the_pruned_model(method: str, request_for: Request, dense: Path) -> None:
    result = finetune(request_for(method=method, keep_rate=0.7, checkpoint=str(dense)))
    config, plugin = get_model_config("vit_digits", num_classes=2), get_method(method)
    stages = plugin.stages(config, StageRequest(0.7), plugin.parse_options({}))
    report = load_into(
        model := PrunedViT(config, stages), load_checkpoint(result.path), key_prefixes=plugin.key_prefixes
    )
    assert report.matched == len(model.state_dict())
    assert result.record["stages"] == [
        {"block": s.block, "tokens_in": s.counts.tokens_in, "kept": s.counts.kept, "fused": s.counts.fused}
        for s in stages
    ]


def test_dynamicvit_is_written_in_the_official_layout(request_for: Request, dense: Path) -> None:
    result = finetune(request_for(method="dynamicvit", keep_rate=0.7, checkpoint=str(dense)))
    names = set(load_checkpoint(result.path).tensors)
    assert {f"score_predictor.{s}.out_conv.4.bias" for s in range(3)} <= names
    assert not any(name.startswith("prune.") for name in names)


def test_record_and_metadata_tell_how_the_weights_were_made(request_for: Request, dense: Path) -> None:
    from safetensors import safe_open

    request = request_for(method="evit", keep_rate=0.7, checkpoint=str(dense), seed=3)
    result = finetune(request)
    record = json.loads(result.record_path.read_text())
    assert result.record_path == request.out.with_suffix(".json")
    weights = result.path.read_bytes()
    expected = {"file": "out.safetensors", "sha256": hashlib.sha256(weights).hexdigest(), "bytes": len(weights)}
    assert record == {**expected, **json.loads(json.dumps(result.record))}
    assert record["command"] == request.command()
    assert record["started_from"]["file"] == "dense.safetensors"
    assert (record["seed"], record["recipe"]["lr"], record["test_images"]) == (3, 1e-4, 8)
    assert {"edgeprune", "python", "torch", "numpy"} <= set(record["versions"])
    assert 0 <= record["top1"] <= 1
    with safe_open(result.path, "pt") as file:
        metadata = file.metadata()
    assert metadata == {
        "format": "pt", "tool": "edgeprune", "tool_version": __version__, "model": "vit_digits", "method": "evit",
        "keep_rate": "0.7", "stages": "1,3,4", "method_options": '{"fuse": true}', "model_options": "{}",
        "num_classes": "2", "image_size": "64x64", "layout": "official", "seed": "3", "top1": f"{result.top1:.4f}",
    }  # fmt: skip


def test_weights_only_training_of_another_method_reads_are_left(
    request_for: Request, dense: Path, tmp_path: Path
) -> None:
    tensors = load_checkpoint(dense).tensors
    masks = {f"blocks.{b}.attn.out_zero_mask": torch.zeros(1, 96) for b in (1, 2)}
    torch.save({"model_state": {**tensors, **masks}}, tmp_path / "ats.pth")
    result = finetune(request_for(method="evit", keep_rate=0.7, checkpoint=str(tmp_path / "ats.pth")))
    assert load_checkpoint(result.path).tensors.keys() == tensors.keys()


def test_same_seed_writes_the_same_weights(request_for: Request, dense: Path, tmp_path: Path) -> None:
    first, second = (
        load_checkpoint(
            finetune(request_for(method="random", keep_rate=0.5, checkpoint=str(dense), out=tmp_path / name)).path
        ).tensors
        for name in ("a.safetensors", "b.safetensors")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_command_says_everything_that_was_asked_for() -> None:
    request = FinetuneRequest(
        "vit_digits", Path("a b.safetensors"), "evit", 0.7, stages="1,3", method_options={"fuse": "false"}, lr=1e-4,
        checkpoint="dense.safetensors", seed=2, threads=1, quantize="int8",
    )  # fmt: skip
    assert shlex.split(request.command()) == [
        "edgeprune", "finetune", "--model", "vit_digits", "--method", "evit", "--keep-rate", "0.7", "--stages", "1,3",
        "--data", "digits", "--checkpoint", "dense.safetensors", "--lr", "0.0001", "--seed", "2", "--threads", "1",
        "--quantize", "int8", "--method-option", "fuse=false", "--output", "a b.safetensors",
    ]  # fmt: skip
    assert "--keep-rate" not in FinetuneRequest("vit_digits", Path("x.safetensors")).command()


def test_teacher_and_model_share_no_weights(request_for: Request, dense: Path) -> None:
    job = module.resolve(request_for(method="dynamicvit", keep_rate=0.7, checkpoint=str(dense)))
    model, _ = module.build_model(job)
    teacher, _ = module.build_teacher(job)
    assert teacher is not None
    assert torch.equal(model.head.weight, teacher.head.weight)
    with torch.no_grad():
        model.head.weight.add_(1)
    assert not torch.equal(model.head.weight, teacher.head.weight)


def test_classifier_starts_anew_for_another_number_of_classes(request_for: Request, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    other = PrunedViT(get_model_config("vit_digits"))
    save_file(other.state_dict(), tmp_path / "ten.safetensors")
    job = module.resolve(request_for(checkpoint=str(tmp_path / "ten.safetensors")))
    with pytest.warns(EdgepruneWarning, match="10 classes, the data has 2"):
        model, _ = module.build_model(job)
    assert model.head.weight.shape == (2, 96)
    assert torch.equal(model.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)


def test_dense_weights_can_come_from_a_pruned_file(request_for: Request, dense: Path, tmp_path: Path) -> None:
    pruned = finetune(request_for(method="dynamicvit", keep_rate=0.7, checkpoint=str(dense)))
    request = request_for(checkpoint=str(pruned.path), out=tmp_path / "again.safetensors")
    assert len(load_checkpoint(finetune(request).path).tensors) == len(load_checkpoint(dense).tensors)


def test_threads_are_put_back(request_for: Request, dense: Path) -> None:
    torch.set_num_threads(2)
    finetune(request_for(checkpoint=str(dense)))
    assert torch.get_num_threads() == 2


def test_fresh_blocks_have_unit_scale() -> None:
    model = PrunedViT(get_model_config("vit_digits", no_embed_class=True, reg_tokens=2))
    init_from_scratch(model)
    assert model.blocks[0].attn.proj.weight.std().item() == pytest.approx(96**-0.5, rel=0.1)
    assert model.pos_embed[0].std().item() > 0.2


# ----------------------------------------------------------------------------------------------- quantized layers


def image_by_image(path: Path, data: str) -> float:
    """Return the top-1 of a dense model with integer layers, one image at a time."""
    model = PrunedViT(get_model_config("vit_digits", num_classes=2)).eval()
    load_into(model, load_checkpoint(path))
    layers = frozenset(linear_layers(model.config))
    quantized = fake_quantized(model, Quantization("int8", "dynamic", layers, weight_bits=7))
    job = module.resolve(FinetuneRequest("vit_digits", path, data=data))
    with torch.inference_mode():
        right = [
            quantized(torch.from_numpy(pixels)).argmax().item() == label[0]
            for pixels, label in job.judged.batches(1, job.preprocessing)
        ]
    return sum(right) / len(right)


def test_quantized_training_writes_floats_and_both_accuracies(request_for: Request, dense: Path) -> None:
    request = request_for(checkpoint=str(dense), quantize="int8", lr=1e-3)
    result = finetune(request)
    quantized = result.record["quantized"]
    assert quantized == {
        "precision": "int8", "scheme": "dynamic", "ranges": "per image", "weight_bits": 7, "layers": 24,
        "top1": image_by_image(result.path, request.data), "top1_before": image_by_image(dense, request.data),
    }  # fmt: skip
    assert result.record["quantize"] == "int8"
    before, after = load_checkpoint(dense).tensors, load_checkpoint(result.path).tensors
    assert {name: (t.dtype, t.shape) for name, t in after.items()} == {n: (t.dtype, t.shape) for n, t in before.items()}
    assert all(len(tensor.unique()) > 63 for name, tensor in after.items() if name.endswith("fc1.weight"))


def test_float_training_has_nothing_of_quantized_layers_in_its_record(request_for: Request, dense: Path) -> None:
    assert finetune(request_for(checkpoint=str(dense))).record["quantized"] is None


def test_model_trains_quantized_and_its_teacher_does_not(
    request_for: Request, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watch(model: PrunedViT, adapter: Any, *others: Any, **settings: Any) -> Any:
        counts = (sum(isinstance(m, FakeQuantizedLinear) for m in x.modules()) for x in (model, adapter.setup.teacher))
        seen.append(tuple(counts))
        return train(model, adapter, *others, **settings)

    monkeypatch.setattr(module, "train", watch)
    finetune(request_for(method="dynamicvit", keep_rate=0.7, checkpoint=str(dense), quantize="int8"))
    assert seen == [(24, 0)]


def test_quantized_training_takes_other_steps_than_a_float_one(request_for: Request, dense: Path) -> None:
    made = [
        load_checkpoint(
            finetune(request_for(checkpoint=str(dense), quantize=kind, out=request_for().out.with_stem(str(kind)))).path
        ).tensors
        for kind in (None, "int8")
    ]
    name = "blocks.2.mlp.fc2.weight"
    assert not torch.equal(made[0][name], made[1][name])
    torch.testing.assert_close(made[0][name], made[1][name], rtol=0, atol=1e-3)


def test_quantized_training_is_resumed_only_as_one(request_for: Request, dense: Path) -> None:
    options = {**QUICK["recipe_options"], "ema_decay": "0.5"}
    request = request_for(checkpoint=str(dense), epochs=2, quantize="int8", recipe_options=options)
    whole = finetune(replace(request, out=request.out.with_name("whole.safetensors")))
    interrupted(request)
    error = refused(replace(request, resume=True, quantize=None))
    assert error.code == "state-mismatch"
    assert "quantize: int8 there, None here" in str(error)
    result = finetune(replace(request, resume=True))
    for end in (".safetensors", ".ema.safetensors"):
        tensors, expected = (load_checkpoint(r.path.with_suffix(end)).tensors for r in (result, whole))
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert result.record["quantized"] == whole.record["quantized"]
    assert result.record["quantized"]["top1_before"] is not None
    averaged = image_by_image(result.path.with_suffix(".ema.safetensors"), request.data)
    assert result.record["ema"]["top1_quantized"] == whole.record["ema"]["top1_quantized"] == averaged


def test_quantized_training_from_nothing_has_no_accuracy_before(request_for: Request) -> None:
    quantized = finetune(request_for(quantize="int8")).record["quantized"]
    assert quantized["top1_before"] is None
    assert 0 <= quantized["top1"] <= 1


# ----------------------------------------------------------------------------------------------- refusals


def test_existing_output_is_refused_before_any_work(request_for: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    request = request_for()
    request.out.write_bytes(b"mine")
    monkeypatch.setattr(module, "resolve", lambda request: pytest.fail("work was done"))
    assert refused(request).code == "output-exists"
    assert request.out.read_bytes() == b"mine"


def test_existing_record_is_refused(request_for: Request) -> None:
    request = request_for()
    request.out.with_suffix(".json").write_text("{}")
    assert refused(request).code == "output-exists"


def test_overwrite_replaces_both_files(request_for: Request, dense: Path) -> None:
    request = request_for(checkpoint=str(dense), overwrite=True)
    request.out.write_bytes(b"old")
    request.out.with_suffix(".json").write_text("{}")
    result = finetune(request)
    assert load_checkpoint(result.path).tensors
    assert json.loads(result.record_path.read_text())["model"] == "vit_digits"


def test_output_of_another_suffix_is_refused(request_for: Request, tmp_path: Path) -> None:
    assert refused(request_for(out=tmp_path / "model.pth")).code == "output-suffix"


def test_output_below_a_file_is_refused(request_for: Request, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert refused(request_for(out=tmp_path / "file" / "x.safetensors")).code == "output-not-writable"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"epochs": 0}, "option"),
        ({"batch_size": 0}, "option"),
        ({"lr": 0.0}, "option"),
        ({"lr": float("nan")}, "option"),
        ({"seed": -1}, "option"),
        ({"threads": -1}, "option"),
        ({"method": "evit"}, "keep-rate"),
        ({"method": "evit", "keep_rate": 7.0}, "keep-rate"),
        ({"method": "evti"}, "method-unknown"),
        ({"model": "vit_digit"}, "model-unknown"),
        ({"method": "evit", "keep_rate": 0.7, "stages": "3,9"}, "stages"),
        ({"data": "imagefolder:/nowhere"}, "data-not-found"),
        ({"method": "dynamicvit", "keep_rate": 0.7}, "checkpoint-missing"),
        ({"checkpoint": "nowhere.safetensors"}, "checkpoint-not-found"),
        ({"method": "evit", "keep_rate": 0.7, "teacher": "nowhere.safetensors"}, "option"),
        ({"recipe": "dynamicvitt"}, "recipe-unknown"),
        ({"recipe_options": {"speed": "1"}}, "recipe-option"),
        ({"recipe_options": {"source": "me"}}, "recipe-option"),
        ({"recipe_options": {"mixup": "much"}}, "recipe-option"),
        ({"recipe_options": {"mixup": "nan"}}, "recipe-option"),
        ({"recipe_options": {"rand_augment": "strong"}}, "option"),
        ({"mixed_precision": "fp8"}, "option"),
        ({"quantize": "int4"}, "option"),
        ({"device": "tpu"}, "option"),
        ({"log": "wandb"}, "option"),
        ({"save_every": "0"}, "option"),
        ({"save_every": "often"}, "option"),
        ({"max_steps": 0}, "option"),
        ({"workers": -1}, "option"),
    ],
)
def test_request_that_makes_no_sense_is_refused(fields: dict[str, Any], code: str, request_for: Request) -> None:
    error = refused(request_for(**fields))
    assert error.code == code
    assert error.expected


def test_different_classes_in_the_splits_are_refused(request_for: Request, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(folder / "train")
    (tmp_path / "data" / "val").mkdir()
    (tmp_path / "data" / "val" / "left").symlink_to(folder / "val" / "left")
    assert refused(request_for(data=f"imagefolder:{tmp_path / 'data'}")).code == "data-split"


def interrupted(request: FinetuneRequest) -> None:
    """Stop a training of two epochs after the first."""

    def progress(what: str, share: float) -> None:
        if share == 1.0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(request, progress)


def test_interrupted_training_is_resumed_or_begun_anew_but_only_when_told(request_for: Request, dense: Path) -> None:
    request = request_for(checkpoint=str(dense), epochs=2)
    expected = load_checkpoint(finetune(replace(request, out=request.out.with_name("whole.safetensors"))).path).tensors
    for told in ("resume", "overwrite"):
        interrupted(request)
        assert refused(request).code == "state-exists"
        assert refused(replace(request, resume=True, seed=7)).code == "state-mismatch"
        result = finetune(replace(request, **{told: True}))
        tensors = load_checkpoint(result.path).tensors
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
        assert not request.out.with_name(f"{request.out.name}.resume").exists()
        assert len(result.record["epochs"]) == 2
        for path in (result.path, result.record_path):
            path.unlink()


def test_average_of_the_weights_is_written_beside_them(request_for: Request, dense: Path) -> None:
    options = {**QUICK["recipe_options"], "ema_decay": "0.5"}
    result = finetune(request_for(checkpoint=str(dense), recipe_options=options))
    averaged = load_checkpoint(result.path.with_name("out.ema.safetensors")).tensors
    tensors, before = load_checkpoint(result.path).tensors, load_checkpoint(dense).tensors
    name = "blocks.0.mlp.fc1.weight"
    assert torch.allclose(averaged[name], (tensors[name] + before[name]) / 2, atol=1e-7)
    assert (result.record["output"], result.record["ema"]["file"]) == ("model", "out.ema.safetensors")
    assert 0 <= result.record["ema"]["top1"] <= 1


def test_number_of_workers_changes_nothing(request_for: Request, dense: Path) -> None:
    options = {"rand_augment": "m9", "random_erase": "0.5", "ema_decay": "0"}
    made = []
    for workers in (0, 2):
        out = request_for().out.with_name(f"{workers}.safetensors")
        request = request_for(checkpoint=str(dense), out=out, workers=workers, batch_size=8, recipe_options=options)
        made.append(load_checkpoint(finetune(request).path).tensors)
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_fp16_needs_a_gpu(request_for: Request) -> None:
    assert refused(request_for(mixed_precision="fp16"), EnvironmentLackError).code == "mixed-precision"


def test_missing_accelerate_names_the_extra(request_for: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "accelerate", None)
    assert "edgeprune[train]" in str(refused(request_for(), EnvironmentLackError))


def test_teacher_of_another_architecture(request_for: Request, dense: Path) -> None:
    request = request_for(method="dynamicvit", keep_rate=0.7, checkpoint=str(dense), teacher_model="vit_digits")
    assert refused(request).code == "option"  # whose weights?
    assert finetune(replace(request, teacher=str(dense))).record["teacher"]["file"] == "dense.safetensors"
    out = request.out.with_name("other.safetensors")
    other = replace(request, out=out, teacher=str(dense), teacher_model="deit_tiny_patch16_224")
    assert refused(other).code == "teacher-model"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_interrupted_training_leaves_nothing(
    stop: type[BaseException], request_for: Request, dense: Path, tmp_path: Path
) -> None:
    def progress(what: str, share: float) -> None:
        if share > 0.4:
            raise stop

    with pytest.raises(stop):
        finetune(request_for(checkpoint=str(dense), out=tmp_path / "deep" / "x.safetensors", epochs=2), progress)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_writing_leaves_nothing(
    request_for: Request, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune(request_for(checkpoint=str(dense), log="none"))
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_nothing_and_says_so(
    request_for: Request, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    error = refused(request_for(checkpoint=str(dense), log="none"), EnvironmentLackError)
    assert error.code == "disk-full"
    assert list(tmp_path.iterdir()) == []
