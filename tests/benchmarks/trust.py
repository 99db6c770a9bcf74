"""Others' models through every pass of the catalogue, and what came of it.

`python -m tests.benchmarks.trust [FILES]` prints one line for each suite. FILES: .onnx files and wheels
with such inside, as `pip download --no-deps` gets them: cases of one more suite, `files`.

    cases      models
    passed     results that are written, valid and run; with the outputs that they had, where the pass
               preserves the function; `changed`: those whose graph differs from what was read
    refused    one line that says why; --reasons counts them
    failed     all else, each is shown
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import click

from tests.helpers import suites
from tests.helpers.embedding import embedded_cases
from tests.helpers.suites import Case
from tests.robustness.through_passes import MAKERS, Subject, outcome

SUITES: dict[str, Callable[[], Iterable[Case]]] = {
    **{name: (lambda name=name: suites.backend_cases(name)) for name in suites.BACKEND},  # type: ignore[misc]
    "pytorch-converted, opset 21": lambda: suites.converted_cases("pytorch-converted"),
    "pytorch-operator, opset 21": lambda: suites.converted_cases("pytorch-operator"),
    "node, between layers": embedded_cases,
    "light": lambda: suites.light_cases(filled=False),
    "light, filled": lambda: suites.light_cases(filled=True),
}
WORDS = re.compile(r"^\S+\.onnx: |'[^']*'|\d+(x[\d?]+)*|\([^)]*\)|\[[^]]*\]")
"""Of a message, what is of the case alone."""


@click.command()
@click.argument("files", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("--suite", "wanted", multiple=True, type=click.Choice([*SUITES, "files"]), help="Only these.")
@click.option("--pass", "passes", multiple=True, type=click.Choice(list(MAKERS)), help="Only these.")
@click.option("--case", "part", default="", help="Only cases whose name holds this.")
@click.option("--by-pass", is_flag=True, help="A line for each pass.")
@click.option("--reasons", is_flag=True, help="Count the reasons of refusals.")
def main(
    files: tuple[Path, ...],
    wanted: tuple[str, ...],
    passes: tuple[str, ...],
    part: str,
    by_pass: bool,
    reasons: bool,
) -> None:
    """Print the table."""
    makers = dict(SUITES)
    if files:
        makers["files"] = lambda: suites.file_cases(files)
    print("| suite | pass | cases | passed | changed | refused | failed |\n|---|---|---|---|---|---|---|")
    why: Counter[str] = Counter()
    for suite in wanted or makers:
        counts: Counter[tuple[str, str]] = Counter()
        cases = [case for case in makers[suite]() if part in case.name]
        for case in cases:
            subject = Subject(case)
            for name in passes or MAKERS:
                found = outcome(subject, name)
                counts[name, found.kind] += 1
                counts[name, "changed"] += found.changed
                if found.kind == "refused":
                    why[WORDS.sub("…", found.why)] += 1
                elif found.kind == "failed":
                    print(f"failed: {suite}, {case.name}, {name}: {found.why}", flush=True)
        names = tuple(passes or MAKERS)
        for group in [(name,) for name in names] if by_pass else [names]:
            sums = [sum(counts[n, k] for n in group) for k in ("passed", "changed", "refused", "failed")]
            label = group[0] if len(group) == 1 else f"{len(group)}"
            print(f"| {suite} | {label} | {len(cases)} | {' | '.join(map(str, sums))} |", flush=True)
    if reasons:
        for text, count in why.most_common():
            print(f"{count:6d}  {text}")


if __name__ == "__main__":
    main()
