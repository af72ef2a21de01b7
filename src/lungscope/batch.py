"""Many films at once: read, analysed and written side by side, rows in order, memory flat, and a run that was cut off
goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from time import perf_counter
from typing import Any, TypeVar

from lungscope.bundle import sha256_of
from lungscope.errors import LungscopeError, UsageError
from lungscope.hardware import cores
from lungscope.pipeline import Analyzer, failure
from lungscope.readers import absolute
from lungscope.readers.common import MAX_BYTES
from lungscope.readers.remote import is_url
from lungscope.report import DISCLAIMER, Failure, Report
from lungscope.stages.quality import Warning_
from lungscope.writers.claim import Claim, claimed
from lungscope.writers.folder import CHANGING, FORMATS, clear, folder_names, write
from lungscope.writers.json import RESULTS, RUN, Results, arrange, read_rows, row, whole_rows, write_json
from lungscope.writers.run import end_run

#: Films that are begun before their turn, for each worker: one slow film must not leave the others idle.
AHEAD = 2
NO_STUDY = Warning_(
    code="no-study",
    message="This film is no DICOM file, so there is no study that DICOM objects could belong to, and none were "
    "written. Ask for a new one with --new-study.",
    stage="dicom",
)

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(work: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None) -> Iterator[Result]:
    """`work(item)` for each item, in order, on `workers` threads (None: one a core).

    `items` is read no further than `AHEAD` items a worker beyond the result that is waited for. What `work` raises is
    raised here, at its place; what has begun is waited for, and nothing else begins.
    """
    workers = workers or cores()
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="film") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def run_films(
    analyzer: Analyzer,
    films: Sequence[Path],
    out: Path,
    formats: Sequence[str],
    *,
    new_study: bool = False,
    resume: bool = False,
    workers: int | None = None,
    stop: Event | None = None,
    progress: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """Analyse `films` side by side, write each as it is done, then what `formats` have for the run, and return the
    content of run.json.

    formats, new_study: see `writers.folder.write`. A film that is not DICOM gets its other formats, tables among them,
    and a warning where it may not have a new study; where there are no others, it fails.
    resume: keep what is in `out` of films whose path and SHA-256 have not changed, where the same bundle, lungscope,
    arithmetic and formats made it; films that failed are tried again. Rows of other films in `out` stay, with their
    folders.
    workers: films at a time, None for one a core; give `analyzer` as many streams.
    stop: once set, no other film is begun, those that were are finished, and the run is closed with "interrupted" true.
    progress: called after each film.
    Raises UsageError where another run writes to `out` or it can not be written, MissingExtraError where a format needs
    a package that is not installed, and as `record` does.
    """
    of_films = [name for name in formats if name in FORMATS]
    workers = workers or cores()
    engine = {"engine": "local", "workers": workers}
    with claimed(out, formats) as ours:
        others = _others(out, map(str, films)) if resume else None
        names = dict(zip(films, folder_names(films, others), strict=True))
        folders = {str(film): name if of_films else None for film, name in names.items()}

        def entries(known: Mapping[str, str]) -> Iterator[dict[str, Any] | None]:
            def one(film: Path) -> dict[str, Any] | None:
                path = str(film)
                if path in known and content_of(film) == known[path]:
                    return None
                return _finish(film, next(analyzer.analyze_many([film])), ours, names[film], formats, new_study)

            yield from in_order(one, _until(stop, films), workers)
            analyzer.release()  # tables come now, with memory of their own

        return record(
            entries, folders, analyzer, out, formats, engine, new_study=new_study, resume=resume, progress=progress
        )


def content_of(film: Path) -> str | None:
    """The SHA-256 of a film's file; None where `read` would not read it."""
    with suppress(OSError):
        if film.is_file() and film.stat().st_size <= MAX_BYTES:
            return sha256_of(film)
    return None


def record(
    entries: Callable[[Mapping[str, str]], Iterable[dict[str, Any] | None]],
    folders: Mapping[str, str | None],
    analyzer: Analyzer,
    out: Path,
    formats: Sequence[str],
    engine: Mapping[str, Any],
    *,
    new_study: bool = False,
    resume: bool = False,
    progress: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """Write the rows of a run as they come, then what `formats` have for the run, and return the content of run.json.

    An earlier row goes when there is a new one of the same film, and not before.
    entries: given the SHA-256 by path of films that may be kept, gives a row for each film, in any order; None for one
    that was kept; fewer where it was interrupted. folders: every film's path, in order, and its folder in `out`.
    engine: what run.json says of how `entries` came about. The others: see `run_films`.
    Raises LungscopeError (code "rows-lost") where something else wrote to results.jsonl meanwhile, OSError where a file
    can not be written.
    """
    started, clock = datetime.now(UTC), perf_counter()
    made_with = _made_with(analyzer, formats, new_study)
    known: dict[str, str] = {}
    earlier = resume and (out / RESULTS).exists() and (out / RESULTS).stat().st_size > 0
    if earlier:
        known = _finished(out, folders, made_with)
        arrange(out / RESULTS, folders)  # half a row at its end would spoil the next one
    kept = begun = 0
    in_place, order = not earlier, iter(folders)
    with Results(out, append=resume) as results:
        for entry in entries(known):
            begun += 1
            if entry is None:
                kept += 1
            else:
                results.add({**entry, "made_with": made_with})
                in_place &= entry["path"] == next(order, None)
                if folder := entry.get("folder"):
                    (out / folder / CHANGING).unlink(missing_ok=True)
            if progress:
                progress()
    if not in_place:
        arrange(out / RESULTS, folders, _replaced(out, folders))
    seconds = perf_counter() - clock
    counts, others = Counter[str](), 0
    for entry in read_rows(out / RESULTS):
        if entry["path"] in folders:
            counts[entry["status"]] += 1
        else:
            others += 1
    if begun == len(folders) != counts.total():
        raise LungscopeError(
            f"{out / RESULTS} has {counts.total()} rows of {len(folders)} films: something else wrote to it. Give "
            "each run a folder of its own, and do this one again.",
            code="rows-lost",
        )
    classifier = analyzer.bundle.classifier
    conformal = None if classifier is None else classifier.conformal
    run = {
        "schema_version": "1",
        "disclaimer": DISCLAIMER,
        "started": started.isoformat(timespec="seconds"),
        "seconds": seconds,
        "inputs": len(folders),
        "done": counts["done"],
        "failed": counts["failed"],
        "kept": kept,
        "unchecked": max(0, counts.total() - begun),
        "others": others,
        "interrupted": begun < len(folders),
        "films_per_second": (begun - kept) / seconds,
        **engine,
        "formats": list(formats),
        "results": RESULTS,
        "out": str(out),
        "bundle": {
            "name": analyzer.bundle.name,
            "version": analyzer.bundle.version,
            "labels": [] if classifier is None else list(classifier.labels),
            "conformal_coverage": None if conformal is None else conformal.coverage,
            "weights": {weights.path.name: weights.sha256 for weights in analyzer.bundle.weights},
        },
        "device": analyzer.device,
        "precision": analyzer.precision,
        "precision_why": analyzer.precision_why,
        "versions": analyzer.versions,
    }
    # First, so that the next run knows what to remove where this one ends before its pages are whole.
    write_json(out / RUN, run)
    end_run(out, run, formats)
    return run


def computes_with(analyzer: Analyzer) -> dict[str, Any]:
    """All that a film's numbers could differ by: the bundle's whole manifest, the program and its arithmetic."""
    return {
        "bundle": analyzer.bundle.manifest,
        "versions": analyzer.versions,
        "device": analyzer.device,
        "precision": analyzer.precision,
    }


def _until(stop: Event | None, films: Sequence[Path]) -> Iterator[Path]:
    for film in films:
        if stop is not None and stop.is_set():
            return
        yield film


def _made_with(analyzer: Analyzer, formats: Sequence[str], new_study: bool) -> str:
    """16 hex digits that differ wherever a film's results could: by what computes them, and what is written."""
    facts = [*computes_with(analyzer).values(), sorted(formats), new_study]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _finished(out: Path, folders: Mapping[str, str | None], made_with: str) -> dict[str, str]:
    """SHA-256 by path of the films whose last row says that they are done, in their place in `folders` or without files
    of their own, by the same means."""
    found: dict[str, str] = {}
    for entry in whole_rows(out / RESULTS):
        path, folder = entry["path"], entry.get("folder")
        found.pop(path, None)
        if entry["status"] != "done" or entry.get("made_with") != made_with or path not in folders:
            continue
        whole = folder is None or ((out / folder).is_dir() and not (out / folder / CHANGING).exists())
        if whole and folder in (None, folders[path]):
            found[path] = entry["sha256"]
    return found


def _others(out: Path, films: Iterable[str]) -> dict[Path, str]:
    """The folders that rows of other films than these have."""
    found = {entry["path"]: entry["folder"] for entry in whole_rows(out / RESULTS) if entry.get("folder")}
    return {Path(path): found[path] for path in _of_others(found.keys(), set(films))}


def _replaced(out: Path, folders: Mapping[str, str | None]) -> set[str]:
    """The paths of rows that say nothing beside those of this run's films: of the same films, spelled otherwise, or of
    a folder above them that was empty once."""
    there = {entry["path"] for entry in whole_rows(out / RESULTS)}
    return there - folders.keys() - _of_others(there, there & folders.keys())


def _of_others(paths: Set[str], films: Set[str]) -> set[str]:
    """Those of `paths` that lead neither to one of `films`, however they are spelled, nor to a folder above one."""
    left, covered = set(paths - films), set[str]()
    for film in films if left else ():
        place = _place(film)
        while str(place) not in covered:
            covered.add(str(place))
            place = place.parent
    return {path for path in left if str(_place(path)) not in covered}


def _place(path: str) -> Path:
    """What a path or URL is compared by."""
    return Path(path) if is_url(path) else absolute(Path(path))


def _finish(
    path: Path, result: Report | Failure, ours: Claim, name: str, formats: Sequence[str], new_study: bool
) -> dict[str, Any]:
    """Write a film's files, and give its row. formats: of the run. With tables alone, or where the film failed, now or
    in writing, it has no files."""
    folder = ours.out / name
    # What is cleared before writing could be the film itself.
    if os.path.realpath(path.parent) == os.path.realpath(folder):
        error = UsageError(f"{path}: lies in {folder}, where its results would go. Name another --out.")
        return row(failure(path, error), None)
    if isinstance(result, Report) and "dicom" in formats and not new_study and result.source.format != "DICOM":
        others = [kind for kind in formats if kind != "dicom"]
        if others:
            formats = others
            result = replace(result, run=replace(result.run, warnings=(*result.run.warnings, NO_STUDY)))
    of_film = [kind for kind in formats if kind in FORMATS]
    if isinstance(result, Report) and of_film:
        try:
            if not ours.take(name):
                raise UsageError(
                    f"{path}: its results would go to {folder}, which holds what lungscope did not make. Name another "
                    "--out."
                )
            if folder.is_dir():
                (folder / CHANGING).touch()
            write(result, folder, of_film, new_study=new_study)
        except Exception as error:
            result = failure(path, error)
    if (isinstance(result, Failure) or not of_film) and name in ours and folder.is_dir():
        # A folder that can not be cleared must not stop the run.
        with suppress(OSError):
            clear(folder)
            (folder / CHANGING).unlink(missing_ok=True)
            if not any(folder.iterdir()):
                folder.rmdir()
    return row(result, name if of_film else None)
