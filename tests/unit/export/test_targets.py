from __future__ import annotations

import pytest

from edgeprune.errors import EnvironmentLackError, InputError
from edgeprune.export.targets import base
from edgeprune.export.targets.registry import TARGETS, get_target


def test_table_lists_what_the_design_names() -> None:
    assert list(TARGETS) == [
        "onnx", "ort-cpu", "ort-cpu-int8", "ort-cuda-fp16",
        "trt-fp32", "trt-fp16", "trt-bf16", "trt-int8", "trt-fp8",
    ]  # fmt: skip
    assert all(name == target.name and target.summary for name, target in TARGETS.items())


PRECISIONS = {
    "onnx": "fp32", "ort-cpu": "fp32", "ort-cpu-int8": "int8", "ort-cuda-fp16": "fp16",
    "trt-fp32": "fp32", "trt-fp16": "fp16", "trt-bf16": "bf16", "trt-int8": "int8", "trt-fp8": "fp8",
}  # fmt: skip


@pytest.mark.parametrize("name", PRECISIONS)
def test_target_is_available_and_whole(name: str) -> None:
    target = get_target(name)
    assert target.why_unavailable() is None
    assert target.dialect and target.passes and target.rules
    assert target.opset in target.opsets and target.precision == PRECISIONS[name]


def test_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "find_spec", lambda package: None if package == "onnxruntime" else object())
    with pytest.raises(EnvironmentLackError, match="onnxruntime") as caught:
        get_target("ort-cpu")
    assert "edgeprune[ort]" in caught.value.message


def test_unknown_target_names_the_nearest() -> None:
    with pytest.raises(InputError) as caught:
        get_target("ort-cppu")
    assert caught.value.code == "target-unknown"
    assert "ort-cpu" in str(caught.value.hint)


def test_only_the_portable_target_is_bound_to_standard_operators() -> None:
    assert set(TARGETS["onnx"].domains) == {"", "ai.onnx"}
    assert "com.microsoft" in TARGETS["ort-cpu"].domains
