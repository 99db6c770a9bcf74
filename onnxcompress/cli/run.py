"""`onnxcompress run`: apply a recipe, a file with a chain of passes.

--json prints one object:

    recipe, input, output
    steps       [{pass, options, changes, refusals, measured, seconds, cached, guard}], as for the pass's
                own command; `seconds` are of the run that computed it, an earlier one where `cached`
    bytes       {before, after}
    guard       comparison of OUT with IN, as in a step; null: not compared, or a step has the same
    latency     of IN and OUT, as `measured.latency` of a step; null: not measured, or a step has the same
    gates       [{gate, limit, measured, passed, text, preprocess}], one for each limit that was given
    provenance  all passes so far, oldest first

and with --dry-run {dry_run, steps: [{pass, options, cached, refusals, work}], gates: {name: limit}}.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from onnxcompress.account import as_json
from onnxcompress.cli.cache import cache_options, chosen_cache
from onnxcompress.cli.gate_options import gate_options, gates_of, guard_of, guard_options
from onnxcompress.cli.options import FILE, print_json
from onnxcompress.cli.pass_commands import running_options
from onnxcompress.cli.sections import SectionedCommand
from onnxcompress.cli.timing_options import timing_of, timing_options
from onnxcompress.errors import OptionError

if TYPE_CHECKING:
    from onnxcompress.cli.job import Outcome


def _print_schema(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if not value:
        return
    from onnxcompress.pipeline.recipe_schema import recipe_schema

    print_json(recipe_schema())
    context.exit()


def _variables(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, str]:
    found = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise OptionError(f"-D {text!r}: expected NAME=VALUE, such as images=photos/")
        found[name] = value
    return found


def _run(
    recipe: str,
    source: str,
    target: str,
    variables: dict[str, str],
    cache: str | None,
    no_cache: bool,
    **options: Any,
) -> None:
    """Apply the passes of a recipe, in order.

    \b
    A recipe is a YAML file:
      variables: {images: photos}   # defaults; -D images=... replaces one
      passes:
        - fold-bn
        - drop-blocks:              # options as of `onnxcompress drop-blocks`, with _ for -
            images: ${images}
            latency_reduction: 20
      timing: {provider: cuda}      # or --provider cuda: where latency is measured
      guard: {min_snr: 6}           # or --min-snr 6; the command line wins
      gates: {max_size: 5}          # or --max-size 5

    The whole recipe is checked before the first pass runs. The result of each pass is kept, so that an
    interrupted or edited recipe repeats only what changed. IN and OUT may be -, the standard streams. A
    result that misses a gate is written nevertheless.

    \b
    Example:
      onnxcompress run models/fast-resnet20.yaml models/resnet20-fashion.onnx fast.onnx -D blocks=3
    """
    from onnxcompress.cli.execute import execute
    from onnxcompress.cli.job import Job
    from onnxcompress.pipeline import Pipeline
    from onnxcompress.pipeline.recipe import read_recipe

    kept = chosen_cache(cache, no_cache)
    read = read_recipe(recipe, variables)
    gates, guard = gates_of(options, read.gates), guard_of(options, read.guard)
    timing = timing_of(options, read.timing)

    def account(found: Outcome) -> dict[str, Any]:
        return _account(recipe, found)

    chain = Pipeline(read.passes)
    job = Job(
        source,
        target,
        chain,
        gates,
        account,
        guard=guard,
        cache=kept,
        recipe=recipe,
        timing=timing,
        **options,
    )
    execute(job)


def _account(recipe: str, found: Outcome) -> dict[str, Any]:
    from onnxcompress.pipeline.chain import guard_account

    before, after = found.bytes
    return {
        "recipe": recipe,
        "input": found.files.source_name,
        "output": found.files.target_name,
        "steps": [step.as_dict() for step in found.run.steps],
        "bytes": {"before": before, "after": after},
        "guard": guard_account(found.run.guard, found.run.verdict),
        "latency": None if found.run.latency is None else as_json(found.run.latency),
        "gates": [dataclasses.asdict(v) for v in found.verdicts],
        "provenance": found.run.model.provenance(),
    }


run = SectionedCommand(
    "run",
    callback=_run,
    help=_run.__doc__,
    params=[
        click.Argument(["recipe"], metavar="RECIPE.yaml", type=FILE),
        click.Argument(["source"], metavar="IN", type=FILE),
        click.Argument(["target"], metavar="OUT", type=FILE),
        click.Option(
            ["-D", "variables"],
            multiple=True,
            metavar="NAME=VALUE",
            callback=_variables,
            help="Set a variable of the recipe.",
        ),
        *cache_options(),
        click.Option(
            ["--schema"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_print_schema,
            help="Print the JSON Schema of recipes, for editors, and stop.",
        ),
        *running_options(),
        *timing_options(),
        *guard_options(),
        *gate_options(),
    ],
)
