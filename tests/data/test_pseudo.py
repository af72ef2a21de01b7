"""Masks drawn by segmenters: kept where all looks agree, for training alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from bundles import write_bundle
from films import draw
from lungscope.bundle import Bundle
from lungscope.cli.data import app
from lungscope.data.importing import on_store_grid
from lungscope.data.pseudo import pseudo_label, pseudo_labels
from lungscope.data.split import Row, Split
from lungscope.data.store import Store
from lungscope.errors import DataError, UsageError
from lungscope.evaluation import metrics

MakeStore = Callable[..., Store]
SHAPE = (320, 288)


@pytest.fixture
def films(make_store: MakeStore) -> Store:
    """Two films with lungs, one without, one with a mask, and one for validation."""
    plain = np.rint(draw(*SHAPE) * 255).astype(np.uint8)
    pictures = {name: plain + np.uint8(k) for k, name in enumerate(["plain", "second", "masked", "val"])}
    pictures["blank"] = np.full(SHAPE, 200, np.uint8)
    return make_store(
        "films", pictures, labels=dict.fromkeys(pictures, "Normal"), masks={"masked": np.uint8(255) * (plain < 100)}
    )


@pytest.fixture
def split(films: Store) -> Split:
    def part(name: str) -> str:
        return "val" if name == "val" else "train"

    return Split(tuple(Row("films", r.id, r.sha256, r.label, f"g{r.id}", part(r.id)) for r in films.records))


def test_films_without_a_mask_in_the_train_part_get_the_lungs_found(films: Store, split: Split, tmp_path: Path) -> None:
    bundle = Bundle.load(write_bundle(tmp_path / "bundle"))
    told: list[tuple[int, int]] = []
    result = pseudo_label(films, split, [bundle], tmp_path / "drawn", progress=lambda *at: told.append(at))
    assert (result.looked_at, result.kept) == (3, {"Normal": 2})
    assert result.left_out == {"lung-area": 1}
    assert told[-1] == (3, 3)

    store = Store.open(result.store)
    assert (store.name, store.origin, store.size) == ("drawn", films.origin, films.size)
    assert sorted(record.id for record in store.records) == ["plain", "second"]
    for i, record in enumerate(store.records):
        k = next(k for k, film in enumerate(films.records) if film.id == record.id)
        assert (store.images[i] == films.images[k]).all()
        path = store.mask_path_of(record)
        assert path is not None
        drawn = np.asarray(Image.open(path))
        assert drawn.shape == SHAPE
        assert set(np.unique(drawn)) == {0, 255}
        truth = draw(*SHAPE) < 0.4
        assert metrics.dice((drawn > 0)[None], truth[None])[0] > 0.9
        assert set(np.unique(store.masks[i])) == {0, 255}

    own = Split.read(result.split)
    assert own.select(store, "train") == [0, 1]
    assert not own.select(store, "val")
    assert own.groups_of(store, [0]) == [f"g{store.records[0].id}"]
    facts = json.loads((result.store / "store.json").read_text())["pseudo_labels"]
    assert facts["segmenters"] == [[weights.sha256 for weights in bundle.segmenter.members]]
    assert facts["left_out"] == {"lung-area": 1}
    assert pseudo_labels(store) == facts
    assert pseudo_labels(films) is None


def test_segmenters_that_disagree_keep_no_film_and_leave_nothing(
    make_store: MakeStore, split: Split, tmp_path: Path
) -> None:
    """Lungs have an opacity at each base: the second segmenter calls it lung, too; both outlines are plausible."""
    film = draw(*SHAPE, opacities=[(0.78, 0.28, 0.12), (0.78, 0.72, 0.12)])
    films = make_store("ill", {"film": np.rint(film * 255).astype(np.uint8)}, labels={"film": "COVID-19"})
    own = Split(tuple(Row("ill", r.id, r.sha256, r.label, r.id, "train") for r in films.records))
    strict, wide = (Bundle.load(write_bundle(tmp_path / str(dark), darks=(dark,))) for dark in (0.3, 0.6))
    for alone in (strict, wide):
        assert pseudo_label(films, own, [alone], tmp_path / alone.root.name / "alone", agree=0.9).left_out == {}
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match=r"none of 1 films was kept \(disagree 1\)"):
        pseudo_label(films, own, [strict, wide], tmp_path / "drawn", agree=0.97)
    assert sorted(tmp_path.iterdir()) == before


def test_the_mirror_image_is_looked_at_as_the_film_is(make_store: MakeStore, tmp_path: Path) -> None:
    """One lung is half as high: unless its mirror image's mask is turned back, both looks differ widely."""
    film = draw(*SHAPE)
    film[SHAPE[0] // 2 :, SHAPE[1] // 2 :] = 0.8
    films = make_store("odd", {"film": np.rint(film * 255).astype(np.uint8)}, labels={"film": "Normal"})
    own = Split(tuple(Row("odd", r.id, r.sha256, r.label, r.id, "train") for r in films.records))
    result = pseudo_label(films, own, [Bundle.load(write_bundle(tmp_path / "bundle"))], tmp_path / "drawn", agree=0.95)
    store = Store.open(result.store)
    drawn = store.masks[0] > 0
    half = drawn.shape[1] // 2
    assert drawn[:, :half].sum() > 1.7 * drawn[:, half:].sum()


def test_what_is_enclosed_by_lung_is_lung(make_store: MakeStore, tmp_path: Path) -> None:
    """A dense spot inside a lung: cleaning fills it in a mask, and it stays filled in the mask that is kept."""
    film = draw(*SHAPE)
    film[150:170, 70:90] = 0.9
    films = make_store("spot", {"film": np.rint(film * 255).astype(np.uint8)}, labels={"film": "Normal"})
    own = Split(tuple(Row("spot", r.id, r.sha256, r.label, r.id, "train") for r in films.records))
    result = pseudo_label(films, own, [Bundle.load(write_bundle(tmp_path / "bundle"))], tmp_path / "drawn")
    path = Store.open(result.store).mask_path_of(Store.open(result.store).records[0])
    assert path is not None
    assert (np.asarray(Image.open(path))[150:170, 70:90] == 255).all()


def test_no_more_of_a_label_than_asked_for(films: Store, split: Split, tmp_path: Path) -> None:
    bundle = Bundle.load(write_bundle(tmp_path / "bundle"))
    result = pseudo_label(films, split, [bundle], tmp_path / "drawn", per_label=1, seed=1)
    assert result.looked_at == 1


def test_what_stands_there_is_not_replaced(films: Store, split: Split, tmp_path: Path) -> None:
    bundle = Bundle.load(write_bundle(tmp_path / "bundle"))
    (tmp_path / "drawn").mkdir()
    with pytest.raises(UsageError, match="exists"):
        pseudo_label(films, split, [bundle], tmp_path / "drawn")
    with pytest.raises(UsageError, match=r"agreement 1\.5"):
        pseudo_label(films, split, [bundle], tmp_path / "other", agree=1.5)


def test_command(films: Store, split: Split, tmp_path: Path) -> None:
    split.write(tmp_path / "s.csv", {})
    bundle = write_bundle(tmp_path / "bundle")
    arguments = ["pseudo-label", films.root, tmp_path / "drawn", "--split", tmp_path / "s.csv", "--model", bundle]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert "2 of 3 films kept; left out: lung-area 1" in result.stdout


def test_soft_labels_keep_how_sure_the_segmenters_were_and_take_films_with_a_mask_too(
    films: Store, split: Split, tmp_path: Path
) -> None:
    bundles = [Bundle.load(write_bundle(tmp_path / str(dark), darks=(dark,))) for dark in (0.35, 0.45)]
    result = pseudo_label(films, split, bundles, tmp_path / "drawn", agree=0.9, soft=True)
    assert (result.looked_at, result.kept) == (4, {"Normal": 3})
    store = Store.open(result.store)
    assert sorted(record.id for record in store.records) == ["masked", "plain", "second"]
    for i, record in enumerate(store.records):
        soft, hard = store.masks[i], np.asarray(Image.open(store.origin / record.mask))
        assert len(np.unique(soft)) > 20
        assert metrics.dice((on_store_grid(hard > 0, store.size) > 0)[None], soft[None] >= 128)[0] > 0.98
    facts = pseudo_labels(store)
    assert facts is not None
    assert facts["soft"] is True


def test_soft_labels_are_filled_where_lung_encloses(make_store: MakeStore, tmp_path: Path) -> None:
    film = draw(*SHAPE)
    film[150:170, 70:90] = 0.9
    films = make_store("spot", {"film": np.rint(film * 255).astype(np.uint8)}, labels={"film": "Normal"})
    own = Split(tuple(Row("spot", r.id, r.sha256, r.label, r.id, "train") for r in films.records))
    bundle = Bundle.load(write_bundle(tmp_path / "bundle"))
    store = Store.open(pseudo_label(films, own, [bundle], tmp_path / "drawn", soft=True).store)
    # The letterbox: 288 columns in 320, on a grid of the store's size.
    row, column = (round((x + 0.5) * store.size / 320) for x in (160, 80 + 16))
    assert store.masks[0][row, column] > 240
