"""Sessions of every form of an adaptive method, and of several densities, against each image alone in torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from edgeprune import Session
from edgeprune.data.preprocess import preprocess
from edgeprune.errors import InputError
from edgeprune.export import ExportRequest, export_model, graphs, load_torch_model
from edgeprune.export.request import resolve
from edgeprune.pruning.adaptive import with_capacities
from edgeprune.pruning.model import PrunedOutput, PrunedViT
from edgeprune.runtime import opener
from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.ort import OrtBackend
from edgeprune.runtime.router import Trace
from edgeprune.runtime.session import Result

Bucket = tuple[int, ...]
METHODS: dict[str, dict[str, Any]] = {
    "ats": {"method": "ats", "stages": "1,2,3"},
    "asvit": {"method": "asvit", "stages": "1,2"},
    "sait": {"method": "sait", "stages": "1,2", "method_options": {"mass": "0.8"}},
}
FEW_SLOTS = {"ats": 0.5, "asvit": 0.68, "sait": 0.6}
TARGETS = ["onnx", "ort-cpu"]
FORMS = ["computed", "slots", "buckets", "buckets, next-best"]
COUNT = 8


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def images_of(count: int = COUNT, seed: int = 5) -> np.ndarray:
    """Return inputs of different contrast and smoothness: what they keep differs."""
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((count, 3, 64, 64), np.float32)
    images[::2] = rng.standard_normal((len(images[::2]), 3, 8, 8), np.float32).repeat(8, 2).repeat(8, 3)
    images *= np.geomspace(0.3, 3, count, dtype=np.float32)[:, None, None, None]
    return images


@dataclass(frozen=True)
class Made:
    """A method with random weights in a checkpoint, and what torch says of the images."""

    request: ExportRequest
    model: PrunedViT

    @cached_property
    def alone(self) -> list[PrunedOutput]:
        return [run(self.model, image[None]) for image in images_of()]

    @cached_property
    def counts(self) -> np.ndarray:
        """[images, stages]."""
        return np.array([[int(c[0]) for c in out.counts] for out in self.alone])

    @property
    def slots(self) -> Bucket:
        return tuple(stage.counts.kept for stage in self.model.stages)

    @property
    def narrow(self) -> tuple[Bucket, ...]:
        """Return buckets whose first stage fits some images and whose later stages do not: they run again."""
        wants = np.minimum(self.counts, self.slots)
        rows = []
        for share in (0.25, 0.5, 0.75):
            first = np.quantile(wants[:, 0], share, method="higher")
            later = np.quantile(wants[:, 1:], share - 0.25, axis=0, method="lower")
            rows.append([first, *later])
        nested = np.maximum.accumulate(np.minimum.accumulate(np.array([*rows, self.slots]), 1), 0)
        return tuple(dict.fromkeys(tuple(row) for row in nested.astype(int).tolist()))


def run(model: PrunedViT, images: np.ndarray) -> PrunedOutput:
    with torch.inference_mode():
        return model.run(torch.from_numpy(images))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    found: dict[Any, Made] = {}

    def make(name: str, *, keep_rate: float = 1.0) -> Made:
        key = (name, keep_rate)
        if key not in found:
            fields = {"model": "vit_digits", "model_options": {"depth": 4}, **METHODS[name], "batch": (1, COUNT)}
            request = ExportRequest(**fields, keep_rate=keep_rate, random_weights=True, token_outputs=True, seed=4)
            model = load_torch_model(request)
            weights = {k: v.clone() for k, v in model.state_dict().items()}
            for k in weights:
                if k.endswith("keep_threshold"):
                    weights[k].fill_(0.012 + 0.001 * int(k.split(".")[1]))
            file = tmp_path_factory.mktemp("weights") / "model.safetensors"
            save_file(weights, file)
            request = replace(request, random_weights=False, checkpoint=str(file), verify=False)
            found[key] = Made(request, load_torch_model(request))
        return found[key]

    return make


@pytest.fixture(scope="module")
def exported(
    made: Callable[..., Made], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str, str], tuple[Made, Bundle]]:
    """Return a function method, target, form -> bundle, each made once."""
    found: dict[tuple[str, str, str], Bundle] = {}

    def make(name: str, target: str, form: str) -> tuple[Made, Bundle]:
        of = made(name)
        if (name, target, form) not in found:
            fields: dict[str, Any] = {"adaptive": form}
            if form.startswith("buckets"):
                fields = {"buckets": "1", "fill": "next-best" if "next-best" in form else "mask"}
            out = tmp_path_factory.mktemp("bundles") / "bundle"
            with pytest.MonkeyPatch.context() as patch:  # a user's sizes never overflow unless images chose the others
                patch.setattr(graphs, "given_buckets", lambda first, slots: of.narrow)
                found[name, target, form] = export_model(replace(of.request, target=target, **fields), out)
        return of, found[name, target, form]

    return make


def open_session(bundle: Bundle, **options: Any) -> Session:
    return Session(bundle, threads=1, spinning=False, check_hashes=False, **options)


def reference_of(of: Made, form: str, image: int) -> tuple[PrunedOutput, list[int], int | None]:
    """Return what torch gives for an image alone, the counts a session reports, and the bucket where it is known."""
    if not form.startswith("buckets"):
        return of.alone[image], of.counts[image].tolist(), None
    fill = "next-best" in form
    images = images_of()[image : image + 1]
    first = int(np.searchsorted([b[0] for b in of.narrow], min(of.counts[image, 0], of.slots[0])))
    for i, bucket in enumerate(of.narrow):
        out = run(of.model.with_stages(with_capacities(of.model.stages, bucket, fill=fill)), images)
        counts = [int(c[0]) for c in out.counts]
        if i >= first and all(min(c, k) <= b for c, k, b in zip(counts, of.slots, bucket, strict=True)):
            return out, [max(c, b) for c, b in zip(counts, bucket, strict=True)] if fill else counts, i
    raise AssertionError("the last bucket holds every image")


def assert_row(result: Result, row: int, reference: tuple[PrunedOutput, list[int], int | None]) -> None:
    out, counts, bucket = reference
    expected = out.logits[0].numpy()
    assert np.abs(result.logits[row] - expected).max() <= 1e-4 * np.abs(expected).max()
    assert result.kept_counts is not None and result.overflow is not None
    assert result.kept_counts[row].tolist() == counts
    assert bool(result.overflow[row]) == bool(out.overflow[0])
    for ours, theirs in zip(result.kept, out.kept, strict=True):
        assert set(ours[row].tolist()) - {-1} == set(theirs[0].tolist()) - {-1}
    assert (result.bucket is None) == (bucket is None)
    if result.bucket is not None:
        assert result.bucket[row] == bucket


# ------------------------------------------------------------------------------------------------ every form


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", METHODS)
def test_session_gives_every_image_what_torch_gives_it_alone(
    exported: Callable[..., tuple[Made, Bundle]], name: str, target: str, form: str
) -> None:
    of, bundle = exported(name, target, form)
    session, images = open_session(bundle), images_of()
    references = [reference_of(of, form, i) for i in range(COUNT)]
    for order in ([3], [0], [6, 0, 2], [1, 1, 7], list(range(COUNT)), [5, 2, 7, 0, 4, 1, 6, 3]):
        result = session.run(images[order])
        assert len(result.logits) == len(order)
        assert [stage.shape for stage in result.kept] == [(len(order), k) for k in of.slots]
        for row, i in enumerate(order):
            assert_row(result, row, references[i])


@pytest.mark.parametrize("name", METHODS)
def test_images_and_buckets_of_these_tests_differ_and_overflow(made: Callable[..., Made], name: str) -> None:
    of = made(name)
    assert len({tuple(row) for row in of.counts.tolist()}) > 4
    assert len(of.narrow) > 2
    ends = [reference_of(of, "buckets", i)[2] for i in range(COUNT)]
    starts = np.searchsorted([b[0] for b in of.narrow], np.minimum(of.counts[:, 0], of.slots[0])).tolist()
    assert any(end is not None and end > start for start, end in zip(starts, ends, strict=True))
    assert any(end == start for start, end in zip(starts, ends, strict=True))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", METHODS)
def test_images_that_run_again_are_counted(
    exported: Callable[..., tuple[Made, Bundle]], name: str, target: str
) -> None:
    of, bundle = exported(name, target, "buckets")
    trace = Trace()
    result = open_session(bundle).run(images_of(), trace=trace)
    assert result.bucket is not None
    starts = np.searchsorted([b[0] for b in of.narrow], np.minimum(of.counts[:, 0], of.slots[0]))
    assert sum(images for _, images in trace.runs) == COUNT + int((result.bucket - starts).sum())
    assert trace.stem_s > 0 and trace.rest_s > 0


@pytest.mark.parametrize("form", ["computed", "slots", "buckets"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", METHODS)
def test_slots_below_what_images_want_overflow(
    made: Callable[..., Made], tmp_path: Path, name: str, target: str, form: str
) -> None:
    of = made(name, keep_rate=FEW_SLOTS[name])
    # an image of ats keeps no more tokens than there are sample points
    assert {bool(out.overflow[0]) for out in of.alone} == ({False} if name == "ats" else {False, True})
    fields = {"buckets": f"{of.slots[0] // 2}"} if form == "buckets" else {"adaptive": form}
    session = open_session(export_model(replace(of.request, target=target, **fields), tmp_path / "b"))
    result = session.run(images_of())
    for i in range(COUNT):
        bucket = None if result.bucket is None else int(result.bucket[i])
        assert_row(result, i, (of.alone[i], of.counts[i].tolist(), bucket))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("form", FORMS)
def test_broken_image_harms_no_other(exported: Callable[..., tuple[Made, Bundle]], target: str, form: str) -> None:
    for name in METHODS:
        of, bundle = exported(name, target, form)
        images = images_of()
        images[1] = np.nan
        result = open_session(bundle).run(images[:3])
        for row in (0, 2):
            assert_row(result, row, reference_of(of, form, row))
        assert not np.isfinite(result.logits[1]).all()


@pytest.mark.parametrize("batch", [(3, 3), (2, 5)])
@pytest.mark.parametrize("form", ["computed", "slots", "buckets"])
@pytest.mark.parametrize("target", TARGETS)
def test_any_batch_range(
    made: Callable[..., Made], tmp_path: Path, target: str, form: str, batch: tuple[int, int]
) -> None:
    of = made("asvit")
    fields = {"buckets": "40"} if form == "buckets" else {"adaptive": form}
    session = open_session(export_model(replace(of.request, target=target, batch=batch, **fields), tmp_path / "b"))
    session.warmup()
    for size in {*batch}:
        result = session.run(images_of()[:size])
        for i in range(size):
            bucket = None if result.bucket is None else int(result.bucket[i])
            assert_row(result, i, (of.alone[i], of.counts[i].tolist(), bucket))
    with pytest.raises(InputError) as caught:
        session.run(images_of()[: batch[0] - 1])
    assert caught.value.code == "input-shape"


def test_first_is_the_result_of_the_first_image(exported: Callable[..., tuple[Made, Bundle]]) -> None:
    for form in FORMS:
        of, bundle = exported("asvit", "ort-cpu", form)
        result = open_session(bundle).run(images_of()[:3])
        first = result.first()
        assert len(first.logits) == 1 and all(len(stage) == 1 for stage in first.kept)
        assert_row(first, 0, reference_of(of, form, 0))
        assert result.logits.shape[0] == 3
    bare = Result(np.zeros((2, 4), np.float32)).first()
    assert (bare.kept, bare.kept_counts, bare.overflow, bare.bucket) == ([], None, None, None)


# ------------------------------------------------------------------------------------------------ loading, threads


class Counted(OrtBackend):
    """Counts what is loaded and run."""

    loaded: list[str] = []  # noqa: RUF012
    ran: list[str] = []  # noqa: RUF012

    def __init__(self, model_path: Path, **options: Any) -> None:
        super().__init__(model_path, **options)
        self.name = model_path.stem
        self.loaded.append(self.name)

    def run(self, feeds: Any, keep: Any = ()) -> dict[str, np.ndarray]:
        self.ran.append(self.name)
        return super().run(feeds)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> type[Counted]:
    monkeypatch.setattr(opener, "OrtBackend", Counted)
    monkeypatch.setattr(Counted, "loaded", [])
    monkeypatch.setattr(Counted, "ran", [])
    return Counted


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_graph_is_loaded_once_and_warmed_up(
    exported: Callable[..., tuple[Made, Bundle]], counted: type[Counted], target: str, form: str
) -> None:
    of, bundle = exported("asvit", target, form)
    session = open_session(bundle)
    loaded = list(counted.loaded)
    assert len(set(loaded)) == len(loaded)
    if form.startswith("buckets"):
        assert len(loaded) == 1 + (1 if target == "ort-cpu" else len(of.narrow))
        assert "stem" in loaded
    else:
        assert loaded == ["model"]
    session.warmup()
    assert set(counted.ran) == set(loaded)
    session.run(images_of())
    assert counted.loaded == loaded


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "form"), [("ats", "computed"), ("asvit", "buckets"), ("sait", "buckets")])
def test_threads_share_a_session(
    exported: Callable[..., tuple[Made, Bundle]], name: str, form: str, target: str
) -> None:
    _, bundle = exported(name, target, form)
    session, images = open_session(bundle), images_of()
    groups = [images[[i, (3 * i + 1) % COUNT]] for i in range(8)]
    expected = [session.run(group) for group in groups]
    start, failures = threading.Barrier(len(groups)), []

    def work(i: int) -> None:
        try:
            start.wait()
            for _ in range(20):
                result = session.run(groups[i])
                np.testing.assert_array_equal(result.logits, expected[i].logits)
                np.testing.assert_array_equal(result.kept_counts, expected[i].kept_counts)
                np.testing.assert_array_equal(result.bucket, expected[i].bucket)
                for ours, theirs in zip(result.kept, expected[i].kept, strict=True):
                    np.testing.assert_array_equal(ours, theirs)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(groups))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# ------------------------------------------------------------------------------------------------ densities

DENSITIES: dict[str, dict[str, Any]] = {
    "dynamicvit": {"method": "dynamicvit", "batch": (1, 1)},
    "dynamicvit, any batch": {"method": "dynamicvit", "batch": (1, 3)},
    "evit": {"method": "evit", "batch": (3, 3)},
    "sait topk": {"method": "sait", "batch": (1, 1), "stages": "1,2", "method_options": {"select": "topk"}},
    "asvit": {"method": "asvit", "batch": (1, 3), "stages": "1,2"},
}
RATES = (0.7, 1.0, 0.5)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", DENSITIES)
def test_density_switches_to_the_torch_model_of_the_rate(
    tmp_path: Path, counted: type[Counted], name: str, target: str
) -> None:
    request = ExportRequest(
        model="vit_digits", model_options={"depth": 4}, densities=RATES, random_weights=True, token_outputs=True,
        target=target, **DENSITIES[name], verify=False, seed=4,
    )  # fmt: skip
    session = open_session(export_model(request, tmp_path / "bundle"))
    loaded, resolved, model = list(counted.loaded), resolve(request), load_torch_model(request)
    assert session.densities == RATES
    assert session.density == RATES[0]
    images = images_of()[: request.batch[1]]
    for rate in (0.7, 0.5, 1.0, 0.5, 0.7):
        session.density = rate
        assert session.density == rate
        result, reference = session.run(images), model.with_stages(resolved.densities[rate])
        for i, image in enumerate(images):
            alone = run(reference, image[None])
            expected = alone.logits[0].numpy()
            assert np.abs(result.logits[i] - expected).max() <= 1e-4 * np.abs(expected).max()
            assert len(result.kept) == len(alone.kept)
            for ours, theirs in zip(result.kept, alone.kept, strict=True):
                assert set(ours[i].tolist()) - {-1} == set(theirs[0].tolist()) - {-1}
    assert counted.loaded == loaded
    session.warmup()
    assert (session.density, counted.loaded) == (0.7, loaded)


def test_densities_with_a_stage_inside_the_last_block(tmp_path: Path) -> None:
    request = ExportRequest(
        model="vit_digits", model_options={"depth": 4}, method="evit", stages="1,3", densities=(0.7, 0.5),
        random_weights=True,
    )  # fmt: skip
    session = open_session(export_model(request, tmp_path / "bundle"))
    assert session.run(images_of()[:1]).logits.shape == (1, 10)


def test_densities_of_random_positions(tmp_path: Path) -> None:
    request = ExportRequest(
        model="vit_digits", model_options={"depth": 4}, method="random", densities=(0.7, 0.5), random_weights=True
    )
    with suppress(InputError):  # refused is as good
        export_model(request, tmp_path / "bundle")


@pytest.fixture(scope="module")
def dense_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    request = ExportRequest(
        model="vit_digits", model_options={"depth": 4}, method="dynamicvit", densities=RATES, random_weights=True,
        verify=False,
    )  # fmt: skip
    return export_model(request, tmp_path_factory.mktemp("densities") / "bundle")


@pytest.mark.parametrize("rate", [0.6, 0.0, -1.0, 2.0, float("nan"), None, "0.7"])
def test_density_that_is_not_held_is_refused(dense_bundle: Bundle, rate: Any) -> None:
    session = open_session(dense_bundle)
    before = session.run(images_of()[:1]).logits
    with pytest.raises(InputError) as caught:
        session.density = rate
    assert caught.value.code == "density"
    assert caught.value.expected == "one of 0.7, 1, 0.5"
    assert session.density == 0.7
    np.testing.assert_array_equal(session.run(images_of()[:1]).logits, before)
    if rate is not None:
        with pytest.raises(InputError, match="density"):
            open_session(dense_bundle, density=rate)


def test_session_starts_with_the_density_asked_for(dense_bundle: Bundle) -> None:
    session = open_session(dense_bundle)
    session.density = 0.5
    expected = session.run(images_of()[:1]).logits
    np.testing.assert_array_equal(open_session(dense_bundle, density=0.5).run(images_of()[:1]).logits, expected)


def test_bundle_of_one_rate_has_no_density(exported: Callable[..., tuple[Made, Bundle]]) -> None:
    session = open_session(exported("asvit", "ort-cpu", "buckets")[1])
    assert session.density is None and session.densities == ()
    with pytest.raises(InputError) as caught:
        session.density = 1.0
    assert caught.value.code == "density"


# ------------------------------------------------------------------------------------------------ streams


def mixed_items(folder: Path, session: Session) -> tuple[list[Any], list[np.ndarray]]:
    """Return images in every form a stream takes, and the inputs they are."""
    rng, info = np.random.default_rng(2), session.manifest.preprocessing
    pictures = [Image.fromarray(rng.integers(0, 256, (40 + i, 50, 3), np.uint8)) for i in range(8)]
    pictures[6] = pictures[6].convert("L")
    items: list[Any] = []
    for i, picture in enumerate(pictures):
        file = folder / f"{i}.png"
        picture.save(file)
        ready = preprocess(picture, info)
        items.append([file, picture, np.asarray(picture.convert("RGB")), ready, str(file)][i % 5])
    return items, [preprocess(picture, info) for picture in pictures]


@pytest.mark.parametrize("ahead", [1, 2, 20])
@pytest.mark.parametrize("form", ["computed", "buckets"])
def test_stream_yields_items_and_results_in_order(
    exported: Callable[..., tuple[Made, Bundle]], tmp_path: Path, form: str, ahead: int
) -> None:
    session = open_session(exported("asvit", "ort-cpu", form)[1])
    items, inputs = mixed_items(tmp_path, session)
    found = list(session.stream(iter(items), ahead=ahead))
    assert len(found) == len(items)
    for (item, result), expected, image in zip(found, items, inputs, strict=True):
        assert item is expected
        own = session.run(image[None])
        np.testing.assert_array_equal(result.logits, own.logits)
        np.testing.assert_array_equal(result.kept_counts, own.kept_counts)
        np.testing.assert_array_equal(result.bucket, own.bucket)


def test_stream_of_a_bundle_for_several_images(made: Callable[..., Made], tmp_path: Path) -> None:
    request = replace(made("asvit").request, batch=(3, 3), adaptive="slots")
    session = open_session(export_model(request, tmp_path / "b"))
    images = images_of()
    for i, (_, result) in enumerate(session.stream(images)):
        assert result.logits.shape == (1, 10)
        assert_row(result, 0, (made("asvit").alone[i], made("asvit").counts[i].tolist(), None))


@pytest.mark.parametrize("broken", ["text", "missing", "grey frame", "narrow"])
def test_stream_raises_in_place_of_a_broken_item(dense_bundle: Bundle, tmp_path: Path, broken: str) -> None:
    session = open_session(dense_bundle)
    (tmp_path / "text.png").write_text("hello")
    items, _ = mixed_items(tmp_path, session)
    item: Any = tmp_path / f"{broken}.png"
    if broken == "grey frame":
        item = np.zeros((32, 32), np.uint8)
    elif broken == "narrow":
        item = Image.new("RGB", (1000, 1))
    stream = session.stream([*items[:3], item, items[4]])
    found = [next(stream)[0] for _ in range(3)]
    assert all(a is b for a, b in zip(found, items, strict=False))
    with pytest.raises(InputError) as caught:
        next(stream)
    assert caught.value.code == ("image-unreadable" if broken in ("text", "missing") else "image-shape")
    assert list(stream) == []


def test_stream_refuses_an_input_of_another_size(dense_bundle: Bundle) -> None:
    with pytest.raises(InputError) as caught:
        list(open_session(dense_bundle).stream([np.zeros((3, 16, 16), np.float32)]))
    assert caught.value.code == "input-shape"


@pytest.mark.parametrize("ahead", [0, -3])
def test_stream_prepares_one_ahead_at_least(dense_bundle: Bundle, ahead: int) -> None:
    with pytest.raises(InputError) as caught:
        next(open_session(dense_bundle).stream([], ahead=ahead))
    assert caught.value.code == "ahead"


def test_stream_follows_the_density(dense_bundle: Bundle) -> None:
    session, images = open_session(dense_bundle), images_of()[:3]
    expected = []
    for rate, image in zip(RATES, images, strict=True):
        session.density = rate
        expected.append(session.run(image[None]).logits)
    found, rates = [], iter(RATES[1:])
    session.density = RATES[0]
    for _, result in session.stream(images):
        found.append(result.logits)
        session.density = next(rates, RATES[0])
    np.testing.assert_array_equal(found, expected)
