"""What classifiers are shown is cut once, and again where it would be cut otherwise."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra [train]")

from lungscope.bundle import Bundle
from lungscope.data.split import Row, Split
from lungscope.errors import DataError
from lungscope.stages.classification import ViewSpec
from lungscope.training import views
from lungscope.training.classifier import labelled_views
from lungscope.training.views import cut_views
from stores import write_store


def test_views_are_cut_again_where_lungs_are_found_otherwise(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, bundle, spec = write_store(tmp_path), Bundle.load(tiny), ViewSpec("lungs", True, 0.05, 64)

    def cut(bundle: Bundle = bundle, spec: ViewSpec = spec) -> int:
        found = cut_views(store, bundle, {"view": spec}, tmp_path / "cache")["view"]
        assert found.usable.tolist() == [True, True, True, False] and np.all(found.views[:3].any((1, 2)))
        return len(list((tmp_path / "cache").glob("*-views.npy")))

    assert [cut(), cut(), cut(spec=replace(spec, equalised=True))] == [1, 1, 1]
    monkeypatch.setattr(views, "FOUND_BY", views.FOUND_BY + 1)
    assert cut() == 2
    assert cut(replace(bundle, segmenter=replace(bundle.segmenter, threshold=0.4))) == 3
    assert cut(spec=replace(spec, aligned=True)) == 4


def test_a_label_that_hardly_a_film_has_is_remarked_on_and_one_without_training_films_refused(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, bundle, spec = write_store(tmp_path), Bundle.load(tiny), ViewSpec("lungs", True, 0.05, 64)

    def cut(**parts: str) -> tuple[list[str], int, int]:
        rows = tuple(Row("films", r.id, r.sha256, r.label, r.id, parts[r.id]) for r in store.records)
        names, train, val = labelled_views([(store, Split(rows))], bundle, spec)
        return names, len(train), len(val)

    with caplog.at_level(logging.INFO):
        assert cut(a="train", b="train", c="val", broken="val") == (["COVID-19", "Normal"], 2, 1)
    found = {record.message: record.levelname for record in caplog.records if record.message.startswith("label")}
    assert found["label COVID-19: 1 training and 0 validation films"] == "WARNING"
    with pytest.raises(DataError, match="no training film with lungs is labelled 'COVID-19', of 2 labels"):
        cut(a="train", b="val", c="val", broken="train")


def test_what_can_not_be_read_now_is_not_remembered_as_a_film_without_lungs(tiny: Path, tmp_path: Path) -> None:
    store, bundle, spec = write_store(tmp_path), Bundle.load(tiny), ViewSpec("lungs", True, 0.05, 64)
    film = store.path_of(store.records[0])
    film.rename(film.with_suffix(".away"))
    with pytest.raises(DataError, match=r"No such file or directory\. Bring its folder back, or import again"):
        cut_views(store, bundle, {"view": spec}, tmp_path / "cache")
    film.write_bytes(store.path_of(store.records[1]).read_bytes())
    with pytest.raises(DataError, match="is not the file that was imported"):
        cut_views(store, bundle, {"view": spec}, tmp_path / "cache")
    film.with_suffix(".away").replace(film)
    found = cut_views(store, bundle, {"view": spec}, tmp_path / "cache")["view"]
    assert found.usable.tolist() == [True, True, True, False]
