"""Ctrl-C and a polite kill: both unwind the command, so that whatever is open cleans up."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from edgeprune.cli.ui import Ui

DEFAULTS: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


@contextmanager
def raise_on_signals(ui: Ui) -> Iterator[None]:
    """Raise KeyboardInterrupt or SystemExit when a signal comes, and note which one it was.

    The note tells what happened even when a library turns the exception into another one on its way, as some do when
    they are interrupted while being imported. A signal that this process ignores stays ignored.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        ui.signal = number
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    replaced = []
    try:
        for number, default in DEFAULTS.items():
            if signal.getsignal(number) == default:
                signal.signal(number, leave)
                replaced.append(number)
    except ValueError:  # not the main thread: signals do not come here
        pass
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, DEFAULTS[number])
