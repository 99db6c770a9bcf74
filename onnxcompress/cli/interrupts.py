"""Ctrl-C and SIGTERM: the command cleans up and ends, even where a library swallowed the interrupt.

Python raises KeyboardInterrupt wherever the main thread is: in a destructor or a callback it is printed and
lost. So it is remembered, and the next step of progress raises it again.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_came: list[int] = []
"""Signals since the command began."""


@contextmanager
def watching() -> Iterator[list[int]]:
    """Raise KeyboardInterrupt at SIGINT and SIGTERM, where Python's own handlers are; yields what came."""
    _came.clear()
    own: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    main = threading.current_thread() is threading.main_thread()
    ours = [number for number, handler in own.items() if main and signal.getsignal(number) is handler]
    for number in ours:
        signal.signal(number, _stop)
    try:
        yield _came
    finally:
        for number in ours:
            signal.signal(number, own[number])


def check() -> None:
    """Raise KeyboardInterrupt if a signal came."""
    if _came:
        raise KeyboardInterrupt


def _stop(number: int, frame: object) -> None:
    _came.append(number)
    raise KeyboardInterrupt
