"""A film's folder of results, and what it is called."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np

from lungscope.report import Report
from lungscope.writers.atomic import whole_file, write_text
from lungscope.writers.html import PAGE, page
from lungscope.writers.json import RESULTS, RUN, write_json
from lungscope.writers.overlay import Drawing, png, render
from lungscope.writers.run import RUN_FORMATS

REPORT, LUNGS, SALIENCY, OVERLAY = "report.json", "lungs.png", "saliency.npy", "overlay.png"
#: In a film's folder while it may hold something else than the film's row tells of.
CHANGING = ".changing"

#: What each format writes for a film; what some write for the run is in `RUN_FORMATS`. "dicom" needs the extra
#: `dicom-out` and, for a film that is not DICOM, a study to be made.
FORMATS: dict[str, tuple[str, ...]] = {
    "json": (REPORT,),
    "png": (LUNGS, SALIENCY, OVERLAY),
    "html": (PAGE,),
    "dicom": ("film.dcm", "lungs.dcm", "saliency.dcm", "overlay.dcm", "report.dcm"),
}
#: What is written unless something else is asked for.
DEFAULT_FORMATS = ("json", "png", "html")


def write(report: Report, folder: Path, formats: Sequence[str], *, new_study: bool = False) -> None:
    """Write a film's results, in those of `formats` that are keys of `FORMATS`, into `folder`, over those of an earlier
    run.

    report.json: `Report.to_json`. lungs.png: 8 bit, 0 or 255, source grid. saliency.npy: f32 [H, W], source grid, logit
    units of the predicted class (absent where the bundle only segments). overlay.png, report.html: to look at. *.dcm:
    `lungscope.writers.dicom.objects`, which also says what new_study is and what is raised.
    """
    drawing = Drawing(report)
    clear(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(1) as beside:
        if "png" in formats:
            overlay = beside.submit(_write_overlay, drawing, folder / OVERLAY)
            with whole_file(folder / LUNGS) as file:
                file.write(encode_mask(report.lungs.mask))
            if report.saliency is not None:
                with whole_file(folder / SALIENCY) as file:
                    _write_npy(file, report.saliency.map)
        if "html" in formats:
            write_text(folder / PAGE, page(report, drawing))
        if "png" in formats:
            overlay.result()
    if "json" in formats:
        write_json(folder / REPORT, report.to_json())
    if "dicom" in formats:
        from lungscope.writers import dicom  # an extra

        for kind, dataset in dicom.objects(report, new_study=new_study).items():
            with whole_file(folder / f"{kind}.dcm") as file:
                file.write(dicom.encode(dataset))


def _write_overlay(drawing: Drawing, path: Path) -> None:
    with whole_file(path) as file:
        file.write(png(render(drawing.report, drawing)))


def _write_npy(file: BinaryIO, array: np.typing.NDArray[np.float32]) -> None:
    """The bytes of `np.save`, which says of a full disk no more than how many of them are missing."""
    array = np.ascontiguousarray(array)
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    file.write(array.data)


def clear(folder: Path) -> None:
    """Remove the files that `write` makes, and what is left of those that it did not finish: no file of an earlier run
    may pass for one of this run."""
    for names in FORMATS.values():
        for name in names:
            (folder / name).unlink(missing_ok=True)
            for part in folder.glob(f".{name}.*.part"):
                part.unlink(missing_ok=True)


def encode_mask(mask: np.typing.NDArray[np.bool_]) -> bytes:
    """A mask bool [H, W] as an 8-bit grey PNG of 0 and 255."""
    ok, data = cv2.imencode(".png", mask.view(np.uint8) * np.uint8(255))
    if not ok:
        raise RuntimeError("OpenCV could not encode a PNG")
    return data.tobytes()


def folder_names(paths: Sequence[Path], others: Mapping[Path, str] | None = None) -> list[str]:
    """A folder name for each path, no two alike even where case does not count.

    others: films of earlier runs whose folders stay beside these, and what they are called.

    The name is the file's stem. Where several of all these films share a stem, or a stem is no good as a folder's name
    beside results.jsonl, it is `<stem>-<8 hex digits>` of the SHA-256 of the absolute path: the same in every run over
    the same inputs, in any order.
    """
    others = others or {}
    counts = Counter(path.stem.casefold() for path in (*paths, *others))
    taken = {RESULTS, RUN, *(name for name, _ in RUN_FORMATS.values()), *map(str.casefold, others.values())}
    # A name that ends in a dot or a space is another name on Windows, and "." and ".." are no names anywhere.
    unique = {stem for stem, count in counts.items() if count == 1 and stem == stem.rstrip(". ") != ""} - taken
    taken |= unique
    names = []
    for path in paths:
        name = path.stem
        if name.casefold() not in unique:
            digest = hashlib.sha256(str(path.absolute()).encode("utf-8", "surrogateescape")).hexdigest()
            base = path.stem.strip(". ")[:60] or "film"
            name = next(name for n in range(8, 65) if (name := f"{base}-{digest[:n]}").casefold() not in taken)
            taken.add(name.casefold())
        names.append(name)
    return names
