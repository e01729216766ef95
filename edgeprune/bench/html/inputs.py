"""What a report is made of: results of benches, accuracies, bundles and images, told apart by what they are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeprune.bench.result import BenchResult, results_of
from edgeprune.bench.summary import bundle_fields
from edgeprune.errors import InputError
from edgeprune.runtime.bundle import Bundle, load_bundle
from edgeprune.runtime.manifest import MANIFEST_NAME

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
ENVELOPE = "edgeprune-cli/1"
EXPECTED = (
    "files of `edgeprune bench BUNDLE -o FILE` and of `edgeprune evaluate BUNDLE --data DATA --json`, bundles, images"
)


@dataclass(frozen=True)
class GraphAccuracy:
    """Accuracy of one graph: shares in [0, 1] of `images`."""

    top1: float
    top5: float | None
    images: int


@dataclass(frozen=True)
class Accuracies:
    """What `edgeprune evaluate` found.

    Attributes:
        name: of the bundle's directory, without its path.
        identity: of the bundle, as `summary.bundle_fields` has it; None in files of versions that did not write it.
        data: what was asked for, without its path.
        emulated: why the graphs did not run on what they were made for, None when they did.
        graphs: by the name `evaluate` gives them: "dense", "model", "keep rate 0.7".
        note: what to know about them.
    """

    name: str
    identity: dict[str, Any] | None
    data: str
    emulated: str | None
    graphs: dict[str, GraphAccuracy]
    note: str | None = None

    def of_runner(self, runner: str) -> GraphAccuracy | None:
        """Return the accuracy of what a bench calls "dense", "pruned" or "pruned at 0.7"."""
        if runner == "dense":
            return self.graphs.get("dense") or self.graphs.get("keep rate 1")
        rate = runner.partition("pruned at ")[2]
        return self.graphs.get(f"keep rate {rate}" if rate else "model") if runner.startswith("pruned") else None


@dataclass
class ReportInput:
    """Everything a report shows.

    Attributes:
        accuracies: of evaluations, matched with the results by the identity of the bundle.
        bundles: to draw kept tokens with, and to tell how many tokens each density keeps.
        images: to draw kept tokens on.
    """

    results: list[BenchResult] = field(default_factory=list)
    accuracies: list[Accuracies] = field(default_factory=list)
    bundles: list[Bundle] = field(default_factory=list)
    images: list[Path] = field(default_factory=list)

    def accuracies_of(self, result: BenchResult) -> Accuracies | None:
        """Return the first accuracies of the bundle that a result is of, None when there are none."""
        return next((a for a in self.accuracies if self._belongs(a, result)), None)

    def unmatched(self) -> list[Accuracies]:
        """Return the accuracies that belong to no result."""
        return [a for a in self.accuracies if not any(self._belongs(a, result) for result in self.results)]

    def _belongs(self, accuracies: Accuracies, result: BenchResult) -> bool:
        if accuracies.identity is None:
            return len(self.results) == 1
        return same_bundle(accuracies.identity, result.bundle)

    def bundle_of(self, result: BenchResult) -> Bundle | None:
        """Return the bundle that a result is of, None when it was not given."""
        return next((b for b in self.bundles if same_bundle(plain_fields(b), result.bundle)), None)


def same_bundle(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Tell whether two identities are of the same bundle: fields that only one of them has do not count."""
    return all(one[name] == other[name] for name in one.keys() & other.keys())


def plain_fields(bundle: Bundle) -> dict[str, Any]:
    """Return the identity of a bundle as JSON gives it back."""
    return json.loads(json.dumps(bundle_fields(bundle.manifest)))


def read_inputs(paths: Sequence[Path], images: Iterable[Path] = ()) -> ReportInput:
    """Read what is given; each path may be any of them.

    Args:
        paths: result files, evaluations, bundles and images.
        images: more images.

    Raises:
        InputError: `report-input` for a file that is none of them, `report-empty` without a result,
            `report-images` for images without a bundle that could be run on them, those of `load_bundle`.
    """
    found = ReportInput(images=[_existing(path) for path in images])
    for path in paths:
        if path.is_dir():
            found.bundles.append(load_bundle(_bundle_directory(path), check_hashes=False))
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            found.images.append(_existing(path))
        else:
            _add_document(found, _document(path), path)
    if not found.results:
        raise InputError(
            "no result of a bench among the files given",
            code="report-empty",
            expected="at least one file that `edgeprune bench BUNDLE -o FILE` wrote",
            hint="edgeprune bench BUNDLE -o bench.json, then edgeprune report bench.json -o report.html",
        )
    if found.images and not found.bundles:
        raise InputError(
            f"{len(found.images)} image(s) and no bundle to run on them",
            code="report-images",
            expected="a bundle exported with --token-outputs beside the results",
            hint="edgeprune report bench.json BUNDLE --images IMAGE -o report.html",
        )
    return found


def _add_document(found: ReportInput, document: Any, path: Path) -> None:
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != ENVELOPE:
        found.results += _bench(document, path)
    elif document.get("command") == "bench" and document.get("results"):  # of `bench --json`
        found.results += _bench(document["results"], path)
    elif document.get("command") == "evaluate" and document.get("results"):
        found.accuracies.append(_accuracies(document["results"], path))
    else:
        what = f"the output of `edgeprune {document.get('command')}`, status {document.get('status')}"
        raise _unknown(path, f"it is {what}")


def _bench(document: Any, path: Path) -> list[BenchResult]:
    try:
        return results_of(document, path)
    except InputError as error:
        raise _unknown(path, error.message.partition(": ")[2] or error.message) from error


def _accuracies(results: Any, path: Path) -> Accuracies:
    try:
        graphs = {
            str(name): GraphAccuracy(
                float(row["top1"]), None if row["top5"] is None else float(row["top5"]), int(row["images"])
            )
            for name, row in results["graphs"].items()
        }
        if not graphs or any(not 0 <= a.top1 <= 1 or a.images < 1 for a in graphs.values()):
            raise _unknown(path, "its accuracies are no shares of images")
        return Accuracies(
            name=Path(results["bundle"]).name,
            identity=results.get("identity"),
            data=without_path(results["data"]),
            emulated=results.get("emulated"),
            graphs=graphs,
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _unknown(path, f"{type(error).__name__}: {error}") from error


def without_path(data: str) -> str:
    """Return "imagefolder:val" for "imagefolder:some/where/val"; a report can be passed on."""
    kind, colon, path = data.partition(":")
    return f"{kind}:{Path(path).name}" if colon else kind


def _document(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _unknown(path, "it does not exist") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        why = "it is no JSON" if isinstance(error, ValueError) else str(error)
        raise _unknown(path, why) from error


def _bundle_directory(path: Path) -> Path:
    if not (path / MANIFEST_NAME).is_file():
        raise _unknown(path, f"it is a directory without {MANIFEST_NAME}")
    return path


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise _unknown(path, "it does not exist" if not path.exists() else "it is no file")
    return path


def _unknown(path: Path, why: str) -> InputError:
    return InputError(
        f"'{path}' cannot be reported: {why}",
        code="report-input",
        expected=EXPECTED,
        details={"path": str(path)},
    )
