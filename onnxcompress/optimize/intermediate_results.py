"""Values that passes compute on their way, kept so that a repeated or killed run begins where it was.

A pass asks for values by their kind and by all that they depend on. Where a store is active (`keeping`; the
commands open `pipeline.cache`), values that an earlier run computed of the same come from there. Without a
store, as in Python unless a program opens one, everything is computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import numpy as np

Values = dict[str, np.ndarray]
Parts = Callable[[], Mapping[str, Any]]
"""Gives all that values depend on, as JSON values; it is called only where a store is active."""


class ValueStore(Protocol):
    """Where values are kept."""

    def find_values(self, kind: str, parts: Mapping[str, Any]) -> Values | None:
        """Look up values.

        Args:
            kind: What they are.
            parts: All that they depend on, as JSON values.

        Returns:
            The values; None where they are missing or damaged.
        """

    def store_values(self, kind: str, parts: Mapping[str, Any], values: Values) -> None:
        """Keep values, where that is possible.

        Args:
            kind: What they are.
            parts: All that they depend on, as JSON values.
            values: The values.
        """


_store: ContextVar[ValueStore | None] = ContextVar("store", default=None)


@contextmanager
def keeping(store: ValueStore | None) -> Iterator[None]:
    """Let passes keep values, and find kept ones.

    Args:
        store: Where; None: nothing is kept.

    Yields:
        Nothing.
    """
    token = _store.set(store)
    try:
        yield
    finally:
        _store.reset(token)


def find_kept(kind: str, parts: Parts) -> Values | None:
    """Look up values of an earlier run.

    Args:
        kind: What they are.
        parts: All that they depend on, but the software.

    Returns:
        The values; None where there are none.
    """
    store = _store.get()
    return None if store is None else store.find_values(kind, parts())


def keep(kind: str, parts: Parts, values: Values) -> None:
    """Keep values for later runs.

    Args:
        kind: What they are.
        parts: All that they depend on, but the software.
        values: The values.
    """
    store = _store.get()
    if store is not None:
        store.store_values(kind, parts(), values)


def kept(kind: str, parts: Parts, compute: Callable[[], Values]) -> Values:
    """Return the values of an earlier run, or compute and keep them.

    Args:
        kind: What they are.
        parts: All that they depend on, but the software.
        compute: Computes them.

    Returns:
        The values.
    """
    found = find_kept(kind, parts)
    if found is None:
        found = compute()
        keep(kind, parts, found)
    return found


def array_digest(values: np.ndarray) -> str:
    """Compute the SHA-256 of an array's values, for `Parts`.

    Args:
        values: The array.

    Returns:
        The digest in hexadecimal.
    """
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()
