"""A benchmark's cells as files, and what they say together: the paper's Tables 1 to 4 with intervals beside them.

A cell is one network trained under one budget and measured through the path that ships. Its result is one JSON file
that is never changed; cells from several machines are merged by copying files into one folder.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lungscope.data.layouts import radiography_source
from lungscope.errors import DataError
from lungscope.evaluation.bootstrap import Interval, bootstrap, bootstrap_mean
from lungscope.evaluation.comparison import mcnemar, mixed_sources, paired, signed
from lungscope.evaluation.metrics import ece, ece_by_chance
from lungscope.stages.classification import INPUT_NAMES, INPUTS, Input
from lungscope.statistics import number, or_null, with_interval

SCHEMA_VERSION = "1"
TIMES = "latency.json"
TIMES_SCHEMA = "1"

Kind = Literal["segmentation", "classification"]

#: Paper, Tables 1-3: binary_accuracy, dice_coef and iou_score of each segmenter, in the paper's order.
PAPER_SEGMENTERS = {
    "unet-mobilenetv2": (0.7585, 0.5252, 0.7511),
    "unet-seresnext50": (0.9886, 0.9757, 0.9941),
    "unet-inceptionresnetv2": (0.9906, 0.9794, 0.995),
    "unet-efficientnetb2": (0.9894, 0.9769, 0.9945),
    "unet-vgg16": (0.9282, 0.7714, 0.9403),
    "linknet-mobilenetv2": (0.6167, 0.4094, 0.7271),
    "linknet-seresnext50": (0.9967, 0.9925, 0.9981),
    "linknet-inceptionresnetv2": (0.998, 0.9946, 0.9985),
    "linknet-efficientnetb2": (0.9905, 0.9794, 0.995),
    "linknet-vgg16": (0.989, 0.969, 0.9907),
    "fpn-mobilenetv2": (0.6587, 0.4794, 0.7374),
    "fpn-seresnext50": (0.998, 0.9946, 0.9985),
    "fpn-inceptionresnetv2": (0.9913, 0.9818, 0.9955),
    "fpn-efficientnetb2": (0.9920, 0.9826, 0.9957),
    "fpn-vgg16": (0.9911, 0.972, 0.9917),
}

#: Paper, Table 4: loss and accuracy on validation, loss and accuracy on test. Its last row is named
#: "InceptionResNet50"; the text says InceptionResNetV2.
PAPER_CLASSIFIERS = {
    "coatnet0": (0.159, 0.958, 0.144, 0.9549),
    "xception": (0.182, 0.9563, 0.220, 0.9380),
    "resnet50": (0.182, 0.9311, 0.220, 0.9264),
    "inceptionresnetv2": (0.193, 0.9481, 0.197, 0.9387),
}

TITLES = {"unet": "Table 1: U-Net", "linknet": "Table 2: LinkNet", "fpn": "Table 3: FPN"}

#: Of these two stores alone.
_OTHER_FILMS = (
    "The paper's data set has three classes. Here Viral Pneumonia films have masks; those of the other classes are not "
    "at hand, and Shenzhen's films (tuberculosis and normal, adults) stand in their place."
)
_OTHER_STORES = {"radiography", "shenzhen"}
SEGMENTATION_NOTES = (
    "The paper's IoU is above its Dice in every row. For one pair of masks Dice = 2 IoU / (1 + IoU) is never below "
    "IoU, so that its two columns were not computed as they are here (strict, for each film, then averaged).",
    "The paper does not say how it parted its films, some of which are duplicates of one another. Here no duplicate "
    "group that was found is on two sides; no film says who the patient is.",
    _OTHER_FILMS,
    "A network was trained once for each seed. Intervals say how far other films would move a score, and not how far "
    "another training would: one network's lead over another is that of these two trainings.",
)
_COUNTED = "A film that could not be analysed counts as wrong."
CLASSIFICATION_NOTES = (
    "The paper does not say how it parted its films, some of which are duplicates of one another. Here no duplicate "
    "group that was found is on two sides; no film says who the patient is.",
    "The paper's lungs were found by its ensemble; here by one segmenter, whose SHA-256 is in every cell.",
    "In this data class, source and age go together. What a network reads from the background is not about lungs; "
    "where the background alone is told as well as the lungs, accuracy on this data does not show that lungs were "
    "read.",
    "A network was trained once for each seed and input. Intervals and tests say how far other films would move a "
    "score, and not how far another training would.",
)


@dataclass(frozen=True)
class Cell:
    """One place of a grid. network: "ensemble" for pooled segmenters, whose `variant` is then how they are pooled."""

    kind: Kind
    network: str
    seed: int
    variant: str | None = None
    input: str | None = None

    @property
    def name(self) -> str:
        """The file's stem. A variant's input is the variant's own and not in the name."""
        shown = self.input if self.variant is None else None
        parts = (self.network, self.variant, shown if self.kind == "classification" else None, f"seed{self.seed}")
        return "-".join(part for part in parts if part)


@dataclass(frozen=True)
class Table:
    """A table to be read: rows of text, one entry a column."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def load_cells(folder: Path, kind: Kind) -> list[dict[str, Any]]:
    """The results in `folder`, in the order of the paper's tables.

    Raises DataError where there is none, where a file is no result, or where results can not stand in one table:
    another budget, other parts, other labels or masks, lungs found otherwise.
    """
    cells = []
    for path in sorted(folder.glob("*.json")):
        try:
            cell = json.loads(path.read_text(encoding="utf-8"))
            known = cell["schema_version"] == SCHEMA_VERSION and cell["kind"] == kind
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path} is no benchmark result ({error}). Remove it, or run its cell again") from error
        if not known:
            raise DataError(
                f"{path}: kind {cell['kind']!r}, schema {cell['schema_version']!r}; here {kind!r}, {SCHEMA_VERSION!r}. "
                "Remove it, or run its cell again"
            )
        cells.append(cell)
    if not cells:
        raise DataError(f"{folder}: no results. Make some: lungscope benchmark {kind} --budget … --data … --split …")
    for what in ("budget", "parts", "truth", "segmenter", "lungs"):
        known = [(identity(cell)[what], cell["name"]) for cell in cells]
        digests = {json.dumps(value): name for value, name in known if value is not None}
        if len(digests) > 1:
            raise DataError(
                f"{folder}: results differ in {what}: {', '.join(sorted(digests.values()))}. Keep cells of one "
                "budget and one "
                "split in a folder"
            )
    names = [row["store"] for row in cells[0].get("stores", ())]
    for cell in cells[1:]:
        own = {row["store"]: row for row in cell.get("stores", ())}
        if sorted(own) != sorted(names):
            raise DataError(
                f"{folder}: {cell['name']} is of the stores {', '.join(sorted(own))}, {cells[0]['name']} of "
                f"{', '.join(sorted(names))}. Keep results of the same stores in a folder"
            )
        if names:
            cell["stores"] = [own[name] for name in names]
    return sorted(cells, key=_order)


@dataclass(frozen=True)
class Times:
    """What `lungscope benchmark latency` measured. ms: median of one film, by network; of an ensemble, its members'
    one after the other. facts: how and where, in words."""

    ms: dict[str, float]
    facts: str

    def of(self, cell: dict[str, Any]) -> float | None:
        """Milliseconds of a cell's networks; None where one was not timed."""
        known = [self.ms.get(name) for name in cell["members"] or [cell["network"]]]
        return None if None in known else sum(ms for ms in known if ms is not None)


def load_times(folder: Path, kind: Kind) -> Times | None:
    """The times beside the results in `folder`; None where they were not measured. Raises DataError for another
    file."""
    path = folder / TIMES
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["schema_version"] != TIMES_SCHEMA:
            raise ValueError(f"schema {found['schema_version']!r}, here {TIMES_SCHEMA!r}")
        rows, hardware = found["ms"][kind], found["hardware"]
        calls = min(row["calls"] for row in rows.values())
        facts = (
            f"One film in the network: median of {calls} calls, all networks in turn, at {found['sizes'][kind]}², "
            f"{found['precision']}, {hardware['cores']} cores of {hardware['processor']}, commit "
            f"{(found['commit'] or 'unknown')[:12]}; an ensemble's is the sum of its members'."
        )
        return Times({name: float(row["median"]) for name, row in rows.items()}, facts)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} holds no times ({error}). Remove it, or run `lungscope benchmark latency`") from error


def identity(cell: dict[str, Any]) -> dict[str, Any]:
    """What a result is the result of; two that agree in it are the same cell of the same grid. truth, and lungs,
    which says how a segmenter's map becomes lungs: None in results of before, which do not say."""
    what = ("schema_version", "kind", "name", "network", "variant", "changes", "seed", "input", "crop", "members")
    made = ("segmenter", "parts")
    return {
        **{key: cell[key] for key in what + made},
        "truth": cell.get("truth"),
        "lungs": cell.get("lungs"),
        "view": _view(cell),
        "budget": [cell["budget"]["name"], cell["budget"]["sha256"]],
    }


def _view(cell: dict[str, Any]) -> tuple[bool, bool]:
    """Whether what was shown was equalised, and aligned; results of before do not say."""
    return bool(cell.get("equalised", False)), bool(cell.get("aligned", False))


def _order(cell: dict[str, Any]) -> tuple[Any, ...]:
    networks = [*PAPER_SEGMENTERS, *PAPER_CLASSIFIERS]
    place = networks.index(cell["network"]) if cell["network"] in networks else len(networks)
    shown = INPUTS.index(cell["input"]) if cell.get("input") else 0
    return (place, cell["variant"] is not None, cell["variant"] or "", shown, cell["seed"])


def tables(cells: Sequence[dict[str, Any]], kind: Kind, times: Times | None = None) -> list[Table]:
    """What the results say, as tables to be read."""
    times = times or Times({}, "")
    return list(_segmentation_tables(cells, times) if kind == "segmentation" else _classification_tables(cells, times))


def notes(cells: Sequence[dict[str, Any]], kind: Kind) -> list[str]:
    """Where the paper's numbers and these can not be compared, and why."""
    if kind == "classification":
        return list(CLASSIFICATION_NOTES)
    here = {row["store"] for cell in cells for row in cell["stores"]} == _OTHER_STORES
    return [note for note in SEGMENTATION_NOTES if here or note != _OTHER_FILMS]


def budget(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The budget of results that `load_cells` gave, in the words of the latest."""
    latest: dict[str, Any] = max(cells, key=lambda cell: str(cell.get("created", "")))["budget"]
    return latest


def summary(cells: Sequence[dict[str, Any]], kind: Kind) -> dict[str, Any]:
    """The results as numbers, without films: what a table or a plot of one's own is made from."""
    rows = [
        {key: value for key, value in _without_films(cell).items() if key not in ("budget", "parts")} for cell in cells
    ]
    document: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "budget": budget(cells),
        "parts": cells[0]["parts"],
        "notes": notes(cells, kind),
        "cells": rows,
    }
    if kind == "classification":
        document["mcnemar"] = [pair.to_json() for pair in _pairs(cells)]
    return document


def _without_films(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_films(item) for key, item in value.items() if key not in ("per_film", "worst")}
    return [_without_films(item) for item in value] if isinstance(value, list) else value


# Segmentation ---------------------------------------------------------------------------------------------------------


def _segmentation_tables(cells: Sequence[dict[str, Any]], times: Times) -> Iterable[Table]:
    plain = [cell for cell in cells if cell["variant"] is None]
    stores = [row["store"] for row in cells[0]["stores"]]
    for decoder, title in TITLES.items():
        rows = [_paper_row(cell) for cell in plain if cell["network"].startswith(f"{decoder}-")]
        columns = ("backbone", "paper: accuracy", "paper: Dice", "paper: IoU")
        first = stores[0]
        ours = (f"{first}: accuracy", f"{first}: Dice [95 %]", f"{first}: IoU", "Dice, ours − paper")
        others = tuple(f"{store}: Dice [95 %]" for store in stores[1:])
        if rows:
            yield Table(title, (*columns, *ours, *others), tuple(rows))
    if plain:
        yield _ranking(plain, stores[0], times)
    if pooled := [cell for cell in cells if cell["network"] == "ensemble"]:
        members = [cell for cell in plain if cell["network"] in pooled[0]["members"]]
        yield _ensemble(pooled, members, stores, times)
    if varied := [cell for cell in cells if cell["variant"] is not None and cell["network"] != "ensemble"]:
        yield _variants(varied, plain, stores)


def _paper_row(cell: dict[str, Any]) -> tuple[str, ...]:
    accuracy, dice, iou = PAPER_SEGMENTERS[cell["network"]]
    first, *others = cell["stores"]
    scores = first["scores"]
    mean = scores["dice"]["mean"]
    return (
        label_of(cell).partition("-")[2],
        *(number(value) for value in (accuracy, dice, iou)),
        number(scores["binary_accuracy"]["mean"]),
        _with_span(scores["dice"]),
        number(scores["iou"]["mean"]),
        f"{mean - dice:+.4f}",
        *(_with_span(store["scores"]["dice"]) for store in others),
    )


def _ranking(cells: Sequence[dict[str, Any]], store: str, times: Times) -> Table:
    """All networks by Dice, each with its distance from the first, on the same films."""
    ranked = sorted(cells, key=lambda cell: -cell["stores"][0]["scores"]["dice"]["mean"])
    rows = []
    for cell in ranked:
        scores = cell["stores"][0]["scores"]
        rows.append(
            (
                label_of(cell),
                _with_span(scores["dice"]),
                "–" if cell is ranked[0] else _paired(cell, ranked[0]),
                number(scores["dice"]["p5"]),
                number(scores["hd95"]["mean"], 1),
                f"{cell['parameters'] / 1e6:.1f}",
                _ms(times.of(cell)),
                f"{cell['training']['seconds'] / 60:.0f}",
                _kilojoules(cell),
            )
        )
    columns = (
        "network",
        "Dice [95 %]",
        "Dice, less the first one's [95 %]",
        "5th percentile",
        "HD95, px",
        "parameters, millions",
        "one film, ms",
        "training, minutes",
        "training, kJ",
    )
    note = (
        "Differences are over the same films, with bootstrap intervals over duplicate groups; where an interval holds "
        "0 the two are not told apart. Training times are of the machine that ran the cell, which differ and did other "
        "work meanwhile: they compare no more than roughly. Energy is that machine's, where its processors or GPUs "
        "count it."
    )
    return Table(f"All networks on {store}, by Dice", columns, tuple(rows), note)


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _kilojoules(cell: dict[str, Any]) -> str:
    """Of processors and GPUs, what was counted."""
    counted = [joules for joules in (cell["training"].get("joules") or {}).values() if joules is not None]
    return f"{sum(counted) / 1e3:.1f}" if counted else "–"


def _paired(cell: dict[str, Any], first: dict[str, Any]) -> str:
    mine, theirs = (
        {row["id"]: (row["dice"], row["group"]) for row in side["stores"][0]["per_film"]} for side in (cell, first)
    )
    return _signed(paired(mine, theirs))


def _ensemble(
    pooled: Sequence[dict[str, Any]], members: Sequence[dict[str, Any]], stores: Sequence[str], times: Times
) -> Table:
    rows = []
    for cell in [*members, *pooled]:
        values = [label_of(cell)]
        for store in cell["stores"]:
            scores = store["scores"]
            values += [_with_span(scores["dice"]), _with_span(scores["coverage"]), number(scores["precision"]["mean"])]
        rows.append((*values, f"{cell['parameters'] / 1e6:.1f}", _ms(times.of(cell))))
    columns = tuple(
        f"{store}: {what}" for store in stores for what in ("Dice [95 %]", "recall of lung [95 %]", "precision")
    )
    note = (
        "The paper pools to 'maximise the segmented image area': recall of lung is the share of the drawn lungs that "
        "is found; what a union wins there it can lose in precision."
    )
    return Table(
        "The ensemble and its members",
        ("network", *columns, "parameters, millions", "one film, ms"),
        tuple(rows),
        note,
    )


def _variants(varied: Sequence[dict[str, Any]], plain: Sequence[dict[str, Any]], stores: Sequence[str]) -> Table:
    networks = list(dict.fromkeys(cell["network"] for cell in varied))
    rows, reasons = [], {}
    for network in networks:
        for cell in (cell for cell in [*plain, *varied] if cell["network"] == network):
            reasons[cell["variant"]] = cell["reason"]
            rows.append(
                (
                    label_of(cell),
                    cell["variant"] or "as in the grid",
                    number(PAPER_SEGMENTERS[network][1]),
                    *(_with_span(store["scores"]["dice"]) for store in cell["stores"]),
                )
            )
    note = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if name) + "."
    columns = ("network", "variant", "paper: Dice", *(f"{store}: Dice [95 %]" for store in stores))
    return Table("One thing changed", columns, tuple(rows), note)


# Classification -------------------------------------------------------------------------------------------------------


def _classification_tables(cells: Sequence[dict[str, Any]], times: Times) -> Iterable[Table]:
    plain = [cell for cell in cells if cell["variant"] is None]
    lungs = [cell for cell in plain if cell["input"] == "lungs"]
    if lungs:
        yield _paper_table(lungs)
        yield _more(lungs, times)
        yield _by_class(lungs)
    if len({cell["input"] for cell in plain}) > 1:
        yield _controls(plain)
        yield from _within_sources(plain)
    if pairs := list(_pairs(cells)):
        rows = tuple(
            (p.first, p.second, str(p.films), str(p.only_first), str(p.only_second), f"{p.p:.2g}") for p in pairs
        )
        columns = ("network", "other", "n", "only the one is right", "only the other is right", "p")
        note = (
            "McNemar's test, exact for films that are independent of each other, two-sided, on the films of the test "
            "part; not corrected for the number of pairs, nor for films of one group, which are not independent."
        )
        yield Table("Pairs of networks, lungs alone", columns, rows, note)
    if varied := [cell for cell in cells if cell["variant"] is not None]:
        yield from _classifier_variants(varied, plain)


def _paper_table(cells: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for cell in cells:
        val_loss, val_accuracy, test_loss, test_accuracy = PAPER_CLASSIFIERS[cell["network"]]
        val, test = cell["val"], cell["test"]
        rows.append(
            (
                label_of(cell),
                *(number(value) for value in (val_loss, val_accuracy, test_loss, test_accuracy)),
                number(val["log_loss"]),
                number(val["accuracy"]),
                number(test["uncalibrated"]["log_loss"]),
                _accuracy(cell),
                f"{_share_right(cell).value - test_accuracy:+.4f}",
            )
        )
    names = ("validation loss", "validation accuracy", "test loss")
    columns = (
        "network",
        *(f"paper: {name}" for name in (*names, "test accuracy")),
        *names,
        "test accuracy [95 %]",
        "test accuracy, ours − paper",
    )
    note = f"Losses are before calibration. {_COUNTED}"
    return Table("Table 4: classifiers on the lungs alone", columns, tuple(rows), note)


def _more(cells: Sequence[dict[str, Any]], times: Times) -> Table:
    rows = tuple(
        (
            label_of(cell),
            with_interval(test["macro_f1"], test["intervals"]["macro_f1"]),
            with_interval(test["macro_auc"], test["intervals"]["macro_auc"]),
            number(test["uncalibrated"]["ece"]),
            *_ece(test),
            number(test["temperature"], 2),
            f"{test['conformal']['coverage']:.3f}",
            str(len(test["failed"])),
            f"{cell['parameters'] / 1e6:.1f}",
            _ms(times.of(cell)),
            f"{cell['training']['seconds'] / 60:.0f}",
        )
        for cell in cells
        for test in [cell["test"]]
    )
    columns = (
        "network",
        "macro-F1 [95 %]",
        "macro AUC [95 %]",
        "ECE before",
        "ECE after [95 %]",
        "ECE by chance",
        "temperature",
        "coverage of 95 % sets",
        "films failed",
        "parameters, millions",
        "one film, ms",
        "training, minutes",
    )
    note = (
        "ECE in 15 bins, before and after temperature scaling; temperature and sets were fitted on the validation "
        "part. Chance makes ECE larger: its intervals are corrected for that, by twice what drawing films again adds, "
        "and beside it stands what chance alone would give, the median and what one of twenty is above."
    )
    return Table("Further scores on the test part, lungs alone", columns, rows, note)


def _ece(test: dict[str, Any]) -> tuple[str, str]:
    films = test["per_film"]
    labels = list(test["classes"])
    truth = np.array([labels.index(film["label"]) for film in films], np.int64)
    probabilities = np.array([film["probabilities"] for film in films])
    groups = [film["group"] for film in films]
    found = bootstrap(lambda i: ece(truth[i], probabilities[i]), groups, resamples=500, corrected=True)
    median, high = ece_by_chance(probabilities)
    return with_interval(test["ece"], found.ends), f"{number(median)}, {number(high)}"


def _by_class(cells: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for cell in cells:
        test = cell["test"]
        for label, scores in test["classes"].items():
            spans = test["class_intervals"][label]
            values = (with_interval(scores[name], spans[name]) for name in ("sensitivity", "specificity", "f1"))
            rows.append((label_of(cell), label, str(scores["films"]), *values))
    columns = ("network", "class", "n", "sensitivity [95 %]", "specificity [95 %]", "F1 [95 %]")
    return Table("By class, lungs alone", columns, tuple(rows))


def _controls(cells: Sequence[dict[str, Any]]) -> Table:
    note = (
        "One budget for all. A background that tells as much as the lungs means that what is learnt easily on this "
        f"data is not about lungs. {_COUNTED}"
    )
    return _seen("What the networks see: lungs, film, background", cells, note)


def _within_sources(cells: Sequence[dict[str, Any]]) -> Iterable[Table]:
    """For each source that has films of several classes, what tells them apart there."""
    for source, labels in _mixed_sources(cells).items():
        films = sum(_source(film) == source for film in cells[0]["test"]["per_film"])
        note = (
            f"The {films} films of this one source, {' and '.join(labels)}: what differs between sources can not tell "
            "them apart."
        )
        yield _seen(f"Within one source: {source}", cells, note, source)


def _seen(title: str, cells: Sequence[dict[str, Any]], note: str, source: str | None = None) -> Table:
    """How right each network is by what it sees; on the films of `source` alone where it is given."""
    rows, inputs = [], _inputs(cells)
    for key in dict.fromkeys((cell["network"], cell["seed"]) for cell in cells):
        of = {cell["input"]: cell for cell in cells if (cell["network"], cell["seed"]) == key}
        accuracies = (_accuracy(of[shown], source) if shown in of else "–" for shown in inputs)
        gap = _gap(of["background"], of["lungs"], source) if {"background", "lungs"} <= set(of) else "–"
        rows.append((label_of(next(iter(of.values()))), *accuracies, gap))
    columns = ("network", *(f"{INPUT_NAMES[shown]}: accuracy [95 %]" for shown in inputs), "background − lungs [95 %]")
    return Table(title, columns, tuple(rows), note)


def _inputs(cells: Sequence[dict[str, Any]]) -> list[Input]:
    """What the networks of these cells see, in the order of `INPUTS`."""
    return [shown for shown in INPUTS if any(cell["input"] == shown for cell in cells)]


def _mixed_sources(cells: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """The sources that have test films of several classes, and which."""
    return mixed_sources((_source(film), film["label"]) for film in cells[0]["test"]["per_film"])


def _accuracy(cell: dict[str, Any], source: str | None = None) -> str:
    found = _share_right(cell, source)
    return with_interval(found.value, found.ends)


def _share_right(cell: dict[str, Any], source: str | None = None) -> Interval:
    """Accuracy over all films of the test part, of `source` alone where it is given."""
    right, groups = zip(*_right(cell, source).values(), strict=True)
    return bootstrap_mean(np.array(right, np.float64), groups)


def _source(film: dict[str, Any]) -> str:
    """Where a film of a result came from. Results of before do not say, and are of the radiography set."""
    return str(film["source"] if "source" in film else radiography_source(film["label"], film["id"]))


def _gap(one: dict[str, Any], other: dict[str, Any], source: str | None = None) -> str:
    """Accuracy of one, less the other's, on the same films; of `source` alone where it is given."""
    return _signed(paired(_right(one, source), _right(other, source)))


def _classifier_variants(varied: Sequence[dict[str, Any]], plain: Sequence[dict[str, Any]]) -> Iterable[Table]:
    """What was changed, from the lungs alone; and where the background had the same change, what that did to it."""
    rows, beside, reasons, sources = [], [], {}, _mixed_sources(varied)
    for network, seed in dict.fromkeys((cell["network"], cell["seed"]) for cell in varied):
        own = [cell for cell in [*plain, *varied] if (cell["network"], cell["seed"]) == (network, seed)]
        grid = {cell["input"]: cell for cell in own if cell["variant"] is None}
        for cell in own:
            lungs, name = cell["input"] == "lungs", cell["variant"] or "as in the grid"
            if cell["variant"] is not None:
                reasons[cell["variant"]] = cell["reason"]
            if (lungs or cell["variant"] is not None) and cell["input"] != "background":
                test = cell["test"]
                spans = [_accuracy(cell), with_interval(test["macro_f1"], test["intervals"]["macro_f1"])]
                known = cell["variant"] is not None and "lungs" in grid
                rows.append((label_of(cell), name, *spans, _gap(cell, grid["lungs"]) if known else "–"))
            for background in (other for other in own if lungs and _same_change(cell, other)):
                accuracies = [_accuracy(side) for side in (cell, background)]
                within = (_gap(background, cell, source) for source in sources)
                changed = cell["variant"] or background["variant"] or name
                beside.append((label_of(cell), changed, *accuracies, _gap(background, cell), *within))
    named = {row[1] for row in rows + beside}
    note = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if name in named) + "."
    columns = ("network", "variant", "accuracy [95 %]", "macro-F1 [95 %]", "accuracy, less the grid's [95 %]")
    yield Table("One thing changed", columns, tuple(rows), note)
    if len(beside) > 1:
        names = ["network", "variant", "lungs: accuracy [95 %]", "background: accuracy [95 %]", "background − lungs"]
        names += [f"background − lungs, {source} alone" for source in sources]
        yield Table("What lowers the background's lead", tuple(names), tuple(beside), "Both sides had the same change.")


def _same_change(lungs: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether `other` is the background with the change that `lungs` had, or cut out as they are without any."""
    changes = [(json.dumps(cell["changes"], sort_keys=True), _view(cell)) for cell in (lungs, other)]
    cut = lungs["crop"] in (None, True) and other["crop"] is True
    same = changes[0] == changes[1] and (lungs["crop"] == other["crop"] or cut)
    return other["input"] == "background" and same


@dataclass(frozen=True)
class Pair:
    """Two networks on the same films: how many only the one got right, and McNemar's p."""

    first: str
    second: str
    films: int
    only_first: int
    only_second: int
    p: float

    def to_json(self) -> dict[str, Any]:
        return {key: or_null(value) if isinstance(value, float) else value for key, value in vars(self).items()}


def _pairs(cells: Sequence[dict[str, Any]]) -> Iterable[Pair]:
    plain = [cell for cell in cells if cell["variant"] is None and cell["input"] == "lungs"]
    for one, other in itertools.combinations(plain, 2):
        if one["seed"] != other["seed"]:
            continue
        mine, theirs = _right(one), _right(other)
        both = [film for film in mine if film in theirs]
        a, b = (np.array([side[film][0] for film in both], np.bool_) for side in (mine, theirs))
        only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
        yield Pair(label_of(one), label_of(other), len(both), only_a, only_b, mcnemar(only_a, only_b))


def _right(cell: dict[str, Any], source: str | None = None) -> dict[str, tuple[bool, str]]:
    """By film, of `source` where it is given, whether its class was right, and its group; one that failed was wrong,
    and is a group of its own."""
    test = cell["test"]
    failed, answered = (
        [row for row in test[key] if source is None or _source(row) == source] for key in ("failed", "per_film")
    )
    right = {row["id"]: (row["label"] == row["predicted"], row["group"]) for row in answered}
    return {row["id"]: (False, row["id"]) for row in failed} | right


# Shared ---------------------------------------------------------------------------------------------------------------


def label_of(cell: dict[str, Any]) -> str:
    """What a cell is called in a table."""
    name = f"ensemble, {cell['variant']}" if cell["network"] == "ensemble" else str(cell["network"])
    return name if not cell["seed"] else f"{name} (seed {cell['seed']})"


def _signed(difference: Interval) -> str:
    return signed(difference.value, difference.ends)


def _with_span(score: dict[str, Any]) -> str:
    return with_interval(score["mean"], score["interval"])
