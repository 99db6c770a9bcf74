"""What the guard costs, and what it says of results and of faults.

    python -m tests.benchmarks.guard MODEL [RESULT.onnx …] [--preprocess TEXT] [--images DIR] [--reference]

Printed: the processor time that the guard takes on MODEL (inputs, both sessions, both runs); the verdict on
each RESULT, by the floors of most passes; the verdict on each fault of `tests.helpers.faults` in each of a
few layers. With --reference MODEL is what the first RESULT was made from, the others were repaired from
that one by correct-bias, and are judged as its results.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


@click.command()
@click.argument("model")
@click.argument("results", nargs=-1)
@click.option("--preprocess")
@click.option("--images", help="To judge by; else procedural ones are made.")
@click.option("--reference", is_flag=True, help="Judge results after the first by the first and MODEL.")
def main(
    model: str, results: tuple[str, ...], preprocess: str | None, images: str | None, reference: bool
) -> None:
    """Time and verdicts of the guard."""
    from onnxcompress.model import load
    from onnxcompress.optimize.calibration import InputRequest
    from onnxcompress.passes.judging import Watch
    from tests.helpers.faults import FAULTS, broken

    network = load(model)
    judged_by = None if images is None else InputRequest(images, preprocess)
    watch = Watch(network, [InputRequest(preprocess=preprocess)], judged_by=judged_by)
    before = watch.before(network)
    start = time.process_time()
    print(_verdict("itself", watch.measure(before, network.copy(), exact=False)))
    print(f"the guard takes {time.process_time() - start:.1f} s of processor time on {model}")
    for at, result in enumerate(results):
        if reference and at == 0:
            before = watch.before(load(result))
        elif reference:
            print(_verdict(result, watch.measure(before, load(result), exact=False, reference=model)))
        else:
            print(_verdict(result, watch.measure(before, load(result), exact=False)))
    before = watch.before(network)
    for fault in [] if reference else FAULTS:
        for layer in (1, 5, 9, -1):
            name = f"{fault}, layer {layer}"
            print(_verdict(name, watch.measure(before, broken(network, fault, layer), exact=False)))


def _verdict(name: str, found: object) -> str:
    from onnxcompress.evaluation.guard import Floors, GuardMeasurements, verdict

    assert isinstance(found, GuardMeasurements)
    judged = verdict(found, Floors())
    return f"{judged.status:9} {name}: {judged.text}"


if __name__ == "__main__":
    main()
