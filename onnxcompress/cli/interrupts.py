"""Handle Ctrl-C and SIGTERM so that a command cleans up and ends, even if a library swallows the interrupt.

Python raises KeyboardInterrupt wherever the main thread is: in a destructor or a callback it is printed and
lost. So the signal is recorded, and the next progress report raises the interrupt again.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_came: list[int] = []
"""Signals received since the command began."""


@contextmanager
def watching() -> Iterator[list[int]]:
    """Raise KeyboardInterrupt at SIGINT and SIGTERM, unless the program has handlers of its own.

    Yields:
        The signals received so far.
    """
    global _came
    signals: list[int] = []
    _came = signals
    own: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    main = threading.current_thread() is threading.main_thread()
    ours = [number for number, handler in own.items() if main and signal.getsignal(number) is handler]
    for number in ours:
        signal.signal(number, _stop)
    try:
        yield signals
    finally:
        for number in ours:
            signal.signal(number, own[number])
        _came = []  # what came belongs to this command, and interrupts no later one


def check() -> None:
    """Raise KeyboardInterrupt if a signal was received.

    Raises:
        KeyboardInterrupt: A signal was received.
    """
    if _came:
        raise KeyboardInterrupt


def _stop(number: int, frame: object) -> None:
    _came.append(number)
    raise KeyboardInterrupt
