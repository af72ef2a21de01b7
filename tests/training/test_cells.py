"""Which results and weights a benchmark takes for its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lungscope.bundle import Bundle, sha256_of
from lungscope.data.split import Split
from lungscope.data.store import Store
from lungscope.errors import DataError
from lungscope.evaluation import scoring
from lungscope.evaluation.benchmark import Cell
from lungscope.pipeline import Analyzer
from lungscope.training.benchmark import Bench, _joined, _with_films
from lungscope.training.budget import load_budget
from lungscope.training.engine import Hardware


@pytest.fixture
def bench(drawn: tuple[Store, Split], tiny: Path, tmp_path: Path) -> Bench:
    return Bench(
        load_budget("cpu"), "cpu", [drawn], [], tmp_path / "out", tmp_path / "work", Hardware("cpu"), Bundle.load(tiny)
    )


def test_films_of_two_stores_keep_apart_where_they_are_called_the_same(
    drawn: tuple[Store, Split], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (store, split), analyzer = drawn, Analyzer(tiny)
    store = replace(store, records=[replace(record, label="A") for record in store.records])
    other = replace(store, name="other")
    named = Split(tuple(replace(row, store="other") for row in split.rows))

    def predicted(analyzer: object, store: Store, split: Split, part: str) -> scoring.Predictions:
        failed = [{"id": "9", "message": "broken"}]
        groups = [f"{store.name}/1"]
        return scoring.Predictions(("A", "B"), ["1"], groups, [""], np.zeros(1, np.int64), np.zeros((1, 2)), failed)

    monkeypatch.setattr(scoring, "predict", predicted)
    both = _joined(analyzer, [(store, split), (other, named)], "test")
    assert both.ids == ["drawn/1", "other/1"]
    assert [row["id"] for row in both.failed] == ["drawn/9", "other/9"]
    assert _joined(analyzer, [(store, split)], "test").ids == ["1"]


def test_a_store_for_training_alone_is_not_measured_on(bench: Bench, drawn: tuple[Store, Split]) -> None:
    store, split = drawn
    other = Split(tuple(replace(row, store="other", part="train") for row in split.rows))
    both = replace(bench, data=[drawn, (replace(store, name="other"), other)])
    cell = Cell("segmentation", "fpn-vgg16", 0)
    assert [found.name for found, _ in both._ready(cell)] == ["drawn", "other"]
    assert [found.name for found, _ in _with_films(both._ready(cell), "test", "mask")] == ["drawn"]
    with pytest.raises(DataError, match="no film of the val parts has a mask, on which fpn-vgg16-seed0"):
        replace(bench, data=both.data[1:])._ready(cell)


def test_an_ensemble_pools_the_weights_that_its_members_results_are_of(bench: Bench) -> None:
    members = [Cell("segmentation", name, 0) for name in bench.budget.segmentation.ensemble]
    for member in members:
        run, result = bench.folder(member) / "run", bench.result(member)
        run.mkdir(parents=True)
        result.parent.mkdir(parents=True, exist_ok=True)
        (run / "weights.json").write_text("{}")
        (run / "weights.safetensors").write_text(member.name)
        digest = sha256_of(run / "weights.safetensors")
        result.write_text(json.dumps({"training": {"weights_sha256": digest}}))
    other = bench.folder(members[1]) / "run" / "weights.safetensors"
    other.write_text("trained again")
    with pytest.raises(DataError, match=f"{members[1].name}.* are not the weights that .*{members[1].name}.json is"):
        bench.run(Cell("segmentation", "ensemble", 0, bench.budget.segmentation.pools[0]))


def test_a_result_is_of_the_labels_and_masks_that_it_was_made_with(bench: Bench) -> None:
    cell = next(iter(bench.budget.cells("segmentation")))
    result, ((store, split),) = bench.result(cell), bench.data
    result.parent.mkdir(parents=True)
    document = bench._identity(cell)
    result.write_text(json.dumps(document))
    assert bench.run(cell) == result
    masks = store.masks.copy()
    masks[3, :9] = 255
    other = replace(bench, data=[(replace(store, masks=masks), split)])
    with pytest.raises(DataError, match="result of another truth"):
        other.run(cell)
    del document["truth"]
    result.write_text(json.dumps(document))
    assert other.run(cell) == result, "a result of before does not say"


def test_a_result_is_of_the_lungs_that_its_segmenter_found(bench: Bench) -> None:
    cell = next(iter(bench.budget.cells("classification")))
    store, split = bench.data[0]
    data = [(replace(store, records=tuple(replace(record, label="A") for record in store.records)), split)]
    bench = replace(bench, data=data)
    result = bench.result(cell)
    result.parent.mkdir(parents=True)
    document = bench._identity(cell)
    result.write_text(json.dumps(document))
    assert bench.run(cell) == result
    finder = replace(bench.segmenter.segmenter, threshold=0.4)
    other = replace(bench, segmenter=replace(bench.segmenter, segmenter=finder))
    with pytest.raises(DataError, match="result of another lungs"):
        other.run(cell)
    del document["lungs"]
    result.write_text(json.dumps(document))
    assert other.run(cell) == result, "a result of before does not say"
