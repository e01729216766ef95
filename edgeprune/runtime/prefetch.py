"""Prepare items in another thread while the last ones are used."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")
_POLL_S = 0.1  # how soon the thread notices that nobody wants more


def prepare_ahead(items: Iterable[T], prepare: Callable[[T], U], ahead: int) -> Iterator[tuple[T, U]]:
    """Yield (item, prepare(item)) in order; up to `ahead` items are prepared before they are asked for.

    An exception, of the iterable or of `prepare`, is raised in its place and ends the iteration. Closing the iterator
    ends the thread.
    """
    ready: queue.SimpleQueue[tuple[T, U] | BaseException | None] = queue.SimpleQueue()
    places, closed = threading.Semaphore(ahead), threading.Event()

    def has_place() -> bool:
        while not closed.is_set():
            if places.acquire(timeout=_POLL_S):
                return True
        return False

    def work() -> None:
        try:
            source = iter(items)
            while has_place():
                try:
                    item = next(source)
                except StopIteration:
                    ready.put(None)
                    return
                ready.put((item, prepare(item)))
        except BaseException as error:  # handed to the other thread, which raises it
            ready.put(error)

    threading.Thread(target=work, name="edgeprune-prepare", daemon=True).start()
    try:
        while (value := ready.get()) is not None:
            if isinstance(value, BaseException):
                raise value
            places.release()
            yield value
    finally:
        closed.set()
