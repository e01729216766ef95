"""Running a bundle: arrays in, logits and kept tokens out. Needs neither torch nor onnx."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from edgeprune.data.preprocess import as_input, batches, load_image, preprocess
from edgeprune.errors import InputError
from edgeprune.runtime.bundle import Bundle, load_bundle
from edgeprune.runtime.engine_backend import EngineBackend
from edgeprune.runtime.governor import Policy
from edgeprune.runtime.manifest import Manifest
from edgeprune.runtime.opener import Opener, OpenGraph
from edgeprune.runtime.ort import OrtBackend
from edgeprune.runtime.pace import DensityStep, Pace
from edgeprune.runtime.prefetch import prepare_ahead
from edgeprune.runtime.router import BUCKET, IMAGES, KEPT, KEPT_COUNTS, OVERFLOW, Runner, Trace
from edgeprune.runtime.timing import DeviceTimer, LayerLog

COST_RUNS = 3


@dataclass(frozen=True)
class Result:
    """What a graph computed for a batch.

    Attributes:
        logits: [B, classes] float32.
        kept: per stage [B, K] int32, original patch numbers of the kept tokens, -1 for a fused token and for a slot
            the image does not need; empty when the bundle was exported without token outputs.
        kept_counts: [B, S] int32 tokens kept per stage, or None likewise; always there in a bundle of an adaptive
            method, where it may exceed the slots.
        overflow: [B] bool, images that wanted more tokens than a stage has slots: their logits are not the method's;
            None when the method is not adaptive.
        bucket: [B] int32 the bucket each image ended in, None for a bundle without.
    """

    logits: np.ndarray
    kept: list[np.ndarray] = field(default_factory=list)
    kept_counts: np.ndarray | None = None
    overflow: np.ndarray | None = None
    bucket: np.ndarray | None = None

    def first(self) -> Result:
        """Return the result of the first image alone, B = 1."""
        others = (self.kept_counts, self.overflow, self.bucket)
        counts, overflow, bucket = (None if values is None else values[:1] for values in others)
        return Result(self.logits[:1], [stage[:1] for stage in self.kept], counts, overflow, bucket)


@dataclass(frozen=True)
class Prediction:
    """What a graph says about an image file.

    Attributes:
        path: the file.
        top: (class index, label or None, probability), most probable first.
        kept: per stage [K] int32 as in `Result.kept`.
        overflow: the image wanted more tokens than a stage has slots.
        bucket: the bucket it ended in, None for a bundle without.
    """

    path: Path
    top: list[tuple[int, str | None, float]]
    kept: list[np.ndarray] = field(default_factory=list)
    overflow: bool = False
    bucket: int | None = None


class Session:
    """A bundle that is ready to run. Several threads may call it at once.

    Args:
        bundle: a bundle or its directory.
        graph: "model", or one of the baselines "dense" and "random".
        threads: threads of one run; 0 takes every core.
        spinning: idle threads wait in a busy loop. Switch it off when other work shares the cores, above all
            when several sessions live in one process.
        check_hashes: compare every file's sha256 before use; see `load_bundle`.
        density: keep rate to start with, of a bundle that holds several; None takes the first.
        deadline_ms: milliseconds a run shall take; a governor then chooses the density, see `Pace` and `Policy`. Every
            density is run a few times first, to know what it costs here.
        prepack: see `OrtBackend`; None says no for a bundle with several graphs of the same weights beside a stem.
        open_graph: opens a graph's file in place of what the target runs on; see `Opener`.

    Raises:
        InputError: those of `load_bundle`; `graph-missing`, `graph-invalid`, `threads`, `density`, `deadline`;
            `bundle-tampered` when a graph's inputs and outputs are not those the manifest lists.
        EnvironmentLackError: `package-missing`; `target-not-runnable` for a target this version cannot run.
    """

    def __init__(
        self,
        bundle: Bundle | Path | str,
        *,
        graph: str = "model",
        threads: int = 0,
        spinning: bool = True,
        check_hashes: bool = True,
        density: float | None = None,
        deadline_ms: float | Policy | None = None,
        prepack: bool | None = None,
        open_graph: OpenGraph | None = None,
    ) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else load_bundle(bundle, check_hashes=check_hashes)
        if threads < 0:
            raise InputError(f"{threads} threads", code="threads", expected="0 (every core) or more")
        opener = Opener(self.bundle, {"threads": threads, "spinning": spinning}, prepack, open_graph)
        self._runners = opener.runners(graph)
        self._backends = opener.backends()
        # one attribute for both, so that a run in another thread never sees half a switch
        self._chosen: tuple[float | None, Runner] = next(iter(self._runners.items()))
        self._pace: Pace | None = None
        if density is not None:
            self.density = density
        if deadline_ms is not None:
            policy = deadline_ms if isinstance(deadline_ms, Policy) else Policy(deadline_ms)
            self._pace = Pace(policy, self._costs_ms(), 1.0 if self.density is None else self.density)

    @property
    def density(self) -> float | None:
        """Keep rate of the next run; None when the bundle has a single one. Setting it loads nothing.

        Raises:
            InputError: `density` when the bundle does not hold the keep rate.
        """
        return self._chosen[0]

    @density.setter
    def density(self, keep_rate: float) -> None:
        if self._pace is not None:
            raise InputError(
                "the density follows the deadline",
                code="density",
                expected="a session without deadline_ms to set it by hand",
            )
        if keep_rate not in self._runners:
            held = ", ".join(f"{rate:g}" for rate in self.densities)
            raise InputError(
                f"the bundle has no density {keep_rate}",
                code="density",
                expected=f"one of {held}" if held else "a bundle with several keep rates",
                hint="export with all of them: --keep-rate 1.0,0.7,0.5",
                details={"density": keep_rate, "densities": list(self.densities)},
            )
        self._take(keep_rate)

    def _take(self, keep_rate: float) -> None:
        self._chosen = (keep_rate, self._runners[keep_rate])

    @property
    def density_steps(self) -> list[DensityStep]:
        """The changes of density a deadline has caused, oldest first; the newest thousand."""
        return [] if self._pace is None else list(self._pace.steps)

    def _costs_ms(self) -> dict[float, float]:
        """Return what a run takes at every density: the fastest of a few, after one to warm up."""
        images, costs = np.zeros((self.manifest.batch[0], *self.sides), np.float32), {}
        for rate in self.densities:
            times = []
            for _ in range(COST_RUNS + 1):
                begin = perf_counter()
                self._runners[rate].run(images)
                times.append((perf_counter() - begin) * 1000)
            costs[rate] = min(times[1:])
        return costs

    @property
    def densities(self) -> tuple[float, ...]:
        """The keep rates the session can switch between, as they were exported; none when there is only one."""
        return tuple(rate for rate in self._runners if rate is not None)

    @property
    def manifest(self) -> Manifest:
        """What the bundle holds."""
        return self.bundle.manifest

    @property
    def sides(self) -> list[int]:
        """Channels, height and width of an input."""
        inputs = (tensor for graph in self.manifest.graphs.values() for tensor in graph.inputs)
        return next(tensor.shape[1:] for tensor in inputs if tensor.name == IMAGES)

    @property
    def labels(self) -> list[str] | None:
        """Class names by index, where the bundle has them."""
        return self.manifest.labels

    def run(self, images: np.ndarray, *, trace: Trace | None = None) -> Result:
        """Return logits and kept tokens of a batch.

        Args:
            images: [B, C, H, W] float32, already normalised; B within the bundle's batch range.
            trace: takes down where the time goes in a bundle with buckets.

        Raises:
            InputError: `input-dtype`, `input-shape`.
        """
        images = self._checked(images)
        density, runner = self._chosen
        begin = perf_counter()
        outputs = runner.run(images, trace)
        if self._pace is not None and density is not None:
            self._take(self._pace.after(density, (perf_counter() - begin) * 1000))
        kept = [value for name, value in outputs.items() if name.startswith(KEPT)]  # in the order of the stages
        overflow = outputs.get(OVERFLOW)
        return Result(
            outputs["logits"],
            kept,
            outputs.get(KEPT_COUNTS),
            None if overflow is None else overflow > 0,
            outputs.get(BUCKET),
        )

    def time_device(self, timer: DeviceTimer | None) -> bool:
        """Let backends tell a timer what runs take on the device; return whether any can.

        Args:
            timer: None ends it.
        """
        able = [backend for backend in self._backends.values() if hasattr(backend, "timer")]
        for backend in able:
            backend.timer = timer
        return bool(able)

    def end_profiling(self) -> dict[str, Path]:
        """Return by graph the file that a backend opened with `profile` has written; see `OrtBackend`."""
        return {name: b.end_profiling() for name, b in self._backends.items() if isinstance(b, OrtBackend)}

    def time_layers(self) -> dict[str, list[LayerLog]]:
        """Let TensorRT time every layer of every run from now on, which slows runs down for good.

        Returns:
            By graph the logs of its engine's profiles; nothing of a bundle that runs on no engines.
        """
        return {name: b.time_layers() for name, b in self._backends.items() if isinstance(b, EngineBackend)}

    def warmup(self) -> None:
        """Run everything once on zeros, at the smallest batch, so that the first real run is not the slow one."""
        images = np.zeros((self.manifest.batch[0], *self.sides), np.float32)
        for runner in self._runners.values():
            runner.warmup(images)

    def stream(self, items: Iterable[Any], *, ahead: int = 2) -> Iterator[tuple[Any, Result]]:
        """Return an iterator of (item, result), one after the other, in order; the next items are prepared meanwhile.

        Reading, decoding and preprocessing happen in another thread. Closing the iterator ends it.

        Args:
            items: image files, PIL images, uint8 frames [H, W, 3], or normalised float32 [C, H, W]; taken as they are
                needed, so the iterable may be a camera.
            ahead: items prepared in advance, at least 1.

        Raises:
            InputError: `ahead`; in place of the item's result those of preprocessing it.
        """
        if ahead < 1:
            raise InputError(f"{ahead} items ahead", code="ahead", expected="at least 1")
        low = self.manifest.batch[0]
        prepare = partial(as_input, info=self.manifest.preprocessing)
        prepared = prepare_ahead(items, prepare, ahead)
        return ((item, self.run(np.repeat(image[None], low, 0)).first()) for item, image in prepared)

    def classify(self, paths: Sequence[Path | str] | Path | str, *, top: int = 5) -> list[Prediction]:
        """Return the most probable classes of image files, in the order given.

        Images are read as they are needed. A last group that is smaller than the bundle's smallest batch is
        filled up with copies of its last image; they do not change the other images' results.

        Args:
            paths: image files; a single one may stand alone.
            top: classes per image, at least 1; a model with fewer classes gives all it has.

        Raises:
            InputError: `image-unreadable`, `image-shape`, `top`.
        """
        if top < 1:
            raise InputError(f"top {top}", code="top", expected="at least 1")
        files = [Path(p) for p in ([paths] if isinstance(paths, (str, Path)) else paths)]
        low, high = self.manifest.batch
        found: list[Prediction] = []
        for group in batches(files, high):
            images = [preprocess(load_image(file), self.manifest.preprocessing) for file in group]
            images += [images[-1]] * (low - len(images))
            result = self.run(np.stack(images))
            for i, file in enumerate(group):
                kept = [stage[i] for stage in result.kept]
                over = result.overflow is not None and bool(result.overflow[i])
                bucket = None if result.bucket is None else int(result.bucket[i])
                found.append(Prediction(file, self._top(result.logits[i], top), kept, over, bucket))
        return found

    def _top(self, logits: np.ndarray, top: int) -> list[tuple[int, str | None, float]]:
        weights = np.exp(logits.astype(np.float64) - logits.max())
        probabilities = weights / weights.sum()
        labels = self.labels
        return [
            (int(c), labels[c] if labels and c < len(labels) else None, float(probabilities[c]))
            for c in np.argsort(-probabilities, kind="stable")[:top]
        ]

    def _checked(self, images: np.ndarray) -> np.ndarray:
        """Return the images as the backend takes them, or refuse them."""
        if not isinstance(images, np.ndarray) or images.dtype != np.float32:
            found = f"dtype {images.dtype}" if isinstance(images, np.ndarray) else type(images).__name__
            raise InputError(
                f"images are {found}",
                code="input-dtype",
                expected="a numpy array of float32, normalised as the manifest's `preprocessing` says",
                hint="images.astype(numpy.float32) if normalised; Session.classify(paths) for image files",
            )
        sides = self.sides
        low, high = self.manifest.batch
        if images.ndim != 4 or list(images.shape[1:]) != sides or not low <= len(images) <= high:
            batch = str(low) if low == high else f"{low} to {high}"
            raise InputError(
                f"images have shape {list(images.shape)}",
                code="input-shape",
                expected=f"[batch, {', '.join(map(str, sides))}] with a batch of {batch}",
                hint="edgeprune.data.preprocess makes the size fit, export --batch allows other batches",
            )
        return np.ascontiguousarray(images)
