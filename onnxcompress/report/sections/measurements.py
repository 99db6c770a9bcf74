"""Sections on what was measured on models: latency, accuracy, agreement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxcompress.data.preprocessing_choice import preprocess_text
from onnxcompress.evaluation.accuracy import Accuracy
from onnxcompress.formatting import milliseconds, percent, points, where
from onnxcompress.report.charts import Intervals, Spread
from onnxcompress.report.elements import Part, Plot, Prose, Section, Table, Terms
from onnxcompress.report.run_data import Material
from onnxcompress.runtime.providers import described


def latency(material: Material) -> Section | None:
    """Show the distribution of the latency of runs.

    Args:
        material: The facts about the run.

    Returns:
        The section; None where the run has nothing to show there.
    """
    found = timings(material)
    if not found:
        return None
    rows = [[str(t["name"]), *(f"{t[k]:.3f}" for k in _TIMES), f"{t['throughput']:.1f}"] for t in found]
    columns = ["model", "median, ms", "mean", "fastest", "90 %", "99 %", "images a second"]
    first = found[0]
    ran = f"onnxruntime on {device(first)}{_batch(found)}, {first['runs']} runs of each model"
    parts: list[Part] = []
    if material.samples:
        chart = Spread(list(material.samples.items()), "milliseconds a run")
        text = (
            "Silhouette: how many runs took how long. Thick line: the middle half, thin line: 90 % of the "
            f"runs, tick: the median. {_ratios(material)} {_cut(chart)}"
        )
        parts.append(Plot("How long a run takes", text, chart))
    parts.append(Table(f"Latency in {ran}", columns, rows))
    if len(found) > 1:
        parts.append(
            Prose(
                "Models take turns run by run, in random order, so that what slows the machine hits all "
                "alike; ratios are medians over the rounds, intervals by a block bootstrap.",
                "quiet",
            )
        )
    return Section("latency", "Latency", parts)


def device(timing: Mapping[str, Any]) -> str:
    """Describe the execution provider and its settings.

    Args:
        timing: A timing or an account with the keys `provider` and `settings`.

    Returns:
        Such as "the CPU".
    """
    return described(where(timing["provider"]), timing["settings"])


def _batch(found: list[Mapping[str, Any]]) -> str:
    """The batch size; empty where models differ in it, since their names then state it."""
    return f", batch {found[0]['batch']}" if len({t["batch"] for t in found}) == 1 else ""


_TIMES = ("median_ms", "mean_ms", "min_ms", "p90_ms", "p99_ms")


def _cut(chart: Spread) -> str:
    high = chart.limits[1]
    runs = [run for _, samples in chart.rows for run in samples]
    over = sum(run > high for run in runs)
    if not over:
        return ""
    share = percent(over / len(runs), 1)
    return f"{share} of the runs took longer, up to {milliseconds(max(runs))}: not drawn."


def timings(material: Material) -> list[Mapping[str, Any]]:
    """List the timings of all models in the run.

    Args:
        material: The facts about the run.

    Returns:
        Timings as `Timing.as_dict` returns them.
    """
    if material.comparison is not None:
        return [material.comparison[side]["timing"] for side in ("a", "b")]
    models = material.account.get("models", []) if "ratios_to_first" in material.account else []
    return list(models)


def _ratios(material: Material) -> str:
    if material.comparison is not None:
        found = {material.comparison["b"]["name"]: material.comparison["latency"]}
    else:
        found = material.account.get("ratios_to_first", {})
    return " ".join(
        f"{name} takes {r['value']:.3f} of the first model's time (95 % interval {r['low']:.3f} to "
        f"{r['high']:.3f})."
        for name, r in found.items()
    )


def scores(material: Material) -> Section | None:
    """Show accuracy, agreement and differences of the outputs.

    Args:
        material: The facts about the run.

    Returns:
        The section; None where the run has nothing to show there.
    """
    parts: list[Part] = []
    found = material.comparison
    rows = _accuracies(material)
    if rows:
        text = "Line: 95 % interval for images drawn at random."
        if len(rows) == 2:
            change = points((rows[1][1] - rows[0][1]) / 100)
            text = f"Top-1 accuracy changed by {change}. {text}"
        parts.append(Plot("Top-1 accuracy", text, Intervals(rows, "images classified right, %")))
    if found is not None:
        parts += _agreement(found, material.compared_on)
        if material.learned_from:
            text = "Images that nothing was learned from say more: name them with --gate-images."
            parts.append(Prose(text, "quiet"))
    elif "top5" in material.account:
        parts.append(Terms(_evaluated(material.account)))
    if material.not_compared:
        parts.append(Prose(f"The models were not compared: {material.not_compared}"))
    return Section("accuracy", "Accuracy and agreement", parts) if parts else None


def _accuracies(material: Material) -> list[tuple[str, float, float, float]]:
    """Top-1 accuracies in percent, with Wilson's intervals."""
    account, found = material.account, material.comparison
    if found is not None:
        sides, count = [found["a"], found["b"]], images_of(found)
    elif "top5" in account:
        sides, count = [{"name": account["model"], "top1": account["top1"]}], int(account["count"])
    else:
        return []
    if count == 0 or any(side["top1"] is None for side in sides):
        return []
    return [(s["name"], 100 * s["top1"], *(100 * v for v in wilson(s["top1"], count))) for s in sides]


def _evaluated(account: Mapping[str, Any]) -> list[tuple[str, str]]:
    how = preprocess_text(account["preprocess"], account["preprocess_from"])
    return [
        ("top-1", percent(account["top1"])),
        ("top-5", percent(account["top5"])),
        ("images", f"{account['count']} of {account['images']}, {how}"),
        ("took", f"{account['seconds']:.1f} s on {device(account)}"),
    ]


def wilson(share: float, count: int) -> tuple[float, float]:
    """Compute the 95 % confidence interval of a share (Wilson's score interval).

    Args:
        share: The share, from 0 to 1.
        count: The sample size.

    Returns:
        Lower and upper end, from 0 to 1.
    """
    return Accuracy(share, share, count, 0.0, "").interval


def images_of(comparison: Mapping[str, Any]) -> int:
    """Read from a comparison how many images or random inputs it used.

    Args:
        comparison: `Comparison.as_dict()`.

    Returns:
        The count; 0 where it is not stated.
    """
    word = str(comparison["inputs"]).split(" ", 1)[0]
    return int(word) if word.isdigit() else 0


def _agreement(found: Mapping[str, Any], on: str) -> list[Part]:
    parts: list[Part] = []
    on = on or str(found["inputs"])
    count = images_of(found)
    if found["agreement"] is not None and count:
        low, high = wilson(found["agreement"], count)
        parts.append(
            Prose(
                f"Both models name the same top-1 class for {percent(found['agreement'])} of {on} (95 % "
                f"interval {100 * low:.2f} to {100 * high:.2f} % for inputs of that kind)."
            )
        )
    worst = found["difference"]
    parts.append(
        Prose(
            f"Largest difference of an output: {worst['max_abs']:.3g} absolute, {worst['max_rel']:.3g} "
            f"relative (output {worst['output']}), without onnxruntime's optimizations."
        )
    )
    return parts
