"""All figures of the GPU in one run: latency by blocks dropped, scoring, precisions, whether clocks agree.

    python tests/benchmarks/gpu.py export FOLDER [--size 224]     where torchvision is
    python tests/benchmarks/gpu.py run FOLDER --json gpu.json     where the GPU is: no network, no registry
    python tests/benchmarks/gpu.py run --provider cpu --small     the very same on a CPU, in minutes
    python tests/benchmarks/gpu.py passes --network NET.onnx TRAIN TEST PREPROCESS [--network …]

`--parts` takes those that are wanted (all but tensorrt):

    timer      our clock against CUDA events, on a CPU against onnxruntime's profiler
    drop       ResNet-34, ResNet-50, MobileNetV2: the share of each block, and the latency without the k
               costliest, beside the sum of their shares (PRACTISE: 2 blocks of ResNet-34 16 %, 3 22 %)
    precision  W8A8 and fp16 against float32 on the same provider; on CUDA with TF32 on and off
    scoring    all blocks of ResNet-34 by this tool with its shares, and by the published procedure on some
               blocks, times what is left
    tensorrt   ResNet-34 without 0 to 3 blocks (an engine is built for each), in float32 and fp16

`passes` applies fp16, quantize, prune and drop-blocks to each network, which learn from TRAIN, times all
results interleaved, and judges them on TEST, all within --minutes: what no time is left for is a row.

That each session's first provider is the one asked for, and ran nodes, is asserted. Results are written
after each part; a part that fails is a row with the reason, and the exit code is 1. The table comes last.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


class _NoPillow(types.ModuleType):
    """In the place of PIL: nothing here reads image files, so that names are enough."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Exception,), {})


if importlib.util.find_spec("PIL") is None:
    sys.modules["PIL"] = _NoPillow("PIL")

from tests.benchmarks.gpu_networks import export  # noqa: E402
from tests.benchmarks.gpu_parts import PARTS, Bench, run  # noqa: E402
from tests.benchmarks.gpu_passes import Asked, Given, passes  # noqa: E402


def main() -> int:
    """Exit code 1 where a part failed."""
    arguments = _arguments()
    if arguments.command == "export":
        export(arguments.folder, arguments.size)
        return 0
    if arguments.command == "passes":
        return _passes(arguments)
    small = arguments.small
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.folder or Path(made)
        if arguments.folder is None:
            export(folder, 64 if small else 224)
        bench = Bench(
            folder=folder,
            provider=arguments.provider,
            batch=arguments.batch or (4 if small else 64),
            seconds=arguments.seconds or (3.0 if small else 6.0),
            images=24 if small else 500,
            steps=arguments.steps or (10 if small else 1000),
            blocks=1 if small else 2,
            threads=arguments.threads,
            json=arguments.json,
        )
        return run(bench, arguments.parts.split(","))


def _passes(arguments: argparse.Namespace) -> int:
    names = ("minutes", "blocks", "sparsity", "effort", "judged")
    networks = tuple(Given(*given) for given in arguments.network)
    asked = Asked(networks, **{name: getattr(arguments, name) for name in names})
    PARTS["passes"] = passes(asked)
    bench = Bench(
        folder=Path(),
        provider=arguments.provider,
        batch=arguments.batch,
        seconds=arguments.seconds,
        images=0,
        steps=0,
        blocks=0,
        threads=arguments.threads,
        json=arguments.json,
    )
    return run(bench, ["passes"])


def _arguments() -> argparse.Namespace:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    commands = parser.add_subparsers(dest="command", required=True)
    exporting = commands.add_parser("export")
    exporting.add_argument("folder", type=Path)
    exporting.add_argument("--size", type=int, default=224)
    running = commands.add_parser("run")
    running.add_argument("folder", type=Path, nargs="?", help="what `export` wrote; none: exported now")
    running.add_argument("--provider", default="cuda")
    running.add_argument("--parts", default=",".join(p for p in PARTS if p != "tensorrt"))
    running.add_argument("--small", action="store_true")
    running.add_argument("--batch", type=int)
    running.add_argument("--threads", type=int, default=0, help="of onnxruntime on a CPU; 0: all cores")
    running.add_argument("--seconds", type=float, help="of each timing, at most")
    running.add_argument("--steps", type=int, help="of the published procedure a block")
    running.add_argument("--json", type=Path)
    passing = commands.add_parser("passes")
    passing.add_argument(
        "--network",
        nargs=4,
        action="append",
        required=True,
        metavar=("NET.onnx", "TRAIN", "TEST", "PREPROCESS"),
    )
    passing.add_argument("--provider", default="cuda")
    passing.add_argument("--minutes", type=float, default=9.0, help="for all networks together")
    passing.add_argument("--batch", type=int, default=64)
    passing.add_argument("--threads", type=int, default=0, help="of onnxruntime on a CPU; 0: all cores")
    passing.add_argument("--seconds", type=float, default=10.0, help="of each timing, at most")
    passing.add_argument("--blocks", type=int, default=2, help="to drop")
    passing.add_argument("--sparsity", type=float, default=0.5)
    passing.add_argument("--effort", default="balanced")
    passing.add_argument("--judged", type=int, default=5000, help="images of TEST, at most")
    passing.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
