"""What a result says it was measured with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bundles import seal, write_bundle
from lungscope.bundle import Bundle
from lungscope.data.split import Row, Split, parts_by_store, parts_digest
from lungscope.data.store import Record, Store
from lungscope.evaluation import provenance
from lungscope.evaluation.provenance import same_parts, split_of_training

REPO = Path(__file__).parents[2]
NAMES = ("a", "b", "pseudo")
ROWS = [Row(name, f"{n}", f"{name}{n}", "Normal", f"{name}{n}", part)
        for name in NAMES for n, part in enumerate(("train", "train", "val", "test"))]  # fmt: skip
ROWS = [replace(row, part="train") if row.store == "pseudo" else row for row in ROWS]


def store_of(rows: list[Row]) -> Store:
    """A store of these films, all of one store, without any pixels."""
    records = tuple(Record(row.id, "", row.label, "", "", row.sha256, 1, 1) for row in rows)
    none = np.zeros((0, 1, 1), np.uint8)
    return Store(Path(), rows[0].store, Path(), 1, records, none, none)


def given(*names: str, rows: list[Row] = ROWS) -> list[tuple[Store, Split]]:
    return [(store_of([row for row in rows if row.store == name]), Split(tuple(rows))) for name in names]


def bundle_of(root: Path, *runs: dict[str, Any]) -> Bundle:
    write_bundle(root, darks=(0.5,) * (len(runs) - 1))
    document = json.loads((root / "manifest.json").read_text())
    seal(root, {**document, "training": {"runs": list(runs)}})
    return Bundle.load(root)


def run_on(*names: str) -> dict[str, Any]:
    pseudo = {"pseudo_labels": {"pseudo": {}}} if "pseudo" in names else {}
    return {"stores": list(names), "parts": parts_digest(given(*names)), **pseudo}


def run_by_store(*names: str) -> dict[str, Any]:
    return {**run_on(*names), "parts_by_store": parts_by_store(given(*names))}


def test_a_bundle_knows_the_split_that_it_was_trained_with(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, run_on("a", "b", "pseudo"), run_on("a"))
    moved = [replace(row, part={"train": "test", "test": "train"}.get(row.part, row.part)) for row in ROWS]
    for data, found in (
        (given("a", "b"), (True, True)),
        (given("a", "b", "pseudo"), (True, True)),
        (given("a", "b", rows=moved), (False, False)),
        (given("a"), (None, True)),
        (given("a", rows=moved), (None, False)),
        (given("pseudo"), (None, None)),
        ([], (None, None)),
    ):
        assert split_of_training(bundle, data) == dict(zip(("segmenter", "classifier"), found, strict=True))


def test_a_run_that_says_the_parts_of_each_store_is_compared_with_some_of_them(tmp_path: Path) -> None:
    run = run_by_store("a", "b", "pseudo")
    swapped = {"train": "test", "test": "train"}
    moved = [replace(row, part=swapped.get(row.part, row.part)) if row.store == "a" else row for row in ROWS]
    for data, found in (
        (given("a"), True),
        (given("pseudo", "a"), True),
        (given("a", "b"), True),
        (given("a", rows=moved), False),
        (given("a", "b", rows=moved), False),
        (given("b", rows=moved), True),
        ([], None),
    ):
        for own in (run, {**run_by_store("b"), "initial": run}, {**run_by_store("a"), "mean_of": [run]}):
            before = own is not run and not [store for store, _ in data if store.name in own["stores"]]
            assert same_parts(own, data) is (None if before and found else found)
    bundle = bundle_of(tmp_path, run, run_by_store("a"))
    assert split_of_training(bundle, given("a", rows=moved)) == {"segmenter": False, "classifier": False}
    assert split_of_training(bundle, given("b")) == {"segmenter": True, "classifier": None}


def test_one_member_of_another_split_is_enough_and_silence_is_no_answer(tmp_path: Path) -> None:
    other = {**run_on("a"), "parts": dict.fromkeys(("train", "val", "test"), "0")}
    silent = {"stores": ["a"]}
    for runs, found in (
        ((run_on("a"), other, silent), (False, None)),
        ((run_on("a"), silent, run_on("a")), (None, True)),
        ((run_on("a"), run_on("a"), other), (True, False)),
    ):
        bundle = bundle_of(tmp_path / str(found), *runs)
        assert tuple(split_of_training(bundle, given("a")).values()) == found
    assert split_of_training(Bundle.load(write_bundle(tmp_path / "bare", classifier=False)), given("a")) == {
        "segmenter": None
    }


def test_what_a_run_started_from_counts_as_the_run_does(tmp_path: Path) -> None:
    other = {**run_on("a"), "parts": dict.fromkeys(("train", "val", "test"), "0")}
    for initial, found in ((run_on("a"), True), (other, False), ({"weights_sha256": "0"}, None)):
        for run in (
            {**run_on("a"), "initial": initial},
            {**run_on("a"), "initial": {**run_on("a"), "initial": initial}},
            {**run_on("a"), "mean_of": [run_on("a"), {**run_on("a"), "initial": initial}]},
        ):
            assert same_parts(run, given("a")) is found
    bundle = bundle_of(tmp_path, run_on("a"), {**run_on("a"), "initial": other})
    assert split_of_training(bundle, given("a")) == {"segmenter": True, "classifier": False}


def test_the_bundle_that_ships_was_trained_with_the_splits_beside_it() -> None:
    splits = [Split.read(REPO / "splits" / f"{name}.csv") for name in ("radiography", "shenzhen")]
    data = [(store_of(list(split.rows)), split) for split in splits]
    assert split_of_training(Bundle.load(), data) == {"segmenter": True, "classifier": True}


def test_without_git_the_commit_is_what_the_one_who_built_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    monkeypatch.delenv("LUNGSCOPE_COMMIT", raising=False)
    assert provenance.commit() is None
    monkeypatch.setenv("LUNGSCOPE_COMMIT", "ab" * 20)
    assert provenance.commit() == "ab" * 20


def test_a_checkout_says_its_own_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    own = provenance.commit()
    monkeypatch.setenv("LUNGSCOPE_COMMIT", "ab" * 20)
    assert own is None or provenance.commit() == own
