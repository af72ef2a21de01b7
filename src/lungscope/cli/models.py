"""`lungscope models`: which weights there are, what they are, and whether they are whole."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table

from lungscope.bundle import MODEL_CARD, Bundle, embedded, locate
from lungscope.errors import BundleError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="List, show and verify weights bundles.")

Model = Annotated[
    str | None, typer.Argument(help="A bundle's folder, or the name of an embedded one; default: 'default'.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def summary(bundle: Bundle) -> dict[str, Any]:
    """A bundle in a few facts."""
    return {
        "name": bundle.name,
        "version": bundle.version,
        "path": str(bundle.root),
        "segmenter": [member.network for member in bundle.segmenter.members],
        "classifier": None if bundle.classifier is None else bundle.classifier.weights.network,
        "labels": None if bundle.classifier is None else list(bundle.classifier.labels),
        "megabytes": round(sum(weights.path.stat().st_size for weights in bundle.weights) / 1e6, 1),
    }


@app.command("list")
def list_bundles(as_json: AsJson = False) -> None:
    """List the bundles that came with the package."""
    rows = []
    for name, path in embedded().items():
        try:
            rows.append(summary(Bundle.load(path)))
        except BundleError as error:
            rows.append({"name": name, "path": str(path), "error": str(error)})
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("bundle", "version", "segmenter", "classifier", "labels", "MB")
    for row in rows:
        if "error" in row:
            table.add_row(escape(row["name"]), "[red]broken[/red]", escape(row["error"]), "", "", "")
        else:
            cells = (
                row["name"],
                row["version"],
                " + ".join(row["segmenter"]),
                row["classifier"] or "none",
                ", ".join(row["labels"] or []),
                str(row["megabytes"]),
            )
            table.add_row(*map(escape, cells))
    console = Console()
    console.print(table if rows else "No bundle is embedded. Name one with --model.")


@app.command()
def show(model: Model = None, as_json: AsJson = False) -> None:
    """Print a bundle's model card, or its manifest where it has none: networks, training, results, limits.

    With --json the manifest."""
    bundle = Bundle.load(locate(model))
    console = Console()
    if as_json:
        typer.echo(json.dumps(bundle.manifest, indent=2))
    elif MODEL_CARD not in bundle.files:
        console.print_json(data=bundle.manifest)
    else:
        card = (bundle.root / MODEL_CARD).read_text(encoding="utf-8")
        if console.is_terminal:
            console.print(Markdown(card))
        else:
            typer.echo(card, nl=False)


@app.command()
def verify(model: Model = None, as_json: AsJson = False) -> None:
    """Check every file of a bundle against its SHA-256. Exit status 3 if one is missing or altered."""
    bundle = Bundle.load(locate(model))
    if as_json:
        typer.echo(json.dumps({"name": bundle.name, "version": bundle.version, "files": bundle.files}, indent=2))
        return
    console = Console()
    for name, digest in bundle.files.items():
        console.print(f"[green]ok[/green]  {digest}  {escape(name)}", highlight=False, soft_wrap=True)
    console.print(f"{escape(bundle.name)} {escape(bundle.version)} is whole: {len(bundle.files)} files.")
