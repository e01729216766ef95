"""Which candidates are kept: those that were faster when they were measured. Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

from edgeprune.export.trt.plan import PER_BUCKET, PROFILES, EnginePlan, Role
from edgeprune.runtime.engines import ChoiceInfo

LEAST_GAIN = 1.02  # by which engines per bucket must be faster, since they hold the weights once per bucket
Times = Mapping[tuple[str, int], float]
Shares = Mapping[tuple[str, tuple[int, ...] | None], float]


def choose(role: Role, times: Times, shares: Shares) -> tuple[list[EnginePlan], list[ChoiceInfo]]:
    """Return the engines to keep, and what was chosen between.

    Args:
        role: the candidates.
        times: median milliseconds by (source, number of the profile).
        shares: of the buckets, by (graph, slots).
    """
    kept: dict[str, list[EnginePlan]] = {}
    choices: dict[str, list[ChoiceInfo]] = {}
    for way, units in role.ways.items():
        kept[way], choices[way] = [], []
        for unit in units:
            found = {form: score([plan], times, shares) for form, plan in unit.forms.items()}
            best = min(found, key=lambda form: found[form])
            kept[way].append(unit.forms[best])
            if len(found) > 1:
                choices[way].append(ChoiceInfo(what="selection", graph=unit.graph, chosen=best, median_ms=found))
    if len(kept) == 1:
        (way,) = kept
        return kept[way], choices[way]
    found = {way: score(plans, times, shares) for way, plans in kept.items()}
    way = PER_BUCKET if found[PER_BUCKET] * LEAST_GAIN < found[PROFILES] else PROFILES
    return kept[way], [*choices[way], ChoiceInfo(what="engines", graph=role.name, chosen=way, median_ms=found)]


def score(plans: Iterable[EnginePlan], times: Times, shares: Shares) -> float:
    """Return milliseconds to compare engines of the same role by.

    Of a batch the mean over the buckets, each with its share of the images; over batches the geometric mean, so that
    none counts for more than another.
    """
    by_batch: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for plan in plans:
        for number, profile in enumerate(plan.profiles):
            share = shares.get((profile.graph, profile.slots), 1.0)
            by_batch[profile.batch].append((share, times[plan.source, number]))
    means = [_mean(pairs) for pairs in by_batch.values()]
    return math.exp(sum(math.log(max(mean, 1e-9)) for mean in means) / len(means))


def _mean(pairs: list[tuple[float, float]]) -> float:
    total = sum(share for share, _ in pairs)
    return sum(share * ms for share, ms in pairs) / total if total else sum(ms for _, ms in pairs) / len(pairs)
