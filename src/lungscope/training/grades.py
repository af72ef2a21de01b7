"""Fit a map of grades to a segmenter: how ill a zone looks, from few films with radiologists' scores (stage 5).

A segmenter that learnt where lungs end and what hides their air sees what a reader of a zone looks at. Which of what it
sees, and how much of it, is a linear question that some dozen scored films answer: one weight for each channel of each
level of its encoder, by ridge regression (Hoerl & Kennard 1970), which makes it a linear probe (Alain & Bengio 2016).
Neither lungs nor opacity change by it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lungscope.bundle import Bundle
from lungscope.data.split import Split
from lungscope.data.store import Store
from lungscope.errors import BundleError, DataError
from lungscope.evaluation import metrics, scoring
from lungscope.evaluation.calibration import HEALTHY
from lungscope.hardware import cores
from lungscope.pipeline import Analyzer
from lungscope.radiograph import Geometry
from lungscope.report import Failure, Report
from lungscope.stages.severity import NORMAL, zone_masks
from lungscope.training.augment import random_tone
from lungscope.training.export import Trained
from lungscope.training.networks import GRADE, Graded, build_segmenter
from lungscope.training.recipe import Augment
from lungscope.training.weights import load_weights, refuse_filled, refuse_other_parts, save_weights

log = logging.getLogger(__name__)

Floats = NDArray[np.float64]

#: Of the ridge, in units of the zones' weight, on features of unit variance. From 0.1 to 1 little changes.
PENALTY = 0.3
#: Of films of the class Normal, evenly from a part, at least so many if there are, and fewer than twice that. Those of
#: the train parts stand for grade 0, and so much do they count beside the scored ones. Without them a score of 0 is
#: learnt from films alone that were scored since they were ill.
HEALTHY_FILMS = 240
HEALTHY_SHARE = 0.3
#: A film is shown as it is, mirrored, and so many times with another exposure.
TONES = 2
TONE = Augment(gamma=0.6, contrast=0.25, brightness=0.1)
#: Parts of the patients, of which each is graded by what the others teach.
FOLDS = 10


class _Zone(NamedTuple):
    """features: f64 [C], the mean over the zone of every channel. scores: by each reader, 0..3; of a healthy film 0.
    plain: whether the film is shown as it is."""

    film: int
    patient: str
    features: Floats
    scores: tuple[float, ...]
    plain: bool


@dataclass(frozen=True)
class _Seen:
    """A film as the network is shown it, f32 [S, S] in 0..1, and the share that each place has of a zone, f32 [S, S] by
    letter, with the sum 1."""

    image: NDArray[np.float32]
    zones: dict[str, NDArray[np.float32]]


def fit_grades(
    bundle: Bundle,
    scores: Path,
    data: list[tuple[Store, Split]],
    folder: Path,
    *,
    leave_unseen: bool = False,
    seed: int = 0,
) -> Path:
    """Fit grades to the one segmenter of `bundle` and write it with them to `folder`/weights.safetensors.

    scores: a folder with brixia.csv and images/, as `scoring.score_severity` takes it; both radiologists' scores count.
    data: films of the class Normal of the train parts stand for grade 0, those of the val parts say from which grade on
    a zone scores 1. leave_unseen: fit on films alone that are near-duplicates of the train and val parts, and leave the
    others to measure on.
    Beside the weights stand the limits of the scores, which films were fitted on, and how well films of patients who
    were left out were graded. Raises BundleError for an ensemble, DataError where too few films are left to fit on,
    RecipeError where the segmenter was trained with other val or test parts, or where `folder` holds something.
    """
    refuse_filled(folder)
    if len(bundle.segmenter.members) != 1:
        raise BundleError(
            f"bundle {bundle.name!r} has {len(bundle.segmenter.members)} segmenters; grades are fitted to the encoder "
            "of one. Export that alone"
        )
    member = bundle.segmenter.members[0]
    refuse_other_parts(member.path, data)
    network = build_segmenter(member.network.removesuffix(GRADE) + GRADE)
    assert isinstance(network, Graded)
    load_weights(network, member.path)
    network.eval()
    analyzer = Analyzer(bundle, precision="f32", streams=cores())
    torch.manual_seed(seed)

    rows, films, digests = _scored(analyzer, scores, data, leave_unseen)
    patients = [scoring.patient_of(row) for row in rows]
    ill = [
        zone
        for n, (row, patient, film) in enumerate(zip(rows, patients, films, strict=True))
        for zone in _zones(network, film, n, patient, scoring.scores_of(row))
    ]
    clear = {
        part: [
            zone
            for n, film in enumerate(_healthy(analyzer, data, part))
            for zone in _zones(network, film, n, "", None, shown=("plain",) if part == "val" else ("plain", "mirrored"))
        ]
        for part in ("train", "val")
    }
    log.info("%d scored films, %d zones of healthy ones", len(films), sum(zone.plain for zone in clear["train"]))
    weights, bias = _ridge(ill, clear["train"])
    left_out = _cross_validated(ill, clear["train"])
    limits = _limits(left_out, [float(zone.features @ weights) + bias for zone in clear["val"]])
    _put(network, weights, bias)

    trained = Trained.of_bundle(bundle)[0]
    # The digest in a bundle's facts is of the run that it was first exported from.
    about = {name: fact for name, fact in trained.facts.items() if name not in ("epoch", "weights_sha256")}
    facts = {
        **about,
        "network": member.network.removesuffix(GRADE) + GRADE,
        "grades": list(limits),
        # What a classifier was trained on that saw the lungs of these graphs.
        "same_lungs": [*about.get("same_lungs", []), member.sha256],
        "severity": {
            "fitted_to": trained.facts.get("weights_sha256", member.sha256),
            "films": digests,
            "patients": len(set(patients)),
            "healthy": {part: len({zone.film for zone in zones}) for part, zones in clear.items()},
            "penalty": PENALTY,
            "seed": seed,
        },
        "metrics": {**about.get("metrics", {}), **_agreement(left_out)},
    }
    path = folder / "weights.safetensors"
    save_weights(network, path, facts)
    return path


def _scored(
    analyzer: Analyzer, folder: Path, data: Sequence[tuple[Store, Split]], leave_unseen: bool
) -> tuple[list[dict[str, str]], list[_Seen], list[str]]:
    """The scored films that are fitted on: their rows, what is shown of them, and their SHA-256."""

    def keep(n: int, report: Report) -> tuple[_Seen, NDArray[np.float32], str]:
        return _seen(report, analyzer.bundle.segmenter.size), scoring.looks(report), report.film.source.sha256

    rows = scoring.brixia(folder)
    results = scoring.analyze_each(analyzer, [folder / "images" / row["image"] for row in rows], keep)
    found = []
    for row, result in zip(rows, results, strict=True):
        if isinstance(result, Failure):
            log.warning("%s", result.message)
        elif result[0].zones:
            found.append((row, *result))
    if found and leave_unseen:
        seen = scoring.seen(np.stack([looks for _, _, looks, _ in found]), data)
        found = [film for film, known in zip(found, seen, strict=True) if known]
    patients = {scoring.patient_of(row) for row, *_ in found}
    if len(patients) < FOLDS:
        raise DataError(
            f"{folder}: scored films of {len(patients)} patients are left to fit on; {FOLDS} patients are needed"
            + (". Without --leave-unseen all films are fitted on" if leave_unseen else "")
        )
    return [row for row, *_ in found], [film for _, film, *_ in found], [digest for *_, digest in found]


def _healthy(analyzer: Analyzer, data: Sequence[tuple[Store, Split]], part: str) -> list[_Seen]:
    """Films of the class Normal, evenly from one part. Raises DataError where no zone of any is found."""
    paths = [
        store.path_of(record)
        for store, split in data
        for record in (store.records[i] for i in split.select(store, part))
        if record.label == NORMAL
    ]
    chosen = paths[:: max(1, len(paths) // HEALTHY_FILMS)]
    size = analyzer.bundle.segmenter.size
    results = scoring.analyze_each(analyzer, chosen, lambda n, report: _seen(report, size))
    for result in results:
        if isinstance(result, Failure):
            log.warning("%s", result.message)
    found = [result for result in results if not isinstance(result, Failure) and result.zones]
    if not found:
        raise DataError(
            f"of {len(chosen)} {part} films of the class {NORMAL}, which stand for grade 0, none shows a lung zone. "
            "Give stores and splits that have such films, where their files are"
        )
    return found


def _seen(report: Report, size: int) -> _Seen:
    geometry = Geometry.of_film(report.film.pixels, size)
    shares = {letter: geometry.to_network(mask.astype(np.float32)) for letter, mask in zone_masks(report.lungs).items()}
    return _Seen(
        geometry.to_network(report.film.pixels),
        {letter: share / share.sum() for letter, share in shares.items() if share.sum()},
    )


def _zones(
    network: Graded,
    film: _Seen,
    number: int,
    patient: str,
    scores: dict[str, tuple[float, ...]] | None,
    shown: Sequence[str] = ("plain", "mirrored", *["toned"] * TONES),
) -> Iterator[_Zone]:
    """The zones of a film as it is, mirrored, and with other exposures. scores: by letter; None where all are 0."""
    plain = torch.from_numpy(film.image)[None, None]
    for how in shown:
        image = plain.flip(3) if how == "mirrored" else random_tone(plain, TONE) if how == "toned" else plain
        places = {
            letter: torch.from_numpy(np.ascontiguousarray(share[:, ::-1]) if how == "mirrored" else share)
            for letter, share in film.zones.items()
        }
        for letter, features in zip(places, _features(network, image, list(places.values())), strict=True):
            yield _Zone(number, patient, features, (0.0,) if scores is None else scores[letter], how == "plain")


def _features(network: Graded, image: Tensor, places: Sequence[Tensor]) -> Iterator[Floats]:
    """What a grade is the weighted sum of, f64 [C], for each place f32 [S, S] that shares sum to 1 over.

    The head is linear in its weights: the derivative by each is what it is multiplied with.
    """
    with torch.no_grad():
        found = network.encoder(image)[1:]
    head = network.grade_head
    grade = head(found)[0, 0]
    for place in places:
        by_level = torch.autograd.grad((grade * place).sum(), head.weights, retain_graph=True)
        yield torch.cat([part.flatten() for part in by_level]).double().numpy()


def _ridge(ill: Sequence[_Zone], clear: Sequence[_Zone]) -> tuple[Floats, float]:
    """Weights f64 [C] and bias of the grade: the mean of the readers' scores on `ill`, 0 on `clear`."""
    zones = [*ill, *clear]
    x = np.stack([zone.features for zone in zones])
    y = np.array([np.mean(zone.scores) for zone in zones])
    w = np.concatenate([np.full(len(ill), 1 / len(ill)), np.full(len(clear), HEALTHY_SHARE / len(clear))])
    w /= w.sum()
    mean = w @ x
    spread = np.sqrt(w @ (x - mean) ** 2) + 1e-6
    z, level = (x - mean) / spread, float(w @ y)
    weighted = z * w[:, None]
    weights = np.linalg.solve(weighted.T @ z + PENALTY * np.eye(z.shape[1]), weighted.T @ (y - level)) / spread
    return weights, level - float(mean @ weights)


def _cross_validated(ill: Sequence[_Zone], clear: Sequence[_Zone]) -> list[tuple[_Zone, float]]:
    """Each zone of a film as it is, with the grade that films of other patients teach."""
    patients = sorted({zone.patient for zone in ill})
    graded = []
    for fold in range(FOLDS):
        out = set(patients[fold::FOLDS])
        weights, bias = _ridge([zone for zone in ill if zone.patient not in out], clear)
        graded += [(zone, float(zone.features @ weights) + bias) for zone in ill if zone.patient in out and zone.plain]
    return graded


def _limits(graded: Sequence[tuple[_Zone, float]], healthy: Sequence[float]) -> tuple[float, float, float]:
    """From which grade on a zone scores 1, 2 and 3: where as many zones of left-out patients do as readers gave these
    scores to; for 1, where `HEALTHY` of the healthy zones stay below, too."""
    grades = [grade for _, grade in graded]
    given = np.array([zone.scores for zone, _ in graded])
    matched = [float(np.quantile(grades, 1 - np.mean(given >= score))) for score in (1, 2, 3)]
    one = max(matched[0], float(np.quantile(healthy, HEALTHY, method="higher")))
    two = max(matched[1], one + 0.01)
    return round(one, 3), round(two, 3), round(max(matched[2], two + 0.01), 3)


def _agreement(graded: Sequence[tuple[_Zone, float]]) -> dict[str, float]:
    """Spearman's correlation of grades with the first reader, the senior one, over zones and over films' sums."""
    first = np.array([zone.scores[0] for zone, _ in graded])
    grades = np.array([grade for _, grade in graded])
    film = np.array([zone.film for zone, _ in graded])
    sums = [(first[film == n].sum(), grades[film == n].sum()) for n in np.unique(film)]
    return {
        "zones_spearman": float(metrics.spearman(first, grades)),
        "films_spearman": float(metrics.spearman(*np.array(sums).T)),
        "zones_mean_absolute_error": float(np.abs(first - grades).mean()),
    }


def _put(network: Graded, weights: Floats, bias: float) -> None:
    head = network.grade_head
    with torch.no_grad():
        for own in head.weights:
            own.copy_(torch.from_numpy(weights[: own.numel()]).view_as(own))
            weights = weights[own.numel() :]
        head.bias.fill_(bias)
