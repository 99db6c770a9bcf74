"""Build the report's content: the outcome in a few sentences, missed targets first, then the sections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxcompress.formatting import counted, milliseconds, number, percent, points, size
from onnxcompress.report.elements import Prose, Section, Story, Table, Tile
from onnxcompress.report.run_data import Material
from onnxcompress.report.sections import layers, measurements, model, passes

_SECTIONS = (
    model.chain,
    model.model,
    passes.passes,
    layers.blocks,
    layers.channels,
    measurements.latency,
    measurements.scores,
    layers.noise,
    layers.sensitivity,
    model.sizes,
    model.inputs,
    model.repeat,
)
"""In the order of the page; a function returns None where the run has nothing to show."""


def tell(material: Material) -> Story:
    """Build the content of a report.

    Args:
        material: The facts about the run.

    Returns:
        The title, the outcome and the sections, ready to render.
    """
    sections = [section for show in _SECTIONS if (section := show(material)) is not None]
    return Story(
        title=_title(material),
        subtitle=_subtitle(material),
        missed=missed(material),
        lead=_lead(material),
        tiles=_tiles(material),
        sections=_with_gates(material, sections),
    )


def missed(material: Material) -> list[str]:
    """List the targets and gates that the run missed.

    Args:
        material: The facts about the run.

    Returns:
        A sentence for each.
    """
    targets = [step.result.figures.target_missed for step in material.steps]
    gates = [verdict.text for verdict in material.gates if not verdict.passed]
    return [*filter(None, targets), *gates]


def _title(material: Material) -> str:
    names = {f.role: f.name for f in material.files}
    if "output" in names:
        return f"{_last(names.get('input', 'model'))} → {_last(names['output'])}"
    if material.comparison is not None:
        return f"{material.comparison['b']['name']} against {material.comparison['a']['name']}"
    shown = [_last(f.name) for f in material.files if f.role in ("model", "input")]
    return ", ".join(shown) or material.command


def _last(name: str) -> str:
    return name.replace("\\", "/").rsplit("/", 1)[-1]


def _subtitle(material: Material) -> str:
    chain = " → ".join(step.pass_.name for step in material.steps)
    if material.command == "run":
        return f"onnxcompress run: {chain}"
    return f"onnxcompress {material.command}"


def _lead(material: Material) -> list[str]:
    account, found = material.account, material.comparison
    if found is not None:
        return _compared(found, material.compared_on)
    if "ratios_to_first" in account:
        return _benchmarked(account)
    if "top5" in account:
        low, high = (100 * v for v in account["top1_interval"])
        share = f"{100 * account['top1']:.2f} % of {account['count']} images are classified right"
        return [f"{share} (95 % interval {low:.2f} to {high:.2f} %)."]
    if "operators" in account:
        count = len(account.get("blocks") or [])
        what = "block can" if count == 1 else "blocks can"
        return [
            f"The network has {number(account['parameters'])} parameters; "
            f"{count or 'no'} {what} be dropped."
        ]
    if "kind" in account and "count" in account:
        return [
            f"{counted(account['count'], account['kind'] + ' image')} made in {account['seconds']:.1f} s."
        ]
    if rows := account.get("rows"):
        worst = max(rows, key=lambda r: float(r["error"]))
        what = f"{worst['layer']} matters most: with {layers.words(worst)} alone"
        return [f"{what}, the outputs' error is {percent(worst['error'])} of their variance."]
    return [f"The models were not compared: {material.not_compared}"] if material.not_compared else []


def _compared(found: Mapping[str, Any], on: str) -> list[str]:
    a, b = found["a"], found["b"]
    return [_speed(found), *_same(found, on), _smaller(a["bytes"], b["bytes"])]


def _speed(found: Mapping[str, Any]) -> str:
    r, a, b = found["latency"], found["a"]["timing"], found["b"]["timing"]
    images = "an image" if b["batch"] == 1 else f"a batch of {b['batch']}"
    before, after = milliseconds(a["median_ms"]), milliseconds(b["median_ms"])
    times = f"{before} → {after} {images} in onnxruntime on {measurements.device(b)}"
    faster = f"{1 / r['value']:.2f} times as fast (95 % interval {1 / r['high']:.2f} to {1 / r['low']:.2f})"
    if r["low"] <= 1 <= r["high"]:
        return f"No difference in speed can be told: {faster}, {times}."
    if r["value"] > 1:
        return f"It is slower, {faster}: {times}."
    return f"It is {faster}: {times}."


def _same(found: Mapping[str, Any], on: str) -> list[str]:
    a, b = found["a"], found["b"]
    on = on or str(found["inputs"])
    if a["top1"] is not None and b["top1"] is not None:
        moved = f"from {percent(a['top1'])} to {percent(b['top1'])} ({points(b['top1'] - a['top1'])})"
        share = found["agreement"]
        same = "" if share is None else f"; {percent(share, 1)} of them keep their class"
        return [f"Top-1 accuracy goes {moved} on {on}{same}."]
    if found["agreement"] is not None:
        return [f"It names the same class as before for {percent(found['agreement'])} of {on}."]
    return [f"Its outputs differ by {found['difference']['max_abs']:.2e} at most, on {on}."]


def _smaller(before: int, after: int) -> str:
    change = (after - before) / before if before else 0.0
    if abs(change) < 0.0005:
        return f"The file is as large as it was: {size(after)}."
    word = "smaller" if change < 0 else "larger"
    return f"The file is {percent(abs(change), 1)} {word}: {size(before)} → {size(after)}."


def _benchmarked(account: Mapping[str, Any]) -> list[str]:
    models = account["models"]
    fastest = min(models, key=lambda m: float(m["median_ms"]))
    time, where = milliseconds(fastest["median_ms"]), measurements.device(fastest)
    lines = [f"{fastest['name']}: {time} at the median on {where}"]
    if len(models) == 1:
        return [f"{lines[0]}, {fastest['throughput']:.4g} images a second."]
    lines[0] += f", the fastest of {len(models)}."
    several = len({m["batch"] for m in models}) > 1
    first = "the first model's" if several else f"{models[0]['name']}'s"
    return lines + [
        f"{name} takes {r['value']:.3f} of {first} time (95 % interval {r['low']:.3f} to {r['high']:.3f})."
        for name, r in account["ratios_to_first"].items()
    ]


def _tiles(material: Material) -> list[Tile]:
    found = material.comparison
    if found is None:
        return []
    a, b, r = found["a"], found["b"], found["latency"]
    interval = f"{1 / r['high']:.2f} to {1 / r['low']:.2f}, 95 % interval"
    tiles = [Tile("speed", f"{1 / r['value']:.2f}×", interval)]
    if a["top1"] is not None and b["top1"] is not None:
        change = points(b["top1"] - a["top1"])
        tiles.append(Tile("top-1 accuracy", percent(b["top1"], 1), change))
    elif found["agreement"] is not None:
        tiles.append(Tile("same class", percent(found["agreement"], 1), f"of {found['inputs']}"))
    tiles.append(Tile("file", size(b["bytes"]), f"was {size(a['bytes'])}"))
    if a["macs"] and b["macs"] and a["macs"] != b["macs"]:
        tiles.append(Tile("multiply-adds", number(b["macs"]), f"was {number(a['macs'])}"))
    elif a["parameters"] != b["parameters"]:
        tiles.append(Tile("parameters", number(b["parameters"]), f"was {number(a['parameters'])}"))
    return tiles


def _with_gates(material: Material, sections: list[Section]) -> list[Section]:
    gates = material.gates
    if not gates:
        return sections
    rows = [["--" + g.gate.replace("_", "-"), "kept" if g.passed else "missed", g.text] for g in gates]
    marked = frozenset(i for i, g in enumerate(gates) if not g.passed)
    table = Table("What the result had to keep", ["gate", "verdict", "measured"], rows, 3, marked, "missed")
    judged = dict.fromkeys(g.preprocess for g in gates if g.preprocess)
    notes = [Prose(f"Images of the gates are {how}.", "quiet") for how in judged]
    return [Section("gates", "Gates", [table, *notes]), *sections]
