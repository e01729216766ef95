"""The gate with several engine builds per side: what it decides, and how they are made, on stand-ins of TensorRT."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeprune.bench import gate_measure
from edgeprune.bench.gate import Comparison, Gate, Side
from edgeprune.bench.gate_builds import fresh_builds
from edgeprune.bench.gate_measure import PairPlan, compare_bundles
from edgeprune.bench.gate_output import gate_notes, gate_rows, to_markdown
from edgeprune.bench.gate_rules import parse_rules
from edgeprune.bench.measure import Measurement, Samples
from edgeprune.errors import BuildError, EdgepruneError, EnvironmentLackError
from edgeprune.export.trt import BuildOptions, build_engines, builder
from edgeprune.export.trt.job import Built, Job
from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.engines import ENGINES_FOLDER, find_engines
from tests.helpers import fake_trt
from tests.helpers.bundles import write_tiny
from tests.helpers.trt_bundles import write_for_tensorrt, write_two_buckets

BLOCKS = 40
STAGE = {"index": 0, "block": 3, "where": "before", "tokens_in": 4, "kept": 2, "fused": 0}
PRUNED = {"name": "evit", "keep_rate": 0.5, "stages": [STAGE]}


def side(levels: Sequence[float], rng: np.random.Generator) -> Side:
    """Return a side of builds that take so many milliseconds, with noise of 0.3 % in each block."""
    noise = np.exp(0.003 * rng.standard_normal((len(levels), BLOCKS)))
    times = [level * own for level, own in zip(levels, noise, strict=True)]
    return Side("side", builds=[[Side("build", [{"pruned": np.repeat(t, 2).reshape(-1, 2, 1)}]) for t in times]])


def judge(base: Sequence[float], head: Sequence[float], *reruns: tuple[Sequence[float], Sequence[float]]) -> Any:
    rng = np.random.default_rng(0)
    again = [(side(one, rng), side(two, rng)) for one, two in reruns]
    (outcome,) = Gate(parse_rules(["median:5%"]), paired=True).judge(side(base, rng), side(head, rng), again)
    return outcome


@pytest.mark.parametrize(
    ("base", "head", "status"),
    [
        ((10.0, 10.1), (11.0, 11.1), "regressed"),
        ((10.0, 12.0), (11.9, 12.1), "unstable"),  # 9 % slower, where builds of base differ by 20 %
        ((10.0, 10.1), (10.0, 12.2), "unstable"),  # of head
        ((10.0, 12.0), (9.8, 10.0), "unstable"),  # 10 % faster likewise
        ((10.0, 10.1), (9.0, 9.1), "improved"),
        ((10.0, 12.0), (10.1, 12.1), "ok"),
    ],
)
def test_no_change_counts_that_builds_of_one_side_show_too(
    base: tuple[float, float], head: tuple[float, float], status: str
) -> None:
    outcome = judge(base, head)
    assert outcome.status == status
    widest = max(base[1] / base[0], head[1] / head[0]) - 1
    assert outcome.spread == pytest.approx(widest, abs=0.005)
    assert (outcome.reason is not None) == (status == "unstable")
    if status == "unstable":
        assert "differ by" in outcome.reason


def test_a_side_is_the_median_of_its_builds() -> None:
    outcome = judge((10.0, 10.1, 20.0), (10.0, 10.1, 30.0))
    assert (outcome.base, outcome.head) == (pytest.approx(10.1, rel=0.005), pytest.approx(10.1, rel=0.005))
    assert outcome.evidence.ratio == pytest.approx(1.0, abs=0.005)


def test_reruns_bring_builds_of_their_own() -> None:
    outcome = judge((10.0, 10.1), (12.0, 12.1), ((10.0, 10.1), (10.0, 10.1)))
    assert (outcome.status, outcome.reason) == ("unstable", "the confirmation rerun does not agree")
    outcome = judge((10.0, 10.1), (11.0, 11.1), ((10.0, 10.1), (11.0, 11.1)))
    assert (outcome.status, outcome.evidence.blocks) == ("regressed", 2 * BLOCKS)
    drifted = judge((10.0, 10.1), (11.0, 11.1), ((20.0, 20.2), (22.0, 22.2)))  # the machine was slower altogether
    assert (drifted.status, drifted.spread) == ("regressed", pytest.approx(0.01, abs=0.005))


def share_regressed(builds: int, change: float, deviation: float, trials: int) -> float:
    """Return how often the gate calls a change a regression where builds differ by a standard deviation."""
    rng, gate, found = np.random.default_rng(5), Gate(parse_rules(["median:5%"]), paired=True), 0

    def run() -> tuple[Side, Side]:
        one, two = np.exp(deviation * rng.standard_normal((2, builds)))
        return side(list(10 * one), rng), side(list(10 * (1 + change) * two), rng)

    for _ in range(trials):
        base, head = run()
        reruns = [run()] if gate.suspects(base, head) else []
        found += gate.judge(base, head, reruns)[0].status == "regressed"
    return found / trials


def test_two_builds_end_the_false_alarms_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeprune.bench.gate_stats.RESAMPLES", 1)  # intervals decide nothing
    assert share_regressed(1, 0.0, 0.03, trials=300) > 0.02
    assert share_regressed(2, 0.0, 0.03, trials=500) < 0.01
    assert share_regressed(2, 0.08, 0.01, trials=100) > 0.95
    assert share_regressed(2, 0.12, 0.03, trials=100) > 0.9


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Install a TensorRT whose engines are built in this process; return what was built."""
    made: list[Job] = []

    def run_job(job: Job, what: str, report: Any) -> Built:
        made.append(job)
        with Path(job.log).open("w") as log:
            return builder.build(job, log, report)

    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr("edgeprune.export.trt.api.run_job", run_job)
    fake_trt.install(monkeypatch, fake_trt.VERSIONS[1])
    return made


def built(jobs: Sequence[Job]) -> list[str]:
    return [Path(job.engine).stem for job in jobs]


def test_builds_know_nothing_of_each_other_and_leave_nothing(jobs: list[Job], tmp_path: Path) -> None:
    bundle = write_for_tensorrt(tmp_path / "bundle", (1, 4))
    build_engines(bundle, BuildOptions(batches=(2,), graphs=("model",)))  # its engine and timings are in the caches now
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    jobs.clear()
    steps: list[str] = []

    def progress(step: str, share: float) -> None:
        steps.append(step)

    with fresh_builds(bundle, 3, batch=2, dense=True, progress=progress) as copies:
        assert len({copy.path for copy in copies}) == 3
        for copy in copies:
            _, index = find_engines(copy, "NVIDIA Pretend GPU", "8.7", fake_trt.VERSIONS[1])
            assert [(info.source, [p.batch for p in info.profiles]) for info in index.engines] == [
                ("model", [2]),
                ("dense", [2]),
            ]
    assert built(jobs) == ["model", "dense"] * 3
    assert {job.timing_cache for job in jobs} == {None}
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    assert steps[0].startswith("build 1 of 3: ") and steps[-1] == "build 3 of 3: done"


def test_a_build_that_fails_leaves_nothing(jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(job: Job, what: str, report: Any) -> Built:
        raise BuildError("no kernel", code="engine-build")

    monkeypatch.setattr("edgeprune.export.trt.api.run_job", fail)
    bundle = write_for_tensorrt(tmp_path / "bundle")
    with pytest.raises(BuildError), fresh_builds(bundle, 2, batch=1, dense=False):
        raise AssertionError("nothing was built")
    assert list((tmp_path / "tmp").iterdir()) == []


def test_buckets_are_built_for_the_batches_that_parts_of_a_batch_make(jobs: list[Job], tmp_path: Path) -> None:
    bundle = write_two_buckets(tmp_path / "bundle")
    with fresh_builds(bundle, 1, batch=2, dense=True) as (copy,):
        _, index = find_engines(copy, "NVIDIA Pretend GPU", "8.7", fake_trt.VERSIONS[1])
    batches = {profile.batch for info in index.engines for profile in info.profiles if profile.graph == "rest_2"}
    assert batches == {1, 2}


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "evit", "densities": (1.0, 0.7), "stages": "1"},
        {"method": "sait", "method_options": {"mass": "0.8"}, "stages": "1,2", "buckets": "36,39"},
        {"method": "dense"},
    ],
    ids=lambda fields: str(fields["method"]),
)
@pytest.mark.filterwarnings("ignore::edgeprune.errors.EdgepruneWarning")  # stand-ins fuse nothing
def test_every_form_of_bundle_runs_on_fresh_builds(jobs: list[Job], tmp_path: Path, fields: dict[str, Any]) -> None:
    pytest.importorskip("torch")
    from edgeprune.export import ExportRequest, export_model
    from edgeprune.runtime.session import Session

    model: dict[str, Any] = {"model": "vit_digits", "model_options": {"depth": 3}, "random_weights": True}
    request = ExportRequest(**model, **fields, target="trt-fp16", selection="native", batch=(1, 2), verify=False)
    bundle = export_model(request, tmp_path / "bundle")
    images = np.zeros((2, 3, 64, 64), np.float32)
    with fresh_builds(bundle, 1, batch=2, dense=True) as (copy,):
        session = Session(copy, check_hashes=False)
        for density in session.densities or (None,):
            if density is not None:
                session.density = density
            assert session.run(images).logits.shape == (2, 10)
        if "dense" in bundle.manifest.graphs:
            assert Session(copy, graph="dense", check_hashes=False).run(images).logits.shape == (2, 10)
    assert not (bundle.path / ENGINES_FOLDER).exists()


def measured(monkeypatch: pytest.MonkeyPatch, levels: Callable[[str, int], float]) -> list[list[str]]:
    """Replace measuring by made-up times, milliseconds by runner and number of the run; return what was measured."""
    asked: list[list[str]] = []

    def measure(runners: Mapping[str, Callable[[], object]], plan: Any, **options: Any) -> Measurement:
        asked.append(list(runners))
        run = (len(asked) - 1) // 2  # a run measures twice, in both orders
        for one in runners.values():
            one()
        samples = {}
        for name in runners:
            ms = levels(name, run) * np.exp(0.001 * np.random.default_rng(len(name)).standard_normal(plan.rounds))
            samples[name] = Samples(list(ms), list(ms))
        return Measurement(samples, plan.rounds, 1, 0, True, 1.0)

    monkeypatch.setattr(gate_measure, "measure", measure)
    return asked


def compare(base: Bundle, head: Bundle, *, builds: int = 2, confirm: int = 1) -> Comparison:
    plan = PairPlan(blocks=20, dense=False, quick=True, builds=builds)
    return compare_bundles(base, head, Gate(parse_rules(["median:5%"]), paired=True), plan, confirm=confirm)


def test_a_slower_head_is_built_again_before_it_counts(
    jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, head = (write_for_tensorrt(tmp_path / name, method=PRUNED) for name in ("base", "head"))
    asked = measured(monkeypatch, lambda name, run: 11.0 if name.startswith("head") else 10.0)
    found = compare(base, head)
    assert (found.status, found.builds, found.clock) == ("regressed", 2, "wall")
    assert built(jobs) == ["model"] * 8  # two runs, two sides, two builds
    assert asked[0] == ["base 1 pruned", "head 1 pruned", "base 2 pruned", "head 2 pruned"]
    assert asked[1] == ["head 1 pruned", "base 1 pruned", "head 2 pruned", "base 2 pruned"]
    assert len(asked) == 4
    assert not (base.path / ENGINES_FOLDER).exists()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_difference_that_builds_show_too_is_no_regression(
    jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = write_for_tensorrt(tmp_path / "bundle", method=PRUNED)
    levels = {"base 1": 10.0, "base 2": 11.5, "head 1": 11.4, "head 2": 11.6}
    measured(monkeypatch, lambda name, run: levels[name[:6]])
    found = compare(bundle, bundle)
    (outcome,) = found.outcomes
    assert (outcome.status, found.failed()) == ("unstable", [])
    assert outcome.spread == pytest.approx(0.15, abs=0.005)
    assert gate_rows(found)[0]["builds differ by"].startswith("15.")
    assert any("2 engine builds per side" in note for note in gate_notes(found))
    assert "builds differ by" in to_markdown(found)


def test_a_lucky_build_is_not_confirmed_by_new_ones(
    jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = write_for_tensorrt(tmp_path / "bundle", method=PRUNED)
    measured(monkeypatch, lambda name, run: 11.0 if run == 0 and name.startswith("head") else 10.0)
    (outcome,) = compare(bundle, bundle).outcomes
    assert outcome.status != "regressed"
    assert outcome.reruns == (pytest.approx(1.0, abs=0.005),)


def test_engines_of_the_bundles_are_one_build_and_the_notes_say_so(
    jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = write_for_tensorrt(tmp_path / "bundle", method=PRUNED)
    build_engines(bundle, BuildOptions())
    jobs.clear()
    measured(monkeypatch, lambda name, run: 10.0)
    found = compare(bundle, bundle, builds=0)
    assert (found.status, found.builds, found.outcomes[0].spread, jobs) == ("ok", 1, None, [])
    assert any("--builds 2" in note for note in gate_notes(found))
    assert "builds differ by" not in gate_rows(found)[0]


def test_other_targets_are_refused(tmp_path: Path) -> None:
    bundle = write_tiny(tmp_path / "bundle")
    with pytest.raises(EdgepruneError) as caught:
        compare(bundle, bundle)
    assert (caught.value.code, caught.value.exit_code) == ("compare-builds", 2)


def test_without_a_gpu_nothing_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_trt.install(monkeypatch, count=0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    bundle = write_for_tensorrt(tmp_path / "bundle")
    with pytest.raises(EnvironmentLackError) as caught:
        compare(bundle, bundle)
    assert caught.value.code == "gpu-missing"
