"""Manifests of bucketed and of several-density bundles with fields changed: they work or are refused, never crash."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeprune import Session
from edgeprune.errors import EdgepruneError, InputError
from edgeprune.export import ExportRequest, export_model
from edgeprune.runtime.bundle import Bundle, load_bundle
from edgeprune.runtime.session import Result

Path_ = tuple[Any, ...]
SMALL: dict[str, Any] = {"model": "vit_digits", "model_options": {"depth": 3}, "random_weights": True, "verify": False}
KINDS: dict[str, dict[str, Any]] = {
    "static buckets": {"method": "asvit", "stages": "1,2", "buckets": "20,40", "target": "onnx", "batch": (1, 2)},
    "told buckets": {"method": "sait", "stages": "1,2", "buckets": "20,40", "fill": "next-best"},
    "computed": {"method": "asvit", "stages": "1,2", "adaptive": "computed", "token_outputs": True},
    "told densities": {"method": "dynamicvit", "stages": "1,2", "densities": (0.7, 1.0, 0.5), "token_outputs": True},
    "static densities": {"method": "evit", "stages": "1", "densities": (1.0, 0.5), "target": "onnx"},
}
FIELDS = ("adaptive", "densities", "method", "graphs", "batch")
CALIBRATION = {
    "data": "digits",
    "images": 4,
    "histograms": [[[20, 3], [30, 1]], [[10, 4]]],
    "curve": [[4, 1.0], [64, 2.0]],
    "stem_ms": 1.0,
    "dense_ms": 9.0,
    "expected_ms": 2.5,
    "overflow": 0.25,
    "batch": 1,
    "threads": 1,
    "cpu": "a processor",
}
# not so large that an array of them could be made, nor small
NUMBERS = [-1, 0, 1, 2, 63, 64, 65, 2**45, 2**63, 10**30, -(2**70), 0.5, 1e308, -0.5]
OTHERS = [None, True, "", "12", "model", "no such graph", [], {}, [1], [[1]], {"a": 1}]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("fuzz")
    return {kind: export_model(ExportRequest(**SMALL, **f), folder / kind) for kind, f in KINDS.items()}


def manifest_of(bundle: Bundle) -> dict[str, Any]:
    manifest = json.loads(bundle.manifest.model_dump_json())
    if manifest["adaptive"] is not None and manifest["adaptive"]["buckets"]:
        manifest["adaptive"]["calibration"] = copy.deepcopy(CALIBRATION)
    return manifest


def write(bundle: Bundle, manifest: dict[str, Any]) -> Path:
    (bundle.path / "manifest.json").write_text(json.dumps(manifest))
    return bundle.path


def open_and_run(path: Path) -> Result:
    session = Session(path, threads=1, spinning=False, check_hashes=False)
    for density in session.densities or (None,):
        if density is not None:
            session.density = density
        batch = min(session.manifest.batch[0], 4)  # whatever is claimed, little is tried
        result = session.run(np.zeros((batch, 3, 64, 64), np.float32))
    return result


# ------------------------------------------------------------------------------------------------ edits


def places(value: Any, path: Path_ = ()) -> list[Path_]:
    """Return the paths of everything inside a JSON value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [found for key in keys for found in ((*path, key), *places(value[key], (*path, key)))]


@st.composite
def edits(draw: st.DrawFn, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest with up to three changes."""
    made = copy.deepcopy(manifest)
    for _ in range(draw(st.integers(1, 3))):
        field = draw(st.sampled_from([f for f in FIELDS if f in made]))
        path = draw(st.sampled_from([(field,), *places(made[field], (field,))]))
        *above, last = path
        parent = made
        for key in above:
            parent = parent[key]
        value = parent[last]
        kinds = ["drop", "number", "other", "copy"]
        if isinstance(value, list) and value:
            kinds += ["double", "reverse", "shorten", "lengthen"]
        if isinstance(value, str):
            kinds += ["graph"] * 3
        if isinstance(value, int) and not isinstance(value, bool):
            kinds += ["near"] * 3
        match draw(st.sampled_from(kinds)):
            case "drop":
                del parent[last]
            case "number":
                parent[last] = draw(st.sampled_from(NUMBERS))
            case "other":
                parent[last] = copy.deepcopy(draw(st.sampled_from(OTHERS)))
            case "copy":
                other = draw(st.sampled_from(places(manifest, ())))
                found: Any = manifest
                for key in other:
                    found = found[key]
                parent[last] = copy.deepcopy(found)
            case "double":
                parent[last] = value + copy.deepcopy(value)
            case "reverse":
                parent[last] = value[::-1]
            case "shorten":
                del value[draw(st.integers(0, len(value) - 1))]
            case "lengthen":
                value.append(copy.deepcopy(draw(st.sampled_from(value))))
            case "graph":
                parent[last] = draw(st.sampled_from(sorted(manifest["graphs"])))
            case "near":
                parent[last] = value + draw(st.sampled_from([-1, 1]))
    return made


def check_works_or_is_refused(bundle: Bundle, manifest: dict[str, Any]) -> None:
    """Open and run; whatever is wrong is an error of ours."""
    path, refusal = write(bundle, manifest), None
    try:
        assert np.isfinite(open_and_run(path).logits).all()
    except EdgepruneError as error:
        refusal = error
    assert refusal is None or (refusal.exit_code in (2, 3) and refusal.message and refusal.code != "error")


@pytest.mark.parametrize("kind", KINDS)
def test_the_unchanged_bundles_run(bundles: dict[str, Bundle], kind: str) -> None:
    assert np.isfinite(open_and_run(write(bundles[kind], manifest_of(bundles[kind]))).logits).all()


@pytest.mark.parametrize("kind", KINDS)
def test_changed_manifest_works_or_is_refused(bundles: dict[str, Bundle], kind: str) -> None:
    bundle = bundles[kind]

    @given(edits(manifest_of(bundle)))
    @settings(max_examples=150, suppress_health_check=list(HealthCheck))
    def check(manifest: dict[str, Any]) -> None:
        check_works_or_is_refused(bundle, manifest)

    check()


# ------------------------------------------------------------------------------------------------ what must be refused

Edit = Callable[[dict[str, Any]], object]


def buckets(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return manifest["adaptive"]["buckets"]


REFUSED: dict[str, Edit] = {
    "no stem": lambda m: m["graphs"].pop("stem"),
    "no buckets": lambda m: m["adaptive"].update(buckets=[]),
    "the last bucket is missing": lambda m: buckets(m).pop(),
    "the last bucket is too small": lambda m: buckets(m)[-1].update(capacities=[63, 63]),
    "the last bucket is too large": lambda m: buckets(m)[-1].update(capacities=[65, 64]),
    "other order": lambda m: buckets(m).reverse(),
    "not nested": lambda m: buckets(m)[0].update(capacities=[41, 1]),
    "not nested at the second stage": lambda m: buckets(m)[1].update(capacities=[40, 19]),
    "growing along a bucket": lambda m: buckets(m)[0].update(capacities=[10, 20]),
    "one stage too few": lambda m: [b.update(capacities=b["capacities"][:1]) for b in buckets(m)],
    "one stage too many": lambda m: [b["capacities"].append(1) for b in buckets(m)],
    "zero": lambda m: buckets(m)[0].update(capacities=[20, 0]),
    "negative": lambda m: buckets(m)[0].update(capacities=[20, -5]),
    "half a token": lambda m: buckets(m)[0].update(capacities=[20.5, 20]),
    "unknown graph": lambda m: buckets(m)[0].update(graph="rest_7"),
    "unknown form": lambda m: m["adaptive"].update(form="stretched"),
    "unknown fill": lambda m: m["adaptive"].update(fill="zeros"),
    "form without buckets": lambda m: m["adaptive"].update(form="slots"),
    "no stages": lambda m: m["method"].update(stages=[]),
    "a share of more than all": lambda m: buckets(m)[0].update(share=1.5),
    "negative latency": lambda m: buckets(m)[0].update(latency_ms=-1),
    "unknown field": lambda m: m["adaptive"].update(shape=1),
    "calibration without images": lambda m: m["adaptive"]["calibration"].update(images=0),
    "calibration that never ends": lambda m: m["adaptive"]["calibration"].update(expected_ms=float("inf")),
    "calibration with words": lambda m: m["adaptive"]["calibration"].update(curve=[["4", "fast"]]),
}


@pytest.mark.parametrize("edit", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("kind", ["static buckets", "told buckets"])
def test_manifest_of_buckets_is_refused(bundles: dict[str, Bundle], kind: str, edit: Edit) -> None:
    manifest = manifest_of(bundles[kind])
    edit(manifest)
    path = write(bundles[kind], manifest)
    with pytest.raises(InputError) as caught:
        load_bundle(path, check_hashes=False)
    assert caught.value.code == "bundle-invalid"


def test_density_of_an_unknown_graph_is_refused(bundles: dict[str, Bundle]) -> None:
    for kind in ("told densities", "static densities"):
        manifest = manifest_of(bundles[kind])
        manifest["densities"][1]["graph"] = "model_7"
        with pytest.raises(InputError) as caught:
            load_bundle(write(bundles[kind], manifest), check_hashes=False)
        assert caught.value.code == "bundle-invalid"


# What was found by changing manifests at random: an exception that is none of ours.
CRASHES: dict[str, tuple[str, Edit]] = {
    "dense for a rest": ("told buckets", lambda m: buckets(m)[-1].update(graph="dense")),
    "dense for a static rest": ("static buckets", lambda m: buckets(m)[-1].update(graph="dense")),
    "the stem for a rest": ("static buckets", lambda m: buckets(m)[-1].update(graph="stem")),
    "no inputs": ("static buckets", lambda m: m["graphs"]["dense"].update(inputs=[])),
    "one stage of two": ("computed", lambda m: m["method"]["stages"].pop()),
    "fewer than no tokens": ("computed", lambda m: m["method"]["stages"][1].update(kept=-64)),
    "more tokens than there are numbers": ("computed", lambda m: m["method"]["stages"][0].update(kept=10**30)),
    "more than 64 bits": ("told densities", lambda m: m["densities"][0]["stages"][0].update(kept=2**63)),
}


@pytest.mark.parametrize(("kind", "edit"), CRASHES.values(), ids=CRASHES)
def test_manifest_that_contradicts_its_graphs_is_refused(bundles: dict[str, Bundle], kind: str, edit: Edit) -> None:
    manifest = manifest_of(bundles[kind])
    edit(manifest)
    check_works_or_is_refused(bundles[kind], manifest)
