"""What a gate fails on: `median:5%`, `speedup:3%`, `top1:0.5%`, `median:0.002`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgeprune.errors import InputError

TIMES = ("median", "mean", "min")
SHARES = ("speedup", "top1", "parity")
STATS = (*TIMES, *SHARES)
DEFAULT = ("median:5%", "speedup:5%")
FLOOR = 0.03
_UNITS = {"%": 0.01, "": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6}


@dataclass(frozen=True)
class Rule:
    """One limit.

    Attributes:
        text: as it was given.
        stat: one of `STATS`.
        limit: a share, for top1 and parity in points of a share, or seconds.
        seconds: the limit is seconds of a run.
    """

    text: str
    stat: str
    limit: float
    seconds: bool = False

    def share(self, base_ms: float) -> float:
        """Return the limit as a share of what base takes."""
        return 1000 * self.limit / base_ms if self.seconds else self.limit


def parse_rule(text: str) -> Rule:
    """Return the rule of a text [stat]:[percent|seconds].

    Raises:
        InputError: `fail-on`.
    """
    match = re.fullmatch(r"\s*([a-z0-9]+)\s*:\s*(\d+(?:\.\d+)?|\.\d+)\s*(%|s|ms|us|)\s*", text.lower())
    if match is None:
        raise _refused(text, "is not STAT:PERCENT% or STAT:SECONDS")
    stat, number, unit = match[1], float(match[2]), match[3]
    if stat not in STATS:
        raise _refused(text, f"names '{stat}', which is not compared")
    if unit != "%" and stat in SHARES:
        raise _refused(text, f"gives seconds, and {stat} has none")
    if number <= 0 and stat in (*TIMES, "speedup"):
        raise _refused(text, "would fail on nothing but noise")
    return Rule(text.strip(), stat, number * _UNITS[unit], seconds=unit != "%")


def parse_rules(texts: Sequence[str]) -> list[Rule]:
    """Return the rules, the default ones when none is given.

    Raises:
        InputError: `fail-on`, also for a stat that has two limits.
    """
    rules = [parse_rule(text) for text in texts or DEFAULT]
    for i, rule in enumerate(rules):
        if any(rule.stat == other.stat for other in rules[:i]):
            raise _refused(rule.text, f"is a second limit of {rule.stat}")
    return rules


def floor_of(rule: Rule, floors: Mapping[str, float]) -> float:
    """Return the smallest change of a rule's stat that is more than noise."""
    return floors.get(rule.stat, FLOOR)


def _refused(text: str, why: str) -> InputError:
    return InputError(
        f"--fail-on {text} {why}",
        code="fail-on",
        expected=f"one of {', '.join(STATS)}, a colon, and percent (5%) or, for times, seconds (0.002, 2ms); each once",
        hint="--fail-on median:5%",
    )
