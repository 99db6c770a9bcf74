"""The command line, `onnxcompress COMMAND`. It starts fast: a command's libraries load when it runs."""

from __future__ import annotations

import errno
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import click

from onnxcompress.cli import interrupts
from onnxcompress.errors import CompressError, CompressWarning, printable
from onnxcompress.passes import CATALOGUE
from onnxcompress.passes.plugins import plugins
from onnxcompress.runtime.cores import prepare_threads
from onnxcompress.version import __version__

COMMANDS: dict[str, tuple[str, str, str]] = {
    "run": ("Chain", "run", "Apply the passes of a recipe; resumable."),
    "search": ("Chain", "search", "Find the best models under limits on speed, loss and size."),
    "sweep": ("Chain", "sweep", "Run recipes on models, with all values of their variables."),
    "cache": ("Chain", "cache", "Show how much kept results take, or delete them."),
    "inspect": ("Look", "inspect", "Show a model, its figures and the blocks that can be dropped."),
    "benchmark": ("Look", "benchmark", "Measure latency in onnxruntime, models interleaved."),
    "evaluate": ("Look", "evaluate", "Measure top-1 and top-5 accuracy on labelled images."),
    "sensitivity": ("Look", "sensitivity", "Measure what each layer costs at given bits or sparsity."),
    "compare": ("Look", "compare", "Compare two models: size, latency, outputs, agreement."),
    "guide": ("Read", "guide", "Show a guide: faster, latency, detector, troubleshooting, …"),
    "synthesize": ("Make", "synthesize", "Make images from the network's statistics, or from a seed."),
}
"""Name -> (group in the help, module in onnxcompress.cli with a function of that name, summary)."""

GROUPS = {"Chain": "Chain passes", "Look": "Look at models", "Make": "Make inputs", "Read": "Read more"}
"""Group -> its title in the help."""

TRACEBACK = "ONNXCOMPRESS_TRACEBACK"
"""Environment variable that makes an unexpected error show its traceback."""
REPORT = f"set {TRACEBACK}=1 to see where, and report it"


class LazyGroup(click.Group):
    """A group that imports a command only when it is called; the help text needs no import."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the names of all commands (click calls this).

        Args:
            ctx: click's context.

        Returns:
            The passes, then the other commands.
        """
        return [name for name, _ in _passes()] + list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import a command (click calls this).

        Args:
            ctx: click's context.
            name: Name of the command.

        Returns:
            The command; None where there is none of this name.
        """
        if name in COMMANDS:
            found = getattr(import_module(f"onnxcompress.cli.{COMMANDS[name][1]}"), COMMANDS[name][1])
            assert isinstance(found, click.Command)
            return found
        if any(entry.name == name for entry in CATALOGUE) or name in plugins():
            from onnxcompress.cli.pass_commands import command

            return command(name)
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command of a command line (click calls this).

        Args:
            ctx: click's context.
            args: The command line after the group's own options.

        Returns:
            Name, command and remaining arguments.

        Raises:
            UsageError: There is no such command; the message suggests the nearest name.
        """
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from difflib import get_close_matches

            near = get_close_matches(args[0], self.list_commands(ctx), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"No such command {args[0]!r}.{hint}", ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the lists of commands (click calls this).

        Args:
            ctx: click's context.
            formatter: Receives the text.
        """
        with formatter.section("Change a model (IN OUT)"):
            formatter.write_dl(_passes())
        for word, title in GROUPS.items():
            with formatter.section(title):
                rows = [(n, text) for n, (group, _, text) in COMMANDS.items() if group == word]
                formatter.write_dl(rows)


def _passes() -> list[tuple[str, str]]:
    """List names and summaries of the catalogue's passes and of those of other packages."""
    return [(e.name, e.summary) for e in CATALOGUE] + list(plugins().items())


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="onnxcompress")
def cli() -> None:
    """Compress an exported CNN on the ONNX file itself: no training code, no dataset.

    \b
    Example: make a network take 20 % less time, with a few unlabelled images
      onnxcompress inspect net.onnx
      onnxcompress drop-blocks net.onnx fast.onnx --images photos/ \\
          --preprocess imagenet --latency-reduction 20
      onnxcompress compare net.onnx fast.onnx
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The command line without the program's name; None: that of the process.

    Returns:
        The exit code: 0, 1 error, 2 usage, 3 target missed, 130 or 143 interrupted.
    """
    prepare_threads()
    with interrupts.watching() as signals:
        return _run(argv, signals)


def _run(argv: Sequence[str] | None, signals: list[int]) -> int:
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _notes()
            cli.main(args=argv, prog_name="onnxcompress", standalone_mode=False, obj=argv and list(argv))
            if sys.stdout is not None:
                sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        click.echo(f"error: {error.format_message()}{_hint(error)}", err=True)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        # If an interrupt passed through exec (which dataclasses use), CPython ends `python -m` by the
        # signal, whatever the exit code; another exec resets this.
        exec("")
        return 128 + (signals or [signal.SIGINT])[-1]
    except CompressError as error:
        click.echo(f"error: {printable(str(error))}", err=True)
        return error.exit_code
    except ImportError as error:
        click.echo(f"error: {error}; install the missing package, or reinstall onnxcompress", err=True)
        return 1
    except MemoryError:
        click.echo("error: out of memory; try a smaller --batch or fewer images", err=True)
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EPIPE):
            return _defect(error)
        from onnxcompress.cli.files import discard_output

        discard_output()
        if error.errno != errno.EPIPE:  # else its reader knows
            click.echo(f"error: the output cannot be written ({error.strerror})", err=True)
        return 1
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which only its users import
            text = "error: out of the GPU's memory; try a smaller --batch, fewer images, or --device cpu"
            click.echo(text, err=True)
            return 1
        return _defect(error)
    return 0


def _defect(error: Exception) -> int:
    """Tell of an exception that nobody expected."""
    if os.environ.get(TRACEBACK):
        raise error
    text = printable(f"{type(error).__name__}: {error}")
    click.echo(f"error: a defect of onnxcompress, or a broken file ({text}); {REPORT}", err=True)
    return 1


def _hint(error: click.ClickException) -> str:
    """Point to the help after a usage error, unless the message names a remedy."""
    context = getattr(error, "ctx", None)
    if context is None or "id you mean" in error.format_message():
        return ""
    return f" See '{context.command_path} --help'."


def _notes() -> Callable[..., None]:
    """Return what prints the package's own warnings as notes, each once, and others as Python does."""
    shown = set()

    def note(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if not issubclass(category, CompressWarning):
            click.echo(warnings.formatwarning(message, category, *place[:2]), err=True, nl=False)
        elif str(message) not in shown:
            shown.add(str(message))
            click.echo(f"note: {message}", err=True)

    return note


if __name__ == "__main__":
    sys.exit(main())
