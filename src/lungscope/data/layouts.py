"""Where the films, masks and labels of a data set lie, before any of them is opened."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from lungscope.errors import DataError, look_up
from lungscope.readers.common import NO_FILM
from lungscope.stages.severity import NORMAL

LAYOUTS = ("auto", "radiography", "folder", "csv")
CSV_COLUMNS = ("path", "label", "mask", "patient", "source")
LUNG_OPACITY, VIRAL_PNEUMONIA = "Lung Opacity", "Viral Pneumonia"

#: Labels of the COVID-19 Radiography Database by its folder names (lower case, letters and digits only), in its order.
RADIOGRAPHY_CLASSES = {
    "covid": "COVID-19",
    "covid19": "COVID-19",
    "normal": NORMAL,
    "lungopacity": LUNG_OPACITY,
    "viralpneumonia": VIRAL_PNEUMONIA,
}
#: Where films of the COVID-19 Radiography Database came from, as far as can be told.
GUANGZHOU, RSNA = "Guangzhou children", "RSNA adults"
#: Numbers of the Normal films that are of the children's hospital (Kermany et al. 2018) whose Viral Pneumonia it is.
#: The public release says that there are 1,341, and not which; these 1,341 in a row differ from all others at sight.
_CHILDREN = range(63, 1404)


@dataclass(frozen=True)
class Film:
    """One film as its data set names it. Paths are relative to the set's origin; "" means none or not known.

    source: the hospital or collection that the film came from.
    """

    id: str
    image: str
    label: str = ""
    mask: str = ""
    patient: str = ""
    source: str = ""


@dataclass(frozen=True)
class Rejected:
    """A file that was not taken, or only under a condition. `kind`: film, mask or archive member."""

    path: str
    kind: str
    code: str
    reason: str


@dataclass(frozen=True)
class Layout:
    """The films of a data set in their order, files that belong to none of them, and remarks for the user."""

    origin: Path
    kind: str
    films: tuple[Film, ...]
    rejected: tuple[Rejected, ...]
    remarks: tuple[str, ...]


def find_films(source: Path, layout: str = "auto", *, with_lung_opacity: bool = False) -> Layout:
    """List the films of `source` without opening them.

    csv          a table with the columns path, label, mask, patient, source (only path is required), relative to it
    folder       images/ and, optional, masks/ with the same file names (or <stem>_mask): no labels
    radiography  the COVID-19 Radiography Database as Kaggle ships it, <class>/images and <class>/masks, in its class
                 order; other class folders follow under their own names. Lung_Opacity only with `with_lung_opacity`

    A folder that only wraps the set is looked through. Names of folders and suffixes may be in any case.
    Raises DataError where no film is found or the table is not one.
    """
    look_up(layout, LAYOUTS, what="layout")
    if source.is_file():
        if layout not in ("auto", "csv") or source.suffix.lower() != ".csv":
            raise DataError(f"{source}: a file of layout {layout!r}; a data set is a folder, a .zip, or a .csv table")
        return _from_csv(source)
    if not source.is_dir():
        raise DataError(f"{source} does not exist. Give a folder, a .zip, or a .csv table with a column 'path'")
    if layout == "csv":
        raise DataError(f"{source} is a folder; for layout 'csv' give the table itself, for example {source}/films.csv")
    root, kind = _root(source, layout)
    if kind == "folder":
        films, rejected, remarks = _from_class(root, root, "")
    else:
        films, rejected, remarks = _from_classes(root, with_lung_opacity)
    if not films:
        raise DataError(f"{root}: no films found in layout {kind!r}. {' '.join(remarks)}".rstrip())
    return Layout(root.resolve(), kind, _with_unique_ids(films), tuple(rejected), tuple(remarks))


def _root(source: Path, layout: str) -> tuple[Path, str]:
    """The folder that the layout starts in, looking through folders that only wrap it."""
    folder = source
    for _ in range(4):
        children = _folders(folder)
        if layout in ("auto", "folder") and _child(folder, "images"):
            return folder, "folder"
        known = any(_class_key(child) in RADIOGRAPHY_CLASSES or _child(child, "images") for child in children)
        if layout in ("auto", "radiography") and known:
            return folder, "radiography"
        if len(children) != 1:
            break
        folder = children[0]
    raise DataError(
        f"{source}: neither images/ nor class folders with images/ (COVID, Normal, Viral Pneumonia, or your own) were "
        f"found; it holds {', '.join(sorted(p.name for p in source.iterdir())[:8]) or 'nothing'}. "
        "Other layouts: list the films in a .csv table with the columns path, label, mask, patient, source"
    )


def _from_classes(root: Path, with_lung_opacity: bool) -> tuple[list[Film], list[Rejected], list[str]]:
    order = {key: i for i, key in enumerate(RADIOGRAPHY_CLASSES)}
    folders = sorted(_folders(root), key=lambda p: (order.get(_class_key(p), len(order)), p.name))
    films: list[Film] = []
    rejected: list[Rejected] = []
    remarks: list[str] = []
    for folder in folders:
        known = RADIOGRAPHY_CLASSES.get(_class_key(folder))
        if known is None and _child(folder, "images") is None:
            remarks.append(f"{folder.name}/ has no images/ in it and was left out.")
        elif known == LUNG_OPACITY and not with_lung_opacity:
            remarks.append(f"{folder.name}/ was left out; take it as a fourth class with --with-lung-opacity.")
        else:
            found, bad, said = _from_class(root, folder, known or folder.name)
            films += [replace(film, source=radiography_source(film.label, film.id)) for film in found]
            rejected += bad
            remarks += said
    return films, rejected, remarks


def called_as_published(label: str, stem: str) -> bool:
    """Whether a film is called as the COVID-19 Radiography Database calls those of its class: `COVID-12`."""
    name, _, number = stem.rpartition("-")
    return number.isdecimal() and RADIOGRAPHY_CLASSES.get(_key(name)) == label


def radiography_source(label: str, stem: str) -> str:
    """Where a film of the COVID-19 Radiography Database came from, by its class and file name (`Normal-63`): Viral
    Pneumonia and 1,341 of Normal are of one children's hospital, Lung Opacity and the other Normal films of adults
    (RSNA's challenge). "" where it can not be told, as with COVID-19, which is of many collections, and for films that
    are not called as they are there."""
    if not called_as_published(label, stem) or label not in (NORMAL, LUNG_OPACITY, VIRAL_PNEUMONIA):
        return ""
    number = int(stem.rpartition("-")[2])
    children = label == VIRAL_PNEUMONIA or (label == NORMAL and number in _CHILDREN)
    return GUANGZHOU if children else RSNA


def _from_class(root: Path, folder: Path, label: str) -> tuple[list[Film], list[Rejected], list[str]]:
    """Films of `folder`/images (or of `folder` itself), each with its mask of the same stem; masks without a film; and
    what was not looked at."""
    images, masks = _child(folder, "images") or folder, _child(folder, "masks")
    rejected, films, remarks = [], [], []
    by_stem: dict[str, Path] = {}
    for path in sorted(_files(masks), key=lambda path: path.stem.lower().endswith("_mask")) if masks else ():
        stem = path.stem.lower().removesuffix("_mask")
        if (taken := by_stem.setdefault(stem, path)) != path:
            reason = f"{taken.name} is that film's mask already"
            rejected.append(Rejected(path.relative_to(root).as_posix(), "mask", "mask-twice", reason))
    where = images.relative_to(root).as_posix()
    if images != folder and (inner := [child.name for child in _folders(images)]):
        remarks.append(f"Folders in {where}/ are not looked at; move their films up: {', '.join(inner)}.")
    if images != folder and label and (loose := _files(folder)):
        remarks.append(f"{len(loose):,} files beside {where}/ are not looked at, the first: {loose[0].name}.")
    for path in _files(images):
        mask = by_stem.pop(path.stem.lower(), None)
        name = path.relative_to(root).as_posix()
        films.append(Film(path.stem, name, label, mask.relative_to(root).as_posix() if mask else ""))
        if masks and mask is None:
            rejected.append(Rejected(name, "mask", "mask-missing", f"no mask of this name in {masks.name}/"))
    for path in by_stem.values():
        reason = f"a mask without a film of this name in {images.name}/"
        rejected.append(Rejected(path.relative_to(root).as_posix(), "mask", "mask-orphan", reason))
    return films, rejected, remarks


def _from_csv(table: Path) -> Layout:
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            columns = {name.strip().lower(): name for name in reader.fieldnames or ()}
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table} cannot be read as a table: {error}. Save it as comma-separated UTF-8") from error
    if "path" not in columns:
        here = ", ".join(columns) or "none"
        raise DataError(f"{table}: columns: {here}; 'path' is required, label, mask, patient and source are optional")
    films = []
    for line, row in enumerate(rows, 2):
        if None in row:
            raise DataError(f"{table}: row {line} has more cells than columns. Put a cell with a comma in it in quotes")
        cells = {name: (row.get(columns.get(name, "")) or "").strip() for name in CSV_COLUMNS}
        if not cells["path"]:
            raise DataError(f"{table}: row {line} has no path. Give one, or take the row out")
        image = cells.pop("path")
        film = Film(PurePosixPath(image).stem, image, **cells)
        films.append(replace(film, label=RADIOGRAPHY_CLASSES.get(_key(film.label), film.label)))
    twice = [path for path, n in Counter(film.image for film in films).items() if n > 1]
    if twice:
        raise DataError(f"{table}: {', '.join(map(repr, twice[:3]))} listed more than once. A film has one row")
    if not films:
        raise DataError(f"{table} has no rows. List one film a row")
    unused = [name for key, name in columns.items() if key not in CSV_COLUMNS]
    remarks = (f"Columns not used: {', '.join(unused)}.",) if unused else ()
    return Layout(table.parent.resolve(), "csv", _with_unique_ids(films), (), remarks)


def _with_unique_ids(films: Iterable[Film]) -> tuple[Film, ...]:
    """The stem is the id where only one film has it; else the path without its suffix, or the whole path."""
    films = list(films)
    stems = Counter(film.id for film in films)
    paths = Counter(film.image.removesuffix(PurePosixPath(film.image).suffix) for film in films)

    def name(film: Film) -> str:
        if stems[film.id] == 1:
            return film.id
        path = film.image.removesuffix(PurePosixPath(film.image).suffix)
        return path if paths[path] == 1 and stems[path] == 0 else film.image

    return tuple(replace(film, id=name(film)) for film in films)


def _class_key(folder: Path) -> str:
    return _key(folder.name)


def _key(label: str) -> str:
    """How classes of the Radiography Database are known, however they are spelt."""
    return "".join(c for c in label.lower() if c.isalnum())


def _child(folder: Path, name: str) -> Path | None:
    return next((child for child in _folders(folder) if child.name.lower() == name), None)


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name != "__MACOSX")


def _files(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".") and p.name.lower() not in NO_FILM
    )
