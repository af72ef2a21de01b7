"""Splits: groups and patients stay whole, classes stay balanced, and files that break that do not load."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from lungscope.data.split import PARTS, Row, Split, make_split, parts_digest, truth_digest
from lungscope.data.store import Store
from lungscope.errors import DataError

REPO = Path(__file__).parents[2]
Draw = Callable[..., np.ndarray]
Make = Callable[..., Store]


@pytest.fixture
def store(make_store: Make, draw: Draw) -> Store:
    """60 films of two classes: film n+1 is film n in other light for n = 0, 10 ...; films 20 to 29 have patients."""
    films, labels, patients = {}, {}, {}
    for n in range(60):
        name = f"f{n:02}"
        films[name] = (draw(n - 1) * 0.8 + 20).astype(np.uint8) if n % 10 == 1 else draw(n)
        labels[name] = "A" if n < 40 else "B"
        patients[name] = f"p{n // 3}" if 20 <= n < 30 else ""
    return make_store("s", films, labels=labels, patients=patients)


def parts_by(rows: tuple[Row, ...], key: str) -> dict[str, set[str]]:
    sides: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        sides[getattr(row, key)].add(row.part)
    return sides


def test_groups_and_patients_stay_whole(store: Store) -> None:
    split, facts = make_split([store], seed=1)
    assert all(len(sides) == 1 for sides in parts_by(split.rows, "group").values())
    part = {row.id: row.part for row in split.rows}
    group = {row.id: row.group for row in split.rows}
    for n in range(0, 60, 10):
        assert group[f"f{n:02}"] == group[f"f{n + 1:02}"]
        assert part[f"f{n:02}"] == part[f"f{n + 1:02}"]
    assert part["f24"] == part["f25"] == part["f26"]
    assert group["f24"] == group["f25"] == group["f26"] == "s/f24"
    assert facts["near_duplicate_pairs"] == 6
    assert facts["films"] == 60


def test_fractions_hold_in_every_class(store: Store) -> None:
    split, _ = make_split([store], seed=3, fractions=(0.6, 0.2, 0.2))
    counts = Counter((row.label, row.part) for row in split.rows)
    for label, total in (("A", 40), ("B", 20)):
        for name, fraction in zip(PARTS, (0.6, 0.2, 0.2), strict=True):
            assert counts[label, name] == pytest.approx(total * fraction, abs=3)


def test_a_part_may_be_empty(store: Store) -> None:
    split, _ = make_split([store], seed=3, fractions=(0, 0, 1))
    assert {row.part for row in split.rows} == {"test"}


def test_the_seed_decides(store: Store) -> None:
    first, same, other = (make_split([store], seed=seed)[0] for seed in (1, 1, 2))
    assert first == same
    assert first != other


def test_the_same_film_in_two_stores_is_one_group(make_store: Make, draw: Draw) -> None:
    a = make_store("a", {f"x{n}": draw(n) for n in range(12)})
    b = make_store("b", {f"y{n}": draw(n) for n in range(6, 18)})
    split, _ = make_split([a, b], seed=0)
    part = {row.id: row.part for row in split.rows}
    assert all(part[f"x{n}"] == part[f"y{n}"] for n in range(6, 12))
    assert {row.group for row in split.rows if row.id == "y7"} == {"a/x7"}


def test_a_film_with_a_rim_is_in_the_films_group_and_the_rule_is_written_down(make_store: Make, draw: Draw) -> None:
    films = {f"x{n}": draw(n, 256, 256) for n in range(12)}
    films["rim"] = np.pad(draw(5, 226, 226), 15)
    split, facts = make_split([make_store("a", films, size=256)], seed=0)
    group = {row.id: row.group for row in split.rows}
    assert group["rim"] == group["x5"] and len(set(group.values())) == 12
    assert (facts["near_duplicate_pairs"], facts["near_duplicate_crops"]) == (1, [0.02, 0.04, 0.06, 0.08])


def test_a_patient_is_known_within_a_store_only(make_store: Make, draw: Draw) -> None:
    a = make_store("a", {"x": draw(1)}, patients={"x": "1"})
    b = make_store("b", {"y": draw(2)}, patients={"y": "1"})
    split, facts = make_split([a, b], seed=0)
    assert len({row.group for row in split.rows}) == 2
    assert (facts["same_patients"], facts["patients_in_several_stores"]) == (False, 1)


def test_a_patient_is_one_in_all_stores_where_that_is_said(make_store: Make, draw: Draw) -> None:
    films = {f"x{n}": draw(n) for n in range(6)}
    stores = [
        make_store(name, {key: draw(n + shift) for n, key in enumerate(films)}, patients={k: k for k in films})
        for name, shift in (("a", 0), ("b", 50))
    ]
    split, facts = make_split(stores, seed=0, same_patients=True)
    sides = {(row.store, row.id): (row.group, row.part) for row in split.rows}
    assert all(sides["a", key] == sides["b", key] for key in films)
    assert len({group for group, _ in sides.values()}) == 6
    assert (facts["same_patients"], facts["patients_in_several_stores"]) == (True, 6)


@pytest.mark.parametrize("fractions", [(0.5, 0.2, 0.2), (1.2, -0.1, -0.1)])
def test_impossible_fractions_are_refused(store: Store, fractions: tuple[float, float, float]) -> None:
    with pytest.raises(DataError, match="add up to 1"):
        make_split([store], seed=0, fractions=fractions)


def test_stores_of_one_name_are_refused(store: Store) -> None:
    with pytest.raises(DataError, match=r"two stores are called s\. Import one of them with --name"):
        make_split([store, store], seed=0)


def test_nothing_to_split_is_refused() -> None:
    with pytest.raises(DataError, match="nothing to split"):
        make_split([], seed=0)


def test_a_split_survives_its_file(store: Store, tmp_path: Path) -> None:
    split, facts = make_split([store], seed=1)
    path = tmp_path / "deep" / "s.csv"
    split.write(path, facts)
    assert Split.read(path) == split
    beside = json.loads(path.with_suffix(".json").read_text())
    assert beside["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sum(beside["counts"].values()) == 60
    assert beside["seed"] == 1
    assert sorted(p.name for p in path.parent.iterdir()) == ["s.csv", "s.json"]


@pytest.mark.parametrize("key", ["group", "sha256"])
def test_a_group_or_a_film_on_two_sides_raises(key: str) -> None:
    rows = [Row("s", "a", "1", "", "g1", "train"), Row("s", "b", "2", "", "g2", "test")]
    Split(tuple(rows))
    values = {"sha256": "2", "group": "g2", key: getattr(rows[0], key)}
    with pytest.raises(DataError, match="two sides"):
        Split((rows[0], Row("s", "b", values["sha256"], "", values["group"], "test")))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a,b\n1,2\n", "columns"),
        ("store,id,sha256,label,group,part\ns,a,1,,g,trian\n", "Did you mean 'train'"),
        ("store,id,sha256,label,group,part\ns,a,1,,g,train\ns,b,2,,g,test\n", "two sides"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(DataError, match=match):
        Split.read(tmp_path / "s.csv")


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="lungscope data split"):
        Split.read(tmp_path / "none.csv")


def test_select_and_groups(store: Store) -> None:
    split, _ = make_split([store], seed=1)
    chosen = [split.select(store, part) for part in PARTS]
    assert sorted(chosen[0] + chosen[1] + chosen[2]) == list(range(60))
    assert split.groups_of(store, [0, 1, 2]) == ["s/f00", "s/f00", "s/f02"]
    with pytest.raises(DataError, match="part"):
        split.select(store, "valid")


def test_a_store_that_changed_is_noticed(store: Store) -> None:
    split, _ = make_split([store], seed=1)
    first = split.rows[0]
    changed = Row(first.store, first.id, "other", first.label, first.group, first.part)
    with pytest.raises(DataError, match="other content"):
        Split((changed, *split.rows[1:])).select(store, "train")
    with pytest.raises(DataError, match="not in the split"):
        Split(split.rows[1:]).select(store, "train")


def test_the_digest_of_the_truth_follows_labels_masks_and_the_grid(
    make_store: Make, draw: Draw, draw_mask: Draw
) -> None:
    films, mask = {name: draw(n) for n, name in enumerate("abcd")}, draw_mask(60, 60)
    labels, masks = dict.fromkeys(films, "A"), {"a": mask, "b": mask}
    store = make_store("s", films, labels=labels, masks=masks)
    split, _ = make_split([store], seed=0)
    digests = {truth_digest([(store, split)])}
    wider = cv2.dilate(mask, np.ones((5, 5), np.uint8))
    changes: list[dict[str, Any]] = [
        {"labels": labels | {"d": "B"}},
        {"masks": masks | {"b": wider}},
        {"masks": masks | {"c": mask}},
        {"masks": {"a": mask}},
        {"size": 96},
    ]
    for number, change in enumerate(changes):
        other = make_store("s", films, **{"labels": labels, "masks": masks, **change}, folder=f"s{number}")
        digests.add(truth_digest([(other, split)]))
        assert parts_digest([(other, split)]) == parts_digest([(store, split)]), "the films are the same"
    assert len(digests) == 1 + len(changes)
    again = make_store("s", films, labels=labels, masks=masks, folder="again")
    assert truth_digest([(again, split)]) in digests
    empty = replace(again, masks=np.where(np.arange(4)[:, None, None] < 2, again.masks, 7))
    assert truth_digest([(empty, split)]) in digests, "what stands where there is no mask is not looked at"


@pytest.mark.parametrize("name", ["radiography", "shenzhen"])
def test_the_committed_splits_are_whole(name: str) -> None:
    path = REPO / "splits" / f"{name}.csv"
    split = Split.read(path)
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert facts["films"] == len(split.rows)
    counts = Counter(row.part for row in split.rows)
    assert counts["train"] / len(split.rows) == pytest.approx(0.7, abs=0.01)
    assert counts["test"] / len(split.rows) == pytest.approx(0.2, abs=0.01)
