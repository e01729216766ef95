"""Every further method on a tiny model, with options that make it interesting."""

from __future__ import annotations

from typing import Any

import torch

from edgeprune.pruning.model import PrunedViT
from tests.helpers.lowering import random_model, small, stages_of

# method, keep rate, stages, options
METHODS: dict[str, tuple[str, float, str | None, dict[str, str]]] = {
    "ats official": ("ats", 1.0, "1,2", {"variant": "official"}),
    "ats paper": ("ats", 0.7, "1,2", {"variant": "paper"}),
    "asvit": ("asvit", 1.0, "1,2", {}),
    "asvit, few slots": ("asvit", 0.5, "1,2", {}),
    "asvit, batch mean": ("asvit", 1.0, "1,2", {"count": "batch-mean"}),
    "sait mass": ("sait", 1.0, "1", {"mass": "0.7"}),
    "sait value, few slots": ("sait", 0.375, "1", {"select": "value", "value": "0.9", "tis": "colmean"}),
    "sait topk": ("sait", 0.5, "1", {"select": "topk"}),
    "cropr": ("cropr", 1.0, None, {"tokens_per_block": "2"}),
    "cropr without fusion": ("cropr", 1.0, None, {"tokens_per_block": "2", "llf": "false"}),
    "tome": ("tome", 1.0, None, {"r": "3"}),
    "tome, plain attention": ("tome", 1.0, None, {"r": "3", "schedule": "decreasing", "prop_attn": "false"}),
}
ADAPTIVE = [name for name, (method, *_) in METHODS.items() if method in ("ats", "asvit", "sait") and "topk" not in name]
FIXED = [name for name in METHODS if name not in ADAPTIVE]
PREFIXES: dict[int, dict[str, Any]] = {1: {}, 2: {"distilled": True}, 5: {"reg_tokens": 4}}


def model_of(name: str, prefix: int = 1, **fields: Any) -> PrunedViT:
    method, rate, text, options = METHODS[name]
    config = small(**{"depth": 3, **PREFIXES[prefix], **fields})
    model = random_model(config, stages_of(config, method, rate, text, **options))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("keep_threshold"):
                parameter.fill_(0.03 + 0.01 * int(key.split(".")[1]))
    return model
