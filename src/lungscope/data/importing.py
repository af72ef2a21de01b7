"""Importing a data set into a store: every file verified, interruptible at any moment, repeatable at no cost.

While it runs, everything lies in DEST/.import: the arrays, to which films are appended, and a journal with one line a
film, written only after that film's bytes are on disk. The finished files are moved into place by rename, `store.json`
last; no other moment leaves a store that opens. An interrupted import goes on where its journal ends.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from lungscope.data.archive import unpack
from lungscope.data.layouts import Film, Layout, Rejected, find_films
from lungscope.data.store import SCHEMA_VERSION, Record, Store, write_records
from lungscope.errors import DataError, InputError, UnreadableFileError, UsageError
from lungscope.radiograph import Geometry, Pixels, Radiograph

if TYPE_CHECKING:
    from PIL.Image import Image

WORK = ".import"
LOG = "import.jsonl"
REJECTED = "rejected.csv"
_MOVED = ("images.npy", "masks.npy", "records.csv", REJECTED, LOG)
_BATCH = 64
#: Relative difference of height/width beyond which a mask cannot be of the film that it is named after.
_ASPECT_TOLERANCE = 0.02
#: A mask with more pixels than this share of one value that is neither clear nor set holds labels, not an edge.
MOST_LIKE = 0.04
#: The most that channels of a grey mask are apart, of 255: what JPEG makes of grey.
MOST_COLOUR = 24

Grid = NDArray[np.uint8]

#: Told of each phase (`unpack`, `check`, `read`) how many files of how many are done.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Imported:
    """What an import did. `read` films were decoded now; `reused` ones were known with the same content.

    removed: films of the store before that the source no longer has. up_to_date: nothing had to be done.
    """

    store: Path
    name: str
    origin: Path
    layout: str
    films: int
    by_label: dict[str, int]
    with_mask: int
    rejected: tuple[Rejected, ...]
    read: int
    reused: int
    removed: int
    up_to_date: bool
    remarks: tuple[str, ...]

    @property
    def unreadable(self) -> int:
        """Number of films that could not be taken."""
        return sum(item.kind != "mask" for item in self.rejected)

    def to_json(self) -> dict[str, object]:
        facts = asdict(self)
        return {**facts, "store": str(self.store), "origin": str(self.origin), "unreadable": self.unreadable}


@dataclass(frozen=True)
class _Entry:
    """One line of the journal: a film, what its files held, and what became of it (height 0: rejected)."""

    film: Film
    image_sha256: str
    mask_sha256: str
    height: int = 0
    width: int = 0
    masked: bool = False
    rejected: tuple[Rejected, ...] = ()

    @property
    def key(self) -> tuple[Film, str, str]:
        return self.film, self.image_sha256, self.mask_sha256

    @property
    def content(self) -> tuple[str, str, str, str]:
        """What the cached pixels depend on."""
        return self.film.image, self.image_sha256, self.film.mask, self.mask_sha256

    def to_line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> _Entry:
        row = json.loads(line)
        notes = tuple(Rejected(**note) for note in row.pop("rejected"))
        return cls(**{**row, "film": Film(**row["film"]), "rejected": notes})

    def record(self) -> Record:
        film = self.film
        mask = film.mask if self.masked else ""
        size = (self.height, self.width)
        return Record(film.id, film.image, film.label, mask, film.patient, self.image_sha256, *size, film.source)


def import_films(
    source: Path,
    dest: Path,
    *,
    name: str | None = None,
    size: int = 256,
    layout: str = "auto",
    with_lung_opacity: bool = False,
    replace: bool = False,
    workers: int | None = None,
    progress: Progress = lambda phase, done, total: None,
    read: Callable[[Path], Radiograph] | None = None,
) -> Imported:
    """Import `source` (a folder, a .zip or a .csv table, see `layouts.find_films`) into the store `dest`.

    name: what splits and reports call the store; its folder's name where not given. size: side of the cached grid.
    replace: allow a store of another source or size to be replaced. read: the reader, `lungscope.readers.read`.
    A zip is unpacked beside the store, into <dest>.films. Films that cannot be read are listed with the reason in
    <dest>/rejected.csv and the import goes on; a mask that is empty, unreadable or of another aspect ratio is listed
    too and not used; one that is not binary is listed and cut at half its scale.
    Raises DataError where nothing can be imported, UsageError where `dest` holds something else.
    """
    if size < 32:
        raise UsageError(f"size {size} is too small a grid for a chest film; allowed: 32 and more, usual: 256")
    if read is None:
        from lungscope.readers import read as read_film

        read = read_film
    with _locked(dest):
        _finish(dest)
        broken: dict[str, str] = {}
        if source.suffix.lower() == ".zip" and source.is_file():
            films_folder = dest.with_name(dest.name + ".films")
            broken = unpack(source, films_folder, lambda done, total: progress("unpack", done, total))
            source = films_folder
        found = find_films(source, layout, with_lung_opacity=with_lung_opacity)
        before = Store.open(dest) if (dest / "store.json").is_file() else None
        if before and not replace and (before.size != size or before.origin != found.origin):
            raise UsageError(
                f"{dest} holds the store {before.name!r} of {before.origin} at {before.size} pixels; asked for "
                f"{found.origin} at {size}. Choose another DEST, or add --replace"
            )
        name = name or (before.name if before else dest.resolve().name)
        outside = (*(Rejected(path, "archive", "broken", why) for path, why in broken.items()), *found.rejected)

        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            wanted = _fingerprint(found, pool, progress)
            old = _read_log(dest / LOG) if before else []
            same = [entry.key for entry in old] == [entry.key for entry in wanted]
            same = (
                same and before is not None and (before.name, before.origin, before.size) == (name, found.origin, size)
            )
            again = [entry for entry in old if same and _may_change(entry)]
            if same and list(pool.map(lambda entry: _load(found.origin, entry, size, read)[0], again)) == again:
                notes = _notes(outside, old)
                if (dest / REJECTED).is_file() and (dest / REJECTED).read_text() == _table(notes):
                    shutil.rmtree(dest / WORK, ignore_errors=True)
                    return _summary(dest, name, found, old, notes, read=0, removed=0, up_to_date=True)
            entries, decoded = _write_arrays(dest / WORK, found, wanted, size, old, before, read, pool, progress)

        records = [entry.record() for entry in entries if entry.height]
        notes = _notes(outside, entries)
        if not records:
            first = f" The first: {notes[0].path}: {notes[0].reason}" if notes else ""
            shutil.rmtree(dest / WORK)
            raise DataError(f"{found.origin}: none of {len(entries)} films can be read, so no store was made.{first}")
        write_records(dest / WORK / "records.csv", records)
        (dest / WORK / REJECTED).write_text(_table(notes))
        facts = {"schema_version": SCHEMA_VERSION, "name": name, "size": size, "origin": str(found.origin)}
        _write_durably(dest / WORK / "store.json", json.dumps(facts).encode())
        _finish(dest)
        gone = len({entry.film.image for entry in old} - {entry.film.image for entry in entries})
        return _summary(dest, name, found, entries, notes, read=decoded, removed=gone, up_to_date=False)


@contextlib.contextmanager
def _locked(dest: Path) -> Iterator[None]:
    """Hold `dest` for one import at a time; the lock ends with the process. An empty folder is not left behind."""
    if dest.exists() and not dest.is_dir():
        raise UsageError(f"{dest} is a file; a store is a folder. Choose another DEST")
    if dest.is_dir() and any(dest.iterdir()) and not ((dest / "store.json").is_file() or (dest / WORK).is_dir()):
        raise UsageError(f"{dest} is not empty and not a store. Choose another DEST")
    try:
        dest.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{dest} cannot be made: {error.strerror}. Choose another DEST") from error
    held = None
    try:
        if sys.platform != "win32":
            import fcntl

            held = os.open(dest, os.O_RDONLY)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError(f"another import into {dest} is running. Wait for it") from error
        yield
    finally:
        with contextlib.suppress(OSError):
            dest.rmdir()
        if held is not None:
            os.close(held)


def _finish(dest: Path) -> None:
    """Move a completed import into place. Safe to repeat: its store.json says that all is there, and is moved last."""
    work = dest / WORK
    if not (work / "store.json").is_file():
        return
    (dest / "store.json").unlink(missing_ok=True)
    for name in _MOVED:
        if (work / name).exists():
            (work / name).replace(dest / name)
    (work / "store.json").replace(dest / "store.json")
    shutil.rmtree(work)


def _fingerprint(found: Layout, pool: ThreadPoolExecutor, progress: Progress) -> list[_Entry]:
    """What is asked for: each film with the SHA-256 of its files ("" where a file is not there or cannot be opened)."""

    def digests(film: Film) -> _Entry:
        return _Entry(film, _sha256(found.origin / film.image), _sha256(found.origin / film.mask) if film.mask else "")

    entries = []
    for entry in pool.map(digests, found.films):
        entries.append(entry)
        if len(entries) % _BATCH == 0 or len(entries) == len(found.films):
            progress("check", len(entries), len(found.films))
    return entries


def _write_arrays(
    work: Path,
    found: Layout,
    wanted: Sequence[_Entry],
    size: int,
    old: Sequence[_Entry],
    before: Store | None,
    read: Callable[[Path], Radiograph],
    pool: ThreadPoolExecutor,
    progress: Progress,
) -> tuple[list[_Entry], int]:
    """Fill DEST/.import with arrays and journal; return the journal and how many films were decoded now."""
    work.mkdir(exist_ok=True)
    size_file = work / "size"
    if not size_file.is_file() or size_file.read_text() != str(size):
        shutil.rmtree(work)
        work.mkdir()
        size_file.write_text(str(size))
    entries = _resumable(work, wanted, size)
    rows = sum(entry.height > 0 for entry in entries)
    known: dict[tuple[str, str, str, str], tuple[_Entry, int]] = {}
    if before and before.size == size:
        kept = [entry for entry in old if entry.height]
        known = {entry.content: (entry, row) for row, entry in enumerate(kept) if not _may_change(entry)}

    def produce(entry: _Entry) -> tuple[_Entry, Grid, Grid, bool]:
        past = known.get(entry.content)
        if past is None or before is None:
            return *_load(found.origin, entry, size, read), True
        done, row = past
        films = before.images[row], before.masks[row]
        return _Entry(*entry.key, done.height, done.width, done.masked, done.rejected), *films, False

    decoded = 0
    images, masks = (_Appender(work / name, size, rows) for name in ("images.npy", "masks.npy"))
    with images, masks, (work / LOG).open("ab") as journal:
        progress("read", len(entries), len(wanted))
        for start in range(len(entries), len(wanted), _BATCH):
            batch = list(pool.map(produce, wanted[start : start + _BATCH]))
            for entry, image, mask, new in batch:
                decoded += new
                if entry.height:
                    images.append(image)
                    masks.append(mask)
            images.sync()
            masks.sync()
            journal.write(b"".join(entry.to_line() for entry, *_ in batch))
            journal.flush()
            os.fsync(journal.fileno())
            entries += [entry for entry, *_ in batch]
            progress("read", len(entries), len(wanted))
    return entries, decoded


def _may_change(entry: _Entry) -> bool:
    """Whether a film, or its mask, could not be read. Where a drive or a decoder was wanting, it may be that it can."""
    return not entry.height or any(note.code == "mask-unreadable" for note in entry.rejected)


def _resumable(work: Path, wanted: Sequence[_Entry], size: int) -> list[_Entry]:
    """The part of an interrupted import's journal that is still true; the journal is cut behind it."""
    journal = work / LOG
    if not journal.is_file():
        return []
    arrays = [work / name for name in ("images.npy", "masks.npy")]
    stored = min((path.stat().st_size - len(_header(0, size))) // size**2 if path.is_file() else 0 for path in arrays)
    entries: list[_Entry] = []
    length = rows = 0
    for line in journal.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n") or len(entries) == len(wanted):
            break
        entry = _Entry.from_line(line)
        rows += entry.height > 0
        if entry.key != wanted[len(entries)].key or rows > stored:
            break
        entries.append(entry)
        length += len(line)
    os.truncate(journal, length)
    return entries


class _Appender:
    """A u8 [N, S, S] .npy file that grows by whole films; its header is written when N is known."""

    def __init__(self, path: Path, size: int, rows: int) -> None:
        self.size, self.rows = size, rows
        self.stream = path.open("r+b" if path.is_file() else "w+b")
        self.stream.truncate(len(_header(0, size)) + rows * size**2)
        self.stream.seek(0, os.SEEK_END)

    def append(self, grid: Grid) -> None:
        self.stream.write(np.ascontiguousarray(grid).tobytes())
        self.rows += 1

    def sync(self) -> None:
        self.stream.flush()
        os.fsync(self.stream.fileno())

    def __enter__(self) -> _Appender:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.seek(0)
        self.stream.write(_header(self.rows, self.size))
        self.sync()
        self.stream.close()


def _header(rows: int, size: int) -> bytes:
    """The .npy header (NEP 1); NumPy pads it so that its length does not depend on the number of rows."""
    buffer = io.BytesIO()
    facts = {"descr": "|u1", "fortran_order": False, "shape": (rows, size, size)}
    np.lib.format.write_array_header_1_0(buffer, facts)
    return buffer.getvalue()


# One film -------------------------------------------------------------------------------------------------------------

_NOTHING: Grid = np.zeros((0, 0), np.uint8)


def _load(origin: Path, wanted: _Entry, size: int, read: Callable[[Path], Radiograph]) -> tuple[_Entry, Grid, Grid]:
    """Decode one film and its mask onto the cached grid, or say why not."""
    film = wanted.film
    path = origin / film.image
    try:
        if not path.is_file():
            raise UnreadableFileError(f"{path} is not there. Correct the path, or add the file", code="missing")
        radiograph = read(path)
    except (InputError, OSError) as error:
        code = error.code if isinstance(error, InputError) else "unreadable"
        return _Entry(*wanted.key, rejected=(Rejected(film.image, "film", code, str(error)),)), _NOTHING, _NOTHING
    image = np.rint(Geometry.letterbox(radiograph.shape, size).to_network(radiograph.pixels) * 255).astype(np.uint8)
    mask = np.zeros((size, size), np.uint8)
    notes: tuple[Rejected, ...] = ()
    if film.mask:
        lungs, notes = _load_mask(origin, film.mask, radiograph.shape)
        if lungs is not None:
            mask = on_store_grid(over_film(lungs, radiograph.shape), size)
    used = film.mask != "" and bool(mask.any())
    return _Entry(*wanted.key, *radiograph.shape, used, notes), image, mask


def read_mask(path: Path) -> tuple[NDArray[np.bool_], float]:
    """A mask file as bool [h, w], set above half of its range (0..1 where nothing is above 1), and the share of its
    pixels that are neither clear nor set.

    Raises DataError for a file that is missing, can not be read, is in colours or see-through, or holds labels.
    """
    from PIL import Image

    try:
        with Image.open(path) as file:
            deep = file.mode.startswith(("I", "F"))
            grid = np.asarray(file) if deep else _grey(file, path)
            scale = 1 if file.mode == "F" else 65535 if deep else 255
    except FileNotFoundError as error:
        raise DataError(f"{path}: the mask is not there. Import the set again") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: can not be read as a mask: {error}") from error
    if grid.max() <= 1:
        scale = 1
    elif grid.max() <= scale / 2:
        raise DataError(
            f"{path}: its pixels reach {grid.max():g} where {scale:,} is set; these may be labels. Give a mask with "
            f"{scale:,}, or 1, where lungs are, and 0 elsewhere"
        )
    between = grid[(grid > 0.1 * scale) & (grid < 0.9 * scale)]
    values, counts = np.unique(between, return_counts=True)
    if between.size and counts.max() > MOST_LIKE * grid.size:
        raise DataError(
            f"{path}: {counts.max() / grid.size:.0%} of its pixels are {values[counts.argmax()]:g}, neither clear nor "
            f"set; these may be labels. Give a mask with {scale:,}, or 1, where lungs are, and 0 elsewhere"
        )
    return grid > scale / 2, float(((grid != 0) & (grid != scale)).mean())


def _grey(file: Image, path: Path) -> NDArray[np.uint8]:
    """A picture of any mode as grey. Raises DataError where colours or transparency say what grey would not."""
    if file.mode in ("1", "L"):
        return np.asarray(file.convert("L"))
    picture = np.asarray(file.convert("RGBA"))
    if picture[..., 3].min() < 255:
        raise DataError(f"{path}: parts of it are transparent. Give a grey mask, white where lungs are")
    if np.ptp(picture[..., :3], axis=-1).max() > MOST_COLOUR:
        raise DataError(f"{path}: is in colours, which may be labels. Give a grey mask, white where lungs are")
    return np.asarray(file.convert("L"))


def over_film(mask: NDArray[np.bool_], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """A mask [h, w] as it lies over a film [H, W]: one of another aspect is stretched to the film's grid, as scores
    have it, where half of a pixel or more is set; one of the same aspect stays as it is."""
    (h, w), (height, width) = mask.shape, shape
    return mask if h * width == w * height else stretched(mask, shape)


def stretched(mask: NDArray[np.bool_], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """A mask [h, w] on another grid over the same film [H, W]; a pixel is set where half of it or more is."""
    how = cv2.INTER_AREA if mask.shape[0] >= shape[0] else cv2.INTER_LINEAR
    found: NDArray[np.bool_] = cv2.resize(mask.astype(np.float32), shape[::-1], interpolation=how) >= 0.5
    return found


def on_store_grid(mask: NDArray[np.bool_], size: int) -> Grid:
    """A mask [h, w] as a store holds it: u8 [size, size], 255 where half of a cell or more is set, else 0."""
    return (shares_on_store_grid(mask, size) >= 0.5).astype(np.uint8) * np.uint8(255)


def shares_on_store_grid(grid: NDArray[np.bool_] | Pixels, size: int) -> Pixels:
    """A mask, or a map of 0..1, [h, w] on a store's grid: f32 [size, size], how much of each cell it is."""
    height, width = grid.shape
    return Geometry.letterbox((height, width), size).to_network(grid)


def same_aspect(mask: tuple[int, ...], film: tuple[int, ...]) -> bool:
    """Whether grids [h, w] and [H, W] may lie over the same film."""
    return abs(mask[0] * film[1] / (mask[1] * film[0]) - 1) <= _ASPECT_TOLERANCE


def _load_mask(
    origin: Path, name: str, film_shape: tuple[int, int]
) -> tuple[NDArray[np.bool_] | None, tuple[Rejected, ...]]:
    """A mask on its own grid, bool [h, w], or None where it cannot be used; and what is wrong with it."""

    def note(code: str, reason: str) -> Rejected:
        return Rejected(name, "mask", code, reason)

    if not (origin / name).exists():
        return None, (note("mask-missing", "the file is not there; the film was imported without a mask"),)
    try:
        lungs, between = read_mask(origin / name)
    except DataError as error:
        return None, (note("mask-unreadable", f"{error}; the film was imported without a mask"),)
    notes = []
    if between:
        notes.append(note("mask-not-binary", f"{between:.2%} of its pixels are neither clear nor set; cut at half"))
    if not lungs.any():
        return None, (*notes, note("mask-empty", "no pixel is set; the film was imported without a mask"))
    (h, w), (height, width) = lungs.shape, film_shape
    if not same_aspect(lungs.shape, film_shape):
        reason = f"{h} x {w} pixels for a film of {height} x {width}: another aspect ratio; imported without a mask"
        return None, (*notes, note("mask-aspect", reason))
    return lungs, tuple(notes)


# Files ----------------------------------------------------------------------------------------------------------------


def read_rejected(store: Path) -> tuple[Rejected, ...]:
    """The files that an import did not take, or only under a condition; none where the store has no such list."""
    path = store / REJECTED
    if not path.is_file():
        return ()
    with path.open(newline="") as stream:
        return tuple(Rejected(**row) for row in csv.DictReader(stream))


def _summary(
    dest: Path,
    name: str,
    found: Layout,
    entries: Sequence[_Entry],
    notes: tuple[Rejected, ...],
    *,
    read: int,
    removed: int,
    up_to_date: bool,
) -> Imported:
    taken = [entry for entry in entries if entry.height]
    return Imported(
        store=dest,
        name=name,
        origin=found.origin,
        layout=found.kind,
        films=len(taken),
        by_label=dict(Counter(entry.film.label for entry in taken)),
        with_mask=sum(entry.masked for entry in taken),
        rejected=notes,
        read=read,
        reused=len(entries) - read,
        removed=removed,
        up_to_date=up_to_date,
        remarks=found.remarks,
    )


def _notes(outside: Sequence[Rejected], entries: Sequence[_Entry]) -> tuple[Rejected, ...]:
    return (*outside, *(note for entry in entries for note in entry.rejected))


def _table(rejected: Sequence[Rejected]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(Rejected)])
    writer.writerows([item.path, item.kind, item.code, item.reason] for item in rejected)
    return text.getvalue()


def _read_log(path: Path) -> list[_Entry]:
    """The journal of a finished import; a store made by other means has none."""
    return [_Entry.from_line(line) for line in path.read_bytes().splitlines()] if path.is_file() else []


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return ""


def _write_durably(path: Path, content: bytes) -> None:
    """Write by rename: the file is whole, or is not there."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(path)
