"""`lungscope analyze`: films in, a folder of results for each, one table of all."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, redirect_stdout
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from lungscope.batch import run_films
from lungscope.bundle import locate
from lungscope.cli.options import local
from lungscope.errors import MissingExtraError, UsageError, look_up, printable
from lungscope.hardware import cores
from lungscope.pipeline import Analyzer
from lungscope.readers import find, prepare, real, remote
from lungscope.report import DISCLAIMER
from lungscope.writers.folder import DEFAULT_FORMATS, FORMATS
from lungscope.writers.json import RESULTS, dumps, read_rows
from lungscope.writers.run import RUN_FORMATS

DEMO_FILM = "RG1_UNCR.dcm"
#: With at most this many films the terminal shows a table of them.
TABLE_ROWS = 20
ENGINES = ("local", "ray")
#: What --engine ray writes, the first unless something else is asked for.
TABLES = ("parquet", "csv")
#: What --write knows: files of each film, files of the run, or both.
ALL_FORMATS = tuple(dict.fromkeys([*FORMATS, *RUN_FORMATS]))

app = typer.Typer(add_completion=False)


@app.command()
def analyze(
    inputs: Annotated[
        list[str] | None, typer.Argument(help="Films, or folders of films; URLs too with ray.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.", parser=local)] = Path("lungscope-results"),
    model: Annotated[str | None, typer.Option(help="A bundle's folder, or the name of an embedded one.")] = None,
    write_formats: Annotated[
        str | None,
        typer.Option(
            "--write",
            help=f"Any of {','.join(ALL_FORMATS)}; with ray {' or '.join(TABLES)}.",
            show_default=f"{','.join(DEFAULT_FORMATS)}; with ray {TABLES[0]}",
        ),
    ] = None,
    new_study: Annotated[bool, typer.Option("--new-study", help="DICOM: a study for each film that has none.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what earlier runs into OUT did of films that have not changed.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, gpu, cuda, … (see `lungscope doctor`).")] = "auto",
    precision: Annotated[
        str, typer.Option(help="auto, f32, bf16, f16 or int8; auto: the fastest here whose gate was passed.")
    ] = "auto",
    engine: Annotated[
        str, typer.Option(help="local: threads of this process. ray: processes, here or on a cluster.")
    ] = "local",
    workers: Annotated[
        int | None, typer.Option(min=1, help="ray: processes, of one core each.", show_default="all cores")
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="ray: host:port or auto, to join a cluster.", show_default="RAY_ADDRESS, or a Ray of its own"
        ),
    ] = None,
    demo: Annotated[bool, typer.Option(help="Analyse a real chest film from the package pydicom-data.")] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print the run as JSON on standard output, with its rows where it is of 20 films at most."
        ),
    ] = False,
) -> None:
    """Analyse chest films: lungs, class, evidence, severity.

    Each film gets OUT/<stem>/ with report.json, lungs.png, saliency.npy, overlay.png and report.html; films that share
    a stem get OUT/<stem>-<8 hex digits of their path's hash>/. The run gets OUT/results.jsonl, a row for every film,
    OUT/run.json, and OUT/index.html with html, results.csv with csv, results.parquet with parquet; with no format but
    the last two no film gets a folder. With --write dicom a film gets lungs.dcm and saliency.dcm (SEG), overlay.dcm
    (SC) and report.dcm (SR) in its own study. With --engine ray there are tables alone, films may lie behind URLs of
    fsspec (s3://, gs://, …), and come after those with paths. Ctrl-C or SIGTERM ends a run after the films that it has
    begun (with ray: that are done); the same command with --resume goes on. Exit status: 0 all done, 1 some films
    failed, 2 usage, 3 nothing could run, 130 or 143 ended by Ctrl-C or SIGTERM.

    Research software, not a medical device. Not for diagnosis.
    """
    look_up(engine, ENGINES, what="Engine")
    if engine == "local" and (workers or ray_address):
        raise UsageError("--workers and --ray-address are about --engine ray. Add it, or leave them out.")
    default = DEFAULT_FORMATS if engine == "local" else TABLES[:1]
    formats = formats_of(",".join(default) if write_formats is None else write_formats)
    if engine == "ray" and not set(formats) <= set(TABLES):
        raise UsageError(f"--engine ray writes tables: --write {','.join(TABLES)}. For files of each film use local.")
    if engine == "ray" and device.lower() not in ("auto", "cpu"):
        raise UsageError(f"--engine ray computes on processors, not on {device!r}. Leave --device out, or use local.")
    if new_study and "dicom" not in formats:
        raise UsageError("--new-study is about DICOM objects. Add dicom to --write, or leave it out.")
    if "dicom" in formats:
        importlib.import_module("lungscope.writers.dicom")  # so that a missing extra stops the run, not every film
    wanted = [*(inputs or []), *([str(demo_film())] if demo else [])]
    if not wanted:
        raise UsageError("No input. Give films or folders of films, or --demo for a real one.")
    paths, urls = (
        [Path(item) for item in wanted if not remote.is_url(item)],
        [item for item in wanted if remote.is_url(item)],
    )
    if urls and engine == "local":
        raise UsageError(f"{urls[0]} is a URL. Those are read with --engine ray; or copy the films to this machine.")
    films = [*map(str, films_in(paths, out) if paths else ()), *remote.find(urls)]
    with ExitStack() as stack:
        work: Callable[..., dict[str, Any]]
        if engine == "ray":
            from lungscope import cluster  # an extra

            analyzer = Analyzer(locate(model), device="cpu", precision=precision, streams=1, threads=1)
            stack.enter_context(redirect_stdout(sys.stderr))  # Ray prints what befalls its workers
            workers = stack.enter_context(cluster.connect(ray_address, workers))
            work = partial(cluster.run_films, analyzer, films, out, formats, workers)
        else:
            prepare(Path(films[0]))
            streams = cores() if len(films) > 1 else None
            analyzer = Analyzer(locate(model), device=device, precision=precision, streams=streams)
            work = partial(run_films, analyzer, list(map(Path, films)), out, formats, new_study=new_study)
        stop, bar = stack.enter_context(Stop()), stack.enter_context(_bar(not as_json))
        task = bar.add_task("films", total=len(films))
        run = work(resume=resume, stop=stop, progress=lambda: bar.advance(task))
    # Those of other films come after them.
    count = run["done"] + run["failed"]
    rows = list(islice(read_rows(out / RESULTS), count)) if len(films) <= TABLE_ROWS else None
    if as_json:
        typer.echo(dumps(run | {"rows": rows}))
    else:
        _show(run, rows, out)
    if run["interrupted"]:
        raise typer.Exit(128 + stop.number)
    raise typer.Exit(1 if run["failed"] else 0)


def formats_of(names: str) -> list[str]:
    """What a value of --write names. Raises UsageError where that is unknown, or nothing."""
    formats = [look_up(name, ALL_FORMATS, what="Format") for name in names.split(",") if name]
    if not formats:
        raise UsageError(f"--write {names!r} names no format. Allowed: {', '.join(ALL_FORMATS)}.")
    return formats


def demo_film() -> Path:
    """A real CR chest film (NEMA WG-04) out of the package pydicom-data. Raises MissingExtraError without it."""
    from pydicom.data import get_testdata_file

    try:
        path = get_testdata_file(DEMO_FILM, download=False)
    except ValueError:
        path = None
    if path is None:
        raise MissingExtraError("`lungscope analyze --demo`", "demo")
    return Path(str(path))


def films_in(inputs: Sequence[Path], out: Path) -> list[Path]:
    """Every film file in `inputs`, once, in order, folders sorted; results of an earlier run in `out` are no films,
    unless what was named lies in there.

    Raises UsageError where nothing is left, or where `out` is an input itself: its films and results could not be told
    apart.
    """
    results, named = real(out), [real(path) for path in inputs]
    if results in named and out.is_dir():
        raise UsageError(f"--out {out} is an input itself. Name another folder for the results.")
    inside = [path for path in named if path.is_relative_to(results)]

    def is_film(path: Path) -> bool:
        return not path.is_relative_to(results) or any(path.is_relative_to(folder) for folder in inside)

    films = [path for path in find(inputs) if is_film(real(path))]
    if not films:
        raise UsageError(f"No film in {', '.join(map(str, inputs))} but results in {out}. Name films, or their folder.")
    return films


class Stop(Event):
    """Set by the first SIGINT or SIGTERM; the next one does what it did before. number: the signal's, 0 without one."""

    number = 0

    def __enter__(self) -> Stop:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        self.number = number
        self.set()
        self.__exit__()


class _Rate(ProgressColumn):
    """Over the whole run: results come in bursts, and what Rich makes of a burst is no rate."""

    def render(self, task: Task) -> Text:
        seconds = task.finished_time or task.elapsed
        return Text(f"{task.completed / seconds:.1f} films/s" if seconds else "", style="progress.data.speed")


def _bar(visible: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not visible,
    )


def shown(text: str) -> str:
    """`text`, which may hold names that strangers gave to files, as Rich is to print it: no markup, and nothing that a
    terminal would obey."""
    return escape(printable(text))


def _show(run: dict[str, Any], rows: Sequence[dict[str, Any]] | None, out: Path) -> None:
    console = Console()
    if rows:
        console.print(_table(rows))
    state = "Interrupted: " if run["interrupted"] else ""
    kept = f"{run['kept']} of them by an earlier run, " if run["kept"] else ""
    if run["unchecked"]:
        kept += f"{run['unchecked']} by an earlier run and not looked at again, "
    others = f"\nFilms that this run was not given, whose rows stay: {run['others']}." if run["others"] else ""
    console.print(
        f"{state}{run['done']} of {run['inputs']} films analysed, {kept}{run['failed']} failed, "
        f"in {run['seconds']:.1f} s. Results: {shown(str(out))}{others}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"[dim]{DISCLAIMER}[/dim]")


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table("film", "class", "probability", "severity", "extent R / L", Column("notes", overflow="fold"))
    for row in rows:
        film = shown(Path(row["path"]).name)
        if row["status"] == "failed":
            table.add_row(film, "[red]failed[/red]", "", "", "", shown(row["error"]["message"]))
            continue
        table.add_row(
            film,
            shown(_answer(row)),
            "" if row["probabilities"] is None else f"{row['probabilities'][row['label']]:.1%}",
            "–" if row["severity"] is None else f"{row['severity']} of 18",
            " / ".join("–" if share is None else f"{share:.0f} %" for share in _extents(row)),
            ", ".join(row["warnings"]),
        )
    return table


def _answer(row: dict[str, Any]) -> str:
    if not row["abstained"]:
        return row["label"] or "lungs only"
    return "no answer: " + (" or ".join(row["conformal_set"]) or "no class fits")


def _extents(row: dict[str, Any]) -> Iterator[float | None]:
    extent = row["extent_percent"] or {}
    return (extent.get(side) for side in ("right", "left"))
