"""W8A8 on a CPU with AVX2 and no VNNI, emulated: does onnxruntime compute what the file says?

    apt-get install qemu-user
    python tests/benchmarks/overflow.py MODEL --preprocess TEXT [--count 16]

MODEL is quantized on procedural images, with and without `overflow_safe`. Both files run natively and in
qemu-x86_64 as a Haswell, whose VPMADDUBSW cuts off sums beyond 16 bits. Printed: signal to noise of the
scores against the float network's, and the share of images with its top-1 class.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

EMULATOR = "qemu-x86_64"
RUN = """
import sys; sys.path[:] = {path!r}
import numpy as np, onnxruntime as ort
opened = ort.InferenceSession({model!r}, providers=["CPUExecutionProvider"])
x = np.load({images!r})
name = opened.get_inputs()[0].name
np.save({result!r}, np.concatenate([opened.run(None, {{name: x[i : i + 1]}})[0] for i in range(len(x))]))
"""


@click.command()
@click.argument("model")
@click.option("--preprocess", required=True)
@click.option("--count", default=16, help="Images to run.")
@click.option("--cpu", default="Haswell", help="That qemu emulates; it must have AVX2 and no VNNI.")
def main(model: str, preprocess: str, count: int, cpu: str) -> None:
    """Scores of W8A8 natively and without VNNI."""
    from onnxcompress.model import load, save
    from onnxcompress.optimize.calibration import InputRequest, gather_inputs
    from onnxcompress.passes.base import run
    from onnxcompress.passes.quantize import Quantize

    if shutil.which(EMULATOR) is None:
        raise click.ClickException(f"{EMULATOR} was not found; apt-get install qemu-user")
    with tempfile.TemporaryDirectory() as folder:
        images = gather_inputs(load(model), InputRequest(None, preprocess, None, "procedural", count, 1))
        np.save(f"{folder}/x.npy", images.images.array())
        exact = _scores(folder, model, [])
        for safe in (True, False):
            network = load(model)
            run([Quantize(preprocess=preprocess, synthetic=64, overflow_safe=safe)], network)
            file = f"{folder}/{safe}.onnx"
            save(network, file)
            for where, command in (("native", []), (cpu, [EMULATOR, "-cpu", cpu])):
                found = _scores(folder, file, command)
                snr = 10 * np.log10(exact.var() / np.square(found - exact).mean())
                same = (found.argmax(1) == exact.argmax(1)).mean()
                name = f"{'' if safe else 'not '}overflow safe, {where}"
                print(f"{name:32} {snr:6.2f} dB   top-1 agrees {same:7.2%}", flush=True)


def _scores(folder: str, model: str, emulator: list[str]) -> np.ndarray:
    """(count, classes): the first output, in a process of its own."""
    files = {"images": f"{folder}/x.npy", "result": f"{folder}/y.npy"}
    code = RUN.format(path=sys.path, model=str(Path(model).resolve()), **files)
    python = str(Path(sys.executable).resolve())
    done = subprocess.run([*emulator, python, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(done.stderr.strip().splitlines()[-1])
    found: np.ndarray = np.load(f"{folder}/y.npy")
    return found.reshape(len(found), -1)


if __name__ == "__main__":
    main()
