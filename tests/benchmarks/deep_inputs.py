"""The deep layers pruned on inputs of several kinds: how far the network's output is off on real images.

    python tests/benchmarks/deep_inputs.py MODEL TEST --preprocess TEXT --split N [--sparsity 0.55]

All in front of the split tensor (`reconstruction.feature_inputs`) stays as it is; behind it, --sparsity of
the weights become 0. Rows: the inputs that the layers are pruned on: procedural images with aligned
statistics, inputs synthesized at the split tensor, and real images, the latter two tuned as well. Signal to
noise and KL divergence of the output, on N images of TEST that are not among those pruned on.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


@click.command()
@click.argument("model")
@click.argument("test")
@click.option("--preprocess", required=True)
@click.option("--split", type=int, required=True, help="Images of TEST to measure on.")
@click.option("--sparsity", default=0.55)
@click.option("--synthetic", default=128)
@click.option("--seed", default=0)
def main(
    model: str, test: str, preprocess: str, split: int, sparsity: float, synthetic: int, seed: int
) -> None:
    """One row for each kind of inputs."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from onnxcompress.model import load
    from onnxcompress.optimize.calibration import InputRequest, gather_inputs
    from onnxcompress.optimize.executor import Executor
    from onnxcompress.optimize.reconstruction.context import CalibrationContext
    from onnxcompress.optimize.reconstruction.feature_inputs import (
        aligned_features,
        make_feature_inputs,
        split_tensor,
    )
    from onnxcompress.optimize.reconstruction.global_tuning import finetune_sparse, subnetwork_from
    from onnxcompress.optimize.reconstruction.prune import (
        LEVELS,
        Settings,
        Sparsifier,
        Trials,
        output_costs,
    )
    from onnxcompress.optimize.synthesis.statistics_alignment import StatisticsAlignment
    from onnxcompress.passes.fold_bn.fold_and_canonicalize import fold_and_canonicalize
    from onnxcompress.passes.prune import Prune
    from onnxcompress.passes.prune.targets import choose_target
    from onnxcompress.sensitivity.sparsity_allocation import by_cost
    from tests.benchmarks.prune import divergence, labelled_images

    network = load(model)
    fold_and_canonicalize(network)
    request = InputRequest(preprocess=preprocess, inputs="layerwise", synthetic=synthetic, seed=seed)
    context = CalibrationContext.of(network, gather_inputs(network, request), stretched=False)
    start = split_tensor(network, context.plan)
    if start is None:
        raise click.ClickException(f"{model} has no split tensor")
    target = choose_target(Prune(), network)
    executor = Executor.from_model(network)
    source, output = network.graph.inputs[0].name, network.graph.outputs[0].name

    def ran(x: Tensor, where: str, wanted: str, parameters: dict[str, Tensor] | None = None) -> Tensor:
        with torch.no_grad():
            return torch.cat(
                [executor.run({where: b}, [wanted], parameters)[wanted] for b in torch.split(x, 32)]
            )

    def real(part: str) -> Tensor:
        images = labelled_images(test, preprocess, split, part, None, seed)
        return ran(torch.from_numpy(images.array()), source, start)

    held = real("tune")
    exact = ran(held, start, output)

    def row(name: str, x: Tensor, began: float, tuned: bool = True) -> None:
        settings = Settings(batch=context.batch, seed=seed)
        trials = Trials(
            network,
            context.plan,
            settings,
            StatisticsAlignment(),
            start=start,
            names=frozenset(target.layers),
        )
        trials.pass_through(x, "")
        costs = output_costs(trials, x)
        sizes = {n: target.sizes[n] for n in costs.levels}
        shares = by_cost(costs.levels, LEVELS, sizes, sum(sizes.values()), sparsity)
        settings = Settings(batch=context.batch, seed=seed, sparsity=shares, rows=costs.rows)
        worker = Sparsifier(network, context.plan, settings, StatisticsAlignment(), start=start)
        worker.pass_through(x, "")
        found = {name: worker.results}
        if tuned:
            where = subnetwork_from(network, start)
            found[f"{name}, tuned"] = finetune_sparse(
                network, context.plan, where, x, x, worker.results, seed=seed
            )
        for title, learned in found.items():
            got = ran(held, start, output, learned)
            ratio = float(exact.var() / F.mse_loss(got, exact))
            snr, kl = 10 * torch.tensor(ratio).log10(), divergence(exact.numpy(), got.numpy())
            seconds = time.perf_counter() - began
            print(f"{title:36} {len(x):5}  {snr:6.2f} dB  KL {kl:.4f}  {seconds:.0f} s", flush=True)

    print(f"behind {start!r}; on {len(held)} images", flush=True)
    began = time.perf_counter()
    row(
        "procedural, aligned statistics",
        aligned_features(executor, context, start, context.images),
        began,
        tuned=False,
    )
    began = time.perf_counter()
    row("made at the split tensor", make_feature_inputs(context, start, seed=seed), began)
    began = time.perf_counter()
    row("real images", real("test"), began)


if __name__ == "__main__":
    main()
