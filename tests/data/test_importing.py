"""Importing: every layout, every kind of broken file, and every kind of interruption."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lungscope.data import importing
from lungscope.data.importing import LOG, Imported, import_films, on_store_grid, read_mask, read_rejected
from lungscope.data.layouts import GUANGZHOU, RSNA, find_films, radiography_source
from lungscope.data.store import Store, write_records
from lungscope.errors import DataError, UsageError
from lungscope.evaluation.scoring import on_grid
from lungscope.radiograph import Geometry, Radiograph
from lungscope.readers import read

REPO = Path(__file__).parents[2]
DATA = Path(os.environ.get("LUNGSCOPE_DATA", REPO.parent / "shared" / "data"))
Draw = Callable[..., np.ndarray]
Save = Callable[[Path, np.ndarray], Path]


def codes(result: Imported) -> dict[str, str]:
    return {Path(item.path).name: item.code for item in result.rejected}


def content(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir() if path.is_file()}


# Layouts --------------------------------------------------------------------------------------------------------------


def test_kaggle_folder(kaggle: Path, tmp_path: Path) -> None:
    result = import_films(kaggle, tmp_path / "store", size=64)
    store = Store.open(tmp_path / "store")
    assert result.by_label == {"COVID-19": 3, "Normal": 4, "Viral Pneumonia": 2}
    assert (result.films, result.with_mask, result.read, result.rejected) == (9, 9, 9, ())
    assert [r.id for r in store.records][:4] == ["COVID-1", "COVID-2", "COVID-3", "Normal-1"]
    assert store.name == "store"
    assert store.records[0].image == "COVID/images/COVID-1.png"
    assert store.path_of(store.records[0]).is_file()
    assert store.images.shape == store.masks.shape == (9, 64, 64)
    assert set(np.unique(store.masks)) == {0, 255}
    assert any("--with-lung-opacity" in remark for remark in result.remarks)
    assert not (tmp_path / "store" / ".import").exists()


def test_labels_of_a_table_are_those_of_the_folders(tmp_path: Path) -> None:
    table = tmp_path / "films.csv"
    spelt = ["normal", "COVID", "covid-19", "VIRAL pneumonia", "Tuberculosis", ""]
    table.write_text("path,label\n" + "".join(f"{n}.png,{label}\n" for n, label in enumerate(spelt)))
    labels = [film.label for film in find_films(table).films]
    assert labels == ["Normal", "COVID-19", "COVID-19", "Viral Pneumonia", "Tuberculosis", ""]
    table.write_text("path,label,mask\na.png,Viral, Pneumonia,,\n")
    with pytest.raises(DataError, match="row 2 has more cells than columns"):
        find_films(table)


def test_the_cached_pixels_are_the_letterboxed_film(
    make_store: Callable[..., Store], draw: Draw, draw_mask: Draw
) -> None:
    pixels, mask = draw(1, 80, 50), draw_mask(160, 100)
    store = make_store("s", {"a": pixels}, masks={"a": mask})
    grid = Geometry.letterbox((80, 50), 64).to_network(pixels.astype(np.float32) / 255)
    assert (store.images[0] == np.rint(grid * 255)).all()
    assert (store.masks[0] == (Geometry.letterbox((160, 100), 64).to_network(mask > 127) >= 0.5) * 255).all()
    assert (store.records[0].height, store.records[0].width) == (80, 50)


@pytest.mark.parametrize("shape", [(150, 148), (75, 74), (300, 299)])
def test_a_mask_of_nearly_the_films_aspect_lies_in_the_store_as_in_scores(
    make_store: Callable[..., Store], draw: Draw, shape: tuple[int, int]
) -> None:
    rng, (h, w) = np.random.default_rng(0), shape
    mask = np.kron(rng.random((h // 5 + 1, w // 5 + 1)) < 0.5, np.ones((5, 5), bool))[:h, :w]
    store = make_store("s", {"a": draw(1, 150, 150)}, masks={"a": mask.astype(np.uint8) * 255})
    over = on_grid(mask, (150, 150))
    assert (store.masks[0] == on_store_grid(over, 64)).all()
    assert not np.array_equal(store.masks[0], on_store_grid(mask, 64)), "the film has no room beside it"


def test_lung_opacity_is_a_fourth_class_on_request(kaggle: Path, tmp_path: Path) -> None:
    result = import_films(kaggle, tmp_path / "store", size=32, with_lung_opacity=True)
    assert list(result.by_label) == ["COVID-19", "Normal", "Lung Opacity", "Viral Pneumonia"]


def test_kaggle_zip_gives_the_same_store_as_the_folder(kaggle: Path, zipped: Path, tmp_path: Path) -> None:
    import_films(kaggle, tmp_path / "a", name="x", size=32)
    result = import_films(zipped, tmp_path / "b", name="x", size=32)
    assert result.rejected == ()
    a, b = content(tmp_path / "a"), content(tmp_path / "b")
    assert json.loads(b.pop("store.json"))["origin"].startswith(str(tmp_path / "b.films"))
    del a["store.json"]
    assert a == b
    assert import_films(zipped, tmp_path / "b", size=32).up_to_date


def test_without_masks_and_in_other_case_and_as_jpeg(tmp_path: Path, draw: Draw, save: Save) -> None:
    root = tmp_path / "set"
    save(root / "covid" / "Images" / "a.JPG", draw(1))
    save(root / "NORMAL" / "IMAGES" / "b.jpeg", draw(2))
    save(root / "viral pneumonia" / "images" / "c.PNG", draw(3))
    save(root / "Tuberculosis" / "images" / "d.png", draw(4))
    for name in ("Thumbs.db", "DICOMDIR"):
        (root / "NORMAL" / "IMAGES" / name).write_bytes(b"x")
    (root / "notes").mkdir()
    result = import_films(root, tmp_path / "store", size=32)
    assert list(result.by_label) == ["COVID-19", "Normal", "Viral Pneumonia", "Tuberculosis"]
    assert result.with_mask == 0
    assert result.rejected == ()
    assert any("notes/" in remark for remark in result.remarks)


def test_images_and_masks_folder(tmp_path: Path, draw: Draw, draw_mask: Draw, save: Save) -> None:
    root = tmp_path / "shenzhen"
    for stem, mask in (("b", "b.png"), ("a", "a_mask.png"), ("c", None)):
        save(root / "images" / f"{stem}.jpg", draw(ord(stem)))
        if mask:
            save(root / "masks" / mask, draw_mask())
    save(root / "masks" / "z.png", draw_mask())
    result = import_films(root, tmp_path / "store", size=32)
    assert [r.id for r in Store.open(tmp_path / "store").records] == ["a", "b", "c"]
    assert result.by_label == {"": 3}
    assert codes(result) == {"c.jpg": "mask-missing", "z.png": "mask-orphan"}
    assert result.with_mask == 2


def test_csv(tmp_path: Path, draw: Draw, draw_mask: Draw, save: Save) -> None:
    root = tmp_path / "mine"
    save(root / "a" / "1.png", draw(1))
    save(root / "b" / "1.png", draw(2))
    save(root / "b" / "1.jpg", draw(3))
    save(root / "m.png", draw_mask())
    head = "\ufeffPath, Label ,mask,patient,age"
    rows = (head, "a/1.png,Normal,m.png,p1,50", "b/1.png,,,p2,", "b/1.jpg,,none.png", "c.png")
    (root / "films.csv").write_text("\n".join(rows), encoding="utf-8")
    result = import_films(root / "films.csv", tmp_path / "store", size=32)
    records = Store.open(tmp_path / "store").records
    assert [r.id for r in records] == ["a/1", "b/1.png", "b/1.jpg"]
    assert [(r.label, r.patient, r.mask) for r in records] == [("Normal", "p1", "m.png"), ("", "p2", ""), ("", "", "")]
    assert codes(result) == {"none.png": "mask-missing", "c.png": "missing"}
    assert result.unreadable == 1
    assert result.remarks == ("Columns not used: age.",)
    assert {r.source for r in records} == {""}


def test_a_table_may_name_sources(tmp_path: Path, draw: Draw, save: Save) -> None:
    for name in "ab":
        save(tmp_path / f"{name}.png", draw(ord(name)))
    (tmp_path / "films.csv").write_text("path,source\na.png,Hospital A\nb.png,\n")
    import_films(tmp_path / "films.csv", tmp_path / "store", size=32)
    assert [record.source for record in Store.open(tmp_path / "store").records] == ["Hospital A", ""]


@pytest.mark.parametrize(
    ("label", "stem", "source"),
    [
        ("Normal", "Normal-62", RSNA),
        ("Normal", "Normal-63", GUANGZHOU),
        ("Normal", "Normal-1403", GUANGZHOU),
        ("Normal", "Normal-1404", RSNA),
        ("Normal", "person1_virus_6", ""),
        ("Lung Opacity", "Lung_Opacity-1", RSNA),
        ("Viral Pneumonia", "Viral Pneumonia-1", GUANGZHOU),
        ("Viral Pneumonia", "mine1", ""),
        ("Lung Opacity", "mine-1", ""),
        ("COVID-19", "COVID-63", ""),
        ("COVID-19", "COVID-19-63", ""),
        ("(", "(-1", ""),
    ],
)
def test_where_films_of_the_radiography_database_came_from(label: str, stem: str, source: str) -> None:
    assert radiography_source(label, stem) == source


def test_sources_reach_a_store_that_was_made_without_them(kaggle: Path, tmp_path: Path) -> None:
    import_films(kaggle, tmp_path / "store", size=32)
    store = Store.open(tmp_path / "store")
    known = {record.source for record in store.records if record.label == "Normal"}
    assert known == {RSNA}
    log = tmp_path / "store" / LOG
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    for row in rows:
        del row["film"]["source"]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = (tmp_path / "store" / "records.csv").read_text().splitlines()
    (tmp_path / "store" / "records.csv").write_text("".join(line.rpartition(",")[0] + "\n" for line in records))
    assert {record.source for record in Store.open(tmp_path / "store").records} == {""}
    again = import_films(kaggle, tmp_path / "store", size=32)
    assert again.read == 0 and Store.open(tmp_path / "store").records == store.records


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("image,label\na.png,x\n", "'path' is required"),
        ("path\n", "no rows"),
        ("path,label\n,x\n", "row 2 has no path"),
        ("path\na.png\na.png\n", "more than once"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=match):
        import_films(tmp_path / "t.csv", tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_what_is_no_data_set_is_refused(tmp_path: Path, draw: Draw, save: Save) -> None:
    save(tmp_path / "loose" / "a.png", draw(1))
    with pytest.raises(DataError, match="neither images/ nor class folders"):
        import_films(tmp_path / "loose", tmp_path / "store")
    with pytest.raises(DataError, match="does not exist"):
        import_films(tmp_path / "nowhere", tmp_path / "store")
    with pytest.raises(UsageError, match="radiography"):
        import_films(tmp_path / "loose", tmp_path / "store", layout="radiographie")
    with pytest.raises(UsageError, match="too small"):
        import_films(tmp_path / "loose", tmp_path / "store", size=0)
    assert not (tmp_path / "store").exists()


# Broken files ---------------------------------------------------------------------------------------------------------


def test_unreadable_films_are_listed_and_the_others_go_on(kaggle: Path, tmp_path: Path) -> None:
    images = kaggle / "COVID-19_Radiography_Dataset" / "Normal" / "images"
    (images / "Normal-1.png").write_text("not a film")
    (images / "Normal-2.png").write_bytes((images / "Normal-2.png").read_bytes()[:200])
    (images / "Normal-3.png").write_bytes(b"")
    result = import_films(kaggle, tmp_path / "store", size=32)
    assert codes(result) == {f"Normal-{i}.png": "unreadable" for i in (1, 2, 3)}
    assert result.unreadable == 3
    store = Store.open(tmp_path / "store")
    assert [r.id for r in store.records if r.label == "Normal"] == ["Normal-4"]
    assert len(store.images) == 6
    with (tmp_path / "store" / "rejected.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert rows[0]["path"] == "Normal/images/Normal-1.png"
    assert rows[0]["reason"]
    assert read_rejected(tmp_path / "store") == result.rejected
    np.testing.assert_array_equal(store.images, np.load(tmp_path / "store" / "images.npy"))


def test_what_could_not_be_read_is_read_when_it_can(kaggle: Path, tmp_path: Path) -> None:
    def failing(path: Path) -> Radiograph:
        if path.stem == "COVID-2":
            raise OSError(5, "Input/output error")
        return read(path)

    store = tmp_path / "store"
    result = import_films(kaggle, store, size=32, read=failing)
    assert codes(result) == {"COVID-2.png": "unreadable"} and result.films == 8
    again = import_films(kaggle, store, size=32, read=failing)
    assert again.up_to_date and codes(again) == codes(result)
    result = import_films(kaggle, store, size=32)
    assert (result.films, result.read, result.rejected, result.up_to_date) == (9, 1, (), False)
    assert [r.id for r in Store.open(store).records].count("COVID-2") == 1
    assert import_films(kaggle, store, size=32).up_to_date


def test_of_two_masks_the_one_named_as_the_film_is_taken_and_what_is_passed_over_is_said(
    tmp_path: Path, draw: Draw, draw_mask: Draw, save: Save
) -> None:
    for name in ("Normal", "COVID"):
        save(tmp_path / name / "images" / "x.png", draw(1))
    save(tmp_path / "Normal" / "masks" / "x.png", draw_mask())
    save(tmp_path / "Normal" / "masks" / "x_mask.png", draw_mask() * 0)
    save(tmp_path / "COVID" / "masks" / "x_MASK.png", draw_mask())
    save(tmp_path / "Normal" / "images" / "more" / "y.png", draw(2))
    save(tmp_path / "Normal" / "loose.png", draw(3))
    found = find_films(tmp_path)
    assert [film.mask for film in found.films] == ["COVID/masks/x_MASK.png", "Normal/masks/x.png"]
    assert [(r.path, r.code) for r in found.rejected] == [("Normal/masks/x_mask.png", "mask-twice")]
    assert any("Normal/images/ are not looked at" in said and "more" in said for said in found.remarks)
    assert any("1 files beside Normal/images/" in said and "loose.png" in said for said in found.remarks)


def test_nothing_readable_makes_no_store(tmp_path: Path) -> None:
    (tmp_path / "s" / "images").mkdir(parents=True)
    (tmp_path / "s" / "images" / "a.png").write_text("text")
    with pytest.raises(DataError, match=r"none of 1 films can be read.*a\.png"):
        import_films(tmp_path / "s", tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_masks_that_do_not_match_are_reported(make_store: Callable[..., Store], draw: Draw, draw_mask: Draw) -> None:
    soft = draw_mask()
    soft[2, 2] = 100
    store = make_store(
        "s",
        {name: draw(i) for i, name in enumerate(("good", "ones", "empty", "soft", "wide", "deep", "labels"))},
        masks={
            "good": draw_mask(128, 128),
            "ones": draw_mask() // 255,
            "empty": np.zeros((64, 64), np.uint8),
            "soft": soft,
            "wide": draw_mask(64, 128),
            "deep": draw_mask().astype(np.uint16) * 257,
            "labels": draw_mask() // 255 * np.array([1, 2], np.uint8).repeat(32),
        },
    )
    rejected = {Path(r.path).stem: r for r in read_rejected(store.root)}
    assert "its pixels reach 2 where 255 is set; these may be labels" in rejected["labels"].reason
    assert {name: r.code for name, r in rejected.items()} == {
        "labels": "mask-unreadable",
        "empty": "mask-empty",
        "soft": "mask-not-binary",
        "wide": "mask-aspect",
    }
    used = {r.id: bool(r.mask) for r in store.records}
    assert used == {
        "good": True,
        "ones": True,
        "empty": False,
        "soft": True,
        "wide": False,
        "deep": True,
        "labels": False,
    }
    for record, mask in zip(store.records, store.masks, strict=True):
        assert mask.any() == bool(record.mask)
    assert (store.masks[1] == store.masks[0]).all()
    assert (store.masks[3] == store.masks[0]).all()
    assert (store.masks[5] == store.masks[0]).all()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("two greys", "are 85, neither clear nor set; these may be labels"),
        ("half and whole", "are 127, neither clear nor set"),
        ("two colours", "is in colours"),
        ("palette", "is in colours"),
        ("see-through", "parts of it are transparent"),
    ],
)
def test_labels_colours_and_transparency_are_no_masks(tmp_path: Path, kind: str, reason: str) -> None:
    lungs = np.zeros((64, 64), np.uint8)
    lungs[10:50, 8:28], lungs[10:50, 36:56] = 1, 2
    path = tmp_path / "mask.png"
    if kind in ("two greys", "half and whole"):
        Image.fromarray(np.array([0, 85, 170] if kind == "two greys" else [0, 127, 255], np.uint8)[lungs]).save(path)
    elif kind == "palette":
        picture = Image.fromarray(lungs, "P")
        picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
        picture.save(path)
    elif kind == "two colours":
        Image.fromarray(np.array([(0, 0, 0), (255, 0, 0), (0, 255, 0)], np.uint8)[lungs]).save(path)
    else:
        alpha = np.where(lungs > 0, 255, 0).astype(np.uint8)
        Image.fromarray(np.dstack([np.full_like(lungs, 255)] * 3 + [alpha])).save(path)
    with pytest.raises(DataError, match=reason):
        read_mask(path)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA"])
def test_masks_of_any_mode_are_taken_where_they_are_grey(tmp_path: Path, mode: str) -> None:
    lungs = np.zeros((64, 64), np.uint8)
    lungs[10:50, 8:56] = 255
    Image.fromarray(lungs).convert(mode).save(tmp_path / "mask.png")
    found, between = read_mask(tmp_path / "mask.png")
    assert np.array_equal(found, lungs > 0) and between == 0


def test_a_jpeg_or_a_shrunk_mask_has_edges_and_no_labels(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:512, :512]
    lungs = sum((((rows - 250) / 160) ** 2 + ((columns - x) / 81) ** 2 < 1) * np.uint8(255) for x in (140, 370))
    Image.fromarray(lungs).convert("RGB").save(tmp_path / "mask.jpg", quality=60)
    Image.fromarray(lungs).resize((100, 100), Image.Resampling.BICUBIC).save(tmp_path / "mask.png")
    for name, side in (("mask.jpg", 512), ("mask.png", 100)):
        found, between = read_mask(tmp_path / name)
        assert 0 < between < 0.2
        assert found.mean() == pytest.approx((lungs > 0).mean(), rel=0.02) and found.shape == (side, side)


def test_a_broken_mask_keeps_its_film(kaggle: Path, tmp_path: Path) -> None:
    (kaggle / "COVID-19_Radiography_Dataset" / "COVID" / "masks" / "COVID-2.png").write_bytes(b"\x89PNG broken")
    result = import_films(kaggle, tmp_path / "store", size=32)
    assert codes(result) == {"COVID-2.png": "mask-unreadable"}
    assert (result.films, result.with_mask, result.unreadable) == (9, 8, 0)


# Repeating ------------------------------------------------------------------------------------------------------------


def test_a_second_run_does_nothing(kaggle: Path, tmp_path: Path) -> None:
    first = import_films(kaggle, tmp_path / "store", size=32)
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "store").iterdir()}

    def refuse(path: Path) -> None:
        raise AssertionError(f"{path} was read again")

    second = import_films(kaggle, tmp_path / "store", size=32, read=refuse)
    assert (first.up_to_date, second.up_to_date, second.read, second.reused) == (False, True, 0, 9)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "store").iterdir()} == stamps


def test_only_what_changed_is_read_again(kaggle: Path, tmp_path: Path, draw: Draw, draw_mask: Draw, save: Save) -> None:
    root = kaggle / "COVID-19_Radiography_Dataset"
    (root / "Normal" / "images" / "Normal-4.png").write_text("broken")
    import_films(kaggle, tmp_path / "store", size=32)
    save(root / "COVID" / "images" / "COVID-2.png", draw(999))
    save(root / "Normal" / "masks" / "Normal-1.png", draw_mask() * (np.arange(64) < 40).astype(np.uint8))
    save(root / "Normal" / "images" / "Normal-0.png", draw(998))
    (root / "Viral Pneumonia" / "images" / "Viral Pneumonia-1.png").unlink()
    result = import_films(kaggle, tmp_path / "store", size=32)
    assert (result.read, result.removed, result.up_to_date) == (4, 1, False), "what is broken is tried again"
    assert {"Normal-0.png", "Normal-4.png", "Viral Pneumonia-1.png"} == set(codes(result))
    import_films(kaggle, tmp_path / "fresh", size=32, name="store")
    assert content(tmp_path / "store") == content(tmp_path / "fresh")


def test_a_store_made_by_other_means_is_completed(kaggle: Path, tmp_path: Path) -> None:
    import_films(kaggle, tmp_path / "store", size=32)
    (tmp_path / "store" / "import.jsonl").unlink()
    again = import_films(kaggle, tmp_path / "store", size=32)
    assert (again.read, again.up_to_date) == (9, False)


def test_another_source_or_size_needs_replace(kaggle: Path, tmp_path: Path) -> None:
    import_films(kaggle, tmp_path / "store", size=32, name="mine")
    with pytest.raises(UsageError, match="--replace"):
        import_films(kaggle, tmp_path / "store", size=64)
    assert Store.open(tmp_path / "store").size == 32
    import_films(kaggle, tmp_path / "store", size=64, replace=True)
    assert (Store.open(tmp_path / "store").size, Store.open(tmp_path / "store").name) == (64, "mine")
    shutil.move(kaggle, tmp_path / "moved")
    moved = import_films(tmp_path / "moved", tmp_path / "store", size=64, replace=True)
    assert moved.read == 0
    assert Store.open(tmp_path / "store").origin == tmp_path / "moved" / "COVID-19_Radiography_Dataset"


def test_a_folder_with_other_things_is_left_alone(kaggle: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="not a store"):
        import_films(kaggle, tmp_path / "home")
    with pytest.raises(UsageError, match="is a file"):
        import_films(kaggle, tmp_path / "home" / "letter.txt")


def test_progress_is_told(kaggle: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    import_films(kaggle, tmp_path / "store", size=32, progress=lambda *step: told.append(step))
    assert told[-1] == ("read", 9, 9)
    assert ("check", 9, 9) in told


def test_two_imports_into_one_store_do_not_mix(kaggle: Path, tmp_path: Path) -> None:
    def nested(path: Path) -> None:
        import_films(kaggle, tmp_path / "store", size=32)

    with pytest.raises(UsageError, match="another import"):
        import_films(kaggle, tmp_path / "store", size=32, read=nested)
    assert import_films(kaggle, tmp_path / "store", size=32).films == 9


# Interruptions --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a kill: nothing in the package may catch it."""


def test_a_stop_at_any_film_is_resumed(kaggle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lungscope.readers import read

    (kaggle / "COVID-19_Radiography_Dataset" / "Normal" / "images" / "Normal-2.png").write_text("broken")
    monkeypatch.setattr(importing, "_BATCH", 2)
    import_films(kaggle, tmp_path / "whole", name="s", size=32)
    for stop in range(9):
        dest = tmp_path / f"s{stop}"
        count = 0

        def failing(path: Path, stop: int = stop) -> object:
            nonlocal count
            count += 1
            if count > stop:
                raise Killed
            return read(path)

        with pytest.raises(Killed):
            import_films(kaggle, dest, name="s", size=32, workers=1, read=failing)
        with pytest.raises(DataError, match="not a finished store"):
            Store.open(dest)
        result = import_films(kaggle, dest, name="s", size=32)
        assert result.read == 9 - stop // 2 * 2
        assert content(dest) == content(tmp_path / "whole")


def test_a_stop_at_any_rename_is_resumed(
    kaggle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draw: Draw, save: Save
) -> None:
    import_films(kaggle, tmp_path / "old", name="s", size=32)
    save(kaggle / "COVID-19_Radiography_Dataset" / "COVID" / "images" / "COVID-1.png", draw(77))
    import_films(kaggle, tmp_path / "new", name="s", size=32)
    replace = Path.replace
    stops = 0
    for stop in range(20):
        dest = tmp_path / f"s{stop}"
        shutil.copytree(tmp_path / "old", dest)
        count = 0

        def failing(source: Path, target: Path, stop: int = stop) -> Path:
            nonlocal count
            if count == stop:
                raise Killed
            count += 1
            return replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", failing)
            try:
                import_films(kaggle, dest, name="s", size=32)
                break
            except Killed:
                stops += 1
        if (dest / "store.json").is_file():
            Store.open(dest)
            assert content(dest) == content(tmp_path / "old")
        import_films(kaggle, dest, name="s", size=32)
        assert content(dest) == content(tmp_path / "new")
        assert not (dest / ".import").exists()
    assert stops == 7


@pytest.mark.parametrize(("images", "reads"), [("longer", 5), ("shorter", 6), ("gone", 9)])
def test_journal_and_arrays_that_disagree_are_cut_to_what_both_hold(
    kaggle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: str, reads: int
) -> None:
    from lungscope.readers import read

    monkeypatch.setattr(importing, "_BATCH", 4)
    import_films(kaggle, tmp_path / "whole", name="s", size=32)
    seen = 0

    def failing(path: Path) -> object:
        nonlocal seen
        seen += 1
        if seen > 5:
            raise Killed
        return read(path)

    with pytest.raises(Killed):
        import_films(kaggle, tmp_path / "s", size=32, workers=1, read=failing)
    work = tmp_path / "s" / ".import"
    with (work / "import.jsonl").open("ab") as stream:
        stream.write(b'{"film": {"id": "COV')
    length = (work / "images.npy").stat().st_size
    if images == "gone":
        (work / "images.npy").unlink()
    else:
        os.truncate(work / "images.npy", length + (500 if images == "longer" else -1))
    result = import_films(kaggle, tmp_path / "s", size=32)
    assert result.read == reads
    assert content(tmp_path / "s") == content(tmp_path / "whole")


SCRIPT = """
import sys, time
from pathlib import Path
from lungscope.data import importing
from lungscope.readers import read
importing._BATCH = 2
def slow(path):
    time.sleep(0.03)
    return read(path)
Path(sys.argv[3]).touch()
importing.import_films(Path(sys.argv[1]), Path(sys.argv[2]), name="s", size=32, read=slow, workers=2)
"""


def test_sigkill_at_random_moments_is_resumed(zipped: Path, tmp_path: Path) -> None:
    import_films(zipped, tmp_path / "whole", name="s", size=32)
    dest = tmp_path / "s"
    command = [sys.executable, "-c", SCRIPT, str(zipped), str(dest), str(tmp_path / "begun")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    rng = random.Random(5)
    kills = 0
    for attempt in range(40):
        process = subprocess.Popen(command, env=environment)
        limit = time.monotonic() + 60
        while process.poll() is None and not (tmp_path / "begun").exists() and time.monotonic() < limit:
            time.sleep(0.01)
        (tmp_path / "begun").unlink(missing_ok=True)
        # Ever later, so that a slow machine gets done too.
        time.sleep(rng.uniform(0, 0.2 + 0.2 * attempt))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        if (dest / "store.json").is_file():
            Store.open(dest)
    assert process.returncode == 0
    assert kills >= 1
    want, got = content(tmp_path / "whole"), content(dest)
    for files in (want, got):
        del files["store.json"]
    assert got == want


# The real data --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (DATA / "radiography").is_dir(), reason=f"the real films are not at {DATA}")
def test_real_films_of_every_class(tmp_path: Path) -> None:
    root = tmp_path / "radiography"
    for folder in ("COVID", "Normal", "Viral Pneumonia"):
        for path in sorted((DATA / "radiography" / folder / "images").iterdir())[:5]:
            (root / folder / "images").mkdir(parents=True, exist_ok=True)
            shutil.copy(path, root / folder / "images")
            mask = DATA / "radiography" / folder / "masks" / f"{path.stem}.png"
            if mask.is_file():
                (root / folder / "masks").mkdir(exist_ok=True)
                shutil.copy(mask, root / folder / "masks")
    result = import_films(root, tmp_path / "store")
    assert result.by_label == {"COVID-19": 5, "Normal": 5, "Viral Pneumonia": 5}
    assert (result.with_mask, result.rejected) == (5, ())
    store = Store.open(tmp_path / "store")
    for i, record in enumerate(store.records):
        pixels = np.asarray(Image.open(root / record.image).convert("L"))
        grid = Geometry.letterbox(pixels.shape, 256).to_network(pixels.astype(np.float32) / 255)
        assert (store.images[i] == np.rint(grid * 255)).all()


@pytest.mark.skipif(not (DATA / "radiography").is_dir(), reason=f"the real films are not at {DATA}")
def test_children_among_real_normal_films_are_where_their_numbers_say() -> None:
    """A linear discriminant of thumbnails, fitted to films of even numbers far from the ends of the children's range,
    tells films of odd numbers, and where the range begins and ends."""
    paths = {int(path.stem.partition("-")[2]): path for path in (DATA / "radiography" / "Normal" / "images").iterdir()}
    numbers = np.array(sorted(number for number in paths if number < 2600 or number % 6 < 2))
    films = [Geometry.letterbox((224, 224), 16).to_network(read(paths[int(n)]).pixels).ravel() for n in numbers]
    table = np.array([[*(film - film.mean()) / film.std(), 1] for film in films])
    child = np.array([radiography_source("Normal", f"Normal-{n}") == GUANGZHOU for n in numbers])
    ends = (62.5, 1403.5)
    far = np.abs(numbers[:, None] - ends).min(axis=1) > 60
    fitted, other = far & (numbers % 2 == 0), far & (numbers % 2 == 1)
    # Both sides count alike; ridge regression onto +1 and -1.
    weights = np.where(child, 1 / child[fitted].mean(), 1 / (~child)[fitted].mean())[fitted, None] * table[fitted]
    score = table @ np.linalg.solve(
        weights.T @ table[fitted] + np.eye(table.shape[1]), weights.T @ np.where(child, 1.0, -1.0)[fitted]
    )
    assert (score > 0)[other & child].mean() > 0.93
    assert (score < 0)[other & ~child].mean() > 0.98
    for end, inside in zip(ends, (1, -1), strict=True):
        near, sides = (array[np.abs(numbers - end) < 50] for array in (numbers, inside * score > 0))
        rightly = [np.count_nonzero(sides == (near > last)) for last in near]
        assert near[int(np.argmax(rightly))] == int(end), "the cut at which most films are on their side"


def test_records_survive_awkward_names(tmp_path: Path, make_store: Callable[..., Store], draw: Draw) -> None:
    store = make_store("s", {"ä ö 'x'": draw(1)})
    assert store.records[0].id == "ä ö 'x'"
    write_records(tmp_path / "r.csv", store.records)
    assert (tmp_path / "r.csv").read_bytes() == (store.root / "records.csv").read_bytes()
