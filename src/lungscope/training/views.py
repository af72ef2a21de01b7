"""What a classifier is trained on: views of every film, cut by the very code that cuts them at inference."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lungscope.batch import in_order
from lungscope.bundle import Bundle, sha256_of
from lungscope.data.store import Record, Store
from lungscope.errors import DataError, InputError
from lungscope.hardware import cores
from lungscope.pipeline import Analyzer
from lungscope.stages.classification import ViewSpec, lung_view
from lungscope.writers.atomic import whole_file

log = logging.getLogger(__name__)

#: One more with every change of how code finds lungs or cuts views, so that those of before are cut again.
FOUND_BY = 3


@dataclass(frozen=True)
class Views:
    """views: u8 [N, V, V], one row a film of the store, 0..255. usable: bool [N], False where no lungs were found."""

    views: NDArray[np.uint8]
    usable: NDArray[np.bool_]


def cut_views(store: Store, bundle: Bundle, specs: dict[str, ViewSpec], cache: Path) -> dict[str, Views]:
    """Segment every film of `store` once with `bundle` and cut each view in `specs`, not equalised yet; kept under
    `cache` by content, and cut again only where it is not there.

    The cache key is made of `FOUND_BY` and the films', the segmenter's and the views' digests, so a stale file is never
    read.
    """
    films = hashlib.sha256("".join(record.sha256 for record in store.records).encode()).hexdigest()
    segmenter = bundle.segmenter
    networks = [[weights.sha256 for weights in segmenter.members], segmenter.pool, segmenter.threshold, segmenter.size]
    keys = {
        name: hashlib.sha256(json.dumps([FOUND_BY, films, networks, _cut_by(spec)]).encode()).hexdigest()[:16]
        for name, spec in specs.items()
    }
    paths = {name: (cache / f"{key}-views.npy", cache / f"{key}-usable.npy") for name, key in keys.items()}
    if missing := {name: spec for name, spec in specs.items() if not all(path.exists() for path in paths[name])}:
        _cut(store, bundle, missing, paths)
    return {
        name: Views(np.load(views, mmap_mode="r", allow_pickle=False), np.load(usable, allow_pickle=False))
        for name, (views, usable) in paths.items()
    }


def lung_facts(pool: str, threshold: float, size: int) -> dict[str, Any]:
    """How a segmenter's maps become lungs, as it stands in the facts of a classifier's run."""
    return {"pool": pool, "threshold": threshold, "size": size}


def finder_facts(bundle: Bundle) -> dict[str, Any]:
    """Which segmenter of a bundle finds the lungs, and how, as it stands in the facts of a classifier's run."""
    finder = bundle.segmenter
    return {
        "segmenter": {member.path.name: member.sha256 for member in finder.members},
        "lungs": lung_facts(finder.pool, finder.threshold, finder.size),
    }


def saw_lungs_of(facts: Mapping[str, Any], bundle: Bundle) -> bool:
    """Whether a classifier's run was shown the lungs that a bundle finds; runs of before do not say how these were
    found."""
    found, runs = finder_facts(bundle), bundle.manifest.get("training", {}).get("runs", [])
    known = [*runs[: len(bundle.segmenter.members)], *({} for _ in bundle.segmenter.members)]
    finders = {
        file: same_lungs(digest, run) for (file, digest), run in zip(found["segmenter"].items(), known, strict=False)
    }
    lungs = facts.get("lungs", found["lungs"]) == found["lungs"]
    return lungs and saw_one_of(facts.get("segmenter", found["segmenter"]), finders)


def same_lungs(digest: str, run: Mapping[str, Any]) -> set[str]:
    """SHA-256 of the graphs that find the same lungs as a segmenter's: its own, and those that its grades were fitted
    to. run: its facts."""
    return {digest, *run.get("same_lungs", [])}


def saw_one_of(saw: Mapping[str, str], finders: Mapping[str, Set[str]]) -> bool:
    """Whether the segmenters that a run saw the lungs of, SHA-256 by file, are each one of `finders`."""
    return saw.keys() == finders.keys() and all(digest in finders[file] for file, digest in saw.items())


def view_facts(spec: ViewSpec) -> dict[str, Any]:
    """A view as it stands in the facts of a run; `view_of` reads it back."""
    return {"shown": spec.input, **{key: value for key, value in asdict(spec).items() if key != "input"}}


def view_of(facts: Mapping[str, Any]) -> ViewSpec:
    """The view in the facts of a run."""
    known = {key: facts[key] for key in ("crop", "margin", "size")}
    changed = {key: facts.get(key, False) for key in ("equalised", "aligned")}
    return ViewSpec(facts["shown"], **known, **changed)


def _cut_by(spec: ViewSpec) -> dict[str, Any]:
    """What views are known by in the cache, which has them before they are equalised."""
    return {key: value for key, value in asdict(spec).items() if key != "equalised"}


def _same_file(store: Store, record: Record) -> None:
    """Raises DataError where the film's file can not be read now or is not that which was imported: what became of it
    must not be remembered of that."""
    path = store.path_of(record)
    try:
        changed = sha256_of(path) != record.sha256
    except OSError as error:
        raise DataError(
            f"{store.name}: {path}: {error.strerror or error}. Bring its folder back, or import again"
        ) from error
    if changed:
        raise DataError(f"{store.name}: {path} is not the file that was imported. Import the store again")


def _cut(store: Store, bundle: Bundle, specs: dict[str, ViewSpec], paths: dict[str, tuple[Path, Path]]) -> None:
    analyzer = Analyzer(replace(bundle, classifier=None), precision="f32", streams=cores())
    count = len(store.records)
    arrays = {name: np.zeros((count, spec.size, spec.size), np.uint8) for name, spec in specs.items()}
    usable = np.ones(count, np.bool_)

    def cut(i: int) -> None:
        record = store.records[i]
        try:
            report = analyzer.analyze(store.path_of(record))
        except InputError as error:
            _same_file(store, record)
            usable[i] = False
            log.warning("%s: %s", record.id, error)
            return
        if report.film.source.sha256 != record.sha256:
            _same_file(store, record)
        for name, spec in specs.items():
            view, _ = lung_view(report.film.pixels, report.lungs, replace(spec, equalised=False))
            arrays[name][i] = np.rint(view * 255)

    for done, _ in enumerate(in_order(cut, range(count)), 1):
        if done % 1000 == 0:
            log.info("%s: %d of %d films cut", store.name, done, count)
    for name in specs:
        views, flags = paths[name]
        views.parent.mkdir(parents=True, exist_ok=True)
        for path, array in ((flags, usable), (views, arrays[name])):
            with whole_file(path) as file:
                np.save(file, array, allow_pickle=False)
