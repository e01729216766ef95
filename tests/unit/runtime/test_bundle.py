"""Bundles: what is refused and why."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from edgeprune.errors import EdgepruneError, InputError
from edgeprune.runtime.bundle import load_bundle
from tests.helpers.bundles import tiny_model, write_tiny


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "bundle").path


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = bundle / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def relist(bundle: Path, name: str) -> None:
    """Make the manifest agree with a changed file, as somebody who knows the format would."""
    raw = (bundle / name).read_bytes()
    entry = {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}
    edit(bundle, lambda m: m["files"].__setitem__(name, entry))


def refused(path: Path, **options: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        load_bundle(path, **options)
    error = caught.value
    assert error.expected
    assert error.hint
    assert str(path) in error.message or "manifest.json" in error.message
    return error


def test_bundle_loads_when_it_is_whole(bundle: Path) -> None:
    loaded = load_bundle(str(bundle))
    assert loaded.manifest.model.name == "tiny"
    assert loaded.graph_path("model") == bundle / "model.onnx"
    assert sorted(loaded.manifest.files) == ["dense.onnx", "dense.onnx.data", "model.onnx", "model.onnx.data"]


def test_bundle_loads_when_it_was_moved_and_holds_unlisted_files(bundle: Path) -> None:
    moved = bundle.rename(bundle.with_name("elsewhere"))
    (moved / "notes.txt").write_text("mine")
    assert load_bundle(moved).path == moved


def test_bundle_loads_when_the_directory_itself_is_a_link(bundle: Path) -> None:
    link = bundle.with_name("link")
    link.symlink_to(bundle)
    assert load_bundle(link).graph_path("dense").is_file()


def test_graph_path_names_the_graphs_when_one_is_absent(bundle: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_bundle(bundle).graph_path("random")
    assert caught.value.code == "graph-missing"
    assert "dense, model" in str(caught.value)


@pytest.mark.parametrize("kind", ["absent", "file", "empty", "other"])
def test_bundle_is_not_found_when_there_is_none(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "file":
        path.write_text("{}")
    elif kind != "absent":
        path.mkdir()
        if kind == "other":
            (path / "model.onnx").write_bytes(b"")
    assert refused(path).code == "bundle-not-found"


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"not json",
        b'{"tool": "edgeprune"',
        b"\xff\xfe\x00",
        b"[]",
        b"null",
        b"{}",
        b'{"name": "resnet", "version": 1}',
        b'{"tool": "other", "schema_version": 1}',
        b"[" * 200_000,
    ],
    ids=["empty", "text", "cut", "bytes", "list", "null", "blank", "foreign", "other-tool", "deep"],
)
def test_bundle_is_refused_when_the_manifest_is_not_ours(bundle: Path, text: bytes) -> None:
    (bundle / "manifest.json").write_bytes(text)
    assert refused(bundle).code == "bundle-invalid"


def test_bundle_is_refused_when_the_manifest_is_a_pipe(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()
    os.mkfifo(bundle / "manifest.json")
    assert refused(bundle).code == "bundle-invalid"


def test_bundle_is_refused_when_the_manifest_is_a_directory(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()
    (bundle / "manifest.json").mkdir()
    assert refused(bundle).code == "bundle-invalid"


def test_bundle_is_refused_when_the_manifest_is_huge(bundle: Path) -> None:
    with (bundle / "manifest.json").open("r+b") as file:
        file.truncate(1 << 30)
    assert "larger than 16 MiB" in refused(bundle).message


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.__setitem__("surprise", 1),
        lambda m: m["model"].__setitem__("surprise", 1),
        lambda m: m.pop("target"),
        lambda m: m.__setitem__("opset", "17"),
        lambda m: m.__setitem__("lowering", "guessed"),
        lambda m: m.__setitem__("batch", [1]),
        lambda m: m.__setitem__("batch", [0, 0]),
        lambda m: m.__setitem__("batch", [8, 1]),
        lambda m: m.__setitem__("files", {}),
        lambda m: m["files"].pop("dense.onnx"),
        lambda m: m["files"]["model.onnx"].__setitem__("sha256", "abc"),
        lambda m: m["graphs"].pop("model"),
        lambda m: m["preprocessing"].__setitem__("std", [0.5, 0.5, 0.0]),
        lambda m: m["preprocessing"].__setitem__("mean", [0.5, 0.5, float("nan")]),
        lambda m: m["preprocessing"].__setitem__("crop_pct", 1e-9),
        lambda m: m["preprocessing"].__setitem__("image_size", [0, 8]),
    ],
)
def test_bundle_is_refused_when_a_field_is_wrong(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit(bundle, change)
    assert refused(bundle).code == "bundle-invalid"


def test_refusal_names_the_field_when_it_is_unknown(bundle: Path) -> None:
    edit(bundle, lambda m: m["method"].__setitem__("surprise", 1))
    assert "method.surprise" in refused(bundle).message


@pytest.mark.parametrize("version", [2, 99])
def test_bundle_asks_for_an_upgrade_when_the_schema_is_newer(bundle: Path, version: int) -> None:
    edit(bundle, lambda m: m.update(schema_version=version, field_of_the_future=1))
    error = refused(bundle)
    assert error.code == "bundle-version"
    assert "upgrade" in str(error.hint)


@pytest.mark.parametrize("version", [0, -1, "1", 1.0, True, None])
def test_bundle_is_refused_when_the_schema_version_is_unknown(bundle: Path, version: object) -> None:
    edit(bundle, lambda m: m.update(schema_version=version))
    assert refused(bundle).code == "bundle-version"


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "dense.onnx"])
def test_bundle_is_tampered_when_a_byte_of_a_file_changes(bundle: Path, name: str) -> None:
    raw = bytearray((bundle / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (bundle / name).write_bytes(raw)
    error = refused(bundle)
    assert error.code == "bundle-tampered"
    assert name in error.message


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
@pytest.mark.parametrize("size", [0, 3])
def test_bundle_is_tampered_when_a_file_is_truncated(bundle: Path, name: str, size: int) -> None:
    os.truncate(bundle / name, size)
    error = refused(bundle, check_hashes=False)
    assert error.code == "bundle-tampered"
    assert f"has {size} bytes instead of" in error.message


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_bundle_is_tampered_when_a_file_is_missing(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    error = refused(bundle)
    assert error.code == "bundle-tampered"
    assert "is missing" in error.message


def test_bundle_is_tampered_when_a_file_is_a_pipe(bundle: Path) -> None:
    (bundle / "model.onnx").unlink()
    os.mkfifo(bundle / "model.onnx")
    assert refused(bundle).code == "bundle-tampered"


def test_changed_byte_goes_unseen_when_hashes_are_not_checked(bundle: Path) -> None:
    raw = bytearray((bundle / "model.onnx.data").read_bytes())
    raw[0] ^= 1
    (bundle / "model.onnx.data").write_bytes(raw)
    assert load_bundle(bundle, check_hashes=False).path == bundle


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "/etc/hostname",
        "sub/../../secret",
        "sub/../model.onnx",
        "..",
        "",
        "a\\..\\..\\b",
        "C:\\x",
        "C:x",
        "nul\0byte",
    ],
)
def test_bundle_is_refused_when_a_listed_path_leaves_it(bundle: Path, name: str) -> None:
    (bundle.parent / "secret").write_text("s")
    entry = {"sha256": hashlib.sha256(b"s").hexdigest(), "bytes": 1}
    edit(bundle, lambda m: m["files"].__setitem__(name, entry))
    assert refused(bundle).code == "bundle-path"


def test_bundle_is_refused_when_a_listed_name_is_longer_than_names_can_be(bundle: Path) -> None:
    edit(bundle, lambda m: m["files"].__setitem__("x" * 5000, m["files"]["model.onnx"]))
    assert refused(bundle).code in ("bundle-path", "bundle-tampered")  # by Python version


def test_bundle_is_refused_when_a_graph_path_leaves_it(bundle: Path) -> None:
    outside = bundle.parent / "model.onnx"
    (bundle / "model.onnx").rename(outside)
    entry = {"sha256": hashlib.sha256(outside.read_bytes()).hexdigest(), "bytes": outside.stat().st_size}

    def point_outside(manifest: dict[str, Any]) -> None:
        manifest["graphs"]["model"]["file"] = "../model.onnx"
        manifest["files"]["../model.onnx"] = entry
        del manifest["files"]["model.onnx"]

    edit(bundle, point_outside)
    assert refused(bundle).code == "bundle-path"


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "manifest.json"])
def test_bundle_is_refused_when_a_link_leaves_it(bundle: Path, name: str) -> None:
    (bundle / name).rename(bundle.parent / "outside")
    (bundle / name).symlink_to(bundle.parent / "outside")
    assert refused(bundle).code == "bundle-path"


def test_bundle_is_refused_when_a_parent_directory_is_a_link_out(bundle: Path) -> None:
    outside = bundle.parent / "outside"
    outside.mkdir()
    (bundle / "model.onnx.data").rename(outside / "w")
    (bundle / "sub").symlink_to(outside)
    edit(bundle, lambda m: m["files"].__setitem__("sub/w", m["files"].pop("model.onnx.data")))
    assert refused(bundle).code == "bundle-path"


def test_bundle_is_refused_when_links_form_a_loop(bundle: Path) -> None:
    (bundle / "model.onnx").unlink()
    (bundle / "model.onnx").symlink_to("model.onnx")
    assert refused(bundle).code in ("bundle-path", "bundle-tampered")


def test_bundle_loads_when_a_link_stays_inside(bundle: Path) -> None:
    (bundle / "model.onnx.data").rename(bundle / "weights")
    (bundle / "model.onnx.data").symlink_to("weights")
    assert load_bundle(bundle).path == bundle


def test_bundle_is_tampered_when_the_weights_are_not_listed(bundle: Path) -> None:
    edit(bundle, lambda m: m["files"].pop("model.onnx.data"))
    error = refused(bundle, check_hashes=False)
    assert error.code == "bundle-tampered"
    assert "model.onnx.data" in error.message


@pytest.mark.parametrize(
    "location", ["../outside.bin", "/etc/hostname", "*/_ORT_MEM_ADDR_/*", "other.bin", "manifest.json", "."]
)
def test_bundle_is_refused_when_weights_lie_in_an_unlisted_file(bundle: Path, location: str) -> None:
    for outside in (bundle.parent / "outside.bin", bundle / "other.bin"):
        outside.write_bytes(b"\0" * 48)
    model = onnx.load(str(bundle / "model.onnx"), load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    onnx.save(model, str(bundle / "model.onnx"))
    relist(bundle, "model.onnx")
    assert refused(bundle).code in ("bundle-path", "bundle-tampered")


@pytest.mark.parametrize("raw", [b"", b"garbage, no graph", b"\x3a\xff\xff\xff\xff\x0f", b"\x80" * 20])
def test_bundle_is_refused_when_a_listed_graph_is_no_onnx_file(bundle: Path, raw: bytes) -> None:
    (bundle / "model.onnx").write_bytes(raw)
    relist(bundle, "model.onnx")
    assert refused(bundle).code == "graph-invalid"


def test_every_refusal_is_an_input_error_with_exit_code_2(bundle: Path) -> None:
    (bundle / "model.onnx").unlink()
    with pytest.raises(EdgepruneError) as caught:
        load_bundle(bundle)
    assert caught.value.exit_code == 2


def test_external_locations_are_found_wherever_a_graph_can_hold_a_tensor(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    from edgeprune.runtime.onnx_files import find_external_locations

    def outside(name: str) -> onnx.TensorProto:
        tensor = onnx.TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1])
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="offset", value="0")
        tensor.external_data.add(key="location", value=name)
        return tensor

    model = tiny_model()
    model.graph.initializer.append(outside("initializer"))
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=outside("attribute")))
    inner = helper.make_graph([], "inner", [], [], [outside("subgraph")])
    model.graph.node.append(helper.make_node("If", ["c"], ["d"], then_branch=inner, else_branch=inner))
    sparse = onnx.SparseTensorProto(values=outside("sparse"), indices=outside("indices"), dims=[1])
    model.graph.sparse_initializer.append(sparse)
    body = [helper.make_node("Constant", [], ["y"], value=outside("function"))]
    model.functions.append(helper.make_function("local", "F", [], ["y"], body, [helper.make_opsetid("", 17)]))
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    names = {"initializer", "attribute", "subgraph", "sparse", "indices", "function"}
    assert find_external_locations(path) == names
