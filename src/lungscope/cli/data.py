"""`lungscope data`: import, audit and split data sets, and draw masks where there are none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from lungscope.cli.options import local
from lungscope.data.layouts import LAYOUTS
from lungscope.errors import UsageError

app = typer.Typer(no_args_is_help=True, help="Import, audit and split data sets.")

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Stores = Annotated[list[Path], typer.Argument(help="Stores, made by `lungscope data import`.", metavar="STORE...")]
_PHASES = {
    "unpack": "Unpacking", "check": "Comparing", "read": "Reading", "measure": "Measuring", "verify": "Verifying",
    "segment": "Segmenting",
}  # fmt: skip
#: Status when some films could not be taken and the others were.
_SOME_FAILED = 1


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="Folder, .zip or .csv table with the films.", metavar="SRC")],
    dest: Annotated[
        Path, typer.Argument(help="The store to make or to bring up to date.", metavar="DEST", parser=local)
    ],
    name: Annotated[str | None, typer.Option(help="What splits and reports call it; default: DEST's name.")] = None,
    size: Annotated[int, typer.Option(help="Side of the cached films in pixels.")] = 256,
    layout: Annotated[str, typer.Option(help=f"How SRC is laid out: {', '.join(LAYOUTS)}.")] = "auto",
    with_lung_opacity: Annotated[
        bool, typer.Option("--with-lung-opacity", help="Take the Lung_Opacity folder as a fourth class.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace a store of another source or size at DEST.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Verify every film of SRC and cache it in the store DEST.

    Takes the COVID-19 Radiography Database as Kaggle ships it, a set in the same layout, images/ with masks/, or a
    table with the columns path, label, mask, patient, source. May be interrupted and repeated: only what is new is
    read. What cannot be read is listed in DEST/rejected.csv, and the exit status is 1.
    """
    from lungscope.data.importing import import_films

    with _progress() as progress:
        result = import_films(
            source,
            dest,
            name=name,
            size=size,
            layout=layout,
            with_lung_opacity=with_lung_opacity,
            replace=replace,
            progress=progress,
        )
    if as_json:
        typer.echo(json.dumps(result.to_json(), indent=2))
    else:
        table = Table("class", "films")
        for label, films in result.by_label.items():
            table.add_row(label or "unlabelled", f"{films:,}")
        _print_table(table)
        done = "up to date, nothing to do" if result.up_to_date else f"{result.read:,} read, {result.reused:,} reused"
        typer.echo(f"{result.store}: {result.films:,} films, {result.with_mask:,} with a lung mask ({done})")
        for remark in result.remarks:
            typer.echo(remark)
        if result.rejected:
            masks = len(result.rejected) - result.unreadable
            typer.echo(f"{result.unreadable:,} films not taken, {masks:,} remarks on masks: {dest / 'rejected.csv'}")
    if result.unreadable:
        raise typer.Exit(_SOME_FAILED)


@app.command()
def audit(
    stores: Stores,
    out: Annotated[Path, typer.Option(help="Folder for audit.html and audit.json.", parser=local)],
    as_json: AsJson = False,
) -> None:
    """Count, compare and picture the films of stores: duplicates, unreadable files, odd masks, confounders by class."""
    from lungscope.data.audit import audit as look_through
    from lungscope.data.audit_page import write_audit
    from lungscope.data.store import Store

    opened = [Store.open(path) for path in stores]
    with _progress() as progress:
        result = look_through(opened, progress=progress)
    paths = write_audit(result, opened, out)
    if as_json:
        typer.echo(json.dumps({**result.to_json(), "files": [str(path) for path in paths]}, indent=1))
    else:
        for finding in result.findings or ("Nothing to remark.",):
            typer.echo(finding)
        typer.echo(f"Wrote {' and '.join(map(str, paths))}")


@app.command()
def split(
    stores: Stores,
    out: Annotated[
        Path, typer.Option(help="The split to write, a .csv; a .json with its facts comes beside it.", parser=local)
    ],
    seed: Annotated[int, typer.Option(help="The same seed gives the same split.")] = 2024,
    fractions: Annotated[str, typer.Option(help="Shares of train, val and test.")] = "0.7,0.1,0.2",
    same_patients: Annotated[
        bool,
        typer.Option(
            "--same-patients", help="A patient's identifier is that patient's in every store, not in its own alone."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Split stores into train, val and test, by duplicate group and patient, evenly over classes."""
    from lungscope.data.split import PARTS, make_split
    from lungscope.data.store import Store

    shares = _fractions(fractions)
    if out.suffix.lower() != ".csv":
        raise UsageError(f"--out {out}: a split is a .csv file. Name it, for example, {out.with_suffix('.csv')}")
    opened = [Store.open(path) for path in stores]
    result, facts = make_split(opened, seed=seed, fractions=shares, same_patients=same_patients)
    result.write(out, facts)
    if facts["patients_in_several_stores"] and not same_patients:
        typer.echo(
            f"{facts['patients_in_several_stores']:,} patient identifiers stand in more than one store and were taken "
            "for different patients. Where they are the same: --same-patients",
            err=True,
        )
    written = json.loads(out.with_suffix(".json").read_text())
    if as_json:
        typer.echo(json.dumps({"split": str(out), **written}, indent=2))
        return
    table = Table("store / class", *PARTS)
    for stratum in dict.fromkeys((row.store, row.label) for row in result.rows):
        counts = [sum((row.store, row.label, row.part) == (*stratum, part) for row in result.rows) for part in PARTS]
        table.add_row(f"{stratum[0]} / {stratum[1] or 'unlabelled'}", *(f"{n:,}" for n in counts))
    _print_table(table)
    typer.echo(f"Wrote {out}: {facts['films']:,} films in {facts['groups']:,} groups, seed {seed}")


@app.command("pseudo-label")
def pseudo_label(
    store: Annotated[Path, typer.Argument(help="The store whose films get masks.", metavar="STORE")],
    dest: Annotated[
        Path, typer.Argument(help="The store to make of the films that were kept.", metavar="DEST", parser=local)
    ],
    split: Annotated[Path, typer.Option(help="STORE's split; films of its train part alone are looked at.")],
    model: Annotated[
        list[str] | None,
        typer.Option(help="A bundle whose segmenter looks, by name or folder; may be repeated. Default: the default."),
    ] = None,
    agree: Annotated[float, typer.Option(help="Least Dice between any two looks at a film.")] = 0.97,
    per_label: Annotated[int, typer.Option(min=0, help="No more films of a class than that; 0 takes all.")] = 0,
    soft: Annotated[
        bool,
        typer.Option("--soft", help="Keep how sure they are, and label films with a mask, too: for distillation."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Draws the films, where not all are taken.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Draw lung masks on films that have none, with trained segmenters, and keep those that all looks agree on.

    Each segmenter looks at a film and at its mirror image. DEST is a store to train a segmenter on beside drawn masks;
    its split lies in it, DEST/split.csv. A recipe with `soft` teaches one segmenter what several find together.
    """
    from lungscope.bundle import Bundle, locate
    from lungscope.data.pseudo import pseudo_label as look_at
    from lungscope.data.split import Split
    from lungscope.data.store import Store

    bundles = [Bundle.load(locate(name)) for name in model] if model else [Bundle.load(locate(None))]
    with _progress() as progress:
        result = look_at(
            Store.open(store),
            Split.read(split),
            bundles,
            dest,
            agree=agree,
            per_label=per_label,
            soft=soft,
            seed=seed,
            progress=lambda done, total: progress("segment", done, total),
        )
    if as_json:
        typer.echo(json.dumps(result.to_json(), indent=2))
        return
    table = Table("class", "films kept")
    for label, films in sorted(result.kept.items()):
        table.add_row(label or "unlabelled", f"{films:,}")
    _print_table(table)
    reasons = ", ".join(f"{reason} {films:,}" for reason, films in sorted(result.left_out.items()))
    kept = f"{sum(result.kept.values()):,} of {result.looked_at:,} films kept"
    typer.echo(f"{result.store}: {kept}; left out: {reasons or 'none'}")
    typer.echo(f"Its split: {result.split}")


def _fractions(text: str) -> tuple[float, float, float]:
    try:
        train, val, test = (float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"--fractions {text!r}: give three numbers that add up to 1, such as 0.7,0.1,0.2") from error
    if min(train, val, test) < 0 or not abs(train + val + test - 1) <= 1e-9:
        raise UsageError(f"--fractions {text!r}: add up to {train + val + test:g}; must be >= 0 and add up to 1")
    return train, val, test


def _print_table(table: Table) -> None:
    Console(highlight=False, markup=False).print(table)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar a phase on stderr; stdout stays free for the result."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def advance(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(_PHASES[phase], total=total)
            bars.update(tasks[phase], completed=done, total=total)

        yield advance
