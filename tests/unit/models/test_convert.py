"""Checkpoints of every official layout, converted there and back."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from edgeprune.convert import ConvertRequest, convert
from edgeprune.errors import InputError
from edgeprune.export import ExportRequest
from edgeprune.export.api import load_reference
from edgeprune.export.request import resolve
from edgeprune.models.checkpoint import load_checkpoint
from edgeprune.models.metadata import read_metadata
from edgeprune.models.registry import get_model_config
from edgeprune.pruning import METHODS, get_method
from edgeprune.pruning.base import StageRequest, format_stages, parse_stages
from edgeprune.pruning.model import PrunedViT
from tests.helpers.reference_vit import randomize

LVVIT = {"stem": "lvvit", "aux_head": True, "qkv_bias": False, "residual_scale": 2.0, "norm_eps": 1e-5}
MEAN = {"global_pool": "avg", "pool_include_prefix": True, "fc_norm": True}
OFFICIAL_PREFIX = {"dynamicvit": "score_predictor.", "asvit": "score_predictor.", "cropr": "cropr."}
# layout: (method, model fields, wrapper of the official file, prefix of every key)
LAYOUTS = {
    "dynamicvit": ("dynamicvit", {}, "model", ""),
    "dynamicvit-lvvit": ("dynamicvit", LVVIT, "model", ""),
    "ats": ("ats", {}, "model", ""),
    "ats-training": ("ats", {}, "model_state", "module."),
    "asvit": ("asvit", {}, "model", ""),
    "asvit-lvvit": ("asvit", LVVIT, "model", ""),
    "evit": ("evit", {}, "model", ""),
    "cropr": ("cropr", MEAN, "model", ""),
    "timm": ("dense", {}, None, ""),
    "lvvit": ("dense", LVVIT, None, "module."),
}
TRAINING = r"cross_attn\.mlp|^cropr\.\d+\.head\.|out_zero_mask"


def official_tensors(layout):
    """Weights under the names the method's official code gives them, with what only training reads."""
    method, fields, _, prefix = LAYOUTS[layout]
    config, m = get_model_config("vit_digits", **fields), get_method(method)
    stages = m.every_stage(config, StageRequest(), m.parse_options({}))
    stages = [replace(stage, scorer=stage.scorer.with_training_parts()) for stage in stages]
    state = randomize(PrunedViT(config, stages)).state_dict()
    tensors = {re.sub(r"^prune\.", OFFICIAL_PREFIX.get(method, "?"), k): v for k, v in state.items()}
    if layout == "ats-training":
        tensors |= {f"blocks.{b}.attn.out_zero_mask": torch.zeros(1, config.embed_dim) for b in range(1, 6)}
    return {prefix + k: v for k, v in tensors.items()}


def write(tmp_path, layout, **extra):
    """Write the official file of a layout and return its path."""
    wrapper, tensors, path = LAYOUTS[layout][2], official_tensors(layout), tmp_path / f"{layout}.pth"
    args = argparse.Namespace(lr=1e-3, model={"name": "deit", "nested": {"rate": [0.7, None]}})
    torch.save({wrapper: tensors, "args": args, "epoch": 3, **extra} if wrapper else tensors, path)
    return path


def request(source, out, layout=None, keys="official", **fields):
    if layout is not None:
        method, model_options = LAYOUTS[layout][:2]
        fields = {"model": "vit_digits", "method": method, "model_options": model_options, **fields}
    return ConvertRequest(source=str(source), out=out, layout=keys, **fields)


def stripped(layout):
    """The official tensors without wrapping prefixes, and those of them inference reads."""
    tensors = {k.removeprefix("module."): v for k, v in official_tensors(layout).items()}
    return tensors, {k: v for k, v in tensors.items() if not re.search(TRAINING, k)}


def same(first, second):
    return first.keys() == second.keys() and all(
        first[k].dtype == second[k].dtype and torch.equal(first[k], second[k]) for k in first
    )


def refused(call, code):
    with pytest.raises(InputError) as caught:
        call()
    assert caught.value.code == code
    return caught.value


@pytest.mark.parametrize("layout", LAYOUTS)
def test_official_to_ours_and_back_changes_no_bit(tmp_path, layout):
    source = write(tmp_path, layout)
    whole, read = stripped(layout)
    ours = convert(request(source, tmp_path / "ours.safetensors", layout, keys="edgeprune"))
    assert (ours.read, ours.matched, ours.written, ours.cast) == (len(whole), len(read), len(read), ())
    assert sum(map(len, ours.left_out.values())) == len(whole) - len(read)
    names = set(load_checkpoint(ours.path).tensors)
    assert not any(name.startswith(("score_predictor.", "cropr.")) for name in names)
    assert any(n.startswith("prune.") for n in names) == (LAYOUTS[layout][0] in OFFICIAL_PREFIX)
    back = convert(request(ours.path, tmp_path / "back.pth", format="pth"))
    loaded = torch.load(back.path, weights_only=True)
    assert set(loaded) == {"model"}
    assert same(loaded["model"], read)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_training_reads_is_kept_where_the_model_can_hold_it(tmp_path, layout):
    result = convert(request(write(tmp_path, layout), tmp_path / "w.safetensors", layout, keep_training=True))
    whole, read = stripped(layout)
    kept = whole if layout == "cropr" else read
    assert same(load_checkpoint(result.path).tensors, kept)
    assert result.metadata["training_tensors"] == str(len(kept) - len(read))
    again = convert(request(result.path, tmp_path / "again.safetensors", keep_training=True))
    assert same(load_checkpoint(again.path).tensors, kept)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keys", ["official", "edgeprune"])
def test_source_and_converted_file_export_the_same_weights(tmp_path, layout, keys):
    source = write(tmp_path, layout)
    method, fields = LAYOUTS[layout][:2]
    out = convert(request(source, tmp_path / "w.safetensors", layout, keys=keys, keep_rate=rate_of(method))).path

    def exported(path):
        rate = rate_of(method) or 1.0
        asked = ExportRequest("vit_digits", method, rate, model_options=fields, checkpoint=str(path))
        return load_reference(resolve(asked))[0].state_dict()

    assert same(exported(source), exported(out))


def rate_of(method):
    return 0.7 if method in ("dynamicvit", "evit") else None


@pytest.mark.parametrize(
    ("model", "method", "number"),
    [
        ("deit_small_patch16_224", "dense", 152),
        ("deit_small_patch16_224", "evit", 152),
        ("deit_small_patch16_224", "ats", 152),
        ("deit_small_patch16_224", "tome", 152),
        ("deit_small_patch16_224", "dynamicvit", 182),
        ("deit_small_patch16_224", "asvit", 155),
        ("lvvit_s", "dynamicvit", 234),
        ("lvvit_m", "dynamicvit", 278),
        ("lvvit_s", "asvit", 207),
    ],
)
def test_official_key_sets_of_the_real_sizes(model, method, number):
    config, m = get_model_config(model), get_method(method)
    with torch.device("meta"):
        pruned = PrunedViT(config, m.every_stage(config, StageRequest(), m.parse_options({})))
        dense = PrunedViT(config)
    added = {
        "dynamicvit": {
            f"score_predictor.{s}.{part}.{kind}"
            for s in range(3)
            for part in ("in_conv.0", "in_conv.1", "out_conv.0", "out_conv.2", "out_conv.4")
            for kind in ("weight", "bias")
        },
        "asvit": {f"score_predictor.{s}.keep_threshold" for s in range(3)},
    }.get(method, set())
    names = {m.official_key(k) for k in pruned.state_dict()}
    assert names == set(dense.state_dict()) | added
    assert len(names) == number


def test_metadata_says_what_the_file_is_for(tmp_path):
    source = write(tmp_path, "cropr")
    result = convert(request(source, tmp_path / "w.safetensors", "cropr", method_options={"tokens_per_block": "6"}))
    with safe_open(result.path, "pt") as file:
        metadata = file.metadata()
    assert metadata == result.metadata
    assert metadata["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert result.sha256 == hashlib.sha256(result.path.read_bytes()).hexdigest()
    expected = {"tool": "edgeprune", "model": "vit_digits", "method": "cropr", "stages": "1,2,3,4",
                "layout": "official", "num_classes": "10", "image_size": "64x64", "source": "cropr.pth",
                "source_wrapper": "model", "ema": "false", "training_tensors": "0"}  # fmt: skip
    assert expected.items() <= metadata.items()
    assert "keep_rate" not in metadata
    assert json.loads(metadata["method_options"]) == {"tokens_per_block": 6, "llf": True, "queries": 1}
    info = read_metadata(metadata, "w")
    assert info is not None
    assert info.model_options == MEAN
    assert "--method-option tokens_per_block=6" in info.options()


@pytest.mark.parametrize("method", METHODS)
def test_a_converted_file_needs_no_options(tmp_path, method):
    fields = {"num_classes": 7, "keep_rate": rate_of(method)}
    config, m = get_model_config("vit_digits", num_classes=7), get_method(method)
    state = randomize(PrunedViT(config, m.every_stage(config, StageRequest(), m.parse_options({})))).state_dict()
    torch.save(state, tmp_path / "w.pth")
    first = convert(
        request(tmp_path / "w.pth", tmp_path / "a.safetensors", model="vit_digits", method=method, **fields)
    )
    second = convert(request(first.path, tmp_path / "b.safetensors"))
    differ = {k for k in first.metadata | second.metadata if first.metadata.get(k) != second.metadata.get(k)}
    assert differ == {"source", "source_sha256"}
    assert same(load_checkpoint(first.path).tensors, load_checkpoint(second.path).tensors)


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "deit_small_patch16_224"},
        {"method": "evit"},
        {"keep_rate": 0.5},
        {"stages": "1,2"},
        {"num_classes": 3},
        {"model_options": {"fc_norm": True}},
    ],
)
def test_options_that_contradict_the_file_are_refused(tmp_path, fields):
    out = convert(request(write(tmp_path, "dynamicvit"), tmp_path / "a.safetensors", "dynamicvit", keep_rate=0.7)).path
    refused(lambda: convert(request(out, tmp_path / "b.safetensors", **fields)), "metadata-disagrees")
    agreed = convert(request(out, tmp_path / "b.safetensors", method="dynamicvit", keep_rate=0.7, stages="1,3,4"))
    assert agreed.metadata["keep_rate"] == "0.7"


def test_damaged_metadata_is_refused():
    texts = {"tool": "edgeprune", "model": "vit_digits", "method": "dense", "method_options": "{"}
    refused(lambda: read_metadata(texts, "w.safetensors"), "checkpoint-metadata")
    assert read_metadata({"format": "pt", "model": "other"}, "w.safetensors") is None


def test_averaged_half_precision_weights_of_another_size(tmp_path):
    tensors = {k: v.half() for k, v in official_tensors("timm").items()}
    torch.save({"model": official_tensors("timm"), "model_ema": tensors}, tmp_path / "w.pth")
    asked = request(tmp_path / "w.pth", tmp_path / "w.safetensors", "timm", ema=True, image_size=(96, 96))
    result = convert(asked)
    assert result.cast == (f"{len(tensors)} float16 -> float32",)
    assert result.resized == ("pos_embed 8x8 -> 12x12",)
    assert (result.metadata["ema"], result.metadata["source_wrapper"]) == ("true", "model_ema")
    assert result.metadata["image_size"] == "96x96"


@pytest.mark.parametrize("layout", ["dynamicvit", "asvit", "cropr"])
@pytest.mark.parametrize("other", ["dense", "dynamicvit", "asvit", "cropr", "evit", "ats"])
def test_hint_names_the_method_of_the_file(tmp_path, layout, other):
    if other == layout:
        return
    source, method = write(tmp_path, layout), LAYOUTS[layout][0]
    asked = request(source, tmp_path / "w.safetensors", layout, method=other)
    assert f"--method {method}" in refused(lambda: convert(asked), "checkpoint-mismatch").hint
    if other != "dense":  # a dense bundle may be made of any of them
        export = ExportRequest("vit_digits", other, rate_of(other) or 1.0, model_options=LAYOUTS[layout][1],
                               checkpoint=str(source))  # fmt: skip
        error = refused(lambda: load_reference(resolve(export)), "checkpoint-mismatch")
        assert f"--method {method}" in error.hint
    assert not (tmp_path / "w.safetensors").exists()


def test_hint_of_a_file_with_metadata_is_what_it_says(tmp_path):
    out = convert(request(write(tmp_path, "dynamicvit"), tmp_path / "a.safetensors", "dynamicvit")).path
    export = ExportRequest("vit_digits", "evit", 0.7, checkpoint=str(out))
    hint = refused(lambda: load_reference(resolve(export)), "checkpoint-mismatch").hint
    assert "--model vit_digits --method dynamicvit --stages 1,3,4" in hint


def test_other_stages_than_the_file_has_are_refused(tmp_path):
    asked = request(write(tmp_path, "dynamicvit"), tmp_path / "w.safetensors", "dynamicvit", stages="1,3")
    error = refused(lambda: convert(asked), "checkpoint-mismatch")
    assert "for 3 stages, the model 2" in error.message
    assert "--stages" in error.hint


def test_masks_of_ats_are_not_taken_for_another_method(tmp_path):
    asked = request(write(tmp_path, "ats-training"), tmp_path / "w.safetensors", "evit")
    assert "--method ats" in refused(lambda: convert(asked), "checkpoint-mismatch").hint


def test_file_that_matches_nothing_is_refused(tmp_path):
    torch.save({"model": {"layer1.0.conv1.weight": torch.ones(1)}}, tmp_path / "resnet.pth")
    asked = request(tmp_path / "resnet.pth", tmp_path / "w.safetensors", "timm")
    refused(lambda: convert(asked), "checkpoint-foreign")


@pytest.mark.parametrize("stages", ["3,6,9", "3:0.7,6:0.5,9:0.35"])
def test_stages_survive_as_text(stages):
    where = parse_stages(stages, 1.0)
    assert format_stages(where.blocks, where.rates) == stages
