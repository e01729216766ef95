from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from edgeprune.models.adapters import NotRepresentableError, from_module, from_transformers_keys
from edgeprune.models.checkpoint import load_checkpoint
from edgeprune.models.fit import load_into
from edgeprune.models.registry import MODELS
from edgeprune.models.vit import VisionTransformer as OurViT
from tests.helpers import reference_vit
from tests.helpers.reference_vit import randomize, tiny

# ------------------------------------------------------------------------------------------------ stand-ins


class Block(nn.Module):
    """What is read of timm's block."""

    def __init__(self, config):
        super().__init__()
        D = config.embed_dim
        self.norm1, self.norm2 = (nn.LayerNorm(D, eps=config.norm_eps) for _ in range(2))
        self.attn = nn.Module()
        self.attn.num_heads = config.num_heads
        self.attn.qkv, self.attn.proj = nn.Linear(D, 3 * D, bias=config.qkv_bias), nn.Linear(D, D)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.act, self.mlp.fc2 = nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D)
        if config.layer_scale:
            self.ls1, self.ls2 = nn.Module(), nn.Module()
            for scale in (self.ls1, self.ls2):
                scale.gamma = nn.Parameter(torch.ones(D))


class VisionTransformer(nn.Module):
    """Has the attributes and keys of timm's class of this name; computes by the reference."""

    def __init__(self, config):
        super().__init__()
        self._config, D = config, config.embed_dim
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(config.in_chans, D, config.patch_size, stride=config.patch_size)
        self.patch_embed.img_size, self.patch_embed.patch_size = config.image_size, config.patch_size
        tokens = {"cls_token": int(config.class_token), "reg_token": config.reg_tokens}
        for name, count in {**tokens, "dist_token": int(config.distilled)}.items():
            setattr(self, name, nn.Parameter(torch.zeros(1, count, D)) if count else None)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_pos_tokens, D))
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.depth)))
        norm = nn.LayerNorm(D, eps=config.norm_eps)
        self.norm, self.fc_norm = (nn.Identity(), norm) if config.fc_norm else (norm, nn.Identity())
        self.head = nn.Linear(D, config.num_classes)
        self.global_pool, self.no_embed_class = config.global_pool, config.no_embed_class
        self.pool_include_prefix = config.pool_include_prefix
        self.pretrained_cfg = {"architecture": "vit_fake", "mean": (0.1, 0.2, 0.3), "std": [0.4, 0.5, 0.6]}
        self.pretrained_cfg |= {"crop_pct": 0.95, "interpolation": "bilinear"}

    def forward(self, images):
        return reference_vit.logits(self._config, self.state_dict(), images)


class VisionTransformerDistilled(VisionTransformer):
    def __init__(self, config):
        super().__init__(config)
        self.head_dist = nn.Linear(config.embed_dim, config.num_classes)


def timm_like(**fields):
    config = tiny(**fields)
    kind = VisionTransformerDistilled if config.distilled else VisionTransformer
    return randomize(kind(config))


OLD_NAMES = {
    "attn.q": "attention.attention.query",
    "attn.k": "attention.attention.key",
    "attn.v": "attention.attention.value",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
}
NEW_NAMES = {
    "attn.q": "attention.q_proj",
    "attn.k": "attention.k_proj",
    "attn.v": "attention.v_proj",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
}


def transformers_keys(weights, base="vit.", old=True):
    """Rename our weights as transformers does; `old` is the layout before version 5 and of saved files."""
    top = {"norm": f"{base}layernorm", "patch_embed.proj": f"{base}embeddings.patch_embeddings.projection"}
    top |= {"head": "classifier", "head_dist": "distillation_classifier"}
    if "head_dist.weight" in weights:
        top["head"] = "cls_classifier"
    tokens = {
        "cls_token": "cls_token",
        "pos_embed": "position_embeddings",
        "dist_token": "distillation_token",
    }
    layer, names, out = ("encoder.layer" if old else "layers"), (OLD_NAMES if old else NEW_NAMES), {}
    for key, tensor in weights.items():
        part, _, leaf = key.rpartition(".")
        if key in tokens:
            out[f"{base}embeddings.{tokens[key]}"] = tensor
        elif part in top:
            out[f"{top[part]}.{leaf}"] = tensor
        else:
            _, i, inner = part.split(".", 2)
            if inner == "attn.qkv":
                for name, piece in zip("qkv", tensor.chunk(3), strict=True):
                    out[f"{base}{layer}.{i}.{names[f'attn.{name}']}.{leaf}"] = piece.clone()
            else:
                out[f"{base}{layer}.{i}.{names[inner]}.{leaf}"] = tensor
    return out


class ViTForImageClassification(nn.Module):
    """Has the configuration and keys of the transformers class of this name; computes by the reference."""

    prefix = "vit."

    def __init__(self, config, old=True, act="gelu"):
        super().__init__()
        weights = randomize(OurViT(config)).state_dict()
        self._config, self._weights, self._keys = (
            config,
            weights,
            transformers_keys(weights, self.prefix, old),
        )
        self.layernorm = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.config = SimpleNamespace(
            model_type=self.prefix[:-1],
            name_or_path="owner/fake-vit",
            hidden_act=act,
            image_size=config.image_size[0],
            patch_size=config.patch_size[0],
            num_channels=3,
            hidden_size=config.embed_dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            intermediate_size=config.mlp_dim,
            qkv_bias=config.qkv_bias,
        )

    def state_dict(self):
        return self._keys

    def forward(self, images):
        return SimpleNamespace(logits=reference_vit.logits(self._config, self._weights, images))


class DeiTForImageClassificationWithTeacher(ViTForImageClassification):
    prefix = "deit."


# ------------------------------------------------------------------------------------------------ timm

SHAPES = {
    "class token": {},
    "distilled": {"distilled": True},
    "registers": {"reg_tokens": 2},
    "registers, average, fc_norm": {
        "class_token": False,
        "global_pool": "avg",
        "fc_norm": True,
        "reg_tokens": 4,
        "no_embed_class": True,
    },
    "average over the prefix too": {"global_pool": "avg", "fc_norm": True, "pool_include_prefix": True},
    "layer scale without qkv bias": {"layer_scale": True, "qkv_bias": False},
    "other epsilon and size": {"norm_eps": 1e-5, "image_size": (16, 48), "in_chans": 1},
}


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_timm_module_becomes_config_and_weights(fields):
    module = timm_like(**fields)
    config, tensors = from_module(module)
    expected = tiny(
        **fields,
        name="vit_fake",
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
        crop_pct=0.95,
        interpolation="bilinear",
    )
    assert config == expected
    model = OurViT(config)
    model.load_state_dict(tensors)
    images = torch.randn(2, config.in_chans, *config.image_size, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model.eval()(images), module(images), rtol=1e-4, atol=1e-4)


def test_modes_of_a_training_module_are_restored():
    module = timm_like()
    module.train()
    module.norm.eval()
    from_module(module)
    assert module.training
    assert module.blocks[0].training
    assert not module.norm.training


def test_half_precision_module_gives_float32():
    module = timm_like()
    full = module.state_dict()
    module.bfloat16()
    module.forward = lambda images: reference_vit.logits(module._config, full, images.float()).bfloat16()
    _, tensors = from_module(module)
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def with_change(change):
    module = timm_like()
    change(module)
    return module


REFUSED = {
    "quick gelu": (lambda m: setattr(m.blocks[1].mlp, "act", nn.SiLU()), "activation"),
    "tanh gelu": (lambda m: setattr(m.blocks[0].mlp, "act", nn.GELU("tanh")), "activation"),
    "map pooling": (lambda m: setattr(m, "global_pool", "map"), "'map'"),
    "no classifier": (lambda m: setattr(m, "head", nn.Identity()), "classifier"),
    "qk norm": (lambda m: setattr(m.blocks[0].attn, "q_norm", nn.LayerNorm(16, eps=1e-6)), "q_norm"),
    "pre norm": (lambda m: setattr(m, "norm_pre", nn.LayerNorm(32, eps=1e-6)), "norm_pre"),
    "two epsilons": (lambda m: setattr(m.norm, "eps", 1e-3), "epsilons"),
    "no position embedding": (lambda m: setattr(m, "pos_embed", None), "lacks"),
    "gated mlp": (lambda m: setattr(m.blocks[0].mlp, "fc1", nn.Linear(32, 256)), "shapes"),
    "other block": (lambda m: setattr(m.blocks, "0", nn.Linear(1, 1)), "Linear"),
    "no blocks": (lambda m: delattr(m, "patch_embed"), "patch_embed"),
    "own forward": (lambda m: setattr(m, "forward", lambda x: type(m).forward(m, x) * 1.01), "logits differ"),
    "own output": (lambda m: setattr(m, "forward", lambda x: (x, x)), "logits"),
    "broken forward": (lambda m: setattr(m, "forward", lambda x: 1 // 0), "cannot be run"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_module_beyond_the_config_is_refused_with_the_reason(case):
    change, word = REFUSED[case]
    with pytest.raises(NotRepresentableError, match=word):
        from_module(with_change(change))


def test_unknown_class_is_refused_by_name():
    with pytest.raises(NotRepresentableError, match="Linear"):
        from_module(nn.Linear(2, 2))


# ------------------------------------------------------------------------------------------ transformers


@pytest.mark.parametrize("old", [True, False], ids=["encoder.layer", "layers"])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_transformers_module_becomes_config_and_weights(old, qkv_bias):
    config, tensors = from_module(ViTForImageClassification(tiny(norm_eps=1e-12, qkv_bias=qkv_bias), old))
    assert (config.name, config.norm_eps, config.qkv_bias) == ("fake-vit", 1e-12, qkv_bias)
    expected = randomize(OurViT(config)).state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[k], v) for k, v in expected.items())


def test_transformers_teacher_model_is_distilled():
    config, tensors = from_module(DeiTForImageClassificationWithTeacher(tiny(distilled=True)))
    assert config.distilled
    assert {"dist_token", "head_dist.weight"} <= tensors.keys()


def test_transformers_activation_is_checked():
    with pytest.raises(NotRepresentableError, match="gelu_new"):
        from_module(ViTForImageClassification(tiny(), act="gelu_new"))


@pytest.mark.parametrize("old", [True, False], ids=["encoder.layer", "layers"])
@pytest.mark.parametrize("fields", [{}, {"distilled": True}])
def test_transformers_checkpoint_is_loaded(tmp_path, old, fields):
    source = randomize(OurViT(tiny(**fields)))
    save_file(transformers_keys(source.state_dict(), "deit.", old), tmp_path / "model.safetensors")
    model = OurViT(tiny(**fields)).eval()
    report = load_into(model, load_checkpoint(tmp_path / "model.safetensors"))
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert report.matched == len(source.state_dict())
    torch.testing.assert_close(model(images), source(images), rtol=0, atol=1e-6)  # memory placement moves last bits


def test_keys_without_base_name_are_understood():
    weights = OurViT(tiny()).state_dict()
    assert from_transformers_keys(transformers_keys(weights, "")).keys() == weights.keys()


def test_distillation_token_without_its_head_is_a_register():
    weights = OurViT(tiny(distilled=True)).state_dict()
    keys = transformers_keys({k: v for k, v in weights.items() if not k.startswith("head_dist")})
    assert from_transformers_keys(keys).keys() == OurViT(tiny(reg_tokens=1)).state_dict().keys()


def test_pooler_and_mask_token_are_left_out():
    weights = OurViT(tiny()).state_dict()
    extra = {"vit.pooler.dense.weight": torch.ones(1), "vit.embeddings.mask_token": torch.ones(1)}
    assert from_transformers_keys({**transformers_keys(weights), **extra}).keys() == weights.keys()


def test_unknown_and_incomplete_parts_do_not_vanish():
    keys = transformers_keys(OurViT(tiny()).state_dict())
    keys["vit.encoder.layer.0.lambda_1"] = torch.ones(1)
    del keys["vit.encoder.layer.1.attention.attention.key.bias"]
    ours = from_transformers_keys(keys)
    assert "vit.encoder.layer.0.lambda_1" in ours
    assert "blocks.1.attn.qkv.bias" not in ours


def test_keys_of_others_are_not_translated():
    assert from_transformers_keys(OurViT(tiny()).state_dict()) is None


# ------------------------------------------------------------------------------------------ the packages


def same_logits(module):
    randomize(module)
    config, tensors = from_module(module)
    model = OurViT(config)
    model.load_state_dict(tensors)
    images = torch.randn(2, 3, *config.image_size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        theirs = module(images)
        torch.testing.assert_close(model.eval()(images), getattr(theirs, "logits", theirs), rtol=1e-5, atol=1e-5)
    return config


@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "vit_base_patch16_gap_224",
        "vit_base_patch16_reg4_gap_256",
    ],
)
def test_real_timm_model_gives_the_same_logits(name):
    timm = pytest.importorskip("timm", reason="timm (with torchvision) is not installed")
    config = same_logits(timm.create_model(name, depth=2))
    registered = MODELS[name].with_overrides(depth=2, crop_pct=config.crop_pct)  # timm evaluates DeiT at 0.9
    assert config == registered


@pytest.mark.parametrize("option", [{"qk_norm": True}, {"num_classes": 0}, {"global_pool": "map"}])
def test_real_timm_model_beyond_the_config_is_refused(option):
    timm = pytest.importorskip("timm", reason="timm (with torchvision) is not installed")
    with pytest.raises(NotRepresentableError):
        from_module(timm.create_model("vit_tiny_patch16_224", depth=1, **option))


@pytest.mark.parametrize(
    "name",
    ["ViTForImageClassification", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"],
)
def test_real_transformers_model_gives_the_same_logits(name, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    kind = transformers.ViTConfig if name.startswith("ViT") else transformers.DeiTConfig
    module = getattr(transformers, name)(kind(**sizes, image_size=32, patch_size=8))
    config = same_logits(module)
    module.save_pretrained(tmp_path)
    report = load_into(OurViT(config), load_checkpoint(tmp_path / "model.safetensors"))
    assert (report.missing, report.unused, report.resized) == ((), (), ())
