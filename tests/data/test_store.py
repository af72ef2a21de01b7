"""What a store refuses to open."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lungscope.data.store import Record, Store, write_records
from lungscope.errors import DataError

Draw = Callable[..., np.ndarray]


@pytest.fixture
def store(make_store: Callable[..., Store], draw: Draw, draw_mask: Draw) -> Store:
    return make_store("s", {"a": draw(1), "b": draw(2)}, labels={"a": "Normal"}, masks={"a": draw_mask()})


def test_a_store_opens_as_it_was_written(store: Store) -> None:
    again = Store.open(store.root)
    assert again.records == store.records
    assert isinstance(again.records[0].height, int)
    assert (again.name, again.size) == ("s", 64)
    assert isinstance(again.images, np.memmap)
    assert again.path_of(again.records[0]).is_file()
    mask = again.mask_path_of(again.records[0])
    assert mask is not None and mask.is_file()
    assert again.mask_path_of(again.records[1]) is None


def test_an_unfinished_store_does_not_open(store: Store) -> None:
    (store.root / "store.json").unlink()
    with pytest.raises(DataError, match="not a finished store"):
        Store.open(store.root)


def test_another_schema_does_not_open(store: Store) -> None:
    facts = json.loads((store.root / "store.json").read_text())
    (store.root / "store.json").write_text(json.dumps({**facts, "schema_version": "2"}))
    with pytest.raises(DataError, match="schema '2'"):
        Store.open(store.root)


def test_arrays_and_records_must_agree(store: Store) -> None:
    write_records(store.root / "records.csv", store.records[:1])
    with pytest.raises(DataError, match="1 records, 2 images"):
        Store.open(store.root)


def test_records_round_trip_whatever_their_text(tmp_path: Path, store: Store) -> None:
    odd = Record('a,b\n"c"', "ä/ö.png", "", "", "p;1", "0" * 64, 1, 2)
    write_records(store.root / "records.csv", [odd, store.records[1]])
    assert Store.open(store.root).records[0] == odd
