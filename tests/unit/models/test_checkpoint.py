from __future__ import annotations

import argparse
import hashlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from edgeprune.errors import EdgepruneWarning, EnvironmentLackError, InputError
from edgeprune.models.checkpoint import Checkpoint, load_checkpoint
from edgeprune.models.fit import load_into
from edgeprune.models.registry import get_model_config
from edgeprune.models.vit import VisionTransformer
from edgeprune.pruning import get_method
from edgeprune.pruning.base import StageRequest
from edgeprune.pruning.model import PrunedViT
from tests.helpers.reference_vit import randomize, tiny

DYNAMICVIT = get_method("dynamicvit")


def weights(config=None, seed=0):
    return dict(randomize(VisionTransformer(config or tiny()), seed).state_dict())


def in_memory(tensors):
    return Checkpoint(dict(tensors), "memory.pth", None, None)


def pruned(method="dynamicvit", keep_rate=0.5, **fields):
    config, m = tiny(depth=4, **fields), get_method(method)
    return randomize(PrunedViT(config, m.stages(config, StageRequest(keep_rate), m.parse_options({}))), seed=1)


def official(model):
    """The state_dict of a pruned model under DynamicViT's official names."""
    return {k.replace("prune.", "score_predictor."): v.clone() for k, v in model.state_dict().items()}


def refused(call, code):
    with pytest.raises(InputError) as caught:
        call()
    assert caught.value.code == code
    assert caught.value.expected
    assert caught.value.hint
    return caught.value


class Foreign:
    """A class of the user's own, as training scripts leave them in checkpoints."""


class RunsCode:
    def __reduce__(self):
        return (print, ("code ran",))


# ------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "bin"])
def test_flat_file_gives_its_tensors_and_hash(tmp_path, suffix):
    path, tensors = tmp_path / f"w.{suffix}", weights()
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    checkpoint = load_checkpoint(str(path))
    assert (checkpoint.file, checkpoint.wrapper) == (path.name, None)
    assert checkpoint.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert checkpoint.tensors.keys() == tensors.keys()
    assert all(torch.equal(checkpoint.tensors[k], v) for k, v in tensors.items())


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state"])
def test_wrapper_is_opened_and_other_entries_ignored(tmp_path, wrapper):
    args = argparse.Namespace(lr=0.1, nested=argparse.Namespace(x=[1]))
    torch.save({"epoch": 3, "args": args, "optimizer": {"state": {}}, wrapper: weights()}, tmp_path / "w.pth")
    checkpoint = load_checkpoint(tmp_path / "w.pth")
    assert checkpoint.wrapper == wrapper
    assert checkpoint.tensors.keys() == weights().keys()


def test_old_torch_format_is_read(tmp_path):
    torch.save({"model": weights()}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert len(load_checkpoint(tmp_path / "w.pth").tensors) == len(weights())


@pytest.mark.parametrize("wrapper", ["model_ema", "state_dict_ema"])
def test_averaged_weights_are_taken_only_when_asked(tmp_path, wrapper):
    plain, averaged = weights(seed=1), weights(seed=2)
    torch.save({"model": plain, wrapper: averaged}, tmp_path / "w.pth")
    assert torch.equal(load_checkpoint(tmp_path / "w.pth").tensors["head.bias"], plain["head.bias"])
    taken = load_checkpoint(tmp_path / "w.pth", ema=True)
    assert torch.equal(taken.tensors["head.bias"], averaged["head.bias"])
    assert taken.wrapper == wrapper


def test_missing_averaged_weights_are_an_error(tmp_path):
    torch.save({"model": weights()}, tmp_path / "w.pth")
    assert "--ema" in refused(lambda: load_checkpoint(tmp_path / "w.pth", ema=True), "checkpoint-ema").hint


def test_only_averaged_weights_ask_for_the_option(tmp_path):
    torch.save({"model_ema": weights()}, tmp_path / "w.pth")
    assert "--ema" in refused(lambda: load_checkpoint(tmp_path / "w.pth"), "checkpoint-empty").hint


@pytest.mark.parametrize("prefix", ["module.", "base_model.", "model.", "module.model.", "_orig_mod.module."])
def test_prefix_of_every_key_is_stripped(tmp_path, prefix):
    torch.save({"state_dict": {prefix + k: v for k, v in weights().items()}}, tmp_path / "w.pth")
    assert load_checkpoint(tmp_path / "w.pth").tensors.keys() == weights().keys()


def test_prefix_of_some_keys_stays(tmp_path):
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "w.pth")
    assert set(load_checkpoint(tmp_path / "w.pth").tensors) == {"module.a", "b"}


def test_missing_file_names_nearest(tmp_path):
    torch.save(weights(), tmp_path / "deit_small.pth")
    error = refused(lambda: load_checkpoint(tmp_path / "deit_smal.pth"), "checkpoint-not-found")
    assert "deit_small.pth" in error.hint


def test_missing_directory_is_said(tmp_path):
    error = refused(lambda: load_checkpoint(tmp_path / "no" / "w.pth"), "checkpoint-not-found")
    assert "directory" in error.hint


def test_directory_names_the_checkpoint_inside(tmp_path):
    save_file(weights(), tmp_path / "model.safetensors")
    error = refused(lambda: load_checkpoint(tmp_path), "checkpoint-unreadable")
    assert "model.safetensors" in error.hint


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "old.pth"])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.999])
def test_truncated_file_is_unreadable(tmp_path, suffix, share):
    path = tmp_path / f"w.{suffix}"
    if suffix == "safetensors":
        save_file(weights(), path)
    else:
        torch.save(weights(), path, _use_new_zipfile_serialization=suffix == "pth")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refused(lambda: load_checkpoint(path), "checkpoint-unreadable")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"\n<!DOCTYPE html><html>Sign in</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS"),
        (b"just a text", "neither format"),
        (b"\x80\x02" + bytes(range(200)), "damaged"),
        (b"PK\x03\x04" + bytes(300), "damaged"),
        (b"\xff\x00\x00\x00\x00\x00\x00\x00{" + b"x" * 300, "damaged"),
    ],
)
def test_file_of_another_kind_is_unreadable(tmp_path, content, word):
    (tmp_path / "w.pth").write_bytes(content)
    error = refused(lambda: load_checkpoint(tmp_path / "w.pth"), "checkpoint-unreadable")
    assert word in error.message
    assert "weights_only" not in str(error)


@pytest.mark.parametrize(("content", "name"), [(Foreign(), "Foreign"), (RunsCode(), "print")])
def test_foreign_object_is_refused_by_name_and_not_run(tmp_path, capsys, content, name):
    torch.save({"model": weights(), "extra": content}, tmp_path / "w.pth")
    error = refused(lambda: load_checkpoint(tmp_path / "w.pth"), "checkpoint-unsafe")
    assert name in error.message
    assert "safetensors" in error.hint
    assert "code ran" not in capsys.readouterr().out


def test_whole_module_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.pth")
    refused(lambda: load_checkpoint(tmp_path / "w.pth"), "checkpoint-unsafe")


@pytest.mark.parametrize("content", [{}, {"model": {}}, {"epoch": 3}, [1, 2], 5])
def test_file_without_tensors_is_an_error(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    refused(lambda: load_checkpoint(tmp_path / "w.pth"), "checkpoint-empty")


# ------------------------------------------------------------------------------------------------ hub


class EntryNotFoundError(Exception):
    pass


class LocalEntryNotFoundError(EntryNotFoundError):
    pass


class RepositoryNotFoundError(Exception):
    pass


class RevisionNotFoundError(Exception):
    pass


class HFValidationError(Exception):
    pass


@pytest.fixture
def hub(monkeypatch):
    """A hub whose answers a test sets by file name; it remembers what it was asked."""
    kinds = (EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError)
    kinds += (RevisionNotFoundError, HFValidationError)
    fake = ModuleType("huggingface_hub")
    fake.utils = SimpleNamespace(**{k.__name__: k for k in kinds})
    fake.answers, fake.asked = {}, []

    def hf_hub_download(repo, file, revision=None):
        fake.asked.append((repo, file, revision))
        answer = fake.answers.get(file, EntryNotFoundError("404"))
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    fake.hf_hub_download = hf_hub_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return fake


def test_hub_prefers_safetensors(hub, tmp_path):
    save_file(weights(), tmp_path / "model.safetensors")
    hub.answers["model.safetensors"] = tmp_path / "model.safetensors"
    checkpoint = load_checkpoint("hf-hub:timm/tiny@main")
    assert hub.asked == [("timm/tiny", "model.safetensors", "main")]
    assert checkpoint.file == "hf-hub:timm/tiny@main"
    assert checkpoint.sha256


def test_hub_falls_back_to_pytorch_file(hub, tmp_path):
    torch.save(weights(), tmp_path / "pytorch_model.bin")
    hub.answers["pytorch_model.bin"] = tmp_path / "pytorch_model.bin"
    assert len(load_checkpoint("hf-hub:timm/tiny").tensors) == len(weights())
    assert hub.asked == [("timm/tiny", f, None) for f in ("model.safetensors", "pytorch_model.bin")]


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        (EntryNotFoundError("404"), "holds none"),
        (RepositoryNotFoundError("404"), "does not exist"),
        (RevisionNotFoundError("404"), "no revision 'v9'"),
        (HFValidationError("bad"), "not a repository name"),
    ],
)
def test_hub_repository_without_weights_is_an_input_error(hub, answer, word):
    hub.answers["model.safetensors"] = answer
    assert word in refused(lambda: load_checkpoint("hf-hub:a/b@v9"), "hub-not-found").message


@pytest.mark.parametrize("answer", [LocalEntryNotFoundError("no connection"), ConnectionError("refused")])
def test_hub_out_of_reach_is_an_environment_error(hub, answer):
    hub.answers["model.safetensors"] = answer
    with pytest.raises(EnvironmentLackError) as caught:
        load_checkpoint("hf-hub:a/b")
    assert caught.value.code == "hub-unreachable"
    assert len(hub.asked) == 1


def test_installed_hub_package_is_understood_offline(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants", reason="huggingface_hub is not installed")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(EnvironmentLackError) as caught:
        load_checkpoint("hf-hub:nobody/nothing")
    assert caught.value.code == "hub-unreachable"
    assert "repository name" in refused(lambda: load_checkpoint("hf-hub:a b"), "hub-not-found").message


def test_missing_hub_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(EnvironmentLackError, match="edgeprune\\[hub\\]"):
        load_checkpoint("hf-hub:a/b")


# ------------------------------------------------------------------------------------------------ fitting


def test_weights_arrive_without_a_copy(tmp_path):
    save_file(weights(), tmp_path / "w.safetensors")
    checkpoint = load_checkpoint(tmp_path / "w.safetensors")
    with torch.device("meta"):
        model = VisionTransformer(tiny())
    report = load_into(model, checkpoint)
    assert report.matched == len(weights())
    assert (report.missing, report.unused, report.resized) == ((), (), ())
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == checkpoint.tensors[name].data_ptr()
        assert parameter.requires_grad


def test_training_on_loaded_weights_leaves_the_file_alone(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(weights(), path)
    before = path.read_bytes()
    model = VisionTransformer(tiny())
    load_into(model, load_checkpoint(path))
    with torch.no_grad():
        model.head.bias.add_(1.0)
    assert torch.equal(model.head.bias, weights()["head.bias"] + 1)
    assert path.read_bytes() == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(dtype):
    model = VisionTransformer(tiny())
    load_into(model, in_memory({k: v.to(dtype) for k, v in weights().items()}))
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_integer_weights_are_refused():
    tensors = {**weights(), "head.weight": weights()["head.weight"].to(torch.int8)}
    error = refused(lambda: load_into(VisionTransformer(tiny()), in_memory(tensors)), "checkpoint-dtype")
    assert "int8" in error.message


def test_official_dynamicvit_checkpoint_gives_the_same_logits():
    source, model = pruned(), pruned()
    tensors = official(source)
    randomize(model, seed=9)
    report = load_into(model, in_memory(tensors), key_prefixes=DYNAMICVIT.key_prefixes)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert report.matched == len(tensors)
    assert torch.equal(model(images), source(images))


def test_own_names_are_loaded_too():
    source, model = pruned(), randomize(pruned(), seed=9)
    load_into(model, in_memory(source.state_dict()), key_prefixes=DYNAMICVIT.key_prefixes)
    assert torch.equal(model.prune["2"].out_conv[4].weight, source.prune["2"].out_conv[4].weight)


@pytest.mark.parametrize("prefix", ["score_predictor.", "prune."])
@pytest.mark.parametrize("method", ["dense", "dynamicvit"])
def test_predictors_nobody_reads_are_unused_when_allowed(prefix, method):
    model, prefixes = pruned(method, keep_rate=1.0), get_method(method).key_prefixes
    tensors = official(pruned()) if method == "dynamicvit" or prefix != "prune." else pruned().state_dict()
    report = load_into(model, in_memory(tensors), key_prefixes=prefixes, ignore_prefixes=[prefix])
    assert len(report.unused) == 30
    assert report.matched == len(model.state_dict())


def test_predictors_are_left_over_when_the_method_has_none():
    error = refused(lambda: load_into(pruned("dense"), in_memory(official(pruned()))), "checkpoint-mismatch")
    assert "30 left over" in error.message
    assert "and 22 more" in error.message
    assert "dynamicvit" in error.hint
    assert len(error.details["left_over"]) == 30


def test_dense_checkpoint_does_not_fit_a_method_with_predictors():
    tensors = pruned("dense").state_dict()
    error = refused(lambda: load_into(pruned(), in_memory(tensors)), "checkpoint-mismatch")
    assert "untrained" in error.message
    assert "prune.0.in_conv.0.weight" in error.message
    assert "finetune" in error.hint


def test_fresh_predictors_are_reported_when_allowed():
    model = pruned()
    before = model.prune["0"].in_conv[1].weight.clone()
    report = load_into(model, in_memory(pruned("dense").state_dict()), fresh_prefixes=["prune."])
    assert len(report.missing) == 30
    assert torch.equal(model.prune["0"].in_conv[1].weight, before)


def test_missing_and_left_over_keys_are_listed_in_one_error():
    tensors = weights()
    tensors["extra.weight"] = tensors.pop("norm.bias")
    error = refused(lambda: load_into(VisionTransformer(tiny()), in_memory(tensors)), "checkpoint-mismatch")
    assert "1 missing (norm.bias)" in error.message
    assert "1 left over (extra.weight)" in error.message


def test_distilled_checkpoint_names_the_distilled_model():
    with torch.device("meta"):
        model = VisionTransformer(tiny(embed_dim=192, depth=12, num_heads=3, patch_size=(16, 16)))
        other = VisionTransformer(
            tiny(
                embed_dim=192,
                depth=12,
                num_heads=3,
                patch_size=(16, 16),
                image_size=(224, 224),
                distilled=True,
            )
        )
    tensors = {k: v for k, v in other.state_dict().items() if not k.startswith("head.")}
    tensors |= {k: v for k, v in model.state_dict().items() if k.startswith("head.")}
    error = refused(lambda: load_into(model, in_memory(tensors)), "checkpoint-mismatch")
    assert "dist_token" in error.message
    assert "deit_tiny_distilled_patch16_224" in error.hint


FOREIGN = {
    "ResNet": ["conv1.weight", "layer1.0.conv1.weight", "fc.weight"],
    "Swin": ["patch_embed.proj.weight", "layers.0.blocks.0.attn.qkv.weight", "norm.weight", "head.weight"],
    "ConvNeXt": ["downsample_layers.0.0.weight", "stages.0.0.dwconv.weight", "norm.weight", "head.weight"],
    "transformers": ["bert.encoder.layer.0.attention.self.query.weight", "bert.embeddings.word.weight"],
    "torchvision ViT": ["class_token", "conv_proj.weight", "encoder.layers.encoder_layer_0.ln_1.weight"],
    "CLIP": ["visual.conv1.weight", "visual.proj"],
    "EfficientNet": ["conv_stem.weight", "blocks.0.0.conv_dw.weight", "classifier.weight"],
}


@pytest.mark.parametrize("family", FOREIGN)
def test_checkpoint_of_another_architecture_is_recognised(family):
    tensors = {k: torch.ones(2) for k in FOREIGN[family]}
    error = refused(lambda: load_into(VisionTransformer(tiny()), in_memory(tensors)), "checkpoint-foreign")
    assert family in error.message
    assert FOREIGN[family][0] in error.message


def test_checkpoint_of_nothing_known_lists_its_keys():
    error = refused(lambda: load_into(VisionTransformer(tiny()), in_memory({"a": torch.ones(1)})), "checkpoint-foreign")
    assert ": a" in error.message


def test_failed_load_leaves_the_model_alone():
    model = VisionTransformer(tiny())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tensors = weights()
    del tensors["norm.bias"]
    refused(lambda: load_into(model, in_memory(tensors)), "checkpoint-mismatch")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_other_width_names_the_model_that_fits():
    with torch.device("meta"):
        model = VisionTransformer(tiny())
        other = VisionTransformer(
            tiny(embed_dim=384, depth=12, num_heads=6, patch_size=(16, 16), image_size=(224, 224))
        )
    error = refused(lambda: load_into(model, in_memory(other.state_dict())), "checkpoint-shape")
    assert "width 384, 12 blocks, patches of 16x16" in error.message
    assert "width 32, 2 blocks, patches of 8x8" in error.expected
    assert "vit_small_patch16_224" in error.hint


def test_other_classes_name_the_option():
    tensors = weights(tiny(num_classes=21))
    error = refused(lambda: load_into(VisionTransformer(tiny()), in_memory(tensors)), "checkpoint-shape")
    assert "21 classes" in error.message
    assert error.hint == "add --num-classes 21"


def test_changed_patch_size_names_the_unchanged_model():
    with torch.device("meta"):
        model = VisionTransformer(get_model_config("deit_small_patch16_224", patch_size=(8, 8)))
        other = VisionTransformer(get_model_config("deit_small_patch16_224"))
    error = refused(lambda: load_into(model, in_memory(other.state_dict())), "checkpoint-shape")
    assert error.hint.startswith("its weights fit --model deit_small_patch16_224")


def test_other_patch_size_names_the_option():
    tensors = weights(tiny(patch_size=(4, 4)))
    error = refused(lambda: load_into(VisionTransformer(tiny()), in_memory(tensors)), "checkpoint-shape")
    assert "--patch-size" in error.hint
    assert "4x4" in error.hint


# ------------------------------------------------------------------------------------------ positions


def resize(pos, prefix, side, size):
    grid = pos[:, prefix:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=size, mode="bicubic", antialias=True)
    return torch.cat([pos[:, :prefix], grid.permute(0, 2, 3, 1).reshape(1, size[0] * size[1], -1)], 1)


@pytest.mark.parametrize("size", [(48, 48), (16, 16), (16, 40)])
@pytest.mark.parametrize("fields", [{}, {"distilled": True}, {"reg_tokens": 2, "no_embed_class": True}])
def test_position_embedding_is_resized_to_the_grid(size, fields):
    small, large = tiny(**fields), tiny(image_size=size, **fields)
    tensors, model = weights(small), VisionTransformer(large)
    report = load_into(model, in_memory(tensors))
    prefix = small.num_pos_tokens - 16
    assert report.resized == (f"pos_embed 4x4 -> {size[0] // 8}x{size[1] // 8}",)
    torch.testing.assert_close(model.pos_embed.data, resize(tensors["pos_embed"], prefix, 4, large.grid))


def test_position_embedding_of_the_same_oblong_grid_is_kept():
    config = tiny(image_size=(16, 40))
    model = VisionTransformer(config)
    report = load_into(model, in_memory(weights(config)))
    assert report.resized == ()
    assert torch.equal(model.pos_embed, weights(config)["pos_embed"])


def test_oblong_grid_of_as_many_patches_is_resized_with_a_warning():
    model = VisionTransformer(tiny(image_size=(16, 64)))
    with pytest.warns(EdgepruneWarning, match="4x4, not 2x8"):
        report = load_into(model, in_memory(weights(tiny())))
    assert report.resized == ("pos_embed 4x4 -> 2x8",)


def test_unknown_oblong_grid_is_refused():
    tensors = weights(tiny(image_size=(16, 40)))
    error = refused(lambda: load_into(VisionTransformer(tiny()), in_memory(tensors)), "checkpoint-shape")
    assert "11 rows" in error.message
    assert "--image-size" in error.hint


@pytest.mark.parametrize("fields", [{}, {"distilled": True}, {"reg_tokens": 3}])
@pytest.mark.parametrize("covered", [True, False])
def test_prefix_rows_move_between_conventions_without_changing_logits(fields, covered):
    source = randomize(VisionTransformer(tiny(**fields, no_embed_class=not covered)))
    model = VisionTransformer(tiny(**fields, no_embed_class=covered)).eval()
    load_into(model, in_memory(source.state_dict()))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(images), source(images))


def test_class_row_alone_is_accepted_beside_registers():
    tensors, model = weights(tiny(reg_tokens=4)), VisionTransformer(tiny(reg_tokens=4))
    pos = tensors["pos_embed"]
    tensors["pos_embed"] = torch.cat([pos[:, :1], pos[:, 5:]], 1)
    load_into(model, in_memory(tensors))
    assert torch.equal(model.pos_embed[:, 1:5], torch.zeros(1, 4, 32))
    assert torch.equal(model.pos_embed[:, 5:], pos[:, 5:])
