"""Ways to run a batch through the graphs of a bundle: as a whole, image by image, or each image in its bucket.

All return the same outputs by name. Of an adaptive method, `kept_indices_<s>` are as wide as the stage has slots.
This file alone is copied into model repositories of Triton, so it imports nothing but numpy.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from edgeprune.runtime.manifest import TensorInfo

Arrays = dict[str, np.ndarray]
IMAGES, SLOTS, RANKS, COUNT = "images", "slots", "token_ranks", "token_count"
KEPT, KEPT_COUNTS, OVERFLOW, BUCKET = "kept_indices_", "kept_counts", "overflow", "bucket"
NO_PATCH = -1


class Backend(Protocol):
    """What runs one graph; several threads may call `run` at once.

    What the stem hands to the rest is sliced and joined along the first axis and never looked at, so a backend may keep
    it where it is: in place of an array then stands a handle with `__getitem__` for slices.
    """

    inputs: list[TensorInfo]
    outputs: list[TensorInfo]

    def run(self, feeds: Mapping[str, Any], keep: Collection[str] = ()) -> Arrays:
        """Return every output by name.

        Args:
            feeds: every input by name: arrays, and handles of the same kind of backend.
            keep: outputs that are only handed on; as handles they hold their values as long as somebody holds them.
        """
        ...

    def join(self, parts: Sequence[Any]) -> Any:
        """Return some parts, in order, as one feed of this backend."""
        ...


@dataclass
class Trace:
    """Where the time of a run went.

    Attributes:
        stem_s: seconds in the stem.
        rest_s: seconds in the rest, wasted runs too.
        runs: runs of the rest as (bucket, images).
    """

    stem_s: float = 0.0
    rest_s: float = 0.0
    runs: list[tuple[int, int]] = field(default_factory=list)


class Runner(Protocol):
    """What runs a batch."""

    def run(self, images: np.ndarray, trace: Trace | None = None) -> Arrays:
        """Return every output by name, images in order."""
        ...

    def warmup(self, images: np.ndarray) -> None:
        """Run every graph once."""
        ...


class Whole:
    """One graph that takes the batch as it is.

    Args:
        backend: the graph.
        slots: tokens each stage keeps, for a graph that is told.
    """

    def __init__(self, backend: Backend, slots: Sequence[int] | None = None) -> None:
        self.backend = backend
        self._extra = {} if slots is None else {SLOTS: np.array(slots, np.int64)}

    def run(self, images: np.ndarray, trace: Trace | None = None) -> Arrays:
        """Return every output by name."""
        return self.backend.run({IMAGES: images, **self._extra})

    def warmup(self, images: np.ndarray) -> None:
        """Run the graph once."""
        self.run(images)


class OneByOne:
    """A graph for one image, whose shapes follow the image.

    Args:
        backend: the graph.
        slots: per stage, the most tokens an image keeps.
    """

    def __init__(self, backend: Backend, slots: Sequence[int]) -> None:
        self.backend = backend
        self.slots = tuple(slots)

    def run(self, images: np.ndarray, trace: Trace | None = None) -> Arrays:
        """Return every output by name, images in order."""
        return stack([self.backend.run({IMAGES: images[i : i + 1]}) for i in range(len(images))], self.slots)

    def warmup(self, images: np.ndarray) -> None:
        """Run the graph once."""
        self.run(images[:1])


class Router:
    """Stem and rest: each image runs in the smallest bucket that holds its tokens.

    The stem tells what the first stage keeps. When a later stage of the rest wants more tokens than its bucket has
    slots, the image runs again in the next bucket; the last bucket holds all that the method has slots for. The result
    is that of the image alone, whatever its neighbours.

    Args:
        stem: images -> what the rest reads, and `token_count` [B].
        rests: per bucket the graph of the rest; one graph that is told its slots may serve all.
        buckets: per bucket the slots of each stage; nested, the last has all.
        fill: slots an image does not need hold its next best tokens, which count as kept.
    """

    def __init__(
        self, stem: Backend, rests: Sequence[Backend], buckets: Sequence[Sequence[int]], *, fill: bool = False
    ) -> None:
        self.stem, self.rests, self.fill = stem, list(rests), fill
        self.buckets = [tuple(bucket) for bucket in buckets]
        self.slots = self.buckets[-1]
        self._firsts = [bucket[0] for bucket in self.buckets]
        self._takes = [[info.name for info in rest.inputs if info.name != SLOTS] for rest in rests]
        self._handed = {name for takes in self._takes for name in takes} - {COUNT}
        told = [any(info.name == SLOTS for info in rest.inputs) for rest in rests]
        self._told = [
            {SLOTS: np.array(b, np.int64)} if tells else {} for b, tells in zip(self.buckets, told, strict=True)
        ]
        self._batches, self._stem_batch = [batch_of(rest) for rest in rests], batch_of(stem)

    def run(self, images: np.ndarray, trace: Trace | None = None) -> Arrays:
        """Return every output by name, images in order, and `bucket` [B] int32."""
        trace = Trace() if trace is None else trace
        handed = self._run_stem(images, trace)
        waiting: list[list[int]] = [[] for _ in self.buckets]
        for i, tensors in enumerate(handed):
            wanted = min(int(tensors[COUNT][0]), self.slots[0])
            waiting[bisect_left(self._firsts, wanted)].append(i)
        found: dict[int, Arrays] = {}
        for bucket, waits in enumerate(waiting):
            for i, result in self._run_rest(bucket, sorted(waits), handed, trace):
                if self._holds(bucket, result[KEPT_COUNTS][0].tolist()):
                    found[i] = result
                else:
                    waiting[bucket + 1].append(i)
        return self._finish([found[i] for i in range(len(images))])

    def warmup(self, images: np.ndarray) -> None:
        """Run the stem and every rest once."""
        handed = self._run_stem(images, Trace())
        for bucket in range(len(self.rests)):
            for _ in self._run_rest(bucket, [0], handed, Trace()):
                pass

    def _run_stem(self, images: np.ndarray, trace: Trace) -> list[Arrays]:
        """Return what the stem hands over, image by image."""
        start = perf_counter()
        rows: list[Arrays] = []
        for chunk, count in _chunks(images, self._stem_batch):
            out = self.stem.run({IMAGES: chunk}, keep=self._handed)
            if len(chunk) == 1:
                rows.append(out)
            else:
                rows += [{name: values[i : i + 1] for name, values in out.items()} for i in range(count)]
        trace.stem_s += perf_counter() - start
        return rows

    def _run_rest(
        self, bucket: int, waits: list[int], handed: list[Arrays], trace: Trace
    ) -> Iterator[tuple[int, Arrays]]:
        """Yield the results of some images in a bucket, in as large groups as its graph takes."""
        fixed = self._batches[bucket]
        size = fixed or max(len(waits), 1)
        for at in range(0, len(waits), size):
            group = waits[at : at + size]
            padded = group + [group[-1]] * (size - len(group) if fixed else 0)
            first = handed[group[0]]
            feeds = {
                name: first[name] if len(padded) == 1 else self.rests[bucket].join([handed[i][name] for i in padded])
                for name in self._takes[bucket]
            }
            start = perf_counter()
            out = self.rests[bucket].run({**feeds, **self._told[bucket]})
            trace.rest_s += perf_counter() - start
            trace.runs.append((bucket, len(group)))
            out[BUCKET] = np.full(len(padded), bucket, np.int32)
            if len(padded) == 1:
                yield group[0], out
                continue
            for row, i in enumerate(group):
                yield i, {name: values[row : row + 1] for name, values in out.items()}

    def _holds(self, bucket: int, counts: list[int]) -> bool:
        """Tell whether an image with these counts did not want more than the bucket has."""
        sizes = zip(counts, self.slots, self.buckets[bucket], strict=True)
        return all(min(count, slots) <= held for count, slots, held in sizes)

    def _finish(self, results: list[Arrays]) -> Arrays:
        out = stack(results, self.slots)
        counts = out[KEPT_COUNTS]
        out[OVERFLOW] = np.logical_or.reduce(counts > np.array(self.slots), axis=1).astype(np.int32)
        if self.fill:
            held = np.take(np.array(self.buckets, np.int32), out[BUCKET], axis=0)
            out[KEPT_COUNTS] = np.maximum(counts, held)
        return out


def batch_of(backend: Backend) -> int | None:
    """Return the batch a stem or rest is fixed to, None when it takes any."""
    batch = next(info.shape[0] for info in backend.inputs if info.name in (IMAGES, COUNT))
    return None if batch == -1 else batch


def stack(results: Sequence[Arrays], slots: Sequence[int]) -> Arrays:
    """Return the outputs of single images as those of a batch; kept tokens are padded with -1 to the slots."""
    out = {}
    for name in results[0]:
        rows = [result[name] for result in results]
        if name.startswith(KEPT):
            width = max(slots[int(name.removeprefix(KEPT))], *(row.shape[1] for row in rows))
            rows = [np.pad(row, ((0, 0), (0, width - row.shape[1])), constant_values=NO_PATCH) for row in rows]
        out[name] = rows[0] if len(rows) == 1 else np.concatenate(rows)
    return out


def _chunks(images: np.ndarray, size: int | None) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (images of a fixed batch, how many of them are real)."""
    if size is None:
        yield images, len(images)
        return
    for at in range(0, len(images), size):
        chunk = images[at : at + size]
        short = size - len(chunk)
        yield np.concatenate([chunk, np.repeat(chunk[-1:], short, 0)]) if short else chunk, len(chunk)
