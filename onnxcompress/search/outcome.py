"""The files of a search's outcome: the table, the page, and a card for each model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onnxcompress.evaluation.gates import Gates
from onnxcompress.report.html import write_page
from onnxcompress.search.card import model_card
from onnxcompress.search.page import front_page
from onnxcompress.search.question import Search
from onnxcompress.search.results import FIGURES, write_bytes, write_table
from onnxcompress.search.search import Front
from onnxcompress.search.trial import verdicts


def front_rows(front: Front, gates: Gates) -> list[dict[str, Any]]:
    """Make a row for each model of the front.

    Args:
        front: The front.
        gates: The limits.

    Returns:
        Figures by name, with whether all limits are kept and whether it is the one to take.
    """
    rows = []
    for at, found in enumerate(front.found):
        kept = all(verdict.passed for verdict in verdicts(found.row, gates))
        recipe = str(Path(found.row["output"]).with_suffix(".yaml"))
        chosen = {"recipe": recipe, "picked": at == front.picked, "limits_kept": kept}
        rows.append({**found.trial.labels, **chosen, **found.row})
    return rows


def write_outcome(front: Front, rows: list[dict[str, Any]], asked: Search) -> None:
    """Write the table, the page, and the model cards.

    Args:
        front: The front.
        rows: Its rows, of `front_rows`.
        asked: The search.
    """
    columns = ["candidate", "recipe", "picked", "limits_kept", "loss", "size", *FIGURES[3:]]
    write_table(asked.folder / "front.csv", columns, rows)
    write_page(asked.folder / "search.html", front_page(front, asked.model, asked.gates))
    for found in front.found:
        file = Path(found.row["output"])
        card = model_card(found.trial, found.row, f"`{file.stem}.yaml`")
        write_bytes(file.with_name(f"{file.stem}.md"), card.encode())
