"""Running a bundle: arrays in, logits and kept tokens out. Needs neither torch nor onnx."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from edgeprune.data.preprocess import batches, load_image, preprocess
from edgeprune.errors import EnvironmentLackError, InputError
from edgeprune.runtime.bundle import Bundle, load_bundle
from edgeprune.runtime.manifest import Manifest, TensorInfo
from edgeprune.runtime.ort import OrtBackend

_ORT_PROVIDERS = {"onnx": ("CPUExecutionProvider",), "ort-cpu": ("CPUExecutionProvider",)}
_KEPT = "kept_indices_"


class Backend(Protocol):
    """What runs one graph."""

    inputs: list[TensorInfo]
    outputs: list[TensorInfo]

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Return every output by name."""
        ...


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
    """

    logits: np.ndarray
    kept: list[np.ndarray] = field(default_factory=list)
    kept_counts: np.ndarray | None = None
    overflow: np.ndarray | None = None


@dataclass(frozen=True)
class Prediction:
    """What a graph says about an image file.

    Attributes:
        path: the file.
        top: (class index, label or None, probability), most probable first.
        kept: per stage [K] int32 as in `Result.kept`.
        overflow: the image wanted more tokens than a stage has slots.
    """

    path: Path
    top: list[tuple[int, str | None, float]]
    kept: list[np.ndarray] = field(default_factory=list)
    overflow: bool = False


class Session:
    """A bundle that is ready to run.

    Args:
        bundle: a bundle or its directory.
        graph: "model", or one of the baselines "dense" and "random".
        threads: threads of one run; 0 takes every core.
        spinning: idle threads wait in a busy loop. Switch it off when other work shares the cores, above all
            when several sessions live in one process.
        check_hashes: compare every file's sha256 before use; see `load_bundle`.

    Raises:
        InputError: those of `load_bundle`; `graph-missing`, `graph-invalid`, `threads`; `bundle-tampered`
            when the graph's inputs and outputs are not those the manifest lists.
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
    ) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else load_bundle(bundle, check_hashes=check_hashes)
        if threads < 0:
            raise InputError(f"{threads} threads", code="threads", expected="0 (every core) or more")
        path = self.bundle.graph_path(graph)
        self._info = self.manifest.graphs[graph]
        self._backend = _open_backend(self.manifest.target, path, threads=threads, spinning=spinning)
        self._check_graph(path)

    @property
    def manifest(self) -> Manifest:
        """What the bundle holds."""
        return self.bundle.manifest

    @property
    def labels(self) -> list[str] | None:
        """Class names by index, where the bundle has them."""
        return self.manifest.labels

    def run(self, images: np.ndarray) -> Result:
        """Return logits and kept tokens of a batch.

        Args:
            images: [B, C, H, W] float32, already normalised; B within the bundle's batch range.

        Raises:
            InputError: `input-dtype`, `input-shape`.
        """
        outputs = self._backend.run(self._checked(images))
        kept = [value for name, value in outputs.items() if name.startswith(_KEPT)]  # in the order of the stages
        overflow = outputs.get("overflow")
        return Result(outputs["logits"], kept, outputs.get("kept_counts"), None if overflow is None else overflow > 0)

    def warmup(self) -> None:
        """Run once on zeros, at the smallest batch, so that the first real run is not the slow one."""
        self._backend.run(np.zeros((self.manifest.batch[0], *self._info.inputs[0].shape[1:]), np.float32))

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
                found.append(Prediction(file, self._top(result.logits[i], top), kept, over))
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
        sides = self._info.inputs[0].shape[1:]
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

    def _check_graph(self, path: Path) -> None:
        """Refuse a graph whose interface is not the one the manifest describes."""
        real_in, real_out = self._backend.inputs, self._backend.outputs
        low, high = self.manifest.batch
        sides = self.manifest.preprocessing.image_size
        batch = -1 if low < high else low
        images = [TensorInfo(name="images", dtype="float32", shape=[batch, -1, *sides])]
        for listed, real in (
            (self._info.inputs, real_in),
            (self._info.outputs, real_out),
            (images, self._info.inputs),
            (images, real_in),
        ):
            if not _agree(listed, real) or (batch == -1 and listed is images and real[0].shape[0] != -1):
                raise InputError(
                    f"{path} has {_words(real)} where its manifest describes {_words(listed)}",
                    code="bundle-tampered",
                    expected="a graph that `edgeprune export` wrote, with its own manifest",
                    hint="copy the bundle again, or export it again",
                )
        if "logits" not in {info.name for info in real_out}:
            raise InputError(
                f"{path} has the outputs {_words(real_out)}",
                code="graph-invalid",
                expected="an output named logits",
                hint="export the bundle again",
            )


def _agree(listed: list[TensorInfo], real: list[TensorInfo]) -> bool:
    """Tell whether two lists of tensors have the same names, types and sizes; -1 agrees with every size."""
    return len(listed) == len(real) and all(
        (a.name, a.dtype, len(a.shape)) == (b.name, b.dtype, len(b.shape))
        and all(m == n or -1 in (m, n) for m, n in zip(a.shape, b.shape, strict=True))
        for a, b in zip(listed, real, strict=True)
    )


def _words(tensors: list[TensorInfo]) -> str:
    return ", ".join(f"{t.name} {t.dtype}{t.shape}" for t in tensors) or "none"


def _open_backend(target: str, path: Path, *, threads: int, spinning: bool) -> Backend:
    if target not in _ORT_PROVIDERS:
        raise EnvironmentLackError(
            f"this version of edgeprune cannot run the target '{target}'",
            code="target-not-runnable",
            expected=f"one of {', '.join(_ORT_PROVIDERS)}",
            hint="export for one of these targets, or upgrade edgeprune",
        )
    return OrtBackend(path, threads=threads, spinning=spinning, providers=_ORT_PROVIDERS[target])
