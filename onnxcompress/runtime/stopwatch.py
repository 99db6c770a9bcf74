"""Time networks against each other, by a clock that is precise enough on this machine.

On a busy machine wall-clock times are noisy. Where they cannot tell networks apart, the measurement is
repeated with the processor time of one thread, which all later measurements of its kind use too.

Parts of networks, many at once that differ by a percent, are noisy long before two whole networks are. They
have a clock of their own: processor time ranks them, but leaves out how well threads share the work, and
may overstate what narrower layers save. What a network saves as a whole is measured by the wall clock
wherever that can tell two networks apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnxcompress.graph.blocks import Block
from onnxcompress.model import Model
from onnxcompress.model.model_like import ModelLike
from onnxcompress.runtime.block_latency import (
    LatencyChange,
    Share,
    latency_shares,
    noisy,
    share_saved,
    without_each_kind,
)
from onnxcompress.runtime.bootstrap import Ratio
from onnxcompress.runtime.clocks import Clock, has_processor_clock
from onnxcompress.runtime.cores import other_load
from onnxcompress.runtime.latency import Timing, benchmark, ratio
from onnxcompress.runtime.providers import ProviderLike

UNSURE = 0.02
"""Half width of the 95 % interval of a ratio of two latencies above which the clock is too noisy."""
LONGER, IDLE = 3.0, 0.5
"""Where others keep fewer cores busy than IDLE, a noisy comparison first takes so many times as long."""


@dataclass
class Stopwatch:
    """Times networks against each other, by a clock that is precise enough on this machine."""

    provider: ProviderLike = "auto"
    batch: int = 1
    threads: int = 0
    seed: int = 0
    clock: Clock = "wall"
    """Of whole networks; `processor` from the first comparison on for which the wall clock is too noisy."""
    parts_clock: Clock = "wall"
    """Of shares and savings of parts; likewise, at the latest when `clock` is."""
    warm_up: float = 3.0
    """Seconds at most until all models run steadily."""
    tolerance: float = 0.005
    """Half width of the 95 % interval of a ratio at which a comparison ends early."""
    shapes: Mapping[str, Sequence[int]] | None = None
    """Whole shapes of inputs whose sizes the models leave open, by name."""

    def check(self, model: Model) -> None:
        """Run a model once: a provider or a batch that cannot be is an error now, not at the end.

        Args:
            model: The model. Raises CompressError as `latency.benchmark` does.
        """
        benchmark({"": model}, runs=1, **(self._how() | {"warm_up": 0}))

    def shares(self, model: Model, blocks: Sequence[Block], seconds: float = 8.0) -> dict[str, Share]:
        """Measure the latency share of each block; see `latency_shares`.

        Args:
            model: The whole model.
            blocks: Blocks that can be dropped.
            seconds: Time to measure for, at most, by one clock.

        Returns:
            τ by name of the block's exit tensor.

        Raises:
            CompressError: As `latency_shares`.
        """
        without = without_each_kind(model, blocks)
        while True:
            how = self._how(self.parts_clock)
            shares = latency_shares(model, blocks, without=without, seconds=seconds, **how)
            if not noisy(shares) or not self._turn_to_processor("parts_clock"):
                return shares

    def savings(self, model: Model, variants: Mapping[str, Model]) -> dict[str, Share]:
        """Measure the share of a model's latency that each of several variants saves.

        Args:
            model: The whole model.
            variants: The variants, by a name other than "".

        Returns:
            The shares by name, negative for a variant that is slower.

        Raises:
            CompressError: As `latency.benchmark`.
        """
        while True:
            how = self._how(self.parts_clock)
            timings = benchmark({"": model, **variants}, seconds=20.0, tolerance=0.003, **how)
            shares = {name: share_saved(ratio(timings[""], timings[name])) for name in variants}
            if not noisy(shares) or not self._turn_to_processor("parts_clock"):
                return shares

    def ratios(self, model: Model, variants: Mapping[str, Model], seconds: float) -> dict[str, Ratio]:
        """Measure the latency of each of several variants over that of a model.

        Args:
            model: The model.
            variants: The variants, by a name other than "".
            seconds: Time to measure for, at most, by one clock.

        Returns:
            The ratios by name, above 1 for a variant that is slower.

        Raises:
            CompressError: As `latency.benchmark`.
        """
        changes = self.changes(model, variants, seconds)
        return {name: Ratio(one.ratio, one.low, one.high) for name, one in changes.items()}

    def changes(
        self, before: ModelLike, variants: Mapping[str, ModelLike], seconds: float
    ) -> dict[str, LatencyChange]:
        """Measure the latency of each of several variants against that of a model, all run by run.

        Args:
            before: The model, whose latency the others' are divided by.
            variants: The variants, by a name other than "".
            seconds: Time to measure for, at most, by one clock.

        Returns:
            Latencies and ratios by name.

        Raises:
            CompressError: As `latency.benchmark`.
        """
        how, longer = {"warm_up": self.warm_up, "tolerance": self.tolerance}, False
        while True:
            timings = benchmark({"": before, **variants}, seconds=seconds, **(self._how() | how))
            first = timings[""]
            changes = {name: self._change(first, timings[name]) for name in variants}
            widest = max((one.high - one.low) / 2 for one in changes.values())
            if widest <= UNSURE:
                return changes
            if self.clock == "wall" and not longer and other_load() < IDLE:
                longer, seconds = True, LONGER * seconds
            elif not self._turn_to_processor("clock", "parts_clock"):
                return changes

    def compare_again(self, before: Model, after: Model, seconds: float) -> LatencyChange:
        """Compare two models as `compare` does, by the wall clock again where that can tell them apart now.

        Args:
            before: The first model.
            after: The second model, whose latency is divided by the first's.
            seconds: Time to measure for, at most, by one clock.

        Returns:
            Both latencies and their ratio.

        Raises:
            CompressError: As `latency.benchmark`.
        """
        self.clock = "wall"
        return self.compare(before, after, seconds)

    def compare(self, before: Model, after: Model, seconds: float) -> LatencyChange:
        """Measure the ratio of the latencies of two models.

        Args:
            before: The first model.
            after: The second model, whose latency is divided by the first's.
            seconds: Time to measure for, at most.

        Returns:
            Both latencies and their ratio.

        Raises:
            CompressError: As `latency.benchmark`.
        """
        return self.changes(before, {"after": after}, seconds)["after"]

    def saved(self, before: Model, after: Model, target: float, seconds: float) -> float:
        """Measure the part of a latency that a network saves, to choose one that saves a target.

        What reaches the target is measured twice, and the smaller part counts: a network that is chosen
        because it just reaches it is the luckiest of those that were tried, and falls short the next time.

        Args:
            before: The whole network.
            after: The network that may be chosen.
            target: Part of the latency to be saved.
            seconds: Time to measure for, at most, each time.

        Returns:
            The part, negative for a network that is slower.

        Raises:
            CompressError: As `latency.benchmark`.
        """
        found = self.compare(before, after, seconds).saved.value
        return found if found < target else min(found, self.compare(before, after, seconds).saved.value)

    def _change(self, before: Timing, after: Timing) -> LatencyChange:
        found = ratio(before, after)
        times = (before.median_ms, after.median_ms, found.value, found.low, found.high)
        return LatencyChange(*times, before.device, self.batch, self.clock)

    def _turn_to_processor(self, *clocks: str) -> bool:
        """Use the processor's clock from now on; return whether that is possible, and new for the first."""
        if getattr(self, clocks[0]) == "processor" or not has_processor_clock(self.provider):
            return False
        for name in clocks:
            setattr(self, name, "processor")
        return True

    def _how(self, clock: Clock | None = None) -> dict[str, Any]:
        names = ("provider", "batch", "threads", "seed")
        sizes = {"shapes": self.shapes} if self.shapes else {}
        return {name: getattr(self, name) for name in names} | {"clock": clock or self.clock} | sizes
