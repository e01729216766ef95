"""Graphs whose shapes follow the image, and graphs cut into stem and rest, agree with the torch model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from edgeprune.export.emit.weights import weight_arrays
from edgeprune.export.lint import LintContext
from edgeprune.export.lint.tokens_shrink import tokens_shrink
from edgeprune.export.pipeline import PLAN_PASSES, lower
from edgeprune.export.plan import Block, Counts, Plan, Select, build_plan
from edgeprune.export.targets.registry import TARGETS
from edgeprune.export.writer import WeightStore
from edgeprune.pruning.adaptive import with_capacities
from edgeprune.pruning.model import PrunedOutput, PrunedViT
from tests.helpers import adaptive
from tests.helpers.lowering import lowered, noise, relative_error
from tests.helpers.pruned import counts_of, kept_sets, run
from tests.helpers.reference_vit import LVVIT

TARGET_NAMES = ["onnx", "ort-cpu"]
NAMES = [name for name in adaptive.ADAPTIVE if "batch mean" not in name]
BACKBONES: dict[str, tuple[int, dict[str, Any]]] = {
    **{f"{prefix} prefix, cls": (prefix, {}) for prefix in (1, 2, 5)},
    **{f"{prefix} prefix, average": (prefix, {"global_pool": "avg"}) for prefix in (1, 5)},
    # two prefix tokens and an average need a head that is not distilled
    "2 prefix, average": (1, {"reg_tokens": 1, "global_pool": "avg"}),
    "average with norm and prefix": (1, {"global_pool": "avg", "fc_norm": True, "pool_include_prefix": True}),
    "aux head": (1, LVVIT),
}
# every method meets every backbone on both targets, with the plan passes on one of them
CASES = [
    (name, backbone, target, bool((i + j + t) % 2))
    for (i, name), (j, backbone), (t, target) in product(
        enumerate(NAMES), enumerate(BACKBONES), enumerate(TARGET_NAMES)
    )
]
# cutting: every method meets every backbone, each on one target, with one fill
SPLIT_CASES = [
    (name, backbone, TARGET_NAMES[(i + j) % 2], bool((i + j // 2) % 2), bool((i // 2 + j + j // 4) % 2))
    for (i, name), (j, backbone) in product(enumerate(NAMES), enumerate(BACKBONES))
]


def model_of(name: str, backbone: str = "1 prefix, cls", **fields: Any) -> PrunedViT:
    prefix, own = BACKBONES[backbone]
    return adaptive.model_of(name, prefix, **own, **fields)


def set_thresholds(model: PrunedViT, value: float) -> PrunedViT:
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("keep_threshold"):
                parameter.fill_(value)
    return model


def images_of(model: PrunedViT, count: int = 6, seed: int = 40) -> np.ndarray:
    """Return images of different contrast: what they keep differs."""
    images = noise(model.config, count, seed)
    images *= np.geomspace(0.1, 4, count, dtype=np.float32)[:, None, None, None]
    return images


def torch_alone(model: PrunedViT, images: np.ndarray) -> list[PrunedOutput]:
    return [run(model, torch.from_numpy(images[i : i + 1])) for i in range(len(images))]


def assert_same(ours: dict[str, np.ndarray], b: int, theirs: PrunedOutput) -> None:
    """Compare image b of a graph's outputs with the image alone in torch."""
    assert np.isfinite(theirs.logits.numpy()).all()
    assert relative_error(ours["logits"][b], theirs.logits.numpy()[0]) <= 1e-4
    (image,) = kept_sets(theirs)
    for s, kept in enumerate(image):
        found = [i for i in ours[f"kept_indices_{s}"][b].tolist() if i != -1]
        assert len(found) == len(set(found))
        assert set(found) == kept
    assert ours["kept_counts"].dtype == np.int32
    assert ours["kept_counts"][b].tolist() == counts_of(theirs)[0]
    if "overflow" in ours:
        assert ours["overflow"][b] == int(theirs.overflow[0])


# ------------------------------------------------------------------------------------------------ computed


def computed(model: PrunedViT, folder: Path, target: str, *, short: bool = True) -> Any:
    return lowered(model, folder, target=target, passes=PLAN_PASSES if short else (), counts=Counts.COMPUTED)


@pytest.mark.parametrize(("name", "backbone", "target", "short"), CASES)
def test_computed_graph_agrees_with_torch(tmp_path: Path, name: str, backbone: str, target: str, short: bool) -> None:
    model = model_of(name, backbone)
    graph = computed(model, tmp_path, target, short=short)
    images = images_of(model)
    session = Opened(graph.path)
    for i, theirs in enumerate(torch_alone(model, images)):
        ours = session.run({"images": images[i : i + 1]})
        assert "overflow" in ours
        assert_same(ours, 0, theirs)
        wanted = [min(c, s.counts.kept) for c, s in zip(counts_of(theirs)[0], model.stages, strict=True)]
        assert [ours[f"kept_indices_{s}"].shape[1] for s in range(len(wanted))] == wanted


@pytest.mark.parametrize("name", NAMES)
def test_the_images_of_these_tests_keep_different_numbers(name: str) -> None:
    for backbone in BACKBONES:
        model = model_of(name, backbone)
        counts = {tuple(counts_of(out)[0]) for out in torch_alone(model, images_of(model))}
        assert len(counts) > 1 or (name, backbone) == ("ats paper", "aux head")


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("target", TARGET_NAMES)
@pytest.mark.parametrize(("threshold", "kept"), [(1e6, 0), (-1.0, 16)])
def test_computed_graph_keeps_nothing_or_everything(
    tmp_path: Path, threshold: float, kept: int, target: str, backbone: str
) -> None:
    model = set_thresholds(model_of("asvit", backbone), threshold)
    graph = computed(model, tmp_path, target)
    images = images_of(model, 2)
    for i, theirs in enumerate(torch_alone(model, images)):
        assert counts_of(theirs) == [[kept, kept]]
        assert_same(graph.run(images[i : i + 1]), 0, theirs)


@pytest.mark.parametrize("target", TARGET_NAMES)
def test_computed_graph_reports_overflow_of_any_stage(tmp_path: Path, target: str) -> None:
    model = set_thresholds(model_of("asvit, few slots"), 0.05)
    graph, images = computed(model, tmp_path, target), images_of(model, 12)
    flags = set()
    for i, theirs in enumerate(torch_alone(model, images)):
        assert_same(ours := graph.run(images[i : i + 1]), 0, theirs)
        flags.add(int(ours["overflow"][0]))
    assert flags == {0, 1}


# ------------------------------------------------------------------------------------------------ stem and rest


class Opened:
    """A graph opened once."""

    def __init__(self, path: Path) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = [info.name for info in self._session.get_inputs()]
        self._names = [info.name for info in self._session.get_outputs()]

    def run(self, feeds: dict[str, np.ndarray], keep: object = ()) -> dict[str, np.ndarray]:
        return dict(zip(self._names, self._session.run(None, feeds), strict=True))

    def join(self, parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(parts)


@dataclass
class Parts:
    """Stem and rest as written, and their plan."""

    stem: onnx.ModelProto
    rest: onnx.ModelProto
    stem_path: Path
    rest_path: Path
    plan: Plan

    @property
    def opened(self) -> tuple[Opened, Opened]:
        return Opened(self.stem_path), Opened(self.rest_path)


def split(
    model: PrunedViT,
    folder: Path,
    target: str,
    capacities: Sequence[int],
    *,
    fill: bool = False,
    short: bool = True,
    batch: tuple[int, int] = (1, 4),
) -> Parts:
    """Lower stem and rest as a bundle holds them; on a target that takes slots these are the most there may be."""
    told = TARGETS[target].takes_slots
    fields: dict[str, Any] = {"counts": Counts.GIVEN, "batch": (1, 1)} if told else {"batch": batch}
    stages = with_capacities(model.stages, capacities, fill=fill)
    plan = build_plan(model.config, stages, token_outputs=True, split=True, **fields)
    for plan_pass in PLAN_PASSES if short else ():
        plan = plan_pass(plan)
    label = "_".join(map(str, capacities))
    stem, rest = (folder / f"{part}_{label}_{fill}.onnx" for part in ("stem", "rest"))
    with WeightStore(folder / f"data_{label}_{fill}") as store:
        made = lower(plan, weight_arrays(model), TARGETS[target], [stem, rest], store, opset=17)
    return Parts(made[stem], made[rest], stem, rest, plan)


def bucket_tuples(model: PrunedViT) -> Iterator[tuple[int, ...]]:
    """Yield the slots, the smallest there are, and falling sizes between."""
    slots = tuple(stage.counts.kept for stage in model.stages)
    yield slots
    yield tuple(1 for _ in slots)
    middle = max(1, slots[0] // 2)
    yield tuple(max(1, min(middle - 2 * s, k)) for s, k in enumerate(slots))
    yield tuple(max(1, k - s - 1) for s, k in enumerate(slots))


def run_parts(stem: Opened, rest: Opened, images: np.ndarray, capacities: Sequence[int]) -> dict[str, np.ndarray]:
    handed = stem.run({"images": images})
    own = {"slots": np.array(capacities, np.int64)} if "slots" in rest.inputs else {}
    return rest.run({name: own[name] if name in own else handed[name] for name in rest.inputs})


@pytest.mark.parametrize(("name", "backbone", "target", "short", "fill"), SPLIT_CASES)
def test_stem_and_rest_agree_with_torch(
    tmp_path: Path, name: str, backbone: str, target: str, short: bool, fill: bool
) -> None:
    model = model_of(name, backbone)
    images = images_of(model, 4)
    told = TARGETS[target].takes_slots
    slots = tuple(stage.counts.kept for stage in model.stages)
    parts = split(model, tmp_path, target, slots, fill=fill, short=short).opened if told else None
    for capacities in bucket_tuples(model):
        stem, rest = parts or split(model, tmp_path, target, capacities, fill=fill, short=short).opened
        reference = model.with_stages(with_capacities(model.stages, capacities, fill=fill))
        theirs = torch_alone(reference, images)
        groups = [[i] for i in range(len(images))] if told else [[0], [1, 2, 3], [3, 0, 2, 1]]
        for group in groups:
            ours = run_parts(stem, rest, images[group], capacities)
            assert "overflow" not in ours
            for b, i in enumerate(group):
                assert_same(ours, b, theirs[i])
                assert all(ours[f"kept_indices_{s}"].shape[1] == c for s, c in enumerate(capacities))


@pytest.mark.parametrize("fill", [False, True], ids=["mask", "next-best"])
@pytest.mark.parametrize("target", TARGET_NAMES)
@pytest.mark.parametrize("threshold", [1e6, -1.0])
def test_stem_and_rest_keep_nothing_or_everything(tmp_path: Path, threshold: float, target: str, fill: bool) -> None:
    for i, backbone in enumerate(("1 prefix, cls", "5 prefix, average", "aux head")):
        model = set_thresholds(model_of("asvit", backbone), threshold)
        (tmp_path / str(i)).mkdir()
        images, capacities = images_of(model, 1), (16, 16)
        stem, rest = split(model, tmp_path / str(i), target, capacities, fill=fill).opened
        (theirs,) = torch_alone(model.with_stages(with_capacities(model.stages, capacities, fill=fill)), images)
        assert_same(run_parts(stem, rest, images, capacities), 0, theirs)


def outputs_of(model: onnx.ModelProto) -> list[bytes]:
    return sorted(value.SerializeToString(deterministic=True) for value in model.graph.output)


@pytest.mark.parametrize("name", NAMES)
def test_static_stems_of_all_buckets_are_the_same(tmp_path: Path, name: str) -> None:
    """A bundle keeps one stem for all its rests."""
    model = model_of(name)
    stems = [split(model, tmp_path, "onnx", capacities).stem for capacities in bucket_tuples(model)]
    for stem in stems[1:]:
        assert list(stem.graph.node) == list(stems[0].graph.node)
        assert outputs_of(stem) == outputs_of(stems[0])


# ------------------------------------------------------------------------------------------------ the cut


@pytest.mark.parametrize("target", TARGET_NAMES)
@pytest.mark.parametrize("name", NAMES)
def test_rest_reads_what_the_stem_hands_over_and_nothing_else(tmp_path: Path, name: str, target: str) -> None:
    for i, (backbone, fill) in enumerate((("1 prefix, cls", False), ("5 prefix, average", True), ("aux head", False))):
        (tmp_path / str(i)).mkdir()
        model = model_of(name, backbone)
        slots = tuple(stage.counts.kept for stage in model.stages)
        parts = split(model, tmp_path / str(i), target, slots, fill=fill)
        told = TARGETS[target].takes_slots
        outputs = {v.name: v.type.tensor_type for v in parts.stem.graph.output}
        inputs = {v.name: v.type.tensor_type for v in parts.rest.graph.input}
        assert [v.name for v in parts.stem.graph.input] == ["images"]
        assert set(inputs) - {"slots"} <= set(outputs)
        assert set(outputs) - set(inputs) <= {"token_count"}
        assert {"token_ranks", "token_count"} <= set(outputs)
        assert ("slots" in inputs) == told
        batch = parts.stem.graph.input[0].type.tensor_type.shape.dim[0]
        for key, kind in outputs.items():
            assert kind.shape.dim[0] == batch, key
            if key in inputs:
                assert inputs[key] == kind, key


@pytest.mark.parametrize("target", TARGET_NAMES)
@pytest.mark.parametrize("name", NAMES)
def test_no_work_of_the_stem_is_done_again(tmp_path: Path, name: str, target: str) -> None:
    model = model_of(name)
    parts = split(model, tmp_path, target, tuple(stage.counts.kept for stage in model.stages))
    stem, rest = parts.stem.graph, parts.rest.graph
    made = [{o for node in graph.node for o in node.output} for graph in (stem, rest)]
    names = [{node.name for node in graph.node if node.name} for graph in (stem, rest)]
    assert not made[0] & made[1]
    assert not names[0] & names[1]
    known = made[1] | {v.name for v in rest.input} | {t.name for t in rest.initializer} | {""}
    assert all(read in known for node in rest.node for read in node.input)
    # every block's MLP is in one of both, and in front of the first stage in the stem
    first = first_block(parts.plan)
    blocks = [{o for o in outputs if o.endswith(".mlp.fc1")} for outputs in made]
    expected = {f"blocks.{i}.mlp.fc1" for i in range(first)}
    assert blocks[0] == expected
    assert blocks[1] == {f"blocks.{i}.mlp.fc1" for i in range(first, model.config.depth)}
    # and what reads the pixels is in the stem
    assert all("images" not in node.input for node in rest.node)


@pytest.mark.parametrize("target", TARGET_NAMES)
@pytest.mark.parametrize("name", NAMES)
def test_cut_copies_no_weights(tmp_path: Path, name: str, target: str) -> None:
    """The class token asks in the stem and the kept tokens in the rest: only a query projection is read by both."""
    model = model_of(name)
    parts = split(model, tmp_path, target, tuple(stage.counts.kept for stage in model.stages))
    large: list[dict[str, list[tuple[str, str]]]] = [
        {
            t.name: [(entry.key, entry.value) for entry in t.external_data]
            for t in graph.initializer
            if np.prod(t.dims) >= model.config.embed_dim**2
        }
        for graph in (parts.stem.graph, parts.rest.graph)
    ]
    both = large[0].keys() & large[1].keys()
    assert large[0] and large[1]
    assert all(".attn.qkv.q." in key for key in both)
    assert len(both) <= 1
    assert all(large[0][key] == large[1][key] for key in both)


# ------------------------------------------------------------------------------------------------ lint


def findings(model: onnx.ModelProto, plan: Plan, target: str) -> dict[str, list[str]]:
    rules = TARGETS[target].rules
    assert rules is not None
    context = LintContext(model, plan, TARGETS[target].domains)
    return {rule.__name__: [f.node for f in found] for rule in rules() if (found := rule(context))}


@pytest.mark.parametrize("target", TARGET_NAMES)
@pytest.mark.parametrize("name", NAMES)
def test_lint_accepts_every_form(tmp_path: Path, name: str, target: str) -> None:
    model = model_of(name)
    graph = computed(model, tmp_path, target)
    assert findings(graph.model, graph.plan, target) == {}
    parts = split(model, tmp_path, target, tuple(stage.counts.kept for stage in model.stages))
    assert findings(parts.stem, parts.plan, target) == {}
    assert findings(parts.rest, parts.plan, target) == {}


def first_block(plan: Plan) -> int:
    """Return the first block whose MLP has fewer rows; dead-row elimination moves a stage into the block before."""
    for step in plan.steps:
        if isinstance(step, (Select, Block)) and step.stage is not None:
            return step.index if isinstance(step, Block) else step.stage.block
    raise AssertionError("no stage")


def blocks_behind(plan: Plan) -> list[str]:
    """Return the blocks whose MLP must have as many rows as the image keeps, and is not a slice of the classifier's."""
    first = first_block(plan)
    steps = [step for step in plan.steps if isinstance(step, Block)]
    return [f"blocks.{s.index}.mlp.fc1" for s in steps if s.index >= first and s.projected_rows.value != "head"]


@pytest.mark.parametrize("short", [True, False], ids=["passes", "plain"])
@pytest.mark.parametrize("target", TARGET_NAMES)
@pytest.mark.parametrize("name", NAMES)
def test_computed_graph_with_masked_slots_is_refused(tmp_path: Path, name: str, target: str, short: bool) -> None:
    """The static form has the same outputs and saves nothing."""
    model = model_of(name)
    promised = computed(model, tmp_path / "a", target, short=short).plan
    masked = lowered(model, tmp_path / "b", target=target, passes=PLAN_PASSES if short else ())
    found = tokens_shrink(LintContext(masked.model, promised, TARGETS[target].domains))
    assert [f.node for f in found] == blocks_behind(promised)
    assert all("as many as are asked for" in f.reason for f in found)


@pytest.mark.parametrize("target", TARGET_NAMES)
@pytest.mark.parametrize("name", NAMES)
def test_computed_graph_whose_count_was_frozen_is_refused(tmp_path: Path, name: str, target: str) -> None:
    """One stage slices a constant number of rows: every block up to the next stage at least is found."""
    model = model_of(name)
    graph = computed(model, tmp_path, target, short=False)
    proto = graph.model
    frozen = [node for node in proto.graph.node if node.op_type == "Cast" and node.name.endswith("count_kept")]
    assert len(frozen) == len(model.stages)
    name_of_count = frozen[0].output[0]
    proto.graph.node.remove(frozen[0])
    proto.graph.initializer.append(numpy_helper.from_array(np.array([7], np.int64), name_of_count))
    found = tokens_shrink(LintContext(proto, graph.plan, TARGETS[target].domains))
    assert f"blocks.{model.stages[0].block}.mlp.fc1" in [f.node for f in found]
    assert "computes 7 rows" in found[0].reason or "computes 8 rows" in found[0].reason


@pytest.mark.parametrize("target", TARGET_NAMES)
def test_static_rest_that_does_not_shrink_is_refused(tmp_path: Path, target: str) -> None:
    model = model_of("asvit")
    slots, small_ones = (16, 16), (5, 4)
    large = split(model, tmp_path, "onnx", slots)
    small = split(model, tmp_path, "onnx", small_ones)
    assert findings(small.rest, small.plan, "onnx") == {}
    found = findings(large.rest, small.plan, "onnx")
    assert set(found) == {"tokens_shrink"}


def test_every_adaptive_method_is_here() -> None:
    assert len(NAMES) == 6
    for at, choices in ((2, 2), (3, 2), (4, 2)):
        assert all(len({case[at] for case in SPLIT_CASES if case[0] == name}) == choices for name in NAMES)
        assert all(len({case[at] for case in SPLIT_CASES if case[1] == name}) == choices for name in BACKBONES)
