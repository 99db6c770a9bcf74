"""Options of commands that carry out many runs: where these take place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from onnxcompress.errors import OptionError

if TYPE_CHECKING:
    from onnxcompress.search.workers import Workers

WHERE = ("jobs", "ray", "task_cpus", "task_gpus")
"""Names of the arguments that `worker_options` creates."""


def worker_options() -> list[click.Option]:
    """Create the options --jobs, --ray, --task-cpus and --task-gpus.

    Returns:
        The options.
    """
    return [
        click.Option(
            ["--jobs"],
            type=click.IntRange(1),
            help="Runs at a time, each in a process of its own; latency is measured with none at work.  "
            "[default: 1, or as many as the cluster has room for]",
        ),
        click.Option(
            ["--ray"],
            metavar="auto|ADDRESS",
            help="Run on a Ray cluster; latency is measured on its reserved workers, which were started "
            "with --num-cpus 0 --resources '{\"onnxcompress_latency\": 1}'.",
        ),
        click.Option(
            ["--task-cpus"],
            type=click.FloatRange(0, min_open=True),
            help="With --ray: CPUs of a run.  [default: 1]",
        ),
        click.Option(
            ["--task-gpus"], type=click.FloatRange(0), help="With --ray: GPUs of a run.  [default: 0]"
        ),
    ]


def tracking_option() -> click.Option:
    """Create the option --mlflow.

    Returns:
        The option.
    """
    return click.Option(
        ["--mlflow"],
        metavar="EXPERIMENT",
        help="Log each result to this experiment of MLflow, where MLFLOW_TRACKING_URI says.",
    )


@contextmanager
def workers(
    jobs: int | None, ray: str | None, task_cpus: float | None, task_gpus: float | None
) -> Iterator[Workers]:
    """Open the workers that the options ask for.

    Args:
        jobs: Value of --jobs.
        ray: Value of --ray; None: processes of this machine.
        task_cpus: Value of --task-cpus.
        task_gpus: Value of --task-gpus.

    Yields:
        The workers.

    Raises:
        OptionError: Options contradict each other.
        RuntimeUnavailable: Ray is not installed, or there is no cluster, or it has no worker for latency.
    """
    if ray is None:
        if task_cpus is not None or task_gpus is not None:
            raise OptionError("--task-cpus and --task-gpus go with --ray")
        from onnxcompress.search.workers import Processes

        chosen: Workers = Processes(jobs or 1)
    else:
        from onnxcompress.search.ray_workers import RayWorkers

        chosen = RayWorkers(ray, jobs=jobs, cpus=task_cpus or 1.0, gpus=task_gpus or 0.0)
    try:
        yield chosen
    except KeyboardInterrupt:
        click.echo("what is done is kept: the same command goes on from there", err=True)
        raise
    finally:
        chosen.close()
