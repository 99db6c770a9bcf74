"""Sparsity patterns: unstructured and N:M."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pattern:
    """A sparsity pattern: any weights stay, or `kept` of each `group` neighbouring input channels."""

    kept: int = 0
    group: int = 0
    """0: any."""

    @staticmethod
    def parse(text: str) -> Pattern | None:
        """Read a pattern from text.

        Args:
            text: `unstructured`, or `N:M` with 0 < N < M.

        Returns:
            The pattern; None for any other text.
        """
        if text == "unstructured":
            return Pattern()
        kept, colon, group = text.partition(":")
        if not colon or not kept.isdecimal() or not group.isdecimal():
            return None
        return Pattern(int(kept), int(group)) if 0 < int(kept) < int(group) else None

    @property
    def sparsity(self) -> float:
        """Share of zeros that the pattern itself asks for."""
        return 1 - self.kept / self.group if self.group else 0.0

    def fits(self, inputs: int) -> bool:
        """Return whether a layer can have the pattern.

        Args:
            inputs: Input channels of each group of the layer.

        Returns:
            Whether they are a multiple of the pattern's group.
        """
        return not self.group or inputs % self.group == 0


UNSTRUCTURED = Pattern()
