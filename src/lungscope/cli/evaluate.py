"""`lungscope evaluate`: measure a bundle on films with known answers, through the path that ships."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lungscope.bundle import Bundle, locate
from lungscope.cli.options import local
from lungscope.data.split import PARTS, Split
from lungscope.data.store import Store
from lungscope.errors import UsageError, look_up
from lungscope.evaluation import scoring
from lungscope.evaluation.card import NOT_KNOWN, counted, recorded_controls
from lungscope.evaluation.comparison import accuracy_less, signed
from lungscope.evaluation.provenance import facts, split_of_training
from lungscope.hardware import cores
from lungscope.pipeline import Analyzer
from lungscope.statistics import number, with_interval
from lungscope.writers.atomic import write_text

app = typer.Typer(
    no_args_is_help=True, help="Measure a bundle. Numbers come from the path that ships, with 95 % intervals."
)

Stores = Annotated[list[Path], typer.Option("--data", help="A store made by `lungscope data import`; may be repeated.")]
Splits = Annotated[list[Path], typer.Option("--split", help="A split made by `lungscope data split`; may be repeated.")]
Part = Annotated[str, typer.Option("--part", help=f"{', '.join(PARTS)}")]
Model = Annotated[str | None, typer.Option("--model", help="A bundle's folder or name; default: the embedded one.")]
Out = Annotated[
    Path | None, typer.Option("--out", help="Write the result, with every film's value, as JSON.", parser=local)
]
Device = Annotated[str, typer.Option("--device")]
Precision = Annotated[
    str, typer.Option("--precision", help="f32, the same everywhere; auto: what `analyze` takes here; bf16, f16, int8.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


@app.command()
def segmenter(
    data: Stores,
    split: Splits,
    part: Part = "test",
    model: Model = None,
    device: Device = "auto",
    precision: Precision = "f32",
    lesions: Annotated[
        Path | None, typer.Option("--lesions", help="Folder of films with drawn disease (index.csv).")
    ] = None,
    out: Out = None,
    json_: Json = False,
) -> None:
    """Strict per-image Dice, IoU, accuracy, 95 % Hausdorff; for each store alone, never pooled."""
    analyzer, parts = _ready(model, device, precision, split, part)
    known = [(Store.open(path), parts) for path in data]
    result: dict[str, Any] = {
        **facts(analyzer, split),
        "split_of_training": compare_splits(analyzer.bundle, known),
        "stores": [
            with_bar(store.name, partial(scoring.score_segmenter, analyzer, store, parts, part)) for store, _ in known
        ],
    }
    if lesions is not None:
        result["lesions"] = with_bar("lesions", partial(scoring.score_lesions, analyzer, lesions))
    _finish(result, out, json_, _show_segmenter)


@app.command()
def classifier(
    data: Stores,
    split: Splits,
    part: Part = "test",
    model: Model = None,
    device: Device = "auto",
    precision: Precision = "f32",
    control: Annotated[
        list[Path] | None,
        typer.Option("--control", help="A bundle of a control network to print beside; may be repeated."),
    ] = None,
    out: Out = None,
    json_: Json = False,
) -> None:
    """Accuracy, sensitivity, specificity, F1, AUC, log-loss, calibration error and confusion, beside the controls, and
    how each control's accuracy differs on the same films."""
    result: dict[str, Any] = {}
    for bundle in [model, *map(str, control or [])]:
        analyzer, parts = _ready(bundle, device, precision, split, part)
        known = [(Store.open(path), parts) for path in data]
        found = {
            **facts(analyzer, split),
            "split_of_training": compare_splits(analyzer.bundle, known),
            "stores": [
                with_bar(store.name, partial(scoring.score_classifier, analyzer, store, parts, part))
                for store, _ in known
            ],
        }
        if not result:
            result = {**found, "controls": [], "recorded_controls": recorded_controls(analyzer.bundle)}
        else:
            for own, row in zip(result["stores"], found["stores"], strict=True):
                row["accuracy_less_bundle"] = accuracy_less(row, own)
            result["controls"].append(found)
    _finish(result, out, json_, _show_classifier)


@app.command()
def pipeline(
    severity: Annotated[
        Path | None, typer.Option("--severity", help="Folder of films with Brixia scores (brixia.csv).")
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option("--data", help="Stores that were trained on, to leave their films out.")
    ] = None,
    split: Annotated[list[Path] | None, typer.Option("--split", help="The splits of these stores.")] = None,
    lesions: Annotated[
        Path | None, typer.Option("--lesions", help="Folder of films with drawn disease (index.csv).")
    ] = None,
    model: Model = None,
    device: Device = "auto",
    precision: Precision = "f32",
    out: Out = None,
    json_: Json = False,
) -> None:
    """The whole way: severity beside radiologists' scores, evidence and opacity beside drawn disease, what failed."""
    if severity is None and lesions is None:
        raise UsageError("Nothing to evaluate on. Give --severity, --lesions or both.")
    analyzer = Analyzer(locate(model), device=device, precision=precision, streams=cores())
    result = facts(analyzer, split or [])
    if severity is not None:
        parts = Split.read_all(split or [])
        known = [(Store.open(path), parts) for path in data or []]
        result["split_of_training"] = compare_splits(analyzer.bundle, known)
        result["severity"] = with_bar("severity", partial(scoring.score_severity, analyzer, severity, known=known))
    if lesions is not None:
        result["lesions"] = with_bar("lesions", partial(scoring.score_lesions, analyzer, lesions))
    _finish(result, out, json_, _show_pipeline)


def _ready(model: str | None, device: str, precision: str, split: list[Path], part: str) -> tuple[Analyzer, Split]:
    look_up(part, PARTS, what="part")
    return Analyzer(locate(model), device=device, precision=precision, streams=cores()), Split.read_all(split)


def compare_splits(bundle: Bundle, data: Sequence[tuple[Store, Split]]) -> dict[str, bool | None]:
    """`split_of_training`; a network of another split is named on standard error. Raises DataError where a split does
    not fit its store."""
    found = split_of_training(bundle, data)
    if other := " and ".join(network for network, same in found.items() if same is False):
        Console(stderr=True).print(
            f"[yellow]{escape(bundle.name)}: its {other} trained with other val and test parts than are given, and "
            "may have been trained on films that it is measured on here. Give the splits of its training[/yellow]"
        )
    return found


def with_bar(title: str, work: Callable[[scoring.Progress], dict[str, Any]]) -> dict[str, Any]:
    """`work`, given what to call with films done and in all, under a progress bar on standard error."""
    with film_bars() as begin:
        return work(begin(title))


@contextmanager
def film_bars() -> Iterator[Callable[[str], scoring.Progress]]:
    """Progress bars on standard error: given a title, what to call with films done and in all."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:

        def begin(title: str) -> scoring.Progress:
            task = progress.add_task(title)
            return lambda done, total: progress.update(task, completed=done, total=total)

        yield begin


def _finish(result: dict[str, Any], out: Path | None, as_json: bool, show: Callable[[dict[str, Any]], None]) -> None:
    text = json.dumps(result, indent=1, allow_nan=False)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, text + "\n")
    if as_json:
        print(text)
    else:
        show(result)


def _show_segmenter(result: dict[str, Any]) -> None:
    table = Table(
        "store", "n", "failed", "Dice [95 %]", "5th pct.", "IoU", "accuracy", "HD95 px", title="Lung segmentation"
    )
    for row in result["stores"]:
        scores = row["scores"]
        table.add_row(
            f"{row['store']} {row['part']}",
            str(row["films"]),
            str(row["failed"]),
            with_interval(scores["dice"]["mean"], scores["dice"]["interval"]),
            number(scores["dice"]["p5"]),
            number(scores["iou"]["mean"]),
            number(scores["binary_accuracy"]["mean"]),
            number(scores["hd95"]["mean"], 2),
        )
    console = Console()
    console.print(table)
    for row in result["stores"]:
        worst = ", ".join(f"{film['id']} {film['dice']:.3f}" for film in row["worst"][:5])
        console.print(f"{row['store']}: worst {len(row['worst'])} films: {worst}, …")
    if "lesions" in result:
        _show_lesions(console, result["lesions"])


def _show_lesions(console: Console, result: dict[str, Any]) -> None:
    table = Table("", "n", "mean [95 %]", "10th pct.", title="Drawn disease")
    for name, row in result["scores"].items():
        table.add_row(name, str(row["defined"]), with_interval(row["mean"], row["interval"]), number(row["p10"]))
    console.print(table)


def _show_classifier(result: dict[str, Any]) -> None:
    console = Console()
    measured = [(run["bundle"], row) for run in [result, *result["controls"]] for row in run["stores"]]
    recorded = [("recorded", row) for row in result["recorded_controls"]]
    _print_upright(
        console,
        ("", "n", "failed", "accuracy [95 %]", "macro-F1 [95 %]", "macro AUC", "log-loss", "ECE"),
        [
            (
                f"{row['input']}, {bundle}, {row['store']}",
                str(row["films"]),
                str(len(row["failed"])) if "failed" in row else "",
                with_interval(row["accuracy"], row["intervals"]["accuracy"]),
                with_interval(row["macro_f1"], row["intervals"]["macro_f1"]),
                number(row["macro_auc"]),
                *(number(row[name]) if name in row else "" for name in ("log_loss", "ece")),
            )
            for bundle, row in measured + recorded
        ],
    )
    if result["recorded_controls"]:
        console.print(
            "recorded: controls that the bundle carries, not measured now; one network at a budget of their own, to be "
            "compared with each other"
        )
    for row in result["stores"]:
        lines = []
        for (label, scores), counts in zip(row["classes"].items(), row["confusion"], strict=True):
            spans = row["class_intervals"][label]
            values = (with_interval(scores[name], spans[name]) for name in ("sensitivity", "specificity", "f1"))
            lines.append((label, str(scores["films"]), *values, number(scores["auc"]), *map(str, counts)))
        called = (f"called {label}" for label in row["labels"])
        _print_upright(console, ("class", "n", "sensitivity", "specificity", "F1", "AUC", *called), lines)
        if row["conformal"] is not None:
            _show_conformal(console, row["conformal"])
    _show_differences(console, result["controls"])
    _show_sources(console, [(run["bundle"], row) for run in [result, *result["controls"]] for row in run["stores"]])
    console.print(
        "In this data class, source and age go together: what the background alone tells is not about lungs, and "
        "the lungs' accuracy may hold some of it too."
    )


def _print_upright(console: Console, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table with a column for each of `rows`, and its heads at the left: a terminal is 80 characters wide."""
    table = Table(heads[0], *(row[0] for row in rows))
    for head, *values in zip(heads[1:], *(row[1:] for row in rows), strict=True):
        table.add_row(head, *values)
    console.print(table)


def _show_conformal(console: Console, sets: dict[str, Any]) -> None:
    table = Table("class", "n", "coverage [95 %]", title=f"Conformal sets, nominal coverage {sets['nominal']:.0%}")
    for label, row in sets["classes"].items():
        table.add_row(label, str(row["films"]), with_interval(row["coverage"], row["interval"]))
    films = sum(sets["sizes"].values())
    table.add_row("all", str(films), with_interval(sets["coverage"], sets["interval"]))
    console.print(table)
    sizes = ", ".join(f"{count} hold {size}" for size, count in sets["sizes"].items() if count)
    console.print(
        f"sets by number of classes: {sizes}; answered (the most probable class alone): {sets['answered']:.1%} of "
        f"films, of them right {number(sets['accuracy_answered'])}"
    )


def _show_differences(console: Console, controls: list[dict[str, Any]]) -> None:
    if not controls:
        return
    table = Table("input", "bundle", "store", "source", "n", "difference [95 %]", title="Accuracy, less the bundle's")
    for run in controls:
        for row in run["stores"]:
            found = row["accuracy_less_bundle"]
            for source, less in (("all", found["all"]), *found["sources"].items()):
                if less is not None:
                    difference = signed(less["difference"], less["interval"])
                    table.add_row(row["input"], run["bundle"], row["store"], source, str(less["films"]), difference)
    console.print(table)
    console.print("On the films that both answered. Where an interval holds 0 the two are not told apart.")


def _show_sources(console: Console, rows: list[tuple[str, dict[str, Any]]]) -> None:
    if not any(row["sources"] for _, row in rows):
        return
    table = Table("input", "bundle", "store", "source", "n", "failed", "classes", "accuracy [95 %]", title="By source")
    for bundle, row in rows:
        for source, scores in row["sources"].items():
            counts = (str(scores["films"]), str(scores["failed"]), counted(scores["classes"]))
            accuracy = with_interval(scores["accuracy"], scores["interval"])
            table.add_row(row["input"], bundle, row["store"], source or NOT_KNOWN, *counts, accuracy)
    console.print(table)
    console.print("Within a source of several classes, what differs between sources can not tell the class.")


def _show_pipeline(result: dict[str, Any]) -> None:
    console = Console()
    if "severity" in result:
        table = Table("", "ours / senior", "ours / junior", "senior / junior", title="Severity, Spearman [95 %]")
        rows = [(name, result["severity"].get(name)) for name in ("global", "zones")]
        seen = result["severity"]["seen"]
        of_all = "all films" if seen is None else "with seen films"
        if "new_patients" in result["severity"]:
            new = f"known patients not fitted on, {result['severity']['new_patients']['scored']} films"
            rows += [(f"{name}, {new}", result["severity"]["new_patients"][name]) for name in ("global", "zones")]
        rows += [(f"{name}, {of_all}", result["severity"]["with_seen"][name]) for name in ("global", "zones")]
        for title, row in rows:
            if row is None:
                continue
            table.add_row(
                title,
                *(
                    with_interval(row[k]["spearman"], row[k]["interval"])
                    for k in ("ours_senior", "ours_junior", "senior_junior")
                ),
            )
        console.print(table)
        not_checked = "which were seen in training was not checked: give --data and --split"
        left_out = (
            not_checked
            if seen is None
            else f"{len(seen)} were seen in training, or fitted on, and are left out of all rows but the last two"
        )
        if seen is not None and not result["severity"]["checked"]:
            left_out += f"; {not_checked}"
        films, failed = result["severity"]["films"], len(result["severity"]["failed"])
        console.print(f"{films} films, {failed} could not be analysed; {left_out}")
    if "lesions" in result:
        _show_lesions(console, result["lesions"])
