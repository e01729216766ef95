from __future__ import annotations

from edgeprune.export.turns import measure_in_turns


def test_calls_are_timed_in_turns() -> None:
    order: list[str] = []
    found = measure_in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3)
    assert order == ["a", "b"] * 4
    assert found.keys() == {"a", "b"}
    assert all(ms >= 0 for ms in found.values())
