"""The search from request to result: a latency table, candidates judged, finalists exported and measured."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.bench.bench import ratio_clock
from edgeprune.bench.fingerprint import take_fingerprint
from edgeprune.bench.measure import MeasurePlan, Runner, measure
from edgeprune.bench.runners import pass_runner, session_runner
from edgeprune.data import DIGITS, FOLDER_PREFIX, open_dataset, shown_name
from edgeprune.errors import InputError
from edgeprune.export.api import export_model, load_reference, preprocessing, silent
from edgeprune.export.request import Resolved
from edgeprune.pruning.base import Stage, StageRequest
from edgeprune.runtime.manifest import PreprocessInfo
from edgeprune.search.accuracy import Images, Judge, Judgement
from edgeprune.search.explore import Found, best_within, explore, frontier, layers
from edgeprune.search.networks import DENSE, Report, networks, plan_of, steady_ms, time_networks
from edgeprune.search.recipe import Expected, Provenance, Recipe, RecipeStage, RecipeWeights, TableInfo
from edgeprune.search.request import SearchRequest, check_request
from edgeprune.search.space import Candidate, Space, make_space
from edgeprune.search.table import EXTRAS, LatencyTable, Observation
from edgeprune.version import __version__

if TYPE_CHECKING:
    pass

NETWORKS, QUICK_NETWORKS = 48, 24
KNOTS = 12
TABLE_PLAN = MeasurePlan(duration_s=10.0)
QUICK_PLAN = MeasurePlan(rounds=8, max_warmup_s=3.0)
COUNTED_IMAGES = 32  # an adaptive schedule's latency is the mean over so many
PASS_IMAGES = 16  # and measured on so many
AROUND = (1.0, 0.97, 0.92)  # of the budget: finalists, in case one turns out slower than predicted
SEED_RATE = 0.5  # any at which every stage with weights prunes


@dataclass
class Row:
    """A schedule as it is reported; times in milliseconds, shares in [0, 1].

    Attributes:
        label: of a uniform schedule.
        kept: patch tokens behind each stage; of an adaptive method the slots.
        error: of the prediction, relative, the drift of the machine since the table taken out by the dense graph.
        test_top1: on images that had no part in the choice.
    """

    label: str | None
    stages: str | None
    options: dict[str, Any]
    blocks: list[int]
    kept: list[int]
    predicted_ms: float
    top1: float
    drop: float
    measured_ms: float | None = None
    error: float | None = None
    test_top1: float | None = None


@dataclass
class SearchResult:
    """What a search found.

    Attributes:
        dense: every token stays; the measure of `drop`.
        frontier: the schedules worth having, the fastest first.
        uniform: the method's own schedules.
        instead: for each of them what the search chooses for exactly its latency.
        finalists: those that were exported and measured.
        chosen: the answer; None with the reason in `why_none`.
        drift: how much slower the dense graph was while the finalists were measured than with the table.
        evaluated: candidates judged.
    """

    request: SearchRequest
    table: LatencyTable
    dense: Row
    frontier: list[Row]
    uniform: list[Row]
    instead: list[Row]
    finalists: list[Row]
    chosen: Row | None
    why_none: str | None
    drift: float
    evaluated: int
    networks: int
    images: int
    test_images: int | None
    recipe: Recipe | None = None
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        names = (
            "frontier",
            "uniform",
            "instead",
            "finalists",
            "why_none",
            "drift",
            "evaluated",
            "networks",
            "images",
            "warnings",
        )
        plain = {name: getattr(self, name) for name in names}
        plain |= {
            name: [asdict(row) for row in plain[name]] for name in ("frontier", "uniform", "instead", "finalists")
        }
        return {
            **plain,
            "test_images": self.test_images,
            "dense": asdict(self.dense),
            "chosen": None if self.chosen is None else asdict(self.chosen),
            "table": table_info(self.table, self.networks).model_dump(),
            "clock": self.table.clock,
            "recipe": None if self.recipe is None else self.recipe.model_dump(mode="json", by_alias=True),
        }


def plan_search(request: SearchRequest) -> dict[str, Any]:
    """Return what a search would do, without weights, data or measurements: for `--dry-run`."""
    resolved = check_request(request)
    space = make_space(resolved, fixed=request.fixed_places)
    uniform = space.uniform()
    return {
        "model": resolved.config.name,
        "method": resolved.method.name,
        "target": resolved.target.name,
        "budget_ms": request.budget_ms,
        "max_drop": request.max_drop,
        "places": list(space.places),
        "networks": len(designs(space, request)) + 1,
        "evaluations": max(request.evaluations, len(uniform)),
        "images": request.images,
        "subset": request.subset,
        "finalists": request.finalists,
        "uniform": {
            label: [stage.counts.kept for stage in space.stages(candidate)] for label, candidate in uniform.items()
        },
    }


def designs(space: Space, request: SearchRequest) -> list[Candidate]:
    """Return the schedules that are measured for the table."""
    count = QUICK_NETWORKS if request.quick else NETWORKS
    uniform = list(space.uniform().values())
    made = space.designs(count - min(len(uniform), count // 4), Random(request.seed))
    chosen = dict.fromkeys([*made, *uniform[:: max(1, 4 * len(uniform) // count)]])
    return [c for c in chosen if space.stages(c)]


def search_schedules(request: SearchRequest, *, progress: Report | None = None) -> SearchResult:
    """Find the schedules worth having, and the one that answers the request.

    Args:
        request: what is wanted.
        progress: called with (step, share done).

    Raises:
        InputError: when the request, the checkpoint or the data does not fit.
        EnvironmentLackError: when a package is missing.
    """
    report = progress or silent
    resolved = check_request(request)
    return Search(request, resolved, make_space(resolved, fixed=request.fixed_places), report).run()


class Search:
    """One search; see `search_schedules`."""

    def __init__(self, request: SearchRequest, resolved: Resolved, space: Space, report: Report) -> None:
        self.request, self.space, self.report = request, space, report
        self.resolved = resolved
        report("loading weights and images", 0.0)
        info = PreprocessInfo.model_validate(preprocessing(resolved.config))
        labels, classes = resolved.request.labels, resolved.config.num_classes

        def read(split: str) -> Images:
            data = open_dataset(request.data, split, limit=request.images)
            return Images.read(data, info, labels, classes)

        weighted = replace(resolved, stages=self._all_stages())
        self.model, self.weights, self.warnings = load_reference(weighted)
        self.images = read("train")
        self.test = read("test") if has_split(request.data) else None
        self.subset = Judge(self.model, self.images.spread(request.subset))
        self.judge = Judge(self.model, self.images)
        self.tested = None if self.test is None else Judge(self.model, self.test)
        if self.test is None:
            self.warnings.append(
                f"{shown_name(request.data)} has no 'train' and 'val': accuracies are of the images the schedule was "
                "chosen by"
            )
        if resolved.target.quantizes:
            self.warnings.append(
                f"accuracies are those of the float model: `edgeprune export --recipe` with --calibration judges "
                f"{resolved.target.precision}"
            )
        self.adaptive = resolved.method.adaptive(resolved.options)
        if self.adaptive and resolved.request.batch != (1, 1):
            raise InputError(
                f"--batch {resolved.request.batch[0]} with a method whose token counts depend on the image",
                code="batch",
                expected="--batch 1: such images run one by one",
            )

    def _all_stages(self) -> tuple[Stage, ...]:
        """Return the stages whose weights the model needs."""
        resolved = self.resolved
        rate = 1.0 if resolved.method.rule is None else SEED_RATE
        request = StageRequest(rate, self.space.own)
        return resolved.method.every_stage(resolved.config, request, resolved.options)

    def run(self) -> SearchResult:
        """Return the result."""
        request, space = self.request, self.space
        table, dense_ms, count = self.measure_table()
        clear: dict[Candidate, float] = {}

        def latency(candidate: Candidate) -> float:
            if candidate not in clear:
                clear[candidate] = table.predict(self.plans(space.stages(candidate)))
            return clear[candidate]

        uniform = space.uniform()
        total = max(request.evaluations, len(uniform))
        found = explore(
            uniform, space.neighbours, latency, lambda c: self.subset.judge(space.stages(c)),
            evaluations=request.evaluations, budget_ms=request.budget_ms, seed=request.seed,
            report=lambda done: self.report("judging schedules", 0.3 + 0.3 * done / total),
        )  # fmt: skip
        again = self.judge_on_all(found)
        dense = self.judge.judge(())
        front = frontier(again)
        own = [f for f in again if f.label is not None]
        instead = [best_within(again, f.ms) or f for f in own]
        finalists = self.choose_finalists(again, front)
        self.report("exporting and measuring the finalists", 0.8)
        measured, dense_now = self.measure_finalists(finalists)
        drift = dense_now / dense_ms
        rows = {f.candidate: self.row(f, dense) for f in again}
        for f, ms in zip(finalists, measured, strict=True):
            rows[f.candidate].measured_ms, rows[f.candidate].error = ms, ms / drift / f.ms - 1
        dense_row = Row(DENSE, None, {}, [], [], dense_ms, dense.top1, 0.0, dense_now)
        if self.tested is not None:
            dense_row.test_top1 = self.tested.judge(()).top1
            for f in (*finalists, *front, *own, *instead):
                rows[f.candidate].test_top1 = self.tested.judge(space.stages(f.candidate)).top1
        # on the machine as it was when the table was measured, or noise would decide what meets the budget
        real = [replace(f, ms=ms / drift) for f, ms in zip(finalists, measured, strict=True)]
        answer, why = self.answer(real, again, dense)
        chosen = None if answer is None else rows[answer.candidate]
        result = SearchResult(
            request, table, dense_row, [rows[f.candidate] for f in front],
            [rows[f.candidate] for f in own], [rows[f.candidate] for f in instead],
            [rows[f.candidate] for f in finalists],
            chosen, why, drift, len(found), count, len(self.images), None if self.test is None else len(self.test),
            warnings=self.warnings,
        )  # fmt: skip
        if request.budget_ms is not None and dense_now <= request.budget_ms:
            self.warnings.append(f"the dense model takes {dense_now:.3g} ms and meets the budget as it is")
        late = chosen is not None and chosen.measured_ms is not None and request.budget_ms is not None
        if late and chosen.measured_ms > request.budget_ms:  # type: ignore[union-attr, operator]
            self.warnings.append(
                f"the schedule took {chosen.measured_ms:.3g} ms when it was measured, over the budget, while the dense "  # type: ignore[union-attr]
                f"graph took {drift:.2f} times what it took before: measure again on a quiet machine"
            )
        if answer is not None and chosen is not None:
            result.recipe = self.recipe(answer.candidate, chosen, result)
        self.report("done", 1.0)
        return result

    def plans(self, stages: tuple[Stage, ...]) -> list[Any]:
        """Return the plan of a schedule; where the image decides how many tokens stay, of some images."""
        if not self.follows(stages):
            return [plan_of(self.resolved, stages)]
        counts = self.subset.counts(stages)[:COUNTED_IMAGES]
        return [plan_of(self.resolved, stages, image) for image in counts]

    def follows(self, stages: tuple[Stage, ...]) -> bool:
        """Return whether the shapes of the graph follow the image."""
        return bool(stages) and self.adaptive and self.resolved.form != "slots"

    def measure_table(self) -> tuple[LatencyTable, float, int]:
        """Return the table, the dense graph's milliseconds and the number of networks measured."""
        request, batch = self.request, self.resolved.request.batch[0]
        schedules = {f"network_{i}": self.space.stages(c) for i, c in enumerate(designs(self.space, request))}
        pool = self.subset.data.images
        images = {DENSE: [_some(pool, 0, batch)]}
        several = range(min(PASS_IMAGES, len(pool)))  # each with shapes of its own, as when it is used
        for name, stages in schedules.items():
            images[name] = [_some(pool, i, batch) for i in several] if self.follows(stages) else images[DENSE]
        self.report("writing networks for the latency table", 0.05)
        with networks(self.resolved, self.model, schedules) as bundle:
            times = time_networks(
                bundle, schedules, images, QUICK_PLAN if request.quick else TABLE_PLAN, threads=request.threads,
                report=lambda step, share: self.report(step, 0.1 + 0.2 * share),
            )  # fmt: skip
        seen = [Observation(self.plans(()), times[DENSE])]
        seen += [Observation(self.plans(s)[: len(images[name])], times[name]) for name, s in schedules.items()]
        P, N = self.resolved.config.num_prefix_tokens, self.resolved.config.num_patches
        tokens = sorted({P + max(1, round(N * i / KNOTS)) for i in range(1, KNOTS + 1)})
        return LatencyTable.fitted(seen, tokens, clock=ratio_clock(request.threads)), times[DENSE], len(seen)

    def judge_on_all(self, found: Sequence[Found]) -> list[Found]:
        """Return the uniform schedules and the best others, judged on all images."""
        limit = self.request.budget_ms
        others = [f for f in found if f.label is None and (limit is None or f.ms <= limit)]
        pool = [*(f for f in found if f.label is not None), *layers(others, 3 * self.request.finalists)]
        made = []
        for i, f in enumerate(pool):
            self.report("judging the best on all images", 0.6 + 0.2 * i / len(pool))
            made.append(replace(f, judgement=self.judge.judge(self.space.stages(f.candidate))))
        return made

    def choose_finalists(self, found: Sequence[Found], front: Sequence[Found]) -> list[Found]:
        """Return what is exported: answers to the budget and a little less, else the front, spread over latency."""
        chosen: dict[Candidate, Found] = {}
        if self.request.budget_ms is not None:
            near = [best_within(found, share * self.request.budget_ms) for share in AROUND]
            chosen = {f.candidate: f for f in near if f is not None}
        elif (fit := self.fastest_good(front)) is not None:
            chosen = {fit.candidate: fit}
        spread = [front[round(i * (len(front) - 1) / max(1, self.request.finalists - 1))]
                  for i in range(self.request.finalists)]  # fmt: skip
        for f in spread if front else ():
            if len(chosen) < self.request.finalists:
                chosen.setdefault(f.candidate, f)
        return sorted(chosen.values(), key=lambda f: f.ms)

    def fastest_good(self, found: Sequence[Found]) -> Found | None:
        """Return the fastest that loses no more than allowed."""
        least = self.judge.judge(()).top1 - self.request.max_drop / 100
        return min((f for f in found if f.judgement.top1 >= least - 1e-12), key=lambda f: f.ms, default=None)

    def measure_finalists(self, finalists: Sequence[Found]) -> tuple[list[float], float]:
        """Return what each bundle takes and what the dense graph takes, all in turns."""
        request = self.request
        batch = self.resolved.request.batch[0]
        batches = [_some(self.subset.data.images, 0, batch)]
        if self.adaptive:
            batches = [self.subset.data.images[i : i + 1] for i in range(min(PASS_IMAGES, len(self.subset.data)))]
        with tempfile.TemporaryDirectory(prefix="edgeprune-search-") as folder:
            runners: dict[str, Runner] = {}
            for i, f in enumerate(finalists):
                schedule = self.space.schedule(f.candidate)
                options = {**request.export.method_options, **{k: str(v) for k, v in schedule.options.items()}}
                export = replace(request.export, stages=schedule.stages, method_options=options, verify=False)
                bundle = export_model(export, Path(folder) / str(i))
                if not runners:
                    runners[DENSE] = pass_runner(_dense_session(bundle, request.threads), batches)
                runners[str(i)] = session_runner(bundle, "model", *batches, threads=request.threads)
            measured = measure(runners, QUICK_PLAN if request.quick else TABLE_PLAN).per_run(len(batches))
            times = steady_ms(measured, request.threads)
        return [times[str(i)] for i in range(len(finalists))], times[DENSE]

    def answer(
        self, real: Sequence[Found], found: Sequence[Found], dense: Judgement
    ) -> tuple[Found | None, str | None]:
        """Return the schedule that answers the request, by measured latency, or None and why there is none."""
        budget, most = self.request.budget_ms, self.request.max_drop
        best = self.fastest_good(real) if budget is None else best_within(real, budget)
        if best is None and budget is not None:
            fastest = min(real, key=lambda f: f.ms)
            lost = 100 * (dense.top1 - fastest.judgement.top1)
            return None, (
                f"no schedule meets {budget:g} ms: the fastest that was exported takes {fastest.ms:.3g} ms and loses "
                f"{lost:.2f} points"
            )
        if best is None:
            closest = max(found, key=lambda f: f.judgement.score)
            lost = 100 * (dense.top1 - closest.judgement.top1)
            return None, f"every schedule loses more than {most:g} points; the most accurate loses {lost:.2f}"
        lost = 100 * (dense.top1 - best.judgement.top1)
        if lost > most + 1e-9:
            other = self.fastest_good(found)
            cheaper = "none found loses less" if other is None else f"the fastest that does not takes {other.ms:.3g} ms"
            return (
                None,
                f"within {budget:g} ms the best schedule loses {lost:.2f} points, more than {most:g}; {cheaper}",
            )
        return best, None

    def row(self, f: Found, dense: Judgement) -> Row:
        """Return a candidate as it is reported."""
        schedule, stages = self.space.schedule(f.candidate), self.space.stages(f.candidate)
        return Row(
            f.label, schedule.stages, schedule.options, [stage.block for stage in stages],
            [stage.counts.kept for stage in stages], f.ms, f.judgement.top1, dense.top1 - f.judgement.top1,
        )  # fmt: skip

    def recipe(self, candidate: Candidate, row: Row, result: SearchResult) -> Recipe:
        """Return the recipe of the answer."""
        request, export = self.request, self.request.export
        options = {**export.method_options, **{k: str(v) for k, v in row.options.items()}}
        stages = self.space.stages(candidate)
        return Recipe(
            model=export.model,
            model_options=dict(export.model_options),
            image_size=export.image_size,
            patch_size=export.patch_size,
            num_classes=export.num_classes,
            method=export.method,
            method_options=options,
            stages=row.stages,
            target=export.target,
            batch=export.batch,
            weights=RecipeWeights(file=self.weights.get("file"), sha256=self.weights.get("sha256"), ema=export.ema),
            counts=[RecipeStage(block=s.block, tokens_in=s.counts.tokens_in, kept=s.counts.kept) for s in stages],
            expected=Expected(
                predicted_ms=row.predicted_ms,
                measured_ms=row.measured_ms,
                dense_ms=result.dense.measured_ms,
                clock=result.table.clock,  # type: ignore[arg-type]
                top1=row.top1,
                dense_top1=result.dense.top1,
                test_top1=row.test_top1,
                dense_test_top1=result.dense.test_top1,
            ),
            found=Provenance(
                tool_version=__version__,
                created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                data=shown_name(request.data),
                data_sha256=self.images.sha256,
                images=len(self.images),
                subset=len(self.subset.data),
                test_images=result.test_images,
                evaluations=result.evaluated,
                seed=request.seed,
                threads=request.threads,
                quick=request.quick,
                latency_budget_ms=request.budget_ms,
                max_drop=request.max_drop,
                label=row.label,
                table=table_info(result.table, result.networks),
                fingerprint=take_fingerprint().to_dict(),
            ),
        )


def table_info(table: LatencyTable, count: int) -> TableInfo:
    """Return the table as a recipe tells it."""
    off = np.abs(table.errors)
    return TableInfo(
        tokens=list(table.tokens),
        block_ms=list(table.block_ms),
        extras_ms=dict(zip(EXTRAS, table.extras_ms, strict=True)),
        networks=count,
        median_error=float(np.median(off)),
        worst_error=float(off.max()),
    )


def has_split(spec: str) -> bool:
    """Return whether the images to choose by and the images to report on are different ones."""
    from edgeprune.data.folder import split_path

    if spec == DIGITS or not spec.startswith(FOLDER_PREFIX):
        return True  # unknown data is refused where it is opened
    path = spec.removeprefix(FOLDER_PREFIX)
    return split_path(path, "train") != split_path(path, "test")


def _some(images: np.ndarray, first: int, batch: int) -> np.ndarray:
    """Return a batch of images from number `first` on, around the end."""
    return images[[(first + i) % len(images) for i in range(batch)]]


def _dense_session(bundle: Any, threads: int) -> Any:
    from edgeprune.bench.runners import open_session

    return open_session(bundle, DENSE, threads=threads)
