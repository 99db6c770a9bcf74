"""How many threads torch computes with, where results depend on it.

LAPACK's solvers and the gradients of convolutions' weights add in an order that goes by the number of
threads: the last digits of their results do, too, and then a rounded weight, or which weights stay. What
must not depend on it runs with one thread, several such jobs beside each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes with one thread; of the whole process, since it has no setting of a thread's own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
