"""The audit finds what was planted, and its page is safe and self-contained."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from lungscope.data.audit import Audit, audit
from lungscope.data.audit_page import page, write_audit
from lungscope.data.store import Store
from lungscope.errors import DataError

Draw = Callable[..., np.ndarray]
Make = Callable[..., Store]


@pytest.fixture
def store(make_store: Make, draw: Draw, draw_mask: Draw) -> Store:
    """Two classes, the first framed in white; a near-duplicate across classes, an exact one, and odd masks."""
    films = {f"c{i}": draw(i, 100, 80) for i in range(8)} | {f"n{i}": draw(50 + i, 100, 80) for i in range(8)}
    for i in range(8):
        films[f"c{i}"] = films[f"c{i}"].copy()
        films[f"c{i}"][:5], films[f"c{i}"][-5:], films[f"c{i}"][:, :5], films[f"c{i}"][:, -5:] = 255, 255, 255, 255
    films["n7"] = (films["c7"] * 0.95).astype(np.uint8)
    films["n6"] = films["n5"]
    speck, all_over = np.zeros((100, 80), np.uint8), np.full((100, 80), 255, np.uint8)
    speck[:4, :4] = 255
    masks = {name: draw_mask(100, 80) for name in films if name != "c0"} | {"c1": speck, "c2": all_over}
    labels = {name: "COVID-19" if name[0] == "c" else "Normal" for name in films}
    return make_store("s", films, labels=labels, masks=masks)


def test_counts_stand_beside_the_published_ones_where_films_are_called_so(store: Store, make_store: Make) -> None:
    covid, normal = audit([store]).stores[0].classes
    assert (covid.label, covid.films, covid.published, covid.with_mask) == ("COVID-19", 8, None, 7)
    assert (normal.label, normal.films, normal.published, normal.with_mask) == ("Normal", 8, None, 8)
    images = np.load(store.root / "images.npy")
    called = {f"COVID-{n}": images[n] for n in range(8)} | {f"Normal-{n}": images[8 + n] for n in range(8)}
    labels = {name: "COVID-19" if name.startswith("COVID") else "Normal" for name in called}
    found = audit([make_store("public", called, labels=labels)]).stores[0].classes
    assert [(item.films, item.published) for item in found] == [(8, 3616), (8, 10192)]


def test_a_source_of_one_class_is_named(store: Store) -> None:
    def audited(**sources: str) -> Audit:
        records = tuple(replace(record, source=sources.get(record.id[0], "")) for record in store.records)
        return audit([replace(store, records=records)])

    assert not [finding for finding in audited().findings if "tells the class" in finding]
    shared = audited(c="A", n="A")
    assert not [finding for finding in shared.findings if "tells the class" in finding]
    found = audited(n="B <i>")
    assert [finding for finding in found.findings if finding.startswith("s: B <i> has films of Normal alone")]
    assert [item.sources for item in found.stores[0].classes] == [{"": 8}, {"B <i>": 8}]
    assert "B &lt;i&gt; 8" in page(found, [store]) and "not known" in page(found, [store])


def test_duplicates_are_found_exact_and_near_and_across_classes_first(store: Store) -> None:
    pairs = audit([store]).pairs
    assert [(p.first.id, p.second.id, p.exact, p.across_classes) for p in pairs] == [
        ("c7", "n7", False, True),
        ("n5", "n6", True, False),
    ]
    assert pairs[0].correlation > 0.985


def test_a_film_with_a_rim_is_a_duplicate(make_store: Make, draw: Draw) -> None:
    films = {"a": draw(1, 256, 256), "rim": np.pad(draw(1, 226, 226), 15), "b": draw(2, 256, 256)}
    (pair,) = audit([make_store("s", films, size=256)]).pairs
    assert {pair.first.id, pair.second.id} == {"a", "rim"} and not pair.exact


def test_duplicates_are_found_across_stores(store: Store, make_store: Make, draw: Draw) -> None:
    other = make_store("other", {"x": draw(53, 100, 80)})
    (pair,) = [pair for pair in audit([store, other]).pairs if pair.across_stores]
    assert (pair.first.id, pair.second.id, pair.exact) == ("n3", "x", True)


def test_odd_masks_are_found(store: Store) -> None:
    found = {item.film.id: item for item in audit([store]).stores[0].masks}
    assert {name: item.code for name, item in found.items()} == {
        "c0": "missing",
        "c1": "odd-area",
        "c2": "odd-area",
    }
    assert np.isnan(found["c0"].lung_share)
    assert found["c2"].lung_share == 1


def test_an_unusual_lung_area_is_found_within_the_limits(make_store: Make, draw: Draw) -> None:
    masks = {}
    for i in range(20):
        mask = np.zeros((100, 100), np.uint8)
        mask[: 30 + i % 3] = 255
        masks[f"f{i}"] = mask
    masks["f7"] = np.zeros((100, 100), np.uint8)
    masks["f7"][:60] = 255
    store = make_store("s", {name: draw(i) for i, name in enumerate(masks)}, masks=masks)
    assert [item.film.id for item in audit([store]).stores[0].masks] == ["f7"]


def test_statistics_leave_the_padding_out_and_see_the_frame(make_store: Make) -> None:
    film = np.full((128, 64), 102, np.uint8)
    film[:, 32:] = 204
    store = make_store("s", {"a": film})
    statistics = audit([store]).stores[0].classes[0].statistics
    got = {name: summary.mean for name, summary in statistics.items()}
    assert (got["height"], got["width"], got["aspect"]) == (128, 64, 2)
    assert got["mean"] == pytest.approx(0.6, abs=1e-3)
    assert got["std"] == pytest.approx(0.2, abs=1e-3)
    assert got["p5"] == pytest.approx(0.4, abs=1e-3)
    assert got["p75"] == pytest.approx(0.8, abs=1e-3)
    assert got["border"] == pytest.approx(0.6, abs=1e-3)
    assert got["black_share"] == got["white_share"] == 0
    assert statistics["lung_share"].defined == 0


def test_a_class_that_its_frame_gives_away_is_named(store: Store) -> None:
    result = audit([store])
    covid, normal = result.stores[0].classes
    assert covid.separation["border"] > 0.95
    assert normal.separation["border"] < 0.05
    assert covid.separation["height"] == 0.5
    assert any("COVID-19 is told from the rest" in text and "border" in text for text in result.findings)


def test_films_that_changed_or_went_since_the_import_are_named(store: Store) -> None:
    store.path_of(store.records[3]).unlink()
    store.path_of(store.records[4]).write_bytes(b"other")
    result = audit([store])
    changed = {item.path: item.code for item in result.stores[0].changed}
    assert changed == {"c3.png": "missing", "c4.png": "changed"}
    assert any("2 films are gone or have changed" in text for text in result.findings)


def test_no_store_and_two_of_one_name_are_refused(store: Store) -> None:
    with pytest.raises(DataError, match="none given"):
        audit([])
    with pytest.raises(DataError, match="different names: s"):
        audit([store, store])


def test_json_is_strict_and_complete(store: Store, tmp_path: Path) -> None:
    json_path, html_path = write_audit(audit([store]), [store], tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["audit.html", "audit.json"]

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    facts = json.loads(json_path.read_text(), parse_constant=refuse)
    assert len(facts["duplicates"]) == 2
    assert facts["duplicates"][0]["across_classes"] is True
    covid = facts["stores"][0]["classes"][0]
    assert sum(covid["histogram"]) == pytest.approx(1, abs=1e-3)
    assert covid["statistics"]["mean"]["defined"] == 8
    assert html_path.read_text().startswith("<!doctype html>")


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_else_and_escapes_what_came_from_the_data(make_store: Make, draw: Draw) -> None:
    evil = "<script>alert(1)</script>"
    films = {"a": draw(1), "b": (draw(1) * 0.9).astype(np.uint8), "c&d": draw(3)}
    store = make_store("s", films, labels={"a": evil, "b": "B & 'C'"})
    text = page(audit([store]), [store])
    seen = Page(text)
    assert "script" not in {tag for tag, _ in seen.tags}
    assert evil in seen.text
    assert "B & 'C'" in seen.text
    pictures = [attributes["src"] or "" for tag, attributes in seen.tags if tag == "img"]
    assert len(pictures) >= 8
    assert all(source.startswith("data:image/jpeg;base64,") for source in pictures)
    assert not re.search(r"(src|href)=.?https?:", text)


def test_a_page_without_findings(make_store: Make, draw: Draw) -> None:
    store = make_store("s", {"a": draw(1), "b": draw(2)}, labels={"a": "X", "b": "X"})
    result = audit([store])
    assert result.findings == ()
    assert "Nothing to remark." in page(result, [store])
