"""What another precision changes, counted on films with known lungs and classes, failed ones among them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bundles import with_int8
from lungscope.bundle import Bundle
from lungscope.data.split import Row, Split
from lungscope.data.store import Store
from lungscope.errors import DataError
from lungscope.evaluation import gate as gates
from lungscope.evaluation.card import model_card
from lungscope.evaluation.gate import evenly, find_margin, measure_gate, parity
from lungscope.pipeline import Analyzer
from lungscope.report import Failure
from lungscope.stages.severity import Zone
from stores import write_store


@pytest.fixture
def store(tmp_path: Path) -> tuple[Store, Split]:
    found = write_store(tmp_path)
    return found, Split(tuple(Row("films", r.id, r.sha256, r.label, r.id, "val") for r in found.records))


def test_what_int8_keeps_is_counted(tmp_path: Path, store: tuple[Store, Split]) -> None:
    told: list[tuple[int, int]] = []
    bundle = with_int8(tmp_path / "bundle")
    gate, measured = measure_gate(bundle, "int8", [store], progress=lambda *now: told.append(now))
    assert told == [(n, 4) for n in range(1, 5)]
    assert (gate.films, gate.dice.films, gate.accuracy and gate.accuracy.films) == (4, 4, 4)
    # The film that is no image is an empty mask and a wrong class in both. All others are called Normal; two are.
    assert gate.accuracy is not None and gate.accuracy.f32 == gate.accuracy.value == 0.5
    assert 0.7 < gate.dice.f32 < 0.75 and abs(gate.dice.lost) < 0.01
    assert gate.same_class == 1 and 0.98 < gate.same_mask <= 1
    assert gate.speed > 0 and gate.passed
    assert measured["weights"] == {name: digest for name, digest in bundle.files.items() if "." in name}
    assert (measured["part"], measured["hardware"]["precision"]) == ("val", "int8")


def test_scores_that_int8_changes_are_counted(tmp_path: Path, store: tuple[Store, Split]) -> None:
    """int8 sees no grey below 0.5: its lungs are smaller, and of their zones another share is involved."""
    bundle = with_int8(tmp_path / "bundle", darkest=0.5)
    gate, _ = measure_gate(bundle, "int8", [store])
    seen = {}
    for precision in ("f32", "int8"):
        analyzer = Analyzer(bundle, precision=precision)
        reports = [analyzer.analyze(store[0].path_of(record)) for record in store[0].records[:3]]
        seen[precision] = [zone.score for r in reports if r.severity for zone in r.severity.zones.values() if zone]
    assert len(seen["f32"]) == len(seen["int8"]) == 18
    assert gate.severity_mae is not None and gate.severity_mae > 0
    assert gate.severity_mae == pytest.approx(np.abs(np.subtract(seen["f32"], seen["int8"])).mean())


def test_what_int8_breaks_is_counted(tmp_path: Path, store: tuple[Store, Split]) -> None:
    bundle = with_int8(tmp_path / "bundle", logits=(99, 0, 0))
    gate, _ = measure_gate(bundle, "int8", [store])
    assert gate.accuracy is not None
    assert (gate.accuracy.f32, gate.accuracy.value) == (0.5, 0.25), "all are called COVID-19, one is"
    assert gate.same_class == 0.25, "the one that fails in both"
    assert not gate.passed


def test_what_one_precision_does_not_find_counts(analyzer: Analyzer, store: tuple[Store, Split]) -> None:
    record = store[0].records[0]
    found, lost = analyzer.analyze(store[0].path_of(record)), Failure(Path("a.png"), "quality", "No lungs found")
    film = gates._compare(found, lost, store[0].mask_path_of(record), "Normal")
    assert film.dice is not None and film.dice[0] > 0.8 and film.dice[1] == 0
    assert (film.right, film.same_mask, film.same_class) == ((True, False), 0, False)
    assert np.isnan(gates._compare(lost, lost, None, "").same_mask), "no mask is the same as none"
    one, three = (Zone(score, 10, 0.1, 0.0, (0, 1)) for score in (1, 3))
    assert [gates._apart(*zones) for zones in ((one, three), (one, None), (None, one), (None, None))] == [2, 3, 3, 0]


def test_speed_is_how_much_longer_f32_takes(
    tmp_path: Path, store: tuple[Store, Split], monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = gates._compare
    monkeypatch.setattr(gates, "_compare", lambda *film: replace(compare(*film), seconds=(0.3, 0.1)))
    gate, _ = measure_gate(with_int8(tmp_path / "bundle"), "int8", [store], limit=2)
    assert gate.speed == pytest.approx(3) and gate.films == 2


def test_films_that_rounding_could_decide_are_computed_again(tmp_path: Path, store: tuple[Store, Split]) -> None:
    films, split = store
    bundle = with_int8(tmp_path / "bundle", logits=(99, 0, 0))
    train = Split(tuple(replace(row, part="train") for row in split.rows))
    told: list[tuple[int, int]] = []
    margin = find_margin(bundle, "int8", [(films, train)], 4, progress=lambda *now: told.append(now))
    assert told == [(n, 4) for n in range(1, 5)]
    moved, leads = [], []
    for path in (films.path_of(record) for record in films.records[:3]):
        exact, rounded = (Analyzer(bundle, precision=p).analyze(path).classification for p in ("f32", "int8"))
        assert exact is not None and rounded is not None and rounded.label == "COVID-19"
        leads.append(rounded.lead)
        moved.append(rounded.lead - (exact.logits[0] - max(exact.logits[1:])))
    assert margin == pytest.approx(max(moved)) and margin > 90
    gate, _ = measure_gate(bundle, "int8", [store], margin=margin + 1)
    assert gate.same_class == 1 and gate.passed and gate.again == 0.75, "the broken film is computed in nothing"
    assert gate.margin == margin + 1 and "75.0% of them again in f32" in gate.describe("int8")
    assert measure_gate(bundle, "int8", [store], margin=max(leads))[0].again == 0.5, "two of three lead by less"
    with pytest.raises(DataError, match="None of 0 films of the training parts"):
        find_margin(bundle, "int8", [store], 4)


def test_a_part_without_lungs_or_labels_is_refused(tmp_path: Path, store: tuple[Store, Split]) -> None:
    films, split = store
    bundle = with_int8(tmp_path / "bundle")
    with pytest.raises(DataError, match="No film of part 'test' has drawn lungs"):
        measure_gate(bundle, "int8", [store], "test")
    (tmp_path / "store" / "records.csv").write_text(
        (tmp_path / "store" / "records.csv").read_text().replace("Normal", "").replace("COVID-19", "")
    )
    with pytest.raises(DataError, match="No film of part 'val' has one of the labels COVID-19, Normal"):
        measure_gate(bundle, "int8", [(Store.open(films.root), split)])


def test_the_card_prints_the_gates(tmp_path: Path, store: tuple[Store, Split]) -> None:
    root = tmp_path / "bundle"
    bundle = with_int8(root, logits=(99, 0, 0))
    assert "## Precision" not in model_card(bundle)
    gate, measured = measure_gate(bundle, "int8", [store])
    document = json.loads((root / "manifest.json").read_text())
    document["precision"]["gates"] = {"int8": gate.to_json() | {"measured": measured}}
    (root / "manifest.json").write_text(json.dumps(document))
    card = model_card(Bundle.load(root))
    assert "## Precision" in card
    assert "| int8 | failed: accuracy falls by 0.2500, more than 0.002; 25.00% of films keep their class" in card
    assert "0.5000 → 0.2500 (n = 4)" in card and "int8: val of films, on" in card


def test_some_are_taken_evenly() -> None:
    assert evenly(range(10), None) == list(range(10))
    assert evenly(range(10), 4) == [0, 3, 6, 9]
    assert evenly(range(3), 10) == [0, 1, 2] and evenly([], 5) == []


def test_parity_is_with_what_another_says(tmp_path: Path, tiny: Path, store: tuple[Store, Split]) -> None:
    films, _ = store
    analyzer = Analyzer(tiny, precision="f32")
    paths = [films.path_of(record) for record in films.records]
    reports = {path: analyzer.analyze(path) for path in paths[:3]}

    def same(path: Path) -> tuple[str, np.ndarray]:
        report = reports[path]
        assert report.classification is not None
        return report.classification.label, report.lungs.mask

    found = parity(analyzer, same, paths, None)
    assert (found["films"], found["same_class"], found["same_mask"], found["passed"]) == (3, 1, 1, True)
    assert found["failed"] == ["broken.png"]
    found = parity(analyzer, lambda path: ("COVID-19" if path == paths[1] else "Normal", same(path)[1]), paths, None)
    assert found["passed"] is False and found["same_class"] == pytest.approx(2 / 3)
    assert found["different"] == [{"film": "b.png", "ours": "Normal", "reference": "COVID-19"}]
    assert not parity(analyzer, lambda path: (same(path)[0], ~same(path)[1]), paths, None)["passed"]
    with pytest.raises(DataError, match="None of 1 films"):
        parity(analyzer, same, paths[3:], None)
