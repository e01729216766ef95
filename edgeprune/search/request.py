"""What a user asks the search for. No torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from edgeprune.errors import InputError
from edgeprune.export.request import ExportRequest, Resolved, resolve
from edgeprune.pruning import METHODS, get_method
from edgeprune.pruning.base import Method, RateUse

MS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
BY_OPTION = {"tome": "r", "cropr": "tokens_per_block"}  # methods whose options say how many tokens go
EVALUATIONS, QUICK_EVALUATIONS = 160, 40
IMAGES, QUICK_IMAGES = 1024, 256
SUBSET, QUICK_SUBSET = 256, 128
FINALISTS, QUICK_FINALISTS = 6, 3
MAX_DROP = 0.5  # percentage points


@dataclass(frozen=True)
class SearchRequest:
    """Everything `edgeprune search` can be told.

    Attributes:
        export: model, method, its options, weights, target and batch. `stages` are the places of the uniform schedules;
            where stages have weights of their own it says for which blocks they were trained.
        data: labelled images, "digits" or "imagefolder:PATH"; schedules are chosen by those to train on.
        budget_ms: milliseconds of one run; None for the whole frontier.
        max_drop: percentage points of top-1 that may be lost against the same weights without pruning.
        images: calibration images finalists are judged by.
        subset: of them, that every candidate is judged by.
        evaluations: candidates judged in all.
        finalists: schedules that are exported and measured.
        threads: of the measured runs.
        seed: of the search and of the measured schedules.
        fixed_places: no stage may stand anywhere else.
        quick: fewer of everything, marked as such.
    """

    export: ExportRequest
    data: str
    budget_ms: float | None = None
    max_drop: float = MAX_DROP
    images: int = IMAGES
    subset: int = SUBSET
    evaluations: int = EVALUATIONS
    finalists: int = FINALISTS
    threads: int = 1
    seed: int = 0
    fixed_places: bool = False
    quick: bool = False


def parse_latency(text: str) -> float:
    """Return milliseconds of "8ms", "800us" or "0.5s".

    Raises:
        InputError: `latency-budget` when it is none of these, or not above zero.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*(us|µs|ms|s)\s*", text)
    value = float(match[1]) * MS[match[2].replace("µ", "u")] if match else math.nan
    if not (math.isfinite(value) and value > 0):
        number = re.fullmatch(r"\s*[0-9]*\.?[0-9]+\s*", text)
        raise InputError(
            f"--latency-budget {text} is no time",
            code="latency-budget",
            expected="a number above zero with its unit, us, ms or s",
            hint=f"did you mean {text.strip()}ms?"
            if number and float(text) > 0
            else "for example --latency-budget 8ms",
        )
    return value


def check_request(request: SearchRequest) -> Resolved:
    """Return the export the request describes, every name looked up.

    Raises:
        InputError: `search-method` for a method whose counts cannot be searched, `search-target` for a target that
            runs elsewhere, `search-images`, `search-max-drop`; those of `resolve`.
    """
    export = request.export
    method = get_method(export.method)
    options = method.parse_options(export.method_options)
    if why := why_not(method, options):
        raise InputError(
            f"method '{method.name}' cannot be searched: {why}",
            code="search-method",
            expected=f"one of {', '.join(name for name, m in METHODS.items() if searchable(m))}, sait with select=topk",
            hint="add --method-option select=topk" if method.name == "sait" else None,
        )
    if not 2 <= request.subset <= request.images:
        raise InputError(
            f"{request.images} calibration images, of which {request.subset} judge every candidate",
            code="search-images",
            expected="at least 2, and no more than all of them",
        )
    if not (math.isfinite(request.max_drop) and 0 <= request.max_drop <= 100):
        raise InputError(
            f"--max-drop {request.max_drop:g} is out of range",
            code="search-max-drop",
            expected="percentage points of top-1, from 0 to 100",
            hint="for example --max-drop 0.5",
        )
    resolved = resolve(export)
    if resolved.target.device is not None:
        raise InputError(
            f"target '{resolved.target.name}' runs on another device, where a search cannot measure from here",
            code="search-target",
            expected="--target ort-cpu or onnx",
            hint="search for ort-cpu; `edgeprune export --recipe FILE --target ...` then takes the schedule over",
        )
    return resolved


def searchable(method: Method) -> bool:
    """Return whether a method can be searched with its default options."""
    return why_not(method, method.parse_options({})) is None


def why_not(method: Method, options: dict[str, object]) -> str | None:
    """Return why the schedule of a method cannot be searched, None when it can."""
    if method.name == "dense":
        return "it prunes nothing"
    if method.name in BY_OPTION or method.name == "ats":
        return None
    use = method.rate_use(options)
    if use is RateUse.SLOTS:
        return "the image decides how many tokens stay, a keep rate only limits the slots and changes the result"
    return "it takes no keep rate" if use is RateUse.NONE else None
