"""What a model is made of: figures, operators, blocks that can be dropped, channels that can be cut."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnxcompress.account import Refusal
from onnxcompress.errors import ModelError
from onnxcompress.graph.blocks import Block, find_blocks, outermost
from onnxcompress.graph.chain import Segment, chain
from onnxcompress.graph.channel_groups.cut_tracer import CutGroups, find_cut_groups
from onnxcompress.graph.macs import count_macs, count_parameters
from onnxcompress.graph.shape_inference import infer
from onnxcompress.graph.topology import Topology
from onnxcompress.model import Model
from onnxcompress.runtime.block_latency import usable
from onnxcompress.runtime.session import pick_provider
from onnxcompress.runtime.stopwatch import Stopwatch
from onnxcompress.statistics.record import live_record, read_record

SECONDS = 6.0
"""Time to measure shares of blocks for."""

Shapes = Mapping[str, tuple[int | str | None, ...]]


@dataclass(frozen=True)
class Inspection:
    """What a model is made of."""

    model: str
    bytes: int
    """Size of the file, external data included."""
    producer: str
    ir_version: int
    opset: int
    inputs: Shapes
    outputs: Shapes
    input_shape: Shapes
    """Sizes that were assumed for inputs which the file leaves open."""
    parameters: int
    macs: int | None
    """Multiply-accumulates for an image; None where not all shapes are known."""
    operators: Mapping[str, int]
    batch_norms: int
    recorded_tensors: int
    """Tensors whose statistics the file's record holds."""
    recorded_tensors_gone: int
    """Tensors of the record that are no longer in the graph."""
    feature: str | None
    """The spatial tensor through which all data goes; None: there is none."""
    provenance: tuple[Mapping[str, Any], ...]
    channel_groups: CutGroups
    blocks: tuple[Block, ...]
    near_misses: tuple[Refusal, ...]
    """What is nearly a block, and why it is none."""
    chain: tuple[Segment, ...]
    """The blocks and what lies between them, from the input to the output."""

    def as_dict(self) -> dict[str, Any]:
        """Convert it to JSON values.

        Returns:
            All fields but the chain (see `ChainShares.as_dict`), of groups of channels the name, channels,
            parameters, macs and why they stay.
        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "chain"}
        for name in ("inputs", "outputs", "input_shape"):
            values[name] = {tensor: list(shape) for tensor, shape in values[name].items()}
        blocks = [dataclasses.asdict(block) for block in self.blocks]
        missed = [dataclasses.asdict(refusal) for refusal in self.near_misses]
        listed = {"operators": dict(self.operators), "provenance": list(self.provenance)}
        return (
            values
            | listed
            | {
                "channel_groups": group_rows(self.channel_groups),
                "blocks": blocks,
                "near_misses": missed,
            }
        )


@dataclass(frozen=True)
class ChainShares:
    """The share of each segment of a network's chain, from 0 to 1."""

    shares: tuple[float, ...]
    device: str | None
    """What the latency was measured on; None: shares are of the multiply-accumulates."""
    noisy: bool = False
    """Whether the clock could not tell blocks apart: shares are of the multiply-accumulates then."""

    def as_dict(self, chain: Sequence[Segment]) -> dict[str, Any]:
        """Convert it to JSON values.

        Args:
            chain: The segments.

        Returns:
            `chain`, the segments with their `share`; `latency_on`; `latency_noisy`.
        """
        rows = [{**dataclasses.asdict(s), "share": v} for s, v in zip(chain, self.shares, strict=True)]
        return {"chain": rows, "latency_on": self.device, "latency_noisy": self.noisy}


def chain_shares(model: Model, found: Inspection, clock: Stopwatch | None) -> ChainShares:
    """Share out the latency over a network's chain: to blocks as measured, to the rest by its work.

    Args:
        model: The model that `found` is of.
        found: What it is made of.
        clock: Measures the latency; None: shares are of the multiply-accumulates.

    Returns:
        The shares, which add up to 1.

    Raises:
        CompressError: The model cannot be run.
    """
    work = [segment.macs for segment in found.chain]
    whole = max(sum(work), 1)
    plain = tuple(count / whole for count in work)
    if clock is None or not found.blocks:
        return ChainShares(plain, None)
    blocks = outermost(found.blocks)
    tau, is_noisy = usable(clock.shares(model, blocks, SECONDS), blocks, whole)
    if is_noisy or sum(tau.values()) >= 1:
        return ChainShares(plain, None, noisy=True)
    rest = sum(s.macs for s in found.chain if not s.droppable)
    left = max(0.0, 1 - sum(tau.values()))
    shares = [tau[s.exit] if s.droppable else left * s.macs / max(rest, 1) for s in found.chain]
    provider = pick_provider(clock.provider)
    return ChainShares(tuple(shares), f"{provider.name}, batch {clock.batch}")


def group_rows(groups: CutGroups) -> list[dict[str, Any]]:
    """List groups of channels.

    Args:
        groups: The groups.

    Returns:
        Name, channels, parameters and macs of each; `stays`: why none of a group can be cut, or None.
    """
    return [
        {
            "name": group.name,
            "channels": group.width,
            "parameters": group.parameters,
            "macs": group.macs,
            "stays": None if group.refusal is None else str(group.refusal),
        }
        for group in groups.all
    ]


def inspect_model(model: Model, name: str, size: int) -> Inspection:
    """Look at a model; it stays as it is.

    Args:
        model: The model; sizes that its inputs leave open may have been assumed.
        name: Its name for people.
        size: Bytes of its file.

    Returns:
        What it is made of.
    """
    shapes = infer(model, {}).shapes
    feature = Topology(model).feature()
    try:
        macs: int | None = count_macs(model)
    except ModelError:  # an open image size, or an operator of another domain
        macs = None
    found, live = find_blocks(model), len(live_record(model))
    return Inspection(
        model=name,
        bytes=size,
        producer=model.producer,
        ir_version=model.ir_version,
        opset=model.opset,
        inputs={t.name: tuple(shapes.get(t.name, ())) for t in model.graph.inputs},
        outputs={t.name: tuple(shapes.get(t.name, ())) for t in model.graph.outputs},
        input_shape={name: tuple(shape) for name, shape in model.assumed.items()},
        parameters=count_parameters(model),
        macs=macs,
        operators=dict(Counter(n.op for n in model.graph.nodes).most_common()),
        batch_norms=sum(n.op == "BatchNormalization" for n in model.graph.nodes),
        recorded_tensors=live,
        recorded_tensors_gone=len(read_record(model)) - live,
        feature=None if feature is None else feature.name,
        provenance=tuple(model.provenance()),
        channel_groups=find_cut_groups(model),
        blocks=tuple(found.blocks),
        near_misses=tuple(found.near_misses),
        chain=chain(model, outermost(found.blocks)),
    )
