"""A small drawn data set: two dark lungs on a brighter body, with masks and labels that the pixels decide."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from lungscope.data.split import Split, make_split
from lungscope.data.store import Record, Store, write_records

pytest.importorskip("torch", reason="needs the extra [train]")

SIZE = 64
LABELS = ("COVID-19", "Normal", "Viral Pneumonia")


def draw(rng: np.random.Generator, label: int) -> tuple[np.ndarray, np.ndarray]:
    """A film u8 [64, 64] and its mask u8 0/255. Class 0 has a bright spot in each lung, class 2 a bright stripe."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    top, shift = rng.integers(-3, 4), rng.integers(-3, 4)
    mask = np.zeros((SIZE, SIZE), bool)
    for centre in (19, 45):
        mask |= ((rows - 32 - top) / 20) ** 2 + ((columns - centre - shift) / 9) ** 2 < 1
    film = np.where(mask, 60.0, 170.0) + rng.normal(0, 6, (SIZE, SIZE))
    if label == 0:
        film[(np.abs(rows - 32) < 5) & mask] += 80
    elif label == 2:
        film[(columns % 6 < 2) & mask] += 60
    return film.clip(0, 255).astype(np.uint8), (mask * 255).astype(np.uint8)


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Split]:
    root = tmp_path_factory.mktemp("drawn")
    rng = np.random.default_rng(0)
    pairs = [draw(rng, i % 3) for i in range(96)]
    images, masks = (np.stack(side) for side in zip(*pairs, strict=True))
    np.save(root / "images.npy", images)
    np.save(root / "masks.npy", masks)
    records = [
        Record(
            f"f{i:03}", f"f{i:03}.png", LABELS[i % 3], f"m{i:03}.png", "", hashlib.sha256(image).hexdigest(), SIZE, SIZE
        )
        for i, image in enumerate(images)
    ]
    write_records(root / "records.csv", records)
    facts = {"schema_version": "1", "name": "drawn", "size": SIZE, "origin": str(root)}
    (root / "store.json").write_text(json.dumps(facts))
    store = Store.open(root)
    # Drawn films resemble each other; the group rule has its own tests.
    rows = make_split([store], seed=0)[0].rows
    parts = ["train"] * 72 + ["val"] * 12 + ["test"] * 12
    split = Split(
        tuple(
            type(row)(row.store, row.id, row.sha256, row.label, row.id, part)
            for row, part in zip(rows, parts, strict=True)
        )
    )
    return store, split
