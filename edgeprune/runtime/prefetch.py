"""Prepare items in another thread while the last ones are used."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")
_POLL_S = 0.1


def prepare_ahead(items: Iterable[T], prepare: Callable[[T], U], ahead: int) -> Iterator[tuple[T, U]]:
    """Yield (item, prepare(item)) in order; up to `ahead` items are prepared before they are asked for.

    An exception, of the iterable or of `prepare`, is raised in its place and ends the iteration. Closing the iterator
    ends the thread.
    """
    ready: queue.Queue[tuple[T, U] | BaseException | None] = queue.Queue(maxsize=ahead)
    closed = threading.Event()

    def put(value: tuple[T, U] | BaseException | None) -> None:
        while not closed.is_set():
            with suppress(queue.Full):
                ready.put(value, timeout=_POLL_S)
                return

    def work() -> None:
        try:
            for item in items:
                if closed.is_set():
                    return
                put((item, prepare(item)))
            put(None)
        except BaseException as error:  # handed to the other thread, which raises it
            put(error)

    thread = threading.Thread(target=work, name="edgeprune-prepare", daemon=True)
    thread.start()
    try:
        while (value := ready.get()) is not None:
            if isinstance(value, BaseException):
                raise value
            yield value
    finally:
        closed.set()
