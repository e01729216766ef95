"""Items prepared ahead in another thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.runtime.prefetch import prepare_ahead

PATIENCE_S = 10.0  # a limit for waits that end at once unless something is broken


class Watched:
    """Takes down what was taken from the source and what was prepared."""

    def __init__(self, count: int, fail_at: int | None = None) -> None:
        self.count, self.fail_at = count, fail_at
        self.taken: list[int] = []
        self.prepared: list[int] = []
        self.changed = threading.Condition()

    def items(self) -> Iterator[int]:
        for i in range(self.count):
            self.taken.append(i)
            yield i

    def prepare(self, item: int) -> int:
        if item == self.fail_at:
            raise ValueError(f"item {item}")
        with self.changed:
            self.prepared.append(item)
            self.changed.notify_all()
        return item * 10

    def wait_for(self, number: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.prepared) >= number, PATIENCE_S)


def wait_until(what: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE_S
    while not what() and time.monotonic() < end:
        time.sleep(0.005)
    return what()


def preparing() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "edgeprune-prepare"]


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    assert wait_until(lambda: not preparing())
    yield
    assert wait_until(lambda: not preparing()), "a thread was left"


@given(st.lists(st.integers(), max_size=12), st.integers(1, 4))
@settings(max_examples=30)
def test_items_come_in_order(items: list[int], ahead: int) -> None:
    assert list(prepare_ahead(items, lambda x: x + 1, ahead)) == [(x, x + 1) for x in items]


def test_nothing_comes_of_nothing() -> None:
    assert list(prepare_ahead([], str, 1)) == []


def test_none_is_an_item_like_any_other() -> None:
    assert list(prepare_ahead([None, 1, None], lambda x: x, 2)) == [(None, None), (1, 1), (None, None)]


@pytest.mark.parametrize("ahead", [1, 2, 5])
@pytest.mark.parametrize("fail_at", [0, 2, 4])
def test_exception_comes_in_its_place_and_ends(ahead: int, fail_at: int) -> None:
    watched = Watched(5, fail_at)
    stream = prepare_ahead(watched.items(), watched.prepare, ahead)
    found = []
    with pytest.raises(ValueError, match=f"item {fail_at}"):
        found.extend(stream)
    assert found == [(i, i * 10) for i in range(fail_at)]
    assert list(stream) == []
    assert watched.taken == list(range(fail_at + 1))


def test_exception_of_the_source_comes_in_its_place() -> None:
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("unplugged")

    stream = prepare_ahead(source(), str, 3)
    assert next(stream) == (1, "1")
    assert next(stream) == (2, "2")
    with pytest.raises(OSError, match="unplugged"):
        next(stream)


def test_an_item_that_is_an_exception_is_not_raised() -> None:
    """Only what was raised is."""
    item = ValueError("an item")
    assert list(prepare_ahead([item], lambda x: x, 1)) == [(item, item)]


@pytest.mark.parametrize("used", [0, 1, 3])
def test_closing_early_ends_the_thread(used: int) -> None:
    watched = Watched(10**9)
    stream = prepare_ahead(watched.items(), watched.prepare, 2)
    for _ in range(used):
        next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert wait_until(lambda: not preparing())
    assert len(watched.prepared) <= used + 4


def test_dropping_the_iterator_ends_the_thread() -> None:
    watched = Watched(10**9)
    stream = prepare_ahead(watched.items(), watched.prepare, 2)
    next(stream)
    del stream
    assert wait_until(lambda: not preparing())


def test_items_are_prepared_while_the_last_one_is_used() -> None:
    watched = Watched(5)
    stream = prepare_ahead(watched.items(), watched.prepare, 2)
    next(stream)
    watched.wait_for(3)  # without asking for more
    assert len(list(stream)) == 4


def most_prepared(ahead: int) -> set[int]:
    """Return how many items are prepared beyond those asked for, once the thread has nothing left to do."""
    watched, found = Watched(20), set()
    stream = prepare_ahead(watched.items(), watched.prepare, ahead)
    for used in range(1, 4):
        next(stream)
        watched.wait_for(used + ahead)
        time.sleep(0.02)
        found.add(len(watched.prepared) - used)
    stream.close()  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("ahead", [1, 2, 4])
def test_no_more_than_ahead_are_prepared_before_they_are_asked_for(ahead: int) -> None:
    assert most_prepared(ahead) == {ahead}


def test_nothing_is_prepared_before_the_first_is_asked_for() -> None:
    watched = Watched(5)
    stream = prepare_ahead(watched.items(), watched.prepare, 2)
    time.sleep(0.05)
    assert watched.prepared == []
    assert next(stream) == (0, 0)
    stream.close()  # type: ignore[attr-defined]
