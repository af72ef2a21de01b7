"""`lungscope export`: from training runs to a bundle that is checked, calibrated and measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape

from lungscope.bundle import MANIFEST, MODEL_CARD, Bundle
from lungscope.cli.evaluate import compare_splits
from lungscope.cli.options import local
from lungscope.data.split import Split
from lungscope.data.store import Record, Store
from lungscope.errors import DataError
from lungscope.evaluation import scoring
from lungscope.evaluation.calibration import COVERAGE, HEALTHY, LEAST_FILMS, calibrate, fit_opaque
from lungscope.evaluation.card import CONTROLS, METRICS, model_card
from lungscope.evaluation.provenance import facts
from lungscope.hardware import cores
from lungscope.pipeline import Analyzer
from lungscope.stages.severity import NORMAL
from lungscope.training.export import Trained, amend_bundle, export_bundle, in_place_of, parity_films
from lungscope.training.quantize import measure_gates, quantize_bundle

app = typer.Typer(add_completion=False)


@app.command()
def export(
    segmenter: Annotated[
        list[Path], typer.Option("--segmenter", help="A segmenter's run, or a bundle: its own; repeated, an ensemble.")
    ],
    data: Annotated[list[Path], typer.Option("--data", help="A store; for parity, calibration and metrics.")],
    split: Annotated[list[Path], typer.Option("--split", help="A split of the stores.")],
    out: Annotated[Path, typer.Option("--out", help="The bundle's folder; replaced if it is one.", parser=local)],
    classifier: Annotated[
        Path | None, typer.Option("--classifier", help="A classifier's run, or a bundle: its classifier.")
    ] = None,
    mirror: Annotated[
        float | None,
        typer.Option(
            "--mirror",
            min=0,
            help="Logits: where the largest leads by less, the mirror image is classified, too, and the mean counts. "
            "Default: that of the classifier's bundle, or 0.",
        ),
    ] = None,
    pool: Annotated[
        str | None,
        typer.Option(
            "--pool",
            help="How members are pooled: mean, union, vote. Default: as in the segmenters' one bundle, or mean.",
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold",
            min=0.01,
            max=0.99,
            help="From which pooled probability on a place is lung. Default: that of the segmenters' bundle, or 0.5.",
        ),
    ] = None,
    segmenter_size: Annotated[
        int | None, typer.Option("--segmenter-size", help="Side of the segmenter's grid.")
    ] = None,
    paper: Annotated[list[Path] | None, typer.Option("--paper", help="A data card, a licence; copied in.")] = None,
    lesions: Annotated[
        Path | None, typer.Option("--lesions", help="Films with drawn disease, for the metrics.")
    ] = None,
    severity: Annotated[
        Path | None, typer.Option("--severity", help="Films with Brixia scores, for the metrics.")
    ] = None,
    controls: Annotated[
        Path | None,
        typer.Option("--controls", help="What `evaluate classifier --out` wrote of the controls, for the model card."),
    ] = None,
    metrics: Annotated[
        bool, typer.Option(help="Measure the bundle on the test parts and keep the result in it.")
    ] = True,
    gates: Annotated[
        bool, typer.Option(help="Quantise to int8, and measure the gates of what this machine computes natively.")
    ] = True,
    name: Annotated[
        str | None, typer.Option("--name", help="What reports call the bundle. Default: the name of its folder.")
    ] = None,
    version: Annotated[str, typer.Option("--version")] = "0.1.0",
    json_: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON on standard output.")] = False,
) -> None:
    """ONNX with its parity gates; temperature, conformal sets and limit of opacity fitted on validation; int8, and
    gates of precisions, likewise (see `lungscope quantize`); metrics on test; a model card made of them; SHA-256 of it
    all."""
    console = Console(stderr=True)
    parts = Split.read_all(split)
    stores = [Store.open(path) for path in data]
    known = [(store, parts) for store in stores]
    with in_place_of(out) as folder:
        bundle = export_bundle(
            [trained for path in segmenter for trained in _segmenters(path)],
            None if classifier is None else _classifier(classifier),
            folder,
            films=parity_films(known),
            name=name or out.resolve().name,
            version=version,
            segmenter_size=segmenter_size,
            **_answering(segmenter, classifier, {"pool": pool, "threshold": threshold, "mirror": mirror}),
            papers={path.name: path.read_text(encoding="utf-8") for path in paper or []}
            | ({} if controls is None else {CONTROLS: _controls(controls)}),
        )
        console.print(f"{out}: graphs written, parity gates passed")
        same_split = compare_splits(bundle, known)
        if bundle.classifier is not None:
            bundle = _calibrate(bundle, stores, parts, console)
        if bundle.classifier is not None and NORMAL not in bundle.classifier.labels:
            console.print(f"[yellow]no class is called {NORMAL!r}: this bundle scores no severity[/yellow]")
        elif bundle.segmenter.opaque is not None and bundle.classifier is not None:
            bundle = _fit_opaque(bundle, known, console)
        if gates and not any(record.mask for store in stores for record in store.records):
            console.print("[yellow]no store has drawn lungs, which gates need: `auto` stays f32[/yellow]")
        elif gates:
            bundle = measure_gates(quantize_bundle(bundle, known), known)
            for precision, gate in bundle.offered.gates.items():
                console.print(gate.describe(precision), highlight=False)
        if metrics:
            analyzer = Analyzer(bundle, precision="f32", streams=cores())
            result = {
                **facts(analyzer, split),
                "split_of_training": same_split,
                **_measure(analyzer, stores, parts, lesions, severity),
            }
            bundle = amend_bundle(bundle, files={METRICS: json.dumps(result, indent=1, allow_nan=False) + "\n"})
            console.print("measured on the test parts")
        bundle = amend_bundle(bundle, files={MODEL_CARD: model_card(bundle)})
    bundle = Bundle.load(out)
    print(json.dumps(bundle.manifest, indent=2) if json_ else bundle.root)


def _calibrate(bundle: Bundle, stores: list[Store], split: Split, console: Console) -> Bundle:
    """Fit temperature and conformal sets, where validation parts have labelled films to fit them on."""
    labelled = [store for store in stores if any(record.label for record in _part(store, split, "val"))]
    if not labelled:
        console.print(
            "[yellow]no validation film has a label, which calibration needs: probabilities are as the network gives "
            "them, and there are no conformal sets[/yellow]"
        )
        return bundle
    analyzer = Analyzer(bundle, precision="f32", streams=cores())
    found = [scoring.predict(analyzer, store, split, "val") for store in labelled]
    logits, truth = np.concatenate([f.logits for f in found]), np.concatenate([f.truth for f in found])
    temperature, conformal = calibrate(logits, truth)
    for label, least in zip(found[0].labels, conformal.thresholds, strict=True):
        if not least:
            have = int((truth == found[0].labels.index(label)).sum())
            console.print(
                f"[yellow]{label} has {have} validation films; {COVERAGE:.0%} coverage takes {LEAST_FILMS}: until "
                "then it is in every set, and no other class is ever answered. Split with a larger share for "
                "val[/yellow]"
            )
    thresholds = ", ".join(f"{least:.3f}" for least in conformal.thresholds)
    console.print(
        f"temperature {temperature:.3f}; {COVERAGE:.0%} conformal thresholds {thresholds} "
        f"(validation, n = {len(truth)})"
    )
    return amend_bundle(bundle, temperature=temperature, conformal=conformal)


def _part(store: Store, split: Split, part: str) -> list[Record]:
    return [store.records[i] for i in split.select(store, part)]


def _fit_opaque(bundle: Bundle, data: list[tuple[Store, Split]], console: Console) -> Bundle:
    """Fit the limit of opacity that severity is made by, where there are healthy films to fit it on."""
    healthy = scoring.healthy_lungs(Analyzer(bundle, precision="f32", streams=cores()), data)
    if healthy.failed:
        found = f"{len(healthy.failed)} healthy validation films could not be analysed, the first: {healthy.failed[0]}"
        console.print(f"[yellow]{escape(found)}[/yellow]")
    if not healthy.levels:
        console.print(
            f"[yellow]no zone of a validation film of the class {NORMAL} to fit a limit of opacity on: it stays "
            f"{bundle.segmenter.opaque:g}, and healthy lungs may count as involved, or disease as clear[/yellow]"
        )
        return bundle
    counts = {"films": healthy.films, "failed": len(healthy.failed), "zones": len(healthy.levels)}
    bundle = amend_bundle(bundle, opaque=fit_opaque(healthy.levels), healthy=counts)
    console.print(
        f"a place is involved above an opacity of {bundle.segmenter.opaque:g}: of {HEALTHY:.0%} of "
        f"{len(healthy.levels)} zones of healthy lungs less than 5 % is (validation, n = {healthy.films})"
    )
    return bundle


def _answering(segmenter: list[Path], classifier: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """Pool, threshold and mirror: as `given`; else those of the bundle that all segmenters, or the classifier, come
    from; else plain ones."""
    found: dict[str, Any] = {"pool": "mean", "threshold": 0.5, "mirror": 0.0}
    if len({*segmenter}) == 1 and _is_bundle(segmenter[0]):
        spec = Bundle.load(segmenter[0]).segmenter
        found |= {"pool": spec.pool, "threshold": spec.threshold}
    if classifier is not None and _is_bundle(classifier) and (own := Bundle.load(classifier).classifier) is not None:
        found["mirror"] = own.mirror
    return found | {name: value for name, value in given.items() if value is not None}


def _is_bundle(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def _segmenters(path: Path) -> list[Trained]:
    return Trained.of_bundle(Bundle.load(path)) if _is_bundle(path) else [Trained.open(path)]


def _classifier(path: Path) -> Trained:
    return Trained.classifier_of(Bundle.load(path)) if _is_bundle(path) else Trained.open(path)


def _controls(path: Path) -> str:
    """What the model card states of a result of `evaluate classifier`. Raises DataError where `path` is none, or has
    no controls."""
    names = ("store", "part", "input", "films", "accuracy", "macro_f1", "macro_auc", "intervals")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        runs = [
            {
                "stores": [{name: row[name] for name in names} | _further(row) for row in run["stores"]],
                "weights": run["weights"],
            }
            for run in (document, *document["controls"])
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is no result of `lungscope evaluate classifier --control … --out`: {error}") from error
    if len(runs) < 2:
        raise DataError(f"{path} holds one network; controls are at least two, of one recipe, on different inputs")
    return json.dumps({**runs[0], "controls": runs[1:]}, indent=1) + "\n"


def _further(row: dict[str, Any]) -> dict[str, Any]:
    """What a network was shown, and how right it was within each source, where the result says so."""
    return {name: row[name] for name in ("view", "sources") if name in row}


def _measure(
    analyzer: Analyzer, stores: list[Store], split: Split, lesions: Path | None, severity: Path | None
) -> dict[str, Any]:
    result: dict[str, Any] = {"segmenter": [], "classifier": []}
    for store in stores:
        films = _part(store, split, "test")
        if any(record.mask for record in films):
            result["segmenter"].append(scoring.score_segmenter(analyzer, store, split, "test"))
        if analyzer.bundle.classifier is not None and any(record.label for record in films):
            result["classifier"].append(scoring.score_classifier(analyzer, store, split, "test"))
    if lesions is not None:
        result["lesions"] = scoring.score_lesions(analyzer, lesions)
    if severity is not None and analyzer.bundle.classifier is not None:
        known = [(store, split) for store in stores]
        result["severity"] = scoring.score_severity(analyzer, severity, known=known)
    for rows in (*result["segmenter"], *result["classifier"], result.get("lesions", {})):
        rows.pop("per_film", None)
    return result
