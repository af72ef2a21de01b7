"""Score a bundle on films with known answers, through the path that users run: file → reader → Analyzer → Report.

Nothing here sees a training cache: what is scored is what ships (nnU-Net's `perform_actual_validation`).
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungscope.batch import in_order
from lungscope.data.duplicates import CROPS, NEAR_DUPLICATE, thumbnails
from lungscope.data.importing import read_mask, same_aspect, stretched
from lungscope.data.split import Split
from lungscope.data.store import Store
from lungscope.errors import BundleError, DataError
from lungscope.evaluation import metrics
from lungscope.evaluation.bootstrap import bootstrap, bootstrap_confusion, bootstrap_mean
from lungscope.evaluation.calibration import softmax
from lungscope.pipeline import Analyzer
from lungscope.radiograph import Geometry
from lungscope.report import Failure, Report
from lungscope.stages.classification import Conformal
from lungscope.stages.severity import NORMAL, opacity_levels

Mask = NDArray[np.bool_]
Progress = Callable[[int, int], None]

#: Places in the severity score, in the order of the columns of a Brixia table (Borghesi & Maroldi 2020).
ZONES = ("A", "B", "C", "D", "E", "F")

#: Share of the films listed as the worst ones.
WORST = 0.05


def truth_in(path: Path) -> Mask:
    """A mask file as bool [H, W], read as `data import` reads it. Raises DataError where that fails."""
    return read_mask(path)[0]


def on_grid(mask: Mask, shape: tuple[int, int]) -> Mask:
    """Bring a mask [H, W] to another grid over the same film; a cell is set where at least half of it is."""
    if mask.shape == shape:
        return mask
    if not same_aspect(mask.shape, shape):
        raise DataError(f"a mask of {mask.shape[0]}x{mask.shape[1]} does not lie on a film of {shape[0]}x{shape[1]}")
    return stretched(mask, shape)


def analyze_each(
    analyzer: Analyzer, paths: Sequence[Path], keep: Callable[[int, Report], Any], progress: Progress | None = None
) -> list[Any]:
    """`keep(i, report)` for each path, in order; a Failure where the film could not be analysed. Films run in
    parallel."""

    def one(i: int) -> Any:
        result = next(analyzer.analyze_many([paths[i]]))
        return result if isinstance(result, Failure) else keep(i, result)

    results = []
    for result in in_order(one, range(len(paths))):
        results.append(result)
        if progress is not None:
            progress(len(results), len(paths))
    return results


def score_segmenter(
    analyzer: Analyzer, store: Store, split: Split, part: str, progress: Progress | None = None
) -> dict[str, Any]:
    """Strict per-image Dice, IoU, binary accuracy and 95 % Hausdorff distance of the masked films of one part.

    Distances are in pixels of the mask's own grid. A film that could not be analysed counts as an empty mask: Dice 0,
    and an undefined distance. Means come with 95 % bootstrap intervals over groups.
    """
    masks = {i: path for i in split.select(store, part) if (path := store.mask_path_of(store.records[i]))}
    chosen = list(masks)
    if not chosen:
        raise DataError(f"{store.name}: no film of part {part!r} has a lung mask. `data audit` shows which have one")

    def keep(n: int, report: Report) -> Mask:
        return report.lungs.mask

    found = analyze_each(analyzer, [store.path_of(store.records[i]) for i in chosen], keep, progress)
    groups = split.groups_of(store, chosen)
    rows: list[dict[str, Any]] = []
    for (i, path), mask, group in zip(masks.items(), found, groups, strict=True):
        record, truth = store.records[i], truth_in(path)
        if not truth.any():
            raise DataError(f"{path}: the mask is empty. Import the set again")
        failed = isinstance(mask, Failure)
        predicted = np.zeros(truth.shape, np.bool_) if failed else on_grid(mask, truth.shape)
        scores = {
            name: metrics.or_null(float(value[0])) for name, value in metrics.score_masks(predicted, truth).items()
        }
        rows.append(
            {"id": record.id, "group": group, "failure": _why(mask, record.image) if failed else None, **scores}
        )
    names = ("dice", "iou", "binary_accuracy", "hd95", "coverage", "precision")
    worst = sorted(rows, key=lambda row: row["dice"])[: max(1, round(WORST * len(rows)))]
    return {
        "store": store.name,
        "part": part,
        "films": len(rows),
        "failed": sum(row["failure"] is not None for row in rows),
        "scores": {
            name: {
                **metrics.summarise([row[name] for row in rows]).to_json(),
                "interval": _interval(bootstrap_mean([row[name] for row in rows], groups)),
            }
            for name in names
        },
        "worst": worst,
        "per_film": rows,
    }


@dataclass(frozen=True)
class Predictions:
    """logits f64 [N, K] and true classes i64 [N] of the films that were answered; `failed` lists the others.

    sources: where each film came from, "" where that is not known."""

    labels: tuple[str, ...]
    ids: list[str]
    groups: list[str]
    sources: list[str]
    truth: NDArray[np.int64]
    logits: NDArray[np.float64]
    failed: list[dict[str, str]]


def predict(analyzer: Analyzer, store: Store, split: Split, part: str, progress: Progress | None = None) -> Predictions:
    """Classify the labelled films of one part. Raises DataError for a label that the bundle does not know."""
    spec = analyzer.bundle.classifier
    if spec is None:
        raise BundleError(
            f"bundle {analyzer.bundle.name!r} has no classifier; make one with `lungscope export --classifier`"
        )
    chosen = [i for i in split.select(store, part) if store.records[i].label]
    unknown = sorted({store.records[i].label for i in chosen} - set(spec.labels))
    if unknown or not chosen:
        raise DataError(
            f"{store.name}: labels {unknown or 'missing'}; the bundle knows {', '.join(spec.labels)}. "
            "Import with these labels"
        )

    def keep(n: int, report: Report) -> NDArray[np.float32]:
        if report.classification is None:
            raise BundleError("the analyzer gave no classification")
        return report.classification.logits

    results = analyze_each(analyzer, [store.path_of(store.records[i]) for i in chosen], keep, progress)
    answered = [n for n, result in enumerate(results) if not isinstance(result, Failure)]
    groups = split.groups_of(store, chosen)
    return Predictions(
        labels=spec.labels,
        ids=[store.records[chosen[n]].id for n in answered],
        groups=[groups[n] for n in answered],
        sources=[store.records[chosen[n]].source for n in answered],
        truth=np.array([spec.labels.index(store.records[chosen[n]].label) for n in answered], np.int64),
        logits=np.array([results[n] for n in answered], np.float64).reshape(len(answered), len(spec.labels)),
        failed=[
            {
                "id": record.id,
                "label": record.label,
                "source": record.source,
                "message": _why(result, record.image),
            }
            for record, result in zip((store.records[i] for i in chosen), results, strict=True)
            if isinstance(result, Failure)
        ],
    )


@dataclass(frozen=True)
class HealthyLungs:
    """levels: `opacity_levels` of all zones of `films` films; failed: why the others could not be analysed."""

    levels: list[float]
    films: int
    failed: list[str]


def healthy_lungs(analyzer: Analyzer, data: Sequence[tuple[Store, Split]]) -> HealthyLungs:
    """The validation films of the class Normal."""
    levels, failed, films = [], [], 0
    for store, split in data:
        chosen = [r for r in (store.records[i] for i in split.select(store, "val")) if r.label == NORMAL]
        results = analyze_each(analyzer, [store.path_of(r) for r in chosen], lambda n, r: opacity_levels(r.lungs))
        for record, result in zip(chosen, results, strict=True):
            if isinstance(result, Failure):
                failed.append(f"{record.id}: {_why(result, record.image)}")
            else:
                films += 1
                levels += result
    return HealthyLungs(levels, films, failed)


def score_classifier(
    analyzer: Analyzer, store: Store, split: Split, part: str, progress: Progress | None = None
) -> dict[str, Any]:
    """`score_predictions` of the films of one part."""
    spec = analyzer.bundle.classifier
    found = predict(analyzer, store, split, part, progress)
    assert spec is not None
    try:
        scores = score_predictions(found, spec.temperature, spec.conformal)
    except DataError as error:
        raise DataError(f"{store.name}, part {part!r}: {error}") from error
    return {"store": store.name, "part": part, "input": spec.view.input, "view": asdict(spec.view), **scores}


def score_predictions(found: Predictions, temperature: float, conformal: Conformal | None = None) -> dict[str, Any]:
    """Every classification score, with 95 % bootstrap intervals over groups.

    Films that could not be analysed are listed and counted in `accuracy_all` as wrong. Raises DataError where none
    could be.
    """
    if not found.ids:
        first = found.failed[0]["message"] if found.failed else "there was no film"
        raise DataError(f"none of {len(found.failed)} films could be analysed; the first one: {first}")
    probabilities = softmax(found.logits, temperature)
    scores = metrics.score_classification(found.truth, probabilities, found.labels)
    predicted, k = probabilities.argmax(1), len(found.labels)
    right = predicted == found.truth
    total = len(right) + len(found.failed)

    def of_films(statistic: Callable[[Any, Any], float], *, corrected: bool = False) -> list[float | None]:
        def of_drawn(i: NDArray[np.int64]) -> float:
            return statistic(found.truth[i], probabilities[i])

        return _interval(bootstrap(of_drawn, found.groups, resamples=500, corrected=corrected))

    def of_class(name: str, c: int) -> list[float | None]:
        def statistic(confusion: NDArray[np.float64]) -> NDArray[np.float64]:
            values: NDArray[np.float64] = getattr(metrics.per_class(confusion), name)[..., c]
            return values

        return _interval(bootstrap_confusion(statistic, found.truth, predicted, k, found.groups))

    # Without one of the classes a resample has the mean of others.
    classes = np.unique(found.truth)

    def macro_f1(confusion: NDArray[np.float64]) -> NDArray[np.float64]:
        whole = (confusion.sum(axis=-1)[..., classes] > 0).all(axis=-1)
        return np.where(whole, metrics.macro_f1(confusion), np.nan)

    def macro_auc(truth: NDArray[np.int64], values: NDArray[np.float64]) -> float:
        return metrics.macro_auc(truth, values) if np.isin(classes, truth).all() else math.nan

    by_chance = metrics.ece_by_chance(probabilities)
    return {
        "temperature": temperature,
        **scores.to_json(),
        "ece_by_chance": dict(zip(("median", "p95"), by_chance, strict=True)),
        "intervals": {
            "accuracy": _interval(bootstrap_mean(right, found.groups)),
            "macro_f1": _interval(bootstrap_confusion(macro_f1, found.truth, predicted, k, found.groups)),
            "macro_auc": of_films(macro_auc),
            # It sums distances, which chance makes larger.
            "ece": of_films(metrics.ece, corrected=True),
            "log_loss": of_films(metrics.log_loss),
        },
        "class_intervals": {
            label: {name: of_class(name, c) for name in ("sensitivity", "specificity", "f1")}
            for c, label in enumerate(found.labels)
        },
        "accuracy_all": float(right.sum() / total),
        "sources": _by_source(found, right),
        "conformal": None if conformal is None else _score_conformal(conformal, found, probabilities),
        "failed": found.failed,
        "per_film": [
            {
                "id": id_,
                "group": group,
                "label": found.labels[t],
                "source": source,
                "predicted": found.labels[p],
                "probabilities": np.round(row, 5).tolist(),
            }
            for id_, group, source, t, p, row in zip(
                found.ids, found.groups, found.sources, found.truth, predicted, probabilities, strict=True
            )
        ],
    }


def _by_source(found: Predictions, right: NDArray[np.bool_]) -> dict[str, Any]:
    """Accuracy over the answered films of each source, how many of each class these are, and how many more could not be
    analysed; nothing where no source is known.

    A source of one class says how often that is recognised. In one of several, what differs between sources can not
    tell the class.
    """
    failed = Counter(row["source"] for row in found.failed)
    names = {*found.sources, *failed}
    rows: dict[str, Any] = {}
    for source in sorted(names) if any(names) else ():
        own = [i for i, name in enumerate(found.sources) if name == source]
        rows[source] = {
            "films": len(own),
            "failed": failed[source],
            "classes": {label: n for c, label in enumerate(found.labels) if (n := int((found.truth[own] == c).sum()))},
            "accuracy": float(right[own].mean()) if own else None,
            "interval": _interval(bootstrap_mean(right[own], [found.groups[i] for i in own])) if own else [None, None],
        }
    return rows


def _score_conformal(conformal: Conformal, found: Predictions, probabilities: NDArray[np.float64]) -> dict[str, Any]:
    """Measured coverage of the sets, with intervals over groups; how large they are; how right single ones are."""
    held = conformal.holds(probabilities)
    covered = held[np.arange(len(held)), found.truth]
    sizes = held.sum(1)
    answered = conformal.answers(probabilities)
    right = probabilities.argmax(1) == found.truth
    by_class = {}
    for c, label in enumerate(found.labels):
        own = np.flatnonzero(found.truth == c)
        groups = [found.groups[i] for i in own]
        by_class[label] = {
            "films": len(own),
            "coverage": metrics.or_null(float(covered[own].mean()) if own.size else float("nan")),
            "interval": _interval(bootstrap_mean(covered[own], groups)) if own.size else [None, None],
        }
    return {
        "nominal": conformal.coverage,
        "coverage": float(covered.mean()),
        "interval": _interval(bootstrap_mean(covered, found.groups)),
        "classes": by_class,
        "sizes": {str(size): int((sizes == size).sum()) for size in range(len(found.labels) + 1)},
        "answered": float(answered.mean()),
        "accuracy_answered": metrics.or_null(float(right[answered].mean()) if answered.any() else float("nan")),
    }


def score_lesions(analyzer: Analyzer, folder: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Films with disease drawn by radiologists: does what we call lung hold the disease, and does it stay inside the
    lungs?

    `folder` holds index.csv (image, patient), images/, lungs/ and a folder of masks for each finding. coverage: share
    of the drawn disease inside the predicted lungs. precision: share of the predicted lungs inside the drawn ones.
    saliency, opacity: the share of positive evidence for the predicted class, and of opacity, in the predicted lungs
    that lies on drawn disease ("on_disease"), and by how much that is more than the disease's share of these lungs,
    film by film ("above_chance").
    Intervals are over patients.
    """
    rows = _table(folder / "index.csv", {"image", "patient"})
    findings = ("ground_glass", "consolidation", "effusion")

    def truth(name: str, shape: tuple[int, int]) -> dict[str, Mask]:
        masks = {kind: folder / kind / f"{Path(name).stem}.png" for kind in ("lungs", *findings)}
        return {kind: on_grid(truth_in(path), shape) for kind, path in masks.items() if path.exists()}

    def keep(n: int, report: Report) -> dict[str, Any]:
        drawn = truth(rows[n]["image"], report.film.shape)
        if "lungs" not in drawn:
            raise DataError(f"{folder}: {rows[n]['image']} has no drawn lungs; put them in {folder / 'lungs'}")
        disease = np.zeros(report.film.shape, np.bool_)
        for kind in findings:
            disease |= drawn.get(kind, False)
        predicted = report.lungs.mask
        row: dict[str, Any] = {
            "coverage": float(metrics.coverage(predicted, disease)[0]),
            "precision": float(metrics.precision(predicted, drawn["lungs"])[0]),
            "dice": float(metrics.dice(predicted, drawn["lungs"])[0]),
            "disease_share": float(metrics.coverage(disease, predicted)[0]),
        }
        maps = {} if report.saliency is None else {"saliency": report.saliency.map}
        if (opacity := report.lungs.opacity) is not None:
            maps["opacity"] = np.where(predicted, opacity.geometry.to_source(opacity.map), np.float32(0))
        for name, found in maps.items():
            mass = float(found.sum(dtype=np.float64))
            on = float(found[disease].sum(dtype=np.float64))
            row[f"{name}_on_disease"] = on / mass if mass else float("nan")
            row[f"{name}_above_chance"] = row[f"{name}_on_disease"] - row["disease_share"]
        return row

    results = analyze_each(analyzer, [folder / "images" / row["image"] for row in rows], keep, progress)
    failed = {"coverage": 0.0, "precision": float("nan"), "dice": 0.0, "disease_share": float("nan")}
    films = [
        {
            "id": row["image"],
            "failure": _why(result, row["image"]) if isinstance(result, Failure) else None,
            **(failed if isinstance(result, Failure) else result),
        }
        for row, result in zip(rows, results, strict=True)
    ]
    patients = [row["patient"] or row["image"] for row in rows]
    scores: dict[str, Any] = {}
    for name in dict.fromkeys(name for film in films for name in film if name not in ("id", "failure")):
        values = np.array([film.get(name, np.nan) for film in films], np.float64)
        known = values[~np.isnan(values)]
        scores[name] = {
            **metrics.summarise(values).to_json(),
            "p10": float(np.percentile(known, 10)) if known.size else None,
            "interval": _interval(bootstrap_mean(values, patients)),
        }
    return {
        "films": len(films),
        "failed": sum(film["failure"] is not None for film in films),
        "scores": scores,
        "per_film": [
            {name: metrics.or_null(value) if isinstance(value, float) else value for name, value in film.items()}
            for film in films
        ],
    }


def score_severity(
    analyzer: Analyzer, folder: Path, progress: Progress | None = None, *, known: Sequence[tuple[Store, Split]] = ()
) -> dict[str, Any]:
    """Our zone scores beside Brixia scores by two radiologists: Spearman's correlation, with intervals over patients.

    known: what the networks were trained and chosen on. Films that are near-duplicates of its train and val parts are
    named in "seen", as are those that the bundle's grades were fitted on ("fitted" many), and left out of "global" and
    "zones"; "with_seen" has both for all films. Without `known` the first is not checked: "checked" is false, and where
    nothing was fitted either, "seen" and "scored" are None, and "with_seen" stands alone. "new_patients" has both for
    those of the films left whose patient is known and had none fitted on, where there are others.

    `folder` holds brixia.csv (image, patient, S-A … S-F, S-Global, J-…) and images/. Where our score is an extent,
    Brixia's is a kind of opacity, so agreement in rank is what can be asked for; the two radiologists' own agreement
    stands beside it.
    """
    rows = brixia(folder)
    runs = analyzer.bundle.manifest.get("training", {}).get("runs", [])
    fitted = {digest for run in runs for digest in run.get("severity", {}).get("films", [])}

    def keep(n: int, report: Report) -> tuple[dict[str, Any], NDArray[np.float32], bool]:
        if report.severity is None:
            raise BundleError("this bundle gives no severity")
        return report.severity.to_json(), looks(report), report.film.source.sha256 in fitted

    results = analyze_each(analyzer, [folder / "images" / row["image"] for row in rows], keep, progress)
    done = [(row, *result) for row, result in zip(rows, results, strict=True) if not isinstance(result, Failure)]
    if not done:
        raise DataError(f"{folder}: none of {len(rows)} films could be analysed; the first one: {results[0].message}")
    taught = np.array([known_film for *_, known_film in done])
    if known:
        alike = seen(np.stack([film for _, _, film, _ in done]), known) | taught
    else:
        alike = taught if taught.any() else None
    scored = [(row, result) for row, result, *_ in done]
    unseen = [] if alike is None else [scored[n] for n in np.flatnonzero(~alike)]
    taught_by = {patient_of(row) for (row, _), of_fit in zip(scored, taught, strict=True) if of_fit}
    new = [(row, result) for row, result in unseen if is_known(row) and patient_of(row) not in taught_by]
    return {
        "films": len(rows),
        "failed": [
            {"id": row["image"], "message": _why(r, row["image"])}
            for row, r in zip(rows, results, strict=True)
            if isinstance(r, Failure)
        ],
        "seen": None if alike is None else [scored[n][0]["image"] for n in np.flatnonzero(alike)],
        "checked": bool(known),
        "fitted": int(taught.sum()),
        "scored": None if alike is None else len(unseen),
        **(_agreement(unseen) if unseen else {}),
        **({"new_patients": {"scored": len(new), **_agreement(new)}} if 0 < len(new) < len(unseen) else {}),
        "with_seen": _agreement(scored),
    }


def brixia(folder: Path) -> list[dict[str, str]]:
    """The rows of `folder`/brixia.csv: image, patient, S-A … S-F, S-Global, J-…. Raises DataError for a table without
    these columns, or with a score that is no number in 0..3."""
    columns = {f"{reader}-{zone}" for reader in "SJ" for zone in (*ZONES, "Global")}
    rows = _table(folder / "brixia.csv", {"image", "patient"} | columns)
    for row in rows:
        for column in (f"{reader}-{zone}" for reader in "SJ" for zone in ZONES):
            try:
                known = 0 <= float(row[column]) <= 3
            except (TypeError, ValueError):
                known = False
            if not known:
                raise DataError(
                    f"{folder / 'brixia.csv'}: {column} of {row['image']} is {row[column]!r}; a zone's score is 0 to 3"
                )
    return rows


def is_known(row: dict[str, str]) -> bool:
    """Whether a row of `brixia` says whose film it is, and not the film's own name."""
    return bool(row["patient"]) and Path(row["patient"]).stem != Path(row["image"]).stem


def patient_of(row: dict[str, str]) -> str:
    """Whose film a row of `brixia` is; one of whom that is not known stands for itself."""
    return row["patient"] if is_known(row) else row["image"]


def scores_of(row: dict[str, str]) -> dict[str, tuple[float, ...]]:
    """The senior's and the junior's score of each zone, by letter, of a row of `brixia`."""
    return {zone: (float(row[f"S-{zone}"]), float(row[f"J-{zone}"])) for zone in ZONES}


def looks(report: Report) -> NDArray[np.float32]:
    """A film as f32 [3 + crops, 32*32], unit rows: with frames left on, letterboxed as stores hold it and squashed as
    some published sets are; without, whole and by crops."""
    pixels = report.film.pixels
    square = Geometry.letterbox(pixels.shape, max(pixels.shape)).to_network(pixels)
    boxed, grey = (np.rint(form * 255).astype(np.uint8)[None] for form in (square, pixels))
    framed = [thumbnails(form, framed=True) for form in (boxed, grey)]
    return np.concatenate([*framed, *(thumbnails(grey, crop) for crop in (0.0, *CROPS))])


def seen(thumbs: NDArray[np.float32], known: Sequence[tuple[Store, Split]]) -> NDArray[np.bool_]:
    """Which of N films, as `looks` gives them, f32 [N, 3 + crops, 32*32], are near-duplicates of a film of the train
    and val parts of `known`."""
    found = np.zeros(len(thumbs), np.bool_)
    for store, split in known:
        images = store.images[[i for part in ("train", "val") for i in split.select(store, part)]]
        found |= (thumbs[:, :2] @ thumbnails(images, framed=True).T > NEAR_DUPLICATE).any((1, 2))
        found |= (thumbs[:, 2:] @ thumbnails(images).T > NEAR_DUPLICATE).any((1, 2))
        for crop in CROPS:
            found |= (thumbs[:, 2] @ thumbnails(images, crop).T > NEAR_DUPLICATE).any(1)
    return found


def _agreement(done: Sequence[tuple[dict[str, str], dict[str, Any]]]) -> dict[str, Any]:
    """Rank correlation of us and the two readers of each other, over films ("global") and over zones. defined: how many
    of these have both scores; a zone without lung has none of ours, nor has its film."""
    patients = [patient_of(row) for row, _ in done]
    nan = float("nan")
    ours = np.array([[_score(result, zone) for zone in ZONES] for _, result in done], np.float64)
    total = np.array([nan if result["global"] is None else result["global"] for _, result in done], np.float64)
    theirs = {r: np.array([[float(row[f"{r}-{zone}"]) for zone in ZONES] for row, _ in done]) for r in "SJ"}

    def rank(x: NDArray[np.float64], y: NDArray[np.float64]) -> dict[str, Any]:
        return {
            "defined": int((~np.isnan(x) & ~np.isnan(y)).sum()),
            "spearman": metrics.or_null(metrics.spearman(x.ravel(), y.ravel())),
            "interval": _interval(
                bootstrap(lambda i: metrics.spearman(x[i].ravel(), y[i].ravel()), patients, resamples=1000)
            ),
        }

    return {
        "global": {
            "ours_senior": rank(total, theirs["S"].sum(1)),
            "ours_junior": rank(total, theirs["J"].sum(1)),
            "senior_junior": rank(theirs["S"].sum(1), theirs["J"].sum(1)),
        },
        "zones": {
            "ours_senior": rank(ours, theirs["S"]),
            "ours_junior": rank(ours, theirs["J"]),
            "senior_junior": rank(theirs["S"], theirs["J"]),
        },
    }


def _score(severity: dict[str, Any], zone: str) -> float:
    value = severity["zones"][zone]
    return float("nan") if value is None else float(value["score"])


def _why(failure: Failure, name: str) -> str:
    """A failure's message with the film called as its set calls it: where the set lies is no part of a result."""
    return failure.message.replace(str(failure.path), name)


def _table(path: Path, columns: set[str]) -> list[dict[str, str]]:
    try:
        with path.open(newline="") as stream:
            reader = csv.DictReader(stream)
            missing = columns - set(reader.fieldnames or ())
            if missing:
                raise DataError(f"{path}: columns {', '.join(sorted(missing))} are missing")
            return list(reader)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}. Name the folder that holds it") from error


def _interval(interval: Any) -> list[float | None]:
    return list(interval.ends)
