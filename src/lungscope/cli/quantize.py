"""`lungscope quantize`: int8 for a bundle, and the gates of every precision that this machine computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lungscope.bundle import MODEL_CARD, Bundle, locate
from lungscope.cli.evaluate import film_bars
from lungscope.data.split import Split
from lungscope.data.store import Store
from lungscope.errors import BundleError, UsageError
from lungscope.evaluation.card import model_card
from lungscope.pipeline import Analyzer
from lungscope.training.export import amend_bundle
from lungscope.training.quantize import FILMS, measure_gates, quantize_bundle

app = typer.Typer(add_completion=False)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="A bundle's folder, or the name of an embedded one; it is changed.")],
    data: Annotated[list[Path], typer.Option("--data", help="A store; films of its training part give the ranges.")],
    split: Annotated[list[Path], typer.Option("--split", help="A split of the stores.")],
    films: Annotated[int, typer.Option(min=1, help="Films, about, that ranges are measured on.")] = FILMS,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the quantisation that there is; measure alone.")] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Measure on at most so many validation films of each store.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to measure: auto, cpu, gpu, … (see `lungscope doctor`).")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest's section as JSON.")] = False,
) -> None:
    """Quantise a bundle to int8, and measure each precision that this machine computes natively against f32.

    A precision passes where Dice and accuracy of the validation part fall by no more than 0.002, 99.8 % of films keep
    their class, masks have a Dice of 0.995 with those of f32, and zones' severity differs by no more than 0.05; close
    calls, which training films tell how to know, are computed again in f32. `auto` takes no other. Gates of precisions
    that this machine does not compute natively stay, so that a second run with --keep, there, adds theirs. Run again
    after the weights change.
    """
    bundle = Bundle.load(locate(model))
    if keep and not bundle.offered.quantised:
        raise BundleError(f"bundle {bundle.name!r} has no quantisation to keep. Leave --keep out to make one")
    parts = Split.read_all(split)
    known = [(Store.open(path), parts) for path in data]
    Analyzer(bundle, device=device, precision="f32")  # before anything is changed
    if not keep:
        bundle = quantize_bundle(bundle, known, films=films)
    before = bundle.manifest.get("precision", {"gates": {}})["gates"]
    with film_bars() as begin:
        bundle = measure_gates(bundle, known, limit=limit, device=device, begin=begin)
    gates = bundle.manifest["precision"]["gates"]
    if gates == before:
        raise UsageError(f"--device {device}: computes nothing but f32 natively here, so that no gate was measured")
    if MODEL_CARD in bundle.files:
        bundle = amend_bundle(bundle, files={MODEL_CARD: model_card(bundle)})
    if as_json:
        typer.echo(json.dumps(bundle.manifest["precision"], indent=2))
        return
    for name, gate in bundle.offered.gates.items():
        typer.echo(gate.describe(name) + (" (measured before)" if gates[name] == before.get(name) else ""))
