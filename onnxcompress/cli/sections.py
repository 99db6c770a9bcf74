"""Sections of a command's help: options under headings, those that few users set last."""

from __future__ import annotations

import click

ADVANCED = "Advanced"
"""Title of the options that few users have a reason to set."""


class SectionedOption(click.Option):
    """An option that the help lists under a heading of its own."""

    section: str = ""


class SectionedCommand(click.Command):
    """A command whose help has one list of options for each section, the advanced ones last."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the lists of options (click calls this).

        Args:
            ctx: click's context.
            formatter: Receives the text.
        """
        for title, records in sections(self, ctx).items():
            with formatter.section(title):
                formatter.write_dl(records)


def sections(command: click.Command, context: click.Context) -> dict[str, list[tuple[str, str]]]:
    """Sort the options of a command into the sections of its help.

    Args:
        command: Any command.
        context: click's context of it.

    Returns:
        Title of the section -> names and help of each option; the advanced ones come last.
    """
    lists: dict[str, list[tuple[str, str]]] = {"Options": []}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context) if isinstance(parameter, click.Option) else None
        if record is not None:
            lists.setdefault(getattr(parameter, "section", "") or "Options", []).append(record)
    return dict(sorted(lists.items(), key=lambda section: section[0] == ADVANCED))
