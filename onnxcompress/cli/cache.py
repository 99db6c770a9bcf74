"""The cache of results: options of commands that use it, and `onnxcompress cache` to look at it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from onnxcompress.cli.options import FILE, as_json, print_json
from onnxcompress.errors import OptionError
from onnxcompress.formatting import size

if TYPE_CHECKING:
    from onnxcompress.pipeline.cache import Cache

VARIABLE = "ONNXCOMPRESS_CACHE"
"""Environment variable with the folder that keeps results."""
NOWHERE = "none"
"""Its value that keeps none."""


def cache_options() -> list[click.Option]:
    """Create the options --cache and --no-cache.

    Returns:
        The options.
    """
    return [
        _folder_option(),
        click.Option(["--no-cache"], is_flag=True, help="Neither keep results nor use kept ones."),
    ]


def chosen_cache(folder: str | None, no_cache: bool) -> Cache | None:
    """Open the cache that the options ask for.

    Args:
        folder: Value of --cache; None: the user's cache.
        no_cache: Whether --no-cache was given.

    Returns:
        The cache; None where nothing is to be kept, or the user's cache cannot be written.

    Raises:
        OptionError: The options contradict each other, or the folder cannot be used.
    """
    from onnxcompress.pipeline.cache import Cache

    if no_cache:
        if folder is not None and folder != NOWHERE:
            raise OptionError("--cache and --no-cache: give one of them")
        return None
    if folder == NOWHERE:
        return None
    if folder is not None:
        return Cache(folder)
    try:
        return Cache(_users_folder())
    except (OptionError, RuntimeError) as error:  # RuntimeError: no home folder
        click.echo(f"note: results of passes are not kept ({error})", err=True)
        return None


@click.command("cache")
@click.option("--clear", is_flag=True, help="Delete all kept results.")
@as_json()
def cache(cache: str | None, clear: bool, as_json: bool) -> None:
    """Show how much kept results take, or delete them.

    Commands that learn keep their results, and values on the way there, so that a repeated or killed run
    begins where it was. Beyond the limit those go that were not used for longest.

    \b
    Example:
      onnxcompress cache
      onnxcompress cache --clear
    """
    kept = chosen_cache(cache, no_cache=False)
    if kept is None:
        raise OptionError(f"no results are kept: give --cache DIR, or set {VARIABLE} to a folder")
    if clear:
        kept.clear()
    entries, total = kept.usage()
    if as_json:
        found = {"folder": str(kept.folder), "entries": entries, "bytes": total, "limit": kept.limit}
        print_json(found)
        return
    text = f"{kept.folder}: {entries} results, {size(total)} of at most {size(kept.limit)}"
    click.echo(text)


def _users_folder() -> str:
    import platformdirs

    return platformdirs.user_cache_dir("onnxcompress", appauthor=False)


def _folder_option() -> click.Option:
    text = f"Folder that keeps results, up to 10 GB.  [default: ${VARIABLE}, else your cache]"
    return click.Option(["--cache"], metavar="DIR", envvar=VARIABLE, type=FILE, help=text)


cache.params.insert(0, _folder_option())
