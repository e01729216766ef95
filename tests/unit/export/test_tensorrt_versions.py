"""The table of what TensorRT's parser takes, by version."""

from __future__ import annotations

from itertools import pairwise

import onnx
import pytest

from edgeprune.errors import InputError
from edgeprune.export.targets.tensorrt_versions import FAMILIES, KINDS, LEAST, as_numbers, family_of, first_that

PAIRS = list(pairwise(FAMILIES.values()))
IDS = [newer.version for _, newer in PAIRS]


@pytest.mark.parametrize(
    ("version", "family"),
    [
        ("8.5.2", "8.5"),  # JetPack 5.1
        ("8.6.2", "8.6"),  # JetPack 6.0
        ("10.3.0", "10.3"),  # JetPack 6.1 and 6.2
        ("10.13.3.9", "10.9"),  # JetPack 7.1
        ("10.16.2.10", "10.14"),  # JetPack 7.2
        ("11.4.1", "11.1"),  # JetPack 7.2.2
        ("8.6.0", "8.6"),
        ("9.3", "8.6"),
        ("10.0", "10.0"),
        ("10.2.0", "10.0"),
        ("10.8", "10.7"),
        ("12.0", "11.1"),
    ],
)
def test_version_is_judged_by_the_newest_that_is_not_newer(version: str, family: str) -> None:
    assert family_of(version).version == family


@pytest.mark.parametrize(("version", "wrong"), [("8.4.3", "8.4.3"), ("7.2", "7.2"), ("ten", "ten"), ("10", "10")])
def test_unknown_version_is_refused(version: str, wrong: str) -> None:
    with pytest.raises(InputError) as caught:
        family_of(version)
    assert caught.value.code == "tensorrt-version"
    assert wrong in caught.value.message
    assert caught.value.expected


def test_versions_are_in_order() -> None:
    numbers = [as_numbers(version) for version in FAMILIES]
    assert numbers == sorted(set(numbers))
    assert list(FAMILIES) == [family.version for family in FAMILIES.values()]
    assert LEAST in FAMILIES


@pytest.mark.parametrize(("older", "newer"), PAIRS, ids=IDS)
def test_newer_version_takes_what_an_older_one_takes(older: object, newer: object) -> None:
    assert older.opset <= newer.opset
    assert older.types <= newer.types
    assert older.topk_limit <= newer.topk_limit
    assert older.loops >= newer.loops
    assert set(older.constant) >= set(newer.constant)
    assert (older.k_tensor, older.int64) <= (newer.k_tensor, newer.int64)
    assert set(older.ignored.items()) >= set(newer.ignored.items())
    order = ("unknown", "function wins", "plugin wins")
    assert order.index(older.functions) <= order.index(newer.functions)
    for operator, types in older.operators.items():
        assert types <= newer.operators[operator], operator


@pytest.mark.parametrize(("older", "newer"), PAIRS, ids=IDS)
def test_versions_differ(older: object, newer: object) -> None:
    assert {**vars(older), "version": ""} != {**vars(newer), "version": ""}


@pytest.mark.parametrize("version", FAMILIES)
def test_every_listed_operator_is_a_standard_one(version: str) -> None:
    family = FAMILIES[version]
    newer_than_the_installed_onnx = {"Attention", "RMSNormalization", "RotaryEmbedding", "Swish"}
    missing = {name for name in family.operators if not onnx.defs.has(name)}
    assert missing <= newer_than_the_installed_onnx
    for name, place in family.constant.items():
        assert name in family.operators
        assert len(onnx.defs.get_schema(name).inputs) > place
    for name, attributes in family.ignored.items():
        assert set(attributes) <= set(onnx.defs.get_schema(name).attributes)
    assert family.loops | set(family.ignored) <= set(family.operators)


def test_element_types_have_the_names_of_onnx() -> None:
    names = {n.lower() for n in onnx.TensorProto.DataType.keys()}  # noqa: SIM118
    known = {t for types in KINDS.values() for t in types} | FAMILIES["11.1"].types
    assert known - {"float32", "float64"} <= names


@pytest.mark.parametrize(
    ("operator", "element_type", "first"),
    [
        ("LayerNormalization", "float32", "8.6"),
        ("TopK", "float32", "8.5"),
        ("TopK", "int64", "8.6"),
        ("ArgMin", "int32", "8.6"),
        ("IsNaN", "float32", "8.5"),
        ("CumSum", "float32", "8.5"),
        ("CumSum", "int64", None),
        ("Gelu", "float16", "10.0"),
        ("Attention", "bfloat16", "10.14"),
        ("Equal", "bool", None),
        ("Where", "bool", "8.5"),
        ("BitwiseAnd", "int64", None),
    ],
)
def test_operator_is_taken_from_a_version_on(operator: str, element_type: str, first: str | None) -> None:
    assert first_that(lambda family: family.takes(operator, element_type)) == first


def test_what_came_when() -> None:
    assert first_that(lambda family: "bfloat16" in family.types) == "10.0"
    assert first_that(lambda family: family.k_tensor) == "8.6"
    assert first_that(lambda family: family.functions == "plugin wins") == "10.7"
    assert first_that(lambda family: "CumSum" not in family.loops) == "10.9"
    assert first_that(lambda family: family.opset >= 18) == "10.0"
    assert first_that(lambda family: family.opset >= 99) is None
