"""An audit as one HTML file that needs nothing else, and as JSON."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from lungscope.data.audit import FEATURES, TELLING, Audit, ClassFacts, FilmRef, Pair, StoreFacts
from lungscope.data.store import Store
from lungscope.writers.atomic import write_text

#: The most rows of each kind that the page shows; audit.json has all.
MOST_PAIRS, MOST_MASKS, MOST_FILES, SAMPLES = 100, 60, 200, 6
THUMBNAIL = 112
_COLOURS = ("#2a78b8", "#c7522a", "#3f8f4f", "#8a5bb0", "#a8862b", "#5f6b7a")

_STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8881}
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:.8rem 0;display:block;overflow-x:auto}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums}.hot{font-weight:700;color:#c7522a}
figure{display:inline-block;margin:.2rem .5rem .6rem 0;font-size:12px;width:112px;overflow-wrap:anywhere}
img{display:inline-block;border-radius:3px;background:#000}.warn{border-left:4px solid #c7522a;padding-left:.6rem}
section{border-top:1px solid var(--line);margin-top:2rem}svg{background:var(--soft);border-radius:4px;max-width:100%}
"""


class _Safe(str):
    """Text that is HTML already."""


def write_audit(audit: Audit, stores: Sequence[Store], out: Path) -> tuple[Path, Path]:
    """Write `out`/audit.json and `out`/audit.html, each whole or not at all; return both paths."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {"audit.json": json.dumps(audit.to_json(), indent=1) + "\n", "audit.html": page(audit, stores)}
    for name, text in texts.items():
        write_text(out / name, text)
    return out / "audit.json", out / "audit.html"


def page(audit: Audit, stores: Sequence[Store]) -> str:
    """The audit as HTML. Pictures are data URIs; all text that came from the data is escaped."""
    by_name = {store.name: store for store in stores}
    findings = "".join(f"<p class=warn>{html.escape(text)}</p>" for text in audit.findings)
    body = "".join(_store_section(facts, by_name[facts.name]) for facts in audit.stores)
    title = f"Data audit: {', '.join(facts.name for facts in audit.stores)}"
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><h1>{html.escape(title)}</h1>"
        f"{findings or '<p>Nothing to remark.</p>'}{body}{_pairs_section(audit.pairs, by_name)}</html>\n"
    )


# Sections -------------------------------------------------------------------------------------------------------------


def _store_section(facts: StoreFacts, store: Store) -> str:
    return (
        f"<section><h2>{html.escape(facts.name)}</h2><p>{facts.films:,} films in {html.escape(str(facts.root))}</p>"
        + _table(
            ("class", "films", "published", "difference", "with mask", "sources"),
            (
                (
                    _name(item),
                    item.films,
                    "" if item.published is None else item.published,
                    _Number("" if item.published is None else f"{item.films - item.published:+,}"),
                    item.with_mask,
                    _sources(item),
                )
                for item in facts.classes
            ),
        )
        + "<h3>What each class looks like</h3>"
        + "".join(_class_pictures(item, store) for item in facts.classes)
        + "<h3>Intensities</h3><p>Mean share of a film's pixels at each grey level, black at the left.</p>"
        + _histograms(facts.classes)
        + _statistics(facts.classes)
        + _separations(facts.classes)
        + _mask_section(facts, store)
        + _files("Files that were not taken, or only under a condition", facts.rejected)
        + _files("Films that are gone or have changed since the import", facts.changed)
        + "</section>"
    )


def _sources(item: ClassFacts) -> str:
    if not any(item.sources):
        return "not known"
    return ", ".join(f"{name or 'not known'} {films:,}" for name, films in item.sources.items())


def _class_pictures(item: ClassFacts, store: Store) -> str:
    mine = [i for i, record in enumerate(store.records) if record.label == item.label]
    spread = [mine[k] for k in np.linspace(0, len(mine) - 1, min(200, len(mine))).astype(int)]
    average = np.mean([store.images[i] for i in spread], axis=0).astype(np.uint8)
    samples = [mine[k] for k in np.linspace(0, len(mine) - 1, min(SAMPLES, len(mine))).astype(int)]
    figures = [_figure(average, f"mean of {len(spread)} films of {_name(item)}")]
    figures += [_film_figure(store, i, store.records[i].id) for i in samples]
    return f"<div>{''.join(figures)}</div>"


def _statistics(classes: Sequence[ClassFacts]) -> str:
    rows = []
    for item in classes:
        for name in FEATURES:
            s = item.statistics[name]
            values = [f"{value:,.4g}" if s.defined else "" for value in (s.mean, s.std, s.p5, s.median, s.p95)]
            rows.append((_name(item), name, s.defined, *map(_Number, values)))
    return _details(
        "Sizes and intensities of the films, by class",
        _table(("class", "of each film", "films", "mean", "std", "5 %", "median", "95 %"), rows),
    )


def _separations(classes: Sequence[ClassFacts]) -> str:
    if len(classes) < 2:
        return ""
    rows = (
        (name, *(_Number("" if np.isnan(v) else f"{v:.2f}", hot=max(v, 1 - v) >= TELLING) for v in values))
        for name in FEATURES
        for values in [[item.separation[name] for item in classes]]
    )
    return (
        "<h3>What gives a class away without its lungs</h3><p>Area under the ROC curve of one number for this class "
        "against all others; 0.5 tells nothing, 0 or 1 everything.</p>" + _table(("", *map(_name, classes)), rows)
    )


def _histograms(classes: Sequence[ClassFacts]) -> str:
    top = max((float(item.histogram[1:-1].max()) for item in classes), default=0.0) or 1.0
    lines, key = [], []
    for k, item in enumerate(classes):
        colour = _COLOURS[k % len(_COLOURS)]
        points = " ".join(f"{2 * x},{160 - 150 * min(float(y) / top, 1):.1f}" for x, y in enumerate(item.histogram))
        lines.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{points}"/>')
        key.append(f'<span style="color:{colour}">&#9632; {html.escape(_name(item))}</span>')
    return f'<svg width="512" height="165" viewBox="0 0 512 165">{"".join(lines)}</svg><p>{" &nbsp; ".join(key)}</p>'


def _mask_section(facts: StoreFacts, store: Store) -> str:
    if not facts.masks:
        return ""
    odd = [item for item in facts.masks if item.code != "missing"]
    missing = len(facts.masks) - len(odd)
    shown = sorted(odd, key=lambda item: item.lung_share)
    shown = [shown[k] for k in np.linspace(0, len(shown) - 1, min(MOST_MASKS, len(shown))).astype(int)]
    figures = "".join(_film_figure(store, item.film.index, f"{item.film.id}: {item.reason}") for item in shown)
    return (
        f"<h3>Lung masks</h3><p>{missing:,} films have no usable mask though others of their class have one; "
        f"{len(odd):,} masks cover an odd share of the film{_more(len(odd), len(shown))}.</p>{figures}"
    )


def _files(title: str, items: Sequence[object]) -> str:
    if not items:
        return ""
    rows = [tuple(vars(item).values()) for item in items[:MOST_FILES]]
    head = f"{title} ({len(items):,}{_more(len(items), len(rows))})"
    return _details(head, _table(("path", "kind", "code", "reason"), rows))


def _pairs_section(pairs: Sequence[Pair], stores: dict[str, Store]) -> str:
    if not pairs:
        return "<section><h2>Duplicates</h2><p>None found.</p></section>"

    def side(film: FilmRef) -> str:
        caption = f"{film.store} / {film.label or 'unlabelled'} / {film.id}"
        return _figure(stores[film.store].images[film.index], caption)

    def row(pair: Pair) -> tuple[str, ...]:
        how = "same file" if pair.exact else f"correlation {pair.correlation:.4f}"
        words = [how] + ["across classes"] * pair.across_classes + ["across stores"] * pair.across_stores
        return _Safe(side(pair.first)), _Safe(side(pair.second)), ", ".join(words)

    shown = pairs[:MOST_PAIRS]
    return (
        f"<section><h2>Duplicates</h2><p>{sum(pair.exact for pair in pairs):,} exact, "
        f"{sum(not pair.exact for pair in pairs):,} near, {sum(pair.across_classes for pair in pairs):,} across classes"
        f"{_more(len(pairs), len(shown))}.</p>{_table(('first', 'second', ''), map(row, shown))}</section>"
    )


# Pieces ---------------------------------------------------------------------------------------------------------------


class _Number(str):
    """A table cell that is set as a number; `hot` ones stand out."""

    hot: bool

    def __new__(cls, text: str, *, hot: bool = False) -> _Number:
        number = super().__new__(cls, text)
        number.hot = hot
        return number


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    def cell(value: object) -> str:
        if isinstance(value, _Safe):
            return f"<td>{value}</td>"
        if isinstance(value, _Number):
            return f"<td class='n{' hot' * value.hot}'>{html.escape(value)}</td>"
        if isinstance(value, int):
            return f"<td class=n>{value:,}</td>"
        return f"<td>{html.escape(str(value))}</td>"

    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def _details(title: str, inside: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{inside}</details>"


def _figure(image: NDArray[np.uint8], caption: str) -> str:
    small = cv2.resize(image, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 82])
    uri = f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode('ascii')}"
    picture = f'<img alt="" width={THUMBNAIL} height={THUMBNAIL} src="{uri}">'
    return f"<figure>{picture}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _film_figure(store: Store, index: int, caption: str) -> str:
    """A film with the outline of its mask, where it has one."""
    image = np.asarray(store.images[index])
    if store.records[index].mask:
        mask = (store.masks[index] >= 128).view(np.uint8)
        contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        image = cv2.drawContours(cv2.cvtColor(image, cv2.COLOR_GRAY2BGR), contours, -1, (60, 220, 250), 2)
    return _figure(np.asarray(image, np.uint8), caption)


def _name(item: ClassFacts) -> str:
    return item.label or "unlabelled"


def _more(total: int, shown: int) -> str:
    return f"; {shown:,} of {total:,} shown, all are in audit.json" if shown < total else ""
