"""The program `lungscope`. A command's module is imported when that command is called, not before."""

from __future__ import annotations

import gc
import importlib
import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from io import TextIOWrapper
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from lungscope import __version__
from lungscope.errors import EXIT_STATUS, LungscopeError, needs, printable, status_of


@dataclass(frozen=True)
class Entry:
    """module: has a `typer.Typer` named `app`. extra: what must be installed for it, None for the base install."""

    module: str
    help: str
    extra: str | None = None


COMMANDS: dict[str, Entry] = {
    "analyze": Entry("lungscope.cli.analyze", "Analyse chest films: lungs, class, evidence, severity."),
    "data": Entry("lungscope.cli.data", "Import, audit and split a data set."),
    "train": Entry("lungscope.cli.train", "Train a segmenter or a classifier.", extra="train"),
    "evaluate": Entry("lungscope.cli.evaluate", "Measure a bundle against drawn lungs and known classes."),
    "benchmark": Entry("lungscope.cli.benchmark", "Compare networks under one budget, and render the paper's tables."),
    "export": Entry("lungscope.cli.export", "Turn checkpoints into a weights bundle.", extra="train"),
    "quantize": Entry("lungscope.cli.quantize", "Quantise a bundle to int8, and measure precisions.", extra="train"),
    "serve": Entry("lungscope.cli.serve", "Serve the web page and the API.", extra="web"),
    "models": Entry("lungscope.cli.models", "List, show and verify weights bundles."),
    "pacs": Entry("lungscope.cli.pacs", "Answer a PACS: films in by C-STORE, results out.", extra="pacs"),
    "doctor": Entry("lungscope.cli.doctor", "Say what is installed here, and whether it works."),
}


def load(name: str) -> Any:
    """The command `name` in full. Raises MissingExtraError where a part that it needs is not installed."""
    entry = COMMANDS[name]
    gc.disable()  # an import makes much and no garbage
    try:
        with nullcontext() if entry.extra is None else needs(f"`lungscope {name}`", entry.extra):
            module = importlib.import_module(entry.module)
    finally:
        gc.enable()
    command = typer.main.get_command(module.app)
    command.name = name
    return command


class LazyGroup(TyperGroup):
    """Knows every command's name and help text from `COMMANDS`, and loads the one that is called."""

    def __init__(self, **settings: Any) -> None:
        stubs: dict[str, Any] = {name: TyperCommand(name, help=entry.help) for name, entry in COMMANDS.items()}
        super().__init__(**{**settings, "commands": stubs})

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command if name is None else load(name), rest


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, pretty_exceptions_enable=False)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"lungscope {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Chest X-rays in; lungs, a calibrated class, its evidence and a severity per lung zone out.

    Research software, not a medical device. Not for diagnosis.
    """


def main() -> None:
    """Entry point. Exit status 0: all done; 1: some inputs failed; 2: usage; 3: nothing could run; 130: interrupted by
    Ctrl-C, 143 by SIGTERM, as shells have it (128 + the signal's number)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal can not show ends nothing
    try:
        app()
    except LungscopeError as error:
        _complain(error.code, str(error))
        sys.exit(status_of(error, EXIT_STATUS))
    except ImportError as error:
        _complain("broken-install", f"{error}. Reinstall: pip install --force-reinstall lungscope")
        sys.exit(EXIT_STATUS[LungscopeError])
    except OSError as error:
        _complain("os", str(error))
        sys.exit(EXIT_STATUS[LungscopeError])
    finally:
        gc.freeze()  # what is left goes with the process, and need not be searched for garbage first


def _complain(code: str, message: str) -> None:
    print(f"lungscope: {printable(message)}", file=sys.stderr)
    if "--json" in sys.argv:
        print(json.dumps({"error": {"code": code, "message": message}}))


if __name__ == "__main__":
    main()
