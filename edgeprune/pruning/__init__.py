"""The pruning methods by name. A new method is a file here and a line in `METHODS`."""

from __future__ import annotations

import difflib

from edgeprune.errors import InputError
from edgeprune.pruning import asvit, ats, cropr, dynamicvit, evit, random, sait, tome
from edgeprune.pruning.base import Method
from edgeprune.pruning.counts import DYNAMICVIT_RULE

DENSE = Method(
    name="dense",
    summary="no pruning: the baseline",
    source="",
    rule=DYNAMICVIT_RULE,
    make_stages=lambda config, blocks, counts, options: [],
)

METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        DENSE,
        dynamicvit.METHOD,
        evit.METHOD,
        ats.METHOD,
        asvit.METHOD,
        sait.METHOD,
        cropr.METHOD,
        tome.METHOD,
        random.METHOD,
    )
}


def get_method(name: str) -> Method:
    """Return a method by name.

    Raises:
        InputError: `method-unknown` with the nearest names.
    """
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=2, cutoff=0.4)
        raise InputError(
            f"unknown method '{name}'",
            code="method-unknown",
            expected=f"one of {', '.join(METHODS)}",
            hint=f"did you mean {' or '.join(close)}?" if close else "run `edgeprune methods`",
        )
    return METHODS[name]
